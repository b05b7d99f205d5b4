package spec

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

var (
	// sysctlName is one or more words joined by dots or slashes; no word is
	// empty or "..", because names become paths.
	sysctlName = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?([./][A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*$`)
	// sysctlValue is what values of namespaced settings are made of: numbers,
	// lists, ranges, names, addresses.
	sysctlValue = regexp.MustCompile(`^[A-Za-z0-9 \t,._:/-]*$`)

	ipcSysctls = []string{
		"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem",
		"kernel.shm_rmid_forced", "kernel.shmall", "kernel.shmmax", "kernel.shmmni",
	}
)

const (
	maxSysctl = 4096

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
		dotted, kind, err := sysctlKind(name, value)
		if err != nil {
			return nil, fmt.Errorf("default_sysctls: %w", err)
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

// CheckDefaultSysctls reports what in a policy's DefaultSysctls could be set in
// no pod.
func CheckDefaultSysctls(set map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(set)) {
		if _, _, err := sysctlKind(name, set[name]); err != nil {
			return err
		}
	}
	return nil
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
	dotted, kind, err := sysctlKind(name, value)
	if err != nil {
		return "", fmt.Errorf("%s: %w", field, err)
	}
	if shares(pod, kind) {
		return "", fmt.Errorf("%s: the pod shares this namespace with the host: %w", field, errdefs.ErrInvalidArgument)
	}
	return dotted, nil
}

// sysctlKind returns a setting's dotted name and the namespace it belongs to.
func sysctlKind(name, value string) (dotted string, kind specs.LinuxNamespaceType, err error) {
	if len(name) > maxSysctl || !sysctlName.MatchString(name) {
		return "", "", fmt.Errorf("%.64q is not a name of a kernel setting: %w", name, errdefs.ErrInvalidArgument)
	}
	if len(value) > maxSysctl || !sysctlValue.MatchString(value) {
		return "", "", fmt.Errorf("value %.64q has characters no setting needs: %w", value, errdefs.ErrInvalidArgument)
	}
	dotted = dottedSysctl(name)
	switch {
	case strings.HasPrefix(dotted, "net."), dotted == "kernel.domainname": // a pod's host name goes with its network
		return dotted, specs.NetworkNamespace, nil
	case strings.HasPrefix(dotted, "fs.mqueue."), slices.Contains(ipcSysctls, dotted):
		return dotted, specs.IPCNamespace, nil
	}
	return "", "", fmt.Errorf("%s is not a setting of a namespace: %w", dotted, errdefs.ErrInvalidArgument)
}

// shares tells whether the pod has a kind of namespace from the host.
func shares(pod *cri.PodSandboxConfig, kind specs.LinuxNamespaceType) bool {
	o := podOptions(pod)
	if kind == specs.IPCNamespace {
		return o.GetIpc() == cri.NamespaceMode_NODE
	}
	return o.GetNetwork() == cri.NamespaceMode_NODE
}

// dottedSysctl returns the dotted form of a name. The first separator decides
// which form it has; in the other form dots and slashes change places
// ("net/ipv4/conf/eth0.1/forwarding" is "net.ipv4.conf.eth0/1.forwarding").
func dottedSysctl(name string) string {
	if i := strings.IndexAny(name, "./"); i < 0 || name[i] == '.' {
		return name
	}
	return strings.Map(func(r rune) rune {
		switch r {
		case '.':
			return '/'
		case '/':
			return '.'
		}
		return r
	}, name)
}
