// Package facts holds the plain values that the mechanisms pass to each other
// through the lifecycle packages: what the machine is like, a resolved mount,
// a resolved device, a resolved user.
//
// It never reads anything and decides nothing: package host fills Host, Mount
// and Device, package rootfs fills User, package spec turns all of them into
// an OCI specification. Start at Host.
package facts

import (
	"slices"

	"github.com/opencontainers/go-digest"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Host is what was found out about the machine when the daemon started. It is
// never changed afterwards.
type Host struct {
	Hostname string
	// Kernel is the version as major and minor number.
	Kernel Kernel
	// PageSize and MemoryTotal are in bytes.
	PageSize    int
	MemoryTotal uint64
	// PossibleCPUs are the numbers of the CPUs that exist or may be plugged in.
	PossibleCPUs []int
	Cgroup       Cgroup

	// Seccomp, AppArmor and SELinux say what the kernel enforces.
	Seccomp, AppArmor, SELinux bool
	// UserNS is true when the daemon itself runs in a user namespace.
	UserNS bool
	// UserNamespaces says that the kernel lets new ones be made.
	UserNamespaces bool
	// Capabilities is the daemon's bounding set, in kernel order, as
	// "CAP_CHOWN". No container can get more.
	Capabilities []string
	// OOMScoreAdj is the daemon's own. Unless LowerOOMScore, no process below
	// it can have a lower one.
	OOMScoreAdj   int
	LowerOOMScore bool

	// UnprivilegedPorts and UnprivilegedICMP say that the network sysctls
	// which allow low ports and ping without privilege exist.
	UnprivilegedPorts, UnprivilegedICMP bool
	// HugepageSizes are the sizes the kernel has, as "2MB", smallest first.
	HugepageSizes []string
}

// Kernel is a kernel version.
type Kernel struct{ Major, Minor int }

// AtLeast reports whether k is the given version or a later one.
func (k Kernel) AtLeast(major, minor int) bool {
	return k.Major > major || k.Major == major && k.Minor >= minor
}

// CgroupMode is how the cgroup hierarchies are laid out.
type CgroupMode string

const (
	// CgroupV1: only version 1 hierarchies.
	CgroupV1 CgroupMode = "v1"
	// CgroupHybrid: version 1 hierarchies that hold the controllers, and a
	// version 2 tree beside them.
	CgroupHybrid CgroupMode = "hybrid"
	// CgroupV2: the version 2 tree alone.
	CgroupV2 CgroupMode = "v2"
)

// Cgroup describes the cgroup hierarchies.
type Cgroup struct {
	Mode CgroupMode
	// Controllers maps each controller that a runtime can use in this mode to
	// the mount point of its hierarchy. A controller of the version 2 tree
	// does not count in hybrid mode: runtimes do not look there.
	Controllers map[string]string
	// Self maps each controller, and "" for the version 2 tree, to the path of
	// the daemon's own cgroup below the mount point.
	Self map[string]string
	// Unified is the mount point of the version 2 tree, "" if there is none.
	Unified string
	// UnifiedOptions are the options of that mount which a further mount of
	// the same tree would reset: nsdelegate and the like.
	UnifiedOptions []string
	// Systemd is the mount point of the hierarchy of version 1 that systemd keeps
	// its groups in, which has no controller; "" if there is none.
	Systemd string
	// SwapAccounting says that swap of a cgroup can be limited.
	SwapAccounting bool
}

// V2 reports whether the version 2 tree is the only one.
func (c Cgroup) V2() bool { return c.Mode == CgroupV2 }

// Has reports whether a runtime can use the controller.
func (c Cgroup) Has(controller string) bool {
	_, ok := c.Controllers[controller]
	return ok
}

// HasCapability reports whether the daemon could give the capability away.
func (h Host) HasCapability(name string) bool { return slices.Contains(h.Capabilities, name) }

// Mount is a bind mount whose source was resolved on the host.
type Mount struct {
	// Source is an absolute path without symbolic links.
	Source string
	// Destination is the absolute path in the container.
	Destination string
	Readonly    bool
	// RecursiveReadonly makes the mounts below the source read-only too.
	RecursiveReadonly bool
	Propagation       cri.MountPropagation
	// UIDMappings and GIDMappings are how the mount shows owners, both or none.
	UIDMappings, GIDMappings []*cri.IDMapping
	// Options are further options of the mount: "noexec", "nodev", "nosuid".
	Options []string
}

// File is a file whose content is in the content store.
type File struct {
	// Name is a clean path below some directory: it is relative and has no "..".
	Name   string
	Digest digest.Digest
	Size   int64
}

// Device is a device node found on the host.
type Device struct {
	// Path is where the container sees it, HostPath where it was found.
	Path, HostPath string
	// Type is "c" or "b".
	Type         string
	Major, Minor int64
	// Mode holds the permission bits.
	Mode     uint32
	UID, GID uint32
	// Permissions are those of the device cgroup, some of "rwm".
	Permissions string
}

// User is the identity of a container's first process.
type User struct {
	UID, GID uint32
	// AdditionalGIDs starts with GID; the rest is sorted, without duplicates.
	AdditionalGIDs []uint32
	// Name is the login name, "" if the image has none for UID.
	Name string
	// Home is the home directory, "/" if the image tells none.
	Home string
}

// Update is what a container's resources are to become.
type Update struct {
	// Resources that are zero stay as they are.
	Resources *cri.LinuxContainerResources
	// Annotations are options of this one update for plugins and the runtime.
	Annotations map[string]string
}
