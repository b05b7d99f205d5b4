// Package network owns the pods' networks: a named network namespace per pod,
// its attachments made by CNI plugins, and the ports of the node that lead to it
// where no plugin makes them (package hostport).
//
// What it relies on is on disk or in the kernel, never in memory alone: the
// namespace is pinned under a name computed from the pod's ID, and what ADD is
// about to be asked is saved before the first plugin runs, so that Detach can
// ask for the same to be undone after a crash, without the configuration, or
// with another one. It keeps no lock while a plugin runs: a plugin that hangs
// holds up its own pod only, and is killed with all its children when its time
// is over. It does not know containers, images or the CRI service, and decides
// no policy: how often a failed Detach is repeated is the caller's business.
//
// Start reading at Networks, then attach.go and detach.go; netns.go has the
// namespaces, exec.go how plugins are run, watch.go what readiness means.
package network

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/gantry-cri/gantry/plugin/network/hostport"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// IPPref says which of a pod's addresses is the primary one.
type IPPref string

const (
	// PreferIPv4 takes the first IPv4 address.
	PreferIPv4 IPPref = "ipv4"
	// PreferIPv6 takes the first IPv6 address.
	PreferIPv6 IPPref = "ipv6"
	// PreferCNI keeps the order in which the plugins report.
	PreferCNI IPPref = "cni"
)

// HostPorts says who makes the node's ports lead to pods.
type HostPorts string

const (
	// HostPortsAuto leaves it to a plugin of the pod's networks that has the
	// capability for it, and does it here where there is none.
	HostPortsAuto HostPorts = "auto"
	// HostPortsCNI leaves it to the plugins, whether one can or not.
	HostPortsCNI HostPorts = "cni"
	// HostPortsNative does it here and asks no plugin to.
	HostPortsNative HostPorts = "native"
	// HostPortsNFTables and HostPortsIPTables are HostPortsNative with one of its
	// engines, whatever the kernel has.
	HostPortsNFTables HostPorts = "nftables"
	HostPortsIPTables HostPorts = "iptables"
	// HostPortsOff neither does it nor asks a plugin to.
	HostPortsOff HostPorts = "off"
)

// Config is what New needs. Directories are absolute; a zero time stands for
// the default named beside it.
type Config struct {
	// NetNSDir is where network namespaces are pinned: /var/run/netns, or a
	// directory under the state directory.
	NetNSDir string
	// ConfDir holds the network configurations; it need not exist.
	ConfDir string
	// BinDirs are searched in order for plugins.
	BinDirs []string
	// MaxConfNum is how many configurations of ConfDir a pod is attached to,
	// taken in the order of their file names; 0 is all of them.
	MaxConfNum int
	// DefaultNetwork names the network that gives the pod its addresses;
	// empty is the first file's.
	DefaultNetwork string
	// SetupSerially makes a pod's networks one after the other.
	SetupSerially bool
	// IPPref orders a pod's addresses; empty is PreferIPv4.
	IPPref IPPref
	// HostPorts is who maps ports of the node; empty is HostPortsAuto.
	HostPorts HostPorts
	// CacheDir is where attachments and results are kept. It should survive a
	// reboot as the plugins' own address books do: what it forgets cannot be
	// given back when the configuration changed meanwhile. It also tells the
	// namespaces of one daemon from those of another in the same NetNSDir.
	CacheDir string
	// ConfTemplate is the file that UpdatePodCIDR renders into ConfDir; empty
	// for none.
	ConfTemplate string

	// AddTimeout and DelTimeout bound what one pod may take (2 min, 50 s),
	// StatusTimeout one round of STATUS (10 s).
	AddTimeout, DelTimeout, StatusTimeout time.Duration
	// StatusInterval is the pause between two rounds of STATUS while the
	// network is ready (10 s); while it is not, the pause is at most 1 s.
	StatusInterval time.Duration
	// StatusGrace is how long a ready network stays ready although STATUS
	// fails, for plugins that are being upgraded (none).
	StatusGrace time.Duration
	// ReadyTimeout is how long Await waits for a network that is not ready
	// (not at all).
	ReadyTimeout time.Duration
}

const (
	// retryInterval is the pause between two looks at a network that is not
	// ready, and between two looks at the configuration directory in case an
	// event was missed.
	retryInterval = time.Second
	// sweepWorkers bounds how many leftovers GC releases at a time.
	sweepWorkers = 4
)

// Networks makes, checks and undoes pod networks. It is safe for concurrent
// use; what is asked of one pod happens one after the other.
type Networks struct {
	conf   Config
	prefix string // of this daemon's names in NetNSDir
	cni    *libcni.CNIConfig
	saved  savedDir
	gate   gate
	ready  atomic.Pointer[verdict]
	kick   chan struct{} // asks Run to look at the configuration now

	orphans orphans

	ports  *hostport.Table
	claims hostport.Claims
}

// Attachment names a pod and what its network is made from. Detach needs the
// ID only; it uses the rest if nothing was saved for the pod.
type Attachment struct {
	// ID is the sandbox ID and the plugins' container ID.
	ID string
	// Pod is the request's configuration; read only.
	Pod *cri.PodSandboxConfig
	// ConfDir and MaxConfNum are the handler's own; an empty ConfDir stands
	// for the Config's ConfDir and MaxConfNum.
	ConfDir    string
	MaxConfNum int
	// CgroupParent is the pod's cgroup as plugins shall see it; empty is the
	// one of Pod.
	CgroupParent string
}

// Validate reports what in the pod's configuration no network could be made
// from; Attach refuses it too.
func (a Attachment) Validate() error {
	if err := checkID(a.ID); err != nil {
		return err
	}
	if _, err := arguments(a.ID, a.Pod.GetMetadata()); err != nil {
		return err
	}
	_, err := capabilities(a)
	return err
}

// New checks the configuration, makes the cache directory, looks for plugins
// that a daemon which died left running, and reads the network configuration
// once.
func New(c Config) (*Networks, error) {
	if err := c.complete(); err != nil {
		return nil, fmt.Errorf("configure network: %w", err)
	}
	saved := savedDir(AttachmentsDir(c.CacheDir))
	if err := os.MkdirAll(string(saved), 0o700); err != nil {
		return nil, fmt.Errorf("configure network: make cache: %w", err)
	}
	orphans, err := findOrphans(c.CacheDir)
	if err != nil {
		return nil, fmt.Errorf("configure network: find plugins of an earlier run: %w", err)
	}
	runner := &runner{owner: c.CacheDir}
	n := &Networks{
		conf:   c,
		prefix: NetNSPrefix(c.CacheDir),
		cni:    libcni.NewCNIConfigWithCacheDir(c.BinDirs, c.CacheDir, runner),
		saved:  saved,
		kick:   make(chan struct{}, 1),
		// They are ended by who needs their pods.
		orphans: orphans,
		ports:   hostport.New(hostPortOptions(c)),
	}
	if err := n.recallClaims(); err != nil {
		return nil, fmt.Errorf("configure network: %w", err)
	}
	n.ready.Store(n.look(nil))
	return n, nil
}

// complete fills in the defaults and reports what cannot be used.
func (c *Config) complete() error {
	for _, d := range []struct{ name, path string }{
		{"netns directory", c.NetNSDir}, {"conf directory", c.ConfDir}, {"cache directory", c.CacheDir},
	} {
		if !filepath.IsAbs(d.path) {
			return fmt.Errorf("%s %q is not absolute: %w", d.name, d.path, errdefs.ErrInvalidArgument)
		}
	}
	c.CacheDir = filepath.Clean(c.CacheDir)
	if len(c.BinDirs) == 0 {
		return fmt.Errorf("no plugin directory: %w", errdefs.ErrInvalidArgument)
	}
	switch c.IPPref {
	case "":
		c.IPPref = PreferIPv4
	case PreferIPv4, PreferIPv6, PreferCNI:
	default:
		return fmt.Errorf("ip preference %q is none of ipv4, ipv6, cni: %w", c.IPPref, errdefs.ErrInvalidArgument)
	}
	switch c.HostPorts {
	case "":
		c.HostPorts = HostPortsAuto
	case HostPortsAuto, HostPortsCNI, HostPortsNative, HostPortsNFTables, HostPortsIPTables, HostPortsOff:
	default:
		return fmt.Errorf("host ports %q is none of auto, cni, native, nftables, iptables, off: %w", c.HostPorts, errdefs.ErrInvalidArgument)
	}
	if c.MaxConfNum < 0 {
		return fmt.Errorf("max conf num %d is negative: %w", c.MaxConfNum, errdefs.ErrInvalidArgument)
	}
	for _, d := range []struct {
		value *time.Duration
		def   time.Duration
	}{
		{&c.AddTimeout, 2 * time.Minute},
		// Below the minute that undo gives a release, so that the error
		// names the plugin and not just the step.
		{&c.DelTimeout, 50 * time.Second},
		{&c.StatusTimeout, 10 * time.Second},
		{&c.StatusInterval, 10 * time.Second},
	} {
		if *d.value <= 0 {
			*d.value = d.def
		}
	}
	return nil
}

// Check asks the plugins whether the pod's attachments are as ADD left them.
// Networks whose specification version has no CHECK are taken as sound.
func (n *Networks) Check(ctx context.Context, id string) error {
	if err := n.check(ctx, id); err != nil {
		return fmt.Errorf("check network: %w", err)
	}
	return nil
}

func (n *Networks) check(ctx context.Context, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	ctx, cancel := within(ctx, n.conf.DelTimeout)
	defer cancel()
	leave, err := n.enter(ctx, id)
	if err != nil {
		return err
	}
	defer leave()
	s, err := n.recall(id)
	if err != nil {
		return err
	}
	if s == nil {
		return fmt.Errorf("sandbox %s has no attachment: %w", id, errdefs.ErrNotFound)
	}
	if !pinned(s.NetNS) {
		return fmt.Errorf("network namespace %s is gone: %w", s.NetNS, errdefs.ErrNotFound)
	}
	for _, a := range s.Networks {
		if err := n.checkOne(ctx, s, a); err != nil {
			return err
		}
	}
	return nil
}

func (n *Networks) checkOne(ctx context.Context, s *saved, a savedNetwork) error {
	list, err := a.list()
	if err != nil {
		return err
	}
	if !since(list, "0.4.0") {
		return nil
	}
	return pluginCause(n.cni.CheckNetworkList(ctx, list, s.runtimeConf(a, s.NetNS)))
}

// enter waits until nothing else is done for the pod, by an earlier daemon's
// plugins neither, and returns the function that lets it go.
func (n *Networks) enter(ctx context.Context, id string) (func(), error) {
	leave, err := n.gate.enter(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := n.orphans.end(id); err != nil {
		leave()
		return nil, err
	}
	return leave, nil
}

// checkID refuses what could not be a file name and a plugin's container ID.
func checkID(id string) error {
	if err := utils.ValidateContainerID(id); err != nil {
		return fmt.Errorf("sandbox ID %q: %w: %w", id, err, errdefs.ErrInvalidArgument)
	}
	if len(id) > maxIDLength {
		return fmt.Errorf("sandbox ID of %d characters, more than %d: %w", len(id), maxIDLength, errdefs.ErrInvalidArgument)
	}
	return nil
}

// within is context.WithTimeout with a cause that tells the time.
func within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, d, fmt.Errorf("no end within %s: %w", d, context.DeadlineExceeded))
}
