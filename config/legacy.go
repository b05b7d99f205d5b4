package config

import "slices"

// The runtime types that containerd 2.0 removed.
const (
	runtimeV1Linux = "io.containerd.runtime.v1.linux"
	runcV1Type     = "io.containerd.runc.v1"
)

// legacy gives the keys of older releases the place they have today. That they
// are there was warned about when the table was walked; here a warning is added
// only where that depends on other keys.
func (w *walker) legacy(v values) {
	cni, cri := v.table("cni"), v.table("containerd")
	if dir := cni.str("bin_dir"); dir != "" && slices.Equal(cni.list("bin_dirs"), []string{"/opt/cni/bin"}) {
		cni["bin_dirs"] = []string{dir}
	}
	if w.oldHandler(cri, "default_runtime", "default") {
		cri["default_runtime_name"] = "default"
	}
	w.oldHandler(cri, "untrusted_workload_runtime", "untrusted")
	runtimes := cri.table("runtimes")
	for _, name := range runtimes.names() {
		w.oldRuntime(name, runtimes.entry(name), v)
	}
}

// oldHandler moves a handler with a table of its own under runtimes and
// reports whether there was one. containerd 1.x printed these tables, empty,
// into its default configuration.
func (w *walker) oldHandler(cri values, table, name string) bool {
	old := cri.table(table)
	if !anySet(old) {
		return false
	}
	at := []string{"containerd", table}
	if old.str("runtime_type") == "" {
		w.warn("ignored, because it has no runtime_type; configure a handler under runtimes", at...)
		return false
	}
	runtimes := cri.table("runtimes")
	if _, ok := runtimes[name]; ok {
		return w.fail(at, "is a second definition of the handler %q, remove it", name)
	}
	runtimes[name] = map[string]any(old)
	text := "not a key of this version: "
	for _, k := range keys {
		if k.Plugin == RuntimePlugin && k.Path == "containerd."+table {
			text += k.Note
		}
	}
	w.warn(text, at...)
	return true
}

// oldRuntime replaces runtimes that are gone by the one that runs what they
// ran.
func (w *walker) oldRuntime(name string, h, v values) {
	if mode := h.str("sandbox_mode"); mode != "" && (h.str("sandboxer") == "" || h.str("sandboxer") == podSandboxer) {
		h["sandboxer"] = mode
	}
	old := h.str("runtime_type")
	if old != runtimeV1Linux && old != runcV1Type {
		return
	}
	h["runtime_type"] = runcType
	w.warn(old+" was removed in containerd 2.0 and "+runcType+" is used; write that",
		"containerd", "runtimes", name, "runtime_type")
	if old == runcV1Type {
		return
	}
	opts := map[string]any{}
	for key, val := range map[string]any{
		"BinaryName":    h.str("runtime_engine"),
		"Root":          h.str("runtime_root"),
		"SystemdCgroup": v.bool("systemd_cgroup"),
		"NoPivotRoot":   v.bool("containerd.no_pivot"),
	} {
		if val != "" && val != false {
			opts[key] = val
		}
	}
	h["options"] = merge(h.table("options"), opts)
}

// anySet reports whether a table holds anything but zero values.
func anySet(t map[string]any) bool {
	for _, v := range t {
		switch v := v.(type) {
		case map[string]any:
			if anySet(v) {
				return true
			}
		case []string:
			if len(v) > 0 {
				return true
			}
		case []any:
			if len(v) > 0 {
				return true
			}
		default:
			if v != "" && v != false && v != int64(0) {
				return true
			}
		}
	}
	return false
}
