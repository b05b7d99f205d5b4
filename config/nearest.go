package config

import (
	"cmp"
	"slices"
	"strings"
)

// renamed are keys whose new name nobody would find by its spelling.
var renamed = map[string]string{
	"sandbox_image": fullPath(ImagesPlugin, []string{"pinned_images", "sandbox"}),
}

// nearest returns the full path of the known key that the user most likely
// meant with the unknown name under path: the one with the most similar name,
// of several the one nearest by.
func nearest(plugin string, path []string, name string) string {
	if r, ok := renamed[strings.ToLower(name)]; ok {
		return r
	}
	type candidate struct {
		text           string
		letters, place int
	}
	var all []candidate
	for _, k := range keys {
		if k.State == Removed {
			continue
		}
		parts := strings.Split(k.Path, ".")
		// Where the user has a name of choice, so has the answer.
		for i := range parts {
			if parts[i] == "*" && i < len(path) && slices.Equal(parts[:i], path[:i]) {
				parts[i] = path[i]
			}
		}
		for depth := range parts {
			leaf := parts[depth]
			if leaf == "*" || depth < len(parts)-1 && plugin != k.Plugin {
				continue
			}
			all = append(all, candidate{
				text:    fullPath(k.Plugin, named(parts[:depth+1])),
				letters: distance(strings.ToLower(leaf), strings.ToLower(name)),
				place:   placeDistance(plugin, path, k.Plugin, parts[:depth]),
			})
		}
	}
	best := slices.MinFunc(all, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.letters, b.letters), cmp.Compare(a.place, b.place), cmp.Compare(a.text, b.text))
	})
	return best.text
}

// placeDistance says how far apart two tables are: the steps from one to the
// other, with another plugin farther than anything within one, and a table
// whose name the user would have to choose farther still.
func placeDistance(pluginA string, a []string, pluginB string, b []string) int {
	if slices.Contains(b, "*") {
		return 2000 + len(b)
	}
	if pluginA != pluginB {
		return 1000 + len(b)
	}
	common := 0
	for common < len(a) && common < len(b) && a[common] == b[common] {
		common++
	}
	return len(a) + len(b) - 2*common
}

// named writes NAME where the user has a name of choice.
func named(path []string) []string {
	out := slices.Clone(path)
	for i := range out {
		if out[i] == "*" {
			out[i] = "NAME"
		}
	}
	return out
}

// maxName bounds the work for absurdly long names.
const maxName = 128

// distance is the number of letters to insert, remove or replace, or of
// neighbours to swap, to turn a into b.
func distance(a, b string) int {
	if len(a) > maxName || len(b) > maxName {
		return max(len(a), len(b))
	}
	older, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		row[0] = i + 1
		for j := range len(b) {
			change := last[j]
			if a[i] != b[j] {
				change++
			}
			row[j+1] = min(change, last[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], older[j-1]+1)
			}
		}
		older, last, row = last, row, older
	}
	return last[len(b)]
}
