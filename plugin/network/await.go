package network

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// awaitPoll is the pause between two looks of a pod that waits for its network.
const awaitPoll = 100 * time.Millisecond

// Await returns when the pod can be attached, or when it has waited for the
// ReadyTimeout of the Config: Attach then tells what is missing. Nothing has
// been done for the pod yet, so there is nothing to give back. The error is
// that of ctx, with what was waited for, or says which of the node's ports the
// pod cannot have.
func (n *Networks) Await(ctx context.Context, a Attachment) error {
	if hostNetwork(a.Pod) {
		return nil
	}
	if err := n.await(ctx, a); err != nil {
		return err
	}
	return n.admitPorts(a)
}

func (n *Networks) await(ctx context.Context, a Attachment) error {
	if n.conf.ReadyTimeout <= 0 {
		return nil
	}
	missing := n.missing(a)
	if missing == nil {
		return nil
	}
	end := time.NewTimer(n.conf.ReadyTimeout)
	defer end.Stop()
	look := time.NewTicker(awaitPoll)
	defer look.Stop()
	for missing != nil {
		select {
		case <-look.C:
			missing = n.missing(a)
		case <-end.C:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("wait for the network: %w: %w", context.Cause(ctx), missing)
		}
	}
	return nil
}

// missing says why the pod cannot be attached now, as far as can be seen
// without asking a plugin.
func (n *Networks) missing(a Attachment) error {
	src := n.source(a)
	nets, err := n.load(src)
	if err == nil {
		err = n.findPlugins(nets)
	}
	if err != nil || src.dir != n.conf.ConfDir {
		return err
	}
	// Before the plugins were asked for the first time there is no reason to
	// think that they cannot do it.
	if err := n.ready.Load().err; err != nil && !errors.Is(err, errStatusPending) {
		return err
	}
	return nil
}
