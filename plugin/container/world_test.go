package container_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/container"
	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/runtime"
	"github.com/gantry-cri/gantry/plugin/runtime/runtimetest"
	"github.com/gantry-cri/gantry/plugin/store"
	"github.com/gantry-cri/gantry/plugin/store/storetest"
)

func TestMain(m *testing.M) {
	log.SetLevel("panic") // the faults are the tests' own
	m.Run()
}

// world is a node in memory, as in package sandbox's tests. The tasks are those
// of the fake runtime, which has its own contract suite.
type world struct {
	t       *testing.T
	disk    *storetest.Memory
	runtime *runtimetest.Fake
	pod     record.Sandbox

	mu     sync.Mutex
	layers map[string]bool
	views  map[string]bool
	volume map[string]bool
	fifos  map[string]bool
	starts map[string]time.Time // that are noted
	files  map[string]bool
	oom    map[string]bool
	execs  map[string][]string // that have streams, by container
	logged map[string]int      // drains by container
	names  []string
	told   []facts.PluginEvent
	strike func(n int, name string) (before, after error)
	life   int
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, disk: storetest.NewMemory(), runtime: runtimetest.New(), pod: storetest.Sandbox("p", 0),
		layers: map[string]bool{}, views: map[string]bool{}, volume: map[string]bool{}, files: map[string]bool{}, fifos: map[string]bool{}, starts: map[string]time.Time{}, oom: map[string]bool{}, logged: map[string]int{}, execs: map[string][]string{}}
	w.pod.Phase, w.pod.Instance.Address = record.Ready, ""
	if err := w.disk.Write(context.Background(), store.Change{PutSandbox: &w.pod, Create: true}); err != nil {
		t.Fatal(err)
	}
	return w
}

var (
	errDead   = errors.New("the daemon is dead")
	errStruck = errors.New("struck by the test")
)

func (w *world) effect(life int, name string, do func() error) error {
	w.mu.Lock()
	if life != w.life {
		w.mu.Unlock()
		return errDead
	}
	n := len(w.names)
	w.names = append(w.names, name)
	strike := w.strike
	w.mu.Unlock()
	var before, after error
	if strike != nil {
		before, after = strike(n, name)
	}
	if before != nil {
		return before
	}
	if err := do(); err != nil {
		return err
	}
	return after
}

func (w *world) crash() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.life++
}

func (w *world) left() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for id := range w.layers {
		out = append(out, "layer "+id)
	}
	for key := range w.views {
		out = append(out, "view "+key)
	}
	for id := range w.volume {
		out = append(out, "volumes "+id)
	}
	for id := range w.files {
		out = append(out, "files "+id)
	}
	for id := range w.fifos {
		out = append(out, "streams "+id)
	}
	for id := range w.starts {
		out = append(out, "note of a start "+id)
	}
	for _, id := range w.runtime.Alive() {
		out = append(out, "process "+id)
	}
	for _, id := range w.runtime.Known() {
		out = append(out, "task "+id)
	}
	sort.Strings(out)
	return out
}

// daemon is one life of the service.
type daemon struct {
	*container.Service
	w     *world
	store *store.Store
	bg    *lifecycle.Group
	ops   *operation.Table
	life  int
}

func (w *world) start() *daemon {
	w.t.Helper()
	d := &daemon{w: w, life: w.life, bg: lifecycle.New(context.Background()), ops: &operation.Table{}}
	s, damaged, err := store.Open(context.Background(), disk{d})
	if err != nil || len(damaged) > 0 {
		w.t.Fatalf("open store: %v, damaged %v", err, damaged)
	}
	d.store = s
	d.Service = container.New(container.Deps{
		Store: s.Containers, Sandboxes: s.Sandboxes, Images: images{}, Snapshots: snapshots{d}, Volumes: volumes{d}, Specs: generator{d},
		Tasks: tasks{d, runtime.New(w.runtime, w.runtime)}, Streams: streams{d}, Files: files{d}, Cgroups: cgroups{d}, Plugins: plugins{d}, Ops: d.ops, Background: d.bg,
	})
	w.t.Cleanup(func() { d.bg.Stop(context.Background()) })
	return d
}

type disk struct{ d *daemon }

func (x disk) Load(ctx context.Context) (store.Contents, error) { return x.d.w.disk.Load(ctx) }

func (x disk) Write(ctx context.Context, c store.Change) error {
	return x.d.w.effect(x.d.life, "write record", func() error {
		if c.DeleteContainer != "" {
			x.d.w.set(x.d.w.layers, c.DeleteContainer, false)
			x.d.w.collectViews(c.DeleteContainer)
		}
		return x.d.w.disk.Write(ctx, c)
	})
}

// collectViews is what becomes of the views that a container kept.
func (w *world) collectViews(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.DeleteFunc(w.views, func(key string, _ bool) bool { return strings.HasPrefix(key, id) })
}

func (x disk) WriteSoon(ctx context.Context, c store.Change) {
	_ = x.d.w.effect(x.d.life, "write record soon", func() error { return x.d.w.disk.Write(ctx, c) })
}

type images struct{}

func (images) Resolve(_ context.Context, spec *cri.ImageSpec, h record.Handler) (container.Image, error) {
	ref := spec.GetImage()
	if ref == "absent" {
		return container.Image{}, fmt.Errorf("image %q: %w", ref, errdefs.ErrNotFound)
	}
	kind := ""
	if ref == "artifact" {
		kind = "application/x-test"
	}
	return container.Image{Image: record.Image{ID: "sha256:1", Name: ref}, Artifact: kind, Parent: "chain", Snapshotter: "overlayfs", Handler: h}, nil
}

// snapshots: a layer is there or not.
type snapshots struct{ d *daemon }

func (x snapshots) Prepare(_ context.Context, _, key, _ string, _ *cri.UserNamespace) ([]mount.Mount, error) {
	return nil, x.d.w.effect(x.d.life, "prepare layer", func() error { x.d.w.set(x.d.w.layers, key, true); return nil })
}

func (x snapshots) View(_ context.Context, _, key, _ string, _ *cri.UserNamespace) ([]mount.Mount, error) {
	return nil, x.d.w.effect(x.d.life, "view image", func() error { x.d.w.set(x.d.w.views, key, true); return nil })
}

func (x snapshots) Mounts(_ context.Context, _, key string) ([]mount.Mount, error) {
	x.d.w.mu.Lock()
	defer x.d.w.mu.Unlock()
	if !x.d.w.layers[key] {
		return nil, errdefs.ErrNotFound
	}
	return nil, nil
}

func (w *world) set(m map[string]bool, id string, there bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if there {
		m[id] = true
	} else {
		delete(m, id)
	}
}

// volumes are there or not.
type volumes struct{ d *daemon }

func (x volumes) Mount(_ context.Context, id string, i int, _ []mount.Mount, sub string) (string, error) {
	err := x.d.w.effect(x.d.life, "mount image", func() error { x.d.w.set(x.d.w.volume, id, true); return nil })
	return fmt.Sprint("/volumes/", i, "/", sub), err
}

func (x volumes) Copy(_ context.Context, id string, _ []mount.Mount, paths []string) (made []facts.Mount, err error) {
	err = x.d.w.effect(x.d.life, "copy volumes", func() error { x.d.w.set(x.d.w.volume, id, true); return nil })
	for _, p := range paths {
		made = append(made, facts.Mount{Source: "/copy" + p, Destination: p})
	}
	return made, err
}

func (x volumes) Remove(_ context.Context, id string) error {
	return x.d.w.effect(x.d.life, "remove volumes", func() error { x.d.w.set(x.d.w.volume, id, false); return nil })
}

type generator struct{ d *daemon }

func (generator) Volumes(*cri.ContainerConfig, imagespec.ImageConfig) ([]string, error) {
	return []string{"/data"}, nil
}

func (x generator) Container(_ context.Context, req container.SpecRequest) (container.Spec, error) {
	var b []byte
	err := x.d.w.effect(x.d.life, "generate specification", func() (err error) {
		x.d.w.set(x.d.w.files, req.Container.ID, true)
		b, err = json.Marshal(specs.Spec{
			Process:     &specs.Process{Args: req.Container.Config.GetCommand()},
			Annotations: map[string]string{"io.kubernetes.cri.sandbox-id": req.Sandbox.ID},
			Linux:       &specs.Linux{CgroupsPath: "/test/" + req.Container.ID, Resources: &specs.LinuxResources{}},
		})
		return err
	})
	return container.Spec{JSON: b, StopSignal: "SIGTERM"}, err
}

func (generator) Update(s *specs.Spec, u *cri.LinuxContainerResources) (*specs.Spec, error) {
	if u.GetCpuQuota() < 0 {
		return nil, fmt.Errorf("linux.cpu_quota: %w", errdefs.ErrInvalidArgument)
	}
	out, linux := *s, *s.Linux
	r := &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: new(u.GetCpuQuota())}}
	if limit := u.GetMemoryLimitInBytes(); limit != 0 {
		r.Memory = &specs.LinuxMemory{Limit: &limit}
	}
	out.Linux, linux.Resources = &linux, r
	return &out, nil
}

// tasks puts the fake runtime, through the real package runtime, behind the
// service's interface.
type tasks struct {
	d *daemon
	*runtime.Tasks
}

func (x tasks) Create(ctx context.Context, req container.TaskRequest) (container.Task, error) {
	var t *runtime.Task
	err := x.d.w.effect(x.d.life, "create task", func() (err error) {
		t, err = x.Tasks.Create(ctx, runtime.CreateRequest{ID: req.Container.ID, Handler: req.Container.Handler, Spec: req.Container.Spec})
		return err
	})
	if err != nil {
		return nil, err
	}
	return task{x.d, t}, nil
}

func (x tasks) Get(ctx context.Context, id string) (container.Task, error) {
	t, err := x.Tasks.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	return task{x.d, t}, nil
}

func (x tasks) Reap(ctx context.Context, c record.Container) (e record.Exit, err error) {
	err = x.d.w.effect(x.d.life, "reap task", func() error { e, err = x.Tasks.Reap(ctx, c.ID, c.Spec); return err })
	return e, err
}

func (x tasks) EndProcesses(ctx context.Context, c record.Container) error {
	return x.d.w.effect(x.d.life, "end processes", func() error { return x.Tasks.EndProcesses(ctx, c.ID, c.Spec) })
}

func (x tasks) Release(ctx context.Context, c record.Container) error {
	return x.d.w.effect(x.d.life, "release task", func() error { return x.Tasks.Release(ctx, c.ID, c.Spec) })
}

type task struct {
	d *daemon
	*runtime.Task
}

func (t task) Start(ctx context.Context) error {
	return t.d.w.effect(t.d.life, "start task", func() error { return t.Task.Start(ctx) })
}

func (t task) Kill(ctx context.Context, sig syscall.Signal, all bool) error {
	return t.d.w.effect(t.d.life, "kill task", func() error { return t.Task.Kill(ctx, sig, all) })
}

func (t task) State(ctx context.Context) (container.TaskState, error) {
	s, err := t.Task.State(ctx)
	return container.TaskState{Status: container.TaskStatus(s.Status), Pid: s.Pid, Exit: s.Exit}, err
}

func (t task) Change(ctx context.Context, c container.Change) error {
	return t.d.w.effect(t.d.life, fmt.Sprintf("set quota %d%s", quotaOf(c.After.Linux.Resources), c.Annotations["test/mark"]), func() error {
		return t.Task.Change(ctx, runtime.Change(c))
	})
}

func quotaOf(r *specs.LinuxResources) int64 {
	if r == nil || r.CPU == nil || r.CPU.Quota == nil {
		return 0
	}
	return *r.CPU.Quota
}

func (t task) Exec(ctx context.Context, req container.ExecRequest) (container.Exec, error) {
	e, err := t.Task.Exec(ctx, req.ID, runtime.ExecRequest{Process: req.Process, Score: req.Score, Spec: req.Spec})
	if err != nil {
		return nil, err
	}
	return e, nil
}

type cgroups struct{ d *daemon }

func (x cgroups) OOMKilled(c record.Container) (bool, error) {
	x.d.w.mu.Lock()
	defer x.d.w.mu.Unlock()
	return x.d.w.oom[c.ID], nil
}

func (x cgroups) Follow(record.Container) error { return nil }
func (x cgroups) Forget(string)                 {}

// used is the memory that every container uses.
const used = 1000

func (x cgroups) WorkingSet(record.Container) (uint64, bool, error) { return used, true, nil }

// files come with the specification.
type files struct{ d *daemon }

func (x files) RemoveContainer(_ context.Context, c record.Container) error {
	return x.d.w.effect(x.d.life, "remove files", func() error { x.d.w.set(x.d.w.files, c.ID, false); return nil })
}

// streams: there or not, and how often drained.
type streams struct{ d *daemon }

func (x streams) Open(_ context.Context, c record.Container, _ container.CloseStdin) (container.Stream, error) {
	err := x.d.w.effect(x.d.life, "open streams", func() error { x.d.w.set(x.d.w.fifos, c.ID, true); return nil })
	return stream{x.d, c.ID}, err
}

func (x streams) Reattach(_ context.Context, c record.Container, _ container.CloseStdin) (container.Stream, error) {
	err := x.d.w.effect(x.d.life, "reattach streams", func() error {
		x.d.w.mu.Lock()
		defer x.d.w.mu.Unlock()
		if !x.d.w.fifos[c.ID] {
			return errdefs.ErrNotFound
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return stream{x.d, c.ID}, nil
}

func (x streams) NoteStart(_ context.Context, id string) error {
	return x.d.w.effect(x.d.life, "note the start", func() error {
		x.d.w.mu.Lock()
		defer x.d.w.mu.Unlock()
		x.d.w.starts[id] = time.Now()
		return nil
	})
}

func (x streams) NotedStart(id string) (time.Time, error) {
	x.d.w.mu.Lock()
	defer x.d.w.mu.Unlock()
	return x.d.w.starts[id], nil
}

func (x streams) Remove(_ context.Context, id string) error {
	return x.d.w.effect(x.d.life, "remove streams", func() error {
		x.d.w.set(x.d.w.fifos, id, false)
		x.d.w.mu.Lock()
		defer x.d.w.mu.Unlock()
		delete(x.d.w.starts, id)
		return nil
	})
}

func (x streams) Session(context.Context, string, string, container.Connection, container.CloseStdin) (container.Session, error) {
	return silence{}, nil
}

func (x streams) Capture(context.Context, string, string) (container.Capture, error) {
	return silence{}, nil
}

func (x streams) Execs(id string) ([]string, error) {
	x.d.w.mu.Lock()
	defer x.d.w.mu.Unlock()
	return x.d.w.execs[id], nil
}

func (x streams) Left(context.Context, string, string) (container.Session, error) {
	return silence{}, nil
}

type silence struct{}

func (silence) Endpoints() container.Endpoints { return container.Endpoints{} }
func (silence) Finish(context.Context) error   { return nil }
func (silence) Close() error                   { return nil }
func (silence) Output() (stdout, stderr []byte, dropped uint64) {
	return []byte("out"), nil, 0
}

type stream struct {
	d  *daemon
	id string
}

func (s stream) Endpoints() container.Endpoints                     { return container.Endpoints{} }
func (s stream) Reopen(context.Context, string) error               { return nil }
func (s stream) Attach(context.Context, container.Connection) error { return nil }
func (s stream) Drain(context.Context) error {
	s.d.w.mu.Lock()
	defer s.d.w.mu.Unlock()
	s.d.w.logged[s.id]++
	return nil
}

func (s stream) Close(context.Context) error {
	s.d.w.set(s.d.w.fifos, s.id, false)
	return nil
}

// plugins can refuse a container and its start, and want a quota of 7 where 6
// is asked for; the rest they hear of.
type plugins struct{ d *daemon }

func (x plugins) CreateContainer(_ context.Context, _ record.Sandbox, c record.Container) (spec []byte, err error) {
	x.d.w.hear(facts.ContainerCreate)
	err = x.d.w.effect(x.d.life, "ask plugins about a container", func() error { spec = c.Spec; return nil })
	return spec, err
}

func (x plugins) UpdateContainer(_ context.Context, _ record.Sandbox, _ record.Container, u facts.Update) (*cri.LinuxContainerResources, error) {
	x.d.w.hear(facts.ContainerUpdate)
	if u.Resources.GetCpuQuota() == 6 {
		return &cri.LinuxContainerResources{CpuQuota: 7}, nil
	}
	return u.Resources, nil
}

func (x plugins) TellContainer(_ context.Context, e facts.PluginEvent, _ record.Sandbox, _ record.Container) error {
	x.d.w.hear(e)
	if e != facts.ContainerStart {
		return nil
	}
	return x.d.w.effect(x.d.life, "ask plugins about a start", func() error { return nil })
}

func (plugins) Hold() func() { return func() {} }

func (w *world) hear(e facts.PluginEvent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.told = append(w.told, e)
}

func (w *world) heard() []facts.PluginEvent {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.told)
}

func (d *daemon) request(command ...string) container.Request {
	return container.Request{SandboxID: d.w.pod.ID, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: "busybox"}, Command: command,
		Mounts: []*cri.Mount{{ContainerPath: "/model", Image: &cri.ImageSpec{Image: "model"}, ImageSubPath: "a"}},
	}}
}

func (d *daemon) clean() {
	d.w.t.Helper()
	if l := d.w.left(); len(l) > 0 {
		d.w.t.Errorf("left on the node: %s", strings.Join(l, ", "))
	}
	if l := d.store.Containers.List(); len(l) > 0 {
		d.w.t.Errorf("left in the records: %d, first %s", len(l), l[0].Phase)
	}
	all, err := d.w.disk.Load(context.Background())
	if err != nil || len(all.Containers) > 0 {
		d.w.t.Errorf("left on disk: %d %v", len(all.Containers), err)
	}
}
