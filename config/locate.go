package config

import (
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

// file is one file of a configuration.
type file struct {
	path string
	data []byte
	// lines are by keyID of every key and table in the file.
	lines map[string]int
}

// keyID makes a map key of a path; no TOML key can hold the separator.
func keyID(path []string) string { return strings.Join(path, "\x00") }

// lines finds the line of every key in a TOML document, as far as it is one.
func lines(data []byte) map[string]int {
	out := map[string]int{}
	var p unstable.Parser
	p.Reset(data)
	var table []string
	for p.NextExpression() {
		switch e := p.Expression(); e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = note(&p, out, nil, e)
		case unstable.KeyValue:
			keyValue(&p, out, table, e)
		}
	}
	return out
}

// note records where each part of a key is first written and returns the whole
// path.
func note(p *unstable.Parser, out map[string]int, prefix []string, e *unstable.Node) []string {
	path := slices.Clone(prefix)
	for it := e.Key(); it.Next(); {
		path = append(path, string(it.Node().Data))
		if _, ok := out[keyID(path)]; !ok {
			out[keyID(path)] = p.Shape(it.Node().Raw).Start.Line
		}
	}
	return path
}

func keyValue(p *unstable.Parser, out map[string]int, prefix []string, e *unstable.Node) {
	path := note(p, out, prefix, e)
	if e.Value().Kind != unstable.InlineTable {
		return
	}
	for it := e.Value().Children(); it.Next(); {
		if it.Node().Kind == unstable.KeyValue {
			keyValue(p, out, path, it.Node())
		}
	}
}

// locateKey finds where the key of a finding is written, under its name in any
// version of the file format.
func locateKey(files []file, f Finding) Finding {
	path := splitKey(f.Key)
	if len(path) < 2 {
		return f
	}
	return locate(files, f, spellings(path[1], path[2:])...)
}

// spellings are the paths at which a key may be written: today's, and those of
// versions 2 and 1, where all tables were one.
func spellings(plugin string, path []string) [][]string {
	under := func(root string, path ...string) []string { return append([]string{"plugins", root}, path...) }
	out := [][]string{under(plugin, path...)}
	old := path
	if plugin == ImagesPlugin && len(path) > 0 {
		switch path[0] {
		case "snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers":
			old = append([]string{"containerd"}, path...)
		case "pinned_images":
			old = []string{"sandbox_image"}
		}
	}
	return append(out, under(ServerPlugin, old...), under("cri", old...))
}

// locate finds the last place where one of the paths is written, or else the
// table it would be in.
func locate(files []file, f Finding, paths ...[]string) Finding {
	// Down to [plugins.NAME]: above it a line says nothing any more.
	for up := 0; ; up++ {
		short := true
		for _, path := range paths {
			if up > 0 && len(path)-up < 2 || len(path)-up < 1 {
				continue
			}
			short = false
			for _, file := range slices.Backward(files) {
				if line, ok := file.lines[keyID(path[:len(path)-up])]; ok {
					f.File, f.Line = file.path, line
					return f
				}
			}
		}
		if short {
			return f
		}
	}
}

// splitKey takes apart what fullPath wrote.
func splitKey(key string) []string {
	var p unstable.Parser
	p.Reset([]byte(key + " = 0"))
	if !p.NextExpression() {
		return nil
	}
	var out []string
	for it := p.Expression().Key(); it.Next(); {
		out = append(out, string(it.Node().Data))
	}
	return out
}
