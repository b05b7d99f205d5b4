package container

import (
	"context"
	"io"
	"time"

	"github.com/gantry-cri/gantry/plugin/record"
)

// CloseStdin makes the runtime close its end of a process's standard input,
// after which the process reads its end.
type CloseStdin func(context.Context) error

// Streams carries the standard streams of containers and execs.
type Streams interface {
	// Open makes the streams of a container that is about to start and begins
	// to log.
	Open(context.Context, record.Container, CloseStdin) (Stream, error)
	// Reattach goes on with the streams of a container that an earlier daemon
	// opened; nothing is logged twice and nothing is left out. NotFound means
	// that there are none.
	Reattach(context.Context, record.Container, CloseStdin) (Stream, error)
	// NoteStart keeps with the streams that the container's process is about to
	// run, until Remove or until the machine starts anew.
	NoteStart(ctx context.Context, id string) error
	// NotedStart is when that was noted, zero if it was not.
	NotedStart(id string) (time.Time, error)
	// Remove takes away what there is of a container's streams; none is fine.
	Remove(ctx context.Context, id string) error
	// Capture makes the streams of an exec whose output is kept, up to a bound.
	Capture(ctx context.Context, containerID, execID string) (Capture, error)
	// Session makes the streams of an exec that a client is connected to, and
	// begins to copy.
	Session(ctx context.Context, containerID, execID string, c Connection, closeStdin CloseStdin) (Session, error)
	// Execs are the IDs of the execs of a container that have streams.
	Execs(containerID string) ([]string, error)
	// Left takes up the streams of an exec that an earlier daemon ran, to be
	// closed after its end. NotFound means that there are none.
	Left(ctx context.Context, containerID, execID string) (Session, error)
}

// Connection is a client's side of streams; nil is not connected. With TTY
// there is no Stderr.
type Connection struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	TTY            bool
}

// Stream is the running end of a container's streams.
type Stream interface {
	Endpoints() Endpoints
	// Reopen goes on in a new file at the log path.
	Reopen(ctx context.Context, path string) error
	// Attach connects a client until the output ends or ctx does.
	Attach(ctx context.Context, c Connection) error
	// Drain returns when all output of the ended container is logged, or
	// after a bound if something else keeps the streams open.
	Drain(context.Context) error
	// Close ends the copying and takes the streams away; the log stays.
	Close(context.Context) error
}

// Session is the running end of an exec's streams.
type Session interface {
	Endpoints() Endpoints
	// Finish returns after the process ended, when the client has all of its
	// output. It does not wait beyond a bound for others that hold the
	// streams open.
	Finish(context.Context) error
	// Close releases all, finished or not.
	Close() error
}

// Capture is a Session that keeps the output.
type Capture interface {
	Session
	// Output is what was written so far, as much as an answer holds, and how many
	// bytes were dropped.
	Output() (stdout, stderr []byte, dropped uint64)
}
