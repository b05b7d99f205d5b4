package pool_test

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/deprecation"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/plugins/services/warning"
	"github.com/containerd/errdefs"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	"github.com/gantry-cri/gantry/plugin/runtime"
	"github.com/gantry-cri/gantry/plugin/runtime/pool"
	"github.com/gantry-cri/gantry/plugin/runtime/shimtest"
)

type noWarnings struct{}

func (noWarnings) Emit(context.Context, deprecation.Warning) {}
func (noWarnings) Warnings() []warning.Warning               { return nil }

type noMounts struct{ mount.Manager }

func (noMounts) Activate(context.Context, string, []mount.Mount, ...mount.ActivateOpt) (mount.ActivationInfo, error) {
	return mount.ActivationInfo{}, errdefs.ErrNotImplemented
}
func (noMounts) Deactivate(context.Context, string) error { return errdefs.ErrNotFound }

// daemonContext is what containerd starts the plugin with.
func daemonContext(t *testing.T, env *shimtest.Env, r plugin.Registration) *plugin.InitContext {
	t.Helper()
	shims, err := env.Shims()
	if err != nil {
		t.Fatal(err)
	}
	set := plugin.NewPluginSet()
	for _, p := range []struct {
		kind     plugin.Type
		id       string
		instance any
	}{
		{plugins.ShimPlugin, "manager", shims}, {plugins.MetadataPlugin, "bolt", env.DB}, {plugins.EventPlugin, "exchange", env.Events},
		{plugins.WarningPlugin, "deprecations", noWarnings{}}, {plugins.MountManagerPlugin, "bolt", noMounts{}},
	} {
		started := plugin.Registration{Type: p.kind, ID: p.id, InitFn: func(*plugin.InitContext) (any, error) { return p.instance, nil }}
		if err := set.Add(started.Init(plugin.NewContext(t.Context(), set, nil))); err != nil {
			t.Fatal(err)
		}
	}
	ic := plugin.NewContext(env.Context(t), set, map[string]string{
		plugins.PropertyRootDir: env.Root, plugins.PropertyStateDir: env.State,
		plugins.PropertyGRPCAddress: env.GRPCAddress(), plugins.PropertyTTRPCAddress: env.Address(),
	})
	ic.Config = r.Config
	return ic
}

func registered(t *testing.T) plugin.Registration {
	t.Helper()
	for _, r := range registry.Graph(func(*plugin.Registration) bool { return false }) {
		if r.Type == plugins.RuntimePluginV2 && r.ID == "task" {
			return r
		}
	}
	t.Fatal("containerd has no task runtime")
	return plugin.Registration{}
}

// install is done once for a process.
var install = sync.OnceValue(func() error { return pool.Install(shimtest.Namespace) })

// The plugin in a daemon runs the namespace's tasks in directories of its own
// and leaves the others where they always were.
func TestInstall(t *testing.T) {
	if err := install(); err != nil {
		t.Fatal(err)
	}
	env := shimtest.New(t)
	r := registered(t)
	instance, err := r.InitFn(daemonContext(t, env, r))
	if err != nil {
		t.Fatal(err)
	}
	p := instance.(*pool.Pool)
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	cgs, err := runtime.NewHierarchies()
	if err != nil {
		t.Fatal(err)
	}
	tasks := runtime.New(p, cgs)
	for ns, dir := range map[string]string{shimtest.Namespace: filepath.Join(".gantry", "1"), "elsewhere": ""} {
		ctx := namespaces.WithNamespace(t.Context(), ns)
		if err := env.Record(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		spec, err := env.Spec("a", "", forever...)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tasks.Create(ctx, runtime.CreateRequest{ID: "a", Handler: env.Handler, Spec: spec}); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(env.State, dir, ns, "a", "config.json")); err != nil {
			t.Errorf("namespace %s: %v", ns, err)
		}
		if list, err := p.Tasks(ctx, false); err != nil || len(list) != 1 {
			t.Errorf("namespace %s has tasks %v, %v", ns, list, err)
		}
		if _, err := p.Tasks(ctx, true); err != nil {
			t.Error(err)
		}
		if err := tasks.Release(ctx, "a", spec); err != nil {
			t.Error(err)
		}
		if _, err := tasks.Get(ctx, "a"); !errdefs.IsNotFound(err) {
			t.Errorf("get after release: %v", err)
		}
	}
}
