package snapshot_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/gantry-cri/gantry/plugin/snapshot"
)

// TestMending: a directory that was made for a snapshot which nobody knows of is
// not in the way of the next one.
func TestMending(t *testing.T) {
	ctx, dir := namespaces.WithNamespace(t.Context(), "test"), t.TempDir()
	bare, err := overlay.NewSnapshotter(filepath.Join(dir, "overlay"))
	if err != nil {
		t.Fatal(err)
	}
	defer bare.Close()
	file, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	known := metadata.NewDB(file, nil, map[string]snapshots.Snapshotter{"overlay": bare}).Snapshotter("overlay")
	left := filepath.Join(dir, "overlay", "snapshots", "1", "fs")
	if err := os.MkdirAll(left, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := known.Prepare(ctx, "first", ""); !errors.Is(err, os.ErrExist) {
		t.Fatalf("without help: %v", err)
	}
	sn := snapshot.Mending(known, bare.(snapshots.Cleaner))
	m, err := sn.Prepare(ctx, "first", "")
	if err != nil || len(m) == 0 {
		t.Fatalf("%v, %v", m, err)
	}
	if _, err := sn.Prepare(ctx, "first", ""); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second time: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "overlay", "snapshots", "2"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := sn.View(ctx, "second", ""); err != nil {
		t.Errorf("a view: %v", err)
	}
}

// unclean cannot clean up.
type unclean struct{}

func (unclean) Cleanup(context.Context) error { return errors.New("the disk does not work") }

// failing cannot make snapshots.
type failing struct {
	snapshots.Snapshotter
	err error
}

func (f failing) View(context.Context, string, string, ...snapshots.Opt) (m []mount.Mount, err error) {
	return nil, f.err
}

func TestMendingFails(t *testing.T) {
	full := errors.New("no space left")
	if _, err := snapshot.Mending(failing{err: full}, unclean{}).View(t.Context(), "k", ""); !errors.Is(err, full) {
		t.Errorf("another failure: %v", err)
	}
	if _, err := snapshot.Mending(failing{err: os.ErrExist}, unclean{}).View(t.Context(), "k", ""); err == nil || !errors.Is(err, os.ErrExist) {
		t.Errorf("a failing clean-up: %v", err)
	}
}
