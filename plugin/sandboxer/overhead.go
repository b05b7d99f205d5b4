package sandboxer

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Groups is the host's control groups.
type Groups interface {
	// Make makes the control group, which may be there.
	Make(path string) error
	// Vacate has its processes be in that of the daemon.
	Vacate(path string) error
	// Kill ends its processes.
	Kill(ctx context.Context, path string) (int, error)
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
	// Patience is how long a group may stay in use, 0 for the usual time.
	Patience time.Duration
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
	return c.drop(ctx, path)
}

const (
	// dropLimit is longer than a shim stays that has nothing to do any more.
	dropLimit = 5 * time.Second
	dropPoll  = 20 * time.Millisecond
	// killLimit is how long a process may take to end after SIGKILL.
	killLimit = 15 * time.Second
)

// drop removes the group. A process may be started in it while it is vacated, and for
// moments an empty one can be busy. What cannot be moved is killed in the end: nothing
// of the pod is left that it is for.
func (c Charged) drop(ctx context.Context, path string) error {
	tick := time.NewTicker(dropPoll)
	defer tick.Stop()
	for end := time.Now().Add(cmp.Or(c.Patience, dropLimit)); time.Now().Before(end) && ctx.Err() == nil; <-tick.C {
		// The error of the removal tells enough.
		_ = c.Groups.Vacate(path)
		if c.Groups.Remove(path) == nil {
			return nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	_, err := c.Groups.Kill(ctx, path)
	return errors.Join(err, c.Groups.Remove(path))
}
