package stream

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	utilexec "k8s.io/utils/exec"

	"github.com/containerd/errdefs"
)

// fake runs commands made up for the tests.
type fake struct {
	dial   Dialer
	active atomic.Int32
	ended  atomic.Int32 // sessions whose context ended
	conns  atomic.Int32 // forwarded connections that are over
	causes chan error   // of those, as far as there is room

	hanging sync.Map // container IDs of sessions that began to wait
}

func newFake() *fake {
	var d net.Dialer
	return &fake{dial: d.DialContext, causes: make(chan error, 1)}
}

func (f *fake) Exec(ctx context.Context, s Session) error {
	f.active.Add(1)
	defer f.active.Add(-1)
	switch s.Cmd[0] {
	case "cat":
		n, err := io.Copy(s.Stdout, s.Stdin)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(s.Stderr, "%d bytes", n)
		return err
	case "print":
		_, err := io.Copy(s.Stdout, strings.NewReader(strings.Repeat("0123456789", 500_000)))
		return err
	case "exit":
		return fmt.Errorf("run %s: %w", s.ContainerID, ExitStatus(42))
	case "fail":
		return errors.New("no such container")
	case "size":
		for range 2 {
			select {
			case size := <-s.Resize:
				fmt.Fprintf(s.Stdout, "%dx%d\n", size.Width, size.Height)
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	case "streams":
		fmt.Fprintf(s.Stdout, "%v %v %v %v", s.Stdin != nil, s.Stdout != nil, s.Stderr != nil, s.TTY)
		return nil
	}
	return f.hang(ctx, s)
}

func (f *fake) hang(ctx context.Context, s Session) error {
	f.hanging.Store(s.ContainerID, true)
	<-ctx.Done()
	f.ended.Add(1)
	select {
	case f.causes <- context.Cause(ctx):
	default:
	}
	return context.Cause(ctx)
}

func (f *fake) Attach(ctx context.Context, s Session) error {
	f.active.Add(1)
	defer f.active.Add(-1)
	if strings.HasPrefix(s.ContainerID, "quiet") {
		return f.hang(ctx, s)
	}
	_, err := io.Copy(s.Stdout, s.Stdin)
	return err
}

func (f *fake) PortForward(ctx context.Context, _ string, port int32, conn io.ReadWriteCloser) error {
	f.active.Add(1)
	defer f.active.Add(-1)
	defer f.conns.Add(1)
	return Forward(ctx, Loopback(f.dial), port, conn)
}

func serve(t *testing.T, cfg Config, rt Runtime, tune ...func(*Server)) *Server {
	t.Helper()
	if cfg.Address == "" {
		cfg.Address = "127.0.0.1"
	}
	s, err := New(cfg, rt)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range tune {
		f(s)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(context.Background()) }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s
}

// clients are the protocols that clients speak.
var clients = map[string]func(t *testing.T, cfg *rest.Config, u string) remotecommand.Executor{
	"SPDY": func(t *testing.T, cfg *rest.Config, raw string) remotecommand.Executor {
		u, err := url.Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		e, err := remotecommand.NewSPDYExecutor(cfg, http.MethodPost, u)
		if err != nil {
			t.Fatal(err)
		}
		return e
	},
	"WebSocket": func(t *testing.T, cfg *rest.Config, u string) remotecommand.Executor {
		e, err := remotecommand.NewWebSocketExecutorForProtocols(cfg, http.MethodGet, u, "v4.channel.k8s.io")
		if err != nil {
			t.Fatal(err)
		}
		return e
	},
}

func execURL(t *testing.T, s *Server, r *cri.ExecRequest) string {
	t.Helper()
	if r.ContainerId == "" {
		r.ContainerId = "c1"
	}
	resp, err := s.GetExec(r)
	if err != nil {
		t.Fatal(err)
	}
	return resp.Url
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// ours returns the stacks of all goroutines but those of client libraries,
// some of which never end.
func ours() []string {
	b := make([]byte, 8<<20)
	var stacks []string
	for stack := range strings.SplitSeq(string(b[:goruntime.Stack(b, true)]), "\n\n") {
		if !strings.Contains(stack, "k8s.io/client-go/") {
			stacks = append(stacks, stack)
		}
	}
	return stacks
}

// baseline fails the test when it ends with more goroutines or files than it
// began with.
func baseline(t *testing.T) {
	t.Helper()
	fds := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	g, f := len(ours()), fds()
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		deadline := time.Now().Add(20 * time.Second)
		for len(ours()) > g || fds() > f {
			if time.Now().After(deadline) {
				t.Fatalf("goroutines %d → %d, files %d → %d\n%s", g, len(ours()), f, fds(), strings.Join(ours(), "\n\n"))
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestExec(t *testing.T) {
	baseline(t)
	s := serve(t, Config{}, newFake())
	for name, client := range clients {
		t.Run(name, func(t *testing.T) {
			t.Run("output", func(t *testing.T) {
				var out bytes.Buffer
				u := execURL(t, s, &cri.ExecRequest{Cmd: []string{"print"}, Stdout: true})
				if err := client(t, &rest.Config{}, u).StreamWithContext(within(t), remotecommand.StreamOptions{Stdout: &out}); err != nil {
					t.Fatal(err)
				}
				if out.Len() != 5_000_000 {
					t.Errorf("got %d bytes", out.Len())
				}
			})
			t.Run("exit code", func(t *testing.T) {
				u := execURL(t, s, &cri.ExecRequest{Cmd: []string{"exit"}, Stdout: true})
				err := client(t, &rest.Config{}, u).StreamWithContext(within(t), remotecommand.StreamOptions{Stdout: io.Discard})
				var exit utilexec.ExitError
				if !errors.As(err, &exit) || exit.ExitStatus() != 42 {
					t.Errorf("got %v", err)
				}
			})
			t.Run("failure", func(t *testing.T) {
				u := execURL(t, s, &cri.ExecRequest{Cmd: []string{"fail"}, Stdout: true})
				err := client(t, &rest.Config{}, u).StreamWithContext(within(t), remotecommand.StreamOptions{Stdout: io.Discard})
				if err == nil || !strings.Contains(err.Error(), "no such container") {
					t.Errorf("got %v", err)
				}
			})
			t.Run("resize", func(t *testing.T) {
				var out bytes.Buffer
				u := execURL(t, s, &cri.ExecRequest{Cmd: []string{"size"}, Stdout: true, Stdin: true, Tty: true})
				sizes := &sizeQueue{{Width: 80, Height: 24}, {Width: 132, Height: 50}}
				in, inEnd := io.Pipe()
				defer inEnd.Close()
				err := client(t, &rest.Config{}, u).StreamWithContext(within(t), remotecommand.StreamOptions{Stdin: in, Stdout: &out, Tty: true, TerminalSizeQueue: sizes})
				if err != nil || out.String() != "80x24\n132x50\n" {
					t.Errorf("got %q, %v", out.String(), err)
				}
			})
			t.Run("only what was asked for", func(t *testing.T) {
				var out bytes.Buffer
				u := execURL(t, s, &cri.ExecRequest{Cmd: []string{"streams"}, Stdout: true})
				err := client(t, &rest.Config{}, u).StreamWithContext(within(t), remotecommand.StreamOptions{Stdout: &out})
				if err != nil || out.String() != "false true false false" {
					t.Errorf("got %q, %v", out.String(), err)
				}
			})
		})
	}
}

type sizeQueue []remotecommand.TerminalSize

func (q *sizeQueue) Next() *remotecommand.TerminalSize {
	if len(*q) == 0 {
		return nil
	}
	s := (*q)[0]
	*q = (*q)[1:]
	return &s
}

// TestStdinHalfClose needs SPDY: this WebSocket protocol cannot say that input
// has ended.
func TestStdinHalfClose(t *testing.T) {
	baseline(t)
	s := serve(t, Config{}, newFake())
	in := bytes.Repeat([]byte("archive!"), 1<<18)
	var out, errs bytes.Buffer
	u := execURL(t, s, &cri.ExecRequest{Cmd: []string{"cat"}, Stdin: true, Stdout: true, Stderr: true})
	err := clients["SPDY"](t, &rest.Config{}, u).StreamWithContext(within(t), remotecommand.StreamOptions{Stdin: bytes.NewReader(in), Stdout: &out, Stderr: &errs})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), in) || errs.String() != fmt.Sprintf("%d bytes", len(in)) {
		t.Errorf("got %d bytes and %q", out.Len(), errs.String())
	}
}

func TestAttach(t *testing.T) {
	baseline(t)
	s := serve(t, Config{}, newFake())
	resp, err := s.GetAttach(&cri.AttachRequest{ContainerId: "c1", Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	err = clients["SPDY"](t, &rest.Config{}, resp.Url).StreamWithContext(within(t), remotecommand.StreamOptions{Stdin: strings.NewReader("hello"), Stdout: &out})
	if err != nil || out.String() != "hello" {
		t.Fatalf("got %q, %v", out.String(), err)
	}
}

// TestAbortedSessions is about clients that go away without a word: nothing of
// their sessions may stay.
func TestAbortedSessions(t *testing.T) {
	count := 300
	if testing.Short() {
		count = 50
	}
	for name, client := range clients {
		t.Run(name, func(t *testing.T) {
			baseline(t)
			f := newFake()
			s := serve(t, Config{}, f)
			var all sync.WaitGroup
			limit := make(chan struct{}, 20)
			for i := range count {
				limit <- struct{}{}
				all.Go(func() {
					defer func() { <-limit }()
					ctx, cancel := context.WithCancel(within(t))
					defer cancel()
					id := fmt.Sprintf("quiet-%d", i)
					var u string
					if i%2 == 0 {
						u = execURL(t, s, &cri.ExecRequest{ContainerId: id, Cmd: []string{"hang"}, Stdin: true, Stdout: true, Tty: true})
					} else {
						resp, err := s.GetAttach(&cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Tty: true})
						if err != nil {
							t.Error(err)
							return
						}
						u = resp.Url
					}
					done := make(chan struct{})
					in, inEnd := io.Pipe()
					go func() {
						defer close(done)
						_ = client(t, &rest.Config{}, u).StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: in, Stdout: io.Discard, Tty: true, TerminalSizeQueue: &sizeQueue{{Width: 1, Height: 1}}})
					}()
					waitFor(t, "the session", func() bool { _, ok := f.hanging.Load(id); return ok })
					cancel()
					<-done
					inEnd.Close()
				})
			}
			all.Wait()
			waitFor(t, "the end of the sessions", func() bool { return f.active.Load() == 0 })
			if n := int(f.ended.Load()); n != count {
				t.Fatalf("%d of %d sessions saw the end of their client", n, count)
			}
		})
	}
}

// TestClientGoneBehindFullBuffers has a session that takes no input, so that
// its protocol stops reading before the client goes.
func TestClientGoneBehindFullBuffers(t *testing.T) {
	for name, client := range clients {
		t.Run(name, func(t *testing.T) {
			f := newFake()
			s := serve(t, Config{}, f, func(s *Server) { s.watch = 20 * time.Millisecond })
			u, err := url.Parse(execURL(t, s, &cri.ExecRequest{Cmd: []string{"hang"}, Stdin: true, Stdout: true}))
			if err != nil {
				t.Fatal(err)
			}
			var cut func()
			u.Host, cut = cable(t, u.Host)
			var sent atomic.Int64
			done := make(chan struct{})
			go func() {
				defer close(done)
				_ = client(t, &rest.Config{}, u.String()).StreamWithContext(within(t), remotecommand.StreamOptions{Stdin: &endless{&sent}, Stdout: io.Discard})
			}()
			last := int64(-1)
			waitFor(t, "full buffers", func() bool {
				now := sent.Load()
				full := now == last && now > 0
				last = now
				time.Sleep(100 * time.Millisecond)
				return full
			})
			cut()
			waitFor(t, "the end of the session", func() bool { return f.ended.Load() == 1 })
			<-done
			if err := <-f.causes; !errors.Is(err, errClientGone) {
				t.Errorf("cause is %v", err)
			}
		})
	}
}

// cable is a connection to a server that can be cut: client libraries do not
// get to close one whose buffers are full.
func cable(t *testing.T, to string) (addr string, cut func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cuts := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		defer l.Close()
		near, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		far, err := net.Dial("tcp", to)
		if err != nil {
			t.Error(err)
			return
		}
		all.Go(func() { _, _ = io.Copy(far, near) })
		all.Go(func() { _, _ = io.Copy(near, far) })
		<-cuts
		near.Close()
		// An end in good order would queue up behind the full buffers.
		if err := far.(*net.TCPConn).SetLinger(0); err != nil {
			t.Error(err)
		}
		far.Close()
	})
	return l.Addr().String(), func() {
		close(cuts)
		all.Wait()
	}
}

type endless struct{ n *atomic.Int64 }

func (e *endless) Read(p []byte) (int, error) {
	e.n.Add(int64(len(p)))
	return len(p), nil
}

func TestTokens(t *testing.T) {
	s := serve(t, Config{}, newFake())
	u := execURL(t, s, &cri.ExecRequest{Cmd: []string{"exit"}, Stdout: true})
	status := func(u string) int {
		t.Helper()
		resp, err := http.Get(u)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	if got := status(u); got != http.StatusForbidden && got != http.StatusBadRequest {
		t.Errorf("a plain request gets %d", got)
	}
	if got := status(u); got != http.StatusNotFound {
		t.Errorf("a used URL gets %d", got)
	}
	if got := status(s.URL() + "/exec/guess"); got != http.StatusNotFound {
		t.Errorf("a guessed URL gets %d", got)
	}
	u = execURL(t, s, &cri.ExecRequest{Cmd: []string{"exit"}, Stdout: true})
	if got := status(strings.Replace(u, "/exec/", "/attach/", 1)); got != http.StatusNotFound {
		t.Errorf("a URL for something else gets %d", got)
	}
	for {
		_, err := s.GetExec(&cri.ExecRequest{ContainerId: "c", Cmd: []string{"x"}, Stdout: true})
		if err != nil {
			if !errdefs.IsResourceExhausted(err) {
				t.Fatal(err)
			}
			break
		}
	}
	s.tokens.mu.Lock()
	if n := len(s.tokens.waiting); n != maxTokens {
		t.Errorf("%d sessions wait", n)
	}
	for k, w := range s.tokens.waiting {
		w.until = time.Now().Add(-time.Second)
		s.tokens.waiting[k] = w
	}
	s.tokens.mu.Unlock()
	execURL(t, s, &cri.ExecRequest{Cmd: []string{"exit"}, Stdout: true}) // makes room
	s.tokens.mu.Lock()
	defer s.tokens.mu.Unlock()
	if n := len(s.tokens.waiting); n != 1 {
		t.Errorf("%d sessions wait after all but one expired", n)
	}
}

func TestExpiredToken(t *testing.T) {
	var ts tokens
	token, err := ts.put(&execRequest{id: "c"})
	if err != nil {
		t.Fatal(err)
	}
	w := ts.waiting[token]
	w.until = time.Now().Add(-time.Millisecond)
	ts.waiting[token] = w
	if _, ok := take[*execRequest](&ts, token); ok {
		t.Fatal("an expired token is good")
	}
}

func TestRequestValidation(t *testing.T) {
	s := serve(t, Config{}, newFake())
	exec := func(r *cri.ExecRequest) error { _, err := s.GetExec(r); return err }
	attach := func(r *cri.AttachRequest) error { _, err := s.GetAttach(r); return err }
	forward := func(r *cri.PortForwardRequest) error { _, err := s.GetPortForward(r); return err }
	for name, tc := range map[string]struct {
		err   error
		field string
	}{
		"exec without container":   {exec(&cri.ExecRequest{Cmd: []string{"x"}, Stdout: true}), "container_id"},
		"exec without command":     {exec(&cri.ExecRequest{ContainerId: "c", Stdout: true}), "cmd"},
		"exec without streams":     {exec(&cri.ExecRequest{ContainerId: "c", Cmd: []string{"x"}}), "stdin"},
		"exec tty and stderr":      {exec(&cri.ExecRequest{ContainerId: "c", Cmd: []string{"x"}, Tty: true, Stderr: true}), "stderr"},
		"exec nothing":             {exec(nil), "container_id"},
		"attach without container": {attach(&cri.AttachRequest{Stdout: true}), "container_id"},
		"attach without streams":   {attach(&cri.AttachRequest{ContainerId: "c"}), "stdin"},
		"attach tty and stderr":    {attach(&cri.AttachRequest{ContainerId: "c", Tty: true, Stdout: true, Stderr: true}), "stderr"},
		"forward without pod":      {forward(&cri.PortForwardRequest{Port: []int32{80}}), "pod_sandbox_id"},
		"forward port 0":           {forward(&cri.PortForwardRequest{PodSandboxId: "p", Port: []int32{0}}), "port"},
		"forward port 65536":       {forward(&cri.PortForwardRequest{PodSandboxId: "p", Port: []int32{80, 65536}}), "port"},
	} {
		t.Run(name, func(t *testing.T) {
			if !errdefs.IsInvalidArgument(tc.err) || !strings.Contains(tc.err.Error(), tc.field+":") && !strings.Contains(tc.err.Error(), tc.field+",") {
				t.Fatalf("got %v, want InvalidArgument that names %s", tc.err, tc.field)
			}
		})
	}
}

func TestIdleTimeout(t *testing.T) {
	baseline(t)
	for name, client := range clients {
		t.Run(name, func(t *testing.T) {
			f := newFake()
			s := serve(t, Config{IdleTimeout: 200 * time.Millisecond}, f)
			u := execURL(t, s, &cri.ExecRequest{Cmd: []string{"hang"}, Stdout: true})
			_ = client(t, &rest.Config{}, u).StreamWithContext(within(t), remotecommand.StreamOptions{Stdout: io.Discard})
			waitFor(t, "the end of the session", func() bool { return f.ended.Load() == 1 })
		})
	}
}

// TestNoIdleTimeout: what stock containerd passes on for "0s", and for less what
// it means at best.
func TestNoIdleTimeout(t *testing.T) {
	baseline(t)
	for name, client := range clients {
		for _, idle := range []time.Duration{0, -time.Second} {
			t.Run(fmt.Sprint(name, " ", idle), func(t *testing.T) {
				f := newFake()
				s := serve(t, Config{IdleTimeout: idle}, f)
				if s.cfg.IdleTimeout != 0 {
					t.Errorf("sessions may be idle for %s only", s.cfg.IdleTimeout)
				}
				ctx, cancel := context.WithCancel(within(t))
				ended := make(chan error, 1)
				u := execURL(t, s, &cri.ExecRequest{Cmd: []string{"hang"}, Stdout: true})
				go func() {
					ended <- client(t, &rest.Config{}, u).StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: io.Discard})
				}()
				waitFor(t, "the session", func() bool { return f.active.Load() == 1 })
				select {
				case err := <-ended:
					t.Errorf("an idle session ended: %v", err)
					cancel()
				case <-time.After(300 * time.Millisecond):
					cancel()
					<-ended
				}
				waitFor(t, "the end of the session", func() bool { return f.ended.Load() == 1 })
			})
		}
	}
}

// TestClientWithoutStreams upgrades the connection and then does nothing.
func TestClientWithoutStreams(t *testing.T) {
	baseline(t)
	s := serve(t, Config{CreationTimeout: 50 * time.Millisecond}, newFake(), func(s *Server) { s.listener.linger = 50 * time.Millisecond })
	u, err := url.Parse(execURL(t, s, &cri.ExecRequest{Cmd: []string{"hang"}, Stdout: true}))
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n", u.Path)
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(c); err != nil {
		t.Fatalf("the server does not close the connection: %v", err)
	}
}

func TestCloseEndsSessions(t *testing.T) {
	baseline(t)
	f := newFake()
	s, err := New(Config{Address: "127.0.0.1"}, f)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx) }()
	u := execURL(t, s, &cri.ExecRequest{Cmd: []string{"hang"}, Stdout: true})
	client := make(chan error, 1)
	go func() {
		client <- clients["SPDY"](t, &rest.Config{}, u).StreamWithContext(within(t), remotecommand.StreamOptions{Stdout: io.Discard})
	}()
	waitFor(t, "the session", func() bool { return f.active.Load() == 1 })
	cancel()
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	<-client
	waitFor(t, "the end of the session", func() bool { return f.active.Load() == 0 })
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAdvertisedAddress(t *testing.T) {
	s, err := New(Config{}, newFake())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	u, err := url.Parse(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	if ip := net.ParseIP(u.Hostname()); ip == nil || ip.IsUnspecified() || u.Port() == "0" {
		t.Fatalf("URLs begin with %s", s.URL())
	}
	if _, err := New(Config{Address: "192.0.2.1"}, newFake()); err == nil {
		t.Fatal("listens on an address of nobody")
	}
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	writePair(t, cert, key)
	for name, conf := range map[string]*TLS{"self-signed": {}, "key pair": {CertFile: cert, KeyFile: key}} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, Config{TLS: conf}, newFake())
			ca := serverCA(t, s)
			for proto, client := range clients {
				t.Run(proto, func(t *testing.T) {
					u := execURL(t, s, &cri.ExecRequest{Cmd: []string{"exit"}, Stdout: true})
					if !strings.HasPrefix(u, "https://") {
						t.Fatalf("URL is %s", u)
					}
					cfg := &rest.Config{TLSClientConfig: rest.TLSClientConfig{CAData: ca}}
					err := client(t, cfg, u).StreamWithContext(within(t), remotecommand.StreamOptions{Stdout: io.Discard})
					var exit utilexec.ExitError
					if !errors.As(err, &exit) || exit.ExitStatus() != 42 {
						t.Errorf("got %v", err)
					}
				})
			}
		})
	}
	t.Run("aborted", func(t *testing.T) {
		f := newFake()
		s := serve(t, Config{TLS: &TLS{}}, f)
		ctx, cancel := context.WithCancel(within(t))
		u := execURL(t, s, &cri.ExecRequest{Cmd: []string{"hang"}, Stdout: true})
		cfg := &rest.Config{TLSClientConfig: rest.TLSClientConfig{CAData: serverCA(t, s)}}
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = clients["WebSocket"](t, cfg, u).StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: io.Discard})
		}()
		waitFor(t, "the session", func() bool { return f.active.Load() == 1 })
		cancel()
		<-done
		waitFor(t, "the end of the session", func() bool { return f.ended.Load() == 1 })
	})
	t.Run("replaced key pair", func(t *testing.T) {
		s := serve(t, Config{TLS: &TLS{CertFile: cert, KeyFile: key}}, newFake())
		before := serverCA(t, s)
		writePair(t, cert, key)
		future := time.Now().Add(time.Hour)
		for _, name := range []string{cert, key} {
			if err := os.Chtimes(name, future, future); err != nil {
				t.Fatal(err)
			}
		}
		if bytes.Equal(before, serverCA(t, s)) {
			t.Fatal("the old certificate is still in use")
		}
		if err := os.WriteFile(key, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
		serverCA(t, s) // goes on with the pair from before
	})
	for name, conf := range map[string]*TLS{"key missing": {CertFile: cert}, "no files": {CertFile: dir + "/x", KeyFile: dir + "/y"}} {
		if _, err := New(Config{Address: "127.0.0.1", TLS: conf}, newFake()); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// serverCA returns the certificate that the server shows, as PEM.
func serverCA(t *testing.T, s *Server) []byte {
	t.Helper()
	u, err := url.Parse(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	c, err := tls.Dial("tcp", u.Host, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return certPEM(c.ConnectionState().PeerCertificates[0])
}
