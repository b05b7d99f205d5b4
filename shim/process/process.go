// Package process knows a process by its pidfd: it signals that process and no
// other, and tells how it ended, whoever reaped it.
//
// No thread waits: the descriptors are parked in Go's poller. The kernel keeps an
// exit status as long as somebody has a pidfd, so a Process that is pinned, which
// mounts its pidfd on a file, can be opened again after the death of whoever
// watched it (Linux 6.15). Reaper is the other half: it reaps what nobody waits
// for. Start reading at Process.
package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Exit is how a process ended.
type Exit struct {
	// Code is 128 and the signal for one that was killed.
	Code int
	At   time.Time
}

// Process is one process. It is safe for concurrent use.
type Process struct {
	pid  int
	file *os.File
	done chan struct{}
	exit Exit  // once done is closed
	err  error // instead of exit
}

// Open returns the process that has the number now. A caller that was told the
// number by another process keeps the Reaper from reaping meanwhile.
func Open(pid int) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return watch(pid, fd), nil
}

// OpenPinned returns the process of a file that Pin made, which may have ended.
func OpenPinned(path string, pid int) (*Process, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open pinned process: %w", err)
	}
	// What is there is a plain file if the pin was never made, or is gone.
	if _, err := info(fd, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		unix.Close(fd)
		return nil, fmt.Errorf("open pinned process at %s: it is none: %w: %w", path, errdefs.ErrNotFound, err)
	}
	return watch(pid, fd), nil
}

func watch(pid, fd int) *Process {
	p := &Process{pid: pid, file: os.NewFile(uintptr(fd), "pidfd"), done: make(chan struct{})}
	go p.await()
	return p
}

// Pid is the number, which may be another's once the process has ended.
func (p *Process) Pid() int { return p.pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait returns how the process ended, once it has.
func (p *Process) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-p.done:
		return p.exit, p.err
	case <-ctx.Done():
		return Exit{}, fmt.Errorf("wait for process %d: %w", p.pid, ctx.Err())
	}
}

// Ended reports whether the process has, without waiting.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Signal sends a signal. NotFound says that the process has ended.
func (p *Process) Signal(s unix.Signal) error {
	err := p.control(func(fd int) error { return unix.PidfdSendSignal(fd, s, nil, 0) })
	if errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.pid, err)
	}
	return nil
}

// Pin mounts the pidfd on the file path, which is made.
func (p *Process) Pin(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	err = p.control(func(fd int) error {
		tree, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
		if err != nil {
			return err
		}
		defer unix.Close(tree)
		return unix.MoveMount(tree, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
	})
	if err != nil {
		return errors.Join(fmt.Errorf("pin process %d: %w", p.pid, err), Unpin(path))
	}
	return nil
}

// Unpin takes away what Pin made, all of it or what there is.
func Unpin(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unpin process: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unpin process: %w", err)
	}
	return nil
}

// Close lets go of the process, which lives on. Wait then fails.
func (p *Process) Close() error { return p.file.Close() }

func (p *Process) control(do func(fd int) error) error {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := conn.Control(func(fd uintptr) { inner = do(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// await is parked until the descriptor is readable, which it is from the end of
// the process on, before anybody has reaped it.
func (p *Process) await() {
	defer close(p.done)
	conn, err := p.file.SyscallConn()
	if err == nil {
		err = conn.Read(func(fd uintptr) bool { return ended(int(fd)) })
	}
	if err == nil {
		p.exit.At = time.Now()
		p.exit.Code, err = p.collect(conn)
	}
	if err != nil {
		p.err = fmt.Errorf("wait for process %d: %w", p.pid, err)
	}
}

func ended(fd int) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return err == nil && n > 0
}

// collectPoll is how often a process is looked at that has ended and was not
// reaped by the one whose business that is; it is there for moments only, or
// its status is read as it lies there.
const collectPoll = 5 * time.Millisecond

func (p *Process) collect(conn syscall.RawConn) (code int, err error) {
	tick := time.NewTicker(collectPoll)
	defer tick.Stop()
	for {
		var found bool
		var inner error
		if err := conn.Control(func(fd uintptr) { code, found, inner = p.status(int(fd)) }); err != nil {
			return 0, err
		}
		if found || inner != nil {
			return code, inner
		}
		<-tick.C
	}
}

// status asks how the process ended: as its parent, else from what the kernel
// keeps for the pidfd, else from the process that nobody has reaped yet.
func (p *Process) status(fd int) (code int, found bool, err error) {
	var si unix.Siginfo
	err = eintr(func() error { return unix.Waitid(unix.P_PIDFD, fd, &si, unix.WEXITED|unix.WNOHANG, nil) })
	if err != nil && !errors.Is(err, unix.ECHILD) && !errors.Is(err, unix.EAGAIN) {
		return 0, false, fmt.Errorf("reap: %w", err)
	}
	in, err := info(fd, unix.PIDFD_INFO_EXIT)
	if err == nil && in.Mask&unix.PIDFD_INFO_EXIT != 0 {
		return codeOf(unix.WaitStatus(in.Exit_code)), true, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("its status is not known, somebody else has it: %w: %w", errdefs.ErrNotFound, err)
	}
	raw, ok := zombieStatus(p.pid)
	// The number is that process's only as long as it is not reaped.
	if again, err := info(fd, unix.PIDFD_INFO_EXIT); !ok || err != nil || again.Mask&unix.PIDFD_INFO_EXIT != 0 {
		return 0, false, nil
	}
	return codeOf(raw), true, nil
}

// zombieStatus reads the status of a process that nobody has reaped.
func zombieStatus(pid int) (unix.WaitStatus, bool) {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, false
	}
	return parseZombie(string(stat))
}

// parseZombie takes the status out of a line of /proc/PID/stat, whose second
// field is a name that may be anything.
func parseZombie(stat string) (unix.WaitStatus, bool) {
	const state, code = 0, 49 // after the name
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) <= code || f[state] != "Z" {
		return 0, false
	}
	n, err := strconv.ParseUint(f[code], 10, 32)
	return unix.WaitStatus(n), err == nil
}

func codeOf(s unix.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
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

func eintr(do func() error) error {
	for {
		if err := do(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// PinnedCode returns how the process of a pin has ended. FailedPrecondition says
// that it has not.
func PinnedCode(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open pinned process: %w", err)
	}
	defer unix.Close(fd)
	in, err := info(fd, unix.PIDFD_INFO_EXIT)
	if err != nil {
		return 0, fmt.Errorf("ask for a pinned process: %w", err)
	}
	if in.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return 0, fmt.Errorf("the process has not ended: %w", errdefs.ErrFailedPrecondition)
	}
	return codeOf(unix.WaitStatus(in.Exit_code)), nil
}
