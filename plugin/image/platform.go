package image

import (
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/cpu"
)

// platformSet holds the platforms images are wanted for: the host's first,
// then those that handlers ask for.
type platformSet struct {
	matchers []platforms.MatchComparer
	handlers map[string]int
}

func newPlatformSet(hs map[string]Handler) (platformSet, error) {
	host := hostPlatform()
	set := platformSet{matchers: []platforms.MatchComparer{platforms.Only(host)}, handlers: map[string]int{}}
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
		}
		set.handlers[name] = i
	}
	return set, nil
}

// of returns the number of the handler's platform.
func (p platformSet) of(handler string) int { return p.handlers[handler] }

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
