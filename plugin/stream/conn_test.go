package stream

import (
	"io"
	"net"
	"testing"
	"time"
)

// pair returns both ends of a connection.
func pair(t *testing.T, linger time.Duration) (*conn, net.Conn) {
	t.Helper()
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &listener{Listener: raw, linger: linger, conns: map[*conn]struct{}{}}
	t.Cleanup(func() { l.closeAll(); l.Close() })
	c, err := net.Dial("tcp", raw.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return server.(*conn), c
}

// fill writes until the kernel takes no more, and returns how much.
func fill(t *testing.T, c *conn) int {
	t.Helper()
	total := 0
	for {
		if err := c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		n, err := c.Write(make([]byte, 64<<10))
		if total += n; err != nil {
			return total
		}
	}
}

// TestCloseLosesNothing: a client that is behind, and that has sent what nobody
// reads, gets all that was written before the connection was closed.
func TestCloseLosesNothing(t *testing.T) {
	baseline(t)
	c, client := pair(t, time.Minute)
	written := fill(t, c)
	closed := make(chan error, 1)
	go func() { closed <- c.Close() }()
	got := 0
	for b := make([]byte, 32<<10); ; {
		_, _ = client.Write([]byte("ping")) // it fails when the connection is closed
		n, err := client.Read(b)
		if got += n; err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("after %d of %d bytes: %v", got, written, err)
		}
	}
	if got != written {
		t.Errorf("the client got %d of %d bytes", got, written)
	}
	client.Close()
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

// TestCloseGivesUp: a client that fetches nothing does not keep its connection.
func TestCloseGivesUp(t *testing.T) {
	baseline(t)
	c, client := pair(t, 100*time.Millisecond)
	fill(t, c)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("a second time: %v", err)
	}
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	if n := len(c.listener.conns); n != 0 {
		t.Errorf("%d connections are left", n)
	}
	client.Close()
}
