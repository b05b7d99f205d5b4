package sandbox

import (
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"strings"
	"time"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/shim/process"
)

// Record is what is on disk of a sandbox. It is there before anything is made for
// it, and what there is to release follows from it.
type Record struct {
	ID string
	// NetNS is the network namespace, which others make; "" is the host's.
	NetNS string
	// UTS and IPC say that the sandbox has its own.
	UTS, IPC bool
	// HostPID says that containers see the host's processes, SharedPID that they
	// see each other's, for which a holder stays.
	HostPID, SharedPID bool
	// Users and Groups are the mappings of its user namespace, none for the host's.
	Users, Groups []specs.LinuxIDMapping `json:",omitempty"`

	Hostname     string
	Sysctls      map[string]string `json:",omitempty"`
	CgroupParent string
	Options      *options.Options
	// Files says that it has files for its containers; of them Resolv is resolv.conf,
	// "" for the host's.
	Files  bool   `json:",omitempty"`
	Resolv string `json:",omitempty"`

	CreatedAt time.Time
	// StartedAt is zero until all is made.
	StartedAt time.Time
	// Holder is the process that stays, 0 for none.
	Holder int
	Exit   *process.Exit `json:",omitempty"`
}

// holderDir is the bundle of the holder.
const holderDir = "holder"

// kinds are the namespaces that can be pinned, by which the files are named.
var kinds = []specs.LinuxNamespaceType{specs.UTSNamespace, specs.IPCNamespace, specs.UserNamespace}

// newRecord reads a request, with the options that the shim was started with.
func newRecord(r *api.CreateSandboxRequest, o *options.Options) (Record, error) {
	var config cri.PodSandboxConfig
	if err := r.GetOptions().UnmarshalTo(&config); err != nil {
		return Record{}, fmt.Errorf("read the pod's configuration: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	const pod, node = cri.NamespaceMode_POD, cri.NamespaceMode_NODE
	ns := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	rec := Record{
		ID: r.GetSandboxID(), UTS: ns.GetNetwork() == pod, IPC: ns.GetIpc() == pod,
		HostPID: ns.GetPid() == node, SharedPID: ns.GetPid() == pod,
		Sysctls: dotted(config.GetLinux().GetSysctls()), Resolv: resolvConf(config.GetDnsConfig()), CgroupParent: config.GetLinux().GetCgroupParent(),
		Options: o, CreatedAt: time.Now(),
	}
	if ns.GetNetwork() == pod {
		rec.NetNS, rec.Hostname = r.GetNetnsPath(), config.GetHostname()
		if rec.NetNS == "" {
			return rec, fmt.Errorf("netns_path: the pod is to have a network namespace and there is none: %w", errdefs.ErrInvalidArgument)
		}
	}
	if err := rec.ownUsers(ns.GetUsernsOptions()); err != nil {
		return rec, fmt.Errorf("userns_options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return rec, rec.checkSysctls()
}

func mappings(list []*cri.IDMapping) (out []specs.LinuxIDMapping) {
	for _, m := range list {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.GetContainerId(), HostID: m.GetHostId(), Size: m.GetLength()})
	}
	return out
}

// ownUsers has the sandbox have a user namespace if that is asked for.
func (r *Record) ownUsers(u *cri.UserNamespace) error {
	mapped := len(u.GetUids()) > 0 && len(u.GetGids()) > 0
	switch {
	case u == nil || u.GetMode() == cri.NamespaceMode_NODE && len(u.GetUids()) == 0 && len(u.GetGids()) == 0:
		return nil
	case u.GetMode() == cri.NamespaceMode_NODE:
		return errors.New("mappings without a user namespace")
	case u.GetMode() != cri.NamespaceMode_POD:
		return fmt.Errorf("no pod has mode %s", u.GetMode())
	case !mapped:
		return errors.New("no mappings")
	case r.HostPID || !r.IPC:
		return errors.New("the host's processes or IPC with a user namespace")
	}
	r.Users, r.Groups = mappings(u.GetUids()), mappings(u.GetGids())
	return nil
}

// dotted gives names of settings with dots that are written with slashes, as runc does: in
// such a name a dot is a part.
func dotted(sysctls map[string]string) map[string]string {
	swap := strings.NewReplacer(".", "/", "/", ".")
	out := make(map[string]string, len(sysctls))
	for name, value := range sysctls {
		if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '/' {
			name = swap.Replace(name)
		}
		out[name] = value
	}
	return out
}

// checkSysctls refuses what would be a setting of the host.
func (r Record) checkSysctls() error {
	for name := range r.Sysctls {
		own := false
		switch {
		case strings.ContainsRune(name, '/') || strings.Contains(name, ".."):
			return fmt.Errorf("sysctls[%q]: not a name with dots: %w", name, errdefs.ErrInvalidArgument)
		case strings.HasPrefix(name, "net."):
			own = r.NetNS != ""
		case ofIPC(name):
			own = r.IPC
		default:
			return fmt.Errorf("sysctls[%q]: no pod has this for itself: %w", name, errdefs.ErrInvalidArgument)
		}
		if !own {
			return fmt.Errorf("sysctls[%q]: the pod shares this namespace with the host: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func ofIPC(name string) bool {
	for _, prefix := range []string{"kernel.shm", "kernel.msg", "fs.mqueue."} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return name == "kernel.sem"
}

// has tells whether the sandbox has a namespace of a kind that is pinned here.
func (r Record) has(kind specs.LinuxNamespaceType) bool {
	switch kind {
	case specs.UTSNamespace:
		return r.UTS
	case specs.IPCNamespace:
		return r.IPC
	case specs.UserNamespace:
		return len(r.Users) > 0
	}
	return false
}

// path is where a container of the sandbox in dir joins a namespace, "" for the
// host's.
func (r Record) path(dir string, kind specs.LinuxNamespaceType) (string, error) {
	switch kind {
	case specs.NetworkNamespace:
		return r.NetNS, nil
	case specs.UTSNamespace, specs.IPCNamespace, specs.UserNamespace:
		if !r.has(kind) {
			return "", nil
		}
		return filepath.Join(dir, string(kind)), nil
	case specs.PIDNamespace:
		if r.HostPID {
			return "", nil
		}
		return "", fmt.Errorf("the containers of sandbox %s share no process namespace: %w", r.ID, errdefs.ErrFailedPrecondition)
	}
	return "", fmt.Errorf("a sandbox has no %s namespace: %w", kind, errdefs.ErrInvalidArgument)
}

// live says why no container can join, nil if it can.
func (r Record) live() error {
	if r.StartedAt.IsZero() || r.Exit != nil {
		return fmt.Errorf("sandbox %s does not run: %w", r.ID, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// byHolder tells whether a holder makes the namespaces: it alone can be in a user
// namespace, or stay.
func (r Record) byHolder() bool { return r.SharedPID || len(r.Users) > 0 }

// cgroupsPath is where the holder is, as the runtime's options have it written.
func (r Record) cgroupsPath() string {
	if r.Options.GetSystemdCgroup() {
		slice := path.Base(r.CgroupParent)
		if !strings.HasSuffix(slice, ".slice") {
			slice = "system.slice"
		}
		return slice + ":cri-containerd:" + holderID(r.ID)
	}
	parent := r.CgroupParent
	if parent == "" {
		parent = "k8s.io"
	}
	return path.Join("/", parent, holderID(r.ID))
}
