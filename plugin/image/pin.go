package image

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// MatchPinned returns a function that tells whether a normalised reference
// matches one of the patterns: an exact reference, normalised like any other;
// "prefix*"; or "*keyword*".
func MatchPinned(patterns []string) (func(name string) bool, error) {
	exact := map[string]bool{}
	var prefixes, keywords []string
	for _, p := range patterns {
		body := strings.Trim(p, "*")
		switch {
		case body == "" || strings.Contains(body, "*"):
			return nil, fmt.Errorf("pinned image pattern %q: a star stands only at the end or at both ends: %w", p, errdefs.ErrInvalidArgument)
		case p == "*"+body+"*":
			keywords = append(keywords, body)
		case p == body+"*":
			prefixes = append(prefixes, body)
		case p == body:
			named, err := normalise(p)
			if err != nil {
				return nil, fmt.Errorf("pinned image pattern: %w", err)
			}
			exact[named.String()] = true
		default:
			return nil, fmt.Errorf("pinned image pattern %q: a star stands only at the end or at both ends: %w", p, errdefs.ErrInvalidArgument)
		}
	}
	return func(name string) bool {
		if exact[name] {
			return true
		}
		for _, p := range prefixes {
			if strings.HasPrefix(name, p) {
				return true
			}
		}
		for _, k := range keywords {
			if strings.Contains(name, k) {
				return true
			}
		}
		return false
	}, nil
}
