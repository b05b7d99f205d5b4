package pool

import (
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
)

// served accepts connections at a socket and hands them out.
func served(t *testing.T) (*bootapi.BootstrapResult, <-chan net.Conn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	conns := make(chan net.Conn, 10)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns <- c
		}
	}()
	return &bootapi.BootstrapResult{Version: 3, Protocol: "ttrpc", Address: "unix://" + path}, conns
}

type user struct {
	raw     any
	closed  <-chan struct{}
	release func()
}

func take(t *testing.T, l *links, params *bootapi.BootstrapResult) user {
	t.Helper()
	raw, closed, release, err := l.take(params)
	if err != nil {
		t.Fatal(err)
	}
	return user{raw, closed, release}
}

func (u user) ended(t *testing.T) {
	t.Helper()
	select {
	case <-u.closed:
	case <-time.After(20 * time.Second):
		t.Error("nobody heard that the connection closed")
	}
}

func (u user) open(t *testing.T) {
	t.Helper()
	select {
	case <-u.closed:
		t.Error("the connection is closed")
	default:
	}
}

func TestLinksAreShared(t *testing.T) {
	params, conns := served(t)
	l := newLinks()
	a, b := take(t, l, params), take(t, l, params)
	server := <-conns
	if a.raw != b.raw {
		t.Error("there are two connections")
	}
	for range 2 { // the second does nothing
		a.release()
	}
	a.ended(t)
	b.open(t)
	b.release()
	b.ended(t)
	c := take(t, l, params)
	if c.raw != a.raw {
		t.Error("the connection was closed at once")
	}
	c.release()
	if _, err := server.Read(make([]byte, 1)); err == nil {
		t.Error("without users it is open")
	}
	if l.has(params.GetAddress()) {
		t.Error("it is still known")
	}
}

func TestLinksHearOfTheEnd(t *testing.T) {
	params, conns := served(t)
	l := newLinks()
	a, b := take(t, l, params), take(t, l, params)
	(<-conns).Close()
	a.ended(t)
	b.ended(t)
	next := take(t, l, params)
	if next.raw == a.raw {
		t.Error("the dead connection was given out again")
	}
	next.open(t)
	a.release()
	b.release()
	next.open(t)
	next.release()
	if _, _, _, err := l.take(&bootapi.BootstrapResult{Version: 3, Protocol: "ttrpc", Address: params.GetAddress() + "-not"}); !errors.Is(err, errNobodyListens) {
		t.Errorf("nobody is there: %v", err)
	}
}
