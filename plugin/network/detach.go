package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/log"
)

// Detach gives back all that CreateNS and Attach made for the pod, complete or
// not, and succeeds if there is nothing. It asks for what was saved before ADD
// to be undone, whatever the configuration says now; when that was lost it goes
// by the configuration, and when there is no trace of the pod no plugin runs. For
// a pod in the node's network it does nothing.
//
// When a DEL fails the namespace and what was saved stay, and Detach is to be
// repeated. A caller that gives up loses nothing: to GC the pod is a leftover
// and it goes on trying.
func (n *Networks) Detach(ctx context.Context, a Attachment) error {
	if hostNetwork(a.Pod) {
		return nil
	}
	if err := n.detach(ctx, a); err != nil {
		return fmt.Errorf("detach network: %w", err)
	}
	return nil
}

func (n *Networks) detach(ctx context.Context, a Attachment) error {
	if err := checkID(a.ID); err != nil {
		return err
	}
	ctx, cancel := within(ctx, n.conf.DelTimeout)
	defer cancel()
	leave, err := n.enter(ctx, a.ID)
	if err != nil {
		return err
	}
	defer leave()
	// Before the addresses, which are another pod's once they are free.
	if err := n.ports.Unmap(ctx, a.ID); err != nil {
		return err
	}
	s, err := n.recall(a.ID)
	if err != nil {
		return err
	}
	switch {
	case s != nil:
		err = n.undo(ctx, s)
	case n.traces(a.ID):
		err = n.undoUnknown(ctx, a)
	}
	if err != nil {
		return err
	}
	// The namespace goes before what was saved: an interruption in between
	// repeats the DEL, which is allowed, and leaves no namespace unknown.
	if err := removeNS(ctx, n.NSPath(a.ID)); err != nil {
		return err
	}
	if err := n.saved.remove(a.ID); err != nil {
		return err
	}
	n.claims.Drop(a.ID)
	return nil
}

// undo runs DEL for every network of the pod, the last first, also when one
// fails: what can be given back is.
func (n *Networks) undo(ctx context.Context, s *saved) error {
	netns := s.NetNS
	if !pinned(netns) {
		// DEL without a namespace frees what is kept outside of it.
		netns = ""
	}
	var errs []error
	for _, net := range slices.Backward(s.Networks) {
		if err := n.undoOne(ctx, s, net, netns); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (n *Networks) undoOne(ctx context.Context, s *saved, a savedNetwork, netns string) error {
	list, err := a.list()
	if err != nil {
		return err
	}
	return pluginCause(n.cni.DelNetworkList(ctx, list, s.runtimeConf(a, netns)))
}

// traces reports whether there is anything of the pod: what was saved, be it
// unreadable, or its namespace. One without was never attached or is detached, as
// what is saved comes before ADD and goes after DEL.
func (n *Networks) traces(id string) bool {
	for _, path := range []string{n.saved.path(id), n.NSPath(id)} {
		if _, err := os.Lstat(path); !missing(err) {
			return true
		}
	}
	return false
}

// undoUnknown runs DEL for a pod of which only traces are left: most likely it
// was never attached, but the cache may have been lost. Without a usable
// configuration or plugin there is nothing that could be asked.
func (n *Networks) undoUnknown(ctx context.Context, a Attachment) error {
	s, err := n.plan(a, n.NSPath(a.ID))
	if err != nil {
		log.G(ctx).WithError(err).WithField("sandbox", a.ID).Debug("no DEL for a sandbox that was never attached")
		return nil
	}
	return n.undo(ctx, s)
}

// leftovers lists every pod of which something is kept here.
func (n *Networks) leftovers(ctx context.Context) ([]string, error) {
	ids, err := n.List()
	if err != nil {
		return nil, err
	}
	mapped, err := n.ports.Pods(ctx)
	if err != nil {
		return nil, err
	}
	savedIDs, err := n.saved.ids()
	if err != nil {
		return nil, err
	}
	cached, err := n.cni.GetCachedAttachments("")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list cached attachments: %w", err)
	}
	ids = append(append(ids, mapped...), savedIDs...)
	for _, c := range cached {
		if checkID(c.ContainerID) == nil {
			ids = append(ids, c.ContainerID)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}
