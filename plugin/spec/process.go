package spec

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

const (
	defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	defaultTerm = "TERM=xterm"
)

// containerProcess makes the first process; base gives its rlimits, its
// default capabilities, its lowest environment and its scheduling.
func containerProcess(in *ContainerInput, base *specs.Process) (*specs.Process, error) {
	p := *base
	var err error
	if p.Args, err = Args(in.Config, in.ImageConfig); err != nil {
		return nil, err
	}
	if p.Cwd, err = WorkingDir(in.Config, in.ImageConfig); err != nil {
		return nil, err
	}
	if p.Env, err = environment(in, base.Env); err != nil {
		return nil, err
	}
	if p.Capabilities, err = containerCapabilities(in, base.Capabilities); err != nil {
		return nil, err
	}
	if p.OOMScoreAdj, err = containerOOMScore(in, base.OOMScoreAdj); err != nil {
		return nil, err
	}
	p.Rlimits = rlimits(base.Rlimits, in.Policy.Defaults.Rlimits)
	p.Terminal = in.Config.GetTty()
	p.ConsoleSize = nil
	p.User = processUser(in.User)
	if p.User.Umask, err = umask(in.Pod, in.Handler); err != nil {
		return nil, err
	}
	p.NoNewPrivileges = in.security().GetNoNewPrivs()
	return &p, nil
}

// rlimits are the base's, and the node's of the types that it does not have.
func rlimits(base, node []specs.POSIXRlimit) []specs.POSIXRlimit {
	list := slices.Clone(base)
	for _, l := range node {
		if !slices.ContainsFunc(base, func(b specs.POSIXRlimit) bool { return b.Type == l.Type }) {
			list = append(list, l)
		}
	}
	return list
}

func processUser(u facts.User) specs.User {
	return specs.User{UID: u.UID, GID: u.GID, AdditionalGids: slices.Clone(u.AdditionalGIDs)}
}

// Args merges command and arguments by the rules of Kubernetes: a command
// replaces the image's entrypoint and its cmd, arguments alone replace only
// the cmd.
func Args(cfg *cri.ContainerConfig, image imagespec.ImageConfig) ([]string, error) {
	command, args := cfg.GetCommand(), cfg.GetArgs()
	if len(command) == 0 {
		command = image.Entrypoint
		if len(args) == 0 {
			args = image.Cmd
		}
	}
	merged := slices.Concat(command, args)
	if len(merged) == 0 {
		return nil, fmt.Errorf("config.command: neither the request nor the image names a command: %w", errdefs.ErrInvalidArgument)
	}
	return merged, checkArgs("config.command", merged)
}

func checkArgs(field string, args []string) error {
	if args[0] == "" {
		return fmt.Errorf("%s: the executable is an empty string: %w", field, errdefs.ErrInvalidArgument)
	}
	for i, a := range args {
		if strings.IndexByte(a, 0) >= 0 {
			return fmt.Errorf("%s: argument %d has a NUL byte: %w", field, i, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// procProcess matches what lies below a process in /proc: links there lead out
// of the container when a runtime leaks a file descriptor.
var procProcess = regexp.MustCompile(`^/proc/(self|thread-self|[0-9]+)(/|$)`)

// WorkingDir returns the directory the process starts in, cleaned.
func WorkingDir(cfg *cri.ContainerConfig, image imagespec.ImageConfig) (string, error) {
	field, dir := "config.working_dir", cfg.GetWorkingDir()
	if dir == "" {
		field, dir = "working directory of the image", image.WorkingDir
	}
	if dir == "" {
		return "/", nil
	}
	if err := checkAbsolute(field, dir); err != nil {
		return "", err
	}
	dir = path.Clean(dir)
	if procProcess.MatchString(dir) {
		return "", fmt.Errorf("%s: %s belongs to a process: %w", field, dir, errdefs.ErrInvalidArgument)
	}
	return dir, nil
}

// environment merges the sources from the weakest to the strongest; a later
// value replaces an earlier one in its place.
func environment(in *ContainerInput, base []string) ([]string, error) {
	e := newEnv(defaultPath)
	if in.Config.GetTty() {
		e.set(defaultTerm)
	}
	for _, kv := range slices.Concat(in.Policy.Defaults.Env, base) {
		e.set(kv)
	}
	e.set("HOSTNAME=" + Hostname(in.Pod, in.Host))
	for i, kv := range in.ImageConfig.Env {
		key, _, ok := strings.Cut(kv, "=")
		if !ok || key == "" || strings.IndexByte(kv, 0) >= 0 {
			return nil, fmt.Errorf("environment of the image: entry %d is not KEY=value: %w", i, errdefs.ErrInvalidArgument)
		}
		e.set(kv)
	}
	for i, kv := range in.Config.GetEnvs() {
		key, value := kv.GetKey(), string(kv.GetValue())
		if key == "" || strings.ContainsAny(key, "=\x00") || strings.IndexByte(value, 0) >= 0 {
			return nil, fmt.Errorf("config.envs[%d]: key %q is empty or has '=', or there is a NUL byte: %w", i, key, errdefs.ErrInvalidArgument)
		}
		e.set(key + "=" + value)
	}
	if n := goProcs(in); n > 0 {
		e.setDefault(fmt.Sprintf("%s=%d", gomaxprocs, n))
	}
	home := in.User.Home
	if home == "" {
		home = "/"
	}
	e.setDefault("HOME=" + home)
	// HOME ends up in line files that tools write; other variables may hold
	// any byte.
	if strings.ContainsAny(e.get("HOME"), "\n\r\x00") {
		return nil, fmt.Errorf("config.envs: HOME has a line break or a NUL byte: %w", errdefs.ErrInvalidArgument)
	}
	return e.list, nil
}

// env is a list of KEY=value with one entry per key.
type env struct {
	list  []string
	index map[string]int
}

func newEnv(list ...string) *env {
	e := &env{index: map[string]int{}}
	for _, kv := range list {
		e.set(kv)
	}
	return e
}

func (e *env) set(kv string) {
	key, _, _ := strings.Cut(kv, "=")
	if i, ok := e.index[key]; ok {
		e.list[i] = kv
		return
	}
	e.index[key] = len(e.list)
	e.list = append(e.list, kv)
}

func (e *env) setDefault(kv string) {
	key, _, _ := strings.Cut(kv, "=")
	if _, ok := e.index[key]; !ok {
		e.set(kv)
	}
}

func (e *env) get(key string) string {
	i, ok := e.index[key]
	if !ok {
		return ""
	}
	return e.list[i][len(key)+1:]
}
