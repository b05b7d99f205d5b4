package image

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
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

// Labels of records hold the platforms that requests have named, newest last.
func TestChoices(t *testing.T) {
	value := ""
	for i := range maxChoices + 3 {
		value = withChoice(value, fmt.Sprintf("linux/x%03d", i))
	}
	value = withChoice(value, "linux/x005")
	list := choicesOf(map[string]string{labelPlatforms: value})
	if len(list) != maxChoices || list[0].name != "linux/x003" || list[maxChoices-1].name != "linux/x005" || list[1].name != "linux/x004" || list[2].name != "linux/x006" {
		t.Errorf("the label is %q", value)
	}
	for _, value := range []string{"", ",,", "a/b/c/d/e", strings.Repeat("x", 1000), "linux/\x00"} {
		if list := choicesOf(map[string]string{labelPlatforms: value}); len(list) != 0 {
			t.Errorf("%q is %v", value, list)
		}
	}
	old := images.Image{Target: imagespec.Descriptor{Digest: "sha256:1"}, Labels: map[string]string{labelPlatforms: "linux/arm64"}}
	for name, tc := range map[string]struct {
		target digest.Digest
		chosen string
		want   map[string]string
	}{
		"the same":           {"sha256:1", "", map[string]string{labelManaged: managed}},
		"one more":           {"sha256:1", "linux/s390x", map[string]string{labelManaged: managed, labelPlatforms: "linux/arm64,linux/s390x"}},
		"another image":      {"sha256:2", "", map[string]string{labelManaged: managed, labelPlatforms: ""}},
		"another for itself": {"sha256:2", "linux/s390x", map[string]string{labelManaged: managed, labelPlatforms: "linux/s390x"}},
	} {
		if got := labelsFor(old, imagespec.Descriptor{Digest: tc.target}, tc.chosen); !maps.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}

// FuzzChoice: who writes a pod writes the annotation, and anybody a label.
func FuzzChoice(f *testing.F) {
	for _, value := range []string{"linux/arm64", "arm64", "linux(1.2)/amd64/v2", "a/b/c/d", "windows/amd64:x", ",", "linux/arm/v7,linux/s390x"} {
		f.Add(value)
	}
	f.Fuzz(func(t *testing.T, value string) {
		c, err := parseChoice(value)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: %v", value, err)
			}
		} else if again, err := parseChoice(c.name); err != nil && len(c.name) <= maxOffer || err == nil && again.name != c.name {
			t.Errorf("%q is %q, and that is %q, %v", value, c.name, again.name, err)
		}
		for _, c := range choicesOf(map[string]string{labelPlatforms: value}) {
			if strings.Contains(c.name, separatorPlatforms) {
				t.Errorf("%q has the choice %q", value, c.name)
			}
		}
	})
}
