// Package plugin registers gantry's plugins with containerd, under the IDs of
// the CRI service that containerd is built with otherwise, and wires them. It
// has no logic of its own: services.go builds what the plugins are made of,
// adapt.go puts mechanisms behind the interfaces that the lifecycle packages
// declare.
//
// The tables of the "images", "runtime" and "nri" plugins are parsed by their
// plugins, so that an error names the table; everything is built by the "cri"
// plugin, which containerd starts after them.
package plugin

import (
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/plugins"
	_ "github.com/containerd/containerd/v2/plugins/gc" // before init, which changes its default
	"github.com/containerd/containerd/v2/plugins/services/warning"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/rpc"
	"github.com/gantry-cri/gantry/plugin/runtime/pool"
)

// Namespace is the containerd namespace of everything Kubernetes.
const Namespace = "k8s.io"

func init() {
	// containerd's task runtime is linked with package pool, so it can only be
	// missing from a build that nobody could run a pod with.
	if err := pool.Install(Namespace); err != nil {
		panic(err)
	}
	if err := collectLessOften(); err != nil {
		panic(err)
	}
	requires := []plugin.Type{plugins.WarningPlugin}
	registry.Register(&plugin.Registration{
		Type: plugins.CRIServicePlugin, ID: "images",
		Config: config.DefaultImages(), ConfigMigration: config.Migrate, Requires: requires,
		InitFn: func(ic *plugin.InitContext) (any, error) {
			cfg, warnings, err := config.ParseImages(*ic.Config.(*config.Raw))
			if err != nil {
				return nil, err
			}
			return parsed[config.Images]{cfg, warnings}, warn(ic, warnings)
		},
	})
	registry.Register(&plugin.Registration{
		Type: plugins.CRIServicePlugin, ID: "runtime",
		Config: config.DefaultRuntime(), ConfigMigration: config.Migrate, Requires: requires,
		InitFn: func(ic *plugin.InitContext) (any, error) {
			cfg, warnings, err := config.ParseRuntime(*ic.Config.(*config.Raw))
			if err != nil {
				return nil, err
			}
			return parsed[config.Runtime]{cfg, warnings}, warn(ic, warnings)
		},
	})
	registry.Register(&plugin.Registration{
		Type: plugins.NRIApiPlugin, ID: "nri", Config: config.DefaultNRI(), Requires: requires,
		InitFn: func(ic *plugin.InitContext) (any, error) {
			cfg, warnings, err := config.ParseNRI(*ic.Config.(*config.Raw))
			if err != nil {
				return nil, err
			}
			return parsed[config.NRI]{cfg, warnings}, warn(ic, warnings)
		},
	})
	registry.Register(&plugin.Registration{
		Type: plugins.GRPCPlugin, ID: "cri",
		Config: config.DefaultServer(), ConfigMigration: config.Migrate,
		Requires: []plugin.Type{
			plugins.CRIServicePlugin, plugins.ContentPlugin, plugins.DiffPlugin, plugins.EventPlugin, plugins.GCPlugin,
			plugins.LeasePlugin, plugins.MetadataPlugin, plugins.NRIApiPlugin, plugins.RuntimePluginV2, plugins.SandboxControllerPlugin,
			plugins.SandboxStorePlugin, plugins.ServicePlugin, plugins.SnapshotPlugin, plugins.WarningPlugin,
		},
		InitFn: initServer,
	})
}

// collectLessOften changes a default of containerd's garbage collector: how much
// of the time it may keep the metadata locked. With its own default of 2 % it
// collects four times a second while pods come and go, and a third of all disk
// syncs of a pod's life are its own. A value in the configuration file counts.
func collectLessOften() error {
	var err error
	registry.Graph(func(r *plugin.Registration) bool {
		if r.Type == plugins.GCPlugin && r.ID == "scheduler" {
			err = toml.Unmarshal([]byte("pause_threshold = 0.005"), r.Config)
		}
		return false
	})
	if err != nil {
		return fmt.Errorf("set the garbage collector's default: %w", err)
	}
	return nil
}

// parsed is a table that was checked, with what its owner should know.
type parsed[T any] struct {
	cfg      T
	warnings []config.Warning
}

// warn logs the warnings, and tells containerd of those that are its own
// deprecations, for "ctr deprecations list".
func warn(ic *plugin.InitContext, warnings []config.Warning) error {
	for _, w := range warnings {
		log.G(ic.Context).WithField("key", w.Key).Warn(w.Text)
		if w.Deprecation == "" {
			continue
		}
		known, err := ic.GetSingle(plugins.WarningPlugin)
		if err != nil {
			return fmt.Errorf("get warning service: %w", err)
		}
		known.(warning.Service).Emit(ic.Context, w.Deprecation)
	}
	return nil
}

func table[T any](ic *plugin.InitContext, kind plugin.Type, id string) (parsed[T], error) {
	p, err := ic.GetByID(kind, id)
	if err != nil {
		return parsed[T]{}, fmt.Errorf("get configuration of plugin %q: %w", id, err)
	}
	return p.(parsed[T]), nil
}

// nriTable is the table of a plugin that can be switched off as a whole, with
// containerd's disabled_plugins.
func nriTable(ic *plugin.InitContext) (parsed[config.NRI], error) {
	if ic.Plugins().Get(plugins.NRIApiPlugin, "nri") == nil {
		return parsed[config.NRI]{cfg: config.NRI{Disable: true}}, nil
	}
	return table[config.NRI](ic, plugins.NRIApiPlugin, "nri")
}

func initServer(ic *plugin.InitContext) (any, error) {
	server, warnings, err := config.ParseServer(*ic.Config.(*config.Raw))
	if err != nil {
		return nil, err
	}
	if err := warn(ic, warnings); err != nil {
		return nil, err
	}
	images, err := table[config.Images](ic, plugins.CRIServicePlugin, "images")
	if err != nil {
		return nil, err
	}
	runtime, err := table[config.Runtime](ic, plugins.CRIServicePlugin, "runtime")
	if err != nil {
		return nil, err
	}
	nri, err := nriTable(ic)
	if err != nil {
		return nil, err
	}
	s, err := newServices(ic, settings{
		server: server, images: images.cfg, runtime: runtime.cfg, nri: nri.cfg,
		warnings: append(append(images.warnings, runtime.warnings...), warnings...),
	})
	if err != nil {
		return nil, err
	}
	ready := ic.RegisterReadiness()
	if err := s.start(ic.Context); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	ready()
	if server.DisableTCPService {
		return &service{s}, nil
	}
	return &tcpService{service{s}}, nil
}

// service is the plugin's value: containerd registers it with its gRPC server
// and closes it when it shuts down.
type service struct{ *services }

// Register puts the CRI on containerd's socket.
func (s *service) Register(server *grpc.Server) error {
	r := rpc.Registrar(server, s.rpc)
	cri.RegisterRuntimeServiceServer(r, s.cri)
	cri.RegisterImageServiceServer(r, s.cri)
	return nil
}

// tcpService serves the CRI on containerd's TCP address too.
type tcpService struct{ service }

// RegisterTCP puts the CRI on containerd's TCP address.
func (s *tcpService) RegisterTCP(server *grpc.Server) error { return s.Register(server) }
