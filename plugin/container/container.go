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
	Resolve(ctx context.Context, spec *cri.ImageSpec, h record.Handler) (Image, error)
}

// Image is an image as a container needs it.
type Image struct {
	record.Image
	// Artifact is the type of an artifact, of which no container can be made; ""
	// for an image.
	Artifact string
	Config   imagespec.ImageConfig
	// Parent names the committed snapshot of its layers.
	Parent string
	// Snapshotter has that snapshot.
	Snapshotter string
	// Handler is the pod's, with what is different for the image's platform.
	Handler record.Handler
}

// Snapshots makes the root filesystems, under the container's ID, and views of
// the images that it mounts. All go with the record of their container.
type Snapshots interface {
	// Prepare shows the files with the owners of the user namespace u, if any.
	Prepare(ctx context.Context, snapshotter, key, parent string, u *cri.UserNamespace) ([]mount.Mount, error)
	View(ctx context.Context, snapshotter, key, parent string, u *cri.UserNamespace) ([]mount.Mount, error)
	Mounts(ctx context.Context, snapshotter, key string) ([]mount.Mount, error)
}

// Files are those that a specification has mounted into a container.
type Files interface {
	// RemoveContainer takes them away; none is fine.
	RemoveContainer(context.Context, record.Container) error
}

// Specs makes OCI specifications. It makes Files on the way.
type Specs interface {
	Container(ctx context.Context, req SpecRequest) (Spec, error)
	// Volumes are the paths at which the container gets directories of its
	// own, because its image declares volumes there.
	Volumes(c *cri.ContainerConfig, image imagespec.ImageConfig) ([]string, error)
	// Update returns the specification with an update in it; a zero field
	// leaves the old value. It does not change spec.
	Update(spec *specs.Spec, update *cri.LinuxContainerResources) (*specs.Spec, error)
}

// SpecRequest is all a specification depends on besides the node.
type SpecRequest struct {
	Container record.Container
	Sandbox   record.Sandbox
	Image     Image
	// Rootfs are the mounts of the container's root filesystem, to look up
	// users in.
	Rootfs  []mount.Mount
	Volumes VolumeSet
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
	// EndProcesses kills what runs although the runtime does not answer.
	EndProcesses(ctx context.Context, c record.Container) error
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
	Resize(ctx context.Context, width, height uint32) error
	CloseIO(context.Context) error
}

// Task is the first process, and through it the container.
type Task interface {
	Process
	Kill(ctx context.Context, signal syscall.Signal, all bool) error
	Pid(context.Context) (uint32, error)
	State(context.Context) (TaskState, error)
	Change(ctx context.Context, change Change) error
	Exec(ctx context.Context, req ExecRequest) (Exec, error)
	// EndExec ends and forgets a process that Exec may have added although it
	// did not return it, now or for an earlier daemon. None is fine.
	EndExec(ctx context.Context, execID string, spec []byte) error
}

// Change makes a running container what After says where Before says otherwise.
type Change struct {
	Before, After *specs.Spec
	// Annotations go to the runtime with the resources.
	Annotations map[string]string
}

// ExecRequest describes a further process.
type ExecRequest struct {
	ID      string
	Process *specs.Process
	IO      Endpoints
	// Score is the OOM score that the process is to have, nil for that of the
	// container's creation.
	Score *int
	// Spec is the OCI specification of the container.
	Spec []byte
}

// Exec is a further process. Whoever made it calls Delete.
type Exec interface {
	Process
	// End kills it with all that it started, after Start, and returns when
	// nothing of that is left.
	End(context.Context) error
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
	// for want of memory. The cgroup must still exist, or Follow have seen it.
	OOMKilled(c record.Container) (bool, error)
	// Follow looks out for that until Forget: who made the cgroup may remove it
	// as soon as the last process has ended.
	Follow(c record.Container) error
	Forget(id string)
	// WorkingSet is the memory in use that the kernel could not just drop.
	WorkingSet(c record.Container) (bytes uint64, known bool, err error)
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
	Volumes   Volumes
	Specs     Specs
	Files     Files
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
	stream     Stream // guarded by Service.mu; nil while there is none yet
	unstreamed bool   // guarded by Service.mu; there will be no other stream
	// exited is closed when the exit is in the record.
	exited chan struct{}
	// silent is since when the runtime does not answer for it, zero while it
	// does.
	silent time.Time // guarded by Service.mu
	denied denials   // guarded by Service.mu
}

// New returns the service. Recover must be called once.
func New(d Deps) *Service {
	s := &Service{Deps: d, live: map[string]*live{}}
	s.creates.Linger = flight.Forever
	s.starts.Linger = flight.Forever
	return s
}

// List returns the containers a client may know of. One that is being made is
// not among them: its maker gets its ID when it is there. The slice is not to be
// changed.
func (s *Service) List() []record.Container { return made(s.Store.List()) }

// Of returns those of one sandbox.
func (s *Service) Of(sandboxID string) []record.Container { return made(s.Store.Of(sandboxID)) }

func made(all []record.Container) []record.Container {
	creating := func(c record.Container) bool { return c.Phase == record.ContainerCreating }
	if !slices.ContainsFunc(all, creating) {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), creating)
}

// Get returns the container with that ID or unique prefix.
func (s *Service) Get(id string) (record.Container, error) { return s.Store.Resolve(id) }

// silence is how long the runtime of a container may be silent before nobody can
// tell what the container does. Until then the last that was known counts: a
// kubelet kills and replaces a container of which it hears that nobody knows,
// and a shim on a busy node that is slow to answer is no reason for that.
const silence = 5 * time.Minute

// Silent reports whether nobody can tell any more what the container does.
func (s *Service) Silent(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, ok := s.live[id]
	return ok && !l.silent.IsZero() && time.Since(l.silent) >= silence
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

// setStream reports false when it is too late for that.
func (s *Service) setStream(l *live, stream Stream) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.unstreamed {
		return false
	}
	l.stream, l.silent = stream, time.Time{}
	return true
}

// lastStream returns the stream that is to be closed; none follows it.
func (s *Service) lastStream(l *live) Stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.unstreamed = true
	return l.stream
}

// setSilent notes whether the runtime answers for a container.
func (s *Service) setSilent(l *live, silent bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !silent:
		l.silent = time.Time{}
	case l.silent.IsZero():
		l.silent = time.Now()
	}
}

func (s *Service) streamOf(l *live) Stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	return l.stream
}

// leave forgets it, after its exit was recorded.
func (s *Service) leave(id string) {
	s.Cgroups.Forget(id)
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
