package container

import (
	"context"
	"encoding/json"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/record"
)

// retries is for what must succeed in the end.
var retries = lifecycle.Backoff{First: 200 * time.Millisecond, Last: 30 * time.Second}

// unknownExitCode is the code of a container whose end nobody saw.
const unknownExitCode = 137

type ending struct {
	exit record.Exit
	err  error
}

// subscribe waits for the task's end from now on.
func (s *Service) subscribe(t Task) <-chan ending {
	end := make(chan ending, 1)
	s.Background.Go("wait for a task", func(ctx context.Context) {
		exit, err := t.Wait(ctx)
		end <- ending{exit, err}
	})
	return end
}

// watch finishes the container when its task ends.
func (s *Service) watch(c record.Container, l *live, end <-chan ending) {
	s.Background.Go("watch "+objectName(c.Key()), func(ctx context.Context) {
		var e ending
		select {
		case e = <-end:
		case <-ctx.Done():
			return
		}
		if ctx.Err() != nil {
			return
		}
		lifecycle.Retry(ctx, "record the exit of container "+c.ID, retries, func() error { return s.ended(ctx, c, l, e) })
		// In turn with a removal, which would do the same at the same time.
		done, err := s.turns.Take(ctx, c.ID)
		if err != nil {
			return
		}
		defer done()
		s.releaseEnded(ctx, c)
	})
}

// releaseEnded takes the task of an exited container away. What cannot be
// released now, the removal releases.
func (s *Service) releaseEnded(ctx context.Context, c record.Container) {
	if err := s.Tasks.Release(ctx, c); err != nil {
		log.G(ctx).WithField("container", c.ID).WithError(err).Warn("release the task of an exited container: its removal retries")
	}
}

// ended records an end that was seen, or finds out what became of a task that
// the runtime lost.
func (s *Service) ended(ctx context.Context, c record.Container, l *live, e ending) error {
	if e.err == nil {
		return s.finish(ctx, c, l, e.exit, "")
	}
	if !errdefs.IsNotFound(e.err) {
		return e.err
	}
	exit, err := s.Tasks.Reap(ctx, c)
	if err != nil {
		return err
	}
	if exit.Code == unknownExitCode {
		return s.finish(ctx, c, l, exit, record.ReasonUnknown)
	}
	return s.finish(ctx, c, l, exit, "")
}

// finish records that the container ended; its task is released after it. The
// order matters: the kernel's books are read before the cgroup goes, the log is
// whole before a client hears of the exit, and the exit is durable before the
// runtime forgets it.
func (s *Service) finish(ctx context.Context, c record.Container, l *live, exit record.Exit, reason string) error {
	if reason == "" {
		reason = s.reasonOf(ctx, c, exit)
	}
	if stream := s.streamOf(l); stream != nil {
		if err := stream.Drain(ctx); err != nil {
			log.G(ctx).WithField("container", c.ID).WithError(err).Warn("not all output of an exited container is logged")
		}
	}
	known := false
	ended, err := s.Store.Move(ctx, c.ID, record.Exited, func(r *record.Container) {
		if known = r.Phase == record.ContainerExited && !r.FinishedAt.IsZero(); known {
			return // the same exit, reported before
		}
		if byNotifier(*r, exit.Code, reason) {
			reason = record.ReasonSeccompKilled
		}
		if reason == record.ReasonSeccompKilled {
			r.Message = deniedMessage(*r)
		}
		r.FinishedAt, r.ExitCode, r.Reason, r.Pid = exit.At, int32(exit.Code), reason, 0
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if stream := s.lastStream(l); stream != nil {
		if err := stream.Close(ctx); err != nil {
			log.G(ctx).WithField("container", c.ID).WithError(err).Warn("close streams")
		}
	}
	s.leave(c.ID)
	if err == nil && !known {
		s.tell(ctx, facts.ContainerStopped, ended)
	}
	return nil
}

// follow has the kernel's books watched. Without it the reason of an exit may be
// less exact, which is no reason not to run.
func (s *Service) follow(ctx context.Context, c record.Container) {
	if err := s.Cgroups.Follow(c); err != nil {
		log.G(ctx).WithField("container", c.ID).WithError(err).Warn("that the container runs out of memory may go unnoticed")
	}
}

func (s *Service) reasonOf(ctx context.Context, c record.Container, exit record.Exit) string {
	oom, err := s.Cgroups.OOMKilled(c)
	if err != nil {
		log.G(ctx).WithField("container", c.ID).WithError(err).Warn("cannot tell whether the container ran out of memory")
	}
	switch {
	case oom && exit.Code != 0:
		return record.ReasonOOMKilled
	case exit.Code == 0:
		return record.ReasonCompleted
	case exit.Code == 128+uint32(syscall.SIGSYS) && filterKills(c.Spec):
		return record.ReasonSeccompKilled
	}
	return record.ReasonError
}

// filterKills reports whether a specification has a seccomp filter that ends
// processes with SIGSYS.
func filterKills(spec []byte) bool {
	var s specs.Spec
	if json.Unmarshal(spec, &s) != nil || s.Linux == nil || s.Linux.Seccomp == nil {
		return false
	}
	kills := []specs.LinuxSeccompAction{specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap}
	return slices.Contains(kills, s.Linux.Seccomp.DefaultAction) ||
		slices.ContainsFunc(s.Linux.Seccomp.Syscalls, func(r specs.LinuxSyscall) bool { return slices.Contains(kills, r.Action) })
}
