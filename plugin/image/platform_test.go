package image

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestRequirePlatform(t *testing.T) {
	const want = "linux/amd64"
	index := imagespec.Descriptor{MediaType: imagespec.MediaTypeImageIndex}
	of := func(names ...string) []imagespec.Descriptor {
		out := make([]imagespec.Descriptor, len(names))
		for i, n := range names {
			if n != "" {
				p := platforms.MustParse(n)
				out[i].Platform = &p
			}
		}
		return out
	}
	attestation := imagespec.Descriptor{Platform: &imagespec.Platform{OS: "unknown", Architecture: "unknown"}}
	hostile := imagespec.Descriptor{Platform: &imagespec.Platform{OS: "a\nb", Architecture: strings.Repeat("ü", 1000)}}
	var many []imagespec.Descriptor
	for i := range 500 {
		many = append(many, imagespec.Descriptor{Platform: &imagespec.Platform{OS: "linux", Architecture: fmt.Sprintf("x%03d", i)}})
	}
	for name, c := range map[string]struct {
		desc  imagespec.Descriptor
		has   []imagespec.Descriptor
		words string // "" for no error
	}{
		"it is there":         {index, of("linux/arm64", want), ""},
		"one does not say":    {index, of("linux/arm64", ""), ""},
		"a manifest":          {imagespec.Descriptor{MediaType: imagespec.MediaTypeImageManifest}, of("linux/arm64"), ""},
		"one other":           {index, of("linux/arm64"), "platform linux/amd64; there is only linux/arm64"},
		"others":              {index, of("windows/amd64", "linux/s390x", "linux/s390x"), "; there are linux/s390x, windows/amd64"},
		"nothing":             {index, nil, "; its index has no image"},
		"only an attestation": {index, []imagespec.Descriptor{attestation}, "; its index has no image"},
		"very many":           {index, many, "linux/x009 and 490 more"},
		"hostile":             {index, []imagespec.Descriptor{hostile}, "a b/üüü"},
	} {
		children := func(context.Context, imagespec.Descriptor) ([]imagespec.Descriptor, error) { return c.has, nil }
		got, err := requirePlatform(images.HandlerFunc(children), platforms.Only(platforms.MustParse(want)), want)(t.Context(), c.desc)
		if c.words == "" {
			if err != nil || len(got) != len(c.has) {
				t.Errorf("%s: %d of %d, %v", name, len(got), len(c.has), err)
			}
			continue
		}
		if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), c.words) || len(err.Error()) > 400 || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
