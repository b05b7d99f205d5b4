package plugin

import (
	"cmp"
	"context"
	goruntime "runtime"
	"slices"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/platforms"
	criapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/artifact"
	"github.com/gantry-cri/gantry/plugin/handler"
	"github.com/gantry-cri/gantry/plugin/image"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/snapshot"

	"github.com/containerd/containerd/v2/plugins"
)

func newImages(ctx context.Context, n node, known map[string]image.Snapshotter, handlers *handler.Handlers, cfg settings, g *lifecycle.Group) (*image.Service, error) {
	return image.New(ctx, image.Options{
		Images: n.client.ImageService(), Content: n.client.ContentStore(), Leases: n.client.LeasesService(),
		Applier: diff.Applier(n.client.DiffService()), Files: newFiles(n, cfg.images), Events: n.client.EventService(),
		Collect:      func(ctx context.Context) error { return collect(ctx, n.db) },
		Snapshotters: known, Snapshotter: cfg.images.Snapshotter,
		Handlers: imageHandlers(handlers, cfg.images), Registry: registryOf(cfg.images.Registry),
		Policy: image.Policy{
			MaxDownloads: cfg.images.MaxConcurrentDownloads, FetchBuffer: cfg.images.ConcurrentLayerFetchBuffer,
			// Unpacking is work for the processor and the disk in turn.
			MaxUnpacks:      1 + goruntime.NumCPU(),
			ProgressTimeout: cfg.images.PullProgressTimeout, SyncFS: cfg.images.PullWithSyncFS,
			DiscardLayers: cfg.images.DiscardUnpackedLayers, NoAnnotations: cfg.images.DisableSnapshotAnnotations, Pinned: cfg.images.Pins.Match,
		},
		StatsPeriod: cfg.images.StatsCollectPeriod, Group: g,
	})
}

// newFiles lays artifacts out. With SELinux each file must have a label of its own,
// as the content store's is not for containers to read.
func newFiles(n node, c config.Images) *artifact.Writer {
	o := artifact.Options{Content: n.client.ContentStore(), Copy: n.facts.SELinux, Sync: c.PullWithSyncFS}
	if p := n.ic.Plugins().Get(plugins.ContentPlugin, "content"); p != nil {
		o.BlobRoot = p.Meta.Exports["root"]
	}
	return artifact.New(o)
}

func collect(ctx context.Context, db *metadata.DB) error {
	_, err := db.GarbageCollect(ctx)
	return err
}

// snapshotters are all that containerd has, with what their plugins say of
// themselves. They are looked up once, as later plugins are still being added to
// the set, and as what makes snapshots has to know of what cleans up.
func snapshotters(n node) map[string]image.Snapshotter {
	out := map[string]image.Snapshotter{}
	for _, name := range n.ic.Plugins().GetAll() {
		if name.Registration.Type != plugins.SnapshotPlugin || name.Err() != nil {
			continue
		}
		id := name.Registration.ID
		if sn := n.db.Snapshotter(id); sn != nil {
			bare, _ := name.Instance() // it has no error, see above
			cleaner, _ := bare.(snapshots.Cleaner)
			out[id] = image.Snapshotter{Snapshotter: snapshot.Mending(sn, cleaner), Root: n.snapshotRoot(id), Capabilities: name.Meta.Capabilities}
		}
	}
	return out
}

func newSnapshots(n node, known map[string]image.Snapshotter) *snapshot.Snapshots {
	return snapshot.New(func(name string) (snapshots.Snapshotter, bool) {
		sn, ok := known[name]
		return sn.Snapshotter, ok
	}, n.snapshotRoot, func(name string) []string { return known[name].Capabilities })
}

// imageHandlers are the handlers whose images are not like the node's, "" being
// the default one.
func imageHandlers(handlers *handler.Handlers, c config.Images) map[string]image.Handler {
	out := map[string]image.Handler{}
	def := handlers.Default().Name
	for _, h := range handlers.List() {
		p, own := c.RuntimePlatforms[cmp.Or(h.Name, def)]
		ih := image.Handler{Snapshotter: h.Snapshotter}
		if slices.Contains(h.AllowedAnnotations, config.AnnotationImagePlatform) {
			ih.PlatformAnnotation = config.AnnotationImagePlatform
		}
		if own {
			if p.Snapshotter != "" {
				ih.Snapshotter = p.Snapshotter
			}
			if p.Platform.OS != "" {
				ih.Platform = platforms.Format(p.Platform)
			}
		}
		if ih != (image.Handler{}) {
			out[h.Name] = ih
		}
	}
	return out
}

func registryOf(c config.Registry) image.Registry {
	r := image.Registry{ConfigPath: c.ConfigPaths, Headers: c.Headers, Mirrors: map[string][]string{}, Auths: map[string]*criapi.AuthConfig{}}
	for host, urls := range c.Mirrors {
		for _, u := range urls {
			r.Mirrors[host] = append(r.Mirrors[host], u.String())
		}
	}
	for host, cred := range c.Credentials {
		r.Auths[host] = &criapi.AuthConfig{Username: cred.Username, Password: cred.Password, IdentityToken: cred.IdentityToken}
	}
	return r
}
