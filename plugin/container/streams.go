package container

import (
	"context"
	"io"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Streams carries the standard streams of containers and execs.
type Streams interface {
	// Open makes the streams of a container that is about to start and begins
	// to log.
	Open(context.Context, record.Container) (Stream, error)
	// Reattach goes on with the streams of a container that an earlier daemon
	// opened; nothing is logged twice and nothing is left out.
	Reattach(context.Context, record.Container) (Stream, error)
	// Remove takes away what there is of a container's streams; none is fine.
	Remove(ctx context.Context, id string) error
	// Capture makes the streams of an exec whose output is kept, up to a bound.
	Capture(ctx context.Context, containerID, execID string) (Capture, error)
	// Session makes the streams of an exec that a client is connected to.
	Session(ctx context.Context, containerID, execID string, c Connection) (Session, error)
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
	Reopen(context.Context) error
	// Attach connects a client until the output ends or ctx does. closeStdin
	// closes the container's standard input.
	Attach(ctx context.Context, c Connection, closeStdin func(context.Context) error) error
	// Drain returns when all output of the ended container is logged, or
	// after a bound if something else keeps the streams open.
	Drain(context.Context)
	// Close ends the copying. The files stay for Remove.
	Close() error
}

// Capture keeps the output of an exec.
type Capture interface {
	Endpoints() Endpoints
	// Finish returns the output after the process ended. It does not wait
	// beyond a bound for others that hold the streams open.
	Finish(context.Context) (stdout, stderr []byte, err error)
	// Close releases all, finished or not.
	Close() error
}

// Session connects a client with an exec.
type Session interface {
	Endpoints() Endpoints
	// Run copies until the streams end. exited is closed when the process
	// has; closeStdin closes its standard input.
	Run(ctx context.Context, exited <-chan struct{}, closeStdin func(context.Context) error) error
	// Close releases all, finished or not.
	Close() error
}
