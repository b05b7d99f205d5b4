// Package operation is the table of what is going on: every request and every
// operation that outlives its requests, with the stage it is in and since when.
// It answers "what is stuck, and on what" when nothing else answers; reading it
// waits for nothing.
package operation

import (
	"context"
	"fmt"
	"sort"
	"sync"
	"time"
)

// Table lists the operations under way. The zero value is ready to use.
type Table struct {
	mu   sync.Mutex
	next uint64
	ops  map[uint64]*Op
}

// Info says what an operation is about.
type Info struct {
	// Name is the RPC or the kind of work: "RunPodSandbox", "recover".
	Name string `json:"name"`
	// Object is what it works on, readable by people: "pod default/web".
	Object string `json:"object,omitempty"`
	// ID is the object's ID, "" while it has none.
	ID string `json:"id,omitempty"`
}

// Entry is an operation as a reader sees it.
type Entry struct {
	Number uint64 `json:"number"`
	Info
	Since time.Time `json:"since"`
	// Stage is what it does now and StageSince since when.
	Stage      string    `json:"stage,omitempty"`
	StageSince time.Time `json:"stageSince,omitzero"`
}

// Op is one operation under way. A nil Op takes every call and does nothing.
type Op struct {
	table *Table
	entry Entry // guarded by table.mu
}

type opKey struct{}

// Begin enters an operation into the table until End, and into the context, so
// that Stage finds it.
func (t *Table) Begin(ctx context.Context, i Info) (context.Context, *Op) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ops == nil {
		t.ops = map[uint64]*Op{}
	}
	t.next++
	op := &Op{table: t, entry: Entry{Number: t.next, Info: i, Since: time.Now()}}
	t.ops[t.next] = op
	return context.WithValue(ctx, opKey{}, op), op
}

// End takes the operation off the table.
func (o *Op) End() {
	if o == nil {
		return
	}
	o.table.mu.Lock()
	defer o.table.mu.Unlock()
	delete(o.table.ops, o.entry.Number)
}

// SetID fills in an ID that was not known at Begin.
func (o *Op) SetID(id string) {
	if o == nil {
		return
	}
	o.table.mu.Lock()
	defer o.table.mu.Unlock()
	o.entry.ID = id
}

// From returns the operation ctx belongs to, nil if none.
func From(ctx context.Context) *Op {
	op, _ := ctx.Value(opKey{}).(*Op)
	return op
}

// Stage notes what the operation of ctx does from now on, in the words its
// error would use: "attach network: plugin bridge".
func Stage(ctx context.Context, stage string) {
	op := From(ctx)
	if op == nil {
		return
	}
	op.table.mu.Lock()
	defer op.table.mu.Unlock()
	op.entry.Stage, op.entry.StageSince = stage, time.Now()
}

// Find returns the oldest operation of that name on that object.
func (t *Table) Find(name, object string) (Entry, bool) {
	for _, e := range t.List() {
		if e.Name == name && e.Object == object {
			return e, true
		}
	}
	return Entry{}, false
}

// List returns the operations under way, oldest first.
func (t *Table) List() []Entry {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]Entry, 0, len(t.ops))
	for _, op := range t.ops {
		out = append(out, op.entry)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Number < out[j].Number })
	return out
}

// String says what the operation does and for how long.
func (e Entry) String() string {
	if e.Stage == "" {
		return fmt.Sprintf("%s of %s, begun %s ago", e.Name, e.Object, time.Since(e.Since).Round(time.Millisecond))
	}
	return fmt.Sprintf("%s of %s is at %q for %s", e.Name, e.Object, e.Stage, time.Since(e.StageSince).Round(time.Millisecond))
}
