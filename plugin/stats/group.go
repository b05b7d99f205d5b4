package stats

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/cgroupspath"
)

// groupOf returns the path of the cgroup that an OCI specification names, below
// the mount point of each hierarchy. NotFound says that it names none.
func groupOf(oci []byte) (string, error) {
	var s struct {
		Linux struct {
			CgroupsPath string `json:"cgroupsPath"`
		} `json:"linux"`
	}
	if len(oci) == 0 {
		return "", fmt.Errorf("find cgroup: there is no specification: %w", errdefs.ErrNotFound)
	}
	if err := json.Unmarshal(oci, &s); err != nil {
		return "", fmt.Errorf("find cgroup: read specification: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if s.Linux.CgroupsPath == "" {
		return "", fmt.Errorf("find cgroup: the specification names none: %w", errdefs.ErrNotFound)
	}
	group, err := cgroupspath.Group(s.Linux.CgroupsPath)
	if err != nil {
		return "", fmt.Errorf("find cgroup: %w", err)
	}
	return group, nil
}
