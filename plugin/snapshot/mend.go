package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"
)

// mending is a snapshotter that clears away what stands in the way of a new
// snapshot.
//
// A snapshotter that makes a snapshot's directory before it has written down the
// snapshot leaves the directory when it dies in between, and gives out the same
// number again: from then on it could make none, until something else has it
// clean up.
type mending struct {
	snapshots.Snapshotter
	cleaner snapshots.Cleaner

	// mu is held by who makes a snapshot, and alone by who cleans up: one could
	// be made of a directory that is about to be removed.
	mu sync.RWMutex
}

// Mending returns a snapshotter which cleans up by cleaner when it has to, nil
// for one that cannot.
func Mending(sn snapshots.Snapshotter, cleaner snapshots.Cleaner) snapshots.Snapshotter {
	if cleaner == nil {
		return sn
	}
	return &mending{Snapshotter: sn, cleaner: cleaner}
}

// Prepare implements snapshots.Snapshotter.
func (m *mending) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return m.make(ctx, key, func() ([]mount.Mount, error) { return m.Snapshotter.Prepare(ctx, key, parent, opts...) })
}

// View implements snapshots.Snapshotter.
func (m *mending) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return m.make(ctx, key, func() ([]mount.Mount, error) { return m.Snapshotter.View(ctx, key, parent, opts...) })
}

func (m *mending) make(ctx context.Context, key string, do func() ([]mount.Mount, error)) ([]mount.Mount, error) {
	mounts, err := m.shared(do)
	// A snapshot of that key would be errdefs.ErrAlreadyExists, which this is not.
	if !errors.Is(err, fs.ErrExist) {
		return mounts, err
	}
	log.G(ctx).WithError(err).WithField("key", key).Warn("a directory that a dead daemon left is in the way of a snapshot; cleaning up")
	if cerr := m.cleanUp(ctx); cerr != nil {
		return nil, errors.Join(err, fmt.Errorf("clean up snapshotter: %w", cerr))
	}
	return m.shared(do)
}

func (m *mending) shared(do func() ([]mount.Mount, error)) ([]mount.Mount, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return do()
}

func (m *mending) cleanUp(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cleaner.Cleanup(ctx)
}
