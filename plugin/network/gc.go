package network

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sync/errgroup"
)

// Live lists the IDs of the pods that may have a network, those being made or
// taken down included.
type Live func(context.Context) ([]string, error)

// GC releases every namespace and attachment that belongs to no live pod, then
// has plugins of specification 1.1 and later look for leftovers of their own.
//
// live is called after the leftovers have been listed: a pod is recorded
// before its network is made, so what is in the list and not live is no pod's.
// The plugins' own GC waits for a moment in which no pod is attached or
// detached and is ended, with an error, when one has waited for too long.
func (n *Networks) GC(ctx context.Context, live Live) error {
	if err := n.gc(ctx, live); err != nil {
		return fmt.Errorf("collect network leftovers: %w", err)
	}
	return nil
}

func (n *Networks) gc(ctx context.Context, live Live) error {
	ids, err := n.leftovers(ctx)
	if err != nil {
		return err
	}
	alive, err := live(ctx)
	if err != nil {
		return fmt.Errorf("list live sandboxes: %w", err)
	}
	keep := make(map[string]bool, len(alive))
	for _, id := range alive {
		keep[id] = true
	}
	orphans := slices.DeleteFunc(ids, func(id string) bool { return keep[id] })
	return errors.Join(n.release(ctx, orphans), n.sweep(ctx, alive))
}

// release detaches the pods, several at a time, and joins the errors.
func (n *Networks) release(ctx context.Context, ids []string) error {
	var (
		mu   sync.Mutex
		errs []error
		g    errgroup.Group
	)
	g.SetLimit(sweepWorkers)
	for _, id := range ids {
		g.Go(func() error {
			if err := n.detach(ctx, Attachment{ID: id}); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("sandbox %s: %w", id, err))
			}
			return nil
		})
	}
	_ = g.Wait() // the functions return nil
	return errors.Join(errs...)
}

// sweep runs the plugins' GC for the networks of the configuration.
func (n *Networks) sweep(ctx context.Context, alive []string) error {
	nets, err := n.load(n.source(Attachment{}))
	if err != nil {
		return nil // Ready tells; there is no plugin to ask.
	}
	nets = slices.DeleteFunc(nets, func(net attached) bool {
		return net.conf.DisableGC || !since(net.conf, "1.1.0")
	})
	if len(nets) == 0 {
		return nil
	}
	if err := n.orphans.end(""); err != nil {
		return err
	}
	ctx, cancel := within(ctx, n.conf.DelTimeout)
	defer cancel()
	ctx, open, err := n.gate.alone(ctx)
	if err != nil {
		return err
	}
	defer open()
	valid, err := n.validAttachments(ctx, alive, nets)
	if err != nil {
		return err
	}
	var errs []error
	for _, net := range nets {
		err := n.cni.GCNetworkList(ctx, net.conf, &libcni.GCArgs{ValidAttachments: valid})
		errs = append(errs, pluginCause(err))
	}
	return errors.Join(errs...)
}

// validAttachments lists what plugins must not collect: all that is saved,
// which includes pods attached since alive was listed and leftovers whose DEL
// failed, and for pods of which nothing is saved every interface they may have.
func (n *Networks) validAttachments(ctx context.Context, alive []string, nets []attached) ([]types.GCAttachment, error) {
	known, err := n.leftovers(ctx)
	if err != nil {
		return nil, err
	}
	ids := append(slices.Clone(alive), known...)
	slices.Sort(ids)
	valid := []types.GCAttachment{}
	for _, id := range slices.Compact(ids) {
		names := map[string]bool{}
		for _, net := range nets {
			names[net.ifName] = true
		}
		s, err := n.recall(id)
		if err != nil {
			return nil, err
		}
		if s != nil {
			for _, a := range s.Networks {
				names[a.IfName] = true
			}
		}
		for name := range names {
			valid = append(valid, types.GCAttachment{ContainerID: id, IfName: name})
		}
	}
	return valid, nil
}
