package spec

import (
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

const (
	// maxName bounds names; Kubernetes stops at 253.
	maxName = 1024
	// maxPath bounds paths, as the kernel does.
	maxPath = 4096
	// maxHostname is the kernel's.
	maxHostname = 64
	// maxID is the largest user or group number, as in package rootfs.
	maxID = 1<<31 - 1
)

var hostnamePattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$`)

// ValidatePod checks a sandbox configuration before anything is done for it.
func ValidatePod(cfg *cri.PodSandboxConfig) error {
	if cfg == nil {
		return fmt.Errorf("config: missing: %w", errdefs.ErrInvalidArgument)
	}
	m := cfg.GetMetadata()
	if m == nil {
		return fmt.Errorf("config.metadata: missing: %w", errdefs.ErrInvalidArgument)
	}
	return firstError(
		func() error { return checkName("config.metadata.name", m.GetName(), true) },
		func() error { return checkName("config.metadata.namespace", m.GetNamespace(), false) },
		func() error { return checkName("config.metadata.uid", m.GetUid(), false) },
		func() error { return checkHostname(cfg.GetHostname()) },
		func() error { return checkHostPath("config.log_directory", cfg.GetLogDirectory()) },
		func() error { return checkDNS(cfg.GetDnsConfig()) },
		func() error { return checkPorts(cfg.GetPortMappings()) },
		func() error { return checkWindows("config", cfg.GetWindows() != nil) },
		func() error { return checkPodLinux(cfg) },
	)
}

func checkPodLinux(cfg *cri.PodSandboxConfig) error {
	if err := checkCgroupParent(cfg.GetLinux().GetCgroupParent()); err != nil {
		return err
	}
	sc, field := cfg.GetLinux().GetSecurityContext(), "config.linux.security_context"
	if err := checkPodOptions(field+".namespace_options", sc.GetNamespaceOptions()); err != nil {
		return err
	}
	for name, value := range cfg.GetLinux().GetSysctls() {
		if _, err := checkSysctl(cfg, name, value); err != nil {
			return err
		}
	}
	// A pod without a process of its own has nobody to confine.
	if _, err := Seccomp(sc, Handler{}, Policy{}); err != nil {
		return err
	}
	if _, err := appArmor(sc.GetApparmor(), "", Policy{}, facts.Host{AppArmor: true}); err != nil {
		return err
	}
	return checkIdentity(field, identity{
		user: sc.GetRunAsUser(), group: sc.GetRunAsGroup(),
		supplemental: sc.GetSupplementalGroups(), policy: sc.GetSupplementalGroupsPolicy(),
	})
}

// ValidateContainer checks a container configuration, as part of the given
// pod's, before anything is done for it.
func ValidateContainer(cfg *cri.ContainerConfig, pod *cri.PodSandboxConfig) error {
	if cfg == nil {
		return fmt.Errorf("config: missing: %w", errdefs.ErrInvalidArgument)
	}
	if cfg.GetMetadata() == nil {
		return fmt.Errorf("config.metadata: missing: %w", errdefs.ErrInvalidArgument)
	}
	if pod == nil {
		return fmt.Errorf("sandbox_config: missing: %w", errdefs.ErrInvalidArgument)
	}
	return firstError(
		func() error { return checkName("config.metadata.name", cfg.GetMetadata().GetName(), true) },
		func() error { return checkImage(cfg.GetImage()) },
		func() error { _, err := LogPath(pod.GetLogDirectory(), cfg.GetLogPath()); return err },
		func() error { return checkMounts(cfg.GetMounts()) },
		func() error { return checkDevices(cfg) },
		func() error { return checkWindows("config", cfg.GetWindows() != nil) },
		func() error { return checkContainerSecurity(cfg, pod) },
	)
}

func checkContainerSecurity(cfg *cri.ContainerConfig, pod *cri.PodSandboxConfig) error {
	sc, field := cfg.GetLinux().GetSecurityContext(), "config.linux.security_context"
	if err := checkContainerOptions(field+".namespace_options", sc.GetNamespaceOptions(), podOptions(pod)); err != nil {
		return err
	}
	for _, list := range []struct {
		field string
		paths []string
	}{{"masked_paths", sc.GetMaskedPaths()}, {"readonly_paths", sc.GetReadonlyPaths()}} {
		for i, p := range list.paths {
			if err := checkAbsolute(fmt.Sprintf("%s.%s[%d]", field, list.field, i), p); err != nil {
				return err
			}
		}
	}
	return checkIdentity(field, identity{
		user: sc.GetRunAsUser(), name: sc.GetRunAsUsername(), group: sc.GetRunAsGroup(),
		supplemental: sc.GetSupplementalGroups(), policy: sc.GetSupplementalGroupsPolicy(),
	})
}

// LogPath returns the absolute path of a container's log file, "" for no log:
// when either part is empty. The file is always below the directory.
func LogPath(dir, name string) (string, error) {
	if name == "" || dir == "" {
		return "", nil
	}
	if err := checkHostPath("sandbox_config.log_directory", dir); err != nil {
		return "", err
	}
	if path.IsAbs(name) || hasControl(name) || hasDotDot(name) || strings.HasSuffix(name, "/") || path.Clean(name) == "." || len(name) > maxPath {
		return "", fmt.Errorf("config.log_path: %.256q is not a file below the log directory: %w", name, errdefs.ErrInvalidArgument)
	}
	return path.Join(dir, name), nil
}

func firstError(checks ...func() error) error {
	for _, check := range checks {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

// checkName checks a name that may become part of a path or a line.
func checkName(field, s string, required bool) error {
	switch {
	case s == "" && required:
		return fmt.Errorf("%s: empty: %w", field, errdefs.ErrInvalidArgument)
	case len(s) > maxName:
		return fmt.Errorf("%s: %d bytes are more than %d: %w", field, len(s), maxName, errdefs.ErrInvalidArgument)
	case s == ".", s == "..", strings.Contains(s, "/"), hasControl(s):
		return fmt.Errorf("%s: %.256q could be taken for a path or more than one line: %w", field, s, errdefs.ErrInvalidArgument)
	}
	return nil
}

// checkAbsolute checks a path inside a container, which may have any form but
// must be absolute.
func checkAbsolute(field, p string) error {
	if !path.IsAbs(p) || strings.IndexByte(p, 0) >= 0 || len(p) > maxPath {
		return fmt.Errorf("%s: %.256q is not an absolute path: %w", field, p, errdefs.ErrInvalidArgument)
	}
	return nil
}

// checkHostPath checks a directory of the host that we will write below.
func checkHostPath(field, p string) error {
	if p == "" {
		return nil
	}
	if err := checkAbsolute(field, p); err != nil {
		return err
	}
	if hasDotDot(p) || hasControl(p) {
		return fmt.Errorf("%s: %.256q has '..' or control characters: %w", field, p, errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkCgroupParent(p string) error {
	if hasDotDot(p) || hasControl(p) || strings.Contains(p, ":") || len(p) > maxPath {
		return fmt.Errorf("config.linux.cgroup_parent: %.256q is not a cgroup: %w", p, errdefs.ErrInvalidArgument)
	}
	return nil
}

func hasDotDot(p string) bool { return slices.Contains(strings.Split(p, "/"), "..") }

func hasControl(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// checkHostname: empty is the node's own name.
func checkHostname(s string) error {
	if s != "" && (len(s) > maxHostname || !hostnamePattern.MatchString(s)) {
		return fmt.Errorf("config.hostname: %.128q is not a host name of at most %d bytes: %w", s, maxHostname, errdefs.ErrInvalidArgument)
	}
	return nil
}

// checkDNS keeps every value on its place in resolv.conf.
func checkDNS(dns *cri.DNSConfig) error {
	for _, list := range []struct {
		field  string
		values []string
	}{{"servers", dns.GetServers()}, {"searches", dns.GetSearches()}, {"options", dns.GetOptions()}} {
		for i, v := range list.values {
			if v == "" || hasControl(v) || strings.ContainsAny(v, " #;") {
				return fmt.Errorf("config.dns_config.%s[%d]: %.128q is not one word: %w", list.field, i, v, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

func checkPorts(ports []*cri.PortMapping) error {
	for i, p := range ports {
		field := fmt.Sprintf("config.port_mappings[%d]", i)
		if p == nil {
			return fmt.Errorf("%s: missing: %w", field, errdefs.ErrInvalidArgument)
		}
		if _, ok := cri.Protocol_name[int32(p.GetProtocol())]; !ok {
			return fmt.Errorf("%s.protocol: %d is unknown: %w", field, p.GetProtocol(), errdefs.ErrInvalidArgument)
		}
		for _, n := range []struct {
			field string
			port  int32
		}{{"container_port", p.GetContainerPort()}, {"host_port", p.GetHostPort()}} {
			if n.port < 0 || n.port > 65535 {
				return fmt.Errorf("%s.%s: %d is not a port: %w", field, n.field, n.port, errdefs.ErrInvalidArgument)
			}
		}
		if ip := p.GetHostIp(); ip != "" {
			if _, err := netip.ParseAddr(ip); err != nil {
				return fmt.Errorf("%s.host_ip: %w (%w)", field, err, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

func checkWindows(field string, set bool) error {
	if set {
		return fmt.Errorf("%s.windows: %w", field, errdefs.ErrNotImplemented)
	}
	return nil
}

func checkImage(image *cri.ImageSpec) error {
	if image.GetImage() == "" {
		return fmt.Errorf("config.image.image: empty: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkMounts(mounts []*cri.Mount) error {
	for i, m := range mounts {
		if err := checkMount(fmt.Sprintf("config.mounts[%d]", i), m); err != nil {
			return err
		}
	}
	return nil
}

func checkMount(field string, m *cri.Mount) error {
	if m == nil {
		return fmt.Errorf("%s: missing: %w", field, errdefs.ErrInvalidArgument)
	}
	if err := checkAbsolute(field+".container_path", m.GetContainerPath()); err != nil {
		return err
	}
	if path.Clean(m.GetContainerPath()) == "/" {
		return fmt.Errorf("%s.container_path: the root of a container cannot be mounted over: %w", field, errdefs.ErrInvalidArgument)
	}
	switch {
	case m.GetImage() != nil && m.GetHostPath() != "":
		return fmt.Errorf("%s: host_path and image are both set: %w", field, errdefs.ErrInvalidArgument)
	case m.GetImage() == nil && m.GetImageSubPath() != "":
		return fmt.Errorf("%s.image_sub_path: without image: %w", field, errdefs.ErrInvalidArgument)
	}
	if err := checkMountMappings(field, m); err != nil {
		return err
	}
	for i, o := range m.GetMountOptions() {
		if !slices.Contains(mountOptions, o) {
			return fmt.Errorf("%s.mount_options[%d]: %.64q is none of %s: %w", field, i, o, strings.Join(mountOptions, ", "), errdefs.ErrInvalidArgument)
		}
	}
	if m.GetImage() != nil {
		return checkImageMount(field, m)
	}
	if err := checkAbsolute(field+".host_path", m.GetHostPath()); err != nil {
		return err
	}
	if _, ok := propagations[m.GetPropagation()]; !ok {
		return fmt.Errorf("%s.propagation: %d is unknown: %w", field, m.GetPropagation(), errdefs.ErrInvalidArgument)
	}
	if err := checkRecursive(m.GetReadonly(), m.GetRecursiveReadOnly(), m.GetPropagation()); err != nil {
		return fmt.Errorf("%s.%w", field, err)
	}
	return nil
}

// mountOptions are those that the CRI has for a mount.
var mountOptions = []string{"noexec", "nodev", "nosuid"}

// checkImageMount checks what is particular to a mount of an image. It is
// read-only whether the request says so or not.
func checkImageMount(field string, m *cri.Mount) error {
	sub := m.GetImageSubPath()
	switch {
	case m.GetImage().GetImage() == "":
		return fmt.Errorf("%s.image.image: empty: %w", field, errdefs.ErrInvalidArgument)
	case strings.IndexByte(sub, 0) >= 0 || len(sub) > maxPath:
		return fmt.Errorf("%s.image_sub_path: %.256q is not a path: %w", field, sub, errdefs.ErrInvalidArgument)
	case m.GetPropagation() != cri.MountPropagation_PROPAGATION_PRIVATE:
		return fmt.Errorf("%s.propagation: %s, and nothing is ever mounted in an image: %w", field, m.GetPropagation(), errdefs.ErrInvalidArgument)
	}
	return nil
}

// checkRecursive holds the CRI's rules for recursive read-only mounts.
func checkRecursive(readonly, recursive bool, p cri.MountPropagation) error {
	switch {
	case recursive && !readonly:
		return fmt.Errorf("recursive_read_only: without readonly: %w", errdefs.ErrInvalidArgument)
	case recursive && p != cri.MountPropagation_PROPAGATION_PRIVATE:
		return fmt.Errorf("recursive_read_only: with propagation %s: %w", p, errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkDevices(cfg *cri.ContainerConfig) error {
	for i, d := range cfg.GetDevices() {
		field := fmt.Sprintf("config.devices[%d]", i)
		if d == nil {
			return fmt.Errorf("%s: missing: %w", field, errdefs.ErrInvalidArgument)
		}
		if err := checkAbsolute(field+".host_path", d.GetHostPath()); err != nil {
			return err
		}
		if p := d.GetContainerPath(); p != "" {
			if err := checkAbsolute(field+".container_path", p); err != nil {
				return err
			}
		}
		if _, err := DevicePermissions(d.GetPermissions()); err != nil {
			return fmt.Errorf("%s.permissions: %w", field, err)
		}
	}
	_, err := CDIDevices(cfg)
	return err
}

// identity is what both security contexts say about users and groups.
type identity struct {
	user, group  *cri.Int64Value
	name         string
	supplemental []int64
	policy       cri.SupplementalGroupsPolicy
}

func checkIdentity(field string, id identity) error {
	if id.user != nil && id.name != "" {
		return fmt.Errorf("%s: run_as_user and run_as_username are both set: %w", field, errdefs.ErrInvalidArgument)
	}
	if id.group != nil && id.user == nil && id.name == "" {
		return fmt.Errorf("%s.run_as_group: without run_as_user: %w", field, errdefs.ErrInvalidArgument)
	}
	if _, ok := cri.SupplementalGroupsPolicy_name[int32(id.policy)]; !ok {
		return fmt.Errorf("%s.supplemental_groups_policy: %d is unknown: %w", field, id.policy, errdefs.ErrInvalidArgument)
	}
	if v := id.user.GetValue(); v < 0 || v > maxID {
		return fmt.Errorf("%s.run_as_user: %d is not a number from 0 to %d: %w", field, v, maxID, errdefs.ErrInvalidArgument)
	}
	if v := id.group.GetValue(); v < 0 || v > maxID {
		return fmt.Errorf("%s.run_as_group: %d is not a number from 0 to %d: %w", field, v, maxID, errdefs.ErrInvalidArgument)
	}
	for i, v := range id.supplemental {
		if v < 0 || v > maxID {
			return fmt.Errorf("%s.supplemental_groups[%d]: %d is not a number from 0 to %d: %w", field, i, v, maxID, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
