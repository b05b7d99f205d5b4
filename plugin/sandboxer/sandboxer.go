// Package sandboxer runs pod sandboxes: with a pause process that is an
// ordinary task, or through the Sandbox API of the pod's own runtime.
//
// Both keep the same contract (sandboxertest.Suite): what there is to release
// follows from the record, so Stop and Shutdown work after a restart, after a
// start that failed half-way or never happened, and when the shim is dead, and
// an end is only reported when no process is left. The package keeps no state
// of its own and knows nothing of networks or containers.
//
// Start reading at Sandboxer, then pause.go and shim.go.
package sandboxer

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Sandboxer runs sandboxes in one way.
type Sandboxer interface {
	// Start makes the sandbox run in the network namespace of its record. A
	// failed Start may leave something for Shutdown.
	Start(context.Context, record.Sandbox) (record.Instance, error)
	// Wait subscribes to the end of the sandbox: NotFound says that there is
	// none. The channel delivers exactly one value, also when the sandbox has
	// ended already; when ctx ends first it is closed without one.
	Wait(context.Context, record.Sandbox) (<-chan record.Exit, error)
	// Stop ends the sandbox's process at once. It succeeds when there is none.
	Stop(context.Context, record.Sandbox) error
	// Shutdown releases all there is of the sandbox, and succeeds only when
	// nothing of it is left.
	Shutdown(context.Context, record.Sandbox) error
	// Alive reports whether the sandbox runs, as its runtime knows it. An error
	// means that nobody can tell now; it is no sign of death.
	Alive(context.Context, record.Sandbox) (bool, error)
	// Namespaces says where those of a sandbox that runs can be entered, by their
	// kinds; there is none for one that is the host's, or not known.
	Namespaces(context.Context, record.Sandbox) (map[string]string, error)
}

// Options are what the sandboxers work with.
type Options struct {
	// Tasks runs pause processes.
	Tasks Tasks
	// StateDir gets the root filesystem of pause processes. Every user must be
	// able to go through its parents.
	StateDir string
	// Spec makes the specification of a pause process that is called as args
	// in the given network namespace. Its root is set here.
	Spec SpecFunc
	// Controllers are containerd's sandbox controllers by name, of which a
	// handler's sandboxer picks one.
	Controllers map[string]sandbox.Controller
	// StartLimit is how long a controller may take to start a sandbox of a
	// handler, 0 for the usual time; nil is always the usual time.
	StartLimit func(record.Handler) time.Duration
	// Sysctls are all kernel settings of a pod, which a controller's shim is
	// told; nil for those of its configuration.
	Sysctls func(*cri.PodSandboxConfig) (map[string]string, error)
}

// Dispatcher is the Sandboxer that passes each sandbox to the one its handler
// names.
type Dispatcher struct {
	by map[string]Sandboxer
}

// New returns the sandboxers of a node.
func New(o Options) (*Dispatcher, error) {
	pause, err := NewPause(o.Tasks, o.StateDir, o.Spec)
	if err != nil {
		return nil, err
	}
	by := map[string]Sandboxer{}
	for name, controller := range o.Controllers {
		by[name] = NewShim(controller, o)
	}
	// The name is taken: with a stock CRI service beside, there may be a
	// controller under it that is not ours.
	by[record.SandboxerPod] = pause
	return Dispatch(by), nil
}

// Dispatch returns a Dispatcher over the sandboxers by name.
func Dispatch(by map[string]Sandboxer) *Dispatcher { return &Dispatcher{by} }

// Start implements Sandboxer.
func (d *Dispatcher) Start(ctx context.Context, sb record.Sandbox) (record.Instance, error) {
	s, err := d.pick(sb)
	if err != nil {
		return record.Instance{}, err
	}
	return s.Start(ctx, sb)
}

// Wait implements Sandboxer.
func (d *Dispatcher) Wait(ctx context.Context, sb record.Sandbox) (<-chan record.Exit, error) {
	s, err := d.pick(sb)
	if err != nil {
		return nil, err
	}
	return s.Wait(ctx, sb)
}

// Stop implements Sandboxer.
func (d *Dispatcher) Stop(ctx context.Context, sb record.Sandbox) error {
	s, err := d.pick(sb)
	if err != nil {
		return err
	}
	return s.Stop(ctx, sb)
}

// Shutdown implements Sandboxer.
func (d *Dispatcher) Shutdown(ctx context.Context, sb record.Sandbox) error {
	s, err := d.pick(sb)
	if err != nil {
		return err
	}
	return s.Shutdown(ctx, sb)
}

// Alive implements Sandboxer.
func (d *Dispatcher) Alive(ctx context.Context, sb record.Sandbox) (bool, error) {
	s, err := d.pick(sb)
	if err != nil {
		return false, err
	}
	return s.Alive(ctx, sb)
}

// Namespaces implements Sandboxer.
func (d *Dispatcher) Namespaces(ctx context.Context, sb record.Sandbox) (map[string]string, error) {
	s, err := d.pick(sb)
	if err != nil {
		return nil, err
	}
	return s.Namespaces(ctx, sb)
}

func (d *Dispatcher) pick(sb record.Sandbox) (Sandboxer, error) {
	name := sb.Handler.Sandboxer
	if name == "" {
		name = record.SandboxerPod
	}
	if s, ok := d.by[name]; ok {
		return s, nil
	}
	return nil, fmt.Errorf("find sandboxer %q of runtime handler %q: containerd has no such sandbox controller: %w", name, sb.Handler.Name, errdefs.ErrFailedPrecondition)
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
