package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/image-spec/identity"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds of what is read into memory. The contents are written by whoever made
// the image; real ones are a few kilobytes.
const (
	maxManifest = 4 << 20
	maxConfig   = 4 << 20
	// maxAnnotations bounds what of a manifest's annotations every list of
	// images carries along.
	maxAnnotations = 16 << 10
)

// boundedStore is a content store that refuses to open what is too large for
// a manifest, an index or a configuration, or is not as large as its descriptor
// says. A descriptor's size is a claim; a digest can name a blob that is here
// already and is much larger.
type boundedStore struct{ content.Store }

// ReaderAt implements content.Provider.
func (s boundedStore) ReaderAt(ctx context.Context, desc imagespec.Descriptor) (content.ReaderAt, error) {
	ra, err := s.Store.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	size := ra.Size()
	if err = sameSize(desc, size); err == nil && size > maxConfig {
		err = fmt.Errorf("read %s: %d bytes are more than a manifest or configuration has: %w", desc.Digest, size, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, errors.Join(err, ra.Close())
	}
	return ra, nil
}

// sameSize refuses content that is not as large as its descriptor says.
func sameSize(desc imagespec.Descriptor, size int64) error {
	if desc.Size == size {
		return nil
	}
	return fmt.Errorf("%s has %d bytes, its descriptor says %d: %w", desc.Digest, size, desc.Size, errdefs.ErrFailedPrecondition)
}

// checkHere refuses content that is here and not as large as its descriptor
// says. NotFound means that it is not here.
func checkHere(ctx context.Context, store content.InfoProvider, desc imagespec.Descriptor) error {
	info, err := store.Info(ctx, desc.Digest)
	if err != nil {
		return err
	}
	return sameSize(desc, info.Size)
}

// parsed is an image, or an artifact, as its content describes it. Immutable.
type parsed struct {
	id          string
	artifact    string // the type of an artifact, "" for an image
	config      imagespec.Image
	chainID     string
	size        int64
	annotations map[string]string
}

// reader reads images out of the content store.
type reader struct {
	content   content.Store
	platforms []platforms.MatchComparer
}

// image reads the image that target is on a platform. NotFound means that it
// is not, or not here.
func (r reader) image(ctx context.Context, target imagespec.Descriptor, platform platforms.MatchComparer) (*parsed, error) {
	store := boundedStore{r.content}
	info, err := r.content.Info(ctx, target.Digest)
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	target.Size = info.Size // a record can say anything
	manifest, err := images.Manifest(ctx, store, target, platform)
	if err != nil || !images.IsConfigType(manifest.Config.MediaType) {
		a, other := r.artifact(ctx, target, platform)
		if other == nil {
			return r.parse(ctx, target, a)
		}
		if err == nil || !errdefs.IsNotFound(other) {
			err = other
		}
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	raw, err := content.ReadBlob(ctx, store, manifest.Config)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	p := &parsed{id: manifest.Config.Digest.String(), annotations: bounded(manifest.Annotations)}
	if p.config, err = decodeConfig(raw); err != nil {
		return nil, fmt.Errorf("read configuration: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	for _, d := range p.config.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return nil, fmt.Errorf("read configuration: layer %q: %w: %w", plain(d.String()), err, errdefs.ErrFailedPrecondition)
		}
	}
	p.chainID = identity.ChainID(p.config.RootFS.DiffIDs).String()
	if p.size, err = r.size(ctx, append(manifest.Layers, target, manifest.Config)); err != nil {
		return nil, fmt.Errorf("add up sizes: %w", err)
	}
	return p, nil
}

// size adds up what an image is made of. Of a layer that is not here there is
// only the claim, which was checked when it was: they are discarded after the
// image is unpacked.
func (r reader) size(ctx context.Context, parts []imagespec.Descriptor) (int64, error) {
	sum := int64(0)
	for _, d := range parts {
		if err := checkHere(ctx, r.content, d); err != nil && !errdefs.IsNotFound(err) {
			return 0, err
		}
		if d.Size < 0 || d.Size > math.MaxInt64-sum {
			return 0, fmt.Errorf("%s cannot have %d bytes: %w", plain(d.Digest.String()), d.Size, errdefs.ErrFailedPrecondition)
		}
		sum += d.Size
	}
	return sum, nil
}

// decodeConfig leaves the history out: nobody asks for it, the index keeps what
// is decoded, and an entry of two bytes takes a hundred in memory.
func decodeConfig(raw []byte) (imagespec.Image, error) {
	var c struct {
		imagespec.Image
		History skipped `json:"history"`
	}
	err := json.Unmarshal(raw, &c)
	return c.Image, err
}

type skipped struct{}

func (*skipped) UnmarshalJSON([]byte) error { return nil }

// all reads the image of each of our platforms, then that of each choice; nil
// where there is none.
func (r reader) all(ctx context.Context, target imagespec.Descriptor, choices []choice) ([]*parsed, error) {
	wanted := slices.Clone(r.platforms)
	for _, c := range choices {
		wanted = append(wanted, c)
	}
	out := make([]*parsed, len(wanted))
	var failed error
	for i, platform := range wanted {
		p, err := r.image(ctx, target, platform)
		if err != nil && !errdefs.IsNotFound(err) {
			failed = err
			continue
		}
		out[i] = p
	}
	return out, failed
}

// bounded returns annotations, or none of them when they are too many to be
// carried around.
func bounded(annotations map[string]string) map[string]string {
	n := 0
	for k, v := range annotations {
		n += len(k) + len(v)
	}
	if n > maxAnnotations {
		return nil
	}
	return annotations
}

// splitUser takes USER of an image apart: digits are a user number, all else
// is a name; the group plays no part. Digits that fit no number stay a name,
// so that nobody takes them for "not root".
func splitUser(user string) (uid *int64, name string) {
	user, _, _ = strings.Cut(user, ":")
	if user == "" {
		return nil, ""
	}
	if strings.Trim(user, "0123456789") != "" {
		return nil, user
	}
	n, err := strconv.ParseInt(user, 10, 64)
	if err != nil {
		return nil, user
	}
	return &n, ""
}
