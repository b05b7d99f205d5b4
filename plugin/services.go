package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/metadata"
	crt "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
	criapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/cdi"
	"github.com/gantry-cri/gantry/plugin/container"
	"github.com/gantry-cri/gantry/plugin/cri"
	"github.com/gantry-cri/gantry/plugin/events"
	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/handler"
	"github.com/gantry-cri/gantry/plugin/host"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/network"
	"github.com/gantry-cri/gantry/plugin/notifier"
	"github.com/gantry-cri/gantry/plugin/nri"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/podfiles"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/rootfs"
	"github.com/gantry-cri/gantry/plugin/rpc"
	"github.com/gantry-cri/gantry/plugin/runtime"
	gsandbox "github.com/gantry-cri/gantry/plugin/sandbox"
	"github.com/gantry-cri/gantry/plugin/sandboxer"
	"github.com/gantry-cri/gantry/plugin/selinux"
	"github.com/gantry-cri/gantry/plugin/snapshot"
	"github.com/gantry-cri/gantry/plugin/spec"
	"github.com/gantry-cri/gantry/plugin/stats"
	"github.com/gantry-cri/gantry/plugin/stdio/keeper"
	"github.com/gantry-cri/gantry/plugin/store"
	"github.com/gantry-cri/gantry/plugin/stream"
	"github.com/gantry-cri/gantry/plugin/userns"
	"github.com/gantry-cri/gantry/plugin/volume"
)

// notifierSocket is in the state directory. Specifications name it, so that the
// next daemon must have it too.
const notifierSocket = "seccomp.sock"

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
	// damaged are the pods whose records cannot be read. They may run.
	damaged []string

	cri        *cri.Server
	rpc        rpc.Options
	sandboxes  *gsandbox.Service
	containers *container.Service
	stats      *stats.Stats
	networks   *network.Networks
	userns     *userns.Namespaces
	handlers   *handler.Handlers
	plugins    *nri.Plugins
	notifier   *notifier.Notifier
	streaming  *stream.Server
	background *lifecycle.Group
	ops        *operation.Table
	store      *store.Store
	events     *events.Hub
	streams    streams
	opsPath    string
	disk       *store.Metadata
	// checkNetworks asks for CNI CHECK of all pods after the start.
	checkNetworks bool
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
	if err := ownDirs(n.rootDir, n.stateDir); err != nil {
		return n, err
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

// passable is the mode of a directory that nobody but root lists, and that a
// pod in a user namespace goes through; private is for root alone.
const (
	passable = 0o711
	private  = 0o700
)

// ownDirs makes our directories and takes from others what an earlier release,
// or a umask, has left to them (CVE-2024-25621).
func ownDirs(root, state string) error {
	for _, dir := range []string{root, state} {
		if err := os.MkdirAll(dir, passable); err != nil {
			return fmt.Errorf("create directory: %w", err)
		}
	}
	for _, d := range []struct {
		dir   string
		modes []uint32 // of the directory and of those below it
	}{
		{root, []uint32{passable, private, private}},
		{state, []uint32{passable, passable}},
		{filepath.Join(state, "sandboxes"), []uint32{passable, passable}},
		{filepath.Join(state, "io"), []uint32{passable, private}},
	} {
		if err := setModes(d.dir, d.modes); err != nil {
			return fmt.Errorf("set mode of directory: %w", err)
		}
	}
	return nil
}

// setModes gives a directory, if there is one, and those below it their modes.
// Links are not followed: others may have been able to write here.
func setModes(dir string, modes []uint32) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	f := os.NewFile(uintptr(fd), dir)
	defer f.Close()
	if err := unix.Fchmod(fd, modes[0]); err != nil {
		return &os.PathError{Op: "chmod", Path: dir, Err: err}
	}
	if len(modes) == 1 {
		return nil
	}
	entries, err := f.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := setModes(filepath.Join(dir, e.Name()), modes[1:]); err != nil {
			return err
		}
	}
	return nil
}

// snapshotRoot is the directory a snapshotter keeps its data in.
func (n node) snapshotRoot(name string) string {
	if p := n.ic.Plugins().Get(plugins.SnapshotPlugin, name); p != nil && p.Meta.Exports["root"] != "" {
		return p.Meta.Exports["root"]
	}
	return filepath.Join(filepath.Dir(n.rootDir), plugins.SnapshotPlugin.String()+"."+name)
}

// userNSObstacle returns why no pod whose images are in the snapshotter can
// have a user namespace.
func (n node) userNSObstacle(snaps *snapshot.Snapshots, def string) func(snapshotter string) error {
	return func(snapshotter string) error {
		if !n.facts.UserNamespaces {
			return fmt.Errorf("the kernel makes no user namespaces (user.max_user_namespaces): %w", errdefs.ErrFailedPrecondition)
		}
		if snapshotter == "" {
			snapshotter = def
		}
		return snaps.Remaps(snapshotter)
	}
}

func newServices(ic *plugin.InitContext, cfg settings) (*services, error) {
	n, err := newNode(ic)
	if err != nil {
		return nil, err
	}
	ctx := namespaces.WithNamespace(ic.Context, Namespace)
	s := &services{
		background: lifecycle.New(ctx), ops: &operation.Table{}, opsPath: filepath.Join(n.stateDir, operation.Socket),
	}
	if err := s.build(ctx, n, cfg); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *services) build(ctx context.Context, n node, cfg settings) error {
	if err := s.openStore(ctx, n); err != nil {
		return err
	}
	introspector, ok := n.tasks.(handler.Introspector)
	if !ok {
		return fmt.Errorf("task runtime %T does not tell about runtimes", n.tasks)
	}
	known := snapshotters(n)
	snaps := newSnapshots(n, known)
	obstacle := n.userNSObstacle(snaps, cfg.images.Snapshotter)
	var err error
	if s.handlers, err = handler.New(cfg.runtime, handler.NewProber(introspector), obstacle); err != nil {
		return err
	}
	images, err := newImages(ctx, n, known, s.handlers, cfg, s.background)
	if err != nil {
		return err
	}
	s.stats = stats.New(n.facts, snaps, cfg.images.StatsCollectPeriod)
	files, err := newPodFiles(n, cfg.runtime, s.handlers)
	if err != nil {
		return err
	}
	labels, err := newLabels(ctx, cfg.runtime, s.handlers, s.store)
	if err != nil {
		return err
	}
	nets, err := newNetworks(n, s.handlers, cfg.runtime)
	if err != nil {
		return err
	}
	s.networks, s.checkNetworks = nets.Networks, cfg.runtime.CNI.CheckOnStart
	pauseDir := filepath.Join(n.stateDir, "pause")
	if s.userns, err = userns.New(filepath.Join(n.stateDir, "userns"), sandboxer.Program(pauseDir)); err != nil {
		return err
	}
	volumes, err := volume.New(n.stateDir, n.rootDir, volume.Tree{Resolve: rootfs.ResolveIn, Copy: rootfs.CopyTree})
	if err != nil {
		return err
	}
	gen := &generator{
		handlers: s.handlers, containers: s.store.Containers, files: files, userns: s.userns, host: n.facts, policy: policyOf(cfg.runtime),
		node: cfg.runtime.Containers, workloads: cfg.runtime.Workloads, notifier: filepath.Join(n.stateDir, notifierSocket),
		devices: cdi.New(cfg.runtime.CDISpecDirs), labels: labels.Labels, hooksDirs: cfg.runtime.HooksDirs,
	}
	if err := gen.prepare(n); err != nil {
		return err
	}
	hierarchies, err := runtime.NewHierarchies()
	if err != nil {
		return err
	}
	rt := runtime.New(n.tasks, hierarchies).Limited(s.handlers.CreateTimeout)
	inst, err := newInstances(n, pauseDir, rt, gen, s.handlers)
	if err != nil {
		return err
	}
	if dir := cfg.runtime.NamespacesDir; dir != "" {
		inst = sandboxer.Published{Sandboxer: inst, Dir: dir}
	}
	if s.plugins, err = newPlugins(cfg.nri, s.store, gen, s.background); err != nil {
		return err
	}
	// Not below the state directory: nothing may be executed from /run on some
	// machines.
	s.streams = newStreams(n.stateDir, cfg.runtime, keeper.New(filepath.Join(n.rootDir, keeper.Program), filepath.Join(n.stateDir, keeper.Socket)))
	s.containers = container.New(container.Deps{
		Store: s.store.Containers, Sandboxes: s.store.Sandboxes, Images: imageSource{images, s.handlers}, Snapshots: snaps,
		Volumes: volumes, Specs: gen, Files: files, Tasks: tasks{rt}, Streams: s.streams, Cgroups: s.stats,
		Plugins: s.plugins, Ops: s.ops, Background: s.background,
	})
	if s.notifier, err = notifier.Listen(gen.notifier, s.background, s.containers.Denied); err != nil {
		return err
	}
	s.sandboxes = gsandbox.New(gsandbox.Deps{
		Store: s.store.Sandboxes, Handlers: s.handlers, Labels: labels, Files: files, UserNS: s.userns, Network: nets, Instances: inst,
		Shims: shims{rt}, Containers: s.containers, Plugins: s.plugins, Ops: s.ops, Background: s.background,
	})
	if s.streaming, err = newStreaming(cfg.server, s.containers, s.sandboxes, s.ops); err != nil {
		return err
	}
	s.cri = cri.New(cri.Deps{
		Sandboxes: s.sandboxes, Containers: s.containers, Images: images, Streaming: s.streaming, Network: nets,
		Handlers: s.handlers, Validate: validate{policyOf(cfg.runtime)}, Stats: s.stats, Events: happenings{s.events}, Version: semver(version.Version),
		Warnings: shownWarnings(cfg), Info: func() map[string]any { return map[string]any{"config": cfg.runtime} },
	})
	loadAppArmor(ctx, n, cfg.runtime.DisableAppArmor)
	return s.observe()
}

func newPodFiles(n node, cfg config.Runtime, handlers *handler.Handlers) (*podfiles.Files, error) {
	return podfiles.New(filepath.Join(n.stateDir, "sandboxes"), podfiles.Text{
		Hostname:   func(c *criapi.PodSandboxConfig) string { return spec.Hostname(c, n.facts) },
		ResolvConf: spec.ResolvConf, Label: selinux.SetFiles,
		ShmSize: func(sb record.Sandbox) (int64, error) { return shmSize(handlers, cfg.Workloads, sb) },
	})
}

// loadAppArmor is called once at the start, so that a change of the profile
// counts; a host that cannot do it is told of with the first pod that needs it.
func loadAppArmor(ctx context.Context, n node, disabled bool) {
	if disabled || !n.facts.AppArmor {
		return
	}
	if err := host.LoadAppArmor(spec.AppArmorProfile); err != nil {
		log.G(ctx).WithError(err).Warn("the default AppArmor profile is not loaded")
	}
}

// openStore reads the records; one that cannot be read is told of and left alone.
func (s *services) openStore(ctx context.Context, n node) (err error) {
	s.disk = store.NewMetadata(n.db, Namespace)
	var damaged []store.Damaged
	if s.store, damaged, err = store.Open(ctx, s.disk); err != nil {
		return err
	}
	s.events = events.New(records{s.store})
	s.store.Watch(s.events)
	for _, d := range damaged {
		log.G(ctx).WithError(d.Err).WithField(d.Kind, d.ID).Error("record cannot be read; it is left alone, remove it with ctr")
		if d.Kind == "sandbox" {
			s.damaged = append(s.damaged, d.ID)
		}
	}
	return nil
}

// observe registers the metrics and makes the decorator of requests feed them.
func (s *services) observe() error {
	metrics := rpc.NewMetrics(s.ops)
	for _, c := range slices.Concat(s.plugins.Metrics(), s.events.Metrics(), []prometheus.Collector{metrics, s.notifier.Metrics()}) {
		if err := prometheus.Register(c); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	s.rpc = rpc.Options{Namespace: Namespace, Ops: s.ops, Object: cri.Object, Observe: metrics.Observe, Endless: cri.Endless}
	return nil
}

// start begins what goes on in the background: the operations socket first, as
// it is what tells when something of the rest hangs.
func (s *services) start(ctx context.Context) error {
	s.background.Go("serve operations", s.serveOps)
	s.background.Go("keep output", s.streams.keeper.Run)
	s.background.Go("listen to seccomp filters", s.notifier.Run)
	s.background.Go("watch network", s.networks.Run)
	s.background.Go("keep host ports", s.networks.KeepPorts)
	s.background.Go("watch memory", func(ctx context.Context) {
		if err := s.stats.Run(ctx); err != nil {
			log.G(ctx).WithError(err).Error("that a container runs out of memory may go unnoticed")
		}
	})
	s.background.Go("serve streams", func(ctx context.Context) {
		if err := s.streaming.Serve(ctx); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Error("streaming server ended: exec, attach and port-forward do not work")
		}
	})
	s.background.Go("probe runtime handlers", s.probeHandlers)
	// Before anything is served: a plugin that is to see every container must
	// not miss the first ones.
	if err := s.plugins.Start(s.containers); err != nil {
		return err
	}
	begin := time.Now()
	pods, containers := s.sandboxes.Recover(), s.containers.Recover(ctx)
	s.background.Go("release leftovers", func(ctx context.Context) {
		for _, looked := range []<-chan struct{}{pods, containers} {
			select {
			case <-looked:
			case <-ctx.Done():
				return
			}
		}
		log.G(ctx).WithField("took", time.Since(begin)).Info("every pod and container has been looked at")
		if err := s.networks.GC(ctx, s.livePods); err != nil {
			log.G(ctx).WithError(err).Warn("release network leftovers: will be tried again")
			s.background.Go("release network leftovers", s.releaseNetworks)
		}
		s.background.Go("restore host ports", func(ctx context.Context) {
			lifecycle.Retry(ctx, "restore host ports", networkRetries, func() error { return s.networks.RestorePorts(ctx, s.runningPods) })
		})
		if err := s.streams.sweep(ctx, s.store.Containers); err != nil {
			log.G(ctx).WithError(err).Warn("release output leftovers")
		}
		if err := s.userns.GC(ctx, s.livePods); err != nil {
			log.G(ctx).WithError(err).Warn("release user namespaces without a pod")
		}
		if s.checkNetworks {
			s.checkPodNetworks(ctx)
		}
	})
	return nil
}

// probeHandlers asks runtimes what they can do, those that failed some times
// more: at the boot of a busy node a program may take long to answer.
func (s *services) probeHandlers(ctx context.Context) {
	for pause := 2 * time.Second; pause < 2*time.Minute; pause *= 2 {
		if err := s.handlers.Probe(ctx); err != nil || len(s.handlers.Problems()) == 0 {
			return // the daemon ends, or all have answered
		}
		lifecycle.Pause(ctx, pause)
	}
}

// checkPodNetworks logs which running pods' networks are not as CNI made them.
// One after the other: it is nothing that anybody waits for.
func (s *services) checkPodNetworks(ctx context.Context) {
	for _, sb := range s.store.Sandboxes.List() {
		if sb.Phase != record.Ready || sb.HostNetwork() || ctx.Err() != nil {
			continue
		}
		if err := s.networks.Check(ctx, sb.ID); err != nil {
			m := sb.Config.GetMetadata()
			log.G(ctx).WithError(err).WithFields(log.Fields{"sandbox": sb.ID, "pod": m.GetNamespace() + "/" + m.GetName()}).
				Warn("the network of a pod is not as it was made; delete the pod to have it made anew")
		}
	}
}

// networkRetries is how often what could not be released is tried again.
var networkRetries = lifecycle.Backoff{First: time.Second, Last: 5 * time.Minute}

// releaseNetworks tries until the networks that belong to no pod are released.
func (s *services) releaseNetworks(ctx context.Context) {
	lifecycle.Pause(ctx, networkRetries.First)
	lifecycle.Retry(ctx, "release network leftovers", networkRetries, func() error { return s.networks.GC(ctx, s.livePods) })
}

// livePods are the pods whose namespaces are not to be touched: all there are, and
// those of which nobody knows what they are.
func (s *services) livePods(context.Context) ([]string, error) {
	ids := slices.Clone(s.damaged)
	for _, sb := range s.store.Sandboxes.List() {
		ids = append(ids, sb.ID)
	}
	return ids, nil
}

// runningPods are those that are ready.
func (s *services) runningPods(context.Context) ([]string, error) {
	var ids []string
	for _, sb := range s.store.Sandboxes.List() {
		if sb.Phase == record.Ready {
			ids = append(ids, sb.ID)
		}
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
	if s.notifier != nil {
		errs = append(errs, s.notifier.Close())
	}
	errs = append(errs, s.background.Stop(ctx))
	if s.disk != nil {
		errs = append(errs, s.disk.Flush())
	}
	return errors.Join(errs...)
}

func policyOf(c config.Runtime) spec.Policy {
	return spec.Policy{
		DisableProcMount: c.DisableProcMount, UnsetSeccompProfile: c.UnsetSeccompProfile, RestrictOOMScoreAdj: c.RestrictOOMScoreAdj,
		TolerateMissingHugetlb: c.TolerateMissingHugetlbController, DisableHugetlb: c.DisableHugetlbController,
		UnprivilegedPorts: c.EnableUnprivilegedPorts, UnprivilegedICMP: c.EnableUnprivilegedICMP,
		DefaultSysctls:     c.DefaultSysctls,
		IgnoreImageVolumes: c.IgnoreImageDefinedVolumes,
		DisableAppArmor:    c.DisableAppArmor, DeviceOwnership: c.DeviceOwnershipFromSecurityContext,
		HostNetworkDisableSELinux: c.HostNetworkDisableSELinux,
		PrivilegedSeccompProfile:  c.Containers.PrivilegedSeccompProfile, ReadOnly: c.Containers.ReadOnly,
		AllowedDevices: c.Containers.AllowedDevices, MinGOMAXPROCS: c.Containers.MinGOMAXPROCS,
		MinMappableUID: c.Containers.MinMappableUID, MinMappableGID: c.Containers.MinMappableGID,
		Userns:         usernsOf(c.Containers),
		SeccompProfile: c.Containers.SeccompProfile, Defaults: defaultsOf(c.Containers),
	}
}

// usernsOf is the user namespace of pods that have none of their own, nil for
// none.
func usernsOf(c config.Containers) *criapi.UserNamespace {
	if c.UIDMapping.Size == 0 {
		return nil
	}
	list := func(m config.IDMapping) []*criapi.IDMapping {
		return []*criapi.IDMapping{{HostId: m.Host, Length: m.Size}}
	}
	return &criapi.UserNamespace{Mode: criapi.NamespaceMode_POD, Uids: list(c.UIDMapping), Gids: list(c.GIDMapping)}
}

func defaultsOf(c config.Containers) spec.Defaults {
	d := spec.Defaults{Capabilities: c.Capabilities, Inheritable: c.InheritableCapabilities, Env: c.Env, PidsLimit: c.PidsLimit, MinMemory: c.MinMemory}
	for _, l := range c.Ulimits {
		d.Rlimits = append(d.Rlimits, specs.POSIXRlimit{Type: l.Type, Soft: l.Soft, Hard: l.Hard})
	}
	return d
}

// newLabels reads the machine's SELinux policy if it is to be used.
func newLabels(ctx context.Context, c config.Runtime, handlers *handler.Handlers, st *store.Store) (labels, error) {
	var policy selinux.Policy
	if c.EnableSELinux {
		var err error
		if policy, err = selinux.ReadPolicy(); err != nil {
			return labels{}, err
		}
		if policy.Process == "" {
			log.G(ctx).Warn("enable_selinux is set, and SELinux is off or has no policy for containers: they get no label")
		}
	}
	recorded := func() (list []record.Labels) {
		for _, sb := range st.Sandboxes.List() {
			list = append(list, sb.Labels)
		}
		return list
	}
	return labels{selinux.New(policy, c.SELinuxCategoryRange, recorded), handlers}, nil
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
		NetNSDir: network.NetNSDir, ConfDir: c.CNI.ConfDir, BinDirs: c.CNI.BinDirs, MaxConfNum: c.CNI.MaxConfNum,
		SetupSerially: c.CNI.SetupSerially, IPPref: network.IPPref(c.CNI.IPPreference), ConfTemplate: c.CNI.ConfTemplate,
		DefaultNetwork: c.CNI.DefaultNetwork, StatusGrace: c.CNI.StatusGrace, ReadyTimeout: c.CNI.ReadyTimeout,
		CacheDir: network.CacheDir(n.rootDir), HostPorts: network.HostPorts(c.CNI.HostPorts),
	}
	if dir := network.NetNSDirOf(c.NamespacesDir, c.NetNSMountsUnderStateDir, n.stateDir); dir != cfg.NetNSDir {
		cfg.NetNSDir = dir
		if err := os.MkdirAll(cfg.NetNSDir, passable); err != nil {
			return networks{}, fmt.Errorf("create directory: %w", err)
		}
	}
	nets, err := network.New(cfg)
	return networks{Networks: nets, handlers: handlers, cfg: cfg}, err
}

// newInstances puts a sandboxer behind each way to run a sandbox.
func newInstances(n node, pauseDir string, rt *runtime.Tasks, gen *generator, handlers *handler.Handlers) (sandboxer.Sandboxer, error) {
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
	d, err := sandboxer.New(sandboxer.Options{
		Tasks: rt, StateDir: pauseDir, Spec: gen.Pause, Controllers: shims, StartLimit: handlers.CreateTimeout, Sysctls: gen.Sysctls,
	})
	if err != nil {
		return nil, err
	}
	groups, err := runtime.NewHierarchies()
	return sandboxer.Charged{Sandboxer: d, Group: handler.ShimGroup, Groups: groups}, err
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
