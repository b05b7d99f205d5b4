package oci

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// program is a file that is executed, as it is now.
type program struct {
	dev, ino uint64
	size     int64
	changed  time.Time
}

// openCrun finds crun by a runtime's name. It is not ok for a program of another name,
// or a script.
func openCrun(name string) (f *os.File, p program, ok bool) {
	path, err := exec.LookPath(name)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil || filepath.Base(path) != "crun" {
		return nil, program{}, false
	}
	f, err = os.Open(path)
	if err != nil {
		return nil, program{}, false
	}
	magic := make([]byte, len(elf.ELFMAG))
	_, err = f.ReadAt(magic, 0)
	p, unknown := identify(f)
	if err != nil || unknown != nil || string(magic) != elf.ELFMAG {
		f.Close()
		return nil, program{}, false
	}
	return f, p, true
}

func identify(f *os.File) (program, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return program{}, err
	}
	return program{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, changed: time.Unix(st.Ctim.Unix())}, nil
}

// Copy is crun in sealed memory, to be executed from there. Executed from its file it
// copies itself there each time and begins once more, so that no container finds a way to
// write to the file (CVE-2019-5736); to sealed memory nobody writes at all, so one copy
// does for all containers, and crun is content with it. runc makes itself safe in another
// way that takes next to no time, and a program of another name, like krun, goes by that:
// those are executed as they are.
//
// The zero value has no copy yet. It is safe for concurrent use.
type Copy struct {
	mu   sync.Mutex
	of   program
	file *os.File // nil where there can be none
}

// use returns what to execute for a runtime's name until done is called. Nothing here is
// a reason to fail: without a copy it is the name.
func (c *Copy) use(name string) (command string, done func()) {
	if c == nil || labelled() {
		return name, func() {}
	}
	crun, of, ok := openCrun(name)
	if !ok {
		return name, func() {}
	}
	defer crun.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of != of {
		// Who still uses the one before has it for as long: a file that nobody
		// refers to is closed.
		var err error
		if c.file, err = seal(crun, of); err != nil {
			log.L.WithError(err).Info("crun has to copy itself each time")
		}
		c.of = of
	}
	if c.file == nil {
		return name, func() {}
	}
	file := c.file
	// Not /proc/self: in the child the number may be another file's by then.
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file.Fd()), func() { runtime.KeepAlive(file) }
}

// crunSeals are those by which crun knows a copy of itself: these and no other.
// Source: F_ADD_SEALS in fcntl(2).
const crunSeals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// immutable keeps the mode too: a container that executes its /proc/self/exe has the copy,
// and without it could take from all others the right to execute it. Seals for that are not
// among those that crun knows. Source: FS_IMMUTABLE_FL in ioctl_iflags(2).
const immutable = 0x10

// seal makes a copy. The sysctl vm.memfd_noexec may forbid it, and a kernel before 6.0
// cannot.
func seal(f *os.File, of program) (*os.File, error) {
	fd, err := unix.MemfdCreate("crun", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("crun", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	c := os.NewFile(uintptr(fd), "crun")
	defer c.Close()
	if _, err := io.Copy(c, io.NewSectionReader(f, 0, of.size)); err != nil {
		return nil, fmt.Errorf("copy crun: %w", err)
	}
	if now, err := identify(f); err != nil || now != of {
		return nil, errors.Join(errors.New("crun was changed while it was copied"), err)
	}
	if _, err := unix.FcntlInt(c.Fd(), unix.F_ADD_SEALS, crunSeals); err != nil {
		return nil, fmt.Errorf("seal the copy of crun: %w", err)
	}
	if err := unix.IoctlSetPointerInt(int(c.Fd()), unix.FS_IOC_SETFLAGS, immutable); err != nil {
		return nil, fmt.Errorf("have the copy of crun immutable: %w", err)
	}
	// Opened to be read, as that is what keeps a container from a lease, for which
	// everybody who executes the file would wait.
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", c.Fd()))
}

// labelled tells whether SELinux is in force: there the label of the file may decide what
// crun may do.
func labelled() bool {
	var st unix.Statfs_t
	return unix.Statfs("/sys/fs/selinux", &st) == nil && st.Type == unix.SELINUX_MAGIC
}
