package config

import (
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// values is a table in clean form, laid over the defaults. What is not there
// reads as zero.
type values map[string]any

// load checks raw and lays it over the plugin's defaults.
func load(plugin string, raw Raw) (*walker, values) {
	w := newWalker(plugin)
	clean := w.table(trees[plugin], nil, raw)
	return w, merge(*defaultTable(plugin), clean)
}

// get reads the value at a path of fixed names.
func get[T any](v values, path string) T {
	t := map[string]any(v)
	parts := strings.Split(path, ".")
	for _, p := range parts[:len(parts)-1] {
		t, _ = t[p].(map[string]any)
	}
	out, _ := t[parts[len(parts)-1]].(T)
	return out
}

func (v values) str(path string) string    { return get[string](v, path) }
func (v values) bool(path string) bool     { return get[bool](v, path) }
func (v values) int(path string) int       { return int(get[int64](v, path)) }
func (v values) list(path string) []string { return slices.Clone(get[[]string](v, path)) }

// duration reads a duration that was checked before; the empty string means
// def.
func (v values) duration(path string, def time.Duration) time.Duration {
	if d, err := time.ParseDuration(v.str(path)); err == nil {
		return d
	}
	return def
}

// table reads the table at path, nil if there is none.
func (v values) table(path string) values { return get[map[string]any](v, path) }

// names are the names of choice in a table, sorted.
func (v values) names() []string { return slices.Sorted(maps.Keys(v)) }

// entry reads the table under a name of choice.
func (v values) entry(name string) values {
	t, _ := v[name].(map[string]any)
	return t
}

// absolute reports an error for a path that depends on where the daemon was
// started.
func (w *walker) absolute(value string, at ...string) {
	if value != "" && !filepath.IsAbs(value) {
		w.fail(at, "%q is not an absolute path", value)
	}
}

// notNegative reports an error for a negative number.
func (w *walker) notNegative(value int, at ...string) {
	if value < 0 {
		w.fail(at, "%d is negative", value)
	}
}
