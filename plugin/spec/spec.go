// Package spec makes OCI runtime specifications out of what the CRI asks, what
// the image says and what the host can do.
//
// It is pure: no function here reads a file, looks at the machine or keeps
// state that can be seen from outside, and the same input gives the same
// output. Host paths, device nodes and users arrive resolved (packages host
// and rootfs, as values of package facts). What cannot be honoured is an
// error, never left out: InvalidArgument for input that is wrong,
// NotImplemented for what gantry does not do, FailedPrecondition for what this
// host cannot do, each naming the field. Start at Container; Pause is the same
// for the process that holds a sandbox, ValidatePod and ValidateContainer are
// the checks to run before any effect.
package spec

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/cgroupspath"
	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/record"
)

// rootfsDir is the root filesystem's place in every bundle.
const rootfsDir = "rootfs"

// Handler is what a specification has to know about a runtime handler.
type Handler struct {
	Name string
	// PodAnnotations and ContainerAnnotations are patterns, in the syntax of
	// path.Match, of the annotations that reach the runtime.
	PodAnnotations, ContainerAnnotations []string
	// AllowedAnnotations are names of the pod's that have an effect here.
	AllowedAnnotations []string
	// Workloads are the node's.
	Workloads []config.Workload
	// DefaultAnnotations reach the runtime unless the request has others that
	// may.
	DefaultAnnotations map[string]string
	// PrivilegedWithoutHostDevices keeps the host's devices away from
	// privileged containers; ...AllDevicesAllowed then still lets their device
	// cgroup allow everything.
	PrivilegedWithoutHostDevices                  bool
	PrivilegedWithoutHostDevicesAllDevicesAllowed bool
	// BaseSpec is the configured starting point, nil for ours. Read only.
	BaseSpec *specs.Spec
	// CgroupWritable mounts cgroups writable in unprivileged containers.
	CgroupWritable bool
	// SeccompProfile is the file with this handler's default profile, "" for
	// that of Policy.
	SeccompProfile string
	// RecursiveReadOnly says that the runtime knows recursive read-only mounts.
	RecursiveReadOnly bool
	// IDMapMounts says that the runtime knows mounts that show other owners.
	IDMapMounts bool
	// SeccompNotify says that the runtime knows filters that tell of calls.
	SeccompNotify bool
	// OCIVersion is the newest specification the runtime accepts, "" if it
	// does not say.
	OCIVersion string
	// SystemdCgroup says that the runtime puts cgroups in systemd's hands.
	SystemdCgroup bool
	// HostCgroups says that the runtime makes a container's cgroup in every hierarchy
	// of the host, as runc does.
	HostCgroups bool
}

// Policy is the part of the daemon's configuration that shapes specifications.
type Policy struct {
	// DisableProcMount ignores the CRI's masked and read-only paths and keeps
	// the default ones.
	DisableProcMount bool
	// UnsetSeccompProfile is used where the CRI names no profile:
	// "runtime/default", "localhost/<path>", "unconfined" or "".
	UnsetSeccompProfile string
	// RestrictOOMScoreAdj keeps scores at or above the daemon's own.
	RestrictOOMScoreAdj bool
	// TolerateMissingHugetlb drops huge page limits where the controller is
	// missing instead of refusing them; DisableHugetlb drops them always.
	TolerateMissingHugetlb, DisableHugetlb bool
	// UnprivilegedPorts and UnprivilegedICMP let pods with a network of their
	// own bind low ports and send pings without privilege.
	UnprivilegedPorts, UnprivilegedICMP bool
	// DefaultSysctls are set in each pod that has their namespace for itself
	// and does not set them. See config.Sysctl.
	DefaultSysctls  map[string]string
	DisableAppArmor bool
	// HostNetworkDisableSELinux leaves the processes of pods with the host's
	// network without an SELinux label.
	HostNetworkDisableSELinux bool
	// IgnoreImageVolumes makes nothing of the volumes that an image declares.
	IgnoreImageVolumes bool
	// DeviceOwnership gives devices to run_as_user and run_as_group.
	DeviceOwnership bool
	// SeccompProfile is the file with the node's default profile, "" for the
	// built-in one.
	SeccompProfile string
	// PrivilegedSeccompProfile is the file of privileged containers, "" for
	// none.
	PrivilegedSeccompProfile string
	// ReadOnly makes the root filesystems of unprivileged containers read-only,
	// with room to write in memory.
	ReadOnly bool
	// AllowedDevices are paths of those that pods may ask for by annotation.
	AllowedDevices []string
	// MinMappableUID and MinMappableGID are the lowest IDs of the host in user
	// namespaces of pods that do not run as root.
	MinMappableUID, MinMappableGID int64
	// Userns is that of pods which have none of their own and are not the
	// node's, nil for none. Read only.
	Userns *cri.UserNamespace
	// MinGOMAXPROCS is 0 where it is not to be set.
	MinGOMAXPROCS int64
	Defaults      Defaults
}

// Defaults are what the node gives to every container unless something nearer
// to it says otherwise: a handler's base specification, the image or the pod.
type Defaults struct {
	// Capabilities are names such as "CAP_CHOWN".
	Capabilities []string
	// Inheritable makes all capabilities that a container has inheritable.
	Inheritable bool
	// Env holds NAME=value.
	Env     []string
	Rlimits []specs.POSIXRlimit
	// PidsLimit bounds a container's processes and threads, 0 for none.
	PidsLimit int64
	// MinMemory is the least memory limit, in bytes, that is not refused.
	MinMemory int64
}

// Namespaces are the paths of a pod's namespaces that containers join. A path
// that the options call for but which is empty is an error.
type Namespaces struct {
	// Net is unused with the host's network; UTS goes with it.
	Net, UTS string
	// IPC is unused with the host's IPC.
	IPC string
	// PID is the pod's process namespace, for containers that share it.
	PID string
	// Target is that of the container a TARGET namespace names.
	Target string
	// User is the pod's own user namespace, unused without one.
	User string
}

// ProcNamespace is the path of a process's namespace; kind is "net", "uts",
// "ipc" or "pid".
func ProcNamespace(pid uint32, kind string) string {
	return fmt.Sprintf("/proc/%d/ns/%s", pid, kind)
}

// Files are a pod's files on the host that its containers see. An empty path
// mounts nothing.
type Files struct {
	Hosts, Hostname, ResolvConf string
	// Passwd, Group and Env are one container's own.
	Passwd, Group, Env string
	// Timezone is the node's file of a time zone.
	Timezone string
	// Shm is the directory that becomes /dev/shm: the pod's tmpfs, or the
	// host's /dev/shm with host IPC.
	Shm string
}

// ContainerInput is all that goes into a container's specification. Nothing in
// it is changed.
type ContainerInput struct {
	ID, SandboxID string
	Pod           *cri.PodSandboxConfig
	Config        *cri.ContainerConfig
	ImageConfig   imagespec.ImageConfig
	// ImageName is the reference to show to people and policies.
	ImageName string
	Handler   Handler
	Policy    Policy
	Host      facts.Host

	Namespaces Namespaces
	Files      Files
	// User is the resolved identity.
	User facts.User
	// Mounts are Config's mounts resolved, in the same order.
	Mounts []facts.Mount
	// Volumes are mounts nobody asked for by name (image VOLUMEs); a mount in
	// Mounts with the same destination replaces them.
	Volumes []facts.Mount
	// NodeMounts are the node's for every container.
	NodeMounts []facts.Mount
	// Logs are mounts of the pod's logs in its volumes.
	Logs []facts.Mount
	// Devices are the node's for every container, those of the pod's annotation
	// and Config's, resolved.
	Devices []facts.Device
	// HostDevices are all of the host's, for a privileged container.
	HostDevices []facts.Device
	// SeccompProfile is the content of the file that Seccomp names.
	SeccompProfile []byte
	// NotifierSocket is where filters tell of the calls that they deny.
	NotifierSocket string
	// Labels are the container's SELinux labels, zero for none.
	Labels record.Labels
	// Systemd says that the first process is systemd.
	Systemd bool
	// Hooks are those of the hooks directories, in their order.
	Hooks []Hook
}

func (in *ContainerInput) security() *cri.LinuxContainerSecurityContext {
	return in.Config.GetLinux().GetSecurityContext()
}

func (in *ContainerInput) privileged() bool { return in.security().GetPrivileged() }

// readonly reports whether the root filesystem is.
func (in *ContainerInput) readonly() bool {
	return in.security().GetReadonlyRootfs() || in.keptReadonly()
}

// keptReadonly reports whether it is because the node wants all to be.
func (in *ContainerInput) keptReadonly() bool { return in.Policy.ReadOnly && !in.privileged() }

// Container returns the specification of a container.
func Container(in ContainerInput) (*specs.Spec, error) {
	if in.Systemd {
		in.ImageConfig = systemdImage(in.ImageConfig)
	}
	s, err := container(&in)
	if err != nil {
		return nil, fmt.Errorf("generate container specification: %w", err)
	}
	return s, nil
}

func container(in *ContainerInput) (*specs.Spec, error) {
	if err := ValidateContainer(in.Config, in.Pod); err != nil {
		return nil, err
	}
	if err := checkPrivileged(in); err != nil {
		return nil, err
	}
	if err := checkMapped(in.User, podUserns(in.Pod)); err != nil {
		return nil, err
	}
	s, err := baseSpec(in.Handler)
	if err != nil {
		return nil, err
	}
	process, err := containerProcess(in, s.Process)
	if err != nil {
		return nil, err
	}
	s.Process = process
	s.Root = &specs.Root{Path: rootfsDir, Readonly: in.readonly()}
	// The host name belongs to the pod's UTS namespace, made before.
	s.Hostname, s.Domainname = "", ""
	s.Annotations = containerAnnotations(in, s.Annotations)
	if s.Linux, err = containerLinux(in, s.Linux); err != nil {
		return nil, err
	}
	if err := confine(in, s); err != nil {
		return nil, err
	}
	s.Mounts, s.Linux.RootfsPropagation, err = containerMounts(in, s.Mounts)
	if err != nil {
		return nil, err
	}
	addHooks(in, s)
	return s, nil
}

// containerLinux fills all of the Linux section but confinement and mounts.
func containerLinux(in *ContainerInput, l *specs.Linux) (*specs.Linux, error) {
	var err error
	if l.Namespaces, err = containerNamespaces(in, l.Namespaces); err != nil {
		return nil, err
	}
	l.UIDMappings, l.GIDMappings = usernsMappings(in.Pod)
	// Sysctls are set once, in the pod's namespaces.
	l.Sysctl = nil
	l.CgroupsPath = cgroupspath.Of(in.Pod.GetLinux().GetCgroupParent(), in.ID, in.Handler.SystemdCgroup)
	if l.Resources, err = Resources(in.Config.GetLinux().GetResources(), l.Resources, in.Host.Cgroup, in.Policy); err != nil {
		return nil, err
	}
	workload, err := workloadResources(in)
	if err != nil {
		return nil, err
	}
	if l.Resources, err = Resources(workload, l.Resources, in.Host.Cgroup, in.Policy); err != nil {
		return nil, fmt.Errorf("workload: %w", err)
	}
	if n := in.Policy.Defaults.PidsLimit; n > 0 && l.Resources.Pids == nil {
		l.Resources.Pids = &specs.LinuxPids{Limit: new(n)}
	}
	l.Devices, l.Resources.Devices, err = containerDevices(in, l.Devices, l.Resources.Devices)
	if err != nil {
		return nil, err
	}
	l.MaskedPaths, l.ReadonlyPaths = containerPaths(in, l)
	return l, nil
}

func checkPrivileged(in *ContainerInput) error {
	if in.privileged() && !in.Pod.GetLinux().GetSecurityContext().GetPrivileged() {
		return fmt.Errorf("config.linux.security_context.privileged: the pod sandbox was not made for privileged containers: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// oldVersion is what a specification calls itself for a runtime that does not
// say what it accepts. Such a runtime is from before one could be asked, and
// may refuse what is newer; which keys it is given does not depend on it.
const oldVersion = "1.0.2"

// baseSpec returns a specification to fill in: a copy of the handler's own, or
// an empty one. Process, Linux and Linux.Resources are never nil in it.
func baseSpec(h Handler) (*specs.Spec, error) {
	s := &specs.Spec{}
	if h.BaseSpec != nil {
		if err := deepCopy(s, h.BaseSpec); err != nil {
			return nil, fmt.Errorf("copy base_runtime_spec: %w", err)
		}
	}
	s.Version = h.OCIVersion
	if s.Version == "" {
		s.Version = oldVersion
	}
	if s.Process == nil {
		s.Process = &specs.Process{}
	}
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	if s.Linux.Resources == nil {
		s.Linux.Resources = &specs.LinuxResources{}
	}
	return s, nil
}

// deepCopy copies a value of the specification, which is JSON by definition.
func deepCopy(dst, src any) error {
	b, err := json.Marshal(src)
	if err != nil {
		return fmt.Errorf("%w (%w)", err, errdefs.ErrInternal)
	}
	if err := json.Unmarshal(b, dst); err != nil {
		return fmt.Errorf("%w (%w)", err, errdefs.ErrInternal)
	}
	return nil
}
