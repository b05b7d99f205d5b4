package stream

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var errClientGone = errors.New("client closed the connection")

// listener knows its connections, so that Close reaches those that a session
// took over.
type listener struct {
	net.Listener
	linger time.Duration // how long a client may fetch nothing of what is left for it

	mu     sync.Mutex
	conns  map[*conn]struct{}
	closed bool
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: raw, listener: l}
	c.gone, c.leave = context.WithCancelCause(context.Background())
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		c.leave(net.ErrClosed)
		raw.Close()
		return nil, net.ErrClosed
	}
	l.conns[c] = struct{}{}
	return c, nil
}

func (l *listener) closeAll() {
	l.mu.Lock()
	l.closed = true
	var conns []*conn
	for c := range l.conns {
		conns = append(conns, c)
	}
	l.mu.Unlock()
	for _, c := range conns {
		_ = c.abort() // it may be closed already
	}
}

// conn is a connection with a context that ends with it. A session's protocol
// reads all the time, so the end of the client comes up in a Read.
type conn struct {
	net.Conn
	listener *listener
	gone     context.Context
	leave    context.CancelCauseFunc
	closing  atomic.Bool
}

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	// A deadline is net/http taking back a Read, or a protocol's idle timeout,
	// which closes the connection.
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.leave(fmt.Errorf("%w: %w", errClientGone, err))
	}
	return n, err
}

// Close implements net.Conn. It lets the client fetch what was written, so that
// a slow one gets the end of the output and the status too.
func (c *conn) Close() error {
	c.leave(net.ErrClosed)
	if c.closing.Swap(true) {
		return nil
	}
	if t, ok := c.Conn.(*net.TCPConn); ok {
		c.drain(t)
	}
	return c.abort()
}

// abort closes the connection at once.
func (c *conn) abort() error {
	c.leave(net.ErrClosed)
	c.listener.mu.Lock()
	delete(c.listener.conns, c)
	c.listener.mu.Unlock()
	return c.Conn.Close()
}

// drainStep is how often drain looks.
const drainStep = 50 * time.Millisecond

// drain waits until the client has what is on the way, as long as it fetches
// something. The kernel resets a closed connection, and drops what is on the way,
// as soon as the client sends anything or has sent what nobody read, and the
// clients send pings: so what comes is read, and thrown away.
func (c *conn) drain(t *net.TCPConn) {
	left, err := unacknowledged(t)
	if err != nil || left == 0 || t.CloseWrite() != nil {
		return
	}
	tick := time.NewTicker(drainStep)
	defer tick.Stop()
	var b [512]byte
	for fetched := time.Now(); left > 0 && time.Since(fetched) < c.listener.linger; {
		if t.SetReadDeadline(time.Now().Add(drainStep)) != nil {
			return
		}
		switch _, err := t.Read(b[:]); {
		case err == nil || errors.Is(err, os.ErrDeadlineExceeded):
		case errors.Is(err, io.EOF):
			<-tick.C // it sends no more, and may still read
		default:
			return
		}
		now, err := unacknowledged(t)
		if err != nil {
			return
		}
		if now < left {
			fetched = time.Now()
		}
		left = now
	}
}

// unacknowledged is how many bytes the client's kernel does not have yet.
func unacknowledged(t *net.TCPConn) (n int, err error) {
	raw, err := t.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return n, errors.Join(cerr, err)
}

type connKey struct{}

// bind makes the context of each request on a connection end with it.
func bind(ctx context.Context, nc net.Conn) context.Context {
	if t, ok := nc.(*tls.Conn); ok {
		nc = t.NetConn()
	}
	c := nc.(*conn)
	ctx, cancel := context.WithCancelCause(context.WithValue(ctx, connKey{}, c))
	context.AfterFunc(c.gone, func() { cancel(context.Cause(c.gone)) })
	return ctx
}

func connOf(ctx context.Context) *conn { return ctx.Value(connKey{}).(*conn) }

// watch notices that the client is gone while its protocol reads nothing: it
// does not when the session takes no input and the buffers are full.
func (c *conn) watch(ctx context.Context, every time.Duration, cancel context.CancelCauseFunc) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if c.hungUp() {
				cancel(errClientGone)
				return
			}
		}
	}
}

func (c *conn) hungUp() bool {
	sc, ok := c.Conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	p := []unix.PollFd{{Events: unix.POLLRDHUP}}
	err = raw.Control(func(fd uintptr) {
		p[0].Fd = int32(fd)
		_, _ = unix.Poll(p, 0) // interrupted: the next time will do
	})
	return err != nil || p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
}

// takenOver notes whether a handler took over the connection.
type takenOver struct {
	http.ResponseWriter
	hijacked bool
}

// Hijack implements http.Hijacker.
func (t *takenOver) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, b, err := http.NewResponseController(t.ResponseWriter).Hijack()
	t.hijacked = t.hijacked || err == nil
	return c, b, err
}
