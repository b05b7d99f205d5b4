package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// maxDevices bounds what one directory may add to a container.
const maxDevices = 1 << 14

// ownEntries are the entries of /dev that every container has of its own:
// mounts, links into /proc, its terminal.
var ownEntries = []string{
	".lxc", ".lxd-mounts", ".udev", "console", "fd", "mqueue", "ptmx", "pts", "shm", "stderr", "stdin", "stdout",
}

// ResolveDevices finds the nodes that a container's devices name. A link is
// followed; a directory stands for all nodes below it, each at the same place
// below the container's path.
func ResolveDevices(devices []*cri.Device) ([]facts.Device, error) {
	var list []facts.Device
	for i, d := range devices {
		found, err := ResolveDevice(d)
		if err != nil {
			return nil, fmt.Errorf("resolve config.devices[%d]: %w", i, err)
		}
		list = append(list, found...)
	}
	return list, nil
}

// ResolveDevice finds the nodes that one device names.
func ResolveDevice(d *cri.Device) ([]facts.Device, error) {
	if !filepath.IsAbs(d.GetHostPath()) || strings.IndexByte(d.GetHostPath(), 0) >= 0 {
		return nil, fmt.Errorf("host_path: %.256q is not an absolute path: %w", d.GetHostPath(), errdefs.ErrInvalidArgument)
	}
	source, err := filepath.EvalSymlinks(d.GetHostPath())
	if err != nil {
		return nil, fmt.Errorf("host_path: %w", classed(err))
	}
	target := d.GetContainerPath()
	if target == "" {
		target = d.GetHostPath()
	}
	target = filepath.Clean(target)
	fi, err := os.Lstat(source)
	if err != nil {
		return nil, fmt.Errorf("host_path: %w", classed(err))
	}
	if fi.IsDir() {
		return devicesBelow(source, target, d.GetPermissions())
	}
	node, ok, err := device(source, target, d.GetPermissions())
	if err != nil {
		return nil, fmt.Errorf("host_path: %w", err)
	}
	if !ok {
		return nil, fmt.Errorf("host_path: %s is not a device: %w", source, errdefs.ErrInvalidArgument)
	}
	return []facts.Device{node}, nil
}

// HostDevices lists all device nodes of the host, as a privileged container
// gets them. It is read anew for each, because devices come and go.
func HostDevices() ([]facts.Device, error) {
	list, err := devicesBelow("/dev", "/dev", "rwm")
	if err != nil {
		return nil, fmt.Errorf("list host devices: %w", err)
	}
	return list, nil
}

// devicesBelow walks a directory without following links. What vanishes
// meanwhile was not there.
func devicesBelow(dir, target, permissions string) ([]facts.Device, error) {
	var list []facts.Device
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return classed(err)
		}
		if filepath.Dir(p) == "/dev" && slices.Contains(ownEntries, e.Name()) {
			if e.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if e.Type()&fs.ModeDevice == 0 {
			return nil
		}
		node, ok, err := device(p, filepath.Join(target, strings.TrimPrefix(p, dir)), permissions)
		if errdefs.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if ok {
			list = append(list, node)
		}
		if len(list) > maxDevices {
			return fmt.Errorf("%s: more than %d devices: %w", dir, maxDevices, errdefs.ErrFailedPrecondition)
		}
		return nil
	})
	return list, err
}

// device reads one node; ok is false if p is something else.
func device(p, target, permissions string) (d facts.Device, ok bool, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return d, false, classed(&fs.PathError{Op: "lstat", Path: p, Err: err})
	}
	kinds := map[uint32]string{unix.S_IFCHR: "c", unix.S_IFBLK: "b"}
	kind, ok := kinds[st.Mode&unix.S_IFMT]
	return facts.Device{
		Path: target, HostPath: p, Type: kind,
		Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)),
		Mode: st.Mode & 0o777, UID: st.Uid, GID: st.Gid,
		Permissions: permissions,
	}, ok, nil
}
