package spec

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/cgroupspath"
	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/record"
)

const (
	// pauseID is the user and group of a pause process nobody chose one for.
	pauseID = 65535
	// pauseOOMScore makes the sandbox the last to be killed in its pod.
	pauseOOMScore = -998
	pauseShares   = 2
)

// PauseInput is all that goes into the specification of a sandbox's pause
// process. Nothing in it is changed.
type PauseInput struct {
	ID     string
	Config *cri.PodSandboxConfig
	// Args is the pause program inside its root filesystem; anybody must be
	// able to execute it.
	Args []string
	// ImageName is what runtimes are told the sandbox was made from, "" for
	// nothing.
	ImageName string
	Handler   Handler
	Policy    Policy
	Host      facts.Host
	// NetNS is the pod's network namespace; unused with the host's.
	NetNS string
	// UserNS is the pod's own user namespace; unused without one.
	UserNS string
	// Files gives /dev/shm and resolv.conf, which runtimes with a kernel of
	// their own look for here.
	Files Files
	// SeccompProfile is the content of the file that Seccomp names.
	SeccompProfile []byte
	// Labels are the pod's SELinux labels, zero for none.
	Labels record.Labels
}

// Pause returns the specification of a sandbox's pause process. It holds the
// pod's namespaces and may do nothing else: it has no capabilities.
func Pause(in PauseInput) (*specs.Spec, error) {
	s, err := pause(&in)
	if err != nil {
		return nil, fmt.Errorf("generate sandbox specification: %w", err)
	}
	return s, nil
}

func pause(in *PauseInput) (*specs.Spec, error) {
	if err := ValidatePod(in.Config); err != nil {
		return nil, err
	}
	s, err := baseSpec(in.Handler)
	if err != nil {
		return nil, err
	}
	if s.Process, err = pauseProcess(in, s.Process); err != nil {
		return nil, err
	}
	s.Root = &specs.Root{Path: rootfsDir, Readonly: true}
	s.Hostname, s.Domainname = "", ""
	if podOptions(in.Config).GetNetwork() == cri.NamespaceMode_POD {
		s.Hostname = in.Config.GetHostname()
	}
	s.Annotations = pauseAnnotations(in, s.Annotations)
	if s.Linux, err = pauseLinux(in, s); err != nil {
		return nil, err
	}
	s.Mounts = pauseMounts(in)
	return s, nil
}

func pauseProcess(in *PauseInput, base *specs.Process) (*specs.Process, error) {
	if len(in.Args) == 0 {
		return nil, fmt.Errorf("no pause program: %w", errdefs.ErrInternal)
	}
	sc := in.Config.GetLinux().GetSecurityContext()
	p := *base
	p.Args, p.Cwd, p.Terminal, p.ConsoleSize = slices.Clone(in.Args), "/", false, nil
	p.Env = []string{defaultPath}
	p.User = pauseUser(in.Config)
	if sc.GetRunAsUser() != nil {
		p.User = specs.User{UID: uint32(sc.GetRunAsUser().GetValue())}
	}
	if sc.GetRunAsGroup() != nil {
		p.User.GID = uint32(sc.GetRunAsGroup().GetValue())
	}
	p.User.AdditionalGids = []uint32{p.User.GID}
	for _, g := range sc.GetSupplementalGroups() {
		if !slices.Contains(p.User.AdditionalGids, uint32(g)) {
			p.User.AdditionalGids = append(p.User.AdditionalGids, uint32(g))
		}
	}
	id := facts.User{UID: p.User.UID, GID: p.User.GID, AdditionalGIDs: p.User.AdditionalGids}
	if err := checkMapped(id, podUserns(in.Config)); err != nil {
		return nil, err
	}
	p.Capabilities = capabilitySet(nil, nil, nil)
	p.NoNewPrivileges = true
	p.SelinuxLabel = in.Labels.Process
	if sc.GetPrivileged() || sharesHost(in.Policy, podOptions(in.Config)) && !SELinuxType(in.Config, nil) {
		p.SelinuxLabel = ""
	}
	adj, err := OOMScoreAdj(pauseOOMScore, in.Host, in.Policy)
	if err != nil {
		return nil, err
	}
	p.OOMScoreAdj = &adj
	p.ApparmorProfile = ""
	if !sc.GetPrivileged() {
		p.ApparmorProfile, err = appArmor(sc.GetApparmor(), "", in.Policy, in.Host)
	}
	return &p, err
}

// pauseUser is the identity nobody chose: the last one in a user namespace that
// is too small for the usual one.
func pauseUser(pod *cri.PodSandboxConfig) specs.User {
	id := specs.User{UID: pauseID, GID: pauseID}
	if u := podUserns(pod); u != nil {
		id.UID = min(id.UID, u.GetUids()[0].GetLength()-1)
		id.GID = min(id.GID, u.GetGids()[0].GetLength()-1)
	}
	return id
}

func pauseLinux(in *PauseInput, s *specs.Spec) (*specs.Linux, error) {
	l, err := s.Linux, error(nil)
	if l.Namespaces, err = pauseNamespaces(in, l.Namespaces); err != nil {
		return nil, err
	}
	l.UIDMappings, l.GIDMappings = usernsMappings(in.Config)
	if l.Sysctl, err = Sysctls(in.Config, in.Policy, in.Host); err != nil {
		return nil, err
	}
	l.CgroupsPath = cgroupspath.Of(in.Config.GetLinux().GetCgroupParent(), in.ID, in.Handler.SystemdCgroup)
	l.Devices = nil
	l.Resources = &specs.LinuxResources{
		Devices: defaultDeviceRules(),
		CPU:     &specs.LinuxCPU{Shares: new(uint64(pauseShares))},
	}
	l.MaskedPaths, l.ReadonlyPaths = DefaultMaskedPaths(in.Host.PossibleCPUs), DefaultReadonlyPaths()
	l.MountLabel, l.RootfsPropagation = in.Labels.Mount, ""
	want, err := Seccomp(in.Config.GetLinux().GetSecurityContext(), in.Handler, in.Policy)
	if err != nil {
		return nil, err
	}
	l.Seccomp, err = seccompFilter(want, s.Process.Capabilities, in.SeccompProfile, in.Host)
	return l, err
}

func pauseNamespaces(in *PauseInput, base []specs.LinuxNamespace) ([]specs.LinuxNamespace, error) {
	o := podOptions(in.Config)
	list := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	if podUserns(in.Config) != nil {
		if in.UserNS == "" {
			return nil, fmt.Errorf("the pod has no user namespace to join: %w", errdefs.ErrFailedPrecondition)
		}
		list = append(list, specs.LinuxNamespace{Type: specs.UserNamespace, Path: in.UserNS})
	}
	if o.GetNetwork() == cri.NamespaceMode_POD {
		if in.NetNS == "" {
			return nil, fmt.Errorf("the pod has no network namespace to join: %w", errdefs.ErrFailedPrecondition)
		}
		list = append(list, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: in.NetNS}, specs.LinuxNamespace{Type: specs.UTSNamespace})
	}
	if o.GetIpc() == cri.NamespaceMode_POD {
		list = append(list, specs.LinuxNamespace{Type: specs.IPCNamespace})
	}
	if o.GetPid() != cri.NamespaceMode_NODE {
		list = append(list, specs.LinuxNamespace{Type: specs.PIDNamespace})
	}
	if in.Host.Cgroup.V2() {
		list = append(list, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return append(list, kept(base)...), nil
}

// pauseMounts mount sysfs writable in a privileged pod: a network namespace has
// one sysfs, which is read-only for good when its first mount is.
func pauseMounts(in *PauseInput) []specs.Mount {
	list := kernelMounts()
	if in.Config.GetLinux().GetSecurityContext().GetPrivileged() {
		list = sysWritable(list)
	}
	list = usernsMounts(list, in.Config, in.Handler.RecursiveReadOnly)
	for _, f := range []struct{ source, destination string }{
		{in.Files.Shm, shmDir},
		{in.Files.ResolvConf, "/etc/resolv.conf"},
	} {
		if f.source != "" {
			list = append(list, specs.Mount{
				Destination: f.destination, Type: "bind", Source: f.source,
				Options: []string{"rbind", "ro", "nosuid", "nodev", "noexec"},
			})
		}
	}
	return ordered(list)
}

// Hostname is the name a pod's processes see: its own, or the node's where it
// has none or shares the host's UTS namespace.
func Hostname(pod *cri.PodSandboxConfig, host facts.Host) string {
	if h := pod.GetHostname(); h != "" && podOptions(pod).GetNetwork() != cri.NamespaceMode_NODE {
		return h
	}
	return host.Hostname
}

// ResolvConf returns the content of a pod's resolv.conf. own is false when the
// configuration leaves it to the host's file.
func ResolvConf(dns *cri.DNSConfig) (content []byte, own bool, err error) {
	if dns == nil {
		return nil, false, nil
	}
	if err := checkDNS(dns); err != nil {
		return nil, false, fmt.Errorf("generate resolv.conf: %w", err)
	}
	var b strings.Builder
	if s := dns.GetSearches(); len(s) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(s, " "))
	}
	for _, s := range dns.GetServers() {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if o := dns.GetOptions(); len(o) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(o, " "))
	}
	return []byte(b.String()), true, nil
}
