package spec

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
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
	if podOptions(pod).GetNetwork() == cri.NamespaceMode_POD {
		if _, given := set[unprivilegedPorts]; !given && p.UnprivilegedPorts && host.UnprivilegedPorts {
			set[unprivilegedPorts] = "0"
		}
		// Within a user namespace the large group number is not mapped.
		if _, given := set[pingGroups]; !given && p.UnprivilegedICMP && host.UnprivilegedICMP && !host.UserNS {
			set[pingGroups] = "0 2147483647"
		}
	}
	return set, nil
}

func checkSysctl(pod *cri.PodSandboxConfig, name, value string) (dotted string, err error) {
	field := fmt.Sprintf("config.linux.sysctls[%q]", name)
	if len(name) > maxSysctl || !sysctlName.MatchString(name) {
		return "", fmt.Errorf("%s: not a name of a kernel setting: %w", field, errdefs.ErrInvalidArgument)
	}
	if len(value) > maxSysctl || !sysctlValue.MatchString(value) {
		return "", fmt.Errorf("%s: value %.64q has characters no setting needs: %w", field, value, errdefs.ErrInvalidArgument)
	}
	dotted = dottedSysctl(name)
	o := podOptions(pod)
	var shared bool
	switch {
	case strings.HasPrefix(dotted, "net."), dotted == "kernel.domainname":
		shared = o.GetNetwork() == cri.NamespaceMode_NODE
	case strings.HasPrefix(dotted, "fs.mqueue."), slices.Contains(ipcSysctls, dotted):
		shared = o.GetIpc() == cri.NamespaceMode_NODE
	default:
		return "", fmt.Errorf("%s: not a setting of a namespace: %w", field, errdefs.ErrInvalidArgument)
	}
	if shared {
		return "", fmt.Errorf("%s: the pod shares this namespace with the host: %w", field, errdefs.ErrInvalidArgument)
	}
	return dotted, nil
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
