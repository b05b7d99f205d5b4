package config

import (
	"errors"
	"fmt"
	"strings"

	"github.com/distribution/reference"
)

// Pins tells which images are to be kept by the kubelet.
type Pins struct {
	exact              map[string]bool
	prefixes, keywords []string
}

var errStars = errors.New("a star stands only at the end or at both ends")

// add takes up a pattern: a reference, as users write it; "prefix*"; or
// "*keyword*".
func (p *Pins) add(pattern string) error {
	body := strings.Trim(pattern, "*")
	switch {
	case body == "" || strings.Contains(body, "*"):
		return errStars
	case pattern == "*"+body+"*":
		p.keywords = append(p.keywords, body)
	case pattern == body+"*":
		p.prefixes = append(p.prefixes, body)
	case pattern == body:
		named, err := reference.ParseDockerRef(pattern)
		if err != nil {
			return fmt.Errorf("names no image: %w", err)
		}
		if p.exact == nil {
			p.exact = map[string]bool{}
		}
		p.exact[named.String()] = true
	default:
		return errStars
	}
	return nil
}

// Match reports whether a reference, in its full form, is of a pinned image.
func (p Pins) Match(name string) bool {
	if p.exact[name] {
		return true
	}
	for _, prefix := range p.prefixes {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	for _, k := range p.keywords {
		if strings.Contains(name, k) {
			return true
		}
	}
	return false
}
