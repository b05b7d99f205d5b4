package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

const (
	dialTimeout   = 10 * time.Second
	forwardBuffer = 32 << 10
	// When a client has ended its side, the server may go on for as long as it
	// has something to say; after idleTime without a byte it is over. When the
	// server has ended, the client gets finishTime to do so too.
	idleTime   = time.Minute
	finishTime = 5 * time.Second
)

// Dialer connects to an address.
type Dialer func(ctx context.Context, network, address string) (net.Conn, error)

// Place is where a pod's ports may be served: an IP address, and from where to
// connect to it.
type Place struct {
	IP   string
	Dial Dialer
}

// Loopback are the places of a pod's loopback, IPv4 first.
func Loopback(dial Dialer) []Place { return []Place{{"127.0.0.1", dial}, {"::1", dial}} }

// Forward connects conn to a port at the first of the places that serves it, and
// copies both ways until the server has ended its side and all it said is
// written, or either is gone, or ctx ends. The end of the client's side is
// passed on. It returns nil for every end of a connection that was made, save
// one by ctx or a failure of the server.
func Forward(ctx context.Context, places []Place, port int32, conn io.ReadWriteCloser) error {
	server, err := connect(ctx, places, port)
	if err != nil {
		reset(conn)
		return fmt.Errorf("forward port %d: %w", port, err)
	}
	f := &forward{client: conn, server: server, idle: idleTime, grace: finishTime}
	if err := f.run(ctx); err != nil {
		return fmt.Errorf("forward port %d: %w", port, err)
	}
	return nil
}

func connect(ctx context.Context, places []Place, port int32) (net.Conn, error) {
	var errs []error
	for _, p := range places {
		dctx, cancel := context.WithTimeout(ctx, dialTimeout)
		c, err := p.Dial(dctx, "tcp", net.JoinHostPort(p.IP, fmt.Sprint(port)))
		cancel()
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return nil, fmt.Errorf("%w: %w", errors.Join(errs...), errdefs.ErrUnavailable)
}

// forward is one forwarded connection.
type forward struct {
	client io.ReadWriteCloser
	server net.Conn
	idle   time.Duration
	grace  time.Duration
	down   atomic.Uint64 // bytes that came from the server
}

// ended says how a direction came to its end; both nil is an end of file.
type ended struct{ read, write error }

func (f *forward) run(ctx context.Context) error {
	up, down := make(chan ended, 1), make(chan ended, 1)
	go func() { up <- f.fromClient() }()
	go func() { down <- copyCount(f.client, f.server, &f.down) }()
	// Both goroutines end with these two: one reads what the other writes.
	defer reset(f.client)
	defer f.server.Close()

	idle := time.NewTicker(f.idle)
	defer idle.Stop()
	idle.Stop()
	seen := f.down.Load()
	for {
		select {
		case e := <-up:
			if e.read != nil {
				return nil // the client is gone
			}
			up = nil
			idle.Reset(f.idle)
		case <-idle.C:
			if now := f.down.Load(); now != seen {
				seen = now
				continue
			}
			return nil
		case e := <-down:
			if e.read != nil {
				return fmt.Errorf("read from the pod: %w", e.read)
			}
			if e.write == nil && up != nil {
				f.finish(ctx, up)
			}
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// finish tells the client that the server has ended and lets it end as well,
// so that nothing of the response is cut off by a reset.
func (f *forward) finish(ctx context.Context, up <-chan ended) {
	_ = f.client.Close() // it may have gone
	bound := time.NewTimer(f.grace)
	defer bound.Stop()
	select {
	case <-up:
	case <-bound.C:
	case <-ctx.Done():
	}
}

// fromClient copies to the server and passes the end on. When the server takes
// no more, the rest is read all the same: streams share a connection, and one
// that is not read holds up the others.
func (f *forward) fromClient() ended {
	var n atomic.Uint64
	e := copyCount(f.server, f.client, &n)
	if e.write != nil {
		_, err := io.Copy(io.Discard, f.client)
		return ended{read: err}
	}
	if e.read != nil {
		return e
	}
	if half, ok := f.server.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite() // the server may have gone, which its reader sees
	}
	return e
}

// copyCount copies until the end and tells which side failed.
func copyCount(dst io.Writer, src io.Reader, count *atomic.Uint64) ended {
	b := make([]byte, forwardBuffer)
	for {
		n, err := src.Read(b)
		count.Add(uint64(n))
		if n > 0 {
			if _, werr := dst.Write(b[:n]); werr != nil {
				return ended{write: werr}
			}
		}
		if errors.Is(err, io.EOF) {
			return ended{}
		}
		if err != nil {
			return ended{read: err}
		}
	}
}

// reset ends both directions of a stream, where it has two ends to end.
func reset(conn io.ReadWriteCloser) {
	_ = conn.Close()
	if r, ok := conn.(interface{ Reset() error }); ok {
		_ = r.Reset()
	}
}
