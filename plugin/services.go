package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/metadata"
	crt "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/prometheus/client_golang/prometheus"
	criapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/cdi"
	"github.com/gantry-cri/gantry/plugin/container"
	"github.com/gantry-cri/gantry/plugin/cri"
	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/handler"
	"github.com/gantry-cri/gantry/plugin/host"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/network"
	"github.com/gantry-cri/gantry/plugin/nri"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/podfiles"
	"github.com/gantry-cri/gantry/plugin/rpc"
	"github.com/gantry-cri/gantry/plugin/runtime"
	gsandbox "github.com/gantry-cri/gantry/plugin/sandbox"
	"github.com/gantry-cri/gantry/plugin/sandboxer"
	"github.com/gantry-cri/gantry/plugin/snapshot"
	"github.com/gantry-cri/gantry/plugin/spec"
	"github.com/gantry-cri/gantry/plugin/stats"
	"github.com/gantry-cri/gantry/plugin/store"
	"github.com/gantry-cri/gantry/plugin/stream"
)

// netnsDir is where network namespaces are pinned unless the configuration puts
// them below the state directory. Tools look for them there.
const netnsDir = "/var/run/netns"

// OpsSocket is the name of the operations socket in the plugin's state
// directory.
const OpsSocket = "gantry.sock"

// settings are the tables.
type settings struct {
	server   config.Server
	images   config.Images
	runtime  config.Runtime
	nri      config.NRI
	warnings []config.Warning
}

// services is everything that was built.
type services struct {
	cri        *cri.Server
	rpc        rpc.Options
	sandboxes  *gsandbox.Service
	containers *container.Service
	networks   *network.Networks
	handlers   *handler.Handlers
	plugins    *nri.Plugins
	streaming  *stream.Server
	background *lifecycle.Group
	ops        *operation.Table
	store      *store.Store
	opsPath    string
}

// node is what containerd and the machine offer.
type node struct {
	ic       *plugin.InitContext
	client   *containerd.Client
	db       *metadata.DB
	tasks    crt.PlatformRuntime
	facts    facts.Host
	stateDir string
	rootDir  string
}

func newNode(ic *plugin.InitContext) (n node, err error) {
	n = node{ic: ic, stateDir: ic.Properties[plugins.PropertyStateDir], rootDir: ic.Properties[plugins.PropertyRootDir]}
	for _, dir := range []string{n.stateDir, n.rootDir} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return n, fmt.Errorf("create directory: %w", err)
		}
		// Nobody but root lists it; a pod in a user namespace goes through.
		if err := os.Chmod(dir, 0o711); err != nil {
			return n, fmt.Errorf("set mode of directory: %w", err)
		}
	}
	if n.facts, err = host.Probe(); err != nil {
		return n, err
	}
	if n.client, err = containerd.New("", containerd.WithDefaultNamespace(Namespace), containerd.WithInMemoryServices(ic)); err != nil {
		return n, fmt.Errorf("connect to containerd: %w", err)
	}
	db, err := ic.GetSingle(plugins.MetadataPlugin)
	if err != nil {
		return n, fmt.Errorf("get metadata database: %w", err)
	}
	n.db = db.(*metadata.DB)
	tasks, err := ic.GetByID(plugins.RuntimePluginV2, "task")
	if err != nil {
		return n, fmt.Errorf("get task runtime: %w", err)
	}
	n.tasks = tasks.(crt.PlatformRuntime)
	return n, nil
}

// snapshotRoot is the directory a snapshotter keeps its data in.
func (n node) snapshotRoot(name string) string {
	if p := n.ic.Plugins().Get(plugins.SnapshotPlugin, name); p != nil && p.Meta.Exports["root"] != "" {
		return p.Meta.Exports["root"]
	}
	return filepath.Join(filepath.Dir(n.rootDir), plugins.SnapshotPlugin.String()+"."+name)
}

func newServices(ic *plugin.InitContext, cfg settings) (*services, error) {
	n, err := newNode(ic)
	if err != nil {
		return nil, err
	}
	ctx := namespaces.WithNamespace(ic.Context, Namespace)
	s := &services{
		background: lifecycle.New(ctx), ops: &operation.Table{}, opsPath: filepath.Join(n.stateDir, OpsSocket),
	}
	if err := s.build(ctx, n, cfg); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *services) build(ctx context.Context, n node, cfg settings) error {
	var damaged []store.Damaged
	var err error
	if s.store, damaged, err = store.Open(ctx, store.NewMetadata(n.db, Namespace)); err != nil {
		return err
	}
	for _, d := range damaged {
		log.G(ctx).WithError(d.Err).WithField(d.Kind, d.ID).Error("record cannot be read; it is left alone, remove it with ctr")
	}
	introspector, ok := n.tasks.(handler.Introspector)
	if !ok {
		return fmt.Errorf("task runtime %T does not tell about runtimes", n.tasks)
	}
	if s.handlers, err = handler.New(cfg.runtime, handler.NewProber(introspector)); err != nil {
		return err
	}
	images, err := newImages(ctx, n, s.handlers, cfg, s.background)
	if err != nil {
		return err
	}
	snaps := snapshot.New(func(name string) (snapshots.Snapshotter, bool) {
		sn := n.db.Snapshotter(name)
		return sn, sn != nil
	}, n.snapshotRoot)
	measure := stats.New(n.facts, snaps, cfg.images.StatsCollectPeriod)
	files, err := podfiles.New(filepath.Join(n.stateDir, "sandboxes"), podfiles.Text{
		Hostname:   func(c *criapi.PodSandboxConfig) string { return spec.Hostname(c, n.facts) },
		ResolvConf: spec.ResolvConf,
	})
	if err != nil {
		return err
	}
	nets, err := newNetworks(n, s.handlers, cfg.runtime)
	if err != nil {
		return err
	}
	s.networks = nets.Networks
	gen := &generator{
		handlers: s.handlers, containers: s.store.Containers, files: files, devices: cdi.New(cfg.runtime.CDISpecDirs), hooksDirs: cfg.runtime.HooksDirs,
		host: n.facts, policy: policyOf(cfg.runtime),
	}
	hierarchies, err := runtime.NewHierarchies()
	if err != nil {
		return err
	}
	rt := runtime.New(n.tasks, hierarchies)
	inst, err := newInstances(n, rt, gen)
	if err != nil {
		return err
	}
	if s.plugins, err = newPlugins(cfg.nri, s.store, gen, s.background); err != nil {
		return err
	}
	s.containers = container.New(container.Deps{
		Store: s.store.Containers, Sandboxes: s.store.Sandboxes, Images: imageSource{images}, Snapshots: snaps,
		Specs: gen, Tasks: tasks{rt}, Streams: newStreams(n.stateDir, cfg.runtime), Cgroups: measure,
		Plugins: s.plugins, Ops: s.ops, Background: s.background,
	})
	s.sandboxes = gsandbox.New(gsandbox.Deps{
		Store: s.store.Sandboxes, Handlers: s.handlers, Files: files, Network: nets, Instances: inst,
		Containers: s.containers, Plugins: s.plugins, Ops: s.ops, Background: s.background,
	})
	if s.streaming, err = newStreaming(cfg.server, s.containers, s.sandboxes, s.ops); err != nil {
		return err
	}
	s.cri = cri.New(cri.Deps{
		Sandboxes: s.sandboxes, Containers: s.containers, Images: images, Streaming: s.streaming, Network: nets,
		Handlers: s.handlers, Validate: validate{}, Stats: measure, Version: semver(version.Version),
		Warnings: shownWarnings(cfg), Info: func() map[string]any { return map[string]any{"config": cfg.runtime} },
	})
	if !cfg.runtime.DisableAppArmor {
		if err := host.LoadAppArmor(n.facts, spec.AppArmorProfile); err != nil {
			return err
		}
	}
	metrics := rpc.NewMetrics(s.ops)
	for _, c := range append(s.plugins.Metrics(), metrics) {
		if err := prometheus.Register(c); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	s.rpc = rpc.Options{Namespace: Namespace, Ops: s.ops, Object: cri.Object, Observe: metrics.Observe}
	return nil
}

// start begins what goes on in the background: the operations socket first, as
// it is what tells when something of the rest hangs.
func (s *services) start() error {
	s.background.Go("serve operations", s.serveOps)
	s.background.Go("watch network", s.networks.Run)
	s.background.Go("serve streams", func(ctx context.Context) {
		if err := s.streaming.Serve(ctx); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Error("streaming server ended: exec, attach and port-forward do not work")
		}
	})
	s.background.Go("probe runtime handlers", func(ctx context.Context) {
		if err := s.handlers.Probe(ctx); err != nil {
			log.G(ctx).WithError(err).Debug("probe runtime handlers")
		}
	})
	// Before anything is served: a plugin that is to see every container must
	// not miss the first ones.
	if err := s.plugins.Start(s.containers); err != nil {
		return err
	}
	begin := time.Now()
	pods, containers := s.sandboxes.Recover(), s.containers.Recover()
	s.background.Go("release network leftovers", func(ctx context.Context) {
		for _, looked := range []<-chan struct{}{pods, containers} {
			select {
			case <-looked:
			case <-ctx.Done():
				return
			}
		}
		log.G(ctx).WithField("took", time.Since(begin)).Info("every pod and container has been looked at")
		if err := s.networks.GC(ctx, s.livePods); err != nil {
			log.G(ctx).WithError(err).Warn("release network leftovers")
		}
	})
	return nil
}

// livePods are the pods whose network is not to be touched: all there are.
func (s *services) livePods(context.Context) ([]string, error) {
	var ids []string
	for _, sb := range s.store.Sandboxes.List() {
		ids = append(ids, sb.ID)
	}
	return ids, nil
}

// serveOps serves the operations table on a socket of its own, which needs
// neither containerd's gRPC server nor a lock of any service.
func (s *services) serveOps(ctx context.Context) {
	if err := os.Remove(s.opsPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		log.G(ctx).WithError(err).Error("serve operations")
		return
	}
	l, err := net.Listen("unix", s.opsPath)
	if err != nil {
		log.G(ctx).WithError(err).Error("serve operations")
		return
	}
	if err := os.Chmod(s.opsPath, 0o600); err != nil {
		log.G(ctx).WithError(err).Error("serve operations")
	}
	server := &http.Server{Handler: s.ops.Handler(), ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(l); err != nil && ctx.Err() == nil {
		log.G(ctx).WithError(err).Error("serve operations")
	}
}

// closeTimeout is how long a shutdown waits for what goes on. Whatever is cut
// off, the next start finishes.
const closeTimeout = 5 * time.Second

// Close ends what goes on in the background. Pods are left running.
func (s *services) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	var errs []error
	if s.streaming != nil {
		errs = append(errs, s.streaming.Close())
	}
	if s.plugins != nil {
		errs = append(errs, s.plugins.Close())
	}
	return errors.Join(append(errs, s.background.Stop(ctx))...)
}

func policyOf(c config.Runtime) spec.Policy {
	return spec.Policy{
		DisableProcMount: c.DisableProcMount, UnsetSeccompProfile: c.UnsetSeccompProfile, RestrictOOMScoreAdj: c.RestrictOOMScoreAdj,
		TolerateMissingHugetlb: c.TolerateMissingHugetlbController, DisableHugetlb: c.DisableHugetlbController,
		UnprivilegedPorts: c.EnableUnprivilegedPorts, UnprivilegedICMP: c.EnableUnprivilegedICMP,
		DisableAppArmor: c.DisableAppArmor, EnableSELinux: c.EnableSELinux, DeviceOwnership: c.DeviceOwnershipFromSecurityContext,
	}
}

// newPlugins sets NRI up. What plugins make of a specification goes through the
// same last steps as what we make.
func newPlugins(cfg config.NRI, index *store.Store, gen *generator, background *lifecycle.Group) (*nri.Plugins, error) {
	return nri.New(nri.Options{
		Config: cfg, Version: version.Version, Index: nri.Index{Sandboxes: index.Sandboxes.List, Containers: index.Containers.List},
		Inject: gen.devices.Inject, Check: gen.check, Background: background,
	})
}

func newNetworks(n node, handlers *handler.Handlers, c config.Runtime) (networks, error) {
	cfg := network.Config{
		NetNSDir: netnsDir, ConfDir: c.CNI.ConfDir, BinDirs: c.CNI.BinDirs, MaxConfNum: c.CNI.MaxConfNum,
		SetupSerially: c.CNI.SetupSerially, IPPref: network.IPPref(c.CNI.IPPreference), ConfTemplate: c.CNI.ConfTemplate,
		// Not below the state directory: after a reboot the plugins' books
		// still have what is to be given back.
		CacheDir: filepath.Join(n.rootDir, "network"),
	}
	if c.NetNSMountsUnderStateDir {
		cfg.NetNSDir = filepath.Join(n.stateDir, "netns")
	}
	nets, err := network.New(cfg)
	return networks{Networks: nets, handlers: handlers, cfg: cfg}, err
}

// newInstances puts a sandboxer behind each way to run a sandbox.
func newInstances(n node, rt *runtime.Tasks, gen *generator) (gsandbox.Instances, error) {
	controllers, err := n.ic.GetByType(plugins.SandboxControllerPlugin)
	if err != nil {
		return nil, fmt.Errorf("get sandbox controllers: %w", err)
	}
	shims := map[string]sandbox.Controller{}
	for id, c := range controllers {
		if controller, ok := c.(sandbox.Controller); ok {
			shims[id] = controller
		}
	}
	return sandboxer.New(sandboxer.Options{
		Tasks: pauseTasks{rt}, StateDir: filepath.Join(n.stateDir, "pause"), Spec: gen.Pause, Controllers: shims,
	})
}

func semver(v string) string {
	if len(v) > 0 && v[0] == 'v' {
		return v
	}
	return "v" + v
}

// shownWarnings are those the operator did not silence.
func shownWarnings(cfg settings) func() []string {
	silenced := map[string]bool{}
	for _, id := range cfg.runtime.IgnoreDeprecationWarnings {
		silenced[id] = true
	}
	var out []string
	for _, w := range cfg.warnings {
		if w.Deprecation == "" || !silenced[string(w.Deprecation)] {
			out = append(out, w.String())
		}
	}
	return func() []string { return out }
}
