package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/containerd/go-runc"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/shim/anchor"
)

// Reaper opens processes, and has those reaped that nobody waits for: what containers
// leave behind comes to the subreaper above them. That is this process where the
// kernel keeps exit statuses, else an anchor. When an anchor is lost, this process
// takes its place for what comes later.
//
// The commands it starts are left to exec.Cmd. It implements go-runc's
// ProcessMonitor.
type Reaper struct {
	kernel bool
	socket string // of the anchor

	mu     sync.Mutex
	anchor *anchor.Session // nil for none, or when it is lost
	// waited are the children that somebody waits for, and who: commands, and
	// processes that were opened where neither kernel nor anchor keeps anything.
	waited map[int]any
	// holds is how many callers are about to open a child whose number they
	// were told; until then it is not reaped.
	holds int
}

var _ runc.ProcessMonitor = (*Reaper)(nil)

// NewReaper makes this process the subreaper of its descendants and begins to
// reap, or leaves that to the anchor at a socket, below which this process is. It is
// there for the life of the process.
func NewReaper(socket string) (*Reaper, error) {
	r := &Reaper{kernel: socket == "", socket: socket, waited: map[int]any{}}
	if socket == "" {
		return r, r.reap()
	}
	s, err := anchor.Dial(socket)
	r.anchor = s
	return r, err
}

// reap makes this process the reaper.
func (r *Reaper) reap() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	go func() {
		for range ended {
			r.sweep()
		}
	}()
	return nil
}

// session is that with the anchor, nil without one.
func (r *Reaper) session() *anchor.Session {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.anchor
}

// lose takes the place of an anchor that has ended or does not answer. How those
// end that came to it is not known from now on.
func (r *Reaper) lose(s *anchor.Session, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.anchor != s {
		return // somebody else has seen it
	}
	log.L.WithError(err).Warn("the anchor is lost; the supervisor reaps by itself")
	if err := r.reap(); err != nil {
		log.L.WithError(err).Error("become the reaper")
	}
	r.anchor = nil
}

// Hold keeps what is orphaned from being reaped until release is called.
func (r *Reaper) Hold() (release func()) {
	r.mu.Lock()
	r.holds++
	r.mu.Unlock()
	s := r.session()
	if s != nil {
		if err := s.Hold(); err != nil {
			r.lose(s, err)
			s = nil
		}
	}
	return sync.OnceFunc(func() {
		if s != nil {
			if err := s.Release(); err != nil {
				r.lose(s, err)
			}
		}
		r.mu.Lock()
		r.holds--
		r.mu.Unlock()
		r.sweep()
	})
}

// Open returns the process that has the number now. A caller that was told the
// number by another process holds meanwhile.
func (r *Reaper) Open(pid int) (*Process, error) {
	keep, err := r.keep(pid)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	fd, err := openFD(pid)
	if err != nil {
		keep.letGo()
		return nil, err
	}
	return watch(pid, fd, keep), nil
}

// keep has it kept how a process ends.
func (r *Reaper) keep(pid int) (keeping, error) {
	if r.kernel {
		return byKernel{pid}, nil
	}
	p := named(pid)
	if s := r.session(); s != nil {
		id, err := s.Keep(pid)
		switch {
		case err == nil:
			p.Anchor, p.ID = r.socket, id
			return &byAnchor{pinned: p, own: s}, nil
		case errdefs.IsUnavailable(err):
			r.lose(s, err)
		case !errdefs.IsNotFound(err):
			return nil, err
		}
	}
	own := &byParent{p, r}
	if own.take() {
		return own, nil
	}
	return stranger(p), nil
}

// byParent is the keeping of a process that came to this one: it stays unreaped.
type byParent struct {
	pinned
	reaper *Reaper
}

// take reports whether it is a child of this process, and none that somebody else
// waits for.
func (k *byParent) take() bool {
	k.reaper.mu.Lock()
	defer k.reaper.mu.Unlock()
	err := eintr(func() error {
		return unix.Waitid(unix.P_PID, k.Pid, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	})
	if err != nil || k.reaper.waited[k.Pid] != nil {
		return false
	}
	k.reaper.waited[k.Pid] = k
	return true
}

func (k *byParent) ended(int) (Exit, bool, error) {
	var s unix.WaitStatus
	k.reaper.mu.Lock()
	pid, err := unix.Wait4(k.Pid, &s, unix.WNOHANG, nil)
	k.reaper.mu.Unlock()
	if errors.Is(err, unix.EINTR) || err == nil && pid == 0 {
		return Exit{}, false, nil
	}
	k.letGo()
	if err != nil {
		return Exit{}, false, lost(err)
	}
	return exited(s), true, nil
}

func (k *byParent) pin(_ int, path string) error { return k.write(path) }

func (k *byParent) letGo() {
	k.reaper.mu.Lock()
	if k.reaper.waited[k.Pid] == any(k) {
		delete(k.reaper.waited, k.Pid)
	}
	k.reaper.mu.Unlock()
	k.reaper.sweep()
}

// sweep reaps what has ended. At one that somebody waits for it stops: that one
// sweeps again.
func (r *Reaper) sweep() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.anchor == nil && r.holds == 0 {
		pid, err := peek()
		if err != nil || pid == 0 {
			return
		}
		if r.waited[pid] != nil {
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
	r.waited[c.Process.Pid] = c
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
	delete(r.waited, exit.Pid)
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
