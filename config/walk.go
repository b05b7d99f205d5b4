package config

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"
)

// node is one level of a table: what may stand there.
type node struct {
	names map[string]*node // by key
	any   *node            // for a name of choice, nil if there is none
	key   *Key             // nil for a table that is only looked into
}

// trees holds what may stand in each plugin's table. The options of runc are a
// tree of their own because only some handlers have them.
var trees, runcOptions = buildTrees()

func buildTrees() (map[string]*node, *node) {
	t := map[string]*node{ImagesPlugin: {}, RuntimePlugin: {}, ServerPlugin: {}, NRIPlugin: {}}
	runc := &node{}
	for i := range keys {
		k := &keys[i]
		if name, ok := strings.CutPrefix(k.Path, options); ok {
			runc.add(name, k)
			continue
		}
		t[k.Plugin].add(k.Path, k)
	}
	rt := t[RuntimePlugin]
	for _, path := range handlerTables {
		old := rt.at(path)
		old.names = rt.at("containerd.runtimes.*").names
	}
	return t, runc
}

func (n *node) add(path string, k *Key) {
	for name := range strings.SplitSeq(path, ".") {
		n = n.child(name)
	}
	n.key = k
}

func (n *node) at(path string) *node {
	for name := range strings.SplitSeq(path, ".") {
		n = n.child(name)
	}
	return n
}

// child returns the level below, made if it is not there.
func (n *node) child(name string) *node {
	if name == "*" {
		if n.any == nil {
			n.any = &node{}
		}
		return n.any
	}
	if n.names == nil {
		n.names = map[string]*node{}
	}
	if n.names[name] == nil {
		n.names[name] = &node{}
	}
	return n.names[name]
}

// table reports whether a table stands here that is looked into.
func (n *node) table() bool { return n.names != nil || n.any != nil }

// find returns what name stands for and how it is spelled in the table of
// keys. Like containerd, it takes a key in other letter case.
func (n *node) find(name string) (string, *node) {
	if c := n.names[name]; c != nil {
		return name, c
	}
	for _, k := range slices.Sorted(maps.Keys(n.names)) {
		if strings.EqualFold(k, name) {
			return k, n.names[k]
		}
	}
	return name, n.any
}

// walker checks a table against its tree and brings the values into one form:
// bool, int64, string, []string and map[string]any.
type walker struct {
	plugin   string
	errs     []error
	warnings []Warning
	warned   map[string]bool
}

func newWalker(plugin string) *walker {
	return &walker{plugin: plugin, warned: map[string]bool{}}
}

// table returns the clean form of raw, keys in the spelling of the table of
// keys. Everything wrong is collected in w.
func (w *walker) table(n *node, path []string, raw map[string]any) map[string]any {
	clean := make(map[string]any, len(raw))
	for _, name := range inOrder(n, raw) {
		at := append(slices.Clip(path), name)
		known, child := n.find(name)
		if child == nil {
			w.fail(at, "unknown key, the nearest known one is %s", nearest(w.plugin, path, name))
			continue
		}
		v, ok := w.value(child, at, raw[name])
		if ok {
			clean[known] = v
		}
	}
	return clean
}

// inOrder sorts the keys of raw, those in unusual spelling last: they were
// written by hand and win over a default in the usual one.
func inOrder(n *node, raw map[string]any) []string {
	return slices.SortedFunc(maps.Keys(raw), func(a, b string) int {
		usual := func(s string) int {
			if known, _ := n.find(s); known == s {
				return 0
			}
			return 1
		}
		return cmp.Or(cmp.Compare(usual(a), usual(b)), cmp.Compare(a, b))
	})
}

func (w *walker) value(n *node, at []string, v any) (any, bool) {
	if t, ok := v.(map[string]any); ok && n.table() {
		return w.table(n, at, t), true
	}
	if n.table() {
		return nil, w.fail(at, "want a table, have %s", kindOf(v))
	}
	out, ok := convert(v, n.key.Default)
	if !ok {
		return nil, w.fail(at, "want %s, have %s", kindOf(n.key.Default), kindOf(v))
	}
	if _, ok := n.key.Default.(time.Duration); ok {
		if err := checkDuration(out.(string)); err != nil {
			return nil, w.fail(at, "%v", err)
		}
	}
	w.judge(n.key, at, out)
	return out, true
}

// judge warns about a key that is set and does not simply have its effect.
func (w *walker) judge(k *Key, at []string, v any) {
	if k.State == Honoured || k.State == NoMeaning || k.isDefault(v) {
		return
	}
	key := fullPath(w.plugin, at)
	if k.group != "" {
		key = fullPath(w.plugin, strings.Split(k.group, "."))
	}
	if w.warned[key] {
		return
	}
	w.warned[key] = true
	text := map[State]string{
		Accepted:   "has no effect yet: ",
		Deprecated: "deprecated: ",
		Removed:    "not a key of this version: ",
	}[k.State] + k.Note
	w.warnings = append(w.warnings, Warning{Key: key, Text: text, Deprecation: k.deprecation})
}

// fail records an error and returns false, for use in a return statement.
func (w *walker) fail(at []string, format string, args ...any) bool {
	w.errs = append(w.errs, keyErrorf(fullPath(w.plugin, at), format, args...))
	return false
}

// warn records a warning about the key at path.
func (w *walker) warn(text string, path ...string) {
	w.warnings = append(w.warnings, Warning{Key: fullPath(w.plugin, path), Text: text})
}

// result returns what was collected, nothing but the error if there is one.
func (w *walker) result() ([]Warning, error) { return w.warnings, errors.Join(w.errs...) }

// isDefault reports whether v, in clean form, says what the default says.
func (k *Key) isDefault(v any) bool {
	same := append([]any{k.Default}, k.same...)
	return slices.ContainsFunc(same, func(d any) bool {
		switch d := d.(type) {
		case []string:
			have, ok := v.([]string)
			return ok && slices.Equal(d, have)
		case time.Duration:
			have, err := time.ParseDuration(v.(string))
			return v == "" || err == nil && have == d
		case map[string]any:
			have, ok := v.(map[string]any)
			return ok && len(have) == len(d)
		default:
			return reflect.DeepEqual(d, v)
		}
	})
}

// convert brings v into the clean form of the type of want.
func convert(v, want any) (any, bool) {
	switch want.(type) {
	case string, time.Duration:
		s, ok := v.(string)
		return s, ok
	case bool:
		b, ok := v.(bool)
		return b, ok
	case int64:
		i, ok := v.(int64)
		return i, ok
	case map[string]any:
		t, ok := v.(map[string]any)
		return t, ok
	case []string:
		return convertStrings(v)
	}
	return nil, false
}

func convertStrings(v any) (any, bool) {
	switch v := v.(type) {
	case []string:
		return slices.Clone(v), true
	case []any:
		out := make([]string, 0, len(v))
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, false
			}
			out = append(out, s)
		}
		return out, true
	}
	return nil, false
}

func kindOf(v any) string {
	switch v.(type) {
	case string:
		return "a string"
	case time.Duration:
		return "a duration as \"1m30s\""
	case bool:
		return "true or false"
	case int64:
		return "an integer"
	case float64:
		return "a number with a fraction"
	case []string:
		return "a list of strings"
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	}
	return "a date or time"
}

func checkDuration(s string) error {
	if s == "" {
		return nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("%q is not a duration, write one as \"1m30s\"", s)
	}
	if d < 0 {
		return fmt.Errorf("%q is negative", s)
	}
	return nil
}

// fullPath writes a key as it stands in a version 4 file.
func fullPath(plugin string, path []string) string {
	var b strings.Builder
	b.WriteString("plugins." + quoteKey(plugin))
	for _, p := range path {
		b.WriteString("." + quoteKey(p))
	}
	return b.String()
}

// quoteKey writes one part of a TOML key.
func quoteKey(s string) string {
	bare := s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") == ""
	switch {
	case bare:
		return s
	case !strings.ContainsFunc(s, func(r rune) bool { return r == '\'' || r < ' ' || r == 0x7f }):
		return "'" + s + "'"
	}
	return fmt.Sprintf("%q", s)
}
