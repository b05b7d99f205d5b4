// Package image pulls, lists, resolves and removes container images, and other
// artifacts that are mounted as volumes.
//
// It owns the image records of containerd's namespace "k8s.io", the pulls that
// are running and an index in memory that is a projection of the image store.
// It keeps no state of its own on disk: an image is what containerd's image,
// content and snapshot stores say, whoever wrote it. It never runs anything,
// never mounts anything, and a read neither touches the network nor waits for
// a pull or a removal.
//
// Start reading at Service.Pull in pull.go, then fetch.go for the pipeline,
// artifact.go for what is no image, registry.go for who gets which credentials,
// and index.go for the projection.
package image

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/flight"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/record"
)

// namespace is the containerd namespace of everything Kubernetes.
const namespace = "k8s.io"

// linger is how long a pull goes on after its last caller left. It is longer
// than a client's pause between two tries, so that a retry joins the work
// instead of beginning anew, and short enough that the pull of a deleted pod
// ends soon.
const linger = 5 * time.Second

// Leases is what the service needs of containerd's lease manager.
type Leases interface {
	Create(context.Context, ...leases.Opt) (leases.Lease, error)
	Delete(context.Context, leases.Lease, ...leases.DeleteOpt) error
	List(context.Context, ...string) ([]leases.Lease, error)
}

// Snapshotter is a snapshotter images can be unpacked into.
type Snapshotter struct {
	snapshots.Snapshotter
	// Root is the directory the snapshots are kept under.
	Root string
	// Capabilities are the plugin's; with "rebase" layers are unpacked side
	// by side.
	Capabilities []string
	// Applier unpacks for this snapshotter; nil for Options.Applier.
	Applier diff.Applier
}

// Handler is what a runtime handler asks of its images.
type Handler struct {
	// Snapshotter is a key of Options.Snapshotters; "" for Options.Snapshotter.
	Snapshotter string
	// Platform is an os/arch[/variant] specifier; "" for the host's.
	Platform string
	// PlatformAnnotation is the annotation of a request by which it names
	// another platform, as "linux/amd64/v2", to be taken of those in the image's
	// index; "" for none.
	PlatformAnnotation string
}

// Policy is how images are pulled.
type Policy struct {
	// MaxDownloads bounds the connections of one pull; 0 for no bound.
	MaxDownloads int
	// FetchBuffer is the size of the ranges one layer is fetched in side by
	// side; 0 fetches each layer over one connection.
	FetchBuffer int
	// MaxUnpacks bounds the layers of one pull that are unpacked side by
	// side; 0 and 1 unpack one after the other.
	MaxUnpacks int
	// ProgressTimeout ends a pull that makes no progress; 0 for never.
	ProgressTimeout time.Duration
	// SyncFS makes unpacked files durable before a layer counts.
	SyncFS bool
	// DiscardLayers lets compressed layers be collected once unpacked.
	DiscardLayers bool
	// NoAnnotations leaves out the labels that tell a remote snapshotter
	// which image a layer belongs to.
	NoAnnotations bool
	// Pinned tells which references, in their full form, are to be kept by the
	// kubelet; may be nil.
	Pinned func(name string) bool
}

// Options is everything a Service needs.
type Options struct {
	Images  images.Store
	Content content.Store
	Leases  Leases
	Applier diff.Applier
	Files   Files
	// Events tells of changes others make to the image store.
	Events events.Subscriber
	// Collect runs containerd's garbage collector and waits for it.
	Collect func(context.Context) error
	// Snapshotters by name, and the name of the one for handlers that have
	// none of their own.
	Snapshotters map[string]Snapshotter
	Snapshotter  string
	// Handlers that differ from Snapshotter and the host's platform, by
	// runtime handler name; "" for requests that name none.
	Handlers map[string]Handler
	Registry Registry
	Policy   Policy
	// StatsPeriod is how old the numbers of FSInfo may become.
	StatsPeriod time.Duration
	// Group owns the service's goroutines.
	Group *lifecycle.Group
}

// Service is the image service. It is safe for concurrent use.
type Service struct {
	o         Options
	platforms platformSet
	node      map[string]*credentials
	pulls     flight.Group[pullKey, string]
	unpacks   flight.Group[unpackKey, struct{}]
	ops       operations
	locks     keyedLock
	removal   keyedLock // of the one key ""
	index     *index
	usage     *usage
	collect   chan struct{}
}

// New returns a service whose index reflects the image store. Leases that a
// pull of an earlier process left behind are deleted.
func New(ctx context.Context, o Options) (*Service, error) {
	if _, ok := o.Snapshotters[o.Snapshotter]; !ok {
		return nil, fmt.Errorf("make image service: snapshotter %q is not there: %w", o.Snapshotter, errdefs.ErrNotFound)
	}
	for name, h := range o.Handlers {
		if h.Snapshotter == "" {
			continue
		}
		if _, ok := o.Snapshotters[h.Snapshotter]; !ok {
			return nil, fmt.Errorf("make image service: handler %q: snapshotter %q is not there: %w", name, h.Snapshotter, errdefs.ErrNotFound)
		}
	}
	if o.Policy.Pinned == nil {
		o.Policy.Pinned = func(string) bool { return false }
	}
	ps, err := newPlatformSet(o.Handlers)
	if err != nil {
		return nil, fmt.Errorf("make image service: %w", err)
	}
	s := &Service{o: o, platforms: ps, node: nodeCredentials(ctx, o.Registry.Auths), collect: make(chan struct{}, 1)}
	s.pulls.Linger = linger
	s.unpacks.Linger = linger
	s.index = newIndex(reader{content: o.Content, platforms: ps.matchers}, o.Images, o.Policy.Pinned)
	s.usage = newUsage(o.Snapshotters, s.snapshotterOf(""), o.StatsPeriod)
	ctx = inNamespace(ctx)
	if err := s.sweepLeases(ctx); err != nil {
		return nil, fmt.Errorf("make image service: %w", err)
	}
	loaded := make(chan error, 1)
	o.Group.Go("image events", func(ctx context.Context) { s.follow(inNamespace(ctx), loaded) })
	select {
	case err = <-loaded:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("make image service: load images: %w", err)
	}
	o.Group.Go("image garbage collection", func(ctx context.Context) { s.collectOnDemand(inNamespace(ctx)) })
	o.Group.Go("image filesystem usage", func(ctx context.Context) { s.usage.run(inNamespace(ctx)) })
	return s, nil
}

// Resolved is an image a container can be created from: its record, its
// configuration and where its root filesystem is.
type Resolved struct {
	record.Image
	// Artifact is the type of an artifact, of which no container can be made; ""
	// for an image.
	Artifact string
	// Config is the image's configuration. Read only.
	Config imagespec.Image
	// ChainID names the committed snapshot that is the parent of the
	// container's, in Snapshotter; "" for an image without layers.
	ChainID     string
	Snapshotter string
	// Size of the image as it was downloaded, in bytes.
	Size int64
	// Annotations are the manifest's. Read only.
	Annotations map[string]string
}

// PullRequest asks for an image.
type PullRequest struct {
	// Ref is the reference as the user wrote it.
	Ref string
	// Auth are the credentials of this request; nil for none.
	Auth *cri.AuthConfig
	// Annotations are those of the image in the request.
	Annotations map[string]string
	// Handler is the runtime handler the image is for; "" for the default.
	Handler string
	// Pod is the configuration of the pod the image is for; may be nil.
	Pod *cri.PodSandboxConfig
}

// handlerAnnotation names the runtime handler in the pod's annotations, for
// clients older than the field in the request.
const handlerAnnotation = "io.containerd.cri.runtime-handler"

func (r PullRequest) handler() string {
	if r.Handler != "" {
		return r.Handler
	}
	return r.Pod.GetAnnotations()[handlerAnnotation]
}

// snapshotterOf returns the name of the snapshotter a handler's images go to.
func (s *Service) snapshotterOf(handler string) string {
	if h, ok := s.o.Handlers[handler]; ok && h.Snapshotter != "" {
		return h.Snapshotter
	}
	return s.o.Snapshotter
}

func inNamespace(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, namespace)
}

// collectOnDemand runs the garbage collector after removals, so that the disk
// space is back before the next look at it, without anyone waiting for it.
func (s *Service) collectOnDemand(ctx context.Context) {
	for {
		select {
		case <-s.collect:
		case <-ctx.Done():
			return
		}
		if err := s.o.Collect(ctx); err != nil && ctx.Err() == nil {
			logFailure(ctx, "collect garbage", err)
		}
	}
}

func (s *Service) requestCollect() {
	select {
	case s.collect <- struct{}{}:
	default: // one is due already
	}
}
