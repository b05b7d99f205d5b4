package spec

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/facts"
)

const (
	unprivilegedPorts = "net.ipv4.ip_unprivileged_port_start"
	pingGroups        = "net.ipv4.ping_group_range"
)

// Sysctls returns the kernel settings to write in a pod's namespaces: what the
// pod asks for, with names in dotted form, and what the policy adds. A setting
// of a namespace that the pod shares with the host is an error.
func Sysctls(pod *cri.PodSandboxConfig, p Policy, host facts.Host) (map[string]string, error) {
	set := map[string]string{}
	for name, value := range pod.GetLinux().GetSysctls() {
		dotted, err := checkSysctl(pod, name, value)
		if err != nil {
			return nil, err
		}
		if _, twice := set[dotted]; twice {
			return nil, fmt.Errorf("config.linux.sysctls[%q]: set twice: %w", name, errdefs.ErrInvalidArgument)
		}
		set[dotted] = value
	}
	for name, value := range p.DefaultSysctls {
		dotted, kind, err := config.Sysctl(name, value)
		if err != nil {
			return nil, fmt.Errorf("default_sysctls: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if _, given := set[dotted]; !given && !shares(pod, kind) {
			set[dotted] = value
		}
	}
	if podOptions(pod).GetNetwork() == cri.NamespaceMode_POD {
		if _, given := set[unprivilegedPorts]; !given && p.UnprivilegedPorts && host.UnprivilegedPorts {
			set[unprivilegedPorts] = "0"
		}
		// Where the daemon is in a user namespace, nobody knows which groups
		// are mapped.
		if _, given := set[pingGroups]; !given && p.UnprivilegedICMP && host.UnprivilegedICMP && !host.UserNS {
			set[pingGroups] = fmt.Sprintf("0 %d", lastGroup(pod))
		}
	}
	return set, nil
}

// lastGroup is the largest group a pod can have. The kernel takes no range with
// groups that do not exist in the user namespace it is written in.
func lastGroup(pod *cri.PodSandboxConfig) uint32 {
	if u := podUserns(pod); u != nil {
		return min(maxID, u.GetGids()[0].GetLength()-1)
	}
	return maxID
}

func checkSysctl(pod *cri.PodSandboxConfig, name, value string) (dotted string, err error) {
	field := fmt.Sprintf("config.linux.sysctls[%q]", name)
	dotted, kind, err := config.Sysctl(name, value)
	if err != nil {
		return "", fmt.Errorf("%s: %w: %w", field, err, errdefs.ErrInvalidArgument)
	}
	if shares(pod, kind) {
		return "", fmt.Errorf("%s: the pod shares this namespace with the host: %w", field, errdefs.ErrInvalidArgument)
	}
	return dotted, nil
}

// shares tells whether the pod has a kind of namespace from the host.
func shares(pod *cri.PodSandboxConfig, kind specs.LinuxNamespaceType) bool {
	o := podOptions(pod)
	if kind == specs.IPCNamespace {
		return o.GetIpc() == cri.NamespaceMode_NODE
	}
	return o.GetNetwork() == cri.NamespaceMode_NODE
}
