package image

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/events/exchange"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/registry"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
)

// world is containerd's own metadata, content store and overlay snapshotter
// in a temporary directory, and a service on top.
type world struct {
	t       *testing.T
	ctx     context.Context
	root    string
	mdb     *metadata.DB
	images  images.Store
	content content.Store
	leases  leases.Manager
	events  *exchange.Exchange
	applier *countingApplier
	group   *lifecycle.Group
	*Service
}

// countingApplier counts the layers that are unpacked.
type countingApplier struct {
	diff.Applier
	mu      sync.Mutex
	applied map[string]int
	before  func(context.Context) error
}

func (a *countingApplier) Apply(ctx context.Context, desc imagespec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (imagespec.Descriptor, error) {
	a.mu.Lock()
	a.applied[desc.Digest.String()]++
	before := a.before
	a.mu.Unlock()
	if before != nil {
		if err := before(ctx); err != nil {
			return imagespec.Descriptor{}, err
		}
	}
	return a.Applier.Apply(ctx, desc, mounts, opts...)
}

func newWorld(t *testing.T, change func(*Options)) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts layers: needs root")
	}
	w := &world{t: t, ctx: inNamespace(t.Context()), root: t.TempDir(), events: exchange.NewExchange()}
	cs, err := local.NewStore(filepath.Join(w.root, "content"))
	must(t, err)
	w.openDB(cs)
	w.content = w.mdb.ContentStore()
	w.images = metadata.NewImageStore(w.mdb)
	w.leases = metadata.NewLeaseManager(w.mdb)
	w.applier = &countingApplier{Applier: apply.NewFileSystemApplier(w.content), applied: map[string]int{}}
	w.start(change)
	return w
}

func (w *world) openDB(cs content.Store) {
	snaps := map[string]snapshots.Snapshotter{}
	for _, name := range []string{"overlayfs", "second"} {
		sn, err := overlay.NewSnapshotter(filepath.Join(w.root, name))
		must(w.t, err)
		snaps[name] = sn
	}
	db, err := bolt.Open(filepath.Join(w.root, "meta.db"), 0o600, &bolt.Options{NoSync: true, Timeout: time.Second})
	must(w.t, err)
	w.mdb = metadata.NewDB(db, cs, snaps, metadata.WithEventsPublisher(w.events))
	must(w.t, w.mdb.Init(w.ctx))
	w.t.Cleanup(func() {
		for _, sn := range snaps {
			sn.Close()
		}
		db.Close()
	})
}

// start makes a service, as a start of the daemon does.
func (w *world) start(change func(*Options)) {
	w.t.Helper()
	group := lifecycle.New(w.ctx)
	o := Options{
		Images: w.images, Content: w.content, Leases: w.leases, Applier: w.applier, Files: plainFiles{content: w.content}, Events: w.events,
		Collect: func(ctx context.Context) error { _, err := w.mdb.GarbageCollect(ctx); return err },
		Snapshotters: map[string]Snapshotter{
			"overlayfs": {Snapshotter: w.mdb.Snapshotter("overlayfs"), Root: filepath.Join(w.root, "overlayfs"), Capabilities: []string{snapshots.RebaseCap}},
			"second":    {Snapshotter: w.mdb.Snapshotter("second"), Root: filepath.Join(w.root, "second")},
		},
		Snapshotter: "overlayfs",
		Handlers:    map[string]Handler{"second": {Snapshotter: "second"}, "arm": {Platform: "linux/arm64"}},
		Policy:      Policy{MaxDownloads: 3},
		StatsPeriod: time.Nanosecond,
		Group:       group,
	}
	if change != nil {
		change(&o)
	}
	s, err := New(w.ctx, o)
	must(w.t, err)
	w.Service, w.group = s, group
	w.t.Cleanup(func() {
		s.pulls.Wait()
		must(w.t, group.Stop(context.Background()))
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// clean fails the test when a lease, a download or an unfinished layer is left.
func (w *world) clean() {
	w.t.Helper()
	ls, err := w.leases.List(w.ctx)
	must(w.t, err)
	if len(ls) > 0 {
		w.t.Errorf("leases left: %v", ls)
	}
	in, err := w.content.ListStatuses(w.ctx)
	must(w.t, err)
	if len(in) > 0 {
		w.t.Errorf("downloads left: %v", in)
	}
	must(w.t, w.mdb.Snapshotter("overlayfs").Walk(w.ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind != snapshots.KindCommitted {
			w.t.Errorf("snapshot left: %+v", i)
		}
		return nil
	}))
}

// empty fails the test unless garbage collection leaves nothing at all.
func (w *world) empty() {
	w.t.Helper()
	w.clean()
	if recs := w.records(); len(recs) > 0 {
		w.t.Errorf("image records left: %v", recs)
	}
	_, err := w.mdb.GarbageCollect(w.ctx)
	must(w.t, err)
	must(w.t, w.content.Walk(w.ctx, func(i content.Info) error {
		w.t.Errorf("content left: %s", i.Digest)
		return nil
	}))
	must(w.t, w.mdb.Snapshotter("overlayfs").Walk(w.ctx, func(_ context.Context, i snapshots.Info) error {
		w.t.Errorf("snapshot left: %s", i.Name)
		return nil
	}))
}

func (w *world) records() []string {
	all, err := w.images.List(w.ctx)
	must(w.t, err)
	var names []string
	for _, i := range all {
		names = append(names, i.Name)
	}
	slices.Sort(names)
	return names
}

func (w *world) pull(ref string) string {
	w.t.Helper()
	id, err := w.Pull(w.ctx, PullRequest{Ref: ref})
	must(w.t, err)
	return id
}

// eventually waits for what another goroutine will do.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// sample is an image of some layers, the same for the same name.
func sample(t *testing.T, name string, layers int) v1.Image {
	t.Helper()
	return build(t, sampleSpec(name, layers))
}

func sampleSpec(name string, layers int) registry.Image {
	spec := registry.Image{}
	for i := range layers {
		body := strings.Repeat(fmt.Sprintf("%s layer %d. ", name, i), 1000)
		spec.Layers = append(spec.Layers, map[string][]byte{fmt.Sprintf("file-%d", i): []byte(body)})
	}
	return spec
}

func build(t *testing.T, spec registry.Image) v1.Image {
	t.Helper()
	img, err := registry.Build(spec)
	must(t, err)
	return img
}

func push(t *testing.T, r *registry.Registry, name string, img v1.Image) (ref, digest string) {
	t.Helper()
	repo, tag, _ := strings.Cut(name, ":")
	d, err := r.Push(repo, tag, img)
	must(t, err)
	return r.Ref(name), d
}

func idOf(t *testing.T, img v1.Image) string {
	t.Helper()
	h, err := img.ConfigName()
	must(t, err)
	return h.String()
}

// named asks for an image by its name alone.
func named(ref string) *cri.ImageSpec { return &cri.ImageSpec{Image: ref} }
