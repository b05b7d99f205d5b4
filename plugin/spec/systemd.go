package spec

import (
	"path"
	"slices"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/cgroupspath"
	"github.com/gantry-cri/gantry/plugin/facts"
)

// systemdSignal is what makes systemd shut down; SIGTERM makes it start again.
const systemdSignal = "SIGRTMIN+3"

// systemdDir is where systemd expects its hierarchy of version 1.
const systemdDir = cgroupDir + "/systemd"

// MayBeSystemd reports whether a container's command has a name that systemd
// goes by. Only the program that it leads to in the image tells for sure.
func MayBeSystemd(cfg *cri.ContainerConfig, image imagespec.ImageConfig) (program string, ok bool) {
	args, err := Args(cfg, image)
	if err != nil || !path.IsAbs(args[0]) {
		return "", false
	}
	base := path.Base(args[0])
	return args[0], base == "init" || base == "systemd"
}

// IsSystemd reports whether the program that a command leads to is systemd.
func IsSystemd(program string) bool { return path.Base(program) == "systemd" }

// systemdMounts are the directories that systemd wants to begin empty; what the
// request mounts there stays.
func systemdMounts() []specs.Mount {
	var list []specs.Mount
	for _, m := range []struct{ dir, mode string }{
		{"/run", "mode=755"}, {"/run/lock", "mode=755"}, {"/tmp", "mode=1777"}, {"/var/log/journal", "mode=755"},
	} {
		list = append(list, specs.Mount{
			Destination: m.dir, Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "rw", m.mode},
		})
	}
	return list
}

// makesGroups reports whether the container's systemd is to make groups of its own, which
// it does as the first process of the container's namespace only.
func makesGroups(in *ContainerInput) bool {
	return in.Systemd && in.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == cri.NamespaceMode_CONTAINER
}

// hasSystemdGroup reports whether systemd may make groups on version 1: in the hierarchy
// that is for it, which limits nothing, and below its own group. In a user namespace that
// is not its own, and who mounts the host's control groups has it see the host's paths.
func hasSystemdGroup(in *ContainerInput) bool {
	return makesGroups(in) && !in.privileged() && !in.Handler.CgroupWritable && in.Handler.HostCgroups &&
		!in.Host.Cgroup.V2() && in.Host.Cgroup.Systemd != "" && podUserns(in.Pod) == nil &&
		!slices.ContainsFunc(slices.Concat(in.Mounts, in.NodeMounts, in.Volumes), func(m facts.Mount) bool {
			return covers(path.Clean(m.Destination), systemdDir) || covers(systemdDir, path.Clean(m.Destination))
		})
}

// systemdGroup is the container's group in systemd's hierarchy. The runtime has made it
// before it mounts.
func systemdGroup(in *ContainerInput) (specs.Mount, error) {
	group, err := cgroupspath.Group(cgroupspath.Of(in.Pod.GetLinux().GetCgroupParent(), in.ID, in.Handler.SystemdCgroup))
	if err != nil {
		return specs.Mount{}, err
	}
	return specs.Mount{
		Destination: systemdDir, Type: "bind", Source: path.Join(in.Host.Cgroup.Systemd, group),
		Options: []string{"bind", rprivate, "nosuid", "noexec", "nodev", "rw"},
	}, nil
}

// systemdImage is the image's configuration with what systemd has to know,
// where the image does not say otherwise: how it is ended, and that it runs in
// a container.
func systemdImage(image imagespec.ImageConfig) imagespec.ImageConfig {
	if image.StopSignal == "" {
		image.StopSignal = systemdSignal
	}
	image.Env = slices.Concat([]string{"container=oci"}, image.Env)
	return image
}
