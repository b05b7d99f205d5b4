package store

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
)

// table is the index of one kind of record, and the only place it is changed.
// Readers share mu for the time of a map access; no lock that they need is held
// while the disk works.
type table[V any, K comparable] struct {
	kind  string
	id    func(V) string
	key   func(V) K
	write func(ctx context.Context, v V, create bool) error
	soon  func(ctx context.Context, v V)
	erase func(ctx context.Context, v V) error
	// changed is told of each change of the index, before the writer goes on and
	// in the order of the changes of one record; nil is no record.
	changed func(before, after *V)

	mu     sync.RWMutex
	rows   map[string]*row[V]
	byKey  map[K]string
	sorted []string // IDs in order, for prefixes

	// listed is what list returned, until the next change. A kubelet lists every
	// second what rarely changes, and a copy of it all is work for the collector.
	listed atomic.Pointer[[]V]
}

// row is one record and the turn of its writers.
type row[V any] struct {
	turnMu  sync.Mutex // held by the one that writes this record
	v       V          // guarded by table.mu
	present bool       // guarded by table.mu; false until first written and after the delete
}

func newTable[V any, K comparable](kind string, id func(V) string, key func(V) K) *table[V, K] {
	return &table[V, K]{kind: kind, id: id, key: key, rows: map[string]*row[V]{}, byKey: map[K]string{}, changed: func(_, _ *V) {}}
}

// adopt puts a record that is on disk already into the index. When its key is
// taken it is indexed by ID alone: two records of one pod are for the caller to
// judge, and none of them may be lost.
func (t *table[V, K]) adopt(v V) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, taken := t.byKey[t.key(v)]; !taken {
		t.byKey[t.key(v)] = t.id(v)
	}
	t.rows[t.id(v)] = &row[V]{v: v, present: true}
	t.addSorted(t.id(v))
	t.listed.Store(nil)
}

func (t *table[V, K]) create(ctx context.Context, v V) error {
	id, key := t.id(v), t.key(v)
	r := &row[V]{}
	r.turnMu.Lock()
	defer r.turnMu.Unlock()
	if err := t.reserve(id, key, r); err != nil {
		return err
	}
	err := t.write(ctx, v, true)
	if err != nil {
		// A write that failed late may have happened. If it cannot be taken
		// back either, the next start finds a record without effects.
		if undo := t.erase(context.WithoutCancel(ctx), v); undo != nil {
			err = errors.Join(err, undo)
		}
	}
	if err != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.rows, id)
		delete(t.byKey, key)
		return fmt.Errorf("record %s: %w", t.kind, err)
	}
	t.mu.Lock()
	r.v, r.present = v, true
	t.addSorted(id)
	t.listed.Store(nil)
	t.mu.Unlock()
	t.changed(nil, &v)
	return nil
}

func (t *table[V, K]) reserve(id string, key K, r *row[V]) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if other, taken := t.byKey[key]; taken {
		return &ExistsError{Kind: t.kind, ID: other, Key: fmt.Sprintf("%+v", key)}
	}
	if _, taken := t.rows[id]; taken {
		return fmt.Errorf("%s %s: %w", t.kind, id, errdefs.ErrAlreadyExists)
	}
	t.rows[id], t.byKey[key] = r, id
	return nil
}

func (t *table[V, K]) get(id string) (V, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if r, ok := t.rows[id]; ok && r.present {
		return r.v, nil
	}
	var zero V
	return zero, t.notFound(id)
}

func (t *table[V, K]) lookup(key K) (V, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if r, ok := t.rows[t.byKey[key]]; ok && r.present {
		return r.v, true
	}
	var zero V
	return zero, false
}

// list returns the records in the order of their IDs, in a slice that is shared:
// nobody may change it.
func (t *table[V, K]) list() []V {
	if all := t.listed.Load(); all != nil {
		return *all
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	all := make([]V, 0, len(t.sorted))
	for _, id := range t.sorted {
		all = append(all, t.rows[id].v)
	}
	t.listed.Store(&all)
	return all
}

// resolve turns a unique prefix of an ID into the ID.
func (t *table[V, K]) resolve(prefix string) (string, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if r, ok := t.rows[prefix]; ok && r.present {
		return prefix, nil
	}
	i := sort.SearchStrings(t.sorted, prefix)
	if prefix == "" || i == len(t.sorted) || !strings.HasPrefix(t.sorted[i], prefix) {
		return "", t.notFound(prefix)
	}
	if i+1 < len(t.sorted) && strings.HasPrefix(t.sorted[i+1], prefix) {
		return "", fmt.Errorf("%s ID prefix %q is ambiguous: %w", t.kind, prefix, errdefs.ErrInvalidArgument)
	}
	return t.sorted[i], nil
}

// update replaces the record by what change makes of it: disk first, then the
// index. An error of change leaves both as they were.
func (t *table[V, K]) update(ctx context.Context, id string, change func(V) (V, error)) (V, error) {
	return t.replace(ctx, id, change, func(v V) error { return t.write(ctx, v, false) })
}

// updateSoon is update for what a crash may undo: the index first, and disk
// with the next write.
func (t *table[V, K]) updateSoon(ctx context.Context, id string, change func(V) (V, error)) (V, error) {
	return t.replace(ctx, id, change, func(v V) error {
		t.soon(ctx, v)
		return nil
	})
}

func (t *table[V, K]) replace(ctx context.Context, id string, change func(V) (V, error), write func(V) error) (V, error) {
	var zero V
	r, old, err := t.take(id)
	if err != nil {
		return zero, err
	}
	defer r.turnMu.Unlock()
	v, err := change(old)
	if err != nil {
		return zero, err
	}
	if t.id(v) != id || t.key(v) != t.key(old) {
		return zero, fmt.Errorf("%s %s: an update may not change what identifies it: %w", t.kind, id, errdefs.ErrInvalidArgument)
	}
	if err := write(v); err != nil {
		return zero, fmt.Errorf("record %s: %w", t.kind, err)
	}
	t.mu.Lock()
	r.v = v
	t.listed.Store(nil)
	t.mu.Unlock()
	t.changed(&old, &v)
	return v, nil
}

// remove deletes the record, from disk first. An unknown ID is not an error.
func (t *table[V, K]) remove(ctx context.Context, id string) error {
	r, old, err := t.take(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	defer r.turnMu.Unlock()
	if err := t.erase(ctx, old); err != nil {
		return fmt.Errorf("forget %s: %w", t.kind, err)
	}
	t.forget(id, r, old)
	t.changed(&old, nil)
	return nil
}

func (t *table[V, K]) forget(id string, r *row[V], v V) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r.present = false
	delete(t.rows, id)
	if t.byKey[t.key(v)] == id {
		delete(t.byKey, t.key(v))
	}
	i := sort.SearchStrings(t.sorted, id)
	t.sorted = append(t.sorted[:i], t.sorted[i+1:]...)
	t.listed.Store(nil)
}

// take waits for the turn to write the record; the caller releases it.
func (t *table[V, K]) take(id string) (*row[V], V, error) {
	var zero V
	t.mu.RLock()
	r, ok := t.rows[id]
	t.mu.RUnlock()
	if !ok {
		return nil, zero, t.notFound(id)
	}
	r.turnMu.Lock()
	t.mu.RLock()
	defer t.mu.RUnlock()
	if !r.present {
		r.turnMu.Unlock()
		return nil, zero, t.notFound(id)
	}
	return r, r.v, nil
}

func (t *table[V, K]) addSorted(id string) {
	i := sort.SearchStrings(t.sorted, id)
	t.sorted = append(t.sorted, "")
	copy(t.sorted[i+1:], t.sorted[i:])
	t.sorted[i] = id
}

func (t *table[V, K]) notFound(id string) error {
	return fmt.Errorf("%s %q: %w", t.kind, id, errdefs.ErrNotFound)
}
