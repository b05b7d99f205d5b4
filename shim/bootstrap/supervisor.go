package bootstrap

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/shim/anchor"
	"github.com/gantry-cri/gantry/shim/process"
	"github.com/gantry-cri/gantry/shim/sandbox"
)

// supervisor is one as it is found from outside.
type supervisor struct {
	socket, namespace, address, ttrpc string
	anchor                            string // the socket of its anchor, "" for none
	debug                             bool
	relay                             bool // see task.Options
	scoped                            bool // see enterScope
}

func (s supervisor) url() string { return "unix://" + s.socket }

// stateDir is where the supervisor of a socket keeps its records of tasks.
func stateDir(socket string) string { return socket + ".d" }

// podsDir is where it keeps sandboxes.
func podsDir(socket string) string { return socket + ".pods" }

// anchorSocket is a socket for another anchor of the supervisor at a socket. None has
// the name of an earlier one, whose end removes its own.
func anchorSocket(socket string) string { return socket + anchorMark + rand.Text()[:anchorName] }

const (
	anchorMark = ".a-"
	anchorName = 8
)

// rootDir is the root filesystem of holders. It is beside the directory of sockets
// and not in it, as that is root's alone.
func rootDir(socket string) string {
	dir, name := filepath.Split(socket)
	return filepath.Join(filepath.Dir(filepath.Clean(dir)), name+".root")
}

// ensure returns when the supervisor listens.
func (s supervisor) ensure(ctx context.Context, cgroup string) error {
	unlock, err := lock(s.socket + ".lock")
	if err != nil {
		return fmt.Errorf("lock the supervisor: %w", err)
	}
	defer unlock()
	if s.listens() {
		return nil
	}
	if err := s.spawn(ctx, cgroup); err != nil {
		return fmt.Errorf("start the supervisor: %w", err)
	}
	return nil
}

func (s supervisor) dial() (net.Conn, error) { return net.DialTimeout("unix", s.socket, dialLimit) }

func (s supervisor) listens() bool {
	conn, err := s.dial()
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// spawn starts the supervisor and waits for its word on a pipe: none at all when
// it serves, else what is wrong.
func (s supervisor) spawn(ctx context.Context, cgroup string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer w.Close()
	if needsAnchor() {
		s.anchor = anchorSocket(s.socket)
	}
	s.scoped = s.scoped && cgroup == ""
	cmd, err := s.command(w)
	if err != nil {
		return err
	}
	gate := &anchor.Gate{}
	if s.anchor != "" {
		if gate, err = anchor.Wrap(cmd, s.anchor); err != nil {
			return err
		}
	}
	defer gate.Close()
	if err := cmd.Start(); err != nil {
		return errors.Join(err, s.removeAnchor())
	}
	w.Close()
	if err = s.settle(cmd.Process.Pid, cgroup); err == nil {
		err = gate.Open()
	}
	gate.Close()
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()
	said, readErr := io.ReadAll(r)
	if len(said) > 0 {
		err = fmt.Errorf("%s: %w", said, errdefs.ErrFailedPrecondition)
	}
	if err = errors.Join(err, readErr); err != nil {
		// It has no task yet. The session is its own, and its anchor's.
		return errors.Join(err, unix.Kill(-cmd.Process.Pid, unix.SIGKILL), ignoreExit(cmd.Wait()), s.removeAnchor())
	}
	return cmd.Process.Release()
}

// command is the supervisor itself; what it says to w is its word.
func (s supervisor) command(w *os.File) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	args := []string{serveCommand, "-namespace", s.namespace, "-address", s.address, "-ttrpc-address", s.ttrpc, "-socket", s.socket}
	if s.anchor != "" {
		args = append(args, "-anchor", s.anchor)
	}
	if s.relay {
		args = append(args, "-relay")
	}
	if s.scoped {
		args = append(args, "-scope")
	}
	if s.debug {
		args = append(args, "-debug")
	}
	cmd := exec.Command(self, args...)
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd, nil
}

// anchorEnv has every supervisor started with an anchor, whatever the kernel can.
const anchorEnv = "GANTRY_SHIM_ANCHOR"

func needsAnchor() bool { return os.Getenv(anchorEnv) != "" || process.Supported() != nil }

// removeAnchor removes the socket of an anchor that was killed.
func (s supervisor) removeAnchor() error {
	if s.anchor == "" {
		return nil
	}
	return removeFiles(s.anchor)
}

func ignoreExit(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}

// settle puts the supervisor where the configuration wants it, or its anchor, from
// which it has that. Without a wish it makes its own (enterScope).
func (s supervisor) settle(pid int, cgroup string) error {
	if err := shim.AdjustOOMScore(pid); err != nil {
		return fmt.Errorf("adjust OOM score: %w", err)
	}
	if cgroup == "" {
		return nil
	}
	var err error
	if cgroups.Mode() == cgroups.Unified {
		var m *cgroup2.Manager
		if m, err = cgroup2.Load(cgroup); err == nil {
			err = m.AddProc(uint64(pid))
		}
	} else {
		var c cgroup1.Cgroup
		if c, err = cgroup1.Load(cgroup1.StaticPath(cgroup)); err == nil {
			err = c.AddProc(uint64(pid))
		}
	}
	if err != nil {
		return fmt.Errorf("join control group %s: %w", cgroup, err)
	}
	return nil
}

// removeEmpty takes away what a dead supervisor left, once it has no record any
// more and nobody has taken its place.
func (s supervisor) removeEmpty() error {
	if _, err := os.Stat(filepath.Dir(s.socket)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	unlock, err := lock(s.socket + ".lock")
	if err != nil {
		return err
	}
	defer unlock()
	if s.listens() {
		return nil
	}
	if err := removeState(s.socket); err != nil {
		if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	return removeFiles(s.socket, s.socket+".lock")
}

// removeState takes away the directories of a supervisor, which stay while there is
// something in them.
func removeState(socket string) error {
	if err := removeFiles(podsDir(socket), stateDir(socket)); err != nil {
		return err
	}
	// Without a record there is no pin, and nobody who asks an anchor.
	anchors, err := filepath.Glob(socket + anchorMark + "*")
	if err != nil {
		return err
	}
	return errors.Join(removeFiles(anchors...), sandbox.RemoveRoot(rootDir(socket)))
}

func removeFiles(paths ...string) error {
	var errs []error
	for _, p := range paths {
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// lock takes the lock of a path. Who holds it may remove it.
func lock(path string) (unlock func(), err error) {
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		for err = unix.EINTR; errors.Is(err, unix.EINTR); {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		held, err := f.Stat()
		if now, gone := os.Stat(path); err == nil && gone == nil && os.SameFile(held, now) {
			return func() { f.Close() }, nil
		}
		f.Close()
	}
}
