// Package nri lets NRI plugins see and change pods and containers, by the Node
// Resource Interface's own adaptation.
//
// It owns the connections to the plugins and the conversions between records
// and NRI's messages. It decides nothing about pods and keeps no list of them:
// what a plugin is told when it connects comes from the store's index. Package
// sandbox and package container say when something happens. Start reading at
// Plugins.
//
// The adaptation asks one plugin at a time, about one event at a time, under
// a lock of its own: events of all pods wait for a plugin that is being asked.
// That wait is bounded by plugin_request_timeout per plugin, and a plugin that
// uses it up is dropped, unless its own policy says otherwise. Nothing here adds
// to it: no lock of ours is held across a call to a plugin. Hold keeps a plugin
// from being introduced; whoever holds it does nothing but tell plugins and
// write a record.
package nri

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	validator "github.com/containerd/nri/plugins/default-validator"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/record"
)

// Index is what is known about pods and containers; see store.
type Index struct {
	Sandboxes  func() []record.Sandbox
	Containers func() []record.Container
}

// Containers are changed as plugins ask.
type Containers interface {
	// Apply sets resources of a container without asking plugins; what is not
	// set in r stays.
	Apply(ctx context.Context, id string, r *cri.LinuxContainerResources) error
	// Stop ends it.
	Stop(ctx context.Context, id string, grace time.Duration) error
}

// Options is what New needs. All are required.
type Options struct {
	Config config.NRI
	// Version is the daemon's, for plugins to see.
	Version string
	Index   Index
	// Inject puts CDI devices into a specification.
	Inject func(s *specs.Spec, names []string) error
	// Check looks at a specification that plugins have changed, and may change
	// it too.
	Check func(s *specs.Spec)
	// Background runs updates that a plugin asks for in passing.
	Background *lifecycle.Group
}

// Plugins are the plugins of the node. Without NRI there are none, and
// everything succeeds.
type Plugins struct {
	opts    Options
	adapt   *adaptation.Adaptation // nil without NRI
	metrics *metrics

	mu         sync.Mutex
	containers Containers // nil before Start
}

// runtimeName is what plugins know the daemon as: some of them look for it.
const runtimeName = "containerd"

// New returns the plugins. Start lets them in.
func New(o Options) (*Plugins, error) {
	p := &Plugins{opts: o, metrics: newMetrics()}
	if o.Config.Disable {
		return p, nil
	}
	// Settings of the whole process, as the adaptation has them.
	adaptation.SetPluginRegistrationTimeout(o.Config.RegistrationTimeout)
	adaptation.SetPluginRequestTimeout(o.Config.RequestTimeout)
	options := []adaptation.Option{
		adaptation.WithTTRPCOptions(nil, []ttrpc.ServerOpt{ttrpc.WithUnaryServerInterceptor(p.evictions)}),
		adaptation.WithSocketPath(o.Config.SocketPath), adaptation.WithPluginPath(o.Config.PluginPath),
		adaptation.WithPluginConfigPath(o.Config.PluginConfigPath), adaptation.WithMetrics(p.metrics),
		adaptation.WithDefaultValidator(validatorConfig(o.Config.Validator)),
	}
	if o.Config.DisableConnections {
		options = append(options, adaptation.WithDisabledExternalConnections())
	}
	var err error
	p.adapt, err = adaptation.New(runtimeName, o.Version, p.synchronize, p.unsolicited, options...)
	if err != nil {
		return nil, fmt.Errorf("set up NRI: %w", err)
	}
	return p, nil
}

func validatorConfig(c config.NRIValidator) *validator.DefaultValidatorConfig {
	return &validator.DefaultValidatorConfig{
		Enable: c.Enable, RejectOCIHookAdjustment: c.RejectOCIHooks,
		RejectRuntimeDefaultSeccompAdjustment: c.RejectRuntimeDefaultSeccomp,
		RejectUnconfinedSeccompAdjustment:     c.RejectUnconfinedSeccomp, RejectCustomSeccompAdjustment: c.RejectCustomSeccomp,
		RejectNamespaceAdjustment: c.RejectNamespaces, RejectSysctlAdjustment: c.RejectSysctls,
		RequiredPlugins: c.RequiredPlugins, TolerateMissingAnnotation: c.TolerateMissingAnnotation,
	}
}

// Start runs the pre-installed plugins and lets others connect. Plugins begin
// with what is in the index.
func (p *Plugins) Start(c Containers) error {
	if p.adapt == nil {
		return nil
	}
	p.mu.Lock()
	p.containers = c
	p.mu.Unlock()
	if err := p.adapt.Start(); err != nil {
		return fmt.Errorf("start NRI plugins: %w", err)
	}
	return nil
}

// Close ends the connections, and the plugins that were started here.
func (p *Plugins) Close() error {
	if p.adapt != nil {
		p.adapt.Stop()
	}
	return nil
}

// Hold keeps plugins from being introduced until the release is called: between
// telling plugins of a new pod or container and its record being visible, a
// plugin would learn of it neither way.
func (p *Plugins) Hold() (release func()) {
	if p.adapt == nil {
		return func() {}
	}
	return p.adapt.BlockPluginSync().Unblock
}

// none reports whether there is nobody to tell. A plugin counts as soon as it is
// told of anything, see Hold.
func (p *Plugins) none() bool { return p.adapt == nil || p.metrics.count.Load() == 0 }

// ends are the events by which something leaves the index. For them a plugin
// that is just being introduced is waited for: it may have been told that the
// pod or container is there.
var ends = []facts.PluginEvent{facts.PodStopped, facts.PodRemoved, facts.ContainerStopped, facts.ContainerRemoved}

// TellPod tells the plugins what happens to a pod. An error of PodRun is one
// plugin's refusal.
func (p *Plugins) TellPod(ctx context.Context, e facts.PluginEvent, sb record.Sandbox) error {
	if slices.Contains(ends, e) {
		defer p.Hold()()
	}
	if p.none() {
		return nil
	}
	pod := podOf(sb)
	var err error
	switch e {
	case facts.PodRun:
		err = p.adapt.RunPodSandbox(ctx, &api.RunPodSandboxRequest{Pod: pod})
	case facts.PodUpdated:
		err = p.adapt.PostUpdatePodSandbox(ctx, &api.PostUpdatePodSandboxRequest{Pod: pod})
	case facts.PodStopped:
		err = p.adapt.StopPodSandbox(ctx, &api.StopPodSandboxRequest{Pod: pod})
	case facts.PodRemoved:
		err = p.adapt.RemovePodSandbox(ctx, &api.RemovePodSandboxRequest{Pod: pod})
	default:
		return fmt.Errorf("tell NRI plugins: %q is no event of a pod: %w", e, errdefs.ErrInternal)
	}
	return p.refusal(ctx, e, err)
}

// UpdatePod asks the plugins about new sums of a pod's resources.
func (p *Plugins) UpdatePod(ctx context.Context, sb record.Sandbox, overhead, resources *cri.LinuxContainerResources) error {
	if p.none() {
		return nil
	}
	_, err := p.adapt.UpdatePodSandbox(ctx, &api.UpdatePodSandboxRequest{
		Pod: podOf(sb), OverheadLinuxResources: fromCRI(overhead), LinuxResources: fromCRI(resources),
	})
	return p.refusal(ctx, facts.PodUpdate, err)
}

// TellContainer tells the plugins what happens to a container. An error of
// ContainerStart is one plugin's refusal.
func (p *Plugins) TellContainer(ctx context.Context, e facts.PluginEvent, sb record.Sandbox, c record.Container) error {
	if slices.Contains(ends, e) {
		defer p.Hold()()
	}
	if p.none() {
		return nil
	}
	pod, ctr, err := pair(sb, c)
	if err != nil {
		return err
	}
	switch e {
	case facts.ContainerCreated:
		err = p.adapt.PostCreateContainer(ctx, &api.PostCreateContainerRequest{Pod: pod, Container: ctr})
	case facts.ContainerStart:
		err = p.adapt.StartContainer(ctx, &api.StartContainerRequest{Pod: pod, Container: ctr})
	case facts.ContainerStarted:
		err = p.adapt.PostStartContainer(ctx, &api.PostStartContainerRequest{Pod: pod, Container: ctr})
	case facts.ContainerUpdated:
		err = p.adapt.PostUpdateContainer(ctx, &api.PostUpdateContainerRequest{Pod: pod, Container: ctr})
	case facts.ContainerStopped:
		err = p.stopped(ctx, pod, ctr)
	case facts.ContainerRemoved:
		err = p.adapt.RemoveContainer(ctx, &api.RemoveContainerRequest{Pod: pod, Container: ctr})
	default:
		return fmt.Errorf("tell NRI plugins: %q is no event of a container: %w", e, errdefs.ErrInternal)
	}
	return p.refusal(ctx, e, err)
}

func (p *Plugins) stopped(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	resp, err := p.adapt.StopContainer(ctx, &api.StopContainerRequest{Pod: pod, Container: ctr})
	if err == nil {
		p.later(resp.GetUpdate())
	}
	return err
}

// refusal is an error of a plugin, in words, with the plugin's name if it is
// known. A plugin's own class says nothing: its library has only one.
func (p *Plugins) refusal(ctx context.Context, e facts.PluginEvent, err error) error {
	if err == nil {
		return nil
	}
	who := "plugins"
	if name, ok := p.metrics.whose(err); ok {
		who = "plugin " + name
	}
	if ctx.Err() != nil {
		return fmt.Errorf("ask NRI %s about %s: %w", who, e, context.Cause(ctx))
	}
	return fmt.Errorf("NRI %s refused %s: %s: %w", who, e, status.Convert(err).Message(), errdefs.ErrFailedPrecondition)
}

// synchronize introduces plugins: tell passes what there is to them and returns
// what they want changed.
func (p *Plugins) synchronize(ctx context.Context, tell adaptation.SyncCB) error {
	var pods []*api.PodSandbox
	for _, sb := range p.opts.Index.Sandboxes() {
		if sb.Phase != record.Creating {
			pods = append(pods, podOf(sb))
		}
	}
	var containers []*api.Container
	for _, c := range p.opts.Index.Containers() {
		if c.Phase != record.ContainerCreated && c.Phase != record.ContainerRunning {
			continue
		}
		ctr, err := containerOf(c)
		if err != nil {
			log.G(ctx).WithField("container", c.ID).WithError(err).Warn("NRI plugins are not told of a container")
			continue
		}
		containers = append(containers, ctr)
	}
	updates, err := tell(ctx, pods, containers)
	if err != nil {
		return err
	}
	p.later(updates)
	return nil
}
