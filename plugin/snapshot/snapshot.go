// Package snapshot makes the root filesystems of containers in containerd's
// snapshotters, and the views of images that they mount. The keys are made of the
// container's ID; the container object of that ID keeps them from garbage
// collection, so they need no lease, and go that way when package store deletes
// the object. It knows nothing of images: the parent is named by the caller.
package snapshot

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Snapshots are the writable layers in all snapshotters.
type Snapshots struct {
	find func(name string) (snapshots.Snapshotter, bool)
	root func(name string) string
	can  func(name string) []string
}

// New returns the snapshots. find returns the snapshotter of that name, which
// must be the metadata database's and not the bare one; root is the directory
// where it keeps its data, can lists what its plugin says it can do.
func New(find func(name string) (snapshots.Snapshotter, bool), root func(name string) string, can func(name string) []string) *Snapshots {
	return &Snapshots{find: find, root: root, can: can}
}

func (s *Snapshots) snapshotter(name string) (snapshots.Snapshotter, error) {
	if sn, ok := s.find(name); ok {
		return sn, nil
	}
	return nil, fmt.Errorf("snapshotter %q is not loaded: %w", name, errdefs.ErrNotFound)
}

// Prepare makes a writable layer over the committed snapshot parent and returns
// its mounts. One that exists is returned as it is. With a user namespace the
// owners of all files are shown as it maps them.
func (s *Snapshots) Prepare(ctx context.Context, snapshotter, key, parent string, u *cri.UserNamespace) ([]mount.Mount, error) {
	sn, err := s.snapshotter(snapshotter)
	if err != nil {
		return nil, err
	}
	opts, err := s.owners(snapshotter, u)
	if err != nil {
		return nil, err
	}
	mounts, err := sn.Prepare(ctx, key, parent, opts...)
	if errdefs.IsAlreadyExists(err) {
		return sn.Mounts(ctx, key)
	}
	return mounts, err
}

// owners has a layer shown with the owners of a user namespace, of none if u is
// nil.
func (s *Snapshots) owners(snapshotter string, u *cri.UserNamespace) ([]snapshots.Opt, error) {
	if u == nil {
		return nil, nil
	}
	if err := s.Remaps(snapshotter); err != nil {
		return nil, err
	}
	return []snapshots.Opt{snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: label(u.GetUids()),
		snapshots.LabelSnapshotGIDMapping: label(u.GetGids()),
	})}, nil
}

// What the plugin of a snapshotter can say of user namespaces.
const (
	// remaps: layers are mounted with other owners, as a label of the snapshot
	// says.
	remaps = "remap-ids"
)

// Remaps says why the snapshotter cannot show a layer with the owners of a user
// namespace, nil if it can.
func (s *Snapshots) Remaps(snapshotter string) error {
	if slices.Contains(s.can(snapshotter), remaps) {
		return nil
	}
	return fmt.Errorf("snapshotter %q cannot mount layers with the owners of a user namespace on this machine: %w", snapshotter, errdefs.ErrFailedPrecondition)
}

// label writes mappings as snapshotters read them.
func label(list []*cri.IDMapping) string {
	parts := make([]string, len(list))
	for i, m := range list {
		parts[i] = fmt.Sprintf("%d:%d:%d", m.GetContainerId(), m.GetHostId(), m.GetLength())
	}
	return strings.Join(parts, ",")
}

// View makes a read-only view of the committed snapshot parent and returns its
// mounts. One that exists is returned as it is. A user namespace is as in
// Prepare.
func (s *Snapshots) View(ctx context.Context, snapshotter, key, parent string, u *cri.UserNamespace) ([]mount.Mount, error) {
	sn, err := s.snapshotter(snapshotter)
	if err != nil {
		return nil, err
	}
	opts, err := s.owners(snapshotter, u)
	if err != nil {
		return nil, err
	}
	mounts, err := sn.View(ctx, key, parent, opts...)
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
