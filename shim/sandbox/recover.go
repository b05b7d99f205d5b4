package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantry-cri/gantry/shim/process"
	"github.com/gantry-cri/gantry/shim/statedir"
	"github.com/gantry-cri/gantry/shim/task"
)

// Join finds the namespaces of the sandboxes with records in a directory.
func Join(state string) task.Join {
	return func(id string, kind specs.LinuxNamespaceType) (string, error) {
		dir, err := statedir.DirOf(state, id)
		if err != nil {
			return "", err
		}
		r, err := statedir.Read[Record](dir)
		if err != nil {
			return "", err
		}
		if err := r.live(); err != nil {
			return "", err
		}
		return r.path(dir, kind)
	}
}

// Adopt takes over the sandboxes of a supervisor that died. Their holders must
// have been adopted, and the Service not be offered yet.
func (s *Service) Adopt(ctx context.Context) error {
	entries, err := os.ReadDir(s.state)
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(s.state, e.Name())
		r, err := statedir.Read[Record](dir)
		if err != nil {
			log.G(ctx).WithError(err).WithField("sandbox", e.Name()).Warn("a sandbox of a dead supervisor is not adopted")
			continue
		}
		p := newPod(dir, r)
		s.add(p)
		if r.Exit == nil && r.Holder != 0 {
			go s.watch(ctx, p)
		}
	}
	return nil
}

// Forget takes away what a dead supervisor left of a sandbox. A supervisor that
// has taken its place forgets it too; ask is nil for none.
func Forget(ctx context.Context, o Options, id string, ask api.TTRPCSandboxService) error {
	dir, err := statedir.DirOf(o.State, id)
	if err != nil {
		return err
	}
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if ask != nil {
		if _, err := ask.ShutdownSandbox(ctx, &api.ShutdownSandboxRequest{SandboxID: id}); err != nil {
			return fmt.Errorf("tell the supervisor: %w", errgrpc.ToNative(err))
		}
	}
	s := New(o)
	// Whether it had a holder need not be known.
	if _, err := s.release(ctx, dir, Record{ID: id, SharedPID: true}); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// release takes away all there is of a sandbox on this host but its record, and
// says how the holder ended. What is gone already is no error.
func (s *Service) release(ctx context.Context, dir string, r Record) (process.Exit, error) {
	exit, err := s.dropHolder(ctx, dir, r)
	return exit, errors.Join(err, unpinAll(dir), dropFiles(dir))
}

// dropHolder ends the holder, if there is any.
func (s *Service) dropHolder(ctx context.Context, dir string, r Record) (process.Exit, error) {
	exit := process.Exit{At: time.Now()}
	if !r.byHolder() {
		return exit, nil
	}
	ended, pid, err := task.Forget(ctx, s.namespace, s.taskState, holderID(r.ID), s.tasks)
	if err != nil {
		return exit, fmt.Errorf("end the holder: %w", err)
	}
	if pid != 0 {
		exit = ended
	}
	return exit, os.RemoveAll(filepath.Join(dir, holderDir))
}
