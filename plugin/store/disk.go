package store

import (
	"context"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Disk keeps records durably. Reads happen once, at Open.
type Disk interface {
	// Load returns every record there is. A record that cannot be read is
	// reported among the damaged ones and does not fail the load.
	Load(ctx context.Context) (Contents, error)
	// Write makes one change durable, all of it or nothing. Deleting what is
	// not there succeeds. With a container's record goes what kept its root
	// filesystem from garbage collection.
	Write(ctx context.Context, c Change) error
	// WriteSoon makes the change durable with the next one that is written, or
	// in some moments; changes keep their order. What goes wrong is logged.
	WriteSoon(ctx context.Context, c Change)
}

// Contents is everything on disk.
type Contents struct {
	Sandboxes  []record.Sandbox
	Containers []record.Container
	Damaged    []Damaged
}

// Damaged names a record that could not be read.
type Damaged struct {
	// Kind is "sandbox" or "container".
	Kind, ID string
	Err      error
}

// Change is one change of one record; exactly one of the four is set.
type Change struct {
	PutSandbox      *record.Sandbox
	PutContainer    *record.Container
	DeleteSandbox   string
	DeleteContainer string
	// Create says that a put must find nothing under its ID (AlreadyExists
	// otherwise); without it a put must find something (NotFound otherwise).
	Create bool
}
