package container

import (
	"context"
	"encoding/json"
	"fmt"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
)

// execKillLimit is how long an exec may take to end after SIGKILL.
const execKillLimit = 10 * time.Second

// Captured is the outcome of a finished command.
type Captured struct {
	Stdout, Stderr []byte
	ExitCode       int32
}

// ExecSync runs a command to its end and returns its output. After timeout,
// unless it is 0, the command is killed and the error is DeadlineExceeded.
func (s *Service) ExecSync(ctx context.Context, id string, command []string, timeout time.Duration) (Captured, error) {
	task, process, c, err := s.prepareExec(ctx, id, command, false)
	if err != nil {
		return Captured{}, err
	}
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout,
			fmt.Errorf("command did not end within %s: %w", timeout, context.DeadlineExceeded))
		defer cancel()
	}
	execID := record.NewID()
	operation.Stage(ctx, "open streams")
	out, err := s.Streams.Capture(ctx, c.ID, execID)
	if err != nil {
		return Captured{}, fmt.Errorf("open streams: %w", err)
	}
	defer closeSession(ctx, out)
	x := s.execution(execID, process)
	exit, err := x.run(ctx, task, out, nil)
	if err != nil {
		return Captured{}, err
	}
	stdout, stderr := out.Output()
	return Captured{Stdout: stdout, Stderr: stderr, ExitCode: int32(exit.Code)}, nil
}

// Exec runs a command connected to a client until it ends and returns its exit
// code. resize, which may be nil, delivers terminal sizes (width, height). When
// ctx ends, the client is gone and the command is killed.
func (s *Service) Exec(ctx context.Context, id string, command []string, conn Connection, resize <-chan [2]uint32) (int32, error) {
	task, process, c, err := s.prepareExec(ctx, id, command, conn.TTY)
	if err != nil {
		return 0, err
	}
	operation.Stage(ctx, "open streams")
	x := s.execution(record.NewID(), process)
	session, err := s.Streams.Session(ctx, c.ID, x.id, conn, x.closeStdin)
	if err != nil {
		return 0, fmt.Errorf("open streams: %w", err)
	}
	defer closeSession(ctx, session)
	exit, err := x.run(ctx, task, session, resize)
	return int32(exit.Code), err
}

func closeSession(ctx context.Context, session Session) {
	if err := session.Close(); err != nil {
		log.G(ctx).WithError(err).Warn("close streams of an exec")
	}
}

// prepareExec finds the task and describes the process.
func (s *Service) prepareExec(ctx context.Context, id string, command []string, tty bool) (Task, *specs.Process, record.Container, error) {
	c, err := s.running(id)
	if err != nil {
		return nil, nil, c, err
	}
	process, err := execProcess(c, command, tty)
	if err != nil {
		return nil, nil, c, err
	}
	task, err := s.Tasks.Get(ctx, c.ID)
	return task, process, c, err
}

// running returns the container if it runs.
func (s *Service) running(id string) (record.Container, error) {
	c, err := s.Store.Resolve(id)
	if err != nil {
		return c, err
	}
	if c.Phase != record.ContainerRunning {
		return c, fmt.Errorf("container %s is %s, not running: %w", c.ID, c.Phase, errdefs.ErrFailedPrecondition)
	}
	return c, nil
}

// execProcess is the container's own process with another command.
func execProcess(c record.Container, command []string, tty bool) (*specs.Process, error) {
	if len(command) == 0 || command[0] == "" {
		return nil, fmt.Errorf("cmd is empty: %w", errdefs.ErrInvalidArgument)
	}
	var spec specs.Spec
	if err := json.Unmarshal(c.Spec, &spec); err != nil || spec.Process == nil {
		return nil, fmt.Errorf("container %s has no readable specification: %w", c.ID, errdefs.ErrInternal)
	}
	p := spec.Process
	p.Args, p.Terminal, p.CommandLine, p.ConsoleSize = command, tty, "", nil
	return p, nil
}

// execution is one further process on its way through its life.
type execution struct {
	id      string
	process *specs.Process
	exec    Exec          // set before started is closed
	started chan struct{} // closed once the process runs
	later   *lifecycle.Group
}

func (s *Service) execution(id string, p *specs.Process) *execution {
	return &execution{id: id, process: p, started: make(chan struct{}), later: s.Background}
}

// forget takes the process away from the runtime. Nobody waits for it: a shim
// takes its time when a process in the background has inherited the streams.
func (x *execution) forget() {
	x.later.Go("forget an exec", func(ctx context.Context) {
		if err := x.exec.Delete(ctx); err != nil {
			log.G(ctx).WithError(err).Warn("forget an exec")
		}
	})
}

// closeStdin is called when the client's input ends, which may be before the
// process runs.
func (x *execution) closeStdin(ctx context.Context) error {
	select {
	case <-x.started:
		return x.exec.CloseIO(ctx)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// run adds the process, waits for its end and for its output, and forgets it.
// On every way out the process is dead, or was left alone with SIGKILL.
func (x *execution) run(ctx context.Context, task Task, session Session, resize <-chan [2]uint32) (exit record.Exit, err error) {
	operation.Stage(ctx, "start the command")
	detached := context.WithoutCancel(ctx)
	if x.exec, err = task.Exec(ctx, x.id, x.process, session.Endpoints()); err != nil {
		return exit, err
	}
	defer x.forget()
	waiting, stopWaiting := context.WithCancel(detached)
	defer stopWaiting()
	end := make(chan ending, 1)
	go func() {
		exit, err := x.exec.Wait(waiting)
		end <- ending{exit, err}
	}()
	if err := x.exec.Start(ctx); err != nil {
		// A start whose answer was lost may have happened.
		x.kill(detached, end)
		return exit, err
	}
	close(x.started)
	operation.Stage(ctx, "wait for the command")
	resizing, stopResizing := context.WithCancel(ctx)
	defer stopResizing()
	go resizes(resizing, resize, x.exec)
	select {
	case got := <-end:
		if got.err != nil {
			return exit, got.err
		}
		operation.Stage(ctx, "pass on the last output")
		if err := session.Finish(ctx); err != nil {
			log.G(ctx).WithError(err).Debug("output of an exec is not complete")
		}
		return got.exit, nil
	case <-ctx.Done():
		x.kill(detached, end)
		return exit, context.Cause(ctx)
	}
}

// kill ends a command whose client is gone or whose time is up.
func (x *execution) kill(ctx context.Context, end <-chan ending) {
	ctx, cancel := context.WithTimeout(ctx, execKillLimit)
	defer cancel()
	if err := x.exec.Kill(ctx, syscall.SIGKILL, true); err != nil {
		if !errdefs.IsNotFound(err) {
			log.G(ctx).WithError(err).Warn("kill a command")
		}
		return
	}
	select {
	case <-end:
	case <-ctx.Done():
		log.G(ctx).Warn("a command still runs after SIGKILL")
	}
}

// resizes passes sizes on until ctx ends or there are no more.
func resizes(ctx context.Context, sizes <-chan [2]uint32, p Process) {
	for {
		select {
		case size, ok := <-sizes:
			if !ok {
				return
			}
			if err := p.Resize(ctx, size[0], size[1]); err != nil {
				log.G(ctx).WithError(err).Debug("resize terminal")
			}
		case <-ctx.Done():
			return
		}
	}
}

// Attach connects a client to the container's own streams until its output
// ends or ctx does.
func (s *Service) Attach(ctx context.Context, id string, conn Connection, resize <-chan [2]uint32) error {
	c, err := s.running(id)
	if err != nil {
		return err
	}
	task, err := s.Tasks.Get(ctx, c.ID)
	if err != nil {
		return err
	}
	stream, err := s.stream(c.ID)
	if err != nil {
		return err
	}
	if conn.TTY = c.Config.GetTty(); conn.TTY {
		conn.Stderr = nil
	}
	if !c.Config.GetStdin() {
		conn.Stdin = nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends resizes
	go resizes(ctx, resize, task)
	return stream.Attach(ctx, conn)
}

func (s *Service) stream(id string) (Stream, error) {
	if l, ok := s.lookup(id); ok {
		if stream := s.streamOf(l); stream != nil {
			return stream, nil
		}
	}
	return nil, fmt.Errorf("streams of container %s are not connected: %w", id, errdefs.ErrUnavailable)
}

// ReopenLog goes on in a new log file, after the kubelet has moved the old one
// away. Without a running container nothing is created.
func (s *Service) ReopenLog(ctx context.Context, id string) error {
	c, err := s.running(id)
	if err != nil {
		return err
	}
	stream, err := s.stream(c.ID)
	if err != nil {
		return err
	}
	if err := stream.Reopen(ctx, c.LogPath); err != nil {
		return fmt.Errorf("reopen log: %w", err)
	}
	return nil
}
