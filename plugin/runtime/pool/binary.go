package pool

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	crt "github.com/containerd/containerd/v2/core/runtime"
	v2 "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	client "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// podFile is in the bundle of a container: its pod.
const podFile = "sandbox"

// binaryOf finds the shim's program: the bundle of a pod says it, that of a
// container names its pod, and an older one has neither.
func binaryOf(p *Pool, bundle *v2.Bundle) string {
	dirs := []string{bundle.Path}
	if pod, err := os.ReadFile(filepath.Join(bundle.Path, podFile)); err == nil && validName(string(pod)) {
		// The pod may be of an earlier daemon than the container.
		found, err := filepath.Glob(filepath.Join(p.State, "*", p.Namespace, string(pod)))
		if err == nil {
			dirs = append(dirs, found...)
		}
	}
	for _, dir := range dirs {
		if b, err := os.ReadFile(filepath.Join(dir, "shim-binary-path")); err == nil && filepath.IsAbs(string(b)) {
			return string(b)
		}
	}
	if p.Containers == nil {
		return ""
	}
	ctx := namespaces.WithNamespace(context.Background(), bundle.Namespace)
	c, err := p.Containers.Get(ctx, bundle.ID)
	if err != nil {
		log.G(ctx).WithError(err).WithField("task", bundle.ID).Warn("the runtime of a task is not known")
		return ""
	}
	return lookup(c.Runtime.Name)
}

// validName reports whether a name read from a file is one path element.
func validName(s string) bool {
	return s != "" && s != "." && s != ".." && !strings.ContainsAny(s, "/*?[\\")
}

// lookup finds the program of a runtime as containerd does: an absolute path,
// or a name that stands for one on PATH or beside the daemon.
func lookup(runtime string) string {
	if filepath.IsAbs(runtime) {
		return runtime
	}
	name := client.BinaryName(runtime)
	if name == "" {
		return ""
	}
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	self, err := os.Executable()
	if err != nil {
		return ""
	}
	return filepath.Join(filepath.Dir(self), name)
}

// callDelete runs the shim's own clean-up after its death. It ends the task's
// processes and says how the task ended.
func (s *shim) callDelete(ctx context.Context) (*crt.Exit, error) {
	s.endStray(ctx)
	entries, err := os.ReadDir(s.bundle.Path)
	if err == nil && len(entries) == 0 {
		return nil, nil // the daemon died before it began
	}
	if s.binary == "" {
		return nil, fmt.Errorf("clean up after the shim: its program is not known: %w", errdefs.ErrNotFound)
	}
	ctx, cancel := context.WithTimeout(ctx, buryLimit)
	defer cancel()
	out, err := s.call(ctx, s.bundle.ID, nil, "-bundle", s.bundle.Path, "delete")
	if err != nil {
		return nil, err
	}
	return parseDeleted(out)
}

// oursEnv tells our own shim which daemon it is for.
const oursEnv = "GANTRY_DAEMON=1"

// call runs the shim's program for one of its actions, which is the last argument, on
// behalf of a pod or task.
func (s *shim) call(ctx context.Context, id string, stdin []byte, args ...string) ([]byte, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	d := s.pool.Daemon
	args = append([]string{"-namespace", s.bundle.Namespace, "-address", d.GRPCAddress, "-publish-binary", self, "-id", id}, args...)
	cmd := exec.CommandContext(ctx, s.binary, args...)
	cmd.Dir = s.bundle.Path
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2", "MAX_SHIM_VERSION=2", "TTRPC_ADDRESS="+d.TTRPCAddress,
		"GRPC_ADDRESS="+d.GRPCAddress, "NAMESPACE="+s.bundle.Namespace, oursEnv)
	cmd.Env = append(cmd.Env, d.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("run %s %s: %w: %s", filepath.Base(s.binary), args[len(args)-1], err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}

// parseDeleted reads what the shim's clean-up prints.
func parseDeleted(out []byte) (*crt.Exit, error) {
	var r taskv2.DeleteResponse
	if err := proto.Unmarshal(out, &r); err != nil {
		return nil, fmt.Errorf("read the answer of the shim's clean-up: %w: %w", errdefs.ErrDataLoss, err)
	}
	if r.GetExitedAt() == nil {
		return nil, nil
	}
	return &crt.Exit{Pid: r.GetPid(), Status: r.GetExitStatus(), Timestamp: r.GetExitedAt().AsTime()}, nil
}

// endStray kills a shim process of this task when nobody knows where it listens.
// Most likely it was started by a daemon that died before it wrote that down;
// it then has no task, and nobody would ever find it again.
func (s *shim) endStray(ctx context.Context) {
	if _, err := readBootstrap(s.bundle.Path); err == nil {
		return
	}
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return // only for a bad pattern
	}
	for _, file := range files {
		line, err := os.ReadFile(file)
		if err != nil || !s.pool.isShim(strings.Split(string(line), "\x00"), s.bundle.Namespace, s.bundle.ID) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			continue
		}
		log.G(ctx).WithField("pid", pid).Info("ending a shim that nobody can reach")
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			log.G(ctx).WithError(err).WithField("pid", pid).Warn("end a shim that nobody can reach")
		}
	}
}

// isShim reports whether a command line is that of the shim which was started
// for a task.
func (p *Pool) isShim(args []string, namespace, id string) bool {
	has := func(flag, value string) bool {
		i := slices.Index(args, flag)
		return i > 0 && i+1 < len(args) && args[i+1] == value
	}
	return has("-namespace", namespace) && has("-id", id) &&
		has("-address", p.Daemon.GRPCAddress) && !slices.Contains(args, "delete")
}
