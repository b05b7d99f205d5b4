package sandbox

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
)

// recoverAtOnce bounds how many pods are brought back side by side; each waits
// mostly for its shim.
const recoverAtOnce = 50

// retries is for what must succeed in the end.
var retries = lifecycle.Backoff{First: 500 * time.Millisecond, Last: time.Minute}

// Recover starts bringing every pod back to what its record says, in the
// background: a pod that runs is watched again, one that died is noticed, and a
// start that was cut off is released. A pod whose shim does not answer holds up
// nobody but itself. The channel is closed when each has been looked at once.
func (s *Service) Recover() <-chan struct{} {
	all := s.Store.List()
	places := make(chan struct{}, recoverAtOnce)
	looked := make(chan struct{}, len(all))
	for _, sb := range all {
		s.Background.Go("recover "+objectName(sb.Key()), func(ctx context.Context) {
			select {
			case places <- struct{}{}:
			case <-ctx.Done():
				return
			}
			err := s.recoverOne(ctx, sb.ID)
			<-places
			looked <- struct{}{}
			if err != nil {
				log.G(ctx).WithField("sandbox", sb.ID).WithError(err).Warn("recover pod: will be tried again")
				s.later(sb.ID)
			}
		})
	}
	done := make(chan struct{})
	s.Background.Go("recover pods", func(ctx context.Context) {
		defer close(done)
		for range all {
			select {
			case <-looked:
			case <-ctx.Done():
				return
			}
		}
	})
	return done
}

// later goes on with a pod that could not be released now. One goroutine per
// pod does it.
func (s *Service) later(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, running := s.retrying[id]; running {
		return
	}
	s.retrying[id] = struct{}{}
	s.Background.Go("release sandbox "+id, func(ctx context.Context) {
		s.retry(ctx, id)
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.retrying, id)
	})
}

// goesOn reports whether later has to do with the pod.
func (s *Service) goesOn(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, running := s.retrying[id]
	return running
}

// retry goes on with one pod until there is nothing left to do.
func (s *Service) retry(ctx context.Context, id string) {
	lifecycle.Pause(ctx, retries.First)
	lifecycle.Retry(ctx, "recover sandbox "+id, retries, func() error { return s.recoverOne(ctx, id) })
}

// recoverOne does what the pod needs; after an error it must be tried again.
func (s *Service) recoverOne(ctx context.Context, id string) error {
	done, err := s.teardown.Take(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	sb, err := s.Store.Get(id)
	if err != nil {
		return nil // removed meanwhile
	}
	ctx, op := s.Ops.Begin(ctx, operation.Info{Name: "recover", Object: objectName(sb.Key()), ID: id})
	defer op.End()
	switch sb.Phase {
	case record.Creating:
		return s.release(ctx, sb)
	case record.Ready:
		return s.rewatch(ctx, sb)
	}
	// A stop may have been cut off after its first step.
	if err := s.stop(ctx, id); err != nil {
		return err
	}
	return s.finishFailed(ctx, sb)
}

// finishFailed removes a sandbox that never got ready: no client knows of it
// but through the list, and nothing of it is worth keeping.
func (s *Service) finishFailed(ctx context.Context, sb record.Sandbox) error {
	if !sb.Instance.StartedAt.IsZero() {
		return nil
	}
	return s.release(ctx, sb)
}

// rewatch looks whether a pod that was ready still is, and watches it.
func (s *Service) rewatch(ctx context.Context, sb record.Sandbox) error {
	operation.Stage(ctx, "ask the sandbox's runtime")
	alive, err := s.Instances.Alive(ctx, sb)
	if err != nil {
		return fmt.Errorf("ask the sandbox's runtime: %w", err)
	}
	if !alive {
		return s.died(ctx, sb.ID, "the sandbox ended while the daemon was down")
	}
	exit, err := s.Instances.Wait(s.Background.Context(), sb)
	if errdefs.IsNotFound(err) {
		return s.died(ctx, sb.ID, "the sandbox ended while the daemon started")
	}
	if err != nil {
		return fmt.Errorf("watch sandbox: %w", err)
	}
	s.watch(sb, exit)
	return nil
}

// watch records the end of the sandbox when it comes.
func (s *Service) watch(sb record.Sandbox, exit <-chan record.Exit) {
	s.Background.Go("watch "+objectName(sb.Key()), func(ctx context.Context) {
		select {
		case e, ok := <-exit:
			if !ok {
				// The subscription ended, which says nothing of the sandbox.
				lifecycle.Pause(ctx, retries.First) // one that ends at once must not spin
				lifecycle.Retry(ctx, "watch sandbox "+sb.ID+" again", retries, func() error { return s.recoverOne(ctx, sb.ID) })
				return
			}
			reason := fmt.Sprintf("the sandbox's process ended with code %d at %s", e.Code, e.At.Format(time.RFC3339Nano))
			lifecycle.Retry(ctx, "record the end of sandbox "+sb.ID, retries, func() error { return s.died(ctx, sb.ID, reason) })
		case <-ctx.Done():
		}
	})
}

// died records that the sandbox ended by itself.
func (s *Service) died(ctx context.Context, id, reason string) error {
	sb, err := s.Store.Get(id)
	if errdefs.IsNotFound(err) || err == nil && sb.Phase == record.NotReady {
		return nil // it was stopped
	}
	sb, err = s.Store.Move(ctx, id, record.Stopped, func(sb *record.Sandbox) { sb.Reason = reason })
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err == nil {
		s.tell(ctx, facts.PodStopped, sb)
	}
	return err
}
