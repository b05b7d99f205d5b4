package config

import (
	"context"

	"github.com/containerd/containerd/v2/version"
)

// Migrate moves the CRI's settings of a file older than version 4, where all of
// them were in the server's table, into the tables of today. It moves and
// renames what containerd does; keys that are gone stay, for the parsers to
// convert or warn about.
//
// It is the ConfigMigration of all three plugins. Each of them may be the first
// that containerd asks and the last that is left, so any call does the whole
// work and the next find nothing to do.
func Migrate(_ context.Context, configVersion int, pluginConfigs map[string]any) error {
	if configVersion >= version.ConfigVersion {
		return nil
	}
	old, ok := pluginConfigs[ServerPlugin].(map[string]any)
	if !ok {
		return nil
	}
	m := migration{images: map[string]any{}, runtime: map[string]any{}, server: map[string]any{}}
	for k, v := range old {
		m.move(k, v)
	}
	// A table under its new name was written for this version and wins, except
	// that for images containerd prefers the old one.
	place(pluginConfigs, ImagesPlugin, func(now map[string]any) map[string]any { return replace(now, m.images) })
	place(pluginConfigs, RuntimePlugin, func(now map[string]any) map[string]any { return merge(m.runtime, now) })
	pluginConfigs[ServerPlugin] = m.server
	return nil
}

// place puts the result of join into a plugin's table unless that would leave
// it empty or there is something that is not a table, for the parsers to
// refuse.
func place(pluginConfigs map[string]any, plugin string, join func(map[string]any) map[string]any) {
	now, ok := pluginConfigs[plugin].(map[string]any)
	if _, there := pluginConfigs[plugin]; there && !ok {
		return
	}
	if joined := join(now); len(joined) > 0 {
		pluginConfigs[plugin] = joined
	}
}

// replace overwrites whole values of now, save the pinned images, which are
// joined.
func replace(now, old map[string]any) map[string]any {
	out := merge(now, nil)
	for k, v := range old {
		if pinned, ok := v.(map[string]any); ok && k == "pinned_images" {
			v = merge(map[string]any{k: out[k]}, map[string]any{k: pinned})[k]
		}
		out[k] = v
	}
	return out
}

// migration is the old table, sorted into the new ones.
type migration struct {
	images, runtime, server map[string]any
}

func (m migration) move(k string, v any) {
	switch k {
	case "registry", "image_decryption", "max_concurrent_downloads", "image_pull_progress_timeout",
		"image_pull_with_sync_fs", "stats_collect_period":
		m.images[k] = v
	case "sandbox_image":
		m.images["pinned_images"] = map[string]any{"sandbox": v}
	case "disable_tcp_service", "stream_server_address", "stream_server_port", "stream_idle_timeout",
		"enable_tls_streaming", "x509_key_pair_streaming", streamCA, streamVersion, streamSuites:
		m.server[k] = v
	case "containerd":
		m.moveContainerd(v)
	case "cni":
		m.moveCNI(v)
	default:
		m.runtime[k] = v
	}
}

func (m migration) moveContainerd(v any) {
	table, ok := v.(map[string]any)
	if !ok {
		m.runtime["containerd"] = v
		return
	}
	rest := map[string]any{}
	for k, v := range table {
		switch k {
		case "snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers":
			m.images[k] = v
		default:
			rest[k] = v
		}
	}
	m.runtime["containerd"] = rest
}

func (m migration) moveCNI(v any) {
	m.runtime["cni"] = v
	table, ok := v.(map[string]any)
	if !ok {
		return
	}
	table = merge(table, nil)
	if dir, ok := table["bin_dir"].(string); ok && table["bin_dirs"] == nil {
		delete(table, "bin_dir")
		table["bin_dirs"] = []any{dir}
	}
	m.runtime["cni"] = table
}
