package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"go.opentelemetry.io/otel/propagation"
	"golang.org/x/sys/unix"
)

const (
	// ownerEnv marks the plugins of a daemon by its cache directory, so that
	// the next one finds what its predecessor left running.
	ownerEnv = "GANTRY_CNI_OWNER"
	// outputLimit bounds what is read from a plugin's stdout and stderr.
	outputLimit = 4 << 20
	// pipeGrace is how long a plugin's output may stay open after its end:
	// a child that it left behind may hold it forever.
	pipeGrace = time.Second
	// endGrace is what a plugin gets to come to its end before it is killed.
	// It is long for one that works and short for one that hangs, and worth
	// it: one killed half way may never find again what it has to undo, as
	// bridge its masquerading rules once it has deleted the interface.
	endGrace = 2 * time.Second
	// busyRetries and busyPause are for a plugin being written right now.
	busyRetries = 10
	busyPause   = 100 * time.Millisecond
)

// errMissing is in the chain of a PluginError when there is no such plugin. It
// is not NotFound: to a CRI client that would mean that the pod is gone.
var errMissing = fmt.Errorf("not found: %w", errdefs.ErrFailedPrecondition)

// PluginError is the failure of one CNI plugin.
type PluginError struct {
	// Plugin is the type in the network configuration, Command the CNI
	// command; empty if the plugin was not found.
	Plugin, Command string
	// Code and Msg are the plugin's own; the code is 0 if it said nothing
	// that could be understood.
	Code uint
	Msg  string
	err  error
}

// Error names the plugin, the command and what went wrong.
func (e *PluginError) Error() string {
	s := "plugin " + e.Plugin + ": "
	if e.Command != "" {
		s += e.Command + ": "
	}
	if e.Msg == "" {
		return s + e.err.Error()
	}
	s += e.Msg
	if e.Code != 0 {
		s += fmt.Sprintf(" (code %d)", e.Code)
	}
	return s
}

// Unwrap returns the errdefs class, or why the plugin was killed.
func (e *PluginError) Unwrap() error { return e.err }

// pluginCause strips what libcni puts around the error of a plugin.
func pluginCause(err error) error {
	var p *PluginError
	if errors.As(err, &p) {
		return p
	}
	return err
}

// runner runs plugins for libcni: each in a process group of its own, which is
// killed as a whole when the context ends.
type runner struct {
	version.PluginDecoder
	owner string
}

var _ invoke.Exec = (*runner)(nil)

// FindInPath returns the path of a plugin.
func (r *runner) FindInPath(plugin string, dirs []string) (string, error) {
	path, err := invoke.FindInPath(plugin, dirs)
	if err != nil {
		return "", &PluginError{Plugin: plugin, Msg: "not found in " + strings.Join(dirs, ", "), err: errMissing}
	}
	return path, nil
}

// ExecPlugin runs the plugin once and returns what it printed.
func (r *runner) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	failed := &PluginError{Plugin: filepath.Base(path), Command: lookup(environ, "CNI_COMMAND")}
	start := time.Now()
	stdout, stderr, err := r.runUnlessBusy(ctx, path, stdin, environ)
	l := log.G(ctx).WithField("plugin", failed.Plugin).WithField("command", failed.Command).
		WithField("container", lookup(environ, "CNI_CONTAINERID")).WithField("took", time.Since(start))
	if len(stderr) > 0 {
		l = l.WithField("stderr", string(stderr))
	}
	l.WithError(err).Debug("CNI plugin ended")
	switch {
	case err == nil:
		return stdout, nil
	case ctx.Err() != nil:
		// Whether it was killed, ended late or was not started any more.
		failed.err = fmt.Errorf("given up after %s: %w", time.Since(start).Round(time.Millisecond), context.Cause(ctx))
	default:
		failed.Code, failed.Msg = complaint(stdout, stderr, err)
		failed.err = class(failed.Code)
	}
	return nil, failed
}

func (r *runner) runUnlessBusy(ctx context.Context, path string, stdin []byte, environ []string) (stdout, stderr []byte, err error) {
	for try := 0; ; try++ {
		stdout, stderr, err = r.run(ctx, path, stdin, environ)
		if try == busyRetries || !errors.Is(err, syscall.ETXTBSY) {
			return stdout, stderr, err
		}
		select {
		case <-time.After(busyPause):
		case <-ctx.Done():
			return nil, nil, err
		}
	}
}

func (r *runner) run(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, []byte, error) {
	stdout, stderr := &boundedBuffer{}, &boundedBuffer{}
	c := exec.CommandContext(ctx, path)
	c.Env = append(environ[:len(environ):len(environ)], ownerEnv+"="+r.owner)
	c.Env = append(c.Env, traceEnv(ctx)...)
	c.Stdin, c.Stdout, c.Stderr = bytes.NewReader(stdin), stdout, stderr
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error {
		if ended, err := endGroup(c.Process.Pid, graceOf(lookup(environ, "CNI_COMMAND"))); err != nil || !ended {
			return err
		}
		return os.ErrProcessDone // by itself: what it says counts
	}
	c.WaitDelay = pipeGrace
	err := c.Run()
	if errors.Is(err, exec.ErrWaitDelay) && ctx.Err() == nil {
		// It ended well; a child of its own has its output still open.
		err = nil
	}
	if err == nil && stdout.overflowed {
		err = fmt.Errorf("more than %d bytes of output", outputLimit)
	}
	return stdout.Bytes(), stderr.Bytes(), err
}

// graceOf is what a plugin gets to come to its end; one that only looks needs
// none.
func graceOf(command string) time.Duration {
	switch command {
	case "ADD", "DEL", "GC":
		return endGrace
	default:
		return 0
	}
}

// traceEnv hands the span on to plugins that trace.
func traceEnv(ctx context.Context) []string {
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	var env []string
	for _, key := range carrier.Keys() {
		env = append(env, strings.ToUpper(key)+"="+carrier.Get(key))
	}
	return env
}

// complaint returns the code and the words of a plugin that failed.
func complaint(stdout, stderr []byte, err error) (uint, string) {
	var said types.Error
	if json.Unmarshal(stdout, &said) == nil && (said.Msg != "" || said.Code != 0) {
		msg := said.Msg
		if said.Details != "" {
			msg = strings.TrimPrefix(msg+"; "+said.Details, "; ")
		}
		if msg == "" {
			msg = err.Error()
		}
		return said.Code, msg
	}
	for _, out := range [][]byte{stderr, stdout} {
		if text := strings.TrimSpace(string(out)); text != "" {
			const most = 512
			return 0, fmt.Sprintf("%v: %.*q", err, most, text)
		}
	}
	return 0, err.Error() + ", without a word"
}

// class gives the errdefs class of a CNI error code.
func class(code uint) error {
	switch code {
	case types.ErrTryAgainLater, types.ErrPluginNotAvailable, types.ErrLimitedConnectivity:
		return errdefs.ErrUnavailable
	case types.ErrIncompatibleCNIVersion, types.ErrUnsupportedField, types.ErrInvalidNetworkConfig:
		return errdefs.ErrFailedPrecondition
	default:
		return errdefs.ErrInternal
	}
}

// lookup returns the last value of a variable, which is the one in force.
func lookup(environ []string, name string) string {
	for i := len(environ) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(environ[i], name+"="); ok {
			return v
		}
	}
	return ""
}

// boundedBuffer takes everything and keeps the first outputLimit bytes.
type boundedBuffer struct {
	bytes.Buffer
	overflowed bool
}

// Write never fails, so that a plugin is not killed by a closed pipe.
func (b *boundedBuffer) Write(p []byte) (int, error) {
	keep := min(len(p), outputLimit-b.Len())
	b.overflowed = b.overflowed || keep < len(p)
	b.Buffer.Write(p[:keep])
	return len(p), nil
}

// endGroup waits for the end of a process and, when the grace is over, kills
// its process group and waits again. It tells whether the process ended by
// itself.
func endGroup(pid int, grace time.Duration) (bool, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return true, nil
	}
	if err != nil {
		return false, errors.Join(err, killGroup(pid))
	}
	defer unix.Close(fd)
	return endGroupOf(fd, pid, grace)
}

// endGroupOf is endGroup for a process of which there is a descriptor.
func endGroupOf(fd, pid int, grace time.Duration) (bool, error) {
	if ended, err := waitPidfd(fd, grace); ended {
		return true, err
	}
	if err := killGroup(pid); err != nil {
		return false, err
	}
	const patience = 5 * time.Second
	if ended, err := waitPidfd(fd, patience); !ended {
		return false, errors.Join(fmt.Errorf("still there %s after SIGKILL: %w", patience, errdefs.ErrUnavailable), err)
	}
	return false, nil
}

func killGroup(pid int) error {
	if err := unix.Kill(-pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process group: %w", err)
	}
	return nil
}

// waitPidfd waits for the end of a process.
func waitPidfd(fd int, most time.Duration) (bool, error) {
	deadline := time.Now().Add(most)
	for left := most; left > 0; left = time.Until(deadline) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if n > 0 {
			return true, nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return false, err
		}
	}
	return false, nil
}

// missing reports whether err says that a file is not there.
func missing(err error) bool { return errors.Is(err, fs.ErrNotExist) }
