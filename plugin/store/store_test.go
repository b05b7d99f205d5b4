package store_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/store"
	"github.com/gantry-cri/gantry/plugin/store/storetest"
)

var ctx = context.Background()

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type boltDisk struct {
	*store.Metadata
	path string
	db   *bolt.DB
}

func openBolt(t *testing.T, path string) *boltDisk {
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return &boltDisk{store.NewMetadata(metadata.NewDB(db, nil, nil), "k8s.io"), path, db}
}

func TestMetadataDisk(t *testing.T) {
	storetest.Suite(t,
		func(t *testing.T) store.Disk { return openBolt(t, filepath.Join(t.TempDir(), "meta.db")) },
		func(t *testing.T, d store.Disk) store.Disk {
			b := d.(*boltDisk)
			b.db.Close()
			return openBolt(t, b.path)
		})
}

func TestMemoryDisk(t *testing.T) {
	storetest.Suite(t,
		func(*testing.T) store.Disk { return storetest.NewMemory() },
		func(_ *testing.T, d store.Disk) store.Disk { return d })
}

// A record that cannot be decoded, and an object that containerd itself cannot
// read, are reported and cost nothing else.
func TestDamagedRecordsAreReported(t *testing.T) {
	d := openBolt(t, filepath.Join(t.TempDir(), "meta.db"))
	good, bad := storetest.Sandbox("good", 0), storetest.Sandbox("bad", 0)
	c := storetest.Container(good.ID, "c", 0)
	for _, change := range []store.Change{{PutSandbox: &good, Create: true}, {PutSandbox: &bad, Create: true}, {PutContainer: &c, Create: true}} {
		if err := d.Write(ctx, change); err != nil {
			t.Fatal(err)
		}
	}
	err := d.db.Update(func(tx *bolt.Tx) error {
		sandboxes := tx.Bucket([]byte("v1")).Bucket([]byte("k8s.io")).Bucket([]byte("sandboxes"))
		if err := sandboxes.Bucket([]byte(bad.ID)).Bucket([]byte("extensions")).Put([]byte("io.gantry.sandbox"), []byte("garbage")); err != nil {
			return err
		}
		b, err := sandboxes.CreateBucket([]byte("not-ours"))
		if err != nil {
			return err
		}
		return b.Put([]byte("createdat"), []byte("garbage"))
	})
	if err != nil {
		t.Fatal(err)
	}
	s, damaged, err := store.Open(ctx, d)
	if err != nil {
		t.Fatal(err)
	}
	if len(damaged) != 2 {
		t.Errorf("damaged: %v, want 2", damaged)
	}
	if got := s.Sandboxes.List(); len(got) != 1 || got[0].ID != good.ID {
		t.Errorf("loaded %v, want only the good one", got)
	}
	if got := s.Containers.Of(good.ID); len(got) != 1 {
		t.Errorf("containers of the good one: %v", got)
	}
}

func open(t *testing.T, d store.Disk) *store.Store {
	t.Helper()
	s, damaged, err := store.Open(ctx, d)
	if err != nil || len(damaged) > 0 {
		t.Fatalf("open: %v, damaged %v", err, damaged)
	}
	return s
}

func TestCreateRefusesTheSameKey(t *testing.T) {
	s := open(t, storetest.NewMemory())
	a, b := storetest.Sandbox("p", 1), storetest.Sandbox("p", 1)
	if err := s.Sandboxes.Create(ctx, a); err != nil {
		t.Fatal(err)
	}
	err := s.Sandboxes.Create(ctx, b)
	var exists *store.ExistsError
	if !errors.As(err, &exists) || exists.ID != a.ID || !errdefs.IsAlreadyExists(err) {
		t.Fatalf("second create: %v, want ExistsError naming %s", err, a.ID)
	}
	if err := s.Sandboxes.Create(ctx, storetest.Sandbox("p", 2)); err != nil {
		t.Fatalf("another attempt: %v", err)
	}
}

func TestFailedWriteChangesNothing(t *testing.T) {
	d := storetest.NewMemory()
	s := open(t, d)
	a := storetest.Sandbox("p", 0)
	boom := errors.New("disk is full")
	d.Fail = func(store.Change) error { return boom }
	if err := s.Sandboxes.Create(ctx, a); !errors.Is(err, boom) {
		t.Fatalf("create: %v", err)
	}
	if len(s.Sandboxes.List()) != 0 {
		t.Fatal("a create that failed is listed")
	}
	d.Fail = nil
	if err := s.Sandboxes.Create(ctx, a); err != nil {
		t.Fatalf("create after a failed one: %v", err)
	}
	d.Fail = func(store.Change) error { return boom }
	if _, err := s.Sandboxes.Move(ctx, a.ID, record.Started, nil); !errors.Is(err, boom) {
		t.Fatalf("move: %v", err)
	}
	if err := s.Sandboxes.Delete(ctx, a.ID); !errors.Is(err, boom) {
		t.Fatalf("delete: %v", err)
	}
	if got, err := s.Sandboxes.Get(a.ID); err != nil || got.Phase != record.Creating {
		t.Fatalf("after failed writes: %v %v", got.Phase, err)
	}
}

// seen is a Watcher that notes phases, and whether the store had them already.
type seen struct {
	s    *store.Store
	list []string
}

func (w *seen) SandboxChanged(before, after *record.Sandbox) {
	note := "sandbox"
	for _, sb := range []*record.Sandbox{before, after} {
		if sb == nil {
			note += " -"
			continue
		}
		note += " " + string(sb.Phase)
	}
	if after != nil {
		if got, err := w.s.Sandboxes.Get(after.ID); err != nil || got.Phase != after.Phase {
			note += " too early"
		}
	}
	w.list = append(w.list, note)
}

func (w *seen) ContainerChanged(before, after *record.Container) {
	note := "container"
	for _, c := range []*record.Container{before, after} {
		if c == nil {
			note += " -"
			continue
		}
		note += " " + string(c.Phase)
	}
	w.list = append(w.list, note)
}

func TestWatch(t *testing.T) {
	d := storetest.NewMemory()
	s := open(t, d)
	w := &seen{s: s}
	s.Watch(w)
	sb := storetest.Sandbox("p", 0)
	c := storetest.Container(sb.ID, "c", 0)
	_, failed := s.Sandboxes.Move(ctx, "unknown", record.Started, nil)
	must(t, s.Sandboxes.Create(ctx, sb))
	_, err := s.Sandboxes.Move(ctx, sb.ID, record.Started, nil)
	must(t, err)
	must(t, s.Containers.Create(ctx, c))
	_, err = s.Containers.Move(ctx, c.ID, record.Prepared, nil)
	must(t, err)
	_, err = s.Containers.MoveSoon(ctx, c.ID, record.Released, nil)
	must(t, err)
	d.Fail = func(store.Change) error { return errors.New("disk is full") }
	if err := s.Containers.Delete(ctx, c.ID); err == nil || failed == nil {
		t.Fatal("no failure")
	}
	d.Fail = nil
	must(t, s.Containers.Delete(ctx, c.ID))
	must(t, s.Sandboxes.Delete(ctx, sb.ID))
	want := []string{"sandbox - creating", "sandbox creating ready", "container - creating", "container creating created",
		"container created running", "container running -", "sandbox ready -"}
	if !slices.Equal(w.list, want) {
		t.Errorf("seen %q, want %q", w.list, want)
	}
}

func TestResolve(t *testing.T) {
	s := open(t, storetest.NewMemory())
	a, b := storetest.Sandbox("a", 0), storetest.Sandbox("b", 0)
	a.ID, b.ID = "aaaa1"+a.ID[5:], "aaaa2"+b.ID[5:]
	for _, x := range []record.Sandbox{a, b} {
		if err := s.Sandboxes.Create(ctx, x); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := s.Sandboxes.Resolve("aaaa2"); err != nil || got.ID != b.ID {
		t.Errorf("unique prefix: %v %v", got.ID, err)
	}
	if got, err := s.Sandboxes.Resolve(a.ID); err != nil || got.ID != a.ID {
		t.Errorf("whole ID: %v %v", got.ID, err)
	}
	if _, err := s.Sandboxes.Resolve("aaaa"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "ambiguous") {
		t.Errorf("ambiguous prefix: %v", err)
	}
	for _, p := range []string{"", "b", "aaaa3", a.ID + "0"} {
		if _, err := s.Sandboxes.Resolve(p); !errdefs.IsNotFound(err) {
			t.Errorf("resolve %q: %v, want NotFound", p, err)
		}
	}
}

// While one pod's write is stuck in the disk, everything can be read and other
// pods can be written.
func TestReadsDoNotWaitForWrites(t *testing.T) {
	d := storetest.NewMemory()
	s := open(t, d)
	a, b := storetest.Sandbox("a", 0), storetest.Sandbox("b", 0)
	if err := s.Sandboxes.Create(ctx, a); err != nil {
		t.Fatal(err)
	}
	stuck, release := make(chan struct{}), make(chan struct{})
	d.Fail = func(c store.Change) error {
		if c.PutSandbox != nil && c.PutSandbox.ID == a.ID {
			close(stuck)
			<-release
		}
		return nil
	}
	moved := make(chan error)
	go func() {
		_, err := s.Sandboxes.Move(ctx, a.ID, record.Started, nil)
		moved <- err
	}()
	<-stuck
	done := make(chan error)
	go func() {
		if err := s.Sandboxes.Create(ctx, b); err != nil {
			done <- err
			return
		}
		s.Sandboxes.List()
		got, err := s.Sandboxes.Get(a.ID)
		if err == nil && got.Phase != record.Creating {
			err = errors.New("a write that is not durable is visible")
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("a read or another pod's write waited for the stuck write")
	}
	close(release)
	if err := <-moved; err != nil {
		t.Error(err)
	}
}

// A listing is what is there, after each kind of change; and what was listed
// before does not change with it.
func TestList(t *testing.T) {
	s := open(t, storetest.NewMemory())
	sb := storetest.Sandbox("a", 0)
	phases := func() (all []record.Phase) {
		for _, sb := range s.Sandboxes.List() {
			all = append(all, sb.Phase)
		}
		return all
	}
	var seen [][]record.Sandbox
	for _, step := range []struct {
		do   func() error
		want []record.Phase
	}{
		{func() error { return nil }, nil},
		{func() error { return s.Sandboxes.Create(ctx, sb) }, []record.Phase{record.Creating}},
		{func() error { _, err := s.Sandboxes.Move(ctx, sb.ID, record.Started, nil); return err }, []record.Phase{record.Ready}},
		{func() error { return s.Sandboxes.Delete(ctx, sb.ID) }, nil},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if got := phases(); !slices.Equal(got, step.want) {
				t.Errorf("listed %v, want %v", got, step.want)
			}
		}
		seen = append(seen, s.Sandboxes.List())
	}
	if seen[1][0].Phase != record.Creating || seen[2][0].Phase != record.Ready {
		t.Error("an older listing was changed")
	}
}

func TestContainersOf(t *testing.T) {
	s := open(t, storetest.NewMemory())
	sb := storetest.Sandbox("p", 0)
	c1, c2, other := storetest.Container(sb.ID, "c1", 0), storetest.Container(sb.ID, "c2", 0), storetest.Container(record.NewID(), "c1", 0)
	for _, c := range []record.Container{c1, c2, other} {
		if err := s.Containers.Create(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.Containers.Of(sb.ID); len(got) != 2 {
		t.Errorf("Of: %d, want 2", len(got))
	}
	if err := s.Containers.Delete(ctx, c1.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Containers.Delete(ctx, c1.ID); err != nil {
		t.Errorf("second delete: %v", err)
	}
	if got := s.Containers.Of(sb.ID); len(got) != 1 || got[0].ID != c2.ID {
		t.Errorf("Of after delete: %v", got)
	}
}

// Two records of one pod attempt, which only a bug or a damaged disk can leave,
// must both be loaded: each stands for things on the host.
func TestLoadKeepsTwoOfOneKey(t *testing.T) {
	d := storetest.NewMemory()
	a, b := storetest.Sandbox("p", 0), storetest.Sandbox("p", 0)
	for _, x := range []record.Sandbox{a, b} {
		if err := d.Write(ctx, store.Change{PutSandbox: &x, Create: true}); err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, d)
	if len(s.Sandboxes.List()) != 2 {
		t.Fatal("one was dropped")
	}
	for _, id := range []string{a.ID, b.ID} {
		if err := s.Sandboxes.Delete(ctx, id); err != nil {
			t.Error(err)
		}
	}
	if err := s.Sandboxes.Create(ctx, storetest.Sandbox("p", 0)); err != nil {
		t.Errorf("create after both are gone: %v", err)
	}
}
