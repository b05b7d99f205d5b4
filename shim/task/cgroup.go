package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// group is the control group of a container, of either version.
type group interface {
	// stats is what the kernel counts, as containerd's clients know it.
	stats() (any, error)
	pids() ([]int, error)
	// kill kills what is in the group at the moment.
	kill() error
	// thaw lets a frozen process be killed, where that does not go by itself.
	thaw() error
	frozen() bool
	// watchOOM calls oomed whenever the group ran out of memory, until stop.
	watchOOM(oomed func()) (stop func(), err error)
}

// groupOf returns the control group that a process is in.
func groupOf(pid int) (group, error) {
	if cgroups.Mode() == cgroups.Unified {
		path, err := cgroup2.PidGroupPath(pid)
		if err != nil {
			return nil, fmt.Errorf("find the control group of process %d: %w", pid, err)
		}
		m, err := cgroup2.Load(path)
		if err != nil {
			return nil, fmt.Errorf("load control group %s: %w", path, err)
		}
		return v2{m, path}, nil
	}
	c, err := mounted.load(pid)
	if err != nil {
		return nil, fmt.Errorf("load the control group of process %d: %w", pid, err)
	}
	return v1{c}, nil
}

type v1 struct{ cg cgroup1.Cgroup }

func (g v1) stats() (any, error) { return g.cg.Stat(cgroup1.IgnoreNotExist) }
func (g v1) thaw() error         { return g.cg.Thaw() }

func (g v1) frozen() bool {
	s := g.cg.State()
	return s == cgroup1.Frozen || s == cgroup1.Freezing
}

func (g v1) kill() error {
	pids, err := g.pids()
	if err != nil {
		return err
	}
	killed := killListed(pids, g.pids)
	// What is frozen dies no sooner. Nothing else need be.
	_ = g.thaw()
	return killed
}

func (g v1) pids() (pids []int, err error) {
	subsystems := g.cg.Subsystems()
	if len(subsystems) == 0 {
		return nil, fmt.Errorf("the control group has no controller: %w", errdefs.ErrNotFound)
	}
	list, err := g.cg.Processes(subsystems[0].Name(), true)
	for _, p := range list {
		pids = append(pids, p.Pid)
	}
	return pids, err
}

func (g v1) watchOOM(oomed func()) (func(), error) {
	fd, err := g.cg.OOMEventFD()
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(int(fd), true); err != nil {
		unix.Close(int(fd))
		return nil, err
	}
	f := os.NewFile(fd, "oom")
	go func() {
		var count [8]byte
		for {
			if _, err := f.Read(count[:]); err != nil {
				return // closed
			}
			// The end of the group is told in the same way.
			if g.cg.State() == cgroup1.Deleted {
				return
			}
			oomed()
		}
	}()
	return func() { f.Close() }, nil
}

type v2 struct {
	cg   *cgroup2.Manager
	path string
}

func (g v2) stats() (any, error) { return g.cg.Stat() }
func (g v2) thaw() error         { return nil }

func (g v2) frozen() bool {
	data, err := os.ReadFile(filepath.Join(unifiedRoot, g.path, "cgroup.freeze"))
	return err == nil && strings.TrimSpace(string(data)) == "1"
}

func (g v2) kill() error {
	err := g.cg.Kill()
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

func (g v2) pids() (pids []int, err error) {
	list, err := g.cg.Procs(true)
	for _, p := range list {
		pids = append(pids, int(p))
	}
	return pids, err
}

const (
	killLimit = time.Second
	killPoll  = 2 * time.Millisecond
)

// killGroup kills what is in a group until it is empty, or gone.
func killGroup(ctx context.Context, g group) error {
	tick := time.NewTicker(killPoll)
	defer tick.Stop()
	for end := time.Now().Add(killLimit); ; <-tick.C {
		pids, err := g.pids()
		if errors.Is(err, os.ErrNotExist) || err == nil && len(pids) == 0 {
			return nil
		}
		if err != nil {
			return err
		}
		if ctx.Err() != nil || time.Now().After(end) {
			return fmt.Errorf("%d processes are left: %w", len(pids), errdefs.ErrAborted)
		}
		if err := g.kill(); err != nil {
			return err
		}
	}
}

// killListed kills those processes that are in the list also after they were
// opened: the number of one that ended before may be another's.
func killListed(pids []int, list func() ([]int, error)) error {
	opened := map[int]int{}
	defer func() {
		for _, fd := range opened {
			unix.Close(fd)
		}
	}()
	for _, pid := range pids {
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			opened[pid] = fd
		}
	}
	again, err := list()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, pid := range again {
		fd, ok := opened[pid]
		if !ok {
			continue
		}
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill process %d: %w", pid, err)
		}
	}
	return nil
}

// unifiedRoot is where the hierarchy of version 2 is.
const unifiedRoot = "/sys/fs/cgroup"

func (g v2) watchOOM(oomed func()) (func(), error) {
	path := filepath.Join(unifiedRoot, g.path, "memory.events")
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "oom")
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_MODIFY); err != nil {
		f.Close()
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	before := oomKills(path)
	go func() {
		buf := make([]byte, 4096)
		for {
			if _, err := f.Read(buf); err != nil {
				return // closed
			}
			if now := oomKills(path); now > before {
				before = now
				oomed()
			}
		}
	}()
	return func() { f.Close() }, nil
}

// oomKills reads how many processes of a group were killed for its memory.
func oomKills(path string) (n uint64) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if _, err := fmt.Sscanf(line, "oom_kill %d", &n); err == nil {
			return n
		}
	}
	return 0
}

// enter makes the control group known to the container, as far as that works: a
// container runs without its figures.
func (c *container) enter(ctx context.Context, oomed func()) {
	g, err := groupOf(c.init.pid())
	if err == nil {
		// The number of one that ended earlier may be another's.
		err = c.init.process.Signal(0)
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("task", c.ID).Warn("find the control group")
		return
	}
	stop, err := g.watchOOM(oomed)
	if err != nil {
		log.G(ctx).WithError(err).WithField("task", c.ID).Debug("watch for lack of memory")
		stop = func() {}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.group, c.stopOOM = g, stop
}
