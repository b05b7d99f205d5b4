// Package container is the life of a container: create, start, stop, remove,
// update, exec, attach, and recover after a restart.
//
// Like package sandbox it decides the order of things and what a failure gives
// back. Everything a container has is named after its ID; create.go acquires,
// remove.go has the releases. An exit is recorded by one function, finish in
// exit.go, whoever noticed it. Start reading at create.go.
package container

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/flight"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
)

// Store keeps the records; see store.Containers.
type Store interface {
	Create(context.Context, record.Container) error
	Move(ctx context.Context, id string, e record.ContainerEvent, change func(*record.Container)) (record.Container, error)
	// MoveSoon is a Move that a crash within the next moments may undo.
	MoveSoon(ctx context.Context, id string, e record.ContainerEvent, change func(*record.Container)) (record.Container, error)
	Update(ctx context.Context, id string, change func(*record.Container) error) (record.Container, error)
	// Delete forgets the container and its root filesystem.
	Delete(ctx context.Context, id string) error
	Get(id string) (record.Container, error)
	Resolve(prefix string) (record.Container, error)
	ByKey(record.ContainerKey) (record.Container, bool)
	List() []record.Container
	Of(sandboxID string) []record.Container
}

// Sandboxes finds the pod of a container.
type Sandboxes interface {
	Resolve(prefix string) (record.Sandbox, error)
	Get(id string) (record.Sandbox, error)
}

// Images finds an image that is on the node.
type Images interface {
	// Resolve accepts a tag, a digest, an ID or its unique prefix.
	Resolve(ctx context.Context, ref string, h record.Handler) (Image, error)
}

// Image is an image as a container needs it.
type Image struct {
	record.Image
	Config imagespec.ImageConfig
	// Parent names the committed snapshot of its layers.
	Parent string
	// Snapshotter has that snapshot.
	Snapshotter string
}

// Snapshots makes the root filesystems; the key is the container's ID. One goes
// with the record of its container.
type Snapshots interface {
	Prepare(ctx context.Context, snapshotter, key, parent string) ([]mount.Mount, error)
	Mounts(ctx context.Context, snapshotter, key string) ([]mount.Mount, error)
}

// Specs makes OCI specifications.
type Specs interface {
	Container(ctx context.Context, req SpecRequest) (Spec, error)
	// Resources merges an update into the specification's resources; a zero
	// field leaves the old value.
	Resources(spec *specs.Spec, update *cri.LinuxContainerResources) (*specs.LinuxResources, error)
}

// SpecRequest is all a specification depends on besides the node.
type SpecRequest struct {
	Container record.Container
	Sandbox   record.Sandbox
	Image     Image
	// Rootfs are the mounts of the container's root filesystem, to look up
	// users in.
	Rootfs []mount.Mount
}

// Spec is a specification with what was decided on the way.
type Spec struct {
	// JSON is the OCI specification.
	JSON       []byte
	User       *cri.ContainerUser
	Mounts     []*cri.Mount
	StopSignal string
}

// Endpoints are the paths of a process's standard streams, "" for none.
type Endpoints struct {
	Stdin, Stdout, Stderr string
	Terminal              bool
}

// Tasks runs the containers' processes; see package runtime.
type Tasks interface {
	Create(ctx context.Context, req TaskRequest) (Task, error)
	// Get returns NotFound when the runtime knows no such task; any other
	// error means that nobody can tell now.
	Get(ctx context.Context, id string) (Task, error)
	// Reap makes certain that a container whose task the runtime lost has no
	// process left, and returns how it ended, as far as anybody knows.
	Reap(ctx context.Context, c record.Container) (record.Exit, error)
	// Release kills what runs and takes all of the task away; absent is fine.
	Release(ctx context.Context, c record.Container) error
}

// TaskRequest describes a task to create.
type TaskRequest struct {
	Container record.Container
	Sandbox   record.Sandbox
	Rootfs    []mount.Mount
	IO        Endpoints
}

// Process is a process of a container.
type Process interface {
	Start(context.Context) error
	// Wait returns how it ended; NotFound says that the runtime lost it.
	Wait(context.Context) (record.Exit, error)
	Kill(ctx context.Context, signal syscall.Signal, all bool) error
	Resize(ctx context.Context, width, height uint32) error
	CloseIO(context.Context) error
}

// Task is the first process, and through it the container.
type Task interface {
	Process
	Pid(context.Context) (uint32, error)
	State(context.Context) (TaskState, error)
	Update(ctx context.Context, r *specs.LinuxResources) error
	Exec(ctx context.Context, execID string, p *specs.Process, io Endpoints) (Exec, error)
}

// Exec is a further process. Whoever made it calls Delete.
type Exec interface {
	Process
	// Delete forgets the process, which must have ended.
	Delete(context.Context) error
}

// TaskState is a task as the runtime sees it.
type TaskState struct {
	Status TaskStatus
	Pid    uint32
	// StartedAt is when the process began, zero if the kernel does not tell.
	StartedAt time.Time
	// Exit is set once stopped.
	Exit record.Exit
}

// TaskStatus is what a task does.
type TaskStatus string

// The states of a task that make a difference here; a paused one runs.
const (
	TaskCreated TaskStatus = "created"
	TaskRunning TaskStatus = "running"
	TaskStopped TaskStatus = "stopped"
)

// Cgroups reads the kernel's books.
type Cgroups interface {
	// OOMKilled reports whether the kernel killed a process of the container
	// for want of memory. The cgroup must still exist.
	OOMKilled(c record.Container) (bool, error)
}

// Service is the life of all containers.
type Service struct {
	Deps
	creates flight.Group[record.ContainerKey, string]
	starts  flight.Group[string, struct{}]
	turns   flight.Turns[string]

	mu   sync.Mutex
	live map[string]*live
}

// Deps is what a Service works with. All are required.
type Deps struct {
	Store     Store
	Sandboxes Sandboxes
	Images    Images
	Snapshots Snapshots
	Specs     Specs
	Tasks     Tasks
	Streams   Streams
	Cgroups   Cgroups
	Plugins   Plugins
	Ops       *operation.Table
	// Background runs the watches; stopping it leaves the containers running.
	Background *lifecycle.Group
}

// live is what memory holds of a container whose process may be running.
type live struct {
	stream Stream // guarded by Service.mu; nil while there is none yet
	// exited is closed when the exit is in the record.
	exited chan struct{}
	// silent says that the runtime does not answer for it.
	silent bool // guarded by Service.mu
}

// New returns the service. Recover must be called once.
func New(d Deps) *Service {
	s := &Service{Deps: d, live: map[string]*live{}}
	s.creates.Linger = flight.Forever
	s.starts.Linger = flight.Forever
	return s
}

// List returns the containers a client may know of. One that is being made is
// not among them: its maker gets its ID when it is there.
func (s *Service) List() []record.Container { return made(s.Store.List()) }

// Of returns those of one sandbox.
func (s *Service) Of(sandboxID string) []record.Container { return made(s.Store.Of(sandboxID)) }

func made(all []record.Container) []record.Container {
	return slices.DeleteFunc(all, func(c record.Container) bool { return c.Phase == record.ContainerCreating })
}

// Get returns the container with that ID or unique prefix.
func (s *Service) Get(id string) (record.Container, error) { return s.Store.Resolve(id) }

// Silent reports whether nobody can tell at the moment what the container does.
func (s *Service) Silent(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, ok := s.live[id]
	return ok && l.silent
}

func (s *Service) lookup(id string) (*live, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, ok := s.live[id]
	return l, ok
}

// enter notes a container whose process may run; what is there stays.
func (s *Service) enter(id string) *live {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l, ok := s.live[id]; ok {
		return l
	}
	l := &live{exited: make(chan struct{})}
	s.live[id] = l
	return l
}

func (s *Service) setStream(l *live, stream Stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.stream, l.silent = stream, false
}

func (s *Service) setSilent(l *live, silent bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.silent = silent
}

func (s *Service) streamOf(l *live) Stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	return l.stream
}

// leave forgets it, after its exit was recorded.
func (s *Service) leave(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l, ok := s.live[id]; ok {
		delete(s.live, id)
		close(l.exited)
	}
}

func objectName(k record.ContainerKey) string {
	return fmt.Sprintf("container %s (attempt %d) of sandbox %s", k.Name, k.Attempt, k.SandboxID)
}
