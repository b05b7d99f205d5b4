package container

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/signal"

	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
)

const (
	// killAgain is how often SIGKILL is repeated: a process that was being
	// created, frozen or stuck in the kernel takes it later.
	killAgain = 2 * time.Second
	// killLimit is when the client hears that SIGKILL does not help.
	killLimit = 60 * time.Second
)

// Stop asks the container to end with its stop signal, waits the grace time and
// then kills it. Calls do not wait for each other: one without grace ends the
// wait of one with. A container that does not run, or is unknown, is stopped.
func (s *Service) Stop(ctx context.Context, id string, grace time.Duration) error {
	c, err := s.Store.Resolve(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	l, running := s.lookup(c.ID)
	if c.Phase != record.ContainerRunning && !running {
		return nil
	}
	if !running {
		// It ended between the two looks, or recovery has not begun with it.
		if c, err = s.Store.Get(c.ID); err != nil || c.Phase != record.ContainerRunning {
			return ignoreNotFound(err)
		}
		return fmt.Errorf("container %s is being recovered: %w", c.ID, errdefs.ErrUnavailable)
	}
	if s.Silent(c.ID) {
		// Whoever stops it need not wait for the next attempt to recover it.
		if err := s.recoverOne(ctx, c.ID); err != nil {
			return errors.Join(err, s.Tasks.EndProcesses(ctx, c))
		}
	}
	if grace > 0 {
		operation.Stage(ctx, "wait for the container to end by "+c.StopSignal)
		ended, err := s.signalAndWait(ctx, c, l, grace)
		if ended || err != nil {
			return err
		}
	}
	operation.Stage(ctx, "kill the container")
	return s.kill(ctx, c, l)
}

// signalAndWait sends the stop signal and reports whether the container ended
// within the grace time.
func (s *Service) signalAndWait(ctx context.Context, c record.Container, l *live, grace time.Duration) (bool, error) {
	sig, err := signal.ParseSignal(c.StopSignal)
	if err != nil {
		return false, fmt.Errorf("stop signal %q: %w: %w", c.StopSignal, err, errdefs.ErrInvalidArgument)
	}
	if err := s.send(ctx, c.ID, sig, false); err != nil {
		return false, err
	}
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-l.exited:
		return true, nil
	case <-timer.C:
		return false, nil
	case <-ctx.Done():
		return false, fmt.Errorf("wait for container %s to end: %w", c.ID, context.Cause(ctx))
	}
}

// kill sends SIGKILL until the container's end is recorded.
func (s *Service) kill(ctx context.Context, c record.Container, l *live) error {
	ctx, cancel := context.WithTimeoutCause(ctx, killLimit,
		fmt.Errorf("it still runs %s after SIGKILL; a process may be stuck in the kernel (state D): %w", killLimit, context.DeadlineExceeded))
	defer cancel()
	for {
		if err := s.send(ctx, c.ID, syscall.SIGKILL, true); err != nil {
			// Its end is not known before the runtime answers, or is dead.
			return errors.Join(err, s.Tasks.EndProcesses(ctx, c))
		}
		select {
		case <-l.exited:
			return nil
		case <-time.After(killAgain):
		case <-ctx.Done():
			return fmt.Errorf("kill container %s: %w", c.ID, context.Cause(ctx))
		}
	}
}

// send signals the task. That there is none any more is not an error: its end
// is about to be recorded.
func (s *Service) send(ctx context.Context, id string, sig syscall.Signal, all bool) error {
	t, err := s.Tasks.Get(ctx, id)
	if err == nil {
		err = t.Kill(ctx, sig, all)
	}
	return ignoreNotFound(err)
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// StopAll kills every container of the sandbox.
func (s *Service) StopAll(ctx context.Context, sandboxID string) error {
	return s.each(sandboxID, func(c record.Container) error { return s.Stop(ctx, c.ID, 0) })
}

// RemoveAll removes every container of the sandbox.
func (s *Service) RemoveAll(ctx context.Context, sandboxID string) error {
	return s.each(sandboxID, func(c record.Container) error { return s.Remove(ctx, c.ID) })
}

func (s *Service) each(sandboxID string, do func(record.Container) error) error {
	all := s.Store.Of(sandboxID)
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, c := range all {
		wg.Go(func() { errs[i] = do(c) })
	}
	wg.Wait()
	return errors.Join(errs...)
}
