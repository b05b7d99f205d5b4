// Package userns owns the user namespaces of pods: one for each pod that asks
// for its own, pinned under the pod's ID.
//
// A user namespace can only be made by a process that then lives in it, and a
// program of several threads cannot move into one. So a small program is
// started in the new namespace, which sleeps while the namespace is pinned and
// is then killed; hold.go has that. The network namespace of the pod is made
// with it, in the same system call, because it shall belong to the user
// namespace: who is root there may then do to the network what root may do.
//
// The package keeps no state but what is mounted, and knows neither networks
// nor what the mappings are for; package spec has checked them. Start reading at
// Create.
package userns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Namespaces makes user namespaces and pins them in one directory.
type Namespaces struct {
	dir     string
	sleeper string
}

// New returns the namespaces in dir, which is made. sleeper is a program that
// does nothing until it is killed; it needs neither arguments nor libraries,
// and everybody may execute it.
func New(dir, sleeper string) (*Namespaces, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make directory of user namespaces: %w", err)
	}
	// A runtime that has joined one reads the others' names nowhere, but goes
	// through the directory.
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, fmt.Errorf("set mode of directory of user namespaces: %w", err)
	}
	return &Namespaces{dir: dir, sleeper: sleeper}, nil
}

// Path is where the user namespace of the pod is pinned, existing or not.
func (n *Namespaces) Path(id string) string { return filepath.Join(n.dir, id) }

// Create pins a new user namespace for the pod, with the mappings it asks for.
// If adopt is given, a network namespace that belongs to it is made as well,
// and adopt is called with its path, which is good until it returns. What an
// attempt that was cut off left is replaced.
func (n *Namespaces) Create(ctx context.Context, sb record.Sandbox, adopt func(netns string) error) error {
	if err := n.Remove(ctx, sb); err != nil {
		return err
	}
	path := n.Path(sb.ID)
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	err = n.hold(sb.UserNS(), adopt != nil, func(ns string) error {
		if adopt != nil {
			if err := adopt(filepath.Join(ns, "net")); err != nil {
				return err
			}
		}
		if err := unix.Mount(filepath.Join(ns, "user"), path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("pin: %w", err)
		}
		return nil
	})
	if err != nil {
		return errors.Join(err, n.unpin(path))
	}
	return nil
}

// Remove takes the pod's user namespace away; none is fine. Processes in it
// keep it until they end.
func (n *Namespaces) Remove(_ context.Context, sb record.Sandbox) error {
	if sb.UserNS() == nil {
		return nil
	}
	return n.unpin(n.Path(sb.ID))
}

func (n *Namespaces) unpin(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) { // not, or no longer, a mount
			break
		}
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unmount user namespace %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove user namespace: %w", err)
	}
	return nil
}

// podID is how pods are named.
var podID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// GC takes the user namespaces away that belong to no live pod. live is called
// after they have been listed: a pod is recorded before its namespace is made.
func (n *Namespaces) GC(ctx context.Context, live func(context.Context) ([]string, error)) error {
	entries, err := os.ReadDir(n.dir)
	if err != nil {
		return fmt.Errorf("list user namespaces: %w", err)
	}
	ids, err := live(ctx)
	if err != nil {
		return fmt.Errorf("list live sandboxes: %w", err)
	}
	keep := make(map[string]bool, len(ids))
	for _, id := range ids {
		keep[id] = true
	}
	var errs []error
	for _, e := range entries {
		if podID.MatchString(e.Name()) && !keep[e.Name()] {
			errs = append(errs, n.unpin(n.Path(e.Name())))
		}
	}
	return errors.Join(errs...)
}
