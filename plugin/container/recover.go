package container

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/undo"
)

// recoverAtOnce bounds how many containers are brought back side by side; each
// waits mostly for its shim.
const recoverAtOnce = 50

// asks is for a runtime that does not answer: a question costs nothing, and an
// end is to be heard of soon after it answers again.
var asks = lifecycle.Backoff{First: 200 * time.Millisecond, Last: 2 * time.Second}

// Recover starts bringing every container back to what its record says, in the
// background: one that runs is watched again, an exit that nobody saw is
// recorded, a creation that was cut off is released, and an exec whose client went
// with the daemon is ended. It comes before any other call. The channel is closed
// when each has been looked at once.
//
// Nothing is made or deleted here while the runtime does not answer for a
// container: it keeps its phase and is asked again, and in the end it reads as unknown.
func (s *Service) Recover(ctx context.Context) <-chan struct{} {
	all := s.Store.List()
	places := make(chan struct{}, recoverAtOnce)
	looked := make(chan struct{}, len(all))
	for _, c := range all {
		c = s.asNoted(ctx, c)
		if c.Phase == record.ContainerRunning {
			s.enter(c.ID)
		}
		if c.Phase != record.ContainerExited { // that it runs may not be in the record yet
			s.endOldExecs(c)
		}
		s.Background.Go("recover "+objectName(c.Key()), func(ctx context.Context) {
			select {
			case places <- struct{}{}:
			case <-ctx.Done():
				return
			}
			err := s.recoverOne(ctx, c.ID)
			<-places
			looked <- struct{}{}
			if err != nil {
				log.G(ctx).WithField("container", c.ID).WithError(err).Warn("recover container: will be tried again")
				lifecycle.Retry(ctx, "recover container "+c.ID, asks, func() error { return s.recoverOne(ctx, c.ID) })
			}
		})
	}
	done := make(chan struct{})
	s.Background.Go("recover containers", func(ctx context.Context) {
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

// recoverOne does what the container needs; after an error it must be tried
// again.
func (s *Service) recoverOne(ctx context.Context, id string) error {
	done, err := s.turns.Take(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	c, err := s.Store.Get(id)
	if err != nil {
		return nil // removed meanwhile
	}
	ctx, op := s.Ops.Begin(ctx, operation.Info{Name: "recover", Object: objectName(c.Key()), ID: id})
	defer op.End()
	switch {
	case c.Phase == record.ContainerCreating, c.Phase == record.ContainerExited && c.Spec == nil:
		return s.discard(ctx, c)
	case c.Phase == record.ContainerExited:
		// The daemon may have ended between the record and the release.
		return s.Tasks.Release(ctx, c)
	}
	operation.Stage(ctx, "ask the container's runtime")
	t, err := s.Tasks.Get(ctx, id)
	if err == nil {
		return s.rejoin(ctx, c, t)
	}
	if !errdefs.IsNotFound(err) {
		s.noteSilence(c)
		return fmt.Errorf("ask the container's runtime: %w", err)
	}
	if c.Phase == record.ContainerCreated {
		s.leave(id)
		return s.Streams.Remove(ctx, id)
	}
	return s.settleEnd(ctx, c, s.attachStream(ctx, c), ending{err: err})
}

// asNoted makes a container run whose start is noted and was not on disk when the
// daemon ended: it is not to be started a second time, nor to be listed as one
// that could be, until its runtime has been asked.
func (s *Service) asNoted(ctx context.Context, c record.Container) record.Container {
	if c.Phase != record.ContainerCreated {
		return c
	}
	at, err := s.Streams.NotedStart(c.ID)
	if err == nil && at.IsZero() {
		return c
	}
	var noted record.Container
	if err == nil {
		noted, err = s.Store.MoveSoon(ctx, c.ID, record.Released, func(r *record.Container) { r.StartedAt = at })
	}
	if err != nil {
		log.G(ctx).WithField("container", c.ID).WithError(err).Warn("whether the container was started is not known")
		return c
	}
	return noted
}

// noteSilence is for a container whose runtime does not answer.
func (s *Service) noteSilence(c record.Container) {
	s.setSilent(s.enter(c.ID), c.Phase == record.ContainerRunning)
}

// settleEnd records an end that came while there was no daemon.
func (s *Service) settleEnd(ctx context.Context, c record.Container, l *live, e ending) error {
	if err := s.ended(ctx, c, l, e); err != nil {
		return err
	}
	s.releaseEnded(ctx, c)
	return nil
}

// discard releases a creation that was cut off.
func (s *Service) discard(ctx context.Context, c record.Container) error {
	u := &undo.Stack{}
	for _, r := range resources {
		s.push(u, r, c)
	}
	err := u.Unwind(ctx)
	if err == nil {
		err = s.Store.Delete(ctx, c.ID)
	}
	if err != nil {
		return fmt.Errorf("release a creation that was cut off: %w", err)
	}
	return nil
}

// rejoin goes on with a container that has a task.
func (s *Service) rejoin(ctx context.Context, c record.Container, t Task) error {
	state, err := t.State(ctx)
	if err == nil && state.Status == TaskCreated || errdefs.IsNotFound(err) && c.Phase == record.ContainerCreated {
		return s.forgetStart(ctx, c)
	}
	if err != nil {
		s.noteSilence(c)
		return fmt.Errorf("ask the container's runtime: %w", err)
	}
	l := s.attachStream(ctx, c)
	if c.Pid == 0 {
		// Released, and the daemon ended before it could say so.
		c, err = s.Store.MoveSoon(ctx, c.ID, record.Released, func(r *record.Container) {
			r.Pid = state.Pid
			if r.StartedAt.IsZero() {
				r.StartedAt = startOf(state)
			}
		})
		if err != nil {
			return err
		}
	}
	if state.Status == TaskStopped {
		return s.settleEnd(ctx, c, l, ending{exit: state.Exit})
	}
	s.follow(ctx, c)
	s.watch(c, l, s.subscribe(t))
	if c.Condemned { // an earlier daemon was about to
		s.endSoon(c.ID, l)
	}
	return nil
}

// forgetStart takes back a start that was cut off before the process was
// released, be it before the runtime had made one, so that the container may be
// started anew.
func (s *Service) forgetStart(ctx context.Context, c record.Container) error {
	if err := s.Tasks.Release(ctx, c); err != nil {
		return err
	}
	if c.Phase == record.ContainerRunning { // it was only noted
		_, err := s.Store.MoveSoon(ctx, c.ID, record.TakenBack, func(r *record.Container) { r.Pid, r.StartedAt = 0, time.Time{} })
		if err != nil {
			return err
		}
	}
	s.leave(c.ID)
	return s.Streams.Remove(ctx, c.ID)
}

// startOf is when a task was started whose start was not recorded: as the
// kernel says while it runs, else not after its end.
func startOf(s TaskState) time.Time {
	switch {
	case !s.StartedAt.IsZero():
		return s.StartedAt
	case s.Status == TaskStopped:
		return s.Exit.At
	}
	return time.Now()
}

// attachStream goes on with the container's output. When that fails the
// container is more important than its log.
func (s *Service) attachStream(ctx context.Context, c record.Container) *live {
	l := s.enter(c.ID)
	if s.streamOf(l) != nil {
		return l
	}
	stream, err := s.Streams.Reattach(ctx, c, s.closeStdin(c.ID))
	if err != nil {
		log.G(ctx).WithField("container", c.ID).WithError(err).Error("go on with the container's streams")
		s.setSilent(l, false)
		if !errdefs.IsNotFound(err) {
			s.Background.Go("connect streams of "+objectName(c.Key()), func(ctx context.Context) {
				lifecycle.Retry(ctx, "connect streams of container "+c.ID, retries, func() error { return s.attachLate(ctx, c, l) })
			})
		}
		return l
	}
	s.setStream(l, stream)
	return l
}

// attachLate goes on with the output of a container that has none connected,
// unless it has ended meanwhile.
func (s *Service) attachLate(ctx context.Context, c record.Container, l *live) error {
	done, err := s.turns.Take(ctx, c.ID)
	if err != nil {
		return err
	}
	defer done()
	if now, ok := s.lookup(c.ID); !ok || now != l || s.streamOf(l) != nil {
		return nil
	}
	stream, err := s.Streams.Reattach(ctx, c, s.closeStdin(c.ID))
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if !s.setStream(l, stream) {
		return stream.Close(ctx)
	}
	return nil
}
