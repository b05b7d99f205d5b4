package runtime

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/cgroupspath"
)

// unifiedRoot is where the hierarchy of version 2 is if there is no other.
const unifiedRoot = "/sys/fs/cgroup"

// Make makes the control group that a shim's memory is counted to. On version 1 it is in
// that hierarchy alone, so that no other limit of the pod is the shim's; on version 2
// there is but one.
func (h *Hierarchies) Make(path string) error {
	rel, err := cgroupspath.Group(path)
	if err != nil {
		return err
	}
	if cgroups.Mode() == cgroups.Unified {
		err = makeUnified(rel)
	} else {
		_, err = cgroup1.New(cgroup1.StaticPath(rel), &specs.LinuxResources{},
			cgroup1.WithHierarchy(cgroup1.SingleSubsystem(cgroup1.Default, cgroup1.Memory)))
	}
	if err != nil {
		return fmt.Errorf("make cgroup %s: %w", path, err)
	}
	return nil
}

// makeUnified has the group count memory from the start: until a first container has
// the kernel do that below the pod's group, what there is goes to the pod's itself.
func makeUnified(rel string) error {
	m, err := cgroup2.NewManager(unifiedRoot, rel, &cgroup2.Resources{})
	if err != nil {
		return err
	}
	if err := m.ToggleControllers([]string{"memory"}, cgroup2.Enable); err != nil {
		// As where somebody has put a process into the pod's own group.
		log.L.WithError(err).WithField("cgroup", rel).Warn("the memory of a shim is counted to its pod alone")
	}
	return nil
}

// Vacate puts the processes of the control group to where this process is.
func (h *Hierarchies) Vacate(path string) error {
	pids, err := h.Procs(path)
	if err != nil || len(pids) == 0 {
		return err
	}
	add, err := ownGroup()
	if err != nil {
		return fmt.Errorf("find the daemon's cgroup: %w", err)
	}
	for _, pid := range pids {
		if err := add(uint64(pid)); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("move process %d out of cgroup %s: %w", pid, path, err)
		}
	}
	return nil
}

// ownGroup returns what puts a process into the control group of this one.
func ownGroup() (add func(pid uint64) error, err error) {
	if cgroups.Mode() == cgroups.Unified {
		path, err := cgroup2.PidGroupPath(os.Getpid())
		if err != nil {
			return nil, err
		}
		m, err := cgroup2.Load(path)
		if err != nil {
			return nil, err
		}
		return m.AddProc, nil
	}
	c, err := cgroup1.Load(cgroup1.PidPath(os.Getpid()))
	if err != nil {
		return nil, err
	}
	return func(pid uint64) error { return c.AddProc(pid) }, nil
}
