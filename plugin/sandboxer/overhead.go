package sandboxer

import (
	"context"
	"errors"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Groups is the host's control groups.
type Groups interface {
	// Make makes the control group, which may be there.
	Make(path string) error
	// Vacate has its processes be in that of the daemon.
	Vacate(path string) error
	// Remove takes it away; one that is not there is no error.
	Remove(path string) error
}

// Charged is a Sandboxer for pods of which some have their shim in a control group of
// theirs.
type Charged struct {
	Sandboxer
	// Group is that of the pod's shim, "" for none.
	Group  func(record.Sandbox) string
	Groups Groups
}

// Start makes the group, as no shim does.
func (c Charged) Start(ctx context.Context, sb record.Sandbox) (record.Instance, error) {
	if path := c.Group(sb); path != "" {
		if err := c.Groups.Make(path); err != nil {
			return record.Instance{}, err
		}
	}
	return c.Sandboxer.Start(ctx, sb)
}

// Shutdown takes the group away. The shim may take a while to end, and does not have
// to be waited for.
func (c Charged) Shutdown(ctx context.Context, sb record.Sandbox) error {
	err := c.Sandboxer.Shutdown(ctx, sb)
	path := c.Group(sb)
	if err != nil || path == "" {
		return err
	}
	return errors.Join(c.Groups.Vacate(path), c.Groups.Remove(path))
}
