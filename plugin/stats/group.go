package stats

import (
	"encoding/json"
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// groupOf returns the path of the cgroup that an OCI specification names, below
// the mount point of each hierarchy. NotFound says that it names none.
func groupOf(spec []byte) (string, error) {
	var s struct {
		Linux struct {
			CgroupsPath string `json:"cgroupsPath"`
		} `json:"linux"`
	}
	if len(spec) == 0 {
		return "", fmt.Errorf("find cgroup: there is no specification: %w", errdefs.ErrNotFound)
	}
	if err := json.Unmarshal(spec, &s); err != nil {
		return "", fmt.Errorf("find cgroup: read specification: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if s.Linux.CgroupsPath == "" {
		return "", fmt.Errorf("find cgroup: the specification names none: %w", errdefs.ErrNotFound)
	}
	group, err := groupPath(s.Linux.CgroupsPath)
	if err != nil {
		return "", fmt.Errorf("find cgroup: %w", err)
	}
	return group, nil
}

// groupPath reads a cgroups path in either notation: a path, or
// slice:prefix:name for a cgroup that systemd makes.
func groupPath(s string) (string, error) {
	bad := func(why string) (string, error) {
		return "", fmt.Errorf("cgroups path %.128q %s: %w", s, why, errdefs.ErrInvalidArgument)
	}
	if strings.HasPrefix(s, "/") {
		if s = path.Clean(s); s == "/" {
			return bad("is the root")
		}
		return s, nil
	}
	parts := strings.Split(s, ":")
	if len(parts) != 3 || parts[2] == "" {
		return bad("is neither an absolute path nor slice:prefix:name")
	}
	if strings.Contains(s, "/") {
		return bad("has a slash in the name of a unit")
	}
	slice, ok := slicePath(parts[0])
	if !ok {
		return bad("does not begin with the name of a slice")
	}
	name := parts[2]
	if !strings.HasSuffix(name, ".slice") {
		if parts[1] != "" {
			name = parts[1] + "-" + name
		}
		name += ".scope"
	}
	return path.Join(slice, name), nil
}

// parentPath reads a pod's cgroup parent: a path, or the name of a slice.
func parentPath(s string) string {
	if !strings.Contains(s, "/") {
		if slice, ok := slicePath(s); ok {
			return slice
		}
	}
	return path.Clean("/" + s)
}

// slicePath returns where systemd puts a slice: inside those that its name
// consists of. "a-b.slice" is /a.slice/a-b.slice.
func slicePath(slice string) (string, bool) {
	switch slice {
	case "":
		return "/system.slice", true
	case "-.slice":
		return "/", true
	}
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok {
		return "", false
	}
	dir := "/"
	for i := 0; i <= len(name); i++ {
		if i < len(name) && name[i] != '-' {
			continue
		}
		if i == 0 || name[i-1] == '-' {
			return "", false // an empty part
		}
		dir = path.Join(dir, name[:i]+".slice")
	}
	return dir, true
}
