package store

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Where a record sits in containerd's objects.
const (
	sandboxExtension   = "io.gantry.sandbox"
	containerExtension = "io.gantry.container"
	sandboxType        = "github.com/gantry-cri/gantry/record.Sandbox"
	containerType      = "github.com/gantry-cri/gantry/record.Container"
	// specType is what containerd's own packages expect a specification under.
	specType = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
)

// Labels that tools around containerd, cAdvisor above all, look at.
const (
	labelKind      = "io.cri-containerd.kind"
	kindSandbox    = "sandbox"
	kindContainer  = "container"
	kubernetesPart = "io.kubernetes."
	// labelSnapshotRef is followed by the snapshotter and a name of choice.
	labelSnapshotRef = "containerd.io/gc.ref.snapshot"
)

// Metadata keeps records in containerd's metadata database: a sandbox as a
// sandbox object, a container as a container object, each with its record as
// an extension. A sandbox that runs a pause process has a container object of
// the same ID besides, made from the same record in the same transaction; the
// task service and cAdvisor look for it.
type Metadata struct {
	commits    committer
	db         *metadata.DB
	sandboxes  sandbox.Store
	containers containers.Store
	namespace  string
}

// NewMetadata returns the Disk in the given containerd namespace.
func NewMetadata(db *metadata.DB, namespace string) *Metadata {
	return &Metadata{
		commits:    committer{update: db.Update},
		db:         db,
		sandboxes:  metadata.NewSandboxStore(db),
		containers: metadata.NewContainerStore(db),
		namespace:  namespace,
	}
}

// Write implements Disk. Changes that are asked for at the same time share a
// transaction, and so its two disk syncs.
func (m *Metadata) Write(ctx context.Context, c Change) error {
	write, err := m.prepare(c)
	if err != nil {
		return err
	}
	ctx = namespaces.WithNamespace(ctx, m.namespace)
	return m.commits.do(func(tx *bolt.Tx) error {
		return write(boltutil.WithTransaction(ctx, tx))
	})
}

// WriteSoon implements Disk.
func (m *Metadata) WriteSoon(ctx context.Context, c Change) {
	ctx = context.WithoutCancel(ctx)
	failed := func(err error) {
		log.G(ctx).WithError(err).Warn("a record that could wait could not be written")
	}
	write, err := m.prepare(c)
	if err != nil {
		failed(err)
		return
	}
	ctx = namespaces.WithNamespace(ctx, m.namespace)
	m.commits.later(func(tx *bolt.Tx) error { return write(boltutil.WithTransaction(ctx, tx)) }, failed)
}

// Flush makes durable what WriteSoon has left for later: for the end of the
// daemon.
func (m *Metadata) Flush() error {
	if err := m.commits.do(func(*bolt.Tx) error { return nil }); err != nil {
		return fmt.Errorf("write what could wait: %w", err)
	}
	return nil
}

// prepare does what needs no transaction, so that none is held for it.
func (m *Metadata) prepare(c Change) (func(context.Context) error, error) {
	switch {
	case c.PutSandbox != nil:
		return m.putSandbox(*c.PutSandbox, c.Create)
	case c.PutContainer != nil:
		return m.putContainer(*c.PutContainer, c.Create)
	case c.DeleteSandbox != "":
		return func(ctx context.Context) error {
			return errors.Join(absentIsFine(m.sandboxes.Delete(ctx, c.DeleteSandbox)), absentIsFine(m.containers.Delete(ctx, c.DeleteSandbox)))
		}, nil
	case c.DeleteContainer != "":
		// The snapshot that the object kept is garbage from then on. It may not
		// be removed in the same transaction: a snapshotter's lock comes before
		// the database's, and a write that takes it second may wait for ever.
		return func(ctx context.Context) error { return absentIsFine(m.containers.Delete(ctx, c.DeleteContainer)) }, nil
	}
	return nil, fmt.Errorf("empty change: %w", errdefs.ErrInvalidArgument)
}

func (m *Metadata) putSandbox(s record.Sandbox, create bool) (func(context.Context) error, error) {
	b, err := s.Marshal()
	if err != nil {
		return nil, err
	}
	obj := sandbox.Sandbox{
		ID:         s.ID,
		Labels:     objectLabels(kindSandbox, s.Config.GetLabels()),
		Runtime:    sandbox.RuntimeOpts{Name: s.Handler.Runtime, Options: options(s.Handler)},
		Sandboxer:  s.Handler.Sandboxer,
		Extensions: map[string]typeurl.Any{sandboxExtension: &anypb.Any{TypeUrl: sandboxType, Value: b}},
	}
	if s.Handler.Sandboxer != record.SandboxerPod {
		return func(ctx context.Context) error { return m.writeSandbox(ctx, obj, create) }, nil
	}
	pause := containers.Container{
		ID:        s.ID,
		Labels:    obj.Labels,
		Runtime:   containers.RuntimeInfo{Name: s.Handler.Runtime, Options: options(s.Handler)},
		Spec:      spec(s.Instance.Spec),
		SandboxID: s.ID,
	}
	return func(ctx context.Context) error {
		if err := m.writeSandbox(ctx, obj, create); err != nil {
			return err
		}
		return m.writeContainer(ctx, pause, create)
	}, nil
}

func (m *Metadata) putContainer(c record.Container, create bool) (func(context.Context) error, error) {
	b, err := c.Marshal()
	if err != nil {
		return nil, err
	}
	obj := containers.Container{
		ID:          c.ID,
		Labels:      containerLabels(c),
		Image:       c.Image.Name,
		Runtime:     containers.RuntimeInfo{Name: c.Handler.Runtime, Options: options(c.Handler)},
		Spec:        spec(c.Spec),
		Snapshotter: c.Handler.Snapshotter,
		// Named before it exists: the object is what keeps the snapshot
		// from garbage collection.
		SnapshotKey: c.ID,
		SandboxID:   c.SandboxID,
		Extensions:  map[string]typeurl.Any{containerExtension: &anypb.Any{TypeUrl: containerType, Value: b}},
	}
	return func(ctx context.Context) error { return m.writeContainer(ctx, obj, create) }, nil
}

func (m *Metadata) writeSandbox(ctx context.Context, obj sandbox.Sandbox, create bool) error {
	var err error
	if create {
		_, err = m.sandboxes.Create(ctx, obj)
	} else {
		_, err = m.sandboxes.Update(ctx, obj, "extensions."+sandboxExtension)
	}
	return err
}

func (m *Metadata) writeContainer(ctx context.Context, obj containers.Container, create bool) error {
	var err error
	if create {
		_, err = m.containers.Create(ctx, obj)
	} else {
		_, err = m.containers.Update(ctx, obj, "spec", "extensions")
	}
	return err
}

// Load implements Disk. It reads object by object, so that a damaged one costs
// only itself.
func (m *Metadata) Load(ctx context.Context) (Contents, error) {
	var all Contents
	err := m.db.View(func(tx *bolt.Tx) error {
		ctx := boltutil.WithTransaction(namespaces.WithNamespace(ctx, m.namespace), tx)
		for _, id := range objectIDs(tx, m.namespace, "sandboxes") {
			m.loadSandbox(ctx, id, &all)
		}
		for _, id := range objectIDs(tx, m.namespace, "containers") {
			m.loadContainer(ctx, id, &all)
		}
		return nil
	})
	return all, err
}

func (m *Metadata) loadSandbox(ctx context.Context, id string, all *Contents) {
	obj, err := m.sandboxes.Get(ctx, id)
	ext, ours := obj.Extensions[sandboxExtension]
	if err == nil && !ours {
		return // somebody else's sandbox in our namespace
	}
	var s record.Sandbox
	if err == nil {
		s, err = record.UnmarshalSandbox(ext.GetValue())
	}
	if err == nil && s.ID != id {
		err = fmt.Errorf("record says it is sandbox %s: %w", s.ID, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		all.Damaged = append(all.Damaged, Damaged{Kind: "sandbox", ID: id, Err: err})
		return
	}
	if pause, err := m.containers.Get(ctx, id); err == nil {
		s.Instance.Spec = specBytes(pause.Spec)
	}
	all.Sandboxes = append(all.Sandboxes, s)
}

func (m *Metadata) loadContainer(ctx context.Context, id string, all *Contents) {
	obj, err := m.containers.Get(ctx, id)
	ext, ours := obj.Extensions[containerExtension]
	if err == nil && !ours {
		return // a pause process, or somebody else's container
	}
	var c record.Container
	if err == nil {
		c, err = record.UnmarshalContainer(ext.GetValue())
	}
	if err == nil && c.ID != id {
		err = fmt.Errorf("record says it is container %s: %w", c.ID, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		all.Damaged = append(all.Damaged, Damaged{Kind: "container", ID: id, Err: err})
		return
	}
	c.Spec = specBytes(obj.Spec)
	all.Containers = append(all.Containers, c)
}

// objectIDs lists the objects of a kind without reading them. The stores'
// own List fails as a whole when one object is damaged. The bucket names are
// containerd's on-disk schema, version 1.
func objectIDs(tx *bolt.Tx, namespace, kind string) []string {
	b := tx.Bucket([]byte("v1"))
	for _, name := range []string{namespace, kind} {
		if b == nil {
			return nil
		}
		b = b.Bucket([]byte(name))
	}
	if b == nil {
		return nil
	}
	var ids []string
	c := b.Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		if v == nil {
			ids = append(ids, string(k))
		}
	}
	return ids
}

// objectLabels are the labels containerd's tools see: the kind, and the
// Kubernetes identity as far as it fits containerd's limit for a label. The
// kubelet's labels as given are in the record.
func objectLabels(kind string, from map[string]string) map[string]string {
	out := map[string]string{labelKind: kind}
	for k, v := range from {
		if strings.HasPrefix(k, kubernetesPart) && labels.Validate(k, v) == nil {
			out[k] = v
		}
	}
	return out
}

// containerLabels are those of a container object. It names the snapshots of
// the images that it mounts before they exist, as it does its own: that keeps
// them, and the layers below them, from garbage collection.
func containerLabels(c record.Container) map[string]string {
	out := objectLabels(kindContainer, c.Config.GetLabels())
	for i, key := range c.VolumeKeys() {
		out[fmt.Sprintf("%s.%s/%d", labelSnapshotRef, c.Handler.Snapshotter, i)] = key
	}
	return out
}

func options(h record.Handler) typeurl.Any {
	if h.OptionsType == "" {
		return nil
	}
	return &anypb.Any{TypeUrl: h.OptionsType, Value: h.Options}
}

// spec wraps b; containerd refuses a container without a specification, so one
// that is not made yet is an empty object.
func spec(b []byte) typeurl.Any {
	if b == nil {
		b = []byte("{}")
	}
	return &anypb.Any{TypeUrl: specType, Value: b}
}

func specBytes(a typeurl.Any) []byte {
	if a == nil || string(a.GetValue()) == "{}" {
		return nil
	}
	return a.GetValue()
}

func absentIsFine(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}
