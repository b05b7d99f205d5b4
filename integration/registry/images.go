package registry

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Compression of layers.
type Compression int

// The compressions an image's layers can have.
const (
	Gzip Compression = iota
	Zstd
	Plain
)

// Image describes an image to make.
type Image struct {
	// Layers by path in the layer; each value is a regular file's content.
	Layers      []map[string][]byte
	Compression Compression
	Config      v1.Config
	// OS, Architecture and Variant; linux/amd64 when empty.
	OS, Architecture, Variant string
	Annotations               map[string]string
	// Docker makes it a Docker schema 2 image instead of an OCI one.
	Docker bool
}

// Build makes the image.
func Build(i Image) (v1.Image, error) {
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if i.Docker {
		base = mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.DockerManifestSchema2), types.DockerConfigJSON)
	}
	var layers []v1.Layer
	for _, files := range i.Layers {
		l, err := Layer(files, i.Compression, i.Docker)
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	img, err := mutate.AppendLayers(base, layers...)
	if err != nil {
		return nil, fmt.Errorf("append layers: %w", err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture, cfg.Variant = i.OS, i.Architecture, i.Variant
	if cfg.OS == "" {
		cfg.OS = "linux"
	}
	if cfg.Architecture == "" {
		cfg.Architecture = "amd64"
	}
	cfg.Config = i.Config
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		return nil, fmt.Errorf("set configuration: %w", err)
	}
	if len(i.Annotations) > 0 {
		img = mutate.Annotations(img, i.Annotations).(v1.Image)
	}
	return img, nil
}

// Layer makes one layer of regular files.
func Layer(files map[string][]byte, c Compression, docker bool) (v1.Layer, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Name: name, Mode: 0o755, Size: int64(len(files[name])), Typeflag: tar.TypeReg, ModTime: time.Unix(1700000000, 0)}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("make layer: %w", err)
		}
		if _, err := w.Write(files[name]); err != nil {
			return nil, fmt.Errorf("make layer: %w", err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("make layer: %w", err)
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil }
	switch {
	case c == Plain && docker:
		return static.NewLayer(buf.Bytes(), types.DockerUncompressedLayer), nil
	case c == Plain:
		return static.NewLayer(buf.Bytes(), types.OCIUncompressedLayer), nil
	case c == Zstd:
		return tarball.LayerFromOpener(open, tarball.WithCompression(compression.ZStd), tarball.WithMediaType(types.OCILayerZStd))
	case docker:
		return tarball.LayerFromOpener(open, tarball.WithMediaType(types.DockerLayer))
	default:
		return tarball.LayerFromOpener(open, tarball.WithMediaType(types.OCILayer))
	}
}

// Index makes an index of images, each under the platform of its configuration.
func Index(imgs ...v1.Image) (v1.ImageIndex, error) {
	var adds []mutate.IndexAddendum
	for _, img := range imgs {
		cfg, err := img.ConfigFile()
		if err != nil {
			return nil, fmt.Errorf("read configuration: %w", err)
		}
		adds = append(adds, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: cfg.Platform()}})
	}
	return mutate.IndexMediaType(mutate.AppendManifests(empty.Index, adds...), types.OCIImageIndex), nil
}

// Push puts an image under repository and tag, past access control and
// faults. It returns the digest of its manifest.
func (r *Registry) Push(repo, tag string, img v1.Image) (string, error) {
	if err := r.pushParts(repo, img); err != nil {
		return "", fmt.Errorf("push %s:%s: %w", repo, tag, err)
	}
	raw, err := img.RawManifest()
	if err != nil {
		return "", fmt.Errorf("push %s:%s: %w", repo, tag, err)
	}
	mt, err := img.MediaType()
	if err != nil {
		return "", fmt.Errorf("push %s:%s: %w", repo, tag, err)
	}
	return r.PutManifest(repo, tag, string(mt), raw)
}

// PushIndex puts an index and all its images under repository and tag.
func (r *Registry) PushIndex(repo, tag string, idx v1.ImageIndex) (string, error) {
	list, err := idx.IndexManifest()
	if err != nil {
		return "", fmt.Errorf("push %s:%s: %w", repo, tag, err)
	}
	for _, m := range list.Manifests {
		img, err := idx.Image(m.Digest)
		if err != nil {
			return "", fmt.Errorf("push %s:%s: %w", repo, tag, err)
		}
		if _, err := r.Push(repo, m.Digest.String(), img); err != nil {
			return "", err
		}
	}
	raw, err := idx.RawManifest()
	if err != nil {
		return "", fmt.Errorf("push %s:%s: %w", repo, tag, err)
	}
	return r.PutManifest(repo, tag, string(types.OCIImageIndex), raw)
}

func (r *Registry) pushParts(repo string, img v1.Image) error {
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		rc, err := l.Compressed()
		if err != nil {
			return err
		}
		raw, err := io.ReadAll(rc)
		if err != nil {
			return err
		}
		if _, err := r.PutBlob(repo, raw); err != nil {
			return err
		}
	}
	cfg, err := img.RawConfigFile()
	if err != nil {
		return err
	}
	_, err = r.PutBlob(repo, cfg)
	return err
}

// PutBlob puts a blob into a repository and returns its digest.
func (r *Registry) PutBlob(repo string, body []byte) (string, error) {
	h, _, err := v1.SHA256(bytes.NewReader(body))
	if err != nil {
		return "", fmt.Errorf("put blob: %w", err)
	}
	path := fmt.Sprintf("/v2/%s/blobs/uploads/?digest=%s", repo, h)
	if err := r.put(context.Background(), "POST", path, "application/octet-stream", body); err != nil {
		return "", fmt.Errorf("put blob: %w", err)
	}
	return h.String(), nil
}

// PutManifest puts any document under a tag or digest and returns its digest.
func (r *Registry) PutManifest(repo, tag, mediaType string, body []byte) (string, error) {
	h, _, err := v1.SHA256(bytes.NewReader(body))
	if err != nil {
		return "", fmt.Errorf("put manifest: %w", err)
	}
	if err := r.put(context.Background(), "PUT", fmt.Sprintf("/v2/%s/manifests/%s", repo, tag), mediaType, body); err != nil {
		return "", fmt.Errorf("put manifest: %w", err)
	}
	return h.String(), nil
}
