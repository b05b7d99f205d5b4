// Package store holds the records of pods and containers. containerd's metadata
// is the only durable truth; memory holds an index of immutable values made
// from it. This package is the only writer of both.
//
// Every write goes to disk first and to the index after it, so that nobody sees
// what a crash could take back; MoveSoon is the one exception, and says why.
// Reads are of the index alone: they never wait for a disk, nor for a writer of
// another record. The package knows nothing of what the records stand for:
// effects are the business of the lifecycle packages. Start reading at Open;
// disk.go is what a medium must provide, metadata.go the real one.
package store

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Store is the index of everything.
type Store struct {
	Sandboxes  *Sandboxes
	Containers *Containers
}

// Open loads all records. Those that cannot be read are returned, not loaded,
// and stay on disk.
func Open(ctx context.Context, d Disk) (*Store, []Damaged, error) {
	all, err := d.Load(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("load records: %w", err)
	}
	s := &Store{Sandboxes: newSandboxes(d), Containers: newContainers(d)}
	for _, sb := range all.Sandboxes {
		s.Sandboxes.t.adopt(sb)
	}
	for _, c := range all.Containers {
		s.Containers.t.adopt(c)
		s.Containers.link(c)
	}
	return s, all.Damaged, nil
}

// Watcher is told of changes: before is nil for a new record, after for a
// deleted one. Changes of one record come one at a time, in order, and before
// the writer goes on; a watcher may read records and must not write any.
type Watcher interface {
	SandboxChanged(before, after *record.Sandbox)
	ContainerChanged(before, after *record.Container)
}

// Watch has w told of all changes. It comes before the first write.
func (s *Store) Watch(w Watcher) {
	s.Sandboxes.t.changed, s.Containers.t.changed = w.SandboxChanged, w.ContainerChanged
}

// ExistsError says that another record has the same identity. Its class is
// AlreadyExists.
type ExistsError struct {
	// Kind is "sandbox" or "container", ID the other record's, Key the identity.
	Kind, ID, Key string
}

func (e *ExistsError) Error() string {
	return fmt.Sprintf("%s %s exists already, as %s", e.Kind, e.Key, e.ID)
}

// Unwrap gives the class of the error.
func (e *ExistsError) Unwrap() error { return errdefs.ErrAlreadyExists }

// Sandboxes are the records of pod sandboxes.
type Sandboxes struct {
	t *table[record.Sandbox, record.Key]
}

func newSandboxes(d Disk) *Sandboxes {
	t := newTable("sandbox", func(s record.Sandbox) string { return s.ID }, record.Sandbox.Key)
	t.write = func(ctx context.Context, s record.Sandbox, create bool) error {
		return d.Write(ctx, Change{PutSandbox: &s, Create: create})
	}
	t.erase = func(ctx context.Context, s record.Sandbox) error { return d.Write(ctx, Change{DeleteSandbox: s.ID}) }
	return &Sandboxes{t}
}

// Create records a new sandbox; an *ExistsError names the one that has the
// same key.
func (s *Sandboxes) Create(ctx context.Context, sb record.Sandbox) error { return s.t.create(ctx, sb) }

// Move applies the event to the sandbox's phase, and change, which may be nil,
// to the rest of it, in one write.
func (s *Sandboxes) Move(ctx context.Context, id string, e record.Event, change func(*record.Sandbox)) (record.Sandbox, error) {
	return s.t.update(ctx, id, func(sb record.Sandbox) (record.Sandbox, error) {
		phase, err := sb.Phase.Next(e)
		if err != nil {
			return sb, fmt.Errorf("sandbox %s: %w", id, err)
		}
		sb.Phase = phase
		if change != nil {
			change(&sb)
		}
		return sb, nil
	})
}

// Update changes the sandbox without a move of its phase. change works on a
// copy but must not touch what the record points to.
func (s *Sandboxes) Update(ctx context.Context, id string, change func(*record.Sandbox) error) (record.Sandbox, error) {
	return s.t.update(ctx, id, func(sb record.Sandbox) (record.Sandbox, error) {
		err := change(&sb)
		return sb, err
	})
}

// Delete forgets the sandbox; an unknown one is forgotten already.
func (s *Sandboxes) Delete(ctx context.Context, id string) error { return s.t.remove(ctx, id) }

// Get returns the sandbox with exactly this ID.
func (s *Sandboxes) Get(id string) (record.Sandbox, error) { return s.t.get(id) }

// Resolve returns the sandbox whose ID is or begins with prefix; NotFound when
// there is none, InvalidArgument when there are several.
func (s *Sandboxes) Resolve(prefix string) (record.Sandbox, error) {
	id, err := s.t.resolve(prefix)
	if err != nil {
		return record.Sandbox{}, err
	}
	return s.t.get(id)
}

// ByKey returns the sandbox of a pod attempt.
func (s *Sandboxes) ByKey(k record.Key) (record.Sandbox, bool) { return s.t.lookup(k) }

// List returns all sandboxes in the order of their IDs, in a slice that others
// have too and nobody may change.
func (s *Sandboxes) List() []record.Sandbox { return s.t.list() }

// Containers are the records of containers.
type Containers struct {
	t *table[record.Container, record.ContainerKey]

	mu     sync.RWMutex
	bySbox map[string]map[string]struct{} // sandbox ID → container IDs
}

func newContainers(d Disk) *Containers {
	t := newTable("container", func(c record.Container) string { return c.ID }, record.Container.Key)
	t.write = func(ctx context.Context, c record.Container, create bool) error {
		return d.Write(ctx, Change{PutContainer: &c, Create: create})
	}
	t.soon = func(ctx context.Context, c record.Container) { d.WriteSoon(ctx, Change{PutContainer: &c}) }
	t.erase = func(ctx context.Context, c record.Container) error {
		return d.Write(ctx, Change{DeleteContainer: c.ID})
	}
	return &Containers{t: t, bySbox: map[string]map[string]struct{}{}}
}

// Create records a new container; an *ExistsError names the one that has the
// same key.
func (c *Containers) Create(ctx context.Context, ctr record.Container) error {
	if err := c.t.create(ctx, ctr); err != nil {
		return err
	}
	c.link(ctr)
	return nil
}

// Move applies the event to the container's phase, and change, which may be
// nil, to the rest of it, in one write.
func (c *Containers) Move(ctx context.Context, id string, e record.ContainerEvent, change func(*record.Container)) (record.Container, error) {
	return c.t.update(ctx, id, move(id, e, change))
}

// MoveSoon is Move for what a crash may undo, because the runtime tells the
// same after it: the disk has it with the next write, or in some moments.
func (c *Containers) MoveSoon(ctx context.Context, id string, e record.ContainerEvent, change func(*record.Container)) (record.Container, error) {
	return c.t.updateSoon(ctx, id, move(id, e, change))
}

func move(id string, e record.ContainerEvent, change func(*record.Container)) func(record.Container) (record.Container, error) {
	return func(ctr record.Container) (record.Container, error) {
		phase, err := ctr.Phase.Next(e)
		if err != nil {
			return ctr, fmt.Errorf("container %s: %w", id, err)
		}
		ctr.Phase = phase
		if change != nil {
			change(&ctr)
		}
		return ctr, nil
	}
}

// Update changes the container without a move of its phase. change works on a
// copy but must not touch what the record points to.
func (c *Containers) Update(ctx context.Context, id string, change func(*record.Container) error) (record.Container, error) {
	return c.t.update(ctx, id, func(ctr record.Container) (record.Container, error) {
		err := change(&ctr)
		return ctr, err
	})
}

// Delete forgets the container; an unknown one is forgotten already.
func (c *Containers) Delete(ctx context.Context, id string) error {
	ctr, err := c.t.get(id)
	if err != nil {
		return nil
	}
	if err := c.t.remove(ctx, id); err != nil {
		return err
	}
	c.unlink(ctr)
	return nil
}

// Get returns the container with exactly this ID.
func (c *Containers) Get(id string) (record.Container, error) { return c.t.get(id) }

// Resolve returns the container whose ID is or begins with prefix; NotFound
// when there is none, InvalidArgument when there are several.
func (c *Containers) Resolve(prefix string) (record.Container, error) {
	id, err := c.t.resolve(prefix)
	if err != nil {
		return record.Container{}, err
	}
	return c.t.get(id)
}

// ByKey returns the container of that name and attempt in its pod.
func (c *Containers) ByKey(k record.ContainerKey) (record.Container, bool) { return c.t.lookup(k) }

// List returns all containers in the order of their IDs, in a slice that others
// have too and nobody may change.
func (c *Containers) List() []record.Container { return c.t.list() }

// Of returns the containers of one sandbox, in no particular order.
func (c *Containers) Of(sandboxID string) []record.Container {
	c.mu.RLock()
	ids := make([]string, 0, len(c.bySbox[sandboxID]))
	for id := range c.bySbox[sandboxID] {
		ids = append(ids, id)
	}
	c.mu.RUnlock()
	out := make([]record.Container, 0, len(ids))
	for _, id := range ids {
		if ctr, err := c.t.get(id); err == nil {
			out = append(out, ctr)
		}
	}
	return out
}

func (c *Containers) link(ctr record.Container) {
	c.mu.Lock()
	defer c.mu.Unlock()
	of := c.bySbox[ctr.SandboxID]
	if of == nil {
		of = map[string]struct{}{}
		c.bySbox[ctr.SandboxID] = of
	}
	of[ctr.ID] = struct{}{}
}

func (c *Containers) unlink(ctr record.Container) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.bySbox[ctr.SandboxID], ctr.ID)
	if len(c.bySbox[ctr.SandboxID]) == 0 {
		delete(c.bySbox, ctr.SandboxID)
	}
}
