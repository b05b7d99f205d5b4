package image

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// maxRef bounds a reference before it is parsed: repository 255, tag 128,
// digest 135 and a host of at most 255 characters fit.
const maxRef = 1024

// normalise returns the full form of a reference: registry, path and either a
// tag, "latest" when there is none, or a digest. A tag beside a digest says
// nothing and is dropped.
func normalise(ref string) (reference.Named, error) {
	if ref == "" {
		return nil, fmt.Errorf("field image.image is empty: %w", errdefs.ErrInvalidArgument)
	}
	if len(ref) > maxRef {
		return nil, fmt.Errorf("field image.image: reference of %d bytes is too long: %w", len(ref), errdefs.ErrInvalidArgument)
	}
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, fmt.Errorf("field image.image: %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	if d, ok := named.(reference.Digested); ok {
		if err := d.Digest().Validate(); err != nil {
			return nil, fmt.Errorf("field image.image: %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
		}
	}
	return named, nil
}

// names returns the image records of an image pulled as named, the tag first.
// id is the digest of the configuration, target of what the registry named.
func names(named reference.Named, target digest.Digest, id string) []string {
	var out []string
	if t, ok := named.(reference.Tagged); ok {
		out = append(out, named.Name()+":"+t.Tag())
	}
	return append(out, named.Name()+"@"+target.String(), id)
}

// kind is what the name of an image record stands for.
type kind int

const (
	kindOther kind = iota
	kindID
	kindTag
	kindDigest
)

// classify tells what a record's name stands for and, for tags and digests,
// the repository.
func classify(name string) (kind, string) {
	if _, err := digest.Parse(name); err == nil {
		return kindID, ""
	}
	named, err := normalise(name)
	if err != nil {
		return kindOther, ""
	}
	if _, ok := named.(reference.Digested); ok {
		return kindDigest, named.Name()
	}
	return kindTag, named.Name()
}

// minShortID is the shortest prefix taken for an image ID. A shorter one is
// more likely a name.
const minShortID = 6

// shortID returns ref as the beginning of an image ID, with the algorithm.
func shortID(ref string) (string, bool) {
	hex := strings.TrimPrefix(ref, "sha256:")
	if len(hex) < minShortID || len(hex) > 64 {
		return "", false
	}
	if strings.Trim(hex, "0123456789abcdef") != "" {
		return "", false
	}
	return "sha256:" + hex, true
}
