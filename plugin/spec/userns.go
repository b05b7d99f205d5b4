package spec

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// maxMappings is how many ranges the kernel takes for one namespace.
const maxMappings = 340

// lastID is the largest number of a user or group; the one above it stands for
// none.
const lastID = 1<<32 - 2

// ownUserns: an absent message means the host's user namespace.
func ownUserns(u *cri.UserNamespace) bool {
	return u != nil && u.GetMode() == cri.NamespaceMode_POD
}

// podUserns returns the pod's own user namespace, nil for the host's.
func podUserns(pod *cri.PodSandboxConfig) *cri.UserNamespace {
	if u := podOptions(pod).GetUsernsOptions(); ownUserns(u) {
		return u
	}
	return nil
}

// InNodeUserns is the pod with the user namespace that the node gives, if it gives
// one to this pod: not to one that asks for another, nor to one that is privileged
// or shares the node's network, processes or IPC, whose work is the node's.
func InNodeUserns(pod *cri.PodSandboxConfig, p Policy) *cri.PodSandboxConfig {
	const node = cri.NamespaceMode_NODE
	o := podOptions(pod)
	if p.Userns == nil || pod == nil || ownUserns(o.GetUsernsOptions()) || pod.GetLinux().GetSecurityContext().GetPrivileged() ||
		o.GetNetwork() == node || o.GetPid() == node || o.GetIpc() == node {
		return pod
	}
	out := proto.Clone(pod).(*cri.PodSandboxConfig)
	orNew(&orNew(&orNew(&out.Linux).SecurityContext).NamespaceOptions).UsernsOptions = p.Userns
	return out
}

// InPodUserns is the container in its pod's user namespace if it asks for none and
// the pod as it was asked for had none: who asks cannot know of the node's.
func InPodUserns(c *cri.ContainerConfig, pod, asked *cri.PodSandboxConfig) *cri.ContainerConfig {
	u := podUserns(pod)
	if c == nil || u == nil || asked == nil || podUserns(asked) != nil || ownUserns(c.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()) {
		return c
	}
	out := proto.Clone(c).(*cri.ContainerConfig)
	orNew(&orNew(&orNew(&out.Linux).SecurityContext).NamespaceOptions).UsernsOptions = u
	return out
}

func orNew[T any](p **T) *T {
	if *p == nil {
		*p = new(T)
	}
	return *p
}

func checkUserns(field string, u *cri.UserNamespace) error {
	switch {
	case u == nil:
		return nil
	case u.GetMode() == cri.NamespaceMode_NODE:
		if len(u.GetUids()) > 0 || len(u.GetGids()) > 0 {
			return fmt.Errorf("%s: id mappings with mode NODE: %w", field, errdefs.ErrInvalidArgument)
		}
		return nil
	case u.GetMode() != cri.NamespaceMode_POD:
		return fmt.Errorf("%s.mode: %s is not possible: %w", field, u.GetMode(), errdefs.ErrInvalidArgument)
	}
	if err := checkPodMapping(field+".uids", u.GetUids()); err != nil {
		return err
	}
	return checkPodMapping(field+".gids", u.GetGids())
}

// checkPodMapping wants one range that begins with the pod's root.
func checkPodMapping(field string, list []*cri.IDMapping) error {
	if len(list) != 1 {
		return fmt.Errorf("%s: %d mappings instead of one: %w", field, len(list), errdefs.ErrInvalidArgument)
	}
	if id := list[0].GetContainerId(); id != 0 {
		return fmt.Errorf("%s[0].container_id: %d instead of 0, which must be mapped: %w", field, id, errdefs.ErrInvalidArgument)
	}
	return checkMappings(field, list)
}

// checkMappings checks what the kernel would not take.
func checkMappings(field string, list []*cri.IDMapping) error {
	if len(list) > maxMappings {
		return fmt.Errorf("%s: %d mappings are more than %d: %w", field, len(list), maxMappings, errdefs.ErrInvalidArgument)
	}
	for i, m := range list {
		at := fmt.Sprintf("%s[%d]", field, i)
		switch {
		case m == nil:
			return fmt.Errorf("%s: missing: %w", at, errdefs.ErrInvalidArgument)
		case m.GetLength() == 0:
			return fmt.Errorf("%s.length: zero: %w", at, errdefs.ErrInvalidArgument)
		case last(m.GetHostId(), m) > lastID:
			return fmt.Errorf("%s: %d numbers from host_id %d end above %d: %w", at, m.GetLength(), m.GetHostId(), lastID, errdefs.ErrInvalidArgument)
		case last(m.GetContainerId(), m) > lastID:
			return fmt.Errorf("%s: %d numbers from container_id %d end above %d: %w", at, m.GetLength(), m.GetContainerId(), lastID, errdefs.ErrInvalidArgument)
		}
		for _, o := range list[:i] {
			if overlap(o.GetHostId(), o, m.GetHostId(), m) || overlap(o.GetContainerId(), o, m.GetContainerId(), m) {
				return fmt.Errorf("%s: overlaps one before it: %w", at, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

// last is the last number of a range that begins with first.
func last(first uint32, m *cri.IDMapping) uint64 { return uint64(first) + uint64(m.GetLength()) - 1 }

func overlap(first uint32, m *cri.IDMapping, otherFirst uint32, other *cri.IDMapping) bool {
	return uint64(first) <= last(otherFirst, other) && uint64(otherFirst) <= last(first, m)
}

// checkMountMappings checks the mappings of a mount.
func checkMountMappings(field string, m *cri.Mount) error {
	if (len(m.GetUidMappings()) == 0) != (len(m.GetGidMappings()) == 0) {
		return fmt.Errorf("%s: uidMappings and gidMappings: only one is set: %w", field, errdefs.ErrInvalidArgument)
	}
	if err := checkMappings(field+".uidMappings", m.GetUidMappings()); err != nil {
		return err
	}
	return checkMappings(field+".gidMappings", m.GetGidMappings())
}

// sameUserns reports whether both ask for the same user namespace.
func sameUserns(a, b *cri.UserNamespace) bool {
	if !ownUserns(a) || !ownUserns(b) {
		return ownUserns(a) == ownUserns(b)
	}
	return slices.EqualFunc(a.GetUids(), b.GetUids(), sameMapping) && slices.EqualFunc(a.GetGids(), b.GetGids(), sameMapping)
}

func sameMapping(a, b *cri.IDMapping) bool {
	return a.GetHostId() == b.GetHostId() && a.GetContainerId() == b.GetContainerId() && a.GetLength() == b.GetLength()
}

// usernsMappings are those of the pod's user namespace, which runtimes want
// beside its path.
func usernsMappings(pod *cri.PodSandboxConfig) (uids, gids []specs.LinuxIDMapping) {
	u := podUserns(pod)
	return idMappings(u.GetUids()), idMappings(u.GetGids())
}

func idMappings(list []*cri.IDMapping) (out []specs.LinuxIDMapping) {
	for _, m := range list {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.GetContainerId(), HostID: m.GetHostId(), Size: m.GetLength()})
	}
	return out
}

// checkMapped refuses an identity that does not exist in the user namespace u.
func checkMapped(id facts.User, u *cri.UserNamespace) error {
	if u == nil {
		return nil
	}
	users, groups := u.GetUids()[0].GetLength(), u.GetGids()[0].GetLength()
	if id.UID >= users {
		return fmt.Errorf("config.linux.security_context: user %d is not one of the %d of the pod's user namespace: %w", id.UID, users, errdefs.ErrInvalidArgument)
	}
	for _, g := range append([]uint32{id.GID}, id.AdditionalGIDs...) {
		if g >= groups {
			return fmt.Errorf("config.linux.security_context: group %d is not one of the %d of the pod's user namespace: %w", g, groups, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// usernsMounts fits the filesystems of the kernel to the pod's user namespace.
func usernsMounts(list []specs.Mount, pod *cri.PodSandboxConfig, recursive bool) []specs.Mount {
	u := podUserns(pod)
	if u == nil {
		return list
	}
	for i, m := range list {
		switch {
		case m.Type == "devpts" && u.GetGids()[0].GetLength() <= ttyGID:
			// Without the group, terminals belong to that of their process.
			list[i].Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == ttyGroup })
		case m.Type == "sysfs" && podOptions(pod).GetNetwork() == cri.NamespaceMode_NODE:
			list[i] = hostSysfs(recursive)
		}
	}
	return list
}

// hostSysfs is the host's /sys. A new one shows the devices of a network
// namespace, so the kernel mounts it only for who is root there.
func hostSysfs(recursive bool) specs.Mount {
	mode := "ro"
	if recursive {
		mode = "rro"
	}
	return specs.Mount{
		Destination: sysDir, Type: "bind", Source: sysDir,
		Options: []string{"rbind", rprivate, "nosuid", "noexec", "nodev", mode},
	}
}
