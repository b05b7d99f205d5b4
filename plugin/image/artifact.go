package image

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"math"
	"path"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/undo"
)

// An artifact is what a manifest describes whose configuration is not that of a
// container image: a model, a policy, a chart. Its blobs are files, to be mounted
// as a volume. They are laid out once, in a snapshot of their own, which stands
// where an image has its unpacked layers; so all that is done with an image, but
// making a container from it, is done with an artifact. Its ID is the digest of
// its manifest, because most artifacts have the same, empty, configuration.

// Bounds of what an artifact is made of, which is whatever its maker writes.
const (
	maxFiles = 1024
	// maxTitle and maxName are in bytes: of a file's path, and of each part of
	// it; maxParts is how many parts it has.
	maxTitle = 1024
	maxName  = 255
	maxParts = 32
	// maxNested is how deep indexes may lie in indexes.
	maxNested = 8
)

// Files lays out the files of artifacts.
type Files interface {
	// Write makes files, whose content is in the content store, in the empty
	// filesystem that root mounts. done is told how many bytes of them are there.
	Write(ctx context.Context, root []mount.Mount, files []facts.File, done func(int64)) error
}

// artifact is an artifact as its manifest describes it. Immutable.
type artifact struct {
	kind     string // the type of the artifact, "unknown" for none
	manifest imagespec.Descriptor
	content  imagespec.Manifest
	files    []facts.File
}

// snapshot is the name of the snapshot with the files. It cannot be that of an
// image's layer, which is a digest.
func (a *artifact) snapshot() string { return "gantry-artifact-" + a.manifest.Digest.String() }

// blobs are all that is to be downloaded.
func (a *artifact) blobs() []imagespec.Descriptor {
	all := append([]imagespec.Descriptor{a.content.Config}, a.content.Layers...)
	return slices.DeleteFunc(all, isEmpty)
}

// isEmpty reports whether a blob is that of an empty file, which no store keeps.
func isEmpty(d imagespec.Descriptor) bool {
	return d.Size == 0 && d.Digest.Validate() == nil && d.Digest == d.Digest.Algorithm().FromBytes(nil)
}

// artifact reads the artifact that target is on a platform. NotFound means that
// it is none, or not here.
func (r reader) artifact(ctx context.Context, target imagespec.Descriptor, platform platforms.MatchComparer) (*artifact, error) {
	store := boundedStore{r.content}
	children := images.LimitManifests(images.FilterPlatforms(images.ChildrenHandler(store), platform), platform, 1)
	for range maxNested {
		if !images.IsIndexType(target.MediaType) {
			break
		}
		list, err := children(ctx, target)
		if err != nil {
			return nil, err
		}
		target = list[0]
	}
	m, err := images.Manifest(ctx, store, target, nil)
	if err != nil {
		return nil, err
	}
	if images.IsConfigType(m.Config.MediaType) {
		return nil, fmt.Errorf("%s is a container image: %w", target.Digest, errdefs.ErrNotFound)
	}
	a := &artifact{kind: cmp.Or(plain(m.ArtifactType), plain(m.Config.MediaType), "unknown"), manifest: target, content: m}
	if a.files, err = filesOf(m.Layers); err != nil {
		return nil, fmt.Errorf("not a container image, and no artifact of files (type %s): %w", a.kind, err)
	}
	return a, nil
}

// parse is the artifact as an entry of the index.
func (r reader) parse(ctx context.Context, target imagespec.Descriptor, a *artifact) (*parsed, error) {
	size, err := r.size(ctx, append(a.blobs(), target))
	if err != nil {
		return nil, fmt.Errorf("add up sizes: %w", err)
	}
	return &parsed{
		id: a.manifest.Digest.String(), artifact: a.kind, chainID: a.snapshot(), size: size, annotations: bounded(a.content.Annotations),
	}, nil
}

// filesOf are the files of an artifact: each blob under the path that its title
// is, or, as it may have none, its digest. A title that leads out of the
// directory, or to another file, is an error.
func filesOf(layers []imagespec.Descriptor) (files []facts.File, err error) {
	if len(layers) > maxFiles {
		return nil, fmt.Errorf("it has %d blobs, more than %d: %w", len(layers), maxFiles, errdefs.ErrFailedPrecondition)
	}
	for i, l := range layers {
		title := l.Annotations[imagespec.AnnotationTitle]
		if title == "" && l.MediaType == imagespec.MediaTypeEmptyJSON {
			continue // it stands for no blob
		}
		if err := l.Digest.Validate(); err != nil {
			return nil, fmt.Errorf("layers[%d]: digest %q: %w: %w", i, plain(l.Digest.String()), err, errdefs.ErrFailedPrecondition)
		}
		f := facts.File{Name: strings.Replace(l.Digest.String(), ":", "-", 1), Digest: l.Digest, Size: l.Size}
		if title != "" {
			if f.Name, err = fileName(title); err != nil {
				return nil, fmt.Errorf("layers[%d]: title %q %w", i, plain(title), err)
			}
		} else if slices.Contains(files, f) {
			continue // the same blob once more
		}
		files = append(files, f)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("it has no blobs: %w", errdefs.ErrFailedPrecondition)
	}
	return files, distinct(files)
}

// fileName is the path below the volume that a title means.
func fileName(title string) (string, error) {
	refuse := func(why string) (string, error) { return "", fmt.Errorf("%s: %w", why, errdefs.ErrFailedPrecondition) }
	switch parts := strings.Split(title, "/"); {
	case len(title) > maxTitle || len(parts) > maxParts || slices.ContainsFunc(parts, func(p string) bool { return len(p) > maxName }):
		return refuse("is too long for a path")
	case !utf8.ValidString(title) || strings.ContainsFunc(title, unicode.IsControl):
		return refuse("has characters that no path should have")
	case title[0] == '/' || slices.Contains(parts, ".."):
		return refuse("leads out of the volume")
	}
	name := path.Clean(title)
	if name == "." {
		return refuse("names no file")
	}
	return name, nil
}

// distinct refuses two files of one name, and one where another has a directory.
func distinct(files []facts.File) error {
	taken := map[string]bool{}
	for _, f := range files {
		if taken[f.Name] {
			return fmt.Errorf("it has two files %q: %w", plain(f.Name), errdefs.ErrFailedPrecondition)
		}
		taken[f.Name] = true
	}
	for _, f := range files {
		for dir := path.Dir(f.Name); dir != "."; dir = path.Dir(dir) {
			if taken[dir] {
				return fmt.Errorf("%q is a file and has %q below it: %w", plain(dir), plain(f.Name), errdefs.ErrFailedPrecondition)
			}
		}
	}
	return nil
}

// artifact fetches and lays out the files of target if it is an artifact; the
// pipeline of images has then fetched its manifest and nothing else.
func (j *job) artifact(ctx context.Context, store content.Store, fetcher remotes.Fetcher, target imagespec.Descriptor) error {
	a, err := j.s.index.reader.artifact(ctx, target, j.platform)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	fetch, err := j.labelled(store, j.alone(j.fetch(store, fetcher)))
	if err != nil {
		return err
	}
	if err := images.Dispatch(ctx, fetch, nil, a.blobs()...); err != nil {
		return err
	}
	j.setStage(stageUnpack)
	return atStage(stageUnpack, j.layOut(ctx, a))
}

// alone has one pull at a time fetch a blob, as the unpacker does.
func (j *job) alone(fetch images.HandlerFunc) images.HandlerFunc {
	locks := watchedLock{&j.s.locks, &j.progress}
	return func(ctx context.Context, desc imagespec.Descriptor) ([]imagespec.Descriptor, error) {
		if _, err := checkSize(ctx, desc); err != nil {
			return nil, err
		}
		key := "blob://" + desc.Digest.String()
		if err := locks.Lock(ctx, key); err != nil {
			return nil, err
		}
		defer locks.Unlock(key)
		return fetch(ctx, desc)
	}
}

// layOut makes the snapshot of an artifact's files, unless it is there.
func (j *job) layOut(ctx context.Context, a *artifact) error {
	locks, name := watchedLock{&j.s.locks, &j.progress}, a.snapshot()
	if err := locks.Lock(ctx, name); err != nil {
		return err
	}
	defer locks.Unlock(name)
	// The manifest keeps the snapshot from garbage collection, first of all, so
	// that one which is there already stays.
	label := labelSnapshotRef + j.snapshotter
	_, err := j.s.o.Content.Update(ctx, content.Info{Digest: a.manifest.Digest, Labels: map[string]string{label: name}}, "labels."+label)
	if err != nil {
		return fmt.Errorf("label manifest: %w", err)
	}
	sn := j.s.o.Snapshotters[j.snapshotter]
	if _, err := sn.Stat(ctx, name); !errdefs.IsNotFound(err) {
		return err
	}
	var suffix [8]byte
	_, _ = rand.Read(suffix[:]) // never fails
	key := name + "-" + hex.EncodeToString(suffix[:])
	var acquired undo.Stack
	acquired.Push("unfinished snapshot", func(ctx context.Context) error {
		if err := sn.Remove(ctx, key); !errdefs.IsNotFound(err) {
			return err
		}
		return nil // it was committed
	})
	defer func() {
		if err := acquired.Unwind(ctx); err != nil {
			logFailure(ctx, "clean up after an artifact; its lease ends", err)
		}
	}()
	mounts, err := sn.Prepare(ctx, key, "")
	if err != nil {
		return fmt.Errorf("prepare snapshot: %w", err)
	}
	if err := j.write(ctx, mounts, a.files); err != nil {
		return fmt.Errorf("write files: %w", err)
	}
	if err := sn.Commit(ctx, name, key); err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("commit snapshot: %w", err)
	}
	return nil
}

// labelSnapshotRef is followed by the snapshotter.
const labelSnapshotRef = "containerd.io/gc.ref.snapshot."

func (j *job) write(ctx context.Context, mounts []mount.Mount, files []facts.File) error {
	total := int64(0)
	for _, f := range files {
		total += min(f.Size, math.MaxInt64-total) // sizes have been compared
	}
	done, end := j.progress.beginApply(total)
	defer end()
	return j.s.o.Files.Write(ctx, mounts, files, done)
}
