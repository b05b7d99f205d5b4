package runtimetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	crt "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantry-cri/gantry/plugin/runtime"
)

// task is a containerd task.
type task struct {
	fake  *Fake
	id    string
	shim  *shim
	init  *proc
	args  []string
	io    crt.IO
	execs map[string]*exec

	status crt.Status // guarded by fake.mu
}

var _ crt.Task = (*task)(nil)

func (t *task) ID() string        { return t.id }
func (t *task) Namespace() string { return "" }

// call goes to the shim, which answers NotFound for a task it forgot.
func (t *task) call(ctx context.Context, op string, effect func() error) error {
	return t.fake.call(ctx, op, t.id, t.shim, func() error {
		if t.fake.tasks[t.id] != t {
			return fmt.Errorf("container not created: %w", errdefs.ErrNotFound)
		}
		return effect()
	})
}

func (t *task) PID(ctx context.Context) (pid uint32, err error) {
	return t.init.pid, t.call(ctx, "pid", func() error { return nil })
}

func (t *task) Start(ctx context.Context) error {
	return t.call(ctx, "start", func() error {
		if t.status != crt.CreatedStatus || !t.init.alive() {
			return fmt.Errorf("cannot start it in this state: %w", errdefs.ErrFailedPrecondition)
		}
		t.status = crt.RunningStatus
		run(t.init, t.args)
		return nil
	})
}

// run ends p at once if its program is "exit".
func run(p *proc, args []string) {
	if len(args) == 2 && args[0] == "exit" {
		if code, err := strconv.ParseUint(args[1], 10, 8); err == nil {
			p.end(uint32(code))
		}
	}
}

func (t *task) Kill(ctx context.Context, signal uint32, all bool) error {
	return t.call(ctx, "kill", func() error {
		if all {
			for _, e := range t.execs {
				deliver(e.proc, signal)
			}
		}
		return deliver(t.init, signal)
	})
}

// deliver ends p with a signal that is not for asking whether it is there.
func deliver(p *proc, signal uint32) error {
	if !p.alive() {
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	}
	if signal != 0 {
		p.end(128 + signal)
	}
	return nil
}

func (t *task) State(ctx context.Context) (s crt.State, err error) {
	err = t.call(ctx, "state", func() error {
		s = stateOf(t.init, t.status, t.io)
		return nil
	})
	if errors.Is(err, errClosed) {
		err = errdefs.ErrNotFound // so does the real one
	}
	return s, err
}

func stateOf(p *proc, status crt.Status, io crt.IO) crt.State {
	s := crt.State{Pid: p.pid, Status: status, Stdin: io.Stdin, Stdout: io.Stdout, Stderr: io.Stderr, Terminal: io.Terminal}
	if !p.alive() {
		s.Status, s.ExitStatus, s.ExitedAt = crt.StoppedStatus, p.exit.Status, p.exit.Timestamp
	}
	return s
}

func (t *task) Wait(ctx context.Context) (*crt.Exit, error) {
	if err := t.call(ctx, "wait", func() error { return nil }); err != nil {
		return nil, err
	}
	return await(ctx, t.shim, t.init)
}

func await(ctx context.Context, s *shim, p *proc) (*crt.Exit, error) {
	select {
	case <-p.done:
		if s.isDead() { // its word does not arrive any more
			return nil, errClosed
		}
		exit := p.exit
		return &exit, nil
	case <-s.died:
		return nil, errClosed
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %s", errdefs.ErrUnknown, ctx.Err())
	}
}

func (t *task) Exec(ctx context.Context, id string, opts crt.ExecOpts) (crt.ExecProcess, error) {
	e := &exec{task: t, id: id, io: opts.IO, status: crt.CreatedStatus}
	err := t.call(ctx, "exec", func() error {
		if !t.init.alive() {
			return fmt.Errorf("the container does not run: %w", errdefs.ErrFailedPrecondition)
		}
		if t.execs[id] != nil {
			return fmt.Errorf("id %s: %w", id, errdefs.ErrAlreadyExists)
		}
		t.fake.pids++
		e.proc = &proc{pid: 1000 + t.fake.pids, done: make(chan struct{})}
		p := processOf(opts.Spec)
		e.args, e.mark = p.Args, runtime.MarkOf(&p)
		t.execs[id] = e
		return nil
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

func (t *task) Process(ctx context.Context, id string) (crt.ExecProcess, error) {
	var e *exec
	err := t.call(ctx, "process", func() error {
		if e = t.execs[id]; e == nil {
			return errdefs.ErrNotFound
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

func (t *task) Pids(ctx context.Context) (infos []crt.ProcessInfo, err error) {
	return infos, t.call(ctx, "pids", func() error {
		if t.init.alive() {
			infos = append(infos, crt.ProcessInfo{Pid: t.init.pid})
		}
		for _, e := range t.execs {
			if e.status == crt.RunningStatus && e.proc.alive() {
				infos = append(infos, crt.ProcessInfo{Pid: e.proc.pid})
			}
		}
		return nil
	})
}

func (t *task) Pause(ctx context.Context) error {
	return t.call(ctx, "pause", func() error { t.status = crt.PausedStatus; return nil })
}

func (t *task) Resume(ctx context.Context) error {
	return t.call(ctx, "resume", func() error { t.status = crt.RunningStatus; return nil })
}

func (t *task) ResizePty(ctx context.Context, _ crt.ConsoleSize) error {
	return t.call(ctx, "resizepty", func() error { return nil })
}

func (t *task) CloseIO(ctx context.Context) error {
	return t.call(ctx, "closeio", func() error { return nil })
}

func (t *task) Update(ctx context.Context, _ *anypb.Any, _ map[string]string) error {
	return t.call(ctx, "update", func() error { return nil })
}

func (t *task) Stats(ctx context.Context) (*anypb.Any, error) {
	return &anypb.Any{}, t.call(ctx, "stats", func() error { return nil })
}

func (t *task) Checkpoint(ctx context.Context, path string, _ *anypb.Any) error {
	return t.call(ctx, "checkpoint", func() error {
		return os.WriteFile(filepath.Join(path, "checkpoint"), []byte(t.id), 0o600)
	})
}

// exec is a further process.
type exec struct {
	task *task
	id   string
	proc *proc
	args []string
	mark runtime.Mark
	io   crt.IO

	status crt.Status // guarded by fake.mu
}

var _ crt.ExecProcess = (*exec)(nil)

func (e *exec) ID() string { return e.id }

func (e *exec) call(ctx context.Context, op string, effect func() error) error {
	return e.task.call(ctx, op, func() error {
		if e.task.execs[e.id] != e {
			return fmt.Errorf("process %s: %w", e.id, errdefs.ErrNotFound)
		}
		return effect()
	})
}

func (e *exec) Start(ctx context.Context) error {
	return e.call(ctx, "execstart", func() error {
		if !e.task.init.alive() {
			return fmt.Errorf("the container does not run: %w", errdefs.ErrFailedPrecondition)
		}
		e.status = crt.RunningStatus
		run(e.proc, e.args)
		return nil
	})
}

func (e *exec) State(ctx context.Context) (s crt.State, err error) {
	err = e.call(ctx, "execstate", func() error {
		s = stateOf(e.proc, e.status, e.io)
		return nil
	})
	return s, err
}

func (e *exec) Kill(ctx context.Context, signal uint32, _ bool) error {
	return e.call(ctx, "execkill", func() error { return deliver(e.proc, signal) })
}

func (e *exec) ResizePty(ctx context.Context, _ crt.ConsoleSize) error {
	return e.call(ctx, "execresizepty", func() error { return nil })
}

func (e *exec) CloseIO(ctx context.Context) error {
	return e.call(ctx, "execcloseio", func() error { return nil })
}

func (e *exec) Wait(ctx context.Context) (*crt.Exit, error) {
	if err := e.call(ctx, "execwait", func() error { return nil }); err != nil {
		return nil, err
	}
	return await(ctx, e.task.shim, e.proc)
}

func (e *exec) Delete(ctx context.Context) (*crt.Exit, error) {
	err := e.call(ctx, "execdelete", func() error {
		if e.status == crt.RunningStatus && e.proc.alive() {
			return fmt.Errorf("cannot delete a running process: %w", errdefs.ErrUnknown)
		}
		delete(e.task.execs, e.id)
		return nil
	})
	exit := e.proc.exit
	return &exit, err
}

// errClosed is the error of a connection whose shim died, as flat as the real
// client makes it.
var errClosed = fmt.Errorf("ttrpc: closed: %w", errdefs.ErrUnknown)

// processOf is the process that an exec asks for, an empty one if that cannot be
// read.
func processOf(spec *anypb.Any) (p specs.Process) {
	if err := json.Unmarshal(spec.GetValue(), &p); err != nil {
		return specs.Process{}
	}
	return p
}
