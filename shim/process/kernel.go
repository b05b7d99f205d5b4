package process

import (
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// byKernel is the keeping of kernels that keep an exit status as long as somebody
// has a pidfd. A pin is a mount of that.
type byKernel struct{ pid int }

// ended asks how the process did: as its parent, else from what the kernel keeps for
// the pidfd, else from the process that nobody has reaped yet.
func (k byKernel) ended(fd int) (Exit, bool, error) {
	var si unix.Siginfo
	err := eintr(func() error { return unix.Waitid(unix.P_PIDFD, fd, &si, unix.WEXITED|unix.WNOHANG, nil) })
	if err != nil && !errors.Is(err, unix.ECHILD) && !errors.Is(err, unix.EAGAIN) {
		return Exit{}, false, fmt.Errorf("reap: %w", err)
	}
	in, err := info(fd, unix.PIDFD_INFO_EXIT)
	if err == nil && in.Mask&unix.PIDFD_INFO_EXIT != 0 {
		return exited(unix.WaitStatus(in.Exit_code)), true, nil
	}
	if err != nil {
		return Exit{}, false, lost(err)
	}
	s, ok := readStat(k.pid)
	// The number is that process's only as long as it is not reaped.
	if again, err := info(fd, unix.PIDFD_INFO_EXIT); !ok || !s.zombie() || err != nil || again.Mask&unix.PIDFD_INFO_EXIT != 0 {
		return Exit{}, false, nil
	}
	return exited(s.status), true, nil
}

// pin mounts the pidfd on a file.
func (byKernel) pin(fd int, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	tree, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	return unix.MoveMount(tree, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

func (byKernel) letGo() {}

// openMounted opens the pidfd that is mounted on a file.
func openMounted(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("open pinned process: %w", err)
	}
	// What is there is a plain file if the pin was never made, or is gone.
	if _, err := info(fd, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		unix.Close(fd)
		return -1, fmt.Errorf("open pinned process at %s: it is none: %w: %w", path, errdefs.ErrNotFound, err)
	}
	return fd, nil
}

func mountedExit(path string) (Exit, error) {
	fd, err := openMounted(path)
	if err != nil {
		return Exit{}, err
	}
	defer unix.Close(fd)
	in, err := info(fd, unix.PIDFD_INFO_EXIT)
	if err != nil {
		return Exit{}, fmt.Errorf("ask for a pinned process: %w", err)
	}
	if in.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return Exit{}, fmt.Errorf("the process has not ended: %w", errdefs.ErrFailedPrecondition)
	}
	return Exit{Code: codeOf(unix.WaitStatus(in.Exit_code)), At: time.Now()}, nil
}

// info asks for a process. The kernel looks for the exit status first and for the
// process after it: of one that is released in between it finds neither, and says
// that there is none. Then it has the status.
func info(fd int, mask uint64) (unix.PidfdInfo, error) {
	in, err := infoNow(fd, mask)
	if errors.Is(err, unix.ESRCH) && mask&unix.PIDFD_INFO_EXIT != 0 {
		in, err = infoNow(fd, mask)
	}
	return in, err
}

func infoNow(fd int, mask uint64) (unix.PidfdInfo, error) {
	in := unix.PidfdInfo{Mask: mask}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.PIDFD_GET_INFO, uintptr(unsafe.Pointer(&in))); errno != 0 {
		return in, errno
	}
	return in, nil
}
