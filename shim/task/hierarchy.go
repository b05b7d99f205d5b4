package task

import (
	"cmp"
	"fmt"
	"path/filepath"
	"sync"

	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/moby/sys/mountinfo"
)

// hierarchies are where control groups of version 1 are mounted, which the library
// looks up for each controller of each container among all mounts of the node. They
// stay where they are, so once is enough.
type hierarchies struct {
	mu         sync.Mutex
	subsystems []cgroup1.Subsystem
	// roots are which group of a hierarchy is mounted, by controller: not the first in
	// a container.
	roots map[string]string
}

var mounted hierarchies

// load returns the control groups that a process is in.
func (h *hierarchies) load(pid int) (cgroup1.Cgroup, error) {
	if err := h.look(); err != nil {
		return nil, err
	}
	groups, err := cgroup1.ParseCgroupFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, err
	}
	return cgroup1.Load(h.path(groups), cgroup1.WithHierarchy(func() ([]cgroup1.Subsystem, error) { return h.subsystems, nil }))
}

// look is for before anything is read of h. What fails is tried again the next time.
func (h *hierarchies) look() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.roots != nil {
		return nil
	}
	subsystems, err := cgroup1.Default()
	if err != nil {
		return fmt.Errorf("find the control groups of version 1: %w", err)
	}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup"))
	if err != nil {
		return fmt.Errorf("find the control groups of version 1: %w", err)
	}
	roots, err := rootsOf(subsystems, mounts)
	if err != nil {
		return fmt.Errorf("find the control groups of version 1: %w", err)
	}
	h.subsystems, h.roots = subsystems, roots
	return nil
}

// rootsOf finds what is mounted where the library looks for each controller, which may be
// mounted elsewhere too.
func rootsOf(subsystems []cgroup1.Subsystem, mounts []*mountinfo.Info) (map[string]string, error) {
	roots := map[string]string{}
	for _, s := range subsystems {
		at, ok := s.(interface{ Path(group string) string })
		if !ok {
			continue
		}
		dir, err := filepath.EvalSymlinks(at.Path("/"))
		if err != nil {
			return nil, err
		}
		for _, m := range mounts {
			if m.Mountpoint == dir {
				roots[string(s.Name())] = m.Root // of several the last one is seen
			}
		}
	}
	return roots, nil
}

// path returns where the groups of a process are below what is mounted.
func (h *hierarchies) path(groups map[string]string) cgroup1.Path {
	return func(controller cgroup1.Name) (string, error) {
		name := string(controller)
		group, ok := groups[name]
		if !ok {
			if group, ok = groups["name="+name]; !ok {
				return "", cgroup1.ErrControllerNotActive
			}
		}
		below, err := filepath.Rel(cmp.Or(h.roots[name], "/"), group)
		if err != nil {
			return "", fmt.Errorf("control group %s: %w", group, err)
		}
		return filepath.Join("/", below), nil
	}
}
