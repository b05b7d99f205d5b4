package config

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// defaultTable builds a plugin's table from the table of keys: every current key
// with a fixed path, and the entries in shown.
func defaultTable(plugin string) *Raw {
	out := map[string]any{}
	for i := range keys {
		k := &keys[i]
		if k.Plugin != plugin || k.State == Removed || strings.Contains(k.Path, "*") {
			continue
		}
		set(out, k.Path, plain(k.Default))
	}
	for _, s := range shown {
		if s.plugin == plugin {
			maps.Copy(out, merge(out, entry(s.pattern, s.name, s.values)))
		}
	}
	raw := Raw(out)
	return &raw
}

// entry builds what stands under a name of choice: the keys below pattern,
// with the given values in place of their defaults. "" is the entry itself.
func entry(pattern, name string, values map[string]any) map[string]any {
	out := map[string]any{}
	path := strings.TrimSuffix(pattern, "*") + name
	if v, ok := values[""]; ok {
		set(out, path, v)
		return out
	}
	for i := range keys {
		k := &keys[i]
		below, ok := strings.CutPrefix(k.Path, pattern+".")
		if !ok || !printed(k) || strings.Contains(below, "*") || k.Path == strings.TrimSuffix(options, ".") {
			continue
		}
		v, ok := values[below]
		if !ok {
			v = plain(k.Default)
		}
		set(out, path+"."+below, v)
	}
	return out
}

// printed reports whether k belongs into the default configuration. Of runc's
// options those are left out that containerd leaves out: a runtime like it
// might not know them.
func printed(k *Key) bool {
	if strings.HasPrefix(k.Path, options) {
		return k.State == Honoured && k.Path != options+"NoPivotRoot"
	}
	return k.State != Removed
}

// set puts v at a dotted path.
func set(t map[string]any, path string, v any) {
	parts := strings.Split(path, ".")
	for _, p := range parts[:len(parts)-1] {
		below, ok := t[p].(map[string]any)
		if !ok {
			below = map[string]any{}
			t[p] = below
		}
		t = below
	}
	t[parts[len(parts)-1]] = v
}

// plain is a key's default in the form it has in a file.
func plain(v any) any {
	switch v := v.(type) {
	case time.Duration:
		return v.String()
	case []string:
		return append([]string{}, slices.Clone(v)...)
	}
	return v
}
