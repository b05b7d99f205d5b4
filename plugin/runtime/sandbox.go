package runtime

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/gantry-cri/gantry/plugin/record"
)

// This file is what runs a pod's own process as a task. Nothing here needs
// more than the record: specification bytes say which control group is meant.

// Launch creates and starts the sandbox's own process: a task under the
// sandbox's ID, in a shim that the pod's containers join, without stdio and
// with a root filesystem that the specification names. A failed Launch may
// leave something for Release.
func (t *Tasks) Launch(ctx context.Context, sb record.Sandbox, spec []byte) (pid uint32, err error) {
	task, err := t.Create(ctx, CreateRequest{ID: sb.ID, Handler: sb.Handler, Spec: spec})
	if err != nil {
		return 0, err
	}
	if pid, err = task.Pid(ctx); err != nil {
		return 0, err
	}
	return pid, task.Start(ctx)
}

// Running reports whether the task's process runs. An error means that nobody
// can tell now; a task that the runtime does not know does not run.
func (t *Tasks) Running(ctx context.Context, id string) (bool, error) {
	task, err := t.Get(ctx, id)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	s, err := task.State(ctx)
	if errdefs.IsNotFound(err) {
		// The runtime knows the task and its shim does not: it is dying.
		return false, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	return err == nil && s.Status != Stopped, err
}

// Await blocks until the task's process has ended, whatever becomes of its
// shim, and returns how: see Wait and Reap. It fails with NotFound for a task
// that the runtime does not know at the call, and when ctx ends.
func (t *Tasks) Await(ctx context.Context, id string, spec []byte) (record.Exit, error) {
	task, err := t.Get(ctx, id)
	if err != nil {
		return record.Exit{}, err
	}
	for pause := settlePoll; ; pause = min(2*pause, retryMax) {
		exit, err := task.Wait(ctx)
		if IsShimDied(err) {
			exit, err = t.Reap(ctx, id, spec)
		}
		if err == nil || ctx.Err() != nil {
			return exit, err
		}
		// What is left does not die, or the runtime knows the task again.
		if err := sleep(ctx, pause); err != nil {
			return record.Exit{}, err
		}
	}
}

// Terminate kills every process of the task. It succeeds when there is none,
// and when the shim is silent but the control group of spec is empty.
func (t *Tasks) Terminate(ctx context.Context, id string, spec []byte) error {
	path, err := ownCgroup(id, spec)
	if err != nil {
		return err
	}
	task, err := t.Get(ctx, id)
	if err == nil {
		err = task.Kill(ctx, syscall.SIGKILL, true)
	}
	if err != nil && !errdefs.IsNotFound(err) && path == "" {
		return err
	}
	// Also after a kill that succeeded: it was sent, this sees it done.
	if _, left := t.kill(ctx, id, path); left != nil {
		return errors.Join(err, left)
	}
	if err == nil {
		t.seen(ctx, task)
	}
	return nil
}

// seen waits for the shim to notice that a killed process has ended, so that
// who asks next hears it. That it does not is no failure: the process is gone.
func (t *Tasks) seen(ctx context.Context, task *Task) {
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	if _, err := task.Wait(ctx); err != nil && !IsShimDied(err) {
		log.G(ctx).WithError(err).WithField("task", task.ID()).Warn("the end of a killed task was not seen")
	}
}
