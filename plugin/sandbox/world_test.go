package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/network"
	"github.com/gantry-cri/gantry/plugin/network/networktest"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/sandbox"
	"github.com/gantry-cri/gantry/plugin/store"
	"github.com/gantry-cri/gantry/plugin/store/storetest"
)

func TestMain(m *testing.M) {
	log.SetLevel("panic") // the faults are the tests' own
	m.Run()
}

// world is a node in memory: what is on its disk and what exists in its kernel.
// The service under test is killed and started again inside it. Every effect
// on the world passes through effect, which is where faults happen.
type world struct {
	t    *testing.T
	disk *storetest.Memory
	net  *networktest.Fake

	mu        sync.Mutex
	silence   error // of shims, nil while they answer
	files     map[string]bool
	userns    map[string]bool
	instances map[string]chan record.Exit
	names     []string // of the effects so far
	told      []facts.PluginEvent
	strike    func(n int, name string) (before, after error)
	life      int // which start of the daemon is current
}

func newWorld(t *testing.T) *world {
	return &world{t: t, disk: storetest.NewMemory(), net: networktest.NewFake(), files: map[string]bool{}, userns: map[string]bool{}, instances: map[string]chan record.Exit{}}
}

var errDead = errors.New("the daemon is dead")

// effect does something to the world for the daemon of that life.
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

// crash ends the daemon's life: nothing it still tries happens.
func (w *world) crash() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.life++
}

// left lists what exists besides records.
func (w *world) left() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for id := range w.files {
		out = append(out, "files "+id)
	}
	for id := range w.userns {
		out = append(out, "user namespace "+id)
	}
	for id := range w.instances {
		out = append(out, "instance "+id)
	}
	out = append(out, w.net.Held()...)
	sort.Strings(out)
	return out
}

// daemon is one life of the service.
type daemon struct {
	*sandbox.Service
	w     *world
	store *store.Store
	bg    *lifecycle.Group
	ops   *operation.Table
	life  int
}

// start begins a life with what is on disk.
func (w *world) start() *daemon {
	w.t.Helper()
	d := &daemon{w: w, life: w.life, bg: lifecycle.New(context.Background()), ops: &operation.Table{}}
	s, damaged, err := store.Open(context.Background(), disk{d})
	if err != nil || len(damaged) > 0 {
		w.t.Fatalf("open store: %v, damaged %v", err, damaged)
	}
	d.store = s
	d.Service = sandbox.New(sandbox.Deps{
		Store: s.Sandboxes, Handlers: handlers{}, Labels: labels{}, Files: files{d}, UserNS: userNamespaces{d}, Network: connector{d}, Instances: instances{d},
		Shims: shims{d}, Containers: containers{d}, Plugins: plugins{d}, Ops: d.ops, Background: d.bg,
	})
	w.t.Cleanup(func() { d.bg.Stop(context.Background()) })
	return d
}

type disk struct{ d *daemon }

func (x disk) Load(ctx context.Context) (store.Contents, error) { return x.d.w.disk.Load(ctx) }

func (x disk) Write(ctx context.Context, c store.Change) error {
	return x.d.w.effect(x.d.life, "write record", func() error { return x.d.w.disk.Write(ctx, c) })
}

func (x disk) WriteSoon(ctx context.Context, c store.Change) { _ = x.Write(ctx, c) }

// noUserNS is a handler whose pods can have no user namespace.
const noUserNS = "old"

type handlers struct{}

func (handlers) Lookup(name string) (record.Handler, error) {
	if name == noUserNS {
		return record.Handler{Name: name, Runtime: "old", Sandboxer: record.SandboxerPod}, nil
	}
	if name == "" || name == "runc" {
		return record.Handler{Name: "runc", Runtime: "io.containerd.runc.v2", Sandboxer: record.SandboxerPod, Snapshotter: "overlayfs"}, nil
	}
	return record.Handler{}, fmt.Errorf("runtime handler %q: %w", name, errdefs.ErrNotFound)
}

func (handlers) Charge(sb record.Sandbox) (record.Handler, error) { return sb.Handler, nil }

func (handlers) AdmitUserNS(_ context.Context, name string) error {
	if name == noUserNS {
		return fmt.Errorf("no user namespaces: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// userNamespaces are made with the network namespace inside, as the real ones.
type userNamespaces struct{ d *daemon }

func (x userNamespaces) Create(_ context.Context, sb record.Sandbox, adopt func(string) error) error {
	return x.d.w.effect(x.d.life, "create user namespace", func() error {
		if adopt != nil {
			if err := adopt("/proc/1/ns/net"); err != nil {
				return err
			}
		}
		x.d.w.set(x.d.w.userns, sb.ID, true)
		return nil
	})
}

func (x userNamespaces) Remove(_ context.Context, sb record.Sandbox) error {
	if sb.UserNS() == nil {
		return nil
	}
	return x.d.w.effect(x.d.life, "remove user namespace", func() error { x.d.w.set(x.d.w.userns, sb.ID, false); return nil })
}

// labels are those of a machine without SELinux.
type labels struct{}

func (labels) Allocate(record.Sandbox) (record.Labels, error) { return record.Labels{}, nil }

func (labels) Settled(string) {}

type files struct{ d *daemon }

func (x files) Create(_ context.Context, sb record.Sandbox) error {
	return x.d.w.effect(x.d.life, "create files", func() error { x.d.w.set(x.d.w.files, sb.ID, true); return nil })
}

func (x files) Remove(_ context.Context, sb record.Sandbox) error {
	return x.d.w.effect(x.d.life, "remove files", func() error { x.d.w.set(x.d.w.files, sb.ID, false); return nil })
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

// connector puts the fake network, which has its own contract suite, behind
// the service's interface.
type connector struct{ d *daemon }

func attachment(sb record.Sandbox) network.Attachment {
	return network.Attachment{ID: sb.ID, Pod: sb.Config}
}

func (x connector) NSPath(id string) string { return x.d.w.net.NSPath(id) }

func (x connector) Await(ctx context.Context, _ record.Sandbox) error {
	return x.d.w.effect(x.d.life, "await network", func() error { return ctx.Err() })
}

func (x connector) CreateNS(ctx context.Context, id string) (path string, err error) {
	err = x.d.w.effect(x.d.life, "create netns", func() error { path, err = x.d.w.net.CreateNS(ctx, id); return err })
	return path, err
}

func (x connector) PinNS(ctx context.Context, id, source string) (path string, err error) {
	err = x.d.w.effect(x.d.life, "pin netns", func() error { path, err = x.d.w.net.PinNS(ctx, id, source); return err })
	return path, err
}

func (x connector) Attach(ctx context.Context, sb record.Sandbox) (n record.Network, err error) {
	err = x.d.w.effect(x.d.life, "attach network", func() error {
		n, err = x.d.w.net.Attach(ctx, attachment(sb), sb.Network.NetNS)
		return err
	})
	return n, err
}

func (x connector) Detach(ctx context.Context, sb record.Sandbox) error {
	return x.d.w.effect(x.d.life, "detach network", func() error { return x.d.w.net.Detach(ctx, attachment(sb)) })
}

type instances struct{ d *daemon }

func (x instances) Start(_ context.Context, sb record.Sandbox) (record.Instance, error) {
	err := x.d.w.effect(x.d.life, "start instance", func() error {
		x.d.w.mu.Lock()
		defer x.d.w.mu.Unlock()
		x.d.w.instances[sb.ID] = make(chan record.Exit, 1)
		return nil
	})
	return record.Instance{Pid: 1, StartedAt: time.Now()}, err
}

func (x instances) Wait(_ context.Context, sb record.Sandbox) (<-chan record.Exit, error) {
	var exit chan record.Exit
	err := x.d.w.effect(x.d.life, "wait for instance", func() error {
		x.d.w.mu.Lock()
		defer x.d.w.mu.Unlock()
		var ok bool
		if exit, ok = x.d.w.instances[sb.ID]; !ok {
			return errdefs.ErrNotFound
		}
		return nil
	})
	return exit, err
}

func (x instances) Stop(_ context.Context, sb record.Sandbox) error {
	return x.d.w.effect(x.d.life, "stop instance", func() error {
		if err := x.d.w.answer(); err != nil {
			return err
		}
		x.d.w.end(sb.ID, 137)
		return nil
	})
}

// answer fails while the shims are silent.
func (w *world) answer() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.silence
}

// shims: all are silent or none is.
type shims struct{ d *daemon }

func (x shims) EndSilent(context.Context, record.Sandbox) error {
	return x.d.w.effect(x.d.life, "end silent shim", func() error {
		x.d.w.mu.Lock()
		defer x.d.w.mu.Unlock()
		if x.d.w.silence == nil {
			return fmt.Errorf("it answers: %w", errdefs.ErrFailedPrecondition)
		}
		x.d.w.silence = nil
		return nil
	})
}

func (x instances) Shutdown(_ context.Context, sb record.Sandbox) error {
	return x.d.w.effect(x.d.life, "shut instance down", func() error { x.d.w.end(sb.ID, 137); return nil })
}

func (x instances) Alive(_ context.Context, sb record.Sandbox) (alive bool, err error) {
	err = x.d.w.effect(x.d.life, "look at instance", func() error {
		x.d.w.mu.Lock()
		defer x.d.w.mu.Unlock()
		_, alive = x.d.w.instances[sb.ID]
		return nil
	})
	return alive, err
}

// end lets an instance exit.
func (w *world) end(id string, code uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if exit, ok := w.instances[id]; ok {
		exit <- record.Exit{Code: code, At: time.Now()}
		delete(w.instances, id)
	}
}

// containers: pods in these tests have none; what is tested is that they are
// asked for at the right time.
type containers struct{ d *daemon }

func (x containers) StopAll(context.Context, string) error {
	return x.d.w.effect(x.d.life, "stop containers", func() error { return x.d.w.answer() })
}

func (x containers) RemoveAll(context.Context, string) error {
	return x.d.w.effect(x.d.life, "remove containers", func() error { return nil })
}

// plugins can refuse a pod, and hear of the rest.
type plugins struct{ d *daemon }

func (x plugins) TellPod(_ context.Context, e facts.PluginEvent, _ record.Sandbox) error {
	x.d.w.hear(e)
	if e != facts.PodRun {
		return nil
	}
	return x.d.w.effect(x.d.life, "ask plugins", func() error { return nil })
}

func (x plugins) UpdatePod(context.Context, record.Sandbox, *cri.LinuxContainerResources, *cri.LinuxContainerResources) error {
	x.d.w.hear(facts.PodUpdate)
	return nil
}

func (plugins) Hold() func() { return func() {} }

func (w *world) hear(e facts.PluginEvent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.told = append(w.told, e)
}

func pod(name string) sandbox.Request {
	return sandbox.Request{Config: &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Name: name, Uid: "u-" + name, Namespace: "ns"}}}
}

// withUserNS gives the pod a user namespace of its own.
func withUserNS(r sandbox.Request) sandbox.Request {
	one := []*cri.IDMapping{{HostId: 100000, Length: 65536}}
	r.Config.Linux = &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
		NamespaceOptions: &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Uids: one, Gids: one}},
	}}
	return r
}

// withHostPort gives the pod a port of the node.
func withHostPort(r sandbox.Request) sandbox.Request {
	r.Config.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: 8080}}
	return r
}

// clean fails the test unless neither things nor records are left.
func (d *daemon) clean() {
	d.w.t.Helper()
	if l := d.w.left(); len(l) > 0 {
		d.w.t.Errorf("left on the node: %s", strings.Join(l, ", "))
	}
	if l := d.store.Sandboxes.List(); len(l) > 0 {
		d.w.t.Errorf("left in the records: %+v", l)
	}
	all, err := d.w.disk.Load(context.Background())
	if err != nil || len(all.Sandboxes) > 0 {
		d.w.t.Errorf("left on disk: %d sandboxes, first %s %v", len(all.Sandboxes), all.Sandboxes[0].Phase, err)
	}
}
