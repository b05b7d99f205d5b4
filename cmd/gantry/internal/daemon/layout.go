// Package daemon knows where a daemon keeps its things and asks it what it is
// doing, over the sockets it serves anyway: the CRI for pods and containers,
// the operations socket for what is under way.
//
// It only asks and reads; it starts nothing and changes nothing. Of the daemon it
// imports the values that are sent, and the names of what is kept from who keeps
// it. Start at Layout.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/sirupsen/logrus"

	gantry "github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/network"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/stdio/keeper"
)

// Where everything is unless a configuration says otherwise.
const (
	DefaultConfig  = "/etc/containerd/config.toml"
	DefaultRoot    = "/var/lib/containerd"
	DefaultState   = "/run/containerd"
	DefaultAddress = "/run/containerd/containerd.sock"

	// Namespace is containerd's, for everything the CRI makes.
	Namespace = "k8s.io"
	grpcTable = "io.containerd.server.v1.grpc"
)

// Layout is where a daemon keeps its things.
type Layout struct {
	// Root and State are containerd's directories, Address its socket.
	Root, State, Address string
	// NetNSDir is where network namespaces of pods are pinned.
	NetNSDir string
	// Networks are where CNI configurations are. The first is the default one.
	Networks []NetworkDir
	// BinDirs are searched for CNI plugins.
	BinDirs []string
	// Runtimes are the OCI runtimes that handlers run, as names to look up on
	// PATH or as paths.
	Runtimes []string
	// Shims are the programs that run them, in the same form. DefaultShim is that
	// of the default handler, "" if it runs something else.
	Shims       []string
	DefaultShim string
}

// NetworkDir is a directory of CNI configurations.
type NetworkDir struct {
	Path string
	// Max is how many networks of it a pod gets, 0 for all.
	Max int
	// Default names the first of them; "" for the order of file names.
	Default string
}

// Load reads a daemon's configuration, its imports included. A file that does
// not exist gives the defaults, as it does for the daemon.
func Load(path string) (Layout, error) {
	cfg := &config.Config{Version: version.ConfigVersion}
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	ctx := log.WithLogger(context.Background(), quiet.WithContext(context.Background()))
	ours := func() iter.Seq[plugin.Registration] {
		return slices.Values([]plugin.Registration{{ConfigMigration: gantry.Migrate}})
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		if err := config.LoadConfigWithPlugins(ctx, path, ours, cfg); err != nil {
			return Layout{}, fmt.Errorf("load configuration: %w", err)
		}
	}
	l := Layout{Root: cfg.Root, State: cfg.State}
	if grpc, ok := cfg.Plugins[grpcTable].(map[string]any); ok {
		l.Address, _ = grpc["address"].(string)
	}
	raw, _ := cfg.Plugins[gantry.RuntimePlugin].(map[string]any)
	rt, _, err := gantry.ParseRuntime(raw)
	if err != nil {
		return Layout{}, fmt.Errorf("read configuration %s (gantry config check tells more): %w", path, err)
	}
	l.complete()
	l.runtime(rt)
	return l, nil
}

// At is the layout with other directories and another socket; what is empty
// stays.
func (l Layout) At(root, state, address string) Layout {
	pinnedBelow := l.NetNSDir == l.stateNetNS()
	for _, f := range []struct{ value, other *string }{{&l.Root, &root}, {&l.State, &state}, {&l.Address, &address}} {
		if *f.other != "" {
			*f.value = *f.other
		}
	}
	if pinnedBelow {
		l.NetNSDir = l.stateNetNS()
	}
	return l
}

func (l Layout) stateNetNS() string { return network.StateNetNSDir(l.PluginState()) }

func (l *Layout) complete() {
	for _, f := range []struct {
		value *string
		def   string
	}{{&l.Root, DefaultRoot}, {&l.State, DefaultState}, {&l.Address, DefaultAddress}} {
		if *f.value == "" {
			*f.value = f.def
		}
	}
}

func (l *Layout) runtime(rt gantry.Runtime) {
	l.BinDirs = rt.CNI.BinDirs
	l.Networks = []NetworkDir{{rt.CNI.ConfDir, rt.CNI.MaxConfNum, rt.CNI.DefaultNetwork}}
	l.NetNSDir = network.NetNSDirOf(rt.NamespacesDir, rt.NetNSMountsUnderStateDir, l.PluginState())
	for _, name := range slices.Sorted(maps.Keys(rt.Handlers)) {
		h := rt.Handlers[name]
		dir := NetworkDir{Path: h.CNIConfDir, Max: h.CNIMaxConfNum}
		if dir.Path == rt.CNI.ConfDir {
			dir.Default = rt.CNI.DefaultNetwork
		}
		if dir.Path != "" && !slices.Contains(l.Networks, dir) {
			l.Networks = append(l.Networks, dir)
		}
		if !h.IsRunc() {
			continue // such a shim finds its runtime itself
		}
		program := h.RuntimePath
		if program == "" {
			program = shim.BinaryName(h.RuntimeType)
		}
		if !h.Implied && !slices.Contains(l.Shims, program) {
			l.Shims = append(l.Shims, program)
		}
		if name == rt.DefaultHandler {
			l.DefaultShim = program
		}
		binary, _ := h.Options["BinaryName"].(string)
		if binary == "" {
			binary = "runc"
		}
		if !slices.Contains(l.Runtimes, binary) {
			l.Runtimes = append(l.Runtimes, binary)
		}
	}
}

// PluginState is the CRI service's directory of what a reboot ends.
func (l Layout) PluginState() string { return filepath.Join(l.State, gantry.ServerPlugin) }

// OpsSocket is where the daemon tells what is under way.
func (l Layout) OpsSocket() string { return filepath.Join(l.PluginState(), operation.Socket) }

// KeeperSocket is where the keeper of container output listens.
func (l Layout) KeeperSocket() string { return filepath.Join(l.PluginState(), keeper.Socket) }

// Tasks is where containerd keeps the bundles of shims.
func (l Layout) Tasks() string {
	return filepath.Join(l.State, plugins.RuntimePluginV2.String()+".task")
}

// Bundle is a pattern, in the syntax of filepath.Match, of where the bundle of
// a pod or container can be below Tasks: gantry's task runtime has a directory
// for every life of the daemon.
func (l Layout) Bundle(id string) string {
	return filepath.Join(l.Tasks(), ".gantry", "*", Namespace, id)
}

// Attachments is where what CNI plugins were asked for is kept, a file per pod.
func (l Layout) Attachments() string { return network.AttachmentsDir(l.networkCache()) }

func (l Layout) networkCache() string {
	return network.CacheDir(filepath.Join(l.Root, gantry.ServerPlugin))
}

// NetNSPrefix opens the names of this daemon's network namespaces; the ID of
// the pod follows. Another daemon on the machine has another prefix.
func (l Layout) NetNSPrefix() string { return network.NetNSPrefix(l.networkCache()) }
