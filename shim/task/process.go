package task

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/go-runc"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/gantry-cri/gantry/shim/oci"
	"github.com/gantry-cri/gantry/shim/process"
)

// proc is the first process of a container, or an exec.
type proc struct {
	c     *container
	exec  string // "" for the first
	spec  *specs.Process
	stdio paths
	score *int // its OOM score; nil leaves that
	// turn is held by what changes the process, and by the one who tells of its
	// end: that comes after the word of its start.
	turn   chan struct{} // capacity 1
	exited chan struct{}

	mu      sync.Mutex
	status  task.Status
	process *process.Process // nil before it runs, and of one that had ended before this supervisor
	number  int
	streams *streams
	exit    process.Exit // once exited is closed
}

func newProc(c *container, exec string, stdio paths) *proc {
	return &proc{c: c, exec: exec, stdio: stdio, turn: make(chan struct{}, 1), exited: make(chan struct{}), status: task.Status_CREATED}
}

// name is the process's in containerd's events.
func (p *proc) name() string {
	if p.exec == "" {
		return p.c.ID
	}
	return p.exec
}

// take waits for the turn.
func (p *proc) take(ctx context.Context) (release func(), err error) {
	select {
	case p.turn <- struct{}{}:
		return func() { <-p.turn }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for process %s: %w", p.name(), ctx.Err())
	}
}

func (p *proc) pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.number
}

func (p *proc) is() task.Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status
}

func (p *proc) set(s task.Status) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status = s
}

// ended returns how the process did, the zero Exit before.
func (p *proc) ended() process.Exit {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit
}

// wait returns how the process ended, once that is told.
func (p *proc) wait(ctx context.Context) (process.Exit, error) {
	select {
	case <-p.exited:
		return p.ended(), nil
	case <-ctx.Done():
		return process.Exit{}, fmt.Errorf("wait for process %s: %w", p.name(), ctx.Err())
	}
}

// launch opens the streams, has run make the process, and opens that. The
// process is not reaped meanwhile, however soon it ends.
func (p *proc) launch(ctx context.Context, pidFile string, run func(oci.Process) (int, error)) (err error) {
	in := oci.Process{PidFile: pidFile}
	s := &streams{}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.logger, s.out, s.err, err = p.startLogger(ctx); err != nil {
		return err
	}
	if p.stdio.Terminal {
		if in.Console, err = runc.NewTempConsoleSocket(); err != nil {
			return fmt.Errorf("make console socket: %w", err)
		}
		defer in.Console.Close()
		err = s.openTerminal(ctx, p.stdio)
	} else {
		err = s.open(ctx, p.stdio, p.c.Options.GetIoUid(), p.c.Options.GetIoGid())
		in.IO = s
	}
	if err != nil {
		return err
	}
	defer p.c.service.reaper.Hold()()
	pid, err := run(in)
	if err != nil {
		return err
	}
	pr, err := p.c.service.reaper.Open(pid)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.process, p.number, p.streams = pr, pid, s
	p.mu.Unlock()
	if err := setScore(pid, p.score); err != nil {
		log.G(ctx).WithError(err).WithField("process", p.name()).Warn("set the OOM score")
	}
	if in.Console == nil {
		s.started()
		return nil
	}
	// The runtime has sent it before it returned.
	c, err := in.Console.ReceiveMaster()
	if err != nil {
		return fmt.Errorf("receive the terminal: %w", err)
	}
	fd, err := takeTerminal(c)
	if err != nil {
		return err
	}
	if err := s.attach(fd); err != nil {
		return err
	}
	if p.exec == "" {
		p.c.holdTerminal(ctx, s)
	}
	return nil
}

// start starts an exec.
func (p *proc) start(ctx context.Context) error {
	release, err := p.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	if s := p.is(); s != task.Status_CREATED {
		return fmt.Errorf("exec %s cannot be started, it is %s: %w", p.exec, s, errdefs.ErrFailedPrecondition)
	}
	done, err := p.c.begin()
	if err != nil {
		return err
	}
	// A runtime that is killed half-way may leave a process that nobody knows.
	whole, cancel := uncut(ctx)
	defer cancel()
	err = p.launch(whole, filepath.Join(p.c.dir, "exec-"+p.exec+".pid"), func(in oci.Process) (int, error) {
		return p.c.runtime.Exec(whole, p.spec, in)
	})
	if err != nil {
		p.abandon()
		done()
		return err
	}
	p.set(task.Status_RUNNING)
	p.c.service.publish(ctx, &events.TaskExecStarted{ContainerID: p.c.ID, ExecID: p.exec, Pid: uint32(p.pid())})
	go func() {
		<-p.process.Done()
		p.finish()
		done()
	}()
	return nil
}

// abandon ends an exec whose start failed; what may be there of it is killed.
func (p *proc) abandon() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.process != nil {
		// The error is that it has ended.
		_ = p.process.Signal(unix.SIGKILL)
		p.process.Close()
	}
	p.status, p.exit = task.Status_STOPPED, process.Exit{Code: 255, At: time.Now()}
	close(p.exited)
}

// finish tells of the end of a process that has ended.
func (p *proc) finish() {
	ctx := context.Background()
	release, err := p.take(ctx)
	if err != nil {
		return // ctx does not end
	}
	defer release()
	exit, err := p.process.Wait(ctx)
	if err != nil {
		log.G(ctx).WithError(err).WithField("task", p.c.ID).WithField("process", p.name()).Warn("the exit code is not known")
		exit = process.Exit{Code: unknownCode, At: time.Now()}
	}
	if p.exec == "" {
		p.c.note(ctx, exit)
	}
	p.mu.Lock()
	p.status, p.exit = task.Status_STOPPED, exit
	s := p.streams
	p.mu.Unlock()
	p.c.service.publish(ctx, &events.TaskExit{
		ContainerID: p.c.ID, ID: p.name(), Pid: uint32(p.pid()), ExitStatus: uint32(exit.Code), ExitedAt: timestamppb.New(exit.At),
	})
	close(p.exited)
	p.process.Close()
	if s != nil {
		// A terminal is read to its end. Nobody waits for that, or for a logger, but a
		// deletion.
		go s.letGo()
	}
}

// signal sends a signal to this process.
func (p *proc) signal(s unix.Signal) error {
	p.mu.Lock()
	pr, status := p.process, p.status
	p.mu.Unlock()
	switch {
	case status == task.Status_STOPPED:
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	case pr == nil:
		return fmt.Errorf("process %s was not started: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	return pr.Signal(s)
}

// held are the streams; none is there before the start.
func (p *proc) held() *streams {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.streams
}
