package lifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	"github.com/gantry-cri/gantry/integration/daemon"
)

const nriTable = "io.containerd.nri.v1.nri"

// nriPlugin is an NRI plugin made of the plugins' own library, connected over
// the daemon's socket. It notes every event; what else it does is in its
// functions, which must be set before it connects.
type nriPlugin struct {
	t    *testing.T
	name string
	stub stub.Stub

	// on is called for every event of a pod or container, by its name.
	on func(event string, pod *api.PodSandbox, ctr *api.Container) error
	// adjust says what to do to a container.
	adjust func(pod *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate)
	// update says what to do when a container is updated, or has stopped.
	update func(ctr *api.Container, r *api.LinuxResources) []*api.ContainerUpdate
	stop   func(ctr *api.Container) []*api.ContainerUpdate
	sync   func(pods []*api.PodSandbox, containers []*api.Container) []*api.ContainerUpdate
	closed chan struct{}

	mu     sync.Mutex
	events []string
	synced bool
	pods   []*api.PodSandbox
	ctrs   []*api.Container
}

// patientWithNRI gives plugins the time that a busy machine needs.
func patientWithNRI(_ *daemon.Instance, c daemon.Config) {
	for _, key := range []string{"plugin_registration_timeout", "plugin_request_timeout"} {
		c.Set("60s", "plugins", nriTable, key)
	}
}

// nriSocket is where the daemon's plugins connect.
func nriSocket(d *daemon.Daemon) string { return filepath.Join(d.Dir, "nri.sock") }

// connect connects the plugin under the name "index-name" and waits until the
// daemon has introduced it.
func (p *nriPlugin) connect(d *daemon.Daemon, opts ...stub.Option) *nriPlugin {
	p.t.Helper()
	if err := p.tryConnect(d, p, opts...); err != nil {
		p.t.Fatal(err)
	}
	return p
}

// tryConnect connects as implementation, which is p or has more methods.
func (p *nriPlugin) tryConnect(d *daemon.Daemon, implementation any, opts ...stub.Option) error {
	index, name, _ := strings.Cut(p.name, "-")
	p.closed = make(chan struct{})
	opts = append([]stub.Option{
		stub.WithPluginIdx(index), stub.WithPluginName(name), stub.WithSocketPath(nriSocket(d)),
		stub.WithOnClose(sync.OnceFunc(func() { close(p.closed) })), stub.WithLogger(silentNRI{}),
	}, opts...)
	var err error
	if p.stub, err = stub.New(implementation, opts...); err != nil {
		return err
	}
	if err := p.stub.Start(context.Background()); err != nil {
		return err
	}
	p.t.Cleanup(p.stub.Stop)
	eventually(p.t, ample, func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		if !p.synced {
			return errors.New("the plugin is not synchronised")
		}
		return nil
	})
	return nil
}

// silentNRI logs nothing.
type silentNRI struct{}

func (silentNRI) Debugf(context.Context, string, ...any) {}
func (silentNRI) Infof(context.Context, string, ...any)  {}
func (silentNRI) Warnf(context.Context, string, ...any)  {}
func (silentNRI) Errorf(context.Context, string, ...any) {}

func (p *nriPlugin) Synchronize(_ context.Context, pods []*api.PodSandbox, ctrs []*api.Container) ([]*api.ContainerUpdate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.synced, p.pods, p.ctrs = true, pods, ctrs
	if p.sync != nil {
		return p.sync(pods, ctrs), nil
	}
	return nil, nil
}

// note keeps an event with the object's name, and lets the test decide.
func (p *nriPlugin) note(event string, pod *api.PodSandbox, ctr *api.Container) error {
	p.mu.Lock()
	text := event + " " + pod.GetName()
	if ctr != nil {
		text = event + " " + ctr.GetName()
	}
	p.events = append(p.events, text)
	p.mu.Unlock()
	if p.on != nil {
		return p.on(event, pod, ctr)
	}
	return nil
}

// about are the events so far that name one of the objects.
func (p *nriPlugin) about(objects ...string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(p.events), func(e string) bool {
		_, object, _ := strings.Cut(e, " ")
		return !slices.Contains(objects, object)
	})
}

// heard waits until the events about the objects are exactly these.
func (p *nriPlugin) heard(want []string, objects ...string) {
	p.t.Helper()
	eventually(p.t, ample, func() error {
		if got := p.about(objects...); !slices.Equal(got, want) {
			return fmt.Errorf("%s heard %q, want %q", p.name, got, want)
		}
		return nil
	})
}

func (p *nriPlugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("RunPodSandbox", pod, nil)
}

func (p *nriPlugin) UpdatePodSandbox(_ context.Context, pod *api.PodSandbox, _, _ *api.LinuxResources) error {
	return p.note("UpdatePodSandbox", pod, nil)
}

func (p *nriPlugin) PostUpdatePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("PostUpdatePodSandbox", pod, nil)
}

func (p *nriPlugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("StopPodSandbox", pod, nil)
}

func (p *nriPlugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("RemovePodSandbox", pod, nil)
}

func (p *nriPlugin) CreateContainer(_ context.Context, pod *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	if err := p.note("CreateContainer", pod, ctr); err != nil || p.adjust == nil {
		return nil, nil, err
	}
	adjust, updates := p.adjust(pod, ctr)
	return adjust, updates, nil
}

func (p *nriPlugin) PostCreateContainer(_ context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	return p.note("PostCreateContainer", pod, ctr)
}

func (p *nriPlugin) StartContainer(_ context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	return p.note("StartContainer", pod, ctr)
}

func (p *nriPlugin) PostStartContainer(_ context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	return p.note("PostStartContainer", pod, ctr)
}

func (p *nriPlugin) UpdateContainer(_ context.Context, pod *api.PodSandbox, ctr *api.Container, r *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	if err := p.note("UpdateContainer", pod, ctr); err != nil || p.update == nil {
		return nil, err
	}
	return p.update(ctr, r), nil
}

func (p *nriPlugin) PostUpdateContainer(_ context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	return p.note("PostUpdateContainer", pod, ctr)
}

func (p *nriPlugin) StopContainer(_ context.Context, pod *api.PodSandbox, ctr *api.Container) ([]*api.ContainerUpdate, error) {
	if err := p.note("StopContainer", pod, ctr); err != nil || p.stop == nil {
		return nil, err
	}
	return p.stop(ctr), nil
}

func (p *nriPlugin) RemoveContainer(_ context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	return p.note("RemoveContainer", pod, ctr)
}

// nriValidator is a plugin that judges what others do.
type nriValidator struct {
	*nriPlugin
	judge func(*api.ValidateContainerAdjustmentRequest) error
}

func (v *nriValidator) ValidateContainerAdjustment(_ context.Context, req *api.ValidateContainerAdjustmentRequest) error {
	return v.judge(req)
}

// evicting lets the plugin's library send evictions, which it has no function
// for: they go with the next request for updates.
func evicting(list *[]*api.ContainerEviction) stub.Option {
	return stub.WithTTRPCOptions([]ttrpc.ClientOpts{ttrpc.WithUnaryClientInterceptor(
		func(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, next ttrpc.Invoker) error {
			if req.Method == "UpdateContainers" {
				b, err := proto.Marshal(&api.UpdateContainersRequest{Evict: *list})
				if err != nil {
					return err
				}
				req.Payload = b
			}
			return next(ctx, req, resp)
		})}, nil)
}

// cpus is an update of a container's CPU set.
func cpus(container, set string) *api.ContainerUpdate {
	u := &api.ContainerUpdate{ContainerId: container}
	u.SetLinuxCPUSetCPUs(set)
	return u
}

// nriProgram ends the name under which this test program is a plugin that the
// daemon starts.
const nriProgram = "-nri-test-plugin"

// nriMain is the plugin that the daemon starts: it adds its name to the file
// that its configuration names, for itself and for every container it sees, and
// to the container's environment.
func nriMain() int {
	p := &installedPlugin{name: os.Getenv(api.PluginIdxEnvVar) + "-" + os.Getenv(api.PluginNameEnvVar)}
	s, err := stub.New(p, stub.WithOnClose(func() { os.Exit(0) }), stub.WithLogger(silentNRI{}))
	if err == nil {
		err = s.Run(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// installedPlugin is configured by JSON.
type installedPlugin struct {
	name string
	cfg  struct {
		File string `json:"file"`
		// Hang makes it never answer about containers of this name.
		Hang string `json:"hang"`
	}
}

func (p *installedPlugin) Configure(_ context.Context, config, runtime, _ string) (api.EventMask, error) {
	if err := json.Unmarshal([]byte(config), &p.cfg); err != nil {
		return 0, err
	}
	return 0, p.add(fmt.Sprintf("configured by %s as process %d", runtime, os.Getpid()))
}

func (p *installedPlugin) add(text string) error {
	f, err := os.OpenFile(p.cfg.File, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = fmt.Fprintf(f, "%s %s\n", p.name, text)
	return err
}

func (p *installedPlugin) Synchronize(_ context.Context, pods []*api.PodSandbox, ctrs []*api.Container) ([]*api.ContainerUpdate, error) {
	return nil, p.add(fmt.Sprintf("synchronised with %d pods, %d containers", len(pods), len(ctrs)))
}

func (p *installedPlugin) CreateContainer(_ context.Context, _ *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	if p.cfg.Hang != "" && ctr.GetName() == p.cfg.Hang {
		if err := p.add("hangs"); err != nil {
			return nil, nil, err
		}
		<-make(chan struct{})
	}
	a := &api.ContainerAdjustment{}
	a.AddEnv("SEEN_BY_"+strings.ToUpper(strings.ReplaceAll(p.name, "-", "_")), fmt.Sprint(os.Getpid()))
	return a, nil, p.add("create " + ctr.GetName())
}

// install puts this test program into the daemon's plugin directory, and its
// configuration beside.
func install(t *testing.T, in *daemon.Instance, name, config string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	plugins, configs := filepath.Join(in.Dir, "nri", "plugins"), filepath.Join(in.Dir, "nri", "conf.d")
	if err := errors.Join(os.MkdirAll(plugins, 0o755), os.MkdirAll(configs, 0o755),
		os.Symlink(self, filepath.Join(plugins, name)), os.WriteFile(filepath.Join(configs, name+".conf"), []byte(config), 0o644)); err != nil {
		t.Fatal(err)
	}
}
