package config

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"

	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"
)

// Report is what there is to say about a configuration.
type Report struct {
	// Files are the files it was put together from, in the order containerd
	// reads them: what a later one says wins.
	Files []string
	// Errors keep the plugins from starting.
	Errors []Finding
	// Warnings do not.
	Warnings []Finding
}

// Finding is one error or warning.
type Finding struct {
	// Key is the full path of the key in a version 4 file.
	Key string
	// Text says what is wrong.
	Text string
	// File and Line are where the key is written, "" and 0 if it is not.
	File string
	Line int
}

// String returns the finding on one line.
func (f Finding) String() string {
	where := ""
	if f.File != "" {
		where = fmt.Sprintf("%s:%d: ", f.File, f.Line)
	}
	return where + f.Key + ": " + f.Text
}

// Check puts a configuration together as the daemon does on start, imports and
// older versions included, and checks the tables of the CRI plugins and the
// keys around them. The error is about a file that the daemon could not load.
func Check(path string) (Report, error) {
	cfg, err := loadFile(path)
	if err != nil {
		return Report{}, fmt.Errorf("load configuration: %w", err)
	}
	files, err := readFiles(path)
	if err != nil {
		return Report{}, fmt.Errorf("load configuration: %w", err)
	}
	var r Report
	for _, f := range files {
		r.Files = append(r.Files, f.path)
		r.Warnings = append(r.Warnings, f.ignored()...)
	}
	for _, disabled := range cfg.DisabledPlugins {
		if slices.Contains([]string{ImagesPlugin, RuntimePlugin, ServerPlugin}, disabled) {
			r.Warnings = append(r.Warnings, locate(files, Finding{
				Key: "disabled_plugins", Text: "lists " + disabled + ", without which there is no CRI",
			}, []string{"disabled_plugins"}))
		}
	}
	r.tables(cfg, files)
	return r, nil
}

// loadFile runs containerd's own loader with the starting value that the
// daemon gives it. What the loader logs is found again by Check, with more
// detail, so it is dropped.
func loadFile(path string) (*srvconfig.Config, error) {
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	ctx := log.WithLogger(context.Background(), quiet.WithContext(context.Background()))
	cfg := &srvconfig.Config{Version: version.ConfigVersion}
	ours := func() iter.Seq[plugin.Registration] {
		return slices.Values([]plugin.Registration{{ConfigMigration: Migrate}})
	}
	if err := srvconfig.LoadConfigWithPlugins(ctx, path, ours, cfg); err != nil {
		return nil, err
	}
	return cfg, nil
}

// tables runs the parsers.
func (r *Report) tables(cfg *srvconfig.Config, files []file) {
	for _, p := range []struct {
		plugin string
		parse  func(Raw) ([]Warning, error)
	}{
		{ImagesPlugin, func(raw Raw) ([]Warning, error) { _, w, err := ParseImages(raw); return w, err }},
		{RuntimePlugin, func(raw Raw) ([]Warning, error) { _, w, err := ParseRuntime(raw); return w, err }},
		{ServerPlugin, func(raw Raw) ([]Warning, error) { _, w, err := ParseServer(raw); return w, err }},
		{NRIPlugin, func(raw Raw) ([]Warning, error) { _, w, err := ParseNRI(raw); return w, err }},
	} {
		raw, ok := cfg.Plugins[p.plugin].(map[string]any)
		if !ok && cfg.Plugins[p.plugin] != nil {
			f := Finding{Key: fullPath(p.plugin, nil), Text: "want a table, have " + kindOf(cfg.Plugins[p.plugin])}
			r.Errors = append(r.Errors, locate(files, f, []string{"plugins", p.plugin}))
			continue
		}
		warnings, err := p.parse(raw)
		for _, w := range warnings {
			r.Warnings = append(r.Warnings, locateKey(files, Finding{Key: w.Key, Text: w.Text}))
		}
		for _, e := range keyErrors(err) {
			r.Errors = append(r.Errors, locateKey(files, Finding{Key: e.Key, Text: e.Text}))
		}
	}
}

// keyErrors takes apart what a parser joined.
func keyErrors(err error) []*KeyError {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var out []*KeyError
		for _, e := range joined.Unwrap() {
			out = append(out, keyErrors(e)...)
		}
		return out
	}
	var e *KeyError
	if errors.As(err, &e) {
		return []*KeyError{e}
	}
	return nil
}

// readFiles reads a file and what it imports, in the order and by the rules of
// containerd's loader.
func readFiles(path string) ([]file, error) {
	var out []file
	seen := map[string]bool{}
	for pending := []string{path}; len(pending) > 0; {
		path, pending = pending[0], pending[1:]
		if seen[path] {
			continue
		}
		seen[path] = true
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		out = append(out, file{path: path, data: data, lines: lines(data)})
		imports, err := importsOf(path, data)
		if err != nil {
			return nil, err
		}
		pending = append(pending, imports...)
	}
	return out, nil
}

func importsOf(path string, data []byte) ([]string, error) {
	var cfg struct {
		Imports []string `toml:"imports"`
	}
	if err := toml.Unmarshal(data, &cfg); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	var out []string
	for _, p := range cfg.Imports {
		p = filepath.Clean(p)
		if !filepath.IsAbs(p) {
			p = filepath.Join(filepath.Dir(path), p)
		}
		if !strings.Contains(p, "*") {
			out = append(out, p)
			continue
		}
		matches, err := filepath.Glob(p)
		if err != nil {
			return nil, fmt.Errorf("%s: import %q: %w", path, p, err)
		}
		out = append(out, matches...)
	}
	return out, nil
}

// ignored finds the keys outside the plugins' tables that containerd does not
// know. It drops them with a line in its log.
func (f file) ignored() []Finding {
	var cfg srvconfig.Config
	err := toml.NewDecoder(strings.NewReader(string(f.data))).DisallowUnknownFields().Decode(&cfg)
	var strict *toml.StrictMissingError
	if !errors.As(err, &strict) {
		return nil
	}
	var out []Finding
	for i := range strict.Errors {
		e := &strict.Errors[i]
		line, _ := e.Position()
		out = append(out, Finding{
			Key: strings.Join(e.Key(), "."), Text: "unknown to containerd, which ignores it", File: f.path, Line: line,
		})
	}
	return out
}
