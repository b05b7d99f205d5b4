package store_test

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/gantry-cri/gantry/plugin/store"
	"github.com/gantry-cri/gantry/plugin/store/storetest"
)

// backend is a snapshotter of which a preparation with the key "slow" takes as
// long as a test wants.
type backend struct {
	snapshots.Snapshotter
	began, goOn chan struct{}
}

func (b *backend) Prepare(_ context.Context, key, _ string, _ ...snapshots.Opt) ([]mount.Mount, error) {
	if strings.HasSuffix(key, "/slow") {
		close(b.began)
		<-b.goOn
	}
	return nil, nil
}

func (b *backend) Stat(context.Context, string) (snapshots.Info, error) { return snapshots.Info{}, nil }

func (b *backend) Remove(context.Context, string) error { return nil }

func (b *backend) Walk(context.Context, snapshots.WalkFunc, ...string) error { return nil }

func openWithSnapshots(t *testing.T) (*metadata.DB, *store.Metadata, *backend) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(t.TempDir(), "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	// It is not closed: that would wait for a writer that hangs.
	b := &backend{began: make(chan struct{}), goOn: make(chan struct{})}
	meta := metadata.NewDB(db, nil, map[string]snapshots.Snapshotter{"overlayfs": b})
	return meta, store.NewMetadata(meta, "k8s.io"), b
}

// A removal, a collection of garbage and a preparation that come together all
// end: the removal takes no lock of the snapshotter while it holds the
// database's.
func TestDeleteWaitsForNoSnapshotter(t *testing.T) {
	db, disk, b := openWithSnapshots(t)
	c := storetest.Container("sandbox", "c", 0)
	if err := disk.Write(ctx, store.Change{PutContainer: &c, Create: true}); err != nil {
		t.Fatal(err)
	}
	named := namespaces.WithNamespace(ctx, "k8s.io")
	sn := db.Snapshotter("overlayfs")
	for _, key := range []string{c.ID, "garbage"} {
		if _, err := sn.Prepare(named, key, ""); err != nil {
			t.Fatal(err)
		}
	}
	ended := make(chan error, 3)
	go func() { _, err := sn.Prepare(named, "slow", ""); ended <- err }()
	<-b.began
	go func() { _, err := db.GarbageCollect(named); ended <- err }()
	// Its clean-up waits for the preparation, and keeps others from the
	// snapshotter, when the metadata of the garbage is gone.
	for until := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := sn.Stat(named, "garbage"); errdefs.IsNotFound(err) {
			break
		}
		if time.Now().After(until) {
			t.Fatal("the garbage is not collected")
		}
	}
	<-time.After(50 * time.Millisecond) // it shows nothing by which to see that it waits
	go func() { ended <- disk.Write(ctx, store.Change{DeleteContainer: c.ID}) }()
	<-time.After(50 * time.Millisecond)
	close(b.goOn)
	for range 3 {
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("a write of the metadata waits for ever")
		}
	}
}

// What is left of a container after its record is garbage, and the database
// knows that there is some.
func TestDeleteLeavesTheSnapshotToCollection(t *testing.T) {
	db, disk, _ := openWithSnapshots(t)
	c, other := storetest.Container("sandbox", "c", 0), storetest.Container("sandbox", "other", 0)
	named := namespaces.WithNamespace(ctx, "k8s.io")
	sn := db.Snapshotter("overlayfs")
	for _, id := range []string{c.ID, other.ID} {
		if _, err := sn.Prepare(named, id, ""); err != nil {
			t.Fatal(err)
		}
	}
	for _, change := range []store.Change{{PutContainer: &c, Create: true}, {PutContainer: &other, Create: true}} {
		if err := disk.Write(ctx, change); err != nil {
			t.Fatal(err)
		}
	}
	var dirty bool
	db.RegisterMutationCallback(func(d bool) { dirty = d })
	if err := disk.Write(ctx, store.Change{DeleteContainer: c.ID}); err != nil {
		t.Fatal(err)
	}
	if !dirty {
		t.Error("the collector is not told")
	}
	if _, err := db.GarbageCollect(named); err != nil {
		t.Fatal(err)
	}
	if _, err := sn.Stat(named, c.ID); !errdefs.IsNotFound(err) {
		t.Errorf("snapshot of a container that is gone: %v, want not found", err)
	}
	if _, err := sn.Stat(named, other.ID); errdefs.IsNotFound(err) {
		t.Error("the snapshot of a container that is there was collected")
	}
}
