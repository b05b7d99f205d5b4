package stream

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd/errdefs"
)

func certPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func writePair(t *testing.T, cert, key string) {
	t.Helper()
	pair, err := selfSigned("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(pair.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*pem.Block{
		cert: {Type: "CERTIFICATE", Bytes: pair.Certificate[0]},
		key:  {Type: "EC PRIVATE KEY", Bytes: der},
	} {
		if err := os.WriteFile(name, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// podServer listens where a pod would and runs handle for each connection.
func podServer(t *testing.T, addr string, handle func(c *net.TCPConn)) int32 {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				handle(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
	return int32(l.Addr().(*net.TCPAddr).Port)
}

// tcpPair returns both ends of a connection.
func tcpPair(t *testing.T) (near, far *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn), a.(*net.TCPConn)
}

// forwardTo returns the client of a connection that Forward serves.
func forwardTo(t *testing.T, ctx context.Context, port int32) (*net.TCPConn, <-chan error) {
	t.Helper()
	near, far := tcpPair(t)
	done := make(chan error, 1)
	var d net.Dialer
	go func() { done <- Forward(ctx, Loopback(d.DialContext), port, half{far}) }()
	return near, done
}

// A place that nobody serves is passed over; the next is asked its own way.
func TestForwardPlaces(t *testing.T) {
	baseline(t)
	port := podServer(t, "127.0.0.1:0", func(c *net.TCPConn) { io.WriteString(c, "hello") })
	var d net.Dialer
	var asked []string
	refuse := func(_ context.Context, _, address string) (net.Conn, error) {
		asked = append(asked, address)
		return nil, syscall.ECONNREFUSED
	}
	serve := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return d.DialContext(ctx, network, fmt.Sprint("127.0.0.1:", port))
	}
	near, far := tcpPair(t)
	done := make(chan error, 1)
	go func() {
		done <- Forward(t.Context(), append(Loopback(refuse), Place{"192.0.2.1", serve}), 80, half{far})
	}()
	got, err := io.ReadAll(near)
	near.Close()
	if err := errors.Join(err, <-done); err != nil || string(got) != "hello" || !slices.Equal(asked, []string{"127.0.0.1:80", "[::1]:80"}) {
		t.Errorf("got %q, %v, after asking %q", got, err, asked)
	}
}

// half closes as a SPDY stream does: Close ends one direction, Reset both.
type half struct{ *net.TCPConn }

func (h half) Close() error { return h.TCPConn.CloseWrite() }
func (h half) Reset() error { return h.TCPConn.Close() }

func TestForwardFamilies(t *testing.T) {
	baseline(t)
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(addr, func(t *testing.T) {
			port := podServer(t, addr, func(c *net.TCPConn) { io.WriteString(c, "hello") })
			c, done := forwardTo(t, context.Background(), port)
			if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
				t.Fatalf("got %q, %v", b, err)
			}
			c.Close()
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		})
	}
	t.Run("nobody listens", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		l.Close()
		_, done := forwardTo(t, context.Background(), int32(port))
		if err := <-done; !errdefs.IsUnavailable(err) {
			t.Fatalf("got %v", err)
		}
	})
}

func TestForwardHalfClose(t *testing.T) {
	baseline(t)
	// A server that answers only when the request has ended.
	port := podServer(t, "127.0.0.1:0", func(c *net.TCPConn) {
		h := sha256.New()
		if _, err := io.Copy(h, c); err != nil {
			t.Error(err)
		}
		c.Write(h.Sum(nil))
	})
	body := make([]byte, 8<<20)
	rand.Read(body)
	c, done := forwardTo(t, context.Background(), port)
	if _, err := c.Write(body); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	got, err := io.ReadAll(c)
	if want := sha256.Sum256(body); err != nil || !bytes.Equal(got, want[:]) {
		t.Fatalf("got %x, %v", got, err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestForwardLargeResponse(t *testing.T) {
	baseline(t)
	body := make([]byte, 32<<20)
	rand.Read(body)
	port := podServer(t, "127.0.0.1:0", func(c *net.TCPConn) { c.Write(body) })
	c, done := forwardTo(t, context.Background(), port)
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, body) {
		t.Fatalf("got %d bytes, %v", len(got), err)
	}
	c.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestForwardEnds(t *testing.T) {
	run := func(t *testing.T, ctx context.Context, port int32) (*net.TCPConn, <-chan error) {
		t.Helper()
		server, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		near, far := tcpPair(t)
		f := &forward{client: half{far}, server: server, idle: 50 * time.Millisecond, grace: 50 * time.Millisecond}
		done := make(chan error, 1)
		go func() { done <- f.run(ctx) }()
		return near, done
	}
	baseline(t)
	release := make(chan struct{})
	defer close(release)
	silent := podServer(t, "127.0.0.1:0", func(c *net.TCPConn) { <-release })
	closing := podServer(t, "127.0.0.1:0", func(c *net.TCPConn) { c.CloseWrite(); <-release })
	t.Run("client reset", func(t *testing.T) {
		c, done := run(t, context.Background(), silent)
		c.SetLinger(0)
		c.Close()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
	t.Run("client done, server silent", func(t *testing.T) {
		c, done := run(t, context.Background(), silent)
		c.CloseWrite()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
	t.Run("server done, client silent", func(t *testing.T) {
		_, done := run(t, context.Background(), closing)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
	t.Run("context", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(context.Background())
		_, done := run(t, ctx, silent)
		cause := errors.New("session over")
		cancel(cause)
		if err := <-done; !errors.Is(err, cause) {
			t.Fatalf("got %v", err)
		}
	})
}

// spdyForward starts kubectl's side of a port-forward and returns its local
// addresses.
func spdyForward(t *testing.T, s *Server, ports ...int32) []string {
	t.Helper()
	resp, err := s.GetPortForward(&cri.PortForwardRequest{PodSandboxId: "p1", Port: ports})
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(resp.Url)
	if err != nil {
		t.Fatal(err)
	}
	rt, up, err := spdy.RoundTripperFor(&rest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	var specs []string
	for _, p := range ports {
		specs = append(specs, fmt.Sprintf(":%d", p))
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	pf, err := portforward.NewOnAddresses(spdy.NewDialer(up, &http.Client{Transport: rt}, http.MethodPost, u), []string{"127.0.0.1"}, specs, stop, ready, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- pf.ForwardPorts() }()
	t.Cleanup(func() {
		close(stop)
		<-done
	})
	select {
	case <-ready:
	case err := <-done:
		done <- err
		t.Fatal(err)
	case <-time.After(20 * time.Second):
		t.Fatal("port-forward is not ready")
	}
	locals, err := pf.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	var addrs []string
	for _, l := range locals {
		addrs = append(addrs, fmt.Sprintf("127.0.0.1:%d", l.Local))
	}
	return addrs
}

func TestPortForwardSPDY(t *testing.T) {
	baseline(t)
	s := serve(t, Config{}, newFake())
	body := make([]byte, 4<<20)
	rand.Read(body)
	large := podServer(t, "127.0.0.1:0", func(c *net.TCPConn) {
		// An answer to a request that is over before it is read.
		b := make([]byte, 4)
		if _, err := io.ReadFull(c, b); err == nil {
			c.Write(body)
		}
	})
	six := podServer(t, "[::1]:0", func(c *net.TCPConn) { io.WriteString(c, "six") })
	addrs := spdyForward(t, s, large, six)
	for i := range 30 {
		c, err := net.Dial("tcp", addrs[0])
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, "get!")
		got, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(got, body) {
			t.Fatalf("transfer %d: got %d bytes, %v", i, len(got), err)
		}
		c.Close()
	}
	c, err := net.Dial("tcp", addrs[1])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := io.ReadAll(c); err != nil || string(got) != "six" {
		t.Fatalf("got %q, %v", got, err)
	}
}

func TestPortForwardAborted(t *testing.T) {
	count := 300
	if testing.Short() {
		count = 50
	}
	baseline(t)
	f := newFake()
	s := serve(t, Config{}, f)
	port := podServer(t, "127.0.0.1:0", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	t.Run("sessions", func(t *testing.T) {
		addrs := spdyForward(t, s, port)
		for range count {
			c, err := net.Dial("tcp", addrs[0])
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(c, "x")
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
		// The client library leaves goroutines behind when it is stopped amid
		// connections; this is about the server's.
		waitFor(t, "the connections", func() bool { return int(f.conns.Load()) == count })
	})
	waitFor(t, "the end of the connections", func() bool { return f.active.Load() == 0 })
}

func TestPortForwardWebSocket(t *testing.T) {
	baseline(t)
	f := newFake()
	s := serve(t, Config{}, f)
	port := podServer(t, "127.0.0.1:0", func(c *net.TCPConn) { io.Copy(c, c) })
	resp, err := s.GetPortForward(&cri.PortForwardRequest{PodSandboxId: "p1", Port: []int32{port}})
	if err != nil {
		t.Fatal(err)
	}
	d := websocket.Dialer{Subprotocols: []string{"v4.channel.k8s.io"}}
	c, hr, err := d.DialContext(within(t), strings.Replace(resp.Url, "http", "ws", 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	hr.Body.Close()
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteMessage(websocket.BinaryMessage, []byte("\x00ping")); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for len(got) < 2+len("ping") {
		_, m, err := c.ReadMessage()
		if err != nil {
			t.Fatal(err)
		}
		if m[0] == 0 {
			got = append(got, m[1:]...)
		}
	}
	if p := binary.LittleEndian.Uint16(got); int32(p) != port || string(got[2:]) != "ping" {
		t.Fatalf("got %q", got)
	}
	c.Close()
	waitFor(t, "the end of the session", func() bool { return f.active.Load() == 0 })
}
