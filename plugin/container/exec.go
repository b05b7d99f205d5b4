package container

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
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
// unless it is 0, the command is killed with what it started and the error is
// DeadlineExceeded.
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
	operation.Stage(ctx, "open streams")
	x := s.execution(process, c)
	out, err := s.Streams.Capture(ctx, c.ID, x.id)
	if err != nil {
		return Captured{}, fmt.Errorf("open streams: %w", err)
	}
	defer closeSession(ctx, out)
	exit, err := x.run(ctx, task, out, nil)
	if err != nil {
		return Captured{}, err
	}
	stdout, stderr, dropped := out.Output()
	if dropped > 0 {
		log.G(ctx).WithFields(log.Fields{"container": c.ID, "dropped": dropped}).Info("a command wrote more than an answer holds")
	}
	return Captured{Stdout: stdout, Stderr: stderr, ExitCode: int32(exit.Code)}, nil
}

// Exec runs a command connected to a client until it ends and returns its exit
// code. resize, which may be nil, delivers terminal sizes (width, height). When
// ctx ends, the client is gone and the command is killed with what it started.
func (s *Service) Exec(ctx context.Context, id string, command []string, conn Connection, resize <-chan [2]uint32) (int32, error) {
	task, process, c, err := s.prepareExec(ctx, id, command, conn.TTY)
	if err != nil {
		return 0, err
	}
	operation.Stage(ctx, "open streams")
	x := s.execution(process, c)
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
	for i, arg := range command {
		if strings.ContainsRune(arg, 0) {
			return nil, fmt.Errorf("cmd[%d] has a zero byte, which no argument can have: %w", i, errdefs.ErrInvalidArgument)
		}
	}
	var spec specs.Spec
	if err := json.Unmarshal(c.Spec, &spec); err != nil || spec.Process == nil {
		return nil, fmt.Errorf("container %s has no readable specification: %w", c.ID, errdefs.ErrInternal)
	}
	p := spec.Process
	p.Args, p.Terminal, p.CommandLine, p.ConsoleSize = command, tty, "", nil
	if tty && !slices.ContainsFunc(p.Env, func(v string) bool { return strings.HasPrefix(v, "TERM=") }) {
		p.Env = append(p.Env, "TERM=xterm")
	}
	return p, nil
}

// execution is one further process on its way through its life.
type execution struct {
	id      string
	process *specs.Process
	spec    []byte // of the container
	score   *int   // what it is to have in place of the runtime's
	later   *lifecycle.Group
	lost    func(context.Context) // ends it if the runtime knows it

	exec     Exec          // once added
	begun    chan struct{} // closed when its start has ended
	startErr error         // once begun
	end      chan ending   // brings the end of what was started
}

func (s *Service) execution(p *specs.Process, c record.Container) *execution {
	id := record.NewID()
	var score *int
	if c.Rescored {
		score = p.OOMScoreAdj
	}
	return &execution{
		id: id, process: p, spec: c.Spec, score: score, later: s.Background, lost: func(ctx context.Context) { s.endExec(ctx, c, id) },
		begun: make(chan struct{}), end: make(chan ending, 1),
	}
}

// closeStdin is called when the client's input ends, which may be before the
// process runs.
func (x *execution) closeStdin(ctx context.Context) error {
	select {
	case <-x.begun:
		return x.exec.CloseIO(ctx)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// run adds the process, waits for its end and for its output, and forgets it.
// When ctx ends first the process is killed with what it started. One that ends
// by itself may leave others in the background, which stay.
func (x *execution) run(ctx context.Context, task Task, session Session, resize <-chan [2]uint32) (record.Exit, error) {
	operation.Stage(ctx, "start the command")
	var err error
	x.exec, err = task.Exec(ctx, ExecRequest{ID: x.id, Process: x.process, IO: session.Endpoints(), Score: x.score, Spec: x.spec})
	if err != nil {
		// What was answered may have been lost.
		x.later.Go("end an exec that may be there", x.lost)
		return record.Exit{}, err
	}
	x.later.Go("run an exec", x.live)
	select {
	case <-x.begun:
	case <-ctx.Done():
		return record.Exit{}, x.giveUp(ctx)
	case <-x.later.Context().Done():
		return record.Exit{}, context.Cause(x.later.Context())
	}
	if x.startErr != nil {
		// A start whose answer was lost may have happened.
		x.later.Go("end an exec that did not start", x.kill)
		return record.Exit{}, x.startErr
	}
	operation.Stage(ctx, "wait for the command")
	resizing, stopResizing := context.WithCancel(ctx)
	defer stopResizing()
	go resizes(resizing, resize, x.exec)
	select {
	case got := <-x.end:
		// Nobody waits for it: a shim takes its time when a process in the
		// background has inherited the streams.
		x.later.Go("forget an exec", x.forget)
		if got.err != nil {
			return record.Exit{}, got.err
		}
		operation.Stage(ctx, "pass on the last output")
		if err := session.Finish(ctx); err != nil {
			log.G(ctx).WithError(err).Debug("output of an exec is not complete")
		}
		return got.exit, nil
	case <-ctx.Done():
		return record.Exit{}, x.giveUp(ctx)
	}
}

// live runs the process, whatever becomes of its client: a start that is cut
// off may leave a process that nobody knows.
func (x *execution) live(ctx context.Context) {
	x.startErr = x.exec.Start(ctx)
	close(x.begun)
	if x.startErr != nil {
		return
	}
	exit, err := x.exec.Wait(ctx)
	x.end <- ending{exit, err}
}

// giveUp has a command killed whose client is gone or whose time is up, and
// returns why. It waits for that, but not for a shim that does not answer.
func (x *execution) giveUp(ctx context.Context) error {
	killed := make(chan struct{})
	x.later.Go("end an exec that was given up", func(ctx context.Context) {
		defer close(killed)
		x.kill(ctx)
	})
	limit := time.NewTimer(execKillLimit)
	defer limit.Stop()
	select {
	case <-killed:
	case <-limit.C:
	case <-x.later.Context().Done():
	}
	return context.Cause(ctx)
}

// kill ends the process with what it started, and forgets it.
func (x *execution) kill(ctx context.Context) {
	select {
	case <-x.begun:
	case <-ctx.Done():
		return
	}
	limited, cancel := context.WithTimeout(ctx, execKillLimit)
	defer cancel()
	if err := x.exec.End(limited); err != nil {
		log.G(ctx).WithError(err).Warn("kill a command")
	}
	if x.startErr == nil {
		select {
		case <-x.end:
		case <-limited.Done():
			log.G(ctx).Warn("a command still runs after SIGKILL")
		}
	}
	x.forget(ctx)
}

// forget takes the process away from the runtime.
func (x *execution) forget(ctx context.Context) {
	if err := x.exec.Delete(ctx); err != nil {
		log.G(ctx).WithError(err).Warn("forget an exec")
	}
}

// endExec ends a process of a container that the runtime may know although
// nobody here does. It takes as long as the container runs and there is no answer.
func (s *Service) endExec(ctx context.Context, c record.Container, execID string) {
	lifecycle.Retry(ctx, "end exec "+execID+" of container "+c.ID, retries, func() error {
		if now, err := s.Store.Get(c.ID); err != nil || now.Phase == record.ContainerExited {
			return nil // it ends with the container
		}
		task, err := s.Tasks.Get(ctx, c.ID)
		if err == nil {
			err = task.EndExec(ctx, execID, c.Spec)
		}
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	})
}

// endOldExecs ends what an earlier daemon ran in a container, as their clients
// have gone with it. It is for before there are others.
func (s *Service) endOldExecs(c record.Container) {
	ids, err := s.Streams.Execs(c.ID)
	if err != nil {
		log.L.WithField("container", c.ID).WithError(err).Warn("look for execs of an earlier daemon")
	}
	for _, id := range ids {
		log.L.WithFields(log.Fields{"container": c.ID, "exec": id}).Info("ending an exec of an earlier daemon")
		s.Background.Go("end an exec of an earlier daemon", func(ctx context.Context) {
			// A runtime that is about to start it waits for a reader.
			streams, err := s.Streams.Left(ctx, c.ID, id)
			if err != nil && !errdefs.IsNotFound(err) {
				log.G(ctx).WithField("container", c.ID).WithError(err).Warn("take up the streams of an exec of an earlier daemon")
			}
			s.endExec(ctx, c, id)
			if err == nil && ctx.Err() == nil {
				closeSession(ctx, streams)
			}
		})
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
