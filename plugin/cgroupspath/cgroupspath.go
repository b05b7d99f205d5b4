// Package cgroupspath writes and reads the paths of control groups in the two
// notations that OCI runtimes know: a path, and slice:prefix:name for a group that
// systemd makes. It looks at no file system. Start at Of.
package cgroupspath

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// Of returns the cgroup of the container or sandbox id below parent,
// in the runtime's notation: a path, or slice:prefix:name when systemd makes
// the cgroup. A parent in the notation of paths becomes a slice.
func Of(parent, id string, systemd bool) string {
	if !systemd {
		if parent == "" {
			parent = "k8s.io"
		}
		return path.Join("/", parent, id)
	}
	return systemdSlice(parent) + ":cri-containerd:" + id
}

// systemdSlice names the slice for a cgroup path: the last element of a path
// of slices, which says it all, or the elements joined as systemd nests them.
func systemdSlice(parent string) string {
	if base := path.Base(parent); strings.HasSuffix(base, ".slice") {
		return base
	}
	elems := strings.FieldsFunc(path.Clean("/"+parent), func(r rune) bool { return r == '/' })
	if len(elems) == 0 {
		return "system.slice"
	}
	for i, e := range elems {
		elems[i] = strings.ReplaceAll(strings.TrimSuffix(e, ".slice"), "-", "_")
	}
	return strings.Join(elems, "-") + ".slice"
}

// Group returns the path within a hierarchy for a cgroups path in either
// notation. InvalidArgument says that it is neither, or the root.
func Group(s string) (string, error) {
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

// Parent reads a pod's cgroup parent: a path, or the name of a slice.
func Parent(s string) string {
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
