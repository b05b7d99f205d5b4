package runtime

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/gantry-cri/gantry/plugin/record"
)

// ErrShimDied is in the chain of the error of a Wait that lost its task: the
// shim died, or somebody else deleted the task. How the process ended is not
// known from the runtime, and that it ended at all is not sure: Tasks.Reap
// makes it so.
var ErrShimDied = fmt.Errorf("the shim died or the task was deleted: %w", errdefs.ErrNotFound)

// UnknownCode is the exit status of a process whose end nobody saw: that of
// SIGKILL, which is how the clean-up ends what is left.
const UnknownCode = 137

const (
	// settleLimit is how long a task may be known to the runtime and unknown
	// to its shim: the runtime's clean-up after a closed connection, an exec
	// of the shim binary, has a limit of 5 s by default.
	settleLimit = 20 * time.Second
	settlePoll  = 50 * time.Millisecond
	// retryMax bounds the pause between questions to a shim that does not
	// answer but is not known to be dead.
	retryMax = 5 * time.Second
)

// Wait blocks until the first process has ended or ctx ends. An error with
// ErrShimDied says that the runtime has lost the task; every trouble short of
// that is waited out, as only the runtime's word or an empty control group
// tells that a process ended.
func (t *Task) Wait(ctx context.Context) (record.Exit, error) {
	rt := t.rt
	for pause := settlePoll; ; pause = min(2*pause, retryMax) {
		exit, err := rt.Wait(ctx)
		if err == nil {
			return record.Exit{Code: exit.Status, At: exit.Timestamp}, nil
		}
		if ctx.Err() != nil {
			return record.Exit{}, fmt.Errorf("wait for task %s: %w", t.ID(), context.Cause(ctx))
		}
		now, err := t.tasks.verdict(ctx, t.ID(), err)
		if err != nil {
			return record.Exit{}, err
		}
		if now.state.Status == Stopped {
			return now.state.Exit, nil
		}
		rt = now.task.rt
		if err := sleep(ctx, pause); err != nil {
			return record.Exit{}, fmt.Errorf("wait for task %s: %w", t.ID(), err)
		}
	}
}

type standing struct {
	task  *Task
	state State
}

// verdict finds out what a failed wait meant: how the task stands now, or
// ErrShimDied. It returns when one is certain.
func (t *Tasks) verdict(ctx context.Context, id string, cause error) (standing, error) {
	log.G(ctx).WithError(cause).WithField("task", id).Debug("wait was interrupted")
	gone := time.Now().Add(settleLimit)
	for pause := settlePoll; ; pause = min(2*pause, retryMax) {
		task, err := t.Get(ctx, id)
		if errdefs.IsNotFound(err) {
			return standing{}, fmt.Errorf("wait for task %s: %w (%w)", id, ErrShimDied, cause)
		}
		if err == nil {
			state, err := task.State(ctx)
			if err == nil {
				return standing{task, state}, nil
			}
			if errdefs.IsNotFound(err) && time.Now().After(gone) {
				// The shim lives and says so itself.
				return standing{}, fmt.Errorf("wait for task %s: %w (%w)", id, ErrShimDied, cause)
			}
		}
		if err := sleep(ctx, pause); err != nil {
			return standing{}, fmt.Errorf("wait for task %s: %w", id, err)
		}
	}
}

// Reap makes the end of a task certain that the runtime has lost (ErrShimDied,
// or NotFound after a restart): it refuses while the runtime knows the task,
// ends what is left in the control group of spec, removes the group, and
// returns how the process ended: as the shim recorded it if the runtime can
// tell, else as UnknownCode at this moment.
func (t *Tasks) Reap(ctx context.Context, id string, spec []byte) (record.Exit, error) {
	if err := t.absent(ctx, id); err != nil {
		return record.Exit{}, fmt.Errorf("reap task: %w", err)
	}
	left, err := t.clear(ctx, id, spec)
	if err != nil {
		return record.Exit{}, fmt.Errorf("reap task: %w", err)
	}
	if r, ok := t.rt.(Recorder); ok {
		if exit, ok := r.LastExit(ctx, id); ok {
			return exit, nil
		}
	}
	log.G(ctx).WithFields(log.Fields{"task": id, "processes": left}).Warn("the shim of the task died; its exit status is unknown")
	return record.Exit{Code: UnknownCode, At: time.Now()}, nil
}

// absent is nil when the runtime knows no such task.
func (t *Tasks) absent(ctx context.Context, id string) error {
	_, err := t.Get(ctx, id)
	switch {
	case errdefs.IsNotFound(err):
		return nil
	case err != nil:
		return err
	}
	return fmt.Errorf("task %s: the runtime knows it: %w", id, errdefs.ErrFailedPrecondition)
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// IsShimDied reports whether err carries ErrShimDied.
func IsShimDied(err error) bool { return errors.Is(err, ErrShimDied) }
