package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/containerd/v2/core/unpack"
	snlabels "github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"

	"github.com/gantry-cri/gantry/plugin/undo"
)

// job is one run of the pipeline that brings an image's content here and
// unpacks it. It makes no image record. The caller's context carries a lease.
type job struct {
	s           *Service
	named       reference.Named // nil when everything must be here already
	snapshotter string
	platform    platforms.MatchComparer
	want        string // the platform's name
	chosen      bool   // the request names the platform
	access      *access
	progress    progress
	setStage    func(string)
	gate        gate
}

// pull resolves the reference, then fetches and unpacks what it names.
func (j *job) pull(ctx context.Context) (imagespec.Descriptor, error) {
	j.setStage(stageResolve)
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: j.access.registryHosts(ctx)})
	if tunable, ok := resolver.(remotes.ResolverWithOptions); ok {
		p := j.s.o.Policy
		opts := []transfer.ImageResolverOption{
			transfer.WithMaxConcurrentDownloads(p.MaxDownloads),
			transfer.WithConcurrentLayerFetchBuffer(p.FetchBuffer),
		}
		if p.MaxDownloads > 0 {
			// One bound per pull and none across pulls: a registry that
			// trickles must not hold up the images of other pods.
			opts = append(opts, transfer.WithDownloadLimiter(semaphore.NewWeighted(int64(p.MaxDownloads))))
		}
		tunable.SetOptions(opts...)
	}
	name, target, err := resolver.Resolve(ctx, j.named.String())
	if err != nil {
		return imagespec.Descriptor{}, atStage(stageResolve, err)
	}
	if err := checkTarget(target); err != nil {
		return imagespec.Descriptor{}, atStage(stageResolve, err)
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return imagespec.Descriptor{}, atStage(stageResolve, err)
	}
	j.progress.step()
	j.setStage(stageFetch)
	return target, j.transfer(ctx, target, countingFetcher{fetcher, j.progress.download})
}

// transfer fetches the tree under target and unpacks its layers meanwhile. On
// return nothing it started runs any more.
func (j *job) transfer(ctx context.Context, target imagespec.Descriptor, fetcher remotes.Fetcher) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	store := boundedStore{j.s.o.Content}
	unpacker, err := j.unpacker(ctx, store)
	if err != nil {
		return atStage(stageUnpack, err)
	}
	handler, err := j.handler(store, fetcher)
	if err != nil {
		return atStage(stageFetch, err)
	}
	fetchErr := images.Dispatch(ctx, unpacker.Unpack(handler), nil, target)
	if fetchErr == nil {
		fetchErr = j.artifact(ctx, store, fetcher, target)
	}
	if fetchErr != nil {
		cancel(fetchErr)
	}
	_, unpackErr := unpacker.Wait()
	cancel(nil)
	j.gate.close()
	if fetchErr == nil || (errors.Is(fetchErr, context.Canceled) && unpackErr != nil) {
		return atStage(stageUnpack, unpackErr)
	}
	return atStage(stageFetch, fetchErr)
}

func (j *job) unpacker(ctx context.Context, store content.Store) (*unpack.Unpacker, error) {
	sn := j.s.o.Snapshotters[j.snapshotter]
	applier := sn.Applier
	if applier == nil {
		applier = j.s.o.Applier
	}
	opts := []unpack.UnpackerOpt{
		unpack.WithUnpackPlatform(unpack.Platform{
			// The index has been filtered already; a lone manifest is
			// unpacked whatever its configuration says, for emulators.
			Platform:                platforms.All,
			SnapshotterKey:          j.snapshotter,
			Snapshotter:             sn.Snapshotter,
			SnapshotterCapabilities: sn.Capabilities,
			Applier:                 watchedApplier{applier, j},
			ApplyOpts:               []diff.ApplyOpt{diff.WithSyncFs(j.s.o.Policy.SyncFS)},
		}),
		unpack.WithDuplicationSuppressor(watchedLock{&j.s.locks, &j.progress}),
	}
	if n := j.s.o.Policy.MaxUnpacks; n > 1 {
		opts = append(opts, unpack.WithUnpackLimiter(semaphore.NewWeighted(int64(n))))
	}
	return unpack.NewUnpacker(ctx, store, opts...)
}

// handler is what happens to each descriptor of the tree.
func (j *job) handler(store content.Store, fetcher remotes.Fetcher) (images.Handler, error) {
	var labelMap func(imagespec.Descriptor) []string
	if j.s.o.Policy.DiscardLayers {
		labelMap = images.ChildGCLabelsFilterLayers
	}
	children := images.SetChildrenMappedLabels(store, images.ChildrenHandler(store), labelMap)
	children = requirePlatform(children, j.platform, j.want)
	children = images.FilterPlatforms(children, j.platform)
	children = images.LimitManifests(children, j.platform, 1)
	handler, err := j.labelled(store, images.HandlerFunc(checkSize), j.fetch(store, fetcher), imagesOnly(children))
	if err != nil || j.named == nil || j.s.o.Policy.NoAnnotations {
		return handler, err
	}
	return snlabels.AppendInfoHandlerWrapper(j.named.String())(handler), nil
}

// labelled takes the steps, and then notes at each blob where it came from.
func (j *job) labelled(store content.Store, steps ...images.Handler) (images.Handler, error) {
	if j.named == nil {
		return images.Handlers(steps...), nil
	}
	source, err := docker.AppendDistributionSourceLabel(store, j.named.String())
	if err != nil {
		return nil, err
	}
	return images.Handlers(append(steps, source)...), nil
}

// fetch brings one blob into the content store, or leaves nothing of it. One
// that is here already has to be what the descriptor says, as if it had come.
func (j *job) fetch(store content.Store, fetcher remotes.Fetcher) images.HandlerFunc {
	return func(ctx context.Context, desc imagespec.Descriptor) ([]imagespec.Descriptor, error) {
		if !j.gate.enter() {
			return nil, context.Cause(ctx)
		}
		defer j.gate.leave()
		var acquired undo.Stack
		in := openedIngester{Ingester: store, opened: func() {
			acquired.Push("unfinished download", func(ctx context.Context) error {
				err := store.Abort(ctx, remotes.MakeRefKey(ctx, desc))
				if errdefs.IsNotFound(err) {
					return nil
				}
				return err
			})
		}}
		err := remotes.Fetch(ctx, in, fetcher, desc)
		j.progress.step()
		if err == nil || errdefs.IsAlreadyExists(err) {
			return nil, atStage(stageFetch, checkHere(ctx, store, desc))
		}
		if err := acquired.Unwind(ctx); err != nil {
			logFailure(ctx, "clean up after a failed download", err)
		}
		return nil, atStage(stageFetch, err)
	}
}

// openedIngester tells when a writer was opened, which makes it ours to abort.
type openedIngester struct {
	content.Ingester
	opened func()
}

// Writer implements content.Ingester.
func (i openedIngester) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	w, err := i.Ingester.Writer(ctx, opts...)
	if err == nil {
		i.opened()
	}
	return w, err
}

// checkTarget refuses what is no image before anything is downloaded.
func checkTarget(target imagespec.Descriptor) error {
	switch {
	case target.MediaType == images.MediaTypeDockerSchema1Manifest || target.MediaType == "application/vnd.docker.distribution.manifest.v1+json":
		return fmt.Errorf("the image has a Docker schema 1 manifest, which is not supported; build or push it again as schema 2 or OCI: %w", errdefs.ErrFailedPrecondition)
	case !images.IsManifestType(target.MediaType) && !images.IsIndexType(target.MediaType):
		return fmt.Errorf("media type %q is not that of an image: %w", plain(target.MediaType), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// checkSize bounds what will be read into memory, before it is downloaded.
func checkSize(_ context.Context, desc imagespec.Descriptor) ([]imagespec.Descriptor, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, atStage(stageFetch, fmt.Errorf("descriptor digest %q: %w: %w", plain(desc.Digest.String()), err, errdefs.ErrFailedPrecondition))
	}
	if desc.Size <= 0 {
		return nil, atStage(stageFetch, fmt.Errorf("%s %s cannot have %d bytes: %w", plain(desc.MediaType), desc.Digest, desc.Size, errdefs.ErrFailedPrecondition))
	}
	limit := int64(0)
	switch {
	case images.IsManifestType(desc.MediaType) || images.IsIndexType(desc.MediaType):
		limit = maxManifest
	case images.IsKnownConfig(desc.MediaType):
		limit = maxConfig
	}
	if limit > 0 && desc.Size > limit {
		return nil, atStage(stageFetch, fmt.Errorf("%s of %d bytes is larger than %d: %w", desc.MediaType, desc.Size, limit, errdefs.ErrFailedPrecondition))
	}
	return nil, nil
}

// imagesOnly stops at the manifest of an artifact: its blobs are no layers, nor is
// there anything below them, whatever their types say; see job.artifact.
func imagesOnly(children images.HandlerFunc) images.HandlerFunc {
	return func(ctx context.Context, desc imagespec.Descriptor) ([]imagespec.Descriptor, error) {
		out, err := children(ctx, desc)
		if err != nil || !images.IsManifestType(desc.MediaType) {
			return out, err
		}
		if len(out) > 0 && images.IsConfigType(out[0].MediaType) {
			return out, nil
		}
		return nil, nil
	}
}

// gate counts who is inside and lets nobody in once it is closed.
type gate struct {
	mu     sync.Mutex
	closed bool
	inside sync.WaitGroup
}

func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.inside.Add(1)
	return true
}

func (g *gate) leave() { g.inside.Done() }

// close waits until everybody has left.
func (g *gate) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.inside.Wait()
}

// countingFetcher counts the bytes that arrive.
type countingFetcher struct {
	remotes.Fetcher
	count func(int)
}

// Fetch implements remotes.Fetcher.
func (f countingFetcher) Fetch(ctx context.Context, desc imagespec.Descriptor) (io.ReadCloser, error) {
	rc, err := f.Fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	c := countingReader{ReadCloser: rc, count: f.count}
	if s, ok := rc.(io.Seeker); ok {
		return struct {
			countingReader
			io.Seeker
		}{c, s}, nil
	}
	return c, nil
}

type countingReader struct {
	io.ReadCloser
	count func(int)
}

// Read implements io.Reader.
func (r countingReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if n > 0 {
		r.count(n)
	}
	return n, err
}

// watchedApplier reports what is being unpacked.
type watchedApplier struct {
	diff.Applier
	j *job
}

// Apply implements diff.Applier.
func (a watchedApplier) Apply(ctx context.Context, desc imagespec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (imagespec.Descriptor, error) {
	a.j.setStage(stageUnpack)
	read, end := a.j.progress.beginApply(desc.Size)
	defer end()
	opts = append(opts, diff.WithProgress(func(_ imagespec.Descriptor, n int64) { read(n) }))
	out, err := a.Applier.Apply(ctx, desc, mounts, opts...)
	return out, atStage(stageUnpack, err)
}

// watchedLock excuses a pull while it waits for another one.
type watchedLock struct {
	locks *keyedLock
	p     *progress
}

// Lock implements unpack.KeyedLocker.
func (l watchedLock) Lock(ctx context.Context, key string) error {
	l.p.wait(1)
	defer l.p.wait(-1)
	return l.locks.lock(ctx, key)
}

// Unlock implements unpack.KeyedLocker.
func (l watchedLock) Unlock(key string) { l.locks.unlock(key) }

// notHere is the fetcher of a job that may not use the network.
func notHere(_ context.Context, desc imagespec.Descriptor) (io.ReadCloser, error) {
	return nil, fmt.Errorf("%s %s is not on this node any more, pull the image again: %w", desc.MediaType, desc.Digest, errdefs.ErrNotFound)
}
