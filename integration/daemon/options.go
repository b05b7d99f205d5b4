package daemon

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

// Config is a containerd config.toml as nested tables.
type Config map[string]any

// Set puts a value at a path of table names, making the tables on the way.
func (c Config) Set(value any, path ...string) {
	for len(path) > 1 {
		next, ok := c[path[0]].(Config)
		if !ok {
			next = Config{}
			c[path[0]] = next
		}
		c, path = next, path[1:]
	}
	c[path[0]] = value
}

// settings is what options change.
type settings struct {
	binary   string // looked up on binDirs when it has no slash
	noCRI    bool
	cgroupfs bool
	stock    bool
	env      map[string]string
	path     []string
	edits    []func(*Instance, Config)
	conflist string
	expected []string
}

// Option changes how a daemon is made.
type Option func(*settings)

// Set overrides one key of the configuration:
//
//	daemon.Set(32, "plugins", daemon.RuntimePlugin, "max_container_log_line_size")
func Set(value any, path ...string) Option {
	return Edit(func(_ *Instance, c Config) { c.Set(value, path...) })
}

// Edit changes the configuration once it is otherwise complete. The instance
// tells the directories and names that were given to this daemon.
func Edit(f func(*Instance, Config)) Option {
	return func(s *settings) { s.edits = append(s.edits, f) }
}

// Env adds a variable to the environment of the daemon, and so of its shims and
// plugins: fault injection is told this way.
func Env(name, value string) Option {
	return func(s *settings) { s.env[name] = value }
}

// PathFirst puts a directory before all others on the daemon's PATH, for
// wrappers of runc or a shim.
func PathFirst(dir string) Option {
	return func(s *settings) { s.path = append([]string{dir}, s.path...) }
}

// Conflist replaces the CNI configuration; empty means that there is none.
func Conflist(json string) Option {
	return func(s *settings) { s.conflist = json }
}

// Expect names programs that the daemon keeps running besides its own, such as
// NRI plugins: while it is up they are no leak.
func Expect(programs ...string) Option {
	return func(s *settings) { s.expected = append(s.expected, programs...) }
}

// Binary runs another daemon program.
func Binary(path string) Option {
	return func(s *settings) { s.binary = path }
}

// Stock runs containerd as released, with its own CRI service, to compare with.
// It needs an image for its pause containers under the name PauseImage.
func Stock() Option {
	return func(s *settings) { s.stock, s.binary = true, "stock/containerd" }
}

// NoCRI runs a daemon that is not expected to serve CRI.
func NoCRI() Option {
	return func(s *settings) { s.noCRI = true }
}

// Cgroupfs has the daemon make cgroups itself where systemd would.
func Cgroupfs() Option {
	return func(s *settings) { s.cgroupfs = true }
}

// PauseImage is the name under which Stock looks for its pause image.
const PauseImage = "gantry.test/pause:1"

func newSettings(opts []Option) (settings, error) {
	s := settings{binary: "containerd", env: map[string]string{}, conflist: defaultConflist}
	for _, o := range opts {
		o(&s)
	}
	dirs, err := BinDirs()
	if err != nil {
		return s, err
	}
	s.path = append(s.path, dirs...)
	if !filepath.IsAbs(s.binary) {
		if s.binary, err = find(s.binary, dirs); err != nil {
			return s, err
		}
	}
	return s, nil
}

// BinDirs are the directories of the programs under test: those of GANTRY_BIN,
// separated by colons, else bin/ of the module.
func BinDirs() ([]string, error) {
	if env := os.Getenv("GANTRY_BIN"); env != "" {
		return filepath.SplitList(env), nil
	}
	_, file, _, ok := runtime.Caller(0)
	root := filepath.Join(filepath.Dir(file), "..", "..")
	if _, err := os.Stat(filepath.Join(root, "go.mod")); !ok || err != nil {
		return nil, errors.New("find programs: set GANTRY_BIN to the directory that make build filled")
	}
	return []string{filepath.Join(root, "bin")}, nil
}

func find(name string, dirs []string) (string, error) {
	for _, d := range dirs {
		if p := filepath.Join(d, name); isFile(p) {
			return p, nil
		}
	}
	return "", fmt.Errorf("find %s in %s (make build, race or stock makes it): %w",
		name, strings.Join(dirs, ", "), os.ErrNotExist)
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// environ is the daemon's environment: this process's, the marker, GORACE for a
// race-built program, and what options add.
func (s settings) environ(dir string) []string {
	vars := map[string]string{}
	for _, kv := range os.Environ() {
		k, v, _ := strings.Cut(kv, "=")
		vars[k] = v
	}
	vars["PATH"] = strings.Join(append(s.path, os.Getenv("PATH")), ":")
	// Without a sleep at every exit, which is for late reports of C code.
	vars["GORACE"] = "atexit_sleep_ms=0 log_path=" + filepath.Join(dir, raceLog)
	vars["TMPDIR"] = filepath.Join(dir, "tmp")
	maps.Copy(vars, s.env)
	name, value, _ := strings.Cut(marker(dir), "=")
	vars[name] = value
	env := make([]string, 0, len(vars))
	for k, v := range vars {
		env = append(env, k+"="+v)
	}
	return env
}
