package task

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/shim/oci"
	"github.com/gantry-cri/gantry/shim/process"
	"github.com/gantry-cri/gantry/shim/statedir"
)

// Adopt takes over the containers of a supervisor that died. What they run goes
// on, and so do their terminals; their execs run on unknown. Call it before the
// Service is offered. A container that was not made whole is left to Forget.
func (s *Service) Adopt(ctx context.Context) error {
	entries, err := os.ReadDir(s.state)
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(s.state, e.Name())
		r, err := statedir.Read[Record](dir)
		if err == nil {
			err = s.adopt(ctx, r, dir)
		}
		if err != nil {
			log.G(ctx).WithError(err).WithField("task", e.Name()).Warn("a container of a dead supervisor is not adopted")
		}
	}
	return nil
}

func (s *Service) adopt(ctx context.Context, r Record, dir string) error {
	if s.logs != nil {
		s.logs.Add(r.Bundle)
	}
	c := s.newContainer(r, dir)
	if r.Pid == 0 {
		return fmt.Errorf("it was not made whole: %w", errdefs.ErrFailedPrecondition)
	}
	c.init.number = r.Pid
	if r.Exit != nil {
		c.init.status, c.init.exit = task.Status_STOPPED, *r.Exit
		close(c.init.exited)
		c.init.streams = &streams{}
		if r.Stdio.Terminal {
			c.init.streams = c.retakeTerminal(ctx)
			go c.init.streams.letGo() // what is left in it is read
		}
		c.init.streams.logger = openLogger(filepath.Join(dir, loggerPin))
		s.mu.Lock()
		defer s.mu.Unlock()
		s.containers[c.ID] = c
		return nil
	}
	p, err := process.OpenPinned(filepath.Join(dir, pinFile), r.Pid)
	if err != nil {
		return err
	}
	c.init.process = p
	if r.Stdio.Terminal {
		c.init.streams = c.retakeTerminal(ctx)
	} else {
		c.init.streams = holdStreams(ctx, r.Stdio)
	}
	c.init.streams.logger = openLogger(filepath.Join(dir, loggerPin))
	s.manage(ctx, c)
	c.init.status = c.found(ctx)
	go c.watch()
	return nil
}

// found is the status of an adopted container. Whether it was started the kernel
// tells, as the supervisor may have died in between: the first process of one that
// was not has the pipe by which it is let go. A runtime may have another way.
func (c *container) found(ctx context.Context) task.Status {
	if !c.Started {
		if waits(c.Pid) {
			return task.Status_CREATED
		}
		if c.runtime.LetGo() {
			return task.Status_RUNNING
		}
		said, err := c.runtime.Status(ctx)
		if err != nil {
			log.G(ctx).WithError(err).WithField("task", c.ID).Warn("ask for the status of an adopted container")
		}
		return statusNamed(said)
	}
	if g, err := c.cgroup(); err == nil && g.frozen() {
		return task.Status_PAUSED
	}
	return task.Status_RUNNING
}

// waits reports whether a process has the pipe open by which a runtime lets it go.
func waits(pid int) bool {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	return err == nil && slices.ContainsFunc(files, func(file string) bool {
		to, err := os.Readlink(file)
		return err == nil && filepath.Base(to) == oci.StartPipe
	})
}

// statusNamed is the status for a runtime's word. That a process has ended is
// found by its Process.
func statusNamed(said string) task.Status {
	switch said {
	case "created":
		return task.Status_CREATED
	case "paused":
		return task.Status_PAUSED
	}
	return task.Status_RUNNING
}

// holdStreams holds the output of a process that has it already.
func holdStreams(ctx context.Context, p paths) *streams {
	s := &streams{}
	for path, f := range map[string]**os.File{p.Stdout: &s.out, p.Stderr: &s.err} {
		o, err := parseOutput(path)
		if o.fifo == "" || err != nil {
			continue
		}
		if *f, err = openRaw(path, unix.O_RDWR); err != nil {
			log.G(ctx).WithError(err).Warn("hold the output of an adopted container")
		}
	}
	return s
}

// Forget takes away what a dead supervisor left of a container, and says how its
// first process ended and which it was. A supervisor that has taken its place
// forgets it too; ask is nil for none.
func Forget(ctx context.Context, namespace, state, id string, ask api.TTRPCTaskService) (process.Exit, int, error) {
	dir, err := statedir.DirOf(state, id)
	if err != nil {
		return process.Exit{}, 0, err
	}
	r, err := statedir.Read[Record](dir)
	if errdefs.IsNotFound(err) {
		// Nothing was made, or it is gone.
		return (Record{}).lastExit(dir), 0, removeRecord(dir)
	}
	if err != nil {
		return process.Exit{}, 0, err
	}
	c := (&Service{namespace: namespace}).newContainer(r, dir)
	if err := c.runtime.Delete(ctx, true); err != nil {
		return process.Exit{}, 0, err
	}
	exit := awaitPinned(ctx, c)
	if ask != nil {
		if err := dismiss(ctx, ask, id); err != nil {
			return process.Exit{}, 0, err
		}
	}
	return exit, r.Pid, c.release(ctx)
}

// awaitPinned returns how a process ended that was killed, or had ended before.
func awaitPinned(ctx context.Context, c *container) process.Exit {
	pin := filepath.Join(c.dir, pinFile)
	if p, err := process.OpenPinned(pin, c.Pid); err == nil && c.Exit == nil {
		defer p.Close()
		if exit, err := p.Wait(ctx); err == nil {
			return exit
		}
	}
	return c.lastExit(c.dir)
}

func dismiss(ctx context.Context, ask api.TTRPCTaskService, id string) error {
	_, err := ask.Wait(ctx, &api.WaitRequest{ID: id})
	if err == nil {
		_, err = ask.Delete(ctx, &api.DeleteRequest{ID: id})
	}
	if err != nil && !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		return fmt.Errorf("tell the supervisor: %w", err)
	}
	return nil
}
