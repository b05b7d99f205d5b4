package container

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/undo"
)

// startTimeout ends a start that hangs although each of its steps has a bound of
// its own. A stop and a removal of the container wait for it.
const startTimeout = 5 * time.Minute

// Start releases the container's process. A second start of a container that
// runs succeeds: its client did not hear of the first. When the process cannot
// be started the container is exited, with the reason in its status.
func (s *Service) Start(ctx context.Context, id string) error {
	c, err := s.Store.Resolve(id)
	if err != nil {
		return err
	}
	_, err = s.starts.Do(ctx, c.ID, func(ctx context.Context) (struct{}, error) {
		ctx, op := s.Ops.Begin(ctx, operation.Info{Name: "start", Object: objectName(c.Key()), ID: c.ID})
		defer op.End()
		done, err := s.turns.Take(ctx, c.ID)
		if err != nil {
			return struct{}{}, err
		}
		defer done()
		ctx, cancel := context.WithTimeout(ctx, startTimeout)
		defer cancel()
		return struct{}{}, s.start(ctx, c.ID)
	})
	if err != nil && ctx.Err() != nil {
		if e, ok := s.Ops.Find("start", objectName(c.Key())); ok {
			return fmt.Errorf("%w; the container is still being started and a retry joins: %s", err, e)
		}
	}
	return err
}

func (s *Service) start(ctx context.Context, id string) error {
	c, err := s.Store.Get(id)
	if err != nil {
		return err
	}
	switch c.Phase {
	case record.ContainerCreated:
	case record.ContainerRunning:
		return nil
	default:
		return fmt.Errorf("container %s is %s: %w", id, c.Phase, errdefs.ErrFailedPrecondition)
	}
	if err := s.admits(c.SandboxID); err != nil {
		return err
	}
	sb, err := s.Sandboxes.Get(c.SandboxID)
	if err != nil {
		return err
	}
	u := &undo.Stack{}
	err = s.release(ctx, u, sb, c)
	if err == nil {
		return nil
	}
	operation.Stage(ctx, "release after a failure")
	if left := u.Unwind(ctx); left != nil {
		// The record has what removing the container needs to finish.
		log.G(ctx).WithField("container", id).WithError(left).Warn("a failed start left something; removing the container retries")
	}
	if _, moveErr := s.Store.Move(context.WithoutCancel(ctx), id, record.Exited, failed(err)); moveErr != nil {
		log.G(ctx).WithField("container", id).WithError(moveErr).Error("record of a failed start cannot be written")
	}
	s.tell(ctx, facts.ContainerStopped, c)
	s.leave(id)
	return err
}

// release makes the task and lets it run.
func (s *Service) release(ctx context.Context, u *undo.Stack, sb record.Sandbox, c record.Container) error {
	l := s.enter(c.ID)
	// Once more, now that a stop of the pod would wait for the container.
	if err := s.admits(c.SandboxID); err != nil {
		return err
	}
	operation.Stage(ctx, "open streams")
	s.push(u, releaseStreams, c)
	stream, err := s.Streams.Open(ctx, c, s.closeStdin(c.ID))
	if err != nil {
		return fmt.Errorf("open streams: %w", err)
	}
	s.setStream(l, stream)
	rootfs, err := s.Snapshots.Mounts(ctx, c.Handler.Snapshotter, c.ID)
	if err != nil {
		return fmt.Errorf("get root filesystem: %w", err)
	}
	operation.Stage(ctx, "create task")
	s.push(u, releaseTask, c)
	task, err := s.Tasks.Create(ctx, TaskRequest{Container: c, Sandbox: sb, Rootfs: rootfs, IO: stream.Endpoints()})
	if err != nil {
		return err
	}
	pid, err := task.Pid(ctx)
	if err != nil {
		return err
	}
	exit := s.subscribe(task) // before it can end
	s.follow(ctx, c)
	operation.Stage(ctx, "ask plugins")
	created := c
	created.Pid = pid
	if err := s.Plugins.TellContainer(ctx, facts.ContainerStart, sb, created); err != nil {
		return err
	}
	operation.Stage(ctx, "start task")
	if err := s.Streams.NoteStart(ctx, c.ID); err != nil {
		return fmt.Errorf("note the start: %w", err)
	}
	started := time.Now() // a container that ends at once does not end before it
	if err := task.Start(ctx); err != nil {
		return err
	}
	// After a crash the runtime tells the same, or the note does if the runtime is
	// gone too: nobody waits for the disk.
	c, err = s.Store.MoveSoon(ctx, c.ID, record.Released, func(r *record.Container) {
		r.Pid, r.StartedAt = pid, started
	})
	if err != nil {
		return err
	}
	s.tell(ctx, facts.ContainerStarted, c)
	s.watch(c, l, exit)
	return nil
}

// closeStdin closes the standard input of a container's first process.
func (s *Service) closeStdin(id string) CloseStdin {
	return func(ctx context.Context) error {
		t, err := s.Tasks.Get(ctx, id)
		if err != nil {
			return err
		}
		return t.CloseIO(ctx)
	}
}
