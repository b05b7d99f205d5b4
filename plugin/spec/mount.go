package spec

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/gantry-cri/gantry/plugin/facts"
)

const (
	devDir    = "/dev"
	shmDir    = "/dev/shm"
	sysDir    = "/sys"
	cgroupDir = "/sys/fs/cgroup"

	// ttyGroup owns terminals.
	ttyGroup = "gid=5"
	ttyGID   = 5

	rprivate = "rprivate"
	rslave   = "rslave"
	rshared  = "rshared"
)

// kernelMounts are the filesystems every container begins with; /dev/shm and
// cgroups depend on more and are not among them.
func kernelMounts() []specs.Mount {
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: devDir, Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", ttyGroup}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: sysDir, Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
	}
}

// containerMounts returns the mounts in the order they are made, parents
// before children, one per destination, and the root's propagation.
//
// The strongest come last: filesystems of the kernel, volumes that the image
// declares, the pod's files, the CRI's mounts. A CRI mount replaces what has its destination and
// the kernel filesystems below it (a /sys of the host brings its own cgroups);
// the pod's files and /dev/shm still go on top of a CRI mount above them.
func containerMounts(in *ContainerInput, base []specs.Mount) ([]specs.Mount, string, error) {
	if len(in.Mounts) != len(in.Config.GetMounts()) {
		return nil, "", fmt.Errorf("%d of %d mounts are resolved: %w", len(in.Mounts), len(in.Config.GetMounts()), errdefs.ErrInternal)
	}
	asked := make([]specs.Mount, 0, len(in.Mounts))
	root := ""
	for i, m := range in.Mounts {
		b, err := bindMount(m, in.Handler)
		if err != nil {
			return nil, "", fmt.Errorf("config.mounts[%d]: %w", i, err)
		}
		asked = append(asked, b)
		root = rootPropagation(root, m.Propagation)
	}
	defaults, err := defaultMounts(in, base)
	if err != nil {
		return nil, "", err
	}
	all := slices.DeleteFunc(defaults, func(d specs.Mount) bool {
		return slices.ContainsFunc(asked, func(a specs.Mount) bool { return covers(a.Destination, d.Destination) })
	})
	all = append(all, boundDevices(in)...)
	for i, m := range in.Volumes {
		b, err := bindMount(m, in.Handler)
		if err != nil {
			return nil, "", fmt.Errorf("volume %d of the image: %w", i, err)
		}
		all = append(all, b)
	}
	for _, m := range in.NodeMounts {
		b, err := bindMount(m, in.Handler)
		if err != nil {
			return nil, "", fmt.Errorf("default_mounts_file: %w", err)
		}
		all = append(all, b)
	}
	for _, m := range in.Logs {
		b, err := bindMount(m, in.Handler)
		if err != nil {
			return nil, "", fmt.Errorf("logs of the pod: %w", err)
		}
		all = append(all, b)
	}
	all = append(all, podFiles(in)...)
	return ordered(append(all, asked...)), root, nil
}

// defaultMounts are the kernel filesystems, or the base's mounts in their
// place, and the cgroup mount.
func defaultMounts(in *ContainerInput, base []specs.Mount) ([]specs.Mount, error) {
	list := kernelMounts()
	if len(base) > 0 {
		// A tmpfs on /run, which tools put into base specifications, would
		// hide what images keep there.
		list = slices.DeleteFunc(base, func(m specs.Mount) bool { return path.Clean(m.Destination) == "/run" && m.Type == "tmpfs" })
	}
	list = slices.DeleteFunc(list, func(m specs.Mount) bool {
		d := path.Clean(m.Destination)
		return d == cgroupDir || d == shmDir && in.Files.Shm != ""
	})
	if in.privileged() {
		list = sysWritable(list)
	}
	if in.keptReadonly() {
		list = append(list, writableMounts()...)
	}
	if in.Systemd {
		list = append(list, systemdMounts()...)
	}
	list = usernsMounts(list, in.Pod, in.Handler.RecursiveReadOnly)
	list = append(list, cgroupMount(in))
	if !hasSystemdGroup(in) {
		return list, nil
	}
	m, err := systemdGroup(in)
	return append(list, m), err
}

// writableMounts are where a program may expect to write although its root
// filesystem is read-only.
func writableMounts() (list []specs.Mount) {
	for _, m := range []struct{ dir, mode string }{{"/run", "mode=755"}, {"/tmp", "mode=1777"}, {"/var/tmp", "mode=1777"}} {
		list = append(list, specs.Mount{Destination: m.dir, Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "rw", m.mode}})
	}
	return list
}

// sysWritable makes the mounts of sysfs writable.
func sysWritable(list []specs.Mount) []specs.Mount {
	for i, m := range list {
		if m.Type == "sysfs" {
			list[i].Options = writable(m.Options)
		}
	}
	return list
}

func writable(options []string) []string {
	kept := slices.DeleteFunc(slices.Clone(options), func(o string) bool { return o == "ro" || o == "rro" })
	return append(kept, "rw")
}

// cgroupMount is read-only but for those who may manage cgroups. Without a
// cgroup namespace it mounts the host's own tree once more, and that would
// reset the options of all mounts of it: repeat them.
func cgroupMount(in *ContainerInput) specs.Mount {
	mode := "ro"
	// On version 2 with a namespace of its own, where the limits at the top are
	// not the container's to write, systemd makes its groups.
	delegated := makesGroups(in) && in.Host.Cgroup.V2() && hasCgroupNamespace(in)
	if in.privileged() || in.Handler.CgroupWritable || delegated {
		mode = "rw"
	}
	options := []string{"nosuid", "noexec", "nodev", "relatime", mode}
	if in.Host.Cgroup.V2() && !hasCgroupNamespace(in) {
		options = append(options, in.Host.Cgroup.UnifiedOptions...)
	}
	return specs.Mount{Destination: cgroupDir, Type: "cgroup", Source: "cgroup", Options: options}
}

// podFiles are the binds of the pod's own files. They follow the root
// filesystem: read-only with it.
func podFiles(in *ContainerInput) (list []specs.Mount) {
	mode := "rw"
	if in.readonly() {
		mode = "ro"
	}
	for _, f := range []struct {
		source, destination string
		options             []string
	}{
		{in.Files.Hosts, "/etc/hosts", []string{mode}},
		{in.Files.Hostname, "/etc/hostname", []string{mode}},
		{in.Files.ResolvConf, "/etc/resolv.conf", []string{mode}},
		{in.Files.Passwd, "/etc/passwd", []string{mode}},
		{in.Files.Group, "/etc/group", []string{mode}},
		{in.Files.Env, "/run/.containerenv", []string{"ro"}},
		{in.Files.Timezone, "/etc/localtime", []string{"ro"}},
		// Said again, as a bind mount with options loses those of its source.
		{in.Files.Shm, shmDir, []string{"nosuid", "noexec", "nodev", "rw"}},
	} {
		if f.source == "" {
			continue
		}
		list = append(list, specs.Mount{
			Destination: f.destination, Type: "bind", Source: f.source,
			Options: append([]string{"rbind", rprivate}, f.options...),
		})
	}
	return list
}

// bindMount turns a resolved mount into a mount of the specification.
func bindMount(m facts.Mount, h Handler) (specs.Mount, error) {
	if err := checkRecursive(m.Readonly, m.RecursiveReadonly, m.Propagation); err != nil {
		return specs.Mount{}, err
	}
	mode := "rw"
	switch {
	case len(m.UIDMappings) > 0 && !h.IDMapMounts:
		return specs.Mount{}, fmt.Errorf("uidMappings, gidMappings: runtime handler %q has no id-mapped mounts: %w", h.Name, errdefs.ErrFailedPrecondition)
	case m.RecursiveReadonly && !h.RecursiveReadOnly:
		return specs.Mount{}, fmt.Errorf("%w: recursive_read_only: the runtime cannot do it: %w", crierrors.ErrRROUnsupported, errdefs.ErrNotImplemented)
	case m.RecursiveReadonly:
		mode = "rro"
	case m.Readonly:
		mode = "ro"
	}
	propagation, ok := propagations[m.Propagation]
	if !ok {
		return specs.Mount{}, fmt.Errorf("propagation: %d is unknown: %w", m.Propagation, errdefs.ErrInvalidArgument)
	}
	destination := path.Clean(m.Destination)
	if !path.IsAbs(destination) || destination == "/" || !path.IsAbs(m.Source) {
		return specs.Mount{}, fmt.Errorf("mount of %q on %q: %w", m.Source, m.Destination, errdefs.ErrInvalidArgument)
	}
	return specs.Mount{
		Destination: destination, Type: "bind", Source: m.Source,
		Options:     append([]string{"rbind", propagation, mode}, m.Options...),
		UIDMappings: idMappings(m.UIDMappings), GIDMappings: idMappings(m.GIDMappings),
	}, nil
}

var propagations = map[cri.MountPropagation]string{
	cri.MountPropagation_PROPAGATION_PRIVATE:           rprivate,
	cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER: rslave,
	cri.MountPropagation_PROPAGATION_BIDIRECTIONAL:     rshared,
}

// rootPropagation: mounts reach a container's mount only if they reach its
// root first.
func rootPropagation(sofar string, p cri.MountPropagation) string {
	switch {
	case p == cri.MountPropagation_PROPAGATION_BIDIRECTIONAL, sofar == rshared:
		return rshared
	case p == cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		return rslave
	}
	return sofar
}

// covers reports whether dir is p or above it.
func covers(dir, p string) bool {
	p = path.Clean(p)
	return p == dir || strings.HasPrefix(p, dir+"/")
}

// ordered keeps the last mount of each destination and puts parents before
// children; mounts of the same depth stay in order.
func ordered(mounts []specs.Mount) []specs.Mount {
	last := map[string]int{}
	for i, m := range mounts {
		mounts[i].Destination = path.Clean(m.Destination)
		last[mounts[i].Destination] = i
	}
	list := make([]specs.Mount, 0, len(last))
	for i, m := range mounts {
		if last[m.Destination] == i {
			list = append(list, m)
		}
	}
	slices.SortStableFunc(list, func(a, b specs.Mount) int { return depth(a.Destination) - depth(b.Destination) })
	return list
}

func depth(p string) int {
	if p == "/" {
		return 0
	}
	return strings.Count(p, "/")
}
