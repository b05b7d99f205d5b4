// Package storetest has the contract of store.Disk as a test suite, a Disk in
// memory that passes it, and records to test with.
package storetest

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/store"
)

// Memory is a Disk in memory. It keeps encoded records, as a real one does, so
// that nothing is shared with the index. Fail, when set, is asked before each
// write; an error it returns fails the write.
type Memory struct {
	Fail func(store.Change) error

	mu         sync.Mutex
	sandboxes  map[string]encoded
	containers map[string]encoded
	writes     int
}

type encoded struct{ record, spec []byte }

// NewMemory returns an empty Disk.
func NewMemory() *Memory {
	return &Memory{sandboxes: map[string]encoded{}, containers: map[string]encoded{}}
}

// Writes counts the writes that succeeded.
func (m *Memory) Writes() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.writes
}

// Write implements store.Disk.
func (m *Memory) Write(_ context.Context, c store.Change) error {
	if m.Fail != nil {
		if err := m.Fail(c); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	switch {
	case c.PutSandbox != nil:
		err = put(m.sandboxes, c.PutSandbox.ID, c.PutSandbox.Instance.Spec, c.Create, c.PutSandbox.Marshal)
	case c.PutContainer != nil:
		err = put(m.containers, c.PutContainer.ID, c.PutContainer.Spec, c.Create, c.PutContainer.Marshal)
	case c.DeleteSandbox != "":
		delete(m.sandboxes, c.DeleteSandbox)
	case c.DeleteContainer != "":
		delete(m.containers, c.DeleteContainer)
	default:
		err = fmt.Errorf("empty change: %w", errdefs.ErrInvalidArgument)
	}
	if err == nil {
		m.writes++
	}
	return err
}

func put(in map[string]encoded, id string, spec []byte, create bool, marshal func() ([]byte, error)) error {
	if _, there := in[id]; there == create {
		if create {
			return fmt.Errorf("%s: %w", id, errdefs.ErrAlreadyExists)
		}
		return fmt.Errorf("%s: %w", id, errdefs.ErrNotFound)
	}
	b, err := marshal()
	if err != nil {
		return err
	}
	in[id] = encoded{b, spec}
	return nil
}

// WriteSoon implements store.Disk. For a Memory it is a Write whose failure
// nobody hears of.
func (m *Memory) WriteSoon(ctx context.Context, c store.Change) { _ = m.Write(ctx, c) }

// Load implements store.Disk.
func (m *Memory) Load(context.Context) (store.Contents, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all store.Contents
	for id, e := range m.sandboxes {
		s, err := record.UnmarshalSandbox(e.record)
		if err != nil {
			all.Damaged = append(all.Damaged, store.Damaged{Kind: "sandbox", ID: id, Err: err})
			continue
		}
		s.Instance.Spec = e.spec
		all.Sandboxes = append(all.Sandboxes, s)
	}
	for id, e := range m.containers {
		c, err := record.UnmarshalContainer(e.record)
		if err != nil {
			all.Damaged = append(all.Damaged, store.Damaged{Kind: "container", ID: id, Err: err})
			continue
		}
		c.Spec = e.spec
		all.Containers = append(all.Containers, c)
	}
	return all, nil
}

// Sandbox returns a new record that uses every field.
func Sandbox(name string, attempt uint32) record.Sandbox {
	return record.Sandbox{
		ID: record.NewID(),
		Config: &cri.PodSandboxConfig{
			Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: "uid-" + name, Namespace: "test", Attempt: attempt},
			Hostname:     name,
			LogDirectory: "/var/log/pods/" + name,
			Labels:       map[string]string{"io.kubernetes.pod.name": name, "odd \x01 key": "väl\nue"},
			Annotations:  map[string]string{"a": "b"},
			Linux:        &cri.LinuxPodSandboxConfig{CgroupParent: "/test"},
		},
		Handler: record.Handler{
			Name: "runc", Runtime: "io.containerd.runc.v2", OptionsType: "some.Options", Options: []byte{1, 2},
			Sandboxer: record.SandboxerPod, Snapshotter: "overlayfs",
		},
		Phase:     record.Creating,
		CreatedAt: time.Unix(1700000000, 123456789).UTC(),
		Network:   record.Network{NetNS: "/run/netns/x", IPs: []string{"10.0.0.2", "fd00::2"}, Result: []byte(`{"cniVersion":"1.1.0"}`)},
		Instance:  record.Instance{Pid: 42, Address: "ttrpc+unix:///x", Version: 3, StartedAt: time.Unix(1700000001, 0).UTC(), Spec: []byte(`{"ociVersion":"1.2.0"}`)},
		Reason:    "attach network: no",
		Resources: &cri.LinuxContainerResources{CpuShares: 10},
		Overhead:  &cri.LinuxContainerResources{},
	}
}

// Container returns a new record in the sandbox that uses every field.
func Container(sandboxID, name string, attempt uint32) record.Container {
	return record.Container{
		ID: record.NewID(), SandboxID: sandboxID,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: name, Attempt: attempt},
			Image:    &cri.ImageSpec{Image: "busybox"},
			Labels:   map[string]string{"io.kubernetes.container.name": name},
			Envs:     []*cri.KeyValue{{Key: "K", Value: []byte("odd \x01\xff")}},
		},
		Handler: record.Handler{Name: "runc", Runtime: "io.containerd.runc.v2", Sandboxer: record.SandboxerPod, Snapshotter: "overlayfs"},
		Image:   record.Image{ID: "sha256:1", Ref: "x@sha256:2", Name: "docker.io/library/busybox:latest"},
		Spec:    []byte(`{"ociVersion":"1.2.0"}`), Phase: record.ContainerCreating,
		CreatedAt: time.Unix(1700000002, 1).UTC(), StartedAt: time.Unix(1700000003, 1).UTC(), FinishedAt: time.Unix(1700000004, 1).UTC(),
		Pid: 43, ExitCode: 137, Reason: record.ReasonOOMKilled, Message: "m", LogPath: "/var/log/x.log", StopSignal: "SIGTERM", Rescored: true,
		Denied: []string{"mount"}, Condemned: true,
		Resources: &cri.LinuxContainerResources{CpuShares: 2},
		User:      &cri.ContainerUser{Linux: &cri.LinuxContainerUser{Uid: 1000}},
		Mounts:    []*cri.Mount{{HostPath: "/a", ContainerPath: "/b"}},
	}
}

// Suite runs the contract against the disks that open returns. Each call of
// reopen gives a Disk that sees what was written to d, as after a restart.
func Suite(t *testing.T, open func(*testing.T) store.Disk, reopen func(t *testing.T, d store.Disk) store.Disk) {
	ctx := context.Background()
	t.Run("RoundTrip", func(t *testing.T) {
		d := open(t)
		s := Sandbox("a", 0)
		c := Container(s.ID, "c", 0)
		must(t, d.Write(ctx, store.Change{PutSandbox: &s, Create: true}))
		must(t, d.Write(ctx, store.Change{PutContainer: &c, Create: true}))
		all, err := reopen(t, d).Load(ctx)
		must(t, err)
		if len(all.Sandboxes) != 1 || len(all.Containers) != 1 || len(all.Damaged) != 0 {
			t.Fatalf("loaded %d sandboxes, %d containers, damaged %v", len(all.Sandboxes), len(all.Containers), all.Damaged)
		}
		EqualSandbox(t, all.Sandboxes[0], s)
		EqualContainer(t, all.Containers[0], c)
	})
	t.Run("UpdateReplaces", func(t *testing.T) {
		d := open(t)
		s := Sandbox("a", 0)
		must(t, d.Write(ctx, store.Change{PutSandbox: &s, Create: true}))
		s.Phase, s.Network, s.Reason, s.Instance.Spec = record.Ready, record.Network{}, "", []byte(`{"hostname":"x"}`)
		must(t, d.Write(ctx, store.Change{PutSandbox: &s}))
		all, err := reopen(t, d).Load(ctx)
		must(t, err)
		EqualSandbox(t, all.Sandboxes[0], s)
	})
	t.Run("CreateRefusesSecond", func(t *testing.T) {
		d := open(t)
		s := Sandbox("a", 0)
		must(t, d.Write(ctx, store.Change{PutSandbox: &s, Create: true}))
		if err := d.Write(ctx, store.Change{PutSandbox: &s, Create: true}); !errdefs.IsAlreadyExists(err) {
			t.Fatalf("second create: %v, want AlreadyExists", err)
		}
	})
	t.Run("UpdateRefusesAbsent", func(t *testing.T) {
		d := open(t)
		c := Container(record.NewID(), "c", 0)
		if err := d.Write(ctx, store.Change{PutContainer: &c}); !errdefs.IsNotFound(err) {
			t.Fatalf("update of nothing: %v, want NotFound", err)
		}
	})
	t.Run("DeleteIsIdempotent", func(t *testing.T) {
		d := open(t)
		s := Sandbox("a", 0)
		c := Container(s.ID, "c", 0)
		must(t, d.Write(ctx, store.Change{PutSandbox: &s, Create: true}))
		must(t, d.Write(ctx, store.Change{PutContainer: &c, Create: true}))
		for range 2 {
			must(t, d.Write(ctx, store.Change{DeleteContainer: c.ID}))
			must(t, d.Write(ctx, store.Change{DeleteSandbox: s.ID}))
		}
		all, err := reopen(t, d).Load(ctx)
		must(t, err)
		if len(all.Sandboxes)+len(all.Containers)+len(all.Damaged) != 0 {
			t.Fatalf("left after delete: %+v", all)
		}
	})
	t.Run("SoonKeepsTheOrder", func(t *testing.T) {
		d := open(t)
		c := Container(record.NewID(), "c", 0)
		must(t, d.Write(ctx, store.Change{PutContainer: &c, Create: true}))
		soon := c
		soon.Phase, soon.Pid = record.ContainerRunning, 99
		d.WriteSoon(ctx, store.Change{PutContainer: &soon})
		last := soon
		last.Phase, last.Pid = record.ContainerExited, 0
		must(t, d.Write(ctx, store.Change{PutContainer: &last}))
		all, err := reopen(t, d).Load(ctx)
		must(t, err)
		EqualContainer(t, all.Containers[0], last)
	})
	t.Run("SoonGoesWithTheNext", func(t *testing.T) {
		d := open(t)
		c, s := Container(record.NewID(), "c", 0), Sandbox("other", 0)
		must(t, d.Write(ctx, store.Change{PutContainer: &c, Create: true}))
		c.Phase = record.ContainerRunning
		d.WriteSoon(ctx, store.Change{PutContainer: &c})
		must(t, d.Write(ctx, store.Change{PutSandbox: &s, Create: true}))
		all, err := reopen(t, d).Load(ctx)
		must(t, err)
		EqualContainer(t, all.Containers[0], c)
	})
	t.Run("ParallelWrites", func(t *testing.T) { parallelWrites(t, open(t), reopen) })
}

// parallelWrites also mixes in writes that must fail, which may not harm the
// others they share a commit with.
func parallelWrites(t *testing.T, d store.Disk, reopen func(*testing.T, store.Disk) store.Disk) {
	ctx := context.Background()
	const n = 50
	var wg sync.WaitGroup
	for i := range n {
		wg.Add(2)
		go func() {
			defer wg.Done()
			s := Sandbox(fmt.Sprint("p", i), 0)
			if err := d.Write(ctx, store.Change{PutSandbox: &s, Create: true}); err != nil {
				t.Errorf("write %d: %v", i, err)
			}
		}()
		go func() {
			defer wg.Done()
			c := Container(record.NewID(), "absent", 0)
			if err := d.Write(ctx, store.Change{PutContainer: &c}); !errdefs.IsNotFound(err) {
				t.Errorf("update of nothing %d: %v, want NotFound", i, err)
			}
		}()
	}
	wg.Wait()
	all, err := reopen(t, d).Load(ctx)
	must(t, err)
	if len(all.Sandboxes) != n || len(all.Containers) != 0 {
		t.Fatalf("loaded %d sandboxes and %d containers, want %d and 0", len(all.Sandboxes), len(all.Containers), n)
	}
}

// EqualSandbox fails the test unless got and want are the same.
func EqualSandbox(t *testing.T, got, want record.Sandbox) {
	t.Helper()
	g, err := got.Marshal()
	must(t, err)
	w, err := want.Marshal()
	must(t, err)
	if string(g) != string(w) || string(got.Instance.Spec) != string(want.Instance.Spec) || !proto.Equal(got.Config, want.Config) {
		t.Fatalf("got sandbox\n%s\nwant\n%s", g, w)
	}
}

// EqualContainer fails the test unless got and want are the same.
func EqualContainer(t *testing.T, got, want record.Container) {
	t.Helper()
	g, err := got.Marshal()
	must(t, err)
	w, err := want.Marshal()
	must(t, err)
	if string(g) != string(w) || string(got.Spec) != string(want.Spec) || !proto.Equal(got.Config, want.Config) {
		t.Fatalf("got container\n%s\nwant\n%s", g, w)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
