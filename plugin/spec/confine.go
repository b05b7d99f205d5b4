package spec

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// AppArmorProfile is the name of the default AppArmor profile, which the
// daemon loads when it starts. It is the name containerd uses: profiles of
// node software refer to it as a peer.
const AppArmorProfile = "cri-containerd.apparmor.d"

const (
	profileDefault    = "runtime/default"
	profileDocker     = "docker/default"
	profileUnconfined = "unconfined"
	profileLocalhost  = "localhost/"
)

// SecurityContext is what a container's and a sandbox's security context have
// in common as far as seccomp goes.
type SecurityContext interface {
	GetPrivileged() bool
	GetSeccomp() *cri.SecurityProfile
	GetSeccompProfilePath() string
}

// Profile is a seccomp or AppArmor profile as it was asked for.
type Profile struct {
	// Type is RuntimeDefault, Unconfined or Localhost.
	Type cri.SecurityProfile_ProfileType
	// Ref is the file or the profile name of a Localhost profile, and the file
	// that stands for the built-in profile of RuntimeDefault, if any.
	Ref string
}

var unconfined = Profile{Type: cri.SecurityProfile_Unconfined}

// Seccomp says which seccomp profile a security context asks for. Where Ref
// names a file, the caller reads it and passes its content on.
func Seccomp(sc SecurityContext, h Handler, p Policy) (Profile, error) {
	if sc.GetPrivileged() && p.PrivilegedSeccompProfile != "" {
		return Profile{Type: cri.SecurityProfile_Localhost, Ref: p.PrivilegedSeccompProfile}, nil
	}
	if sc.GetPrivileged() {
		return unconfined, nil
	}
	field, profile := "security_context.seccomp", sc.GetSeccomp()
	if profile == nil {
		field = "security_context.seccomp_profile_path"
		old := sc.GetSeccompProfilePath()
		if old == "" {
			field, old = "unset_seccomp_profile", p.UnsetSeccompProfile
		}
		if old == "" {
			return unconfined, nil
		}
		var err error
		if profile, err = oldProfile(field, old); err != nil {
			return Profile{}, err
		}
	}
	got, err := typedProfile(field, profile)
	if err != nil {
		return Profile{}, err
	}
	switch got.Type {
	case cri.SecurityProfile_Localhost:
		if err := checkAbsolute(field+".localhost_ref", got.Ref); err != nil {
			return Profile{}, err
		}
	case cri.SecurityProfile_RuntimeDefault:
		got.Ref = cmp.Or(h.SeccompProfile, p.SeccompProfile)
	}
	return got, nil
}

// oldProfile reads the string form that the CRI had before SecurityProfile.
func oldProfile(field, s string) (*cri.SecurityProfile, error) {
	switch {
	case s == profileDefault, s == profileDocker:
		return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}, nil
	case s == profileUnconfined:
		return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}, nil
	case strings.HasPrefix(s, profileLocalhost):
		return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: strings.TrimPrefix(s, profileLocalhost)}, nil
	}
	return nil, fmt.Errorf("%s: unknown profile %q: %w", field, s, errdefs.ErrInvalidArgument)
}

func typedProfile(field string, p *cri.SecurityProfile) (Profile, error) {
	// Some clients keep the prefix of the string form.
	ref := strings.TrimPrefix(p.GetLocalhostRef(), profileLocalhost)
	switch t := p.GetProfileType(); t {
	case cri.SecurityProfile_Localhost:
		if ref == "" || strings.IndexByte(ref, 0) >= 0 {
			return Profile{}, fmt.Errorf("%s.localhost_ref: %q is no profile: %w", field, ref, errdefs.ErrInvalidArgument)
		}
		return Profile{Type: t, Ref: ref}, nil
	case cri.SecurityProfile_RuntimeDefault, cri.SecurityProfile_Unconfined:
		if ref != "" {
			return Profile{}, fmt.Errorf("%s.localhost_ref: set for profile type %s: %w", field, t, errdefs.ErrInvalidArgument)
		}
		return Profile{Type: t}, nil
	default:
		return Profile{}, fmt.Errorf("%s.profile_type: %d is unknown: %w", field, t, errdefs.ErrInvalidArgument)
	}
}

// confine sets the seccomp and AppArmor profiles and the SELinux labels.
func confine(in *ContainerInput, s *specs.Spec) error {
	sc := in.security()
	want, err := Seccomp(sc, in.Handler, in.Policy)
	if err != nil {
		return err
	}
	// A base specification's own filter stands for a profile nobody named.
	unnamed := !in.privileged() && sc.GetSeccomp() == nil && sc.GetSeccompProfilePath() == "" && in.Policy.UnsetSeccompProfile == ""
	if !unnamed || s.Linux.Seccomp == nil {
		if s.Linux.Seccomp, err = seccompFilter(want, s.Process.Capabilities, in.SeccompProfile, in.Host); err != nil {
			return err
		}
	}
	s.Process.ApparmorProfile = ""
	if !in.privileged() {
		if s.Process.ApparmorProfile, err = appArmor(sc.GetApparmor(), sc.GetApparmorProfile(), in.Policy, in.Host); err != nil {
			return err
		}
	}
	s.Process.SelinuxLabel, s.Linux.MountLabel = in.Labels.Process, in.Labels.Mount
	if in.privileged() || sharesHost(in.Policy, podOptions(in.Pod), sc.GetNamespaceOptions()) && !SELinuxType(in.Pod, in.Config) {
		s.Process.SelinuxLabel = ""
	}
	return addNotifier(in, s.Linux)
}

// sharesHost reports whether a pod or a container is among the host's processes,
// where a label would keep it from what it is there for. Its files have their
// label all the same, as those of a privileged container have.
func sharesHost(p Policy, options ...*cri.NamespaceOption) bool {
	return slices.ContainsFunc(options, func(o *cri.NamespaceOption) bool {
		return o.GetPid() == cri.NamespaceMode_NODE || o.GetIpc() == cri.NamespaceMode_NODE ||
			p.HostNetworkDisableSELinux && o.GetNetwork() == cri.NamespaceMode_NODE
	})
}

// SELinuxType reports whether somebody chose the type of a container's
// processes. A sandbox has no container.
func SELinuxType(pod *cri.PodSandboxConfig, c *cri.ContainerConfig) bool {
	return pod.GetLinux().GetSecurityContext().GetSelinuxOptions().GetType() != "" ||
		c.GetLinux().GetSecurityContext().GetSelinuxOptions().GetType() != ""
}

// seccompFilter turns a profile into a filter, nil for none.
func seccompFilter(p Profile, caps *specs.LinuxCapabilities, content []byte, host facts.Host) (*specs.LinuxSeccomp, error) {
	if p.Type == cri.SecurityProfile_Unconfined {
		return nil, nil
	}
	if !host.Seccomp {
		return nil, fmt.Errorf("security_context.seccomp: the kernel has no seccomp filters: %w", errdefs.ErrFailedPrecondition)
	}
	if p.Ref != "" {
		return parseSeccomp(p.Ref, content, caps.Bounding, host.Kernel)
	}
	return defaultFilters.get(caps), nil
}

// appArmor returns the profile's name, "" for none.
func appArmor(typed *cri.SecurityProfile, old string, p Policy, host facts.Host) (string, error) {
	field := "security_context.apparmor"
	if typed == nil {
		field = "security_context.apparmor_profile"
		if old == "" {
			old = profileDefault
		}
		var err error
		if typed, err = oldProfile(field, old); err != nil {
			return "", err
		}
	}
	want, err := typedProfile(field, typed)
	if err != nil {
		return "", err
	}
	enabled := host.AppArmor && !p.DisableAppArmor
	switch {
	case want.Type == cri.SecurityProfile_Localhost && !enabled:
		return "", fmt.Errorf("%s: profile %q is asked for, but AppArmor is not enabled: %w", field, want.Ref, errdefs.ErrFailedPrecondition)
	case want.Type == cri.SecurityProfile_Localhost:
		if hasControl(want.Ref) {
			return "", fmt.Errorf("%s.localhost_ref: %q is no profile name: %w", field, want.Ref, errdefs.ErrInvalidArgument)
		}
		return want.Ref, nil
	case want.Type == cri.SecurityProfile_RuntimeDefault && enabled:
		return AppArmorProfile, nil
	}
	return "", nil
}

// containerPaths returns the masked and the read-only paths: none for a
// privileged container, else exactly what the CRI lists. An empty list is
// meant: it is how an unmasked /proc is asked for.
func containerPaths(in *ContainerInput, base *specs.Linux) (masked, readonly []string) {
	sc := in.security()
	switch {
	case in.privileged():
		return nil, nil
	case !in.Policy.DisableProcMount:
		return slices.Clone(sc.GetMaskedPaths()), slices.Clone(sc.GetReadonlyPaths())
	case in.Handler.BaseSpec != nil:
		return base.MaskedPaths, base.ReadonlyPaths
	}
	return DefaultMaskedPaths(in.Host.PossibleCPUs), DefaultReadonlyPaths()
}

// DefaultMaskedPaths are hidden where the CRI does not decide: kernel memory
// and keys, firmware, and what tells about the load of the whole machine, the
// power counters of GHSA-7ww5-4wqc-m92c among it.
func DefaultMaskedPaths(cpus []int) []string {
	paths := []string{
		"/proc/acpi",
		"/proc/asound",
		"/proc/interrupts",
		"/proc/kcore",
		"/proc/keys",
		"/proc/latency_stats",
		"/proc/sched_debug",
		"/proc/scsi",
		"/proc/timer_list",
		"/proc/timer_stats",
		"/sys/devices/virtual/powercap",
		"/sys/firmware",
	}
	for _, n := range cpus {
		paths = append(paths, path.Join("/sys/devices/system/cpu", fmt.Sprintf("cpu%d", n), "thermal_throttle"))
	}
	return paths
}

// DefaultReadonlyPaths may be read but not written where the CRI does not
// decide.
func DefaultReadonlyPaths() []string {
	return []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
}
