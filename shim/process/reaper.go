package process

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
)

// Reaper reaps the children of this process that nobody waits for: what
// containers leave behind comes to their subreaper. The commands it starts are
// left to exec.Cmd. It implements go-runc's ProcessMonitor.
type Reaper struct {
	mu       sync.Mutex
	commands map[int]struct{}
	// holds is how many callers are about to open a child whose number they
	// were told; until then it is not reaped.
	holds int
}

var _ runc.ProcessMonitor = (*Reaper)(nil)

// NewReaper makes this process the subreaper of its descendants and begins to
// reap. It is there for the life of the process.
func NewReaper() (*Reaper, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, err
	}
	r := &Reaper{commands: map[int]struct{}{}}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	go func() {
		for range ended {
			r.sweep()
		}
	}()
	return r, nil
}

// Hold keeps children from being reaped until release is called.
func (r *Reaper) Hold() (release func()) {
	r.mu.Lock()
	r.holds++
	r.mu.Unlock()
	return sync.OnceFunc(func() {
		r.mu.Lock()
		r.holds--
		r.mu.Unlock()
		r.sweep()
	})
}

// sweep reaps what has ended. At a command it stops: whoever waits for that
// sweeps again.
func (r *Reaper) sweep() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.holds == 0 {
		pid, err := peek()
		if err != nil || pid == 0 {
			return
		}
		if _, ours := r.commands[pid]; ours {
			return
		}
		// It may be reaped by its Process meanwhile.
		_, err = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		if err != nil && !errors.Is(err, unix.ECHILD) && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// Start implements runc.ProcessMonitor.
func (r *Reaper) Start(c *exec.Cmd) (chan runc.Exit, error) {
	if err := r.start(c); err != nil {
		return nil, err
	}
	exited := make(chan runc.Exit, 1)
	go r.await(c, exited)
	return exited, nil
}

// StartLocked implements runc.ProcessMonitor: the thread that starts the command
// lives as long, so that the death signal of the command's parent means this
// process.
func (r *Reaper) StartLocked(c *exec.Cmd) (chan runc.Exit, error) {
	started, exited := make(chan error, 1), make(chan runc.Exit, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := r.start(c)
		started <- err
		if err == nil {
			r.await(c, exited)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return exited, nil
}

// Wait implements runc.ProcessMonitor.
func (r *Reaper) Wait(_ *exec.Cmd, exited chan runc.Exit) (int, error) {
	return (<-exited).Status, nil
}

func (r *Reaper) start(c *exec.Cmd) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := c.Start(); err != nil {
		return err
	}
	r.commands[c.Process.Pid] = struct{}{}
	return nil
}

func (r *Reaper) await(c *exec.Cmd, exited chan<- runc.Exit) {
	exit := runc.Exit{Pid: c.Process.Pid}
	if err := c.Wait(); err != nil {
		exit.Status = 255
		var failed *exec.ExitError
		if errors.As(err, &failed) {
			if s, ok := failed.Sys().(syscall.WaitStatus); ok {
				exit.Status = codeOf(unix.WaitStatus(s))
			}
		}
	}
	exit.Timestamp = time.Now()
	r.mu.Lock()
	delete(r.commands, exit.Pid)
	r.mu.Unlock()
	exited <- exit
	r.sweep()
}

// childInfo is the kernel's siginfo of a child's end, on 64 bits.
type childInfo struct {
	_   [4]int32
	pid int32
	_   [27]int32
}

// peek finds a child that has ended and leaves it; 0 for none.
func peek() (int, error) {
	var ci childInfo
	err := eintr(func() error {
		return unix.Waitid(unix.P_ALL, 0, (*unix.Siginfo)(unsafe.Pointer(&ci)), unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	})
	return int(ci.pid), err
}
