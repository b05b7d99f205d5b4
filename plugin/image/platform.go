package image

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/cpu"
)

// platformSet holds the platforms images are wanted for: the host's first,
// then those that handlers ask for.
type platformSet struct {
	matchers []platforms.MatchComparer
	names    []string // of the matchers' platforms
	handlers map[string]int
}

func newPlatformSet(hs map[string]Handler) (platformSet, error) {
	host := hostPlatform()
	set := platformSet{matchers: []platforms.MatchComparer{platforms.Only(host)}, names: []string{platforms.FormatAll(host)}, handlers: map[string]int{}}
	seen := map[string]int{platforms.FormatAll(host): 0}
	for name, h := range hs {
		if h.Platform == "" {
			continue
		}
		p, err := platforms.Parse(h.Platform)
		if err != nil {
			return platformSet{}, fmt.Errorf("handler %q: platform %q: %w: %w", name, h.Platform, err, errdefs.ErrInvalidArgument)
		}
		p = platforms.Normalize(p)
		// The host's own architecture without a variant means what the
		// host can do best.
		if p.OS == host.OS && p.Architecture == host.Architecture && p.Variant == "" && p.OSVersion == "" {
			p = host
		}
		i, ok := seen[platforms.FormatAll(p)]
		if !ok {
			i = len(set.matchers)
			seen[platforms.FormatAll(p)] = i
			set.matchers = append(set.matchers, platforms.Only(p))
			set.names = append(set.names, platforms.FormatAll(p))
		}
		set.handlers[name] = i
	}
	return set, nil
}

// of returns the number of the handler's platform.
func (p platformSet) of(handler string) int { return p.handlers[handler] }

// choice is a platform that a request names, the zero value for the handler's.
// Nothing stands in for it: who names a platform wants no other.
type choice struct {
	name string
	platforms.MatchComparer
}

// choiceOf reads the platform that a request for an image of the handler names.
func (s *Service) choiceOf(annotations map[string]string, handler string) (choice, error) {
	key := s.o.Handlers[handler].PlatformAnnotation
	value, ok := annotations[key]
	if !ok || key == "" {
		return choice{}, nil
	}
	c, err := parseChoice(value)
	if err != nil {
		return choice{}, fmt.Errorf("field image.annotations[%q]: %w", key, err)
	}
	return c, nil
}

func parseChoice(value string) (choice, error) {
	p, err := platforms.Parse(value)
	if err != nil || len(value) > maxOffer {
		return choice{}, fmt.Errorf("%.64q is no platform, as \"linux/arm64\" is: %w", value, errdefs.ErrInvalidArgument)
	}
	p = platforms.Normalize(p)
	return choice{platforms.FormatAll(p), platforms.OnlyStrict(p)}, nil
}

// labelPlatforms is on an image record that was pulled for platforms which
// requests have named; separatorPlatforms is between their names.
const (
	labelPlatforms     = "io.gantry.image.platforms"
	separatorPlatforms = ","
	// maxChoices bounds them.
	maxChoices = 16
)

// choicesOf reads such a label. What cannot be read is left out: others write
// labels too.
func choicesOf(labels map[string]string) (list []choice) {
	for name := range strings.SplitSeq(labels[labelPlatforms], separatorPlatforms) {
		if c, err := parseChoice(name); err == nil && len(list) < maxChoices {
			list = append(list, c)
		}
	}
	return list
}

// withChoice is a label's value with one more platform, the oldest of which goes
// when there is no room for it.
func withChoice(value, name string) string {
	list := slices.DeleteFunc(strings.Split(value, separatorPlatforms), func(n string) bool { return n == "" || n == name })
	list = append(list, name)
	return strings.Join(list[max(0, len(list)-maxChoices):], separatorPlatforms)
}

// maxOffers bounds how many platforms an error lists, and maxOffer the name of
// one, which is foreign text.
const (
	maxOffers = 10
	maxOffer  = 64
)

// requirePlatform refuses an index without a manifest for the platform, called
// want, and names those that it has.
func requirePlatform(children images.HandlerFunc, platform platforms.Matcher, want string) images.HandlerFunc {
	return func(ctx context.Context, desc imagespec.Descriptor) ([]imagespec.Descriptor, error) {
		out, err := children(ctx, desc)
		if err != nil || !images.IsIndexType(desc.MediaType) {
			return out, err
		}
		var offers []string
		for _, d := range out {
			if d.Platform == nil || platform.Match(*d.Platform) {
				return out, nil
			}
			offers = append(offers, offer(*d.Platform))
		}
		return nil, notMade(want, offers)
	}
}

func notMade(want string, offers []string) error {
	return fmt.Errorf("the image is not made for platform %s; %s: %w", want, listed(offers), errdefs.ErrNotFound)
}

// offer names a platform, "" for what is beside the images, such as their
// attestations.
func offer(p imagespec.Platform) string {
	if p.OS == "unknown" {
		return ""
	}
	name := plain(platforms.FormatAll(p))
	if len(name) > maxOffer {
		name = strings.ToValidUTF8(name[:maxOffer], "") + "…"
	}
	return name
}

// listed puts the names of offered platforms into words.
func listed(names []string) string {
	names = slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == "" })
	slices.Sort(names)
	names = slices.Compact(names)
	switch more := len(names) - maxOffers; {
	case len(names) == 0:
		return "its index has no image"
	case more > 0:
		return fmt.Sprintf("there are %s and %d more", strings.Join(names[:maxOffers], ", "), more)
	case len(names) == 1:
		return "there is only " + names[0]
	}
	return "there are " + strings.Join(names, ", ")
}

// hostPlatform is containerd's default with the level of an amd64 processor,
// so that an index with several levels gives the best the host can run.
func hostPlatform() imagespec.Platform {
	p := platforms.DefaultSpec()
	if runtime.GOARCH == "amd64" {
		p.Variant = amd64Level()
	}
	return platforms.Normalize(p)
}

func amd64Level() string {
	x := cpu.X86
	if !x.HasCX16 || !x.HasPOPCNT || !x.HasSSE3 || !x.HasSSSE3 || !x.HasSSE41 || !x.HasSSE42 {
		return "v1"
	}
	if !x.HasOSXSAVE || !x.HasAVX || !x.HasAVX2 || !x.HasBMI1 || !x.HasBMI2 || !x.HasFMA {
		return "v2"
	}
	if !x.HasAVX512F || !x.HasAVX512BW || !x.HasAVX512CD || !x.HasAVX512DQ || !x.HasAVX512VL {
		return "v3"
	}
	return "v4"
}
