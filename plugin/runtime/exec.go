package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"syscall"

	crt "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantry-cri/gantry/plugin/cgroupmove"
	"github.com/gantry-cri/gantry/plugin/record"
)

// ExecRequest describes a further process of a container.
type ExecRequest struct {
	Process *specs.Process
	IO      IO
	// Score is the OOM score that the process is to have, nil for the one that
	// the runtime gives it, which is that of the container's creation.
	Score *int
	// Spec is the container's OCI specification, JSON, for its control group and
	// its user namespace.
	Spec []byte
}

// Exec is a further process of a container. Whoever made it calls Delete.
type Exec struct {
	rt    crt.ExecProcess
	name  string // for errors: task/exec
	cgs   Cgroups
	group string // the container's control group, "" for none
	mark  Mark
	score *int
}

// Exec adds a process that the Exec's Start releases.
func (t *Task) Exec(ctx context.Context, execID string, req ExecRequest) (*Exec, error) {
	cgroupmove.ExpectCommand()
	name := t.ID() + "/" + execID
	group, userns, err := readSpec(t.ID(), req.Spec)
	if err != nil {
		return nil, fmt.Errorf("exec %s: %w", name, err)
	}
	process, mark := mark(req.Process, userns)
	value, err := json.Marshal(process)
	if err != nil {
		return nil, fmt.Errorf("exec %s: encode process: %w: %w", name, errdefs.ErrInvalidArgument, err)
	}
	opts := crt.ExecOpts{Spec: &anypb.Any{TypeUrl: mustTypeURL(process), Value: value}, IO: crt.IO(req.IO)}
	var rt crt.ExecProcess
	err = bounded(ctx, "exec", name, execLimit, func(ctx context.Context) (err error) {
		rt, err = t.rt.Exec(ctx, execID, opts)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &Exec{rt: rt, name: name, cgs: t.tasks.cgs, group: group, mark: mark, score: req.Score}, nil
}

// EndExec ends and forgets a process that Exec may have added although nobody
// got it: its answer was lost, or an earlier daemon asked for it. None is fine.
// What a process left that has ended by itself stays, as ever.
func (t *Task) EndExec(ctx context.Context, execID string, spec []byte) error {
	e := &Exec{name: t.ID() + "/" + execID, cgs: t.tasks.cgs}
	var err error
	if e.group, err = ownCgroup(t.ID(), spec); err != nil {
		return fmt.Errorf("end exec %s: %w", e.name, err)
	}
	err = bounded(ctx, "find exec", e.name, queryLimit, func(ctx context.Context) (err error) {
		e.rt, err = t.rt.Process(ctx, execID)
		return err
	})
	if err != nil {
		return ignoreNotFound(err)
	}
	s, err := e.State(ctx)
	if err != nil {
		return ignoreNotFound(err)
	}
	if s.Status == Running {
		if e.mark, err = markOn(int(s.Pid)); err != nil && !errors.Is(err, errEnded) {
			return fmt.Errorf("end exec %s: %w", e.name, err)
		}
		if err := e.End(ctx); err != nil {
			return err
		}
		limited, cancel := context.WithTimeout(ctx, signalLimit)
		defer cancel()
		if _, err := e.Wait(limited); err != nil {
			return err
		}
	}
	return e.Delete(ctx)
}

// ID names the process within its container.
func (e *Exec) ID() string { return e.rt.ID() }

// Start releases the process. When it fails the process may run.
func (e *Exec) Start(ctx context.Context) error {
	if err := bounded(ctx, "start exec", e.name, execLimit, e.rt.Start); err != nil || e.score == nil || e.group == "" {
		return err
	}
	if err := e.rescore(ctx); err != nil {
		return fmt.Errorf("start exec %s: %w", e.name, err)
	}
	return nil
}

// rescore gives the process the score that it is to have, and what it has
// started meanwhile; of one that could not be marked only the process itself has
// it. No runtime does that for a process of a container: it knows
// the score of the container alone.
func (e *Exec) rescore(ctx context.Context) error {
	s, err := e.State(ctx)
	if err != nil {
		return ignoreNotFound(err)
	}
	return setOOMScore(e.cgs, e.group, *e.score, func(pid int) (bool, error) {
		if pid == int(s.Pid) || e.mark == 0 {
			return pid == int(s.Pid), nil
		}
		found, err := markOn(pid)
		if errors.Is(err, errEnded) {
			return false, nil
		}
		return found == e.mark, err
	})
}

// Kill sends it a signal; NotFound means that it has ended.
func (e *Exec) Kill(ctx context.Context, signal syscall.Signal) error {
	return bounded(ctx, "kill exec", e.name, signalLimit, func(ctx context.Context) error {
		return e.rt.Kill(ctx, uint32(signal), false)
	})
}

// End kills it with all that comes from it and is in the container's control
// group, daemons included, and returns when nothing of that is left; of one that
// could not be marked only the process itself. It is for after Start, and
// idempotent.
func (e *Exec) End(ctx context.Context) error {
	// While a start goes on the shim does not answer this.
	s, err := e.State(ctx)
	if err != nil || s.Pid == 0 { // it was never started
		return ignoreNotFound(err)
	}
	if e.group != "" && e.mark != 0 {
		err = e.cgs.KillMarked(ctx, e.group, e.mark)
	}
	// It may be a process of a guest, which only the shim can kill.
	return errors.Join(err, ignoreNotFound(e.Kill(ctx, syscall.SIGKILL)))
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// State asks the shim.
func (e *Exec) State(ctx context.Context) (s State, err error) {
	err = bounded(ctx, "get state of exec", e.name, queryLimit, func(ctx context.Context) error {
		s, err = stateOf(ctx, e.rt)
		return err
	})
	return s, err
}

// Resize sets the size of its terminal.
func (e *Exec) Resize(ctx context.Context, width, height uint32) error {
	return resize(ctx, e.rt, e.name, width, height)
}

// CloseIO closes its standard input.
func (e *Exec) CloseIO(ctx context.Context) error {
	return bounded(ctx, "close stdin of exec", e.name, queryLimit, e.rt.CloseIO)
}

// Wait blocks until the process has ended or ctx ends. An exec does not
// outlive its shim's knowledge of it: any other error means that its exit
// status is lost.
func (e *Exec) Wait(ctx context.Context) (record.Exit, error) {
	exit, err := e.rt.Wait(ctx)
	if err == nil {
		return record.Exit{Code: exit.Status, At: exit.Timestamp}, nil
	}
	if ctx.Err() != nil {
		return record.Exit{}, fmt.Errorf("wait for exec %s: %w", e.name, context.Cause(ctx))
	}
	return record.Exit{}, fmt.Errorf("wait for exec %s: %w", e.name, err)
}

// Delete forgets the process, which must have ended. It is idempotent.
func (e *Exec) Delete(ctx context.Context) error {
	err := bounded(ctx, "delete exec", e.name, signalLimit, func(ctx context.Context) error {
		_, err := e.rt.Delete(ctx)
		return err
	})
	return ignoreNotFound(err)
}
