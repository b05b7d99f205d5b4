// Package snapshot makes the root filesystems of containers in containerd's
// snapshotters. A snapshot's key is the container's ID; the container object of
// the same ID keeps it from garbage collection, so it needs no lease, and is
// deleted with it, by package store. It knows nothing of images: the parent is
// named by the caller.
package snapshot

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// Snapshots are the writable layers in all snapshotters.
type Snapshots struct {
	find func(name string) (snapshots.Snapshotter, bool)
	root func(name string) string
}

// New returns the snapshots. find returns the snapshotter of that name, which
// must be the metadata database's and not the bare one; root is the directory
// where it keeps its data.
func New(find func(name string) (snapshots.Snapshotter, bool), root func(name string) string) *Snapshots {
	return &Snapshots{find: find, root: root}
}

func (s *Snapshots) snapshotter(name string) (snapshots.Snapshotter, error) {
	if sn, ok := s.find(name); ok {
		return sn, nil
	}
	return nil, fmt.Errorf("snapshotter %q is not loaded: %w", name, errdefs.ErrNotFound)
}

// Prepare makes a writable layer over the committed snapshot parent and returns
// its mounts. One that exists is returned as it is.
func (s *Snapshots) Prepare(ctx context.Context, snapshotter, key, parent string) ([]mount.Mount, error) {
	sn, err := s.snapshotter(snapshotter)
	if err != nil {
		return nil, err
	}
	mounts, err := sn.Prepare(ctx, key, parent)
	if errdefs.IsAlreadyExists(err) {
		return sn.Mounts(ctx, key)
	}
	return mounts, err
}

// Mounts returns the mounts of the layer.
func (s *Snapshots) Mounts(ctx context.Context, snapshotter, key string) ([]mount.Mount, error) {
	sn, err := s.snapshotter(snapshotter)
	if err != nil {
		return nil, err
	}
	return sn.Mounts(ctx, key)
}

// Usage is what the layer takes, in bytes and inodes.
func (s *Snapshots) Usage(ctx context.Context, snapshotter, key string) (bytes, inodes uint64, err error) {
	sn, err := s.snapshotter(snapshotter)
	if err != nil {
		return 0, 0, err
	}
	u, err := sn.Usage(ctx, key)
	return uint64(u.Size), uint64(u.Inodes), err
}

// Mountpoint is the directory where the snapshotter keeps its data.
func (s *Snapshots) Mountpoint(snapshotter string) string { return s.root(snapshotter) }
