package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/shim/oci"
	"github.com/gantry-cri/gantry/shim/process"
	"github.com/gantry-cri/gantry/shim/statedir"
)

// releaseLimit bounds what is given back after a failure.
const releaseLimit = time.Minute

// container is a task.
type container struct {
	Record  // changed with the turn of init only
	service *Service
	runtime *oci.Runtime
	dir     string
	init    *proc

	mu      sync.Mutex
	group   group // nil if it is not known
	stopOOM func()
	execs   map[string]*proc
	// running counts execs that are starting or have not been told the end of;
	// the end of init is told after those.
	running int
	ending  bool          // no exec begins any more
	quiet   chan struct{} // closed when running is 0 and ending is set
}

func (s *Service) newContainer(r Record, dir string) *container {
	c := &container{
		Record: r, service: s, dir: dir, runtime: oci.New(s.namespace, r.ID, r.Bundle, r.Options),
		execs: map[string]*proc{}, quiet: make(chan struct{}), stopOOM: func() {},
	}
	c.runtime.Filters, c.runtime.Copy = &s.filters, &s.crun
	c.init = newProc(c, "", r.Stdio)
	return c
}

// create makes the container: first its record, last its pin.
func (c *container) create(ctx context.Context, mounts []mount.Mount) (err error) {
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return fmt.Errorf("task %s: %w", c.ID, errdefs.ErrAlreadyExists)
		}
		return fmt.Errorf("make directory of task: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.undo(ctx))
		}
	}()
	if err := statedir.Write(c.dir, c.Record); err != nil {
		return err
	}
	if err := c.mountRoot(mounts); err != nil {
		return err
	}
	whole, cancel := uncut(ctx)
	defer cancel()
	err = c.init.launch(whole, filepath.Join(c.Bundle, "init.pid"), func(in oci.Process) (int, error) {
		return c.runtime.Create(whole, in)
	})
	if err != nil {
		return err
	}
	if err := c.init.process.Pin(filepath.Join(c.dir, pinFile)); err != nil {
		return err
	}
	c.Pid = c.init.number
	return statedir.Write(c.dir, c.Record)
}

// uncut is ctx without the end of the client, which is no reason to kill a runtime
// half-way: what it has made by then, as control groups, it does not know of later.
// The client's deadline still counts.
func uncut(ctx context.Context) (context.Context, context.CancelFunc) {
	whole := context.WithoutCancel(ctx)
	if deadline, ok := ctx.Deadline(); ok {
		return context.WithDeadline(whole, deadline)
	}
	return whole, func() {}
}

func (c *container) mountRoot(mounts []mount.Mount) error {
	if len(mounts) == 0 {
		return nil
	}
	// Mounting may take helpers, which are nobody else's to reap.
	defer c.service.reaper.Hold()()
	root := filepath.Join(c.Bundle, "rootfs")
	if err := os.Mkdir(root, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := mount.All(mounts, root); err != nil {
		return fmt.Errorf("mount root filesystem: %w", err)
	}
	return nil
}

// undo gives back what a create has made that failed.
func (c *container) undo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseLimit)
	defer cancel()
	if s := c.init.held(); s != nil {
		s.Close()
	}
	if p := c.init.process; p != nil {
		p.Close()
	}
	return c.release(ctx)
}

// release takes away all there is of the container on this host. What is gone
// already is no error.
func (c *container) release(ctx context.Context) error {
	if err := c.runtime.Delete(ctx, true); err != nil {
		return err
	}
	if c.Rootfs {
		if err := mount.UnmountRecursive(filepath.Join(c.Bundle, "rootfs"), 0); err != nil {
			return fmt.Errorf("unmount root filesystem: %w", err)
		}
	}
	return removeRecord(c.dir)
}

// watch waits for the end of the first process and tells of it after that of
// all others.
func (c *container) watch() {
	<-c.init.process.Done()
	c.mu.Lock()
	c.ending = true
	if c.running == 0 {
		close(c.quiet)
	}
	c.mu.Unlock()
	if c.Shared {
		ctx, cancel := context.WithTimeout(context.Background(), releaseLimit)
		if err := c.killShared(ctx); err != nil {
			log.G(ctx).WithError(err).WithField("task", c.ID).Warn("kill what is left in a container")
		}
		cancel()
	}
	<-c.quiet
	c.mu.Lock()
	stop := c.stopOOM
	c.mu.Unlock()
	stop()
	c.init.finish()
}

// begin announces an exec; done is called when its end has been told.
func (c *container) begin() (done func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ending || c.init.is() == task.Status_STOPPED {
		return nil, fmt.Errorf("the first process of container %s has ended: %w", c.ID, errdefs.ErrFailedPrecondition)
	}
	c.running++
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.running--; c.running == 0 && c.ending {
			close(c.quiet)
		}
	}, nil
}

// noteStart writes down that the first process was let go.
func (c *container) noteStart(ctx context.Context) {
	c.Started = true
	if err := statedir.Write(c.dir, c.Record); err != nil {
		log.G(ctx).WithError(err).WithField("task", c.ID).Warn("write down that a container was started")
	}
}

// note writes down how the first process ended.
func (c *container) note(ctx context.Context, exit process.Exit) {
	c.Exit = &exit
	if err := statedir.Write(c.dir, c.Record); err != nil {
		log.G(ctx).WithError(err).WithField("task", c.ID).Warn("write down the exit code")
	}
}

// proc finds a process by its exec ID, "" for the first.
func (c *container) proc(exec string) (*proc, error) {
	if exec == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.execs[exec]
	if p == nil {
		return nil, fmt.Errorf("process %s of container %s: %w", exec, c.ID, errdefs.ErrNotFound)
	}
	return p, nil
}

func (c *container) add(p *proc) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.execs[p.exec] != nil {
		return fmt.Errorf("process %s of container %s: %w", p.exec, c.ID, errdefs.ErrAlreadyExists)
	}
	c.execs[p.exec] = p
	return nil
}

func (c *container) remove(exec string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, exec)
}

func (c *container) cgroup() (group, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.group == nil {
		return nil, fmt.Errorf("the control group of container %s is not known: %w", c.ID, errdefs.ErrNotFound)
	}
	return c.group, nil
}

// statusOf is the status of a process: all stand still while the container does.
func (c *container) statusOf(p *proc) task.Status {
	whole, s := c.init.is(), p.is()
	if s == task.Status_RUNNING && (whole == task.Status_PAUSED || whole == task.Status_PAUSING) {
		return whole
	}
	return s
}

// switchTo changes the status of a container by what the runtime does.
func (c *container) switchTo(ctx context.Context, from, during, to task.Status, do func(context.Context) error) error {
	release, err := c.init.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	if s := c.init.is(); s != from {
		return fmt.Errorf("container %s is %s, not %s: %w", c.ID, s, from, errdefs.ErrFailedPrecondition)
	}
	c.init.set(during)
	if err := do(ctx); err != nil {
		c.init.set(from)
		return err
	}
	c.init.set(to)
	return nil
}

// kill signals the first process, an exec, or all.
func (c *container) kill(ctx context.Context, r *api.KillRequest) error {
	p, err := c.proc(r.GetExecID())
	if err != nil {
		return err
	}
	signal := unix.Signal(r.GetSignal())
	if !r.GetAll() || r.GetExecID() != "" {
		return c.signal(p, signal)
	}
	if c.init.is() == task.Status_STOPPED {
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	}
	switch {
	case signal != unix.SIGKILL:
		return c.runtime.Kill(ctx, int(signal))
	case c.Shared:
		return c.killShared(ctx)
	}
	return c.end()
}

// end kills the first process, and with it all that are in its pid namespace. One
// that has ended is no error.
func (c *container) end() error {
	if err := c.signal(c.init, unix.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// signal sends a signal to one process, frozen or not.
func (c *container) signal(p *proc, s unix.Signal) error {
	if err := p.signal(s); err != nil {
		return err
	}
	if s != unix.SIGKILL {
		return nil
	}
	if g, err := c.cgroup(); err == nil {
		// Where nothing is frozen, or nothing can be, there is nothing to do.
		_ = g.thaw()
	}
	return nil
}

// killShared kills all processes of a container that do not end with the first. The
// runtime, which stops them for that, is asked if they fork faster than they die.
func (c *container) killShared(ctx context.Context) error {
	if g, err := c.cgroup(); err == nil {
		err := killGroup(ctx, g)
		if err == nil {
			return nil
		}
		log.G(ctx).WithError(err).WithField("task", c.ID).Debug("kill the processes of a control group")
	}
	return c.runtime.Kill(ctx, int(unix.SIGKILL))
}
