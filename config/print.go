package config

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Default returns the default configuration of the plugins as a version
// 4 file with comments. Keys under a name of choice are shown commented out,
// except where the defaults have such a name.
func Default() []byte {
	var b bytes.Buffer
	b.WriteString("version = 4\n")
	for _, t := range sections() {
		t.print(&b)
	}
	return b.Bytes()
}

// section is one table of the printed file.
type section struct {
	plugin string
	path   []string
	keys   []*Key
	// values are in force in place of the keys' defaults, by key.
	values map[string]any
	// example marks a table that is not in the defaults.
	example bool
}

// sections puts the keys into tables, in the order of the table of keys.
func sections() []*section {
	var out []*section
	for i := range keys {
		k := &keys[i]
		if k.State == Removed || k.Path == strings.TrimSuffix(options, ".") {
			continue
		}
		parts := strings.Split(k.Path, ".")
		path := parts[:len(parts)-1]
		at := slices.IndexFunc(out, func(s *section) bool { return s.plugin == k.Plugin && slices.Equal(s.path, path) })
		if at < 0 {
			at = len(out)
			out = append(out, &section{plugin: k.Plugin, path: path, example: parts[len(parts)-1] == "*"})
		}
		out[at].keys = append(out[at].keys, k)
	}
	for _, s := range out {
		s.fill()
	}
	return out
}

// fill gives a section the names and values that the defaults have there.
func (s *section) fill() {
	path := strings.Join(s.path, ".")
	for _, e := range shown {
		if e.plugin != s.plugin {
			continue
		}
		switch rest, ok := strings.CutPrefix(path+".", e.pattern+"."); {
		case path+".*" == e.pattern:
			s.values, s.example = map[string]any{e.name: e.values[""]}, false
		case ok:
			s.path = slices.Concat(strings.Split(strings.TrimSuffix(e.pattern, "*")+e.name, "."),
				strings.FieldsFunc(rest, func(r rune) bool { return r == '.' }))
			if rest == "" {
				s.values = e.values
			}
		}
	}
	s.example = s.example || slices.Contains(s.path, "*")
}

func (s *section) print(b *bytes.Buffer) {
	mark := ""
	if s.example {
		mark = "# "
	}
	fmt.Fprintf(b, "\n%s[%s]\n", mark, fullPath(s.plugin, named(s.path)))
	for _, k := range s.keys {
		s.printKey(b, k, mark)
	}
}

func (s *section) printKey(b *bytes.Buffer, k *Key, mark string) {
	text := k.Doc
	switch k.State {
	case NoMeaning:
		text += " No meaning here: " + k.Note + "."
	case Accepted:
		text += " No effect yet: " + k.Note + "."
	case Deprecated:
		text += " Deprecated: " + k.Note + "."
	}
	for _, line := range wrap(text, 76) {
		fmt.Fprintf(b, "  # %s\n", line)
	}
	name, value := k.Path[strings.LastIndex(k.Path, ".")+1:], plain(k.Default)
	if v, ok := s.values[name]; ok {
		value = v
	}
	if name == "*" {
		name = "NAME"
		for chosen, v := range s.values {
			name, value = chosen, v
		}
	}
	if !printed(k) {
		mark = "# "
	}
	fmt.Fprintf(b, "  %s%s = %s\n", mark, quoteKey(name), literal(value))
}

// literal writes a value as TOML.
func literal(v any) string {
	switch v := v.(type) {
	case string:
		return "'" + v + "'"
	case bool:
		return strconv.FormatBool(v)
	case int64:
		return strconv.FormatInt(v, 10)
	case []string:
		quoted := make([]string, len(v))
		for i, s := range v {
			quoted[i] = literal(s)
		}
		return "[" + strings.Join(quoted, ", ") + "]"
	}
	return "{}"
}

// wrap breaks text into lines of at most width bytes where words allow it.
func wrap(text string, width int) []string {
	var out []string
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len(line)+1+len(word) > width {
			out = append(out, line)
			line = ""
		}
		line = strings.TrimPrefix(line+" "+word, " ")
	}
	return append(out, line)
}

// Reference returns the documentation of every key, Markdown.
func Reference() []byte {
	var b bytes.Buffer
	plugin := ""
	for i := range keys {
		k := &keys[i]
		if k.Plugin != plugin {
			plugin = k.Plugin
			fmt.Fprintf(&b, "\n## [plugins.'%s']\n\n| key | default | state | meaning |\n| --- | --- | --- | --- |\n", plugin)
		}
		text := k.Doc
		if k.State != Honoured {
			text = strings.TrimSpace(text + " (" + k.Note + ")")
		}
		fmt.Fprintf(&b, "| `%s` | `%s` | %s | %s |\n", k.Path, literal(plain(k.Default)), k.State, strings.ReplaceAll(text, "|", "\\|"))
	}
	return bytes.TrimLeft(b.Bytes(), "\n")
}
