// Package process knows a process by its pidfd: it signals that process and no
// other, and tells how it ended, whoever reaped it.
//
// No thread waits: the descriptors are parked in Go's poller. How a process ended
// stays known until it is asked for, also by another supervisor after the death of
// the one that watched it, for which a Process is pinned to a file. There are two
// ways. The kernel keeps an exit status as long as somebody has a pidfd, which can be
// mounted (Linux 6.15, kernel.go). Else an anchor keeps it, a process that is the
// parent of what is orphaned (anchored.go). The Reaper knows which; a pin tells by
// itself. Start reading at Process, then Reaper.
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

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Exit is how a process ended.
type Exit struct {
	// Code is 128 and the signal for one that was killed.
	Code int
	At   time.Time
}

// Process is one process. It is safe for concurrent use, but for Pin and Close.
type Process struct {
	pid  int
	file *os.File // nil for one that was reaped before it was opened
	keep keeping
	done chan struct{}
	exit Exit  // once done is closed
	err  error // instead of exit
}

// keeping is how it stays known how a process ended.
type keeping interface {
	// ended tells how the process of the pidfd did, which has; false when it is to
	// be asked again.
	ended(fd int) (Exit, bool, error)
	// pin has it known after the death of this process too, by the file path.
	pin(fd int, path string) error
	// letGo ends the keeping, but for a pin's.
	letGo()
}

// OpenPinned returns the process of a file that Pin made, which may have ended.
func OpenPinned(path string, pid int) (*Process, error) {
	if p, ok := readPin(path); ok {
		return p.open()
	}
	fd, err := openMounted(path)
	if err != nil {
		return nil, err
	}
	return watch(pid, fd, byKernel{pid}), nil
}

// openFD opens the process that has a number now, for the poller.
func openFD(pid int) (int, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", pid, err)
	}
	// Only since Linux 5.10 the call takes that.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("open process %d: %w", pid, err)
	}
	return fd, nil
}

func watch(pid, fd int, keep keeping) *Process {
	p := &Process{pid: pid, file: os.NewFile(uintptr(fd), "pidfd"), keep: keep, done: make(chan struct{})}
	go p.await()
	return p
}

// over is a process that has ended and was reaped.
func over(pid int, exit Exit, keep keeping) *Process {
	p := &Process{pid: pid, keep: keep, done: make(chan struct{}), exit: exit}
	close(p.done)
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

// Reap reaps the process if it is a child that has ended and that nobody has reaped.
func (p *Process) Reap() {
	// The error is that it is none.
	_ = p.control(func(fd int) error { return unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOHANG, nil) })
}

// File returns another descriptor of a file that the process has open as number n,
// which the caller is to close.
func (p *Process) File(n int) (fd int, err error) {
	err = p.control(func(of int) (err error) {
		fd, err = unix.PidfdGetfd(of, n, 0)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("take file %d of process %d: %w", n, p.pid, err)
	}
	return fd, nil
}

// Pin has OpenPinned find the process by the file path, which is made.
func (p *Process) Pin(path string) error {
	err := p.control(func(fd int) error { return p.keep.pin(fd, path) })
	if err != nil {
		return errors.Join(fmt.Errorf("pin process %d: %w", p.pid, err), Unpin(path))
	}
	return nil
}

// Unpin takes away what Pin made, all of it or what there is. It does so with any
// other file that something is mounted on.
func Unpin(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unpin process: %w", err)
	}
	if p, ok := readPin(path); ok {
		p.drop()
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unpin process: %w", err)
	}
	return nil
}

// PinnedExit returns how the process of a pin has ended, at this moment if that is
// not known. FailedPrecondition says that it has not.
func PinnedExit(path string) (Exit, error) {
	if p, ok := readPin(path); ok {
		return p.exit()
	}
	return mountedExit(path)
}

// Close lets go of the process, which lives on. Wait then fails.
func (p *Process) Close() error {
	p.keep.letGo()
	if p.file == nil {
		return nil
	}
	return p.file.Close()
}

func (p *Process) control(do func(fd int) error) error {
	if p.file == nil {
		return os.ErrClosed
	}
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
		p.exit, err = p.collect(conn)
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

func (p *Process) collect(conn syscall.RawConn) (exit Exit, err error) {
	tick := time.NewTicker(collectPoll)
	defer tick.Stop()
	for {
		var found bool
		var inner error
		if err := conn.Control(func(fd uintptr) { exit, found, inner = p.keep.ended(int(fd)) }); err != nil {
			return Exit{}, err
		}
		if found || inner != nil {
			return exit, inner
		}
		<-tick.C
	}
}

// exited is the Exit of a process that ended just now.
func exited(s unix.WaitStatus) Exit { return Exit{Code: codeOf(s), At: time.Now()} }

// lost says that nobody has kept how a process ended.
func lost(err error) error {
	return fmt.Errorf("its status is not known, somebody else has it: %w: %w", errdefs.ErrNotFound, err)
}

// stat is what /proc/PID/stat says.
type stat struct {
	state string
	// start is when the process began, in ticks since the machine did: with its
	// number that names it.
	start  uint64
	status unix.WaitStatus // of one that nobody has reaped
}

func (s stat) zombie() bool { return s.state == "Z" }

func readStat(pid int) (stat, bool) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return stat{}, false
	}
	return parseStat(string(text))
}

// parseStat reads a line of /proc/PID/stat, whose second field is a name that may
// be anything.
func parseStat(line string) (stat, bool) {
	const state, start, code = 0, 19, 49 // after the name
	f := strings.Fields(line[strings.LastIndexByte(line, ')')+1:])
	if len(f) <= code {
		return stat{}, false
	}
	began, err := strconv.ParseUint(f[start], 10, 64)
	if err != nil {
		return stat{}, false
	}
	status, err := strconv.ParseUint(f[code], 10, 32)
	return stat{state: f[state], start: began, status: unix.WaitStatus(status)}, err == nil
}

func codeOf(s unix.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}

func eintr(do func() error) error {
	for {
		if err := do(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
