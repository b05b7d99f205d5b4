package pool

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/events/exchange"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	crt "github.com/containerd/containerd/v2/core/runtime"
	v2 "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	"github.com/gantry-cri/gantry/plugin/lifecycle"
)

// Install puts a Pool for the namespace in the place of containerd's task
// runtime, of which it is then made. Call it before the daemon starts its
// plugins, once.
func Install(namespace string) error {
	installed := false
	// The filter of the graph is where a registration can be reached.
	registry.Graph(func(r *plugin.Registration) bool {
		if r.Type == plugins.RuntimePluginV2 && r.ID == "task" {
			stock := r.InitFn
			r.InitFn = func(ic *plugin.InitContext) (any, error) { return initPlugin(ic, namespace, stock) }
			installed = true
		}
		return false
	})
	if !installed {
		return fmt.Errorf("install the task runtime: containerd has no plugin %s.task: %w", plugins.RuntimePluginV2, errdefs.ErrFailedPrecondition)
	}
	installController()
	return nil
}

// installController puts a Controller in the place of containerd's sandbox
// controller "shim", if there is one.
func installController() {
	registry.Graph(func(r *plugin.Registration) bool {
		if r.Type == plugins.SandboxControllerPlugin && r.ID == "shim" {
			stock := r.InitFn
			r.Requires = append(slices.Clone(r.Requires), plugins.RuntimePluginV2)
			r.InitFn = func(ic *plugin.InitContext) (any, error) { return initController(ic, stock) }
		}
		return false
	})
}

func initController(ic *plugin.InitContext, stock func(*plugin.InitContext) (any, error)) (any, error) {
	c, err := stock(ic)
	if err != nil {
		return nil, err
	}
	rt, err := ic.GetSingle(plugins.RuntimePluginV2)
	if err != nil {
		return nil, fmt.Errorf("get task runtime: %w", err)
	}
	controller, known := c.(sandbox.Controller)
	p, pooled := rt.(*Pool)
	if !known || !pooled {
		return nil, fmt.Errorf("a %T over a %T: %w", c, rt, errdefs.ErrInternal)
	}
	return NewController(p, controller), nil
}

// directory is the pool's own beneath the stock runtime's, which takes those
// with a dot for none of its own.
const directory = ".gantry"

func initPlugin(ic *plugin.InitContext, namespace string, stock func(*plugin.InitContext) (any, error)) (any, error) {
	o := Options{
		Namespace:  namespace,
		Root:       filepath.Join(ic.Properties[plugins.PropertyRootDir], directory),
		State:      filepath.Join(ic.Properties[plugins.PropertyStateDir], directory),
		Background: lifecycle.New(ic.Context),
		Daemon: Daemon{
			GRPCAddress:  ic.Properties[plugins.PropertyGRPCAddress],
			TTRPCAddress: ic.Properties[plugins.PropertyTTRPCAddress],
		},
	}
	if err := o.borrow(ic); err != nil {
		return nil, err
	}
	var err error
	if o.Stock, err = runtimeOf(stock(ic)); err != nil {
		return nil, err
	}
	o.New = func(root, state string) (crt.PlatformRuntime, error) {
		own := *ic
		own.Properties = maps.Clone(ic.Properties)
		own.Properties[plugins.PropertyRootDir], own.Properties[plugins.PropertyStateDir] = root, state
		own.Meta = &plugin.Meta{Exports: map[string]string{}}
		return runtimeOf(stock(&own))
	}
	return New(ic.Context, o)
}

// borrow takes what the pool needs from the plugins that the stock runtime
// requires, themselves or through another.
func (o *Options) borrow(ic *plugin.InitContext) error {
	shims, err := ic.GetSingle(plugins.ShimPlugin)
	if err != nil {
		return fmt.Errorf("get shim manager: %w", err)
	}
	if m, ok := shims.(*v2.ShimManager); ok {
		o.Daemon.Env = m.Env()
	}
	// The manager has put its default there.
	if c, ok := ic.Plugins().Get(plugins.ShimPlugin, "manager").Config.(*v2.ShimConfig); ok {
		o.Daemon.SocketDir = c.SocketDir
	}
	db, err := ic.GetSingle(plugins.MetadataPlugin)
	if err != nil {
		return fmt.Errorf("get metadata database: %w", err)
	}
	o.Containers = metadata.NewContainerStore(db.(*metadata.DB))
	events, err := ic.GetByID(plugins.EventPlugin, "exchange")
	if err != nil {
		return fmt.Errorf("get event exchange: %w", err)
	}
	o.Events = events.(*exchange.Exchange)
	if mounts, err := ic.GetSingle(plugins.MountManagerPlugin); err == nil {
		o.Mounts, _ = mounts.(mount.Manager)
	}
	return nil
}

func runtimeOf(v any, err error) (crt.PlatformRuntime, error) {
	if err != nil {
		return nil, err
	}
	rt, ok := v.(crt.PlatformRuntime)
	if !ok {
		return nil, fmt.Errorf("containerd's task runtime is a %T: %w", v, errdefs.ErrInternal)
	}
	return rt, nil
}
