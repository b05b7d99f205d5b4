// Package record holds the values gantry keeps about pods and containers: what
// is written to containerd's metadata and what the in-memory index serves.
//
// A value is never changed once it has been handed to a store; to change one,
// copy it, change the copy and store that. The CRI configuration is carried as
// the kubelet gave it and is not re-modelled. Start reading at Sandbox, then
// phase.go for the moves between phases.
package record

import (
	"fmt"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Sandbox is a pod sandbox.
type Sandbox struct {
	// ID names the sandbox and everything made for it: netns, directories,
	// cgroup, CNI container ID. 64 hexadecimal digits.
	ID string
	// Config is the request's configuration. Never nil; read only.
	Config  *cri.PodSandboxConfig
	Handler Handler
	Phase   Phase
	// CreatedAt is when the intent was recorded, the CRI "created_at".
	CreatedAt time.Time
	// Network is what Attach returned, until then the path of the namespace
	// alone; zero for host network.
	Network Network
	// Instance is what runs the sandbox; zero until it was started.
	Instance Instance
	// Reason says, for a NotReady sandbox that was not simply stopped, why it
	// is one: the failed stage of a start whose release could not finish, or
	// how the sandbox process died.
	Reason string
	// Resources and Overhead are the pod-level sums of the last
	// UpdatePodSandboxResources; Config's until the first.
	Resources, Overhead *cri.LinuxContainerResources
	// Labels are the pod's, zero where SELinux is off.
	Labels Labels
}

// Labels are the SELinux labels of a pod's or a container's process and of its
// files.
type Labels struct{ Process, Mount string }

// Key identifies a pod attempt; it is what the kubelet repeats in a retry.
type Key struct {
	Namespace, Name, UID string
	Attempt              uint32
}

// Key returns the sandbox's identity.
func (s Sandbox) Key() Key { return KeyOf(s.Config.GetMetadata()) }

// KeyOf returns the identity in m.
func KeyOf(m *cri.PodSandboxMetadata) Key {
	return Key{Namespace: m.GetNamespace(), Name: m.GetName(), UID: m.GetUid(), Attempt: m.GetAttempt()}
}

// HostNetwork reports whether the pod uses the node's network namespace.
func (s Sandbox) HostNetwork() bool {
	return s.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork() == cri.NamespaceMode_NODE
}

// UserNS is the user namespace of the pod's own, nil for the node's. It maps
// one range of users and one of groups, which both begin with root.
func (s Sandbox) UserNS() *cri.UserNamespace {
	u := s.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	if u == nil || u.GetMode() != cri.NamespaceMode_POD {
		return nil
	}
	return u
}

// HostID is the user and group on the node that are uid and gid in the pod.
func (s Sandbox) HostID(uid, gid uint32) (hostUID, hostGID uint32) {
	u := s.UserNS()
	if u == nil {
		return uid, gid
	}
	return u.GetUids()[0].GetHostId() + uid, u.GetGids()[0].GetHostId() + gid
}

// Sandboxers: the ways a sandbox can be run.
const (
	// SandboxerPod runs a pause process as an ordinary task.
	SandboxerPod = "podsandbox"
	// SandboxerShim leaves the sandbox to the runtime's own Sandbox API.
	SandboxerShim = "shim"
)

// Handler is a runtime handler as it was resolved for one pod. It is stored so
// that a pod can be taken down after its handler left the configuration.
type Handler struct {
	// Name is the configured name; never empty, the default handler's when
	// the request named none.
	Name string
	// Runtime is what containerd calls the runtime: runtime_path if one is
	// configured, else runtime_type.
	Runtime string
	// Options are the runtime's options as a typeurl.Any pair; empty for none.
	OptionsType string
	Options     []byte
	Sandboxer   string
	Snapshotter string
}

// Network is a pod's attachment as CNI reported it.
type Network struct {
	// NetNS is the path of the pod's network namespace, known before it
	// exists; "" for host network.
	NetNS string
	// IPs are the pod's addresses, the primary one first.
	IPs []string
	// Result is the CNI result of the default network as JSON.
	Result []byte
}

// Instance is the running sandbox.
type Instance struct {
	// Pid is the sandbox process, 0 if it has none.
	Pid uint32
	// Address and Version are the task API endpoint for the pod's
	// containers, "" where the runtime is found by other means.
	Address string
	Version uint32
	// StartedAt is when it began to run.
	StartedAt time.Time
	// Spec is the OCI specification of the pause process as JSON, nil if
	// there is none.
	Spec []byte
}

// Container is a CRI container.
type Container struct {
	// ID names the container, its task and its snapshot.
	ID        string
	SandboxID string
	// Config is the request's configuration. Never nil; read only.
	Config *cri.ContainerConfig
	// Handler is the pod's.
	Handler Handler
	Image   Image
	// Spec is the OCI specification, JSON; nil while Creating.
	Spec  []byte
	Phase ContainerPhase
	// CreatedAt is set with the intent, StartedAt when the process was
	// released, FinishedAt when it exited. Zero until then.
	CreatedAt, StartedAt, FinishedAt time.Time
	// Pid of the container's first process while Running.
	Pid uint32
	// ExitCode, Reason and Message describe the exit, once Exited.
	ExitCode        int32
	Reason, Message string
	// LogPath is the absolute path of the log file, "" for no log.
	LogPath string
	// StopSignal is the signal of a graceful stop, as "SIGTERM".
	StopSignal string
	// Rescored says that an update has changed the OOM score of the container
	// while it ran, of which its runtime does not know.
	Rescored bool
	// Denied names system calls that the container's seccomp filter has denied,
	// where it tells of them, in the order of the first of each. Condemned says
	// that the container is to end for them.
	Denied    []string
	Condemned bool
	// Resources are the limits in force; Config's until the first update.
	Resources *cri.LinuxContainerResources
	// User is the identity of the first process.
	User *cri.ContainerUser
	// Mounts are the mounts in force, host paths resolved.
	Mounts []*cri.Mount
}

// VolumeKey names the snapshot of the image that is mounted by Config's mount
// with that index.
func (c Container) VolumeKey(i int) string { return fmt.Sprintf("%s-volume-%d", c.ID, i) }

// VolumeKeys are the keys of all mounts that are images, made or not.
func (c Container) VolumeKeys() (keys []string) {
	for i, m := range c.Config.GetMounts() {
		if m.GetImage() != nil {
			keys = append(keys, c.VolumeKey(i))
		}
	}
	return keys
}

// Image is what a container was made from.
type Image struct {
	// ID is the digest of the image's configuration, the CRI image ID.
	ID string
	// Ref is "repository@digest", or ID when the image has no digest.
	Ref string
	// Name is a reference readable by people: the tag, else Ref.
	Name string
}

// ContainerKey identifies a container attempt within its pod.
type ContainerKey struct {
	SandboxID, Name string
	Attempt         uint32
}

// Key returns the container's identity.
func (c Container) Key() ContainerKey {
	return ContainerKey{SandboxID: c.SandboxID, Name: c.Config.GetMetadata().GetName(), Attempt: c.Config.GetMetadata().GetAttempt()}
}

// Exit is how a process ended.
type Exit struct {
	// Code is the exit status, 128+n after signal n.
	Code uint32
	At   time.Time
}

// Reasons of an exit, in the kubelet's words.
const (
	ReasonCompleted  = "Completed"
	ReasonError      = "Error"
	ReasonOOMKilled  = "OOMKilled"
	ReasonStartError = "StartError"
	// ReasonSeccompKilled marks a process that made a system call for which
	// its filter, or who hears of what it denies, ends it. The word is CRI-O's.
	ReasonSeccompKilled = "seccomp killed"
	// ReasonUnknown marks an exit whose status nobody could tell.
	ReasonUnknown = "ContainerStatusUnknown"
)
