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
	defer func() {
		if err := out.Close(); err != nil {
			log.G(ctx).WithField("container", c.ID).WithError(err).Warn("close streams of an exec")
		}
	}()
	exit, err := s.runExec(ctx, task, execID, process, out.Endpoints(), nil)
	if err != nil {
		return Captured{}, err
	}
	stdout, stderr, err := out.Finish(ctx)
	if err != nil {
		return Captured{}, fmt.Errorf("read output: %w", err)
	}
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
	execID := record.NewID()
	operation.Stage(ctx, "open streams")
	session, err := s.Streams.Session(ctx, c.ID, execID, conn)
	if err != nil {
		return 0, fmt.Errorf("open streams: %w", err)
	}
	defer func() {
		if err := session.Close(); err != nil {
			log.G(ctx).WithField("container", c.ID).WithError(err).Warn("close streams of an exec")
		}
	}()
	exit, err := s.runExec(ctx, task, execID, process, session.Endpoints(), func(ctx context.Context, e Exec, exited <-chan struct{}) error {
		go resizes(ctx, resize, e)
		return session.Run(ctx, exited, e.CloseIO)
	})
	return int32(exit.Code), err
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

// runExec adds the process, serves it until it ended, and forgets it. On every
// way out the process is dead and gone from the runtime.
func (s *Service) runExec(ctx context.Context, task Task, execID string, p *specs.Process, io Endpoints,
	serve func(ctx context.Context, e Exec, exited <-chan struct{}) error) (exit record.Exit, err error) {
	operation.Stage(ctx, "start the command")
	e, err := task.Exec(ctx, execID, p, io)
	if err != nil {
		return exit, err
	}
	defer func() {
		if deleteErr := e.Delete(context.WithoutCancel(ctx)); deleteErr != nil && err == nil {
			log.G(ctx).WithError(deleteErr).Warn("forget an exec")
		}
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends what serves the process
	waiting, stopWaiting := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWaiting()
	end := make(chan ending, 1)
	go func() {
		exit, err := e.Wait(waiting)
		end <- ending{exit, err}
	}()
	if err := e.Start(ctx); err != nil {
		return exit, fmt.Errorf("start command: %w", err)
	}
	operation.Stage(ctx, "wait for the command")
	exited, served := make(chan struct{}), make(chan error, 1)
	go func() {
		if serve == nil {
			served <- nil
			return
		}
		served <- serve(ctx, e, exited)
	}()
	select {
	case got := <-end:
		close(exited)
		if got.err != nil {
			return exit, got.err
		}
		// The command's output may still be on its way; serve bounds it.
		return got.exit, <-served
	case <-ctx.Done():
		s.killExec(context.WithoutCancel(ctx), e, end)
		close(exited)
		return exit, context.Cause(ctx)
	}
}

// killExec ends a command whose client is gone or whose time is up.
func (s *Service) killExec(ctx context.Context, e Exec, end <-chan ending) {
	ctx, cancel := context.WithTimeout(ctx, execKillLimit)
	defer cancel()
	if err := e.Kill(ctx, syscall.SIGKILL, true); err != nil && !errdefs.IsNotFound(err) {
		log.G(ctx).WithError(err).Warn("kill a command")
		return
	}
	select {
	case <-end:
	case <-ctx.Done():
		log.G(ctx).Warn("a command still runs after SIGKILL")
	}
}

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
	return stream.Attach(ctx, conn, func(ctx context.Context) error {
		if !c.Config.GetStdinOnce() {
			return nil // stays open for the next client
		}
		return task.CloseIO(ctx)
	})
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
	if err := stream.Reopen(ctx); err != nil {
		return fmt.Errorf("reopen log: %w", err)
	}
	return nil
}
