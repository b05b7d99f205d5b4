package sandboxer_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/sandboxer"
	"github.com/gantry-cri/gantry/plugin/sandboxer/sandboxertest"
)

// controller behaves as containerd's "shim" sandbox controller: an unknown
// sandbox has a status without a state, shutting one down is NotFound, and one
// whose shim died is known a little longer, with its connection closed.
type controller struct {
	mu     sync.Mutex
	all    map[string]*vm
	netns  string
	config cri.PodSandboxConfig
	silent bool
}

type vm struct {
	started bool
	done    chan struct{}
	died    chan struct{}
	asked   int // status calls since the shim died
}

func (v *vm) ended() bool { return closed(v.done) }

func closed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (c *controller) get(id string) *vm {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all[id]
}

func (c *controller) Create(_ context.Context, sb sandbox.Sandbox, opts ...sandbox.CreateOpt) error {
	var o sandbox.CreateOptions
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all[sb.ID] != nil {
		return fmt.Errorf("sandbox %s already running: %w", sb.ID, errdefs.ErrAlreadyExists)
	}
	c.netns = o.NetNSPath
	if err := typeurl.UnmarshalTo(o.Options, &c.config); err != nil {
		return err
	}
	c.all[sb.ID] = &vm{done: make(chan struct{}), died: make(chan struct{})}
	return nil
}

func (c *controller) Start(_ context.Context, id string) (sandbox.ControllerInstance, error) {
	v := c.get(id)
	if v == nil {
		return sandbox.ControllerInstance{}, fmt.Errorf("unable to find sandbox %q", id)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	v.started = true
	return sandbox.ControllerInstance{SandboxID: id, Pid: 7, Address: "ttrpc+unix:///run/x", Version: 3, CreatedAt: time.Unix(0, 0)}, nil
}

func (c *controller) Wait(ctx context.Context, id string) (sandbox.ExitStatus, error) {
	v := c.get(id)
	if v == nil {
		return sandbox.ExitStatus{}, errdefs.ErrNotFound
	}
	if closed(v.died) {
		return sandbox.ExitStatus{}, fmt.Errorf("failed to wait: %w", ttrpc.ErrClosed)
	}
	select {
	case <-v.done:
		return sandbox.ExitStatus{ExitStatus: 9, ExitedAt: time.Now()}, nil
	case <-v.died:
		return sandbox.ExitStatus{}, fmt.Errorf("failed to wait: %w", ttrpc.ErrClosed)
	case <-ctx.Done():
		return sandbox.ExitStatus{}, ctx.Err()
	}
}

func (c *controller) Stop(_ context.Context, id string, _ ...sandbox.StopOpt) error {
	v := c.get(id)
	if v == nil {
		return nil
	}
	if closed(v.died) {
		return fmt.Errorf("failed to stop sandbox: %w", ttrpc.ErrClosed)
	}
	c.end(v)
	return nil
}

func (c *controller) end(v *vm) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !v.ended() {
		close(v.done)
	}
}

func (c *controller) Shutdown(_ context.Context, id string) error {
	v := c.get(id)
	if v == nil {
		return errdefs.ErrNotFound
	}
	if closed(v.died) {
		return fmt.Errorf("failed to shutdown sandbox: %w", ttrpc.ErrClosed)
	}
	c.end(v)
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.all, id)
	return nil
}

func (c *controller) Status(ctx context.Context, id string, _ bool) (sandbox.ControllerStatus, error) {
	v := c.get(id)
	if c.silent {
		<-ctx.Done()
		return sandbox.ControllerStatus{}, errors.New("flattened")
	}
	if v == nil {
		return sandbox.ControllerStatus{SandboxID: id, ExitedAt: time.Now()}, nil
	}
	if closed(v.died) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if v.asked++; v.asked > 2 {
			delete(c.all, id)
		}
		return sandbox.ControllerStatus{}, fmt.Errorf("failed to query: %w", ttrpc.ErrClosed)
	}
	st := sandbox.ControllerStatus{SandboxID: id, Pid: 7, State: cri.PodSandboxState_SANDBOX_READY.String()}
	if v.ended() {
		st.State, st.ExitedAt = cri.PodSandboxState_SANDBOX_NOTREADY.String(), time.Now()
	}
	return st, nil
}

func newController() *controller { return &controller{all: map[string]*vm{}} }

func pod(id string) record.Sandbox {
	return record.Sandbox{
		ID:      id,
		Config:  &cri.PodSandboxConfig{Hostname: "h-" + id},
		Network: record.Network{NetNS: "/run/netns/" + id},
		Handler: record.Handler{Name: "kata", Runtime: "io.containerd.kata.v2", Sandboxer: record.SandboxerShim},
	}
}

func TestShim(t *testing.T) {
	sandboxertest.Suite(t, func(t *testing.T) sandboxertest.Subject {
		c := newController()
		return sandboxertest.Subject{
			Sandboxer: sandboxer.NewShim(c, sandboxer.Options{}), Context: t.Context(),
			Record: func(_ *testing.T, id string) record.Sandbox { return pod(id) },
			Exit:   func(_ *testing.T, sb record.Sandbox) { c.end(c.get(sb.ID)) },
			Lose:   func(_ *testing.T, sb record.Sandbox) { close(c.get(sb.ID).died) },
			Remains: func(t *testing.T, id string) {
				if c.get(id) != nil {
					t.Errorf("the controller still has %s", id)
				}
			},
		}
	})
}

func TestShimStart(t *testing.T) {
	c := newController()
	inst, err := sandboxer.NewShim(c, sandboxer.Options{}).Start(t.Context(), pod("a"))
	if err != nil {
		t.Fatal(err)
	}
	if inst.Address != "ttrpc+unix:///run/x" || inst.Version != 3 || inst.Pid != 7 || time.Since(inst.StartedAt) > time.Minute {
		t.Errorf("instance %+v", inst)
	}
	if c.netns != "/run/netns/a" || c.config.GetHostname() != "h-a" {
		t.Errorf("the controller got netns %q and configuration %v", c.netns, &c.config)
	}
}

// A shim is told all settings of the pod; the record keeps what was asked for.
func TestShimSysctls(t *testing.T) {
	c := newController()
	sb := pod("a")
	s := sandboxer.NewShim(c, sandboxer.Options{Sysctls: func(*cri.PodSandboxConfig) (map[string]string, error) {
		return map[string]string{"net.core.somaxconn": "7"}, nil
	}})
	if _, err := s.Start(t.Context(), sb); err != nil {
		t.Fatal(err)
	}
	if got := c.config.GetLinux().GetSysctls(); len(got) != 1 || got["net.core.somaxconn"] != "7" || sb.Config.GetLinux() != nil {
		t.Errorf("the controller got %v, the pod has %v", got, sb.Config)
	}
}

// forgetful is a controller whose shim answers and does not know the sandbox.
type forgetful struct{ *controller }

func (forgetful) Status(context.Context, string, bool) (sandbox.ControllerStatus, error) {
	return sandbox.ControllerStatus{}, fmt.Errorf("failed to query: %w", errgrpc.ToGRPC(errdefs.ErrNotFound))
}

// What a shim that answers does not know does not run.
func TestShimForgot(t *testing.T) {
	s := sandboxer.NewShim(forgetful{newController()}, sandboxer.Options{})
	if alive, err := s.Alive(t.Context(), pod("a")); alive || err != nil {
		t.Errorf("alive: %t, %v", alive, err)
	}
}

// hung is a controller whose shim never comes up.
type hung struct{ *controller }

func (hung) Create(ctx context.Context, _ sandbox.Sandbox, _ ...sandbox.CreateOpt) error {
	<-ctx.Done()
	return context.Cause(ctx)
}

// A handler's own time ends a start that hangs.
func TestShimStartLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := func(h record.Handler) time.Duration { return map[string]time.Duration{"kata": time.Second}[h.Name] }
		s := sandboxer.NewShim(hung{newController()}, sandboxer.Options{StartLimit: limit})
		for name, want := range map[string]time.Duration{"kata": time.Second, "other": 2 * time.Minute} {
			sb, begun := pod("a"), time.Now()
			sb.Handler.Name = name
			if _, err := s.Start(t.Context(), sb); !errdefs.IsDeadlineExceeded(err) {
				t.Errorf("%s: %v", name, err)
			}
			if took := time.Since(begun); took != want {
				t.Errorf("%s took %s, want %s", name, took, want)
			}
		}
	})
}

// A controller that does not answer says nothing of a sandbox's death.
func TestShimSilent(t *testing.T) {
	c := newController()
	s := sandboxer.NewShim(c, sandboxer.Options{})
	if _, err := s.Start(t.Context(), pod("a")); err != nil {
		t.Fatal(err)
	}
	c.silent = true
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if alive, err := s.Alive(ctx, pod("a")); alive || !errdefs.IsDeadlineExceeded(err) {
		t.Errorf("alive: %t, %v", alive, err)
	}
}

func TestDispatch(t *testing.T) {
	pause, shim := sandboxertest.New(), sandboxertest.New()
	d := sandboxer.Dispatch(map[string]sandboxer.Sandboxer{record.SandboxerPod: pause, "vm": shim})
	for handler, want := range map[string]*sandboxertest.Fake{"": pause, record.SandboxerPod: pause, "vm": shim} {
		sb := record.Sandbox{ID: "id-" + handler, Handler: record.Handler{Sandboxer: handler}}
		if _, err := d.Start(t.Context(), sb); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Wait(t.Context(), sb); err != nil {
			t.Error(err)
		}
		if alive, err := d.Alive(t.Context(), sb); err != nil || !alive {
			t.Errorf("alive: %t, %v", alive, err)
		}
		if len(want.Running()) != 1 {
			t.Errorf("sandboxer %q: %v run", handler, want.Running())
		}
		if err := d.Stop(t.Context(), sb); err != nil {
			t.Error(err)
		}
		if err := d.Shutdown(t.Context(), sb); err != nil {
			t.Error(err)
		}
		if len(want.Held()) != 0 {
			t.Errorf("sandboxer %q: %v held", handler, want.Held())
		}
	}
	unknown := record.Sandbox{ID: "x", Handler: record.Handler{Name: "h", Sandboxer: "gone"}}
	if _, err := d.Start(t.Context(), unknown); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start with an unknown sandboxer: %v", err)
	}
	if err := d.Shutdown(t.Context(), unknown); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("shutdown with an unknown sandboxer: %v", err)
	}
}
