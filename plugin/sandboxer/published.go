package sandboxer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/record"
)

// kinds are the namespaces of a sandbox that are published, as the kernel names them.
var kinds = []string{"ipc", "uts", "user"}

// Published is a Sandboxer whose sandboxes' namespaces can be found: each is a link in
// a directory of its kind, by the sandbox's ID.
type Published struct {
	Sandboxer
	Dir string
}

// Start makes the links.
func (p Published) Start(ctx context.Context, sb record.Sandbox) (record.Instance, error) {
	inst, err := p.Sandboxer.Start(ctx, sb)
	if err != nil {
		return inst, err
	}
	sb.Instance = inst
	paths, err := p.Namespaces(ctx, sb)
	if err != nil && !errdefs.IsNotImplemented(err) {
		return inst, fmt.Errorf("find the namespaces of the sandbox: %w", err)
	}
	for kind, path := range paths {
		if err := publish(path, p.link(kind, sb.ID)); err != nil {
			return inst, fmt.Errorf("publish the %s namespace of the sandbox: %w", kind, err)
		}
	}
	return inst, nil
}

func publish(path, link string) error {
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		return err
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Symlink(path, link)
}

// Shutdown takes the links away.
func (p Published) Shutdown(ctx context.Context, sb record.Sandbox) error {
	errs := []error{p.Sandboxer.Shutdown(ctx, sb)}
	for _, kind := range kinds {
		if err := os.Remove(p.link(kind, sb.ID)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (p Published) link(kind, id string) string { return filepath.Join(p.Dir, kind+"ns", id) }
