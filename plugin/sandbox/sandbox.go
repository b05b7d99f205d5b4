// Package sandbox is the life of a pod sandbox: run, stop, remove, and recover
// after a restart.
//
// It decides the order of things and what a failure gives back; how a thing is
// done is behind the interfaces below. Everything that is acquired is named
// after the sandbox's ID, so that what must be released is known from the
// record alone; run.go acquires, remove.go has the releases, and a failed run,
// a removal and a recovery all use the same ones. Start reading at run.go.
package sandbox

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/flight"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
)

// Store keeps the records; see store.Sandboxes.
type Store interface {
	Create(context.Context, record.Sandbox) error
	Move(ctx context.Context, id string, e record.Event, change func(*record.Sandbox)) (record.Sandbox, error)
	Update(ctx context.Context, id string, change func(*record.Sandbox) error) (record.Sandbox, error)
	Delete(ctx context.Context, id string) error
	Get(id string) (record.Sandbox, error)
	Resolve(prefix string) (record.Sandbox, error)
	ByKey(record.Key) (record.Sandbox, bool)
	List() []record.Sandbox
}

// Handlers finds a runtime handler by the name in a request, "" being the
// default one.
type Handlers interface {
	Lookup(name string) (record.Handler, error)
	// AdmitUserNS says why no pod of the handler can have a user namespace of
	// its own, nil if it can.
	AdmitUserNS(ctx context.Context, name string) error
	// Charge returns the handler of a pod as it is for that pod alone: its shim
	// may have to be in a control group of the pod.
	Charge(record.Sandbox) (record.Handler, error)
}

// Labels gives pods SELinux labels, zero ones where there is no SELinux.
type Labels interface {
	// Allocate chooses the labels of a pod. They are the pod's until Settled,
	// and then for as long as its record has them.
	Allocate(record.Sandbox) (record.Labels, error)
	// Settled says that the pod is on record, or will not be.
	Settled(id string)
}

// Files makes the files a pod's containers share: hosts, hostname, resolv.conf
// and /dev/shm.
type Files interface {
	Create(context.Context, record.Sandbox) error
	// Remove succeeds when there is nothing.
	Remove(context.Context, record.Sandbox) error
}

// UserNamespaces makes the user namespaces of pods that have one of their own.
type UserNamespaces interface {
	// Create makes the pod's user namespace. With adopt it makes a network
	// namespace that belongs to it as well, whose path, good until adopt
	// returns, it passes on.
	Create(ctx context.Context, sb record.Sandbox, adopt func(netns string) error) error
	// Remove succeeds when there is none.
	Remove(context.Context, record.Sandbox) error
}

// Network connects a pod.
type Network interface {
	// NSPath is where the pod's network namespace is, or will be.
	NSPath(id string) string
	// Await returns when the pod's network can be attached, or after a while
	// in which it did not become so; Attach tells why. The error is that of
	// ctx.
	Await(context.Context, record.Sandbox) error
	// CreateNS makes the pod's network namespace with its loopback up and
	// returns its path. One that exists is returned as it is.
	CreateNS(ctx context.Context, id string) (path string, err error)
	// PinNS makes the namespace at source the pod's, loopback up.
	PinNS(ctx context.Context, id, source string) (path string, err error)
	// Attach gives the namespace in sb.Network.NetNS its addresses.
	Attach(context.Context, record.Sandbox) (record.Network, error)
	// Detach undoes all of it, from the record alone, whatever of it was done. It
	// keeps the namespace while the addresses cannot be given back.
	Detach(context.Context, record.Sandbox) error
}

// Instances runs sandboxes.
type Instances interface {
	Start(context.Context, record.Sandbox) (record.Instance, error)
	// Wait subscribes to the end of the sandbox. The channel delivers one
	// value. One that is closed without says that the subscription ended.
	Wait(context.Context, record.Sandbox) (<-chan record.Exit, error)
	// Stop ends the sandbox's process at once; absent is fine.
	Stop(context.Context, record.Sandbox) error
	// Shutdown releases all there is of it, whatever was started.
	Shutdown(context.Context, record.Sandbox) error
	// Alive reports whether it runs. An error means that nobody can tell now.
	Alive(context.Context, record.Sandbox) (bool, error)
}

// Shims are what runs pods.
type Shims interface {
	// EndSilent ends the shim of the sandbox if it does not answer, with all
	// that runs in the pod; everything then goes on as after the death of a
	// shim. It is an error if nothing was done.
	EndSilent(context.Context, record.Sandbox) error
}

// Containers are the containers of pods.
type Containers interface {
	// StopAll kills every container of the sandbox.
	StopAll(ctx context.Context, sandboxID string) error
	// RemoveAll removes every container of the sandbox.
	RemoveAll(ctx context.Context, sandboxID string) error
}

// Service is the life of all pod sandboxes.
type Service struct {
	Deps
	runs  flight.Group[record.Key, string]
	stops flight.Group[string, struct{}]
	// teardown is the turn to stop, remove or recover a sandbox.
	teardown flight.Turns[string]

	mu       sync.Mutex
	retrying map[string]struct{} // sandboxes that later goes on with
}

// Deps is what a Service works with. All are required.
type Deps struct {
	Store      Store
	Handlers   Handlers
	Labels     Labels
	Files      Files
	UserNS     UserNamespaces
	Network    Network
	Instances  Instances
	Shims      Shims
	Containers Containers
	Plugins    Plugins
	Ops        *operation.Table
	// Background runs the watches; stopping it leaves the pods running.
	Background *lifecycle.Group
}

// runTimeout ends a start that hangs although each of its steps has a bound of
// its own. It is far longer than a client waits, because a retry joins.
const runTimeout = 15 * time.Minute

// New returns the service. Recover must be called once.
func New(d Deps) *Service {
	s := &Service{Deps: d, retrying: map[string]struct{}{}}
	s.runs.Linger = flight.Forever
	s.stops.Linger = flight.Forever
	return s
}

// List returns the sandboxes a client may know of. One that is being made is
// not among them: its maker gets its ID when it is ready. The slice is not to be
// changed.
func (s *Service) List() []record.Sandbox {
	all := s.Store.List()
	creating := func(sb record.Sandbox) bool { return sb.Phase == record.Creating }
	if !slices.ContainsFunc(all, creating) {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), creating)
}

// Get returns the sandbox with that ID or unique prefix.
func (s *Service) Get(id string) (record.Sandbox, error) { return s.Store.Resolve(id) }

// UpdateResources records the pod-level sums the kubelet has applied.
func (s *Service) UpdateResources(ctx context.Context, id string, overhead, resources *cri.LinuxContainerResources) error {
	sb, err := s.Store.Resolve(id)
	if err != nil {
		return err
	}
	if err := s.Plugins.UpdatePod(ctx, sb, overhead, resources); err != nil {
		return err
	}
	sb, err = s.Store.Update(ctx, sb.ID, func(sb *record.Sandbox) error {
		sb.Overhead, sb.Resources = overhead, resources
		return nil
	})
	if err == nil {
		s.tell(ctx, facts.PodUpdated, sb)
	}
	return err
}

func objectName(k record.Key) string {
	return fmt.Sprintf("pod %s/%s (uid %s, attempt %d)", k.Namespace, k.Name, k.UID, k.Attempt)
}
