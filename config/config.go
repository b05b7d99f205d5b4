// Package config owns the meaning of gantry's configuration: the three tables
// of the CRI plugins and that of NRI in a containerd config.toml, their keys, defaults,
// conversions from older versions and checks.
//
// containerd decodes a plugin's table into the value that was registered for
// it and drops keys which that value does not know. So the plugins register a
// Raw, which keeps everything, and call ParseImages, ParseRuntime, ParseServer
// or ParseNRI, which refuse what nobody knows and name what is accepted but
// not acted upon. The package reads configuration files only; it never looks
// at the host, so that a file can be checked on another machine.
//
// Start reading at keys.go, the one table that parsing, defaults, warnings and
// documentation come from; then images.go, runtime.go and server.go for the
// typed values, migrate.go and legacy.go for older files, check.go for whole
// files.
package config

import (
	"fmt"
	"maps"

	"github.com/containerd/containerd/v2/pkg/deprecation"
	"github.com/containerd/errdefs"
)

// The plugins whose tables this package knows.
const (
	ImagesPlugin  = "io.containerd.cri.v1.images"
	RuntimePlugin = "io.containerd.cri.v1.runtime"
	ServerPlugin  = "io.containerd.grpc.v1.cri"
	NRIPlugin     = "io.containerd.nri.v1.nri"
)

// Raw is a plugin's table as containerd decoded it over the defaults. It is
// what a plugin registers as its Config, by pointer.
type Raw map[string]any

// DefaultImages returns the images table with every key at its default.
func DefaultImages() *Raw { return defaultTable(ImagesPlugin) }

// DefaultRuntime returns the runtime table with every key at its default.
func DefaultRuntime() *Raw { return defaultTable(RuntimePlugin) }

// DefaultServer returns the server table with every key at its default.
func DefaultServer() *Raw { return defaultTable(ServerPlugin) }

// DefaultNRI returns the NRI table with every key at its default.
func DefaultNRI() *Raw { return defaultTable(NRIPlugin) }

// Warning is something about an accepted configuration that its owner should
// know.
type Warning struct {
	// Key is the full path of the key, as plugins.'io…'.cni.bin_dir.
	Key string
	// Text says what is wrong with it and what to use instead.
	Text string
	// Deprecation is containerd's ID for it, "" where containerd has none. The
	// owner can silence it with ignore_deprecation_warnings.
	Deprecation deprecation.Warning
}

// String returns the warning on one line.
func (w Warning) String() string { return w.Key + ": " + w.Text }

// KeyError is a key that cannot be accepted. Its class is InvalidArgument.
type KeyError struct {
	// Key is the full path of the key.
	Key string
	// Text says what is wrong with it.
	Text string
}

// Error returns the error on one line.
func (e *KeyError) Error() string { return e.Key + ": " + e.Text }

// Unwrap gives the error its class.
func (e *KeyError) Unwrap() error { return errdefs.ErrInvalidArgument }

func keyErrorf(key, format string, args ...any) *KeyError {
	return &KeyError{Key: key, Text: fmt.Sprintf(format, args...)}
}

// merge lays over upon a deep copy of base. A table is merged with a table,
// anything else is replaced.
func merge(base, over map[string]any) map[string]any {
	out := maps.Clone(base)
	if out == nil {
		out = map[string]any{}
	}
	for k, v := range out {
		if t, ok := v.(map[string]any); ok {
			out[k] = merge(t, nil)
		}
	}
	for k, v := range over {
		t, ok := v.(map[string]any)
		if !ok {
			out[k] = v
			continue
		}
		below, _ := out[k].(map[string]any)
		out[k] = merge(below, t)
	}
	return out
}
