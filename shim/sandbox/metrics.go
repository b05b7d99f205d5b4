package sandbox

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	v1stats "github.com/containerd/cgroups/v3/cgroup1/stats"
	"github.com/containerd/cgroups/v3/cgroup2"
	v2stats "github.com/containerd/cgroups/v3/cgroup2/stats"
)

// groupStats is what the kernel counts in a pod's control group, as containerd's clients
// know it: nothing where there is none.
func groupStats(path string) (any, error) {
	if cgroups.Mode() == cgroups.Unified {
		if path == "" {
			return &v2stats.Metrics{}, nil
		}
		g, err := cgroup2.Load(path)
		if err != nil {
			return nil, fmt.Errorf("load control group %s: %w", path, err)
		}
		stats, err := g.Stat()
		if errors.Is(err, os.ErrNotExist) {
			return &v2stats.Metrics{}, nil
		}
		return stats, err
	}
	if path == "" {
		return &v1stats.Metrics{}, nil
	}
	g, err := cgroup1.Load(cgroup1.StaticPath(path))
	if errors.Is(err, cgroup1.ErrCgroupDeleted) {
		return &v1stats.Metrics{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("load control group %s: %w", path, err)
	}
	return g.Stat(cgroup1.IgnoreNotExist)
}
