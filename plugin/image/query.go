package image

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// List returns the images, all or the one the filter means, ordered by ID.
// The messages are shared: do not change them.
func (s *Service) List(_ context.Context, filter *cri.ImageFilter) ([]*cri.Image, error) {
	v := s.index.now.Load()
	if filter.GetImage().GetImage() != "" {
		img, _, err := s.find(v, filter.GetImage(), filter.GetImage().GetRuntimeHandler())
		if err != nil {
			return nil, fmt.Errorf("list images: %w", err)
		}
		if img == nil {
			return nil, nil
		}
		return []*cri.Image{img.cri}, nil
	}
	out := make([]*cri.Image, len(v.images))
	for i, img := range v.images {
		out[i] = img.cri
	}
	return out, nil
}

// find returns the image that a request means, nil for none, and the platform
// that it names.
func (s *Service) find(v *view, spec *cri.ImageSpec, handler string) (*image, choice, error) {
	c, err := s.choiceOf(spec.GetAnnotations(), handler)
	if err != nil {
		return nil, c, err
	}
	if c.name == "" {
		img, err := v.find(spec.GetImage(), func(r row) *image { return r.on(s.platforms.of(handler)) })
		return img, c, err
	}
	img, err := v.find(spec.GetImage(), func(r row) *image { return r.chosen(c.name) })
	// An ID means one image, whatever its index has for the platform.
	if img != nil && !c.Match(img.config.Platform) && !v.isFor(img, c.name) {
		return nil, c, err
	}
	return img, c, err
}

// isFor reports whether the image was pulled for the platform.
func (v *view) isFor(img *image, platform string) bool {
	return slices.ContainsFunc(img.records, func(name string) bool { return v.byName[name].chosen(platform) == img })
}

// Status returns the image a tag, digest, ID or short ID means, nil when there
// is none, and with verbose its details. The message is shared: do not change
// it.
func (s *Service) Status(_ context.Context, spec *cri.ImageSpec, verbose bool) (*cri.Image, map[string]string, error) {
	if spec.GetImage() == "" {
		return nil, nil, fmt.Errorf("image status: field image.image is empty: %w", errdefs.ErrInvalidArgument)
	}
	img, _, err := s.find(s.index.now.Load(), spec, spec.GetRuntimeHandler())
	if err != nil {
		return nil, nil, fmt.Errorf("image status: %w", err)
	}
	if img == nil {
		return nil, nil, nil
	}
	if !verbose {
		return img.cri, nil, nil
	}
	info, err := json.Marshal(struct {
		ChainID      string          `json:"chainID"`
		ImageSpec    imagespec.Image `json:"imageSpec"`
		ArtifactType string          `json:"artifactType,omitempty"`
	}{img.chainID, img.config, img.artifact})
	if err != nil {
		return nil, nil, fmt.Errorf("image status: describe %s: %w", img.id, err)
	}
	return img.cri, map[string]string{"info": string(info)}, nil
}

// Resolve returns the image a container of handler is created from and makes
// sure that it is unpacked where the handler wants it. It never pulls.
func (s *Service) Resolve(ctx context.Context, spec *cri.ImageSpec, handler string) (Resolved, error) {
	ref := spec.GetImage()
	if ref == "" {
		return Resolved{}, fmt.Errorf("find image: field image.image is empty: %w", errdefs.ErrInvalidArgument)
	}
	v := s.index.now.Load()
	img, choice, err := s.find(v, spec, handler)
	if err != nil {
		return Resolved{}, fmt.Errorf("find image: %w", err)
	}
	if img == nil {
		return Resolved{}, fmt.Errorf("find image %q: %w", ref, s.missing(inNamespace(ctx), v, ref, choice))
	}
	r := Resolved{
		Image: describe(img, ref), Artifact: img.artifact, Config: img.config, ChainID: img.chainID,
		Snapshotter: s.snapshotterOf(handler), Size: img.size, Annotations: img.annotations,
	}
	if err := s.ensureUnpacked(inNamespace(ctx), img, r.Snapshotter); err != nil {
		return Resolved{}, fmt.Errorf("unpack image %q: %w", ref, err)
	}
	return r, nil
}

// missing says why there is no image for ref: for a platform that was named, it
// may be that no index has one.
func (s *Service) missing(ctx context.Context, v *view, ref string, c choice) error {
	if c.name == "" {
		return fmt.Errorf("not on this node: %w", errdefs.ErrNotFound)
	}
	if img, ok := v.byID[ref]; ok {
		return notMade(c.name, []string{offer(img.config.Platform)})
	}
	for _, name := range spellings(ref) {
		rec, err := s.o.Images.Get(ctx, name)
		if err != nil {
			continue // it is not there
		}
		store := boundedStore{s.o.Content}
		if _, err := requirePlatform(images.ChildrenHandler(store), c, c.name)(ctx, rec.Target); err != nil {
			return err
		}
		if img := v.byName[name].any(); img != nil && !images.IsIndexType(rec.Target.MediaType) {
			return notMade(c.name, []string{offer(img.config.Platform)})
		}
	}
	return fmt.Errorf("not on this node for platform %s: %w", c.name, errdefs.ErrNotFound)
}

// describe names an image for a container's record, as the user named it as
// far as that is a name.
func describe(img *image, ref string) record.Image {
	out := record.Image{ID: img.id, Ref: img.id}
	repo := ""
	if ref != img.id && !strings.HasPrefix(img.id, "sha256:"+strings.TrimPrefix(ref, "sha256:")) {
		if named, err := normalise(ref); err == nil {
			repo = named.Name()
			if _, ok := named.(reference.Tagged); ok {
				out.Name = named.String()
			}
		}
	}
	if len(img.digests) > 0 {
		out.Ref = img.digests[0]
	}
	for _, d := range img.digests {
		if repo != "" && strings.HasPrefix(d, repo+"@") {
			out.Ref = d
			break
		}
	}
	if out.Name == "" {
		out.Name = out.Ref
		if repo == "" && len(img.tags) > 0 {
			out.Name = img.tags[0]
		}
		for _, t := range img.tags {
			if repo != "" && strings.HasPrefix(t, repo+":") {
				out.Name = t
				break
			}
		}
	}
	return out
}

type unpackKey struct{ id, snapshotter string }

// ensureUnpacked unpacks an image that came here by other ways than a pull for
// this snapshotter, from the layers that are here.
func (s *Service) ensureUnpacked(ctx context.Context, img *image, snapshotter string) error {
	err := s.checkUnpacked(ctx, img.parsed, snapshotter)
	if !errdefs.IsNotFound(err) {
		return err
	}
	_, err = s.unpacks.Do(ctx, unpackKey{img.id, snapshotter}, func(ctx context.Context) (struct{}, error) {
		_, err := s.underLease(ctx, "unpacking of "+img.id, func(ctx context.Context) (string, error) {
			return "", s.unpackLocal(ctx, img, snapshotter)
		})
		return struct{}{}, err
	})
	return err
}

func (s *Service) unpackLocal(ctx context.Context, img *image, snapshotter string) error {
	target, platform, err := s.targetOf(ctx, img)
	if err != nil {
		return err
	}
	j := &job{s: s, snapshotter: snapshotter, platform: platform.MatchComparer, want: platform.name, setStage: func(string) {}}
	if err := j.transfer(ctx, target, remotes.FetcherFunc(notHere)); err != nil {
		return err
	}
	return s.checkUnpacked(ctx, img.parsed, snapshotter)
}

// targetOf returns what one of the image's records names, and for which
// platform that is the image.
func (s *Service) targetOf(ctx context.Context, img *image) (imagespec.Descriptor, choice, error) {
	v := s.index.now.Load()
	for _, name := range img.records {
		for i, other := range v.byName[name].images {
			if other == nil || other.id != img.id {
				continue
			}
			rec, err := s.o.Images.Get(ctx, name)
			if err != nil {
				return imagespec.Descriptor{}, choice{}, fmt.Errorf("read image record %s: %w", name, err)
			}
			if ours := len(s.platforms.matchers); i >= ours {
				return rec.Target, v.byName[name].choices[i-ours], nil
			}
			return rec.Target, choice{s.platforms.names[i], s.platforms.matchers[i]}, nil
		}
	}
	return imagespec.Descriptor{}, choice{}, fmt.Errorf("image %s was removed: %w", img.id, errdefs.ErrNotFound)
}

func ambiguous(ref string) error {
	return fmt.Errorf("field image.image: several image IDs begin with %q: %w", ref, errdefs.ErrInvalidArgument)
}
