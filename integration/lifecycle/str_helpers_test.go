package lifecycle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The protocols of remote commands. Over WebSocket the kubelet's clients speak
// the last two; SPDY has all.
const (
	protocolV1 = "channel.k8s.io"
	protocolV2 = "v2.channel.k8s.io"
	protocolV3 = "v3.channel.k8s.io"
	protocolV4 = "v4.channel.k8s.io"
)

// dial is one way to reach the streaming server.
type dial struct {
	websocket bool
	protocols []string
	rest      rest.Config
}

var (
	spdyDial      = dial{protocols: []string{protocolV4}}
	websocketDial = dial{websocket: true, protocols: []string{protocolV4}}
)

// executor is a client of one session's URL.
func (d dial) executor(address string) (remotecommand.Executor, error) {
	if d.websocket {
		return remotecommand.NewWebSocketExecutorForProtocols(&d.rest, "GET", address, d.protocols...)
	}
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	transport, upgrader, err := spdy.RoundTripperFor(&d.rest)
	if err != nil {
		return nil, err
	}
	return remotecommand.NewSPDYExecutorForProtocols(transport, upgrader, "POST", u, d.protocols...)
}

// streamTo runs a session to its end.
func (d dial) streamTo(ctx context.Context, address string, o remotecommand.StreamOptions) error {
	e, err := d.executor(address)
	if err != nil {
		return err
	}
	return e.StreamWithContext(ctx, o)
}

// session is what went over an exec or attach.
type session struct {
	stdout, stderr string
	code           int
}

// exec runs a command over a stream, with the input if it is not nil.
func (b *box) exec(d dial, id string, stdin io.Reader, command ...string) (session, error) {
	b.t.Helper()
	address := b.execURL(&cri.ExecRequest{ContainerId: id, Cmd: command, Stdin: stdin != nil, Stdout: true, Stderr: true})
	var out, errs lockedBuffer
	ctx, cancel := context.WithTimeout(b.t.Context(), ample)
	defer cancel()
	err := d.streamTo(ctx, address, remotecommand.StreamOptions{Stdin: stdin, Stdout: &out, Stderr: &errs})
	s := session{stdout: out.String(), stderr: errs.String()}
	if exit, ok := errors.AsType[utilexec.CodeExitError](err); ok {
		s.code, err = exit.Code, nil
	}
	return s, err
}

func (b *box) execURL(req *cri.ExecRequest) string {
	b.t.Helper()
	resp, err := b.Runtime().Exec(context.Background(), req)
	if err != nil {
		b.t.Fatalf("exec: %v", err)
	}
	return resp.Url
}

func (b *box) attachURL(req *cri.AttachRequest) string {
	b.t.Helper()
	resp, err := b.Runtime().Attach(context.Background(), req)
	if err != nil {
		b.t.Fatalf("attach: %v", err)
	}
	return resp.Url
}

// attached is a client of a container's streams.
type attached struct {
	t      *testing.T
	out    *lockedBuffer
	err    *lockedBuffer
	stdin  io.WriteCloser
	done   chan error
	cancel context.CancelFunc
}

// attach joins a container's streams until they or the test end.
func (b *box) attach(d dial, req *cri.AttachRequest, sizes remotecommand.TerminalSizeQueue) *attached {
	b.t.Helper()
	address := b.attachURL(req)
	ctx, cancel := context.WithCancel(context.Background())
	a := &attached{t: b.t, out: &lockedBuffer{}, err: &lockedBuffer{}, done: make(chan error, 1), cancel: cancel}
	o := remotecommand.StreamOptions{Stdout: a.out, Stderr: a.err, Tty: req.Tty, TerminalSizeQueue: sizes}
	if req.Stdin {
		r, w := io.Pipe()
		o.Stdin, a.stdin = r, w
	}
	if !req.Stdout {
		o.Stdout = nil
	}
	if !req.Stderr {
		o.Stderr = nil
	}
	b.t.Cleanup(func() {
		cancel()
		if a.stdin != nil {
			a.stdin.Close()
		}
	})
	go func() { a.done <- d.streamTo(ctx, address, o) }()
	return a
}

// says waits until the container's stdout has brought the text.
func (a *attached) says(text string) {
	a.t.Helper()
	eventually(a.t, ample, func() error {
		if got := a.out.String(); !strings.Contains(got, text) {
			return fmt.Errorf("stdout brought %.200q, not %q", got, text)
		}
		return nil
	})
}

func (a *attached) write(text string) {
	a.t.Helper()
	written := make(chan error, 1)
	go func() {
		_, err := io.WriteString(a.stdin, text)
		written <- err
	}()
	select {
	case err := <-written:
		if err != nil {
			a.t.Fatal(err)
		}
	case err := <-a.done:
		a.t.Fatalf("the session ended before it took %q: %v", text, err)
	case <-time.After(ample):
		a.t.Fatalf("the session does not take %q", text)
	}
}

// ends waits for the session's end.
func (a *attached) ends() error {
	a.t.Helper()
	select {
	case err := <-a.done:
		return err
	case <-time.After(ample):
		a.t.Fatal("the session does not end")
		return nil
	}
}

// lockedBuffer may be written and read at the same time.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// sizeQueue brings terminal sizes.
type sizeQueue chan remotecommand.TerminalSize

// Next implements remotecommand.TerminalSizeQueue.
func (q sizeQueue) Next() *remotecommand.TerminalSize {
	size, ok := <-q
	if !ok {
		return nil
	}
	return &size
}

// forward forwards ports of the box's pod and returns their local addresses.
func (b *box) forward(ports ...int) []string {
	b.t.Helper()
	resp, err := b.Runtime().PortForward(context.Background(), &cri.PortForwardRequest{PodSandboxId: b.pod})
	if err != nil {
		b.t.Fatalf("port-forward: %v", err)
	}
	u, err := url.Parse(resp.Url)
	if err != nil {
		b.t.Fatal(err)
	}
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{})
	if err != nil {
		b.t.Fatal(err)
	}
	var specs []string
	for _, p := range ports {
		specs = append(specs, fmt.Sprintf("0:%d", p))
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", u)
	f, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, specs, stop, ready, io.Discard, io.Discard)
	if err != nil {
		b.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- f.ForwardPorts() }()
	b.t.Cleanup(func() {
		close(stop)
		<-done
	})
	select {
	case <-ready:
	case err := <-done:
		done <- err
		b.t.Fatalf("port-forward: %v", err)
	case <-time.After(ample):
		b.t.Fatal("port-forward does not get ready")
	}
	list, err := f.GetPorts()
	if err != nil {
		b.t.Fatal(err)
	}
	var out []string
	for _, p := range list {
		out = append(out, net.JoinHostPort("127.0.0.1", strconv.Itoa(int(p.Local))))
	}
	return out
}

// talk sends a request over TCP, ends it, and reads the whole answer.
func talk(address, request string) (string, error) {
	conn, err := net.DialTimeout("tcp", address, ample)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(ample)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, request); err != nil {
		return "", err
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(conn)
	return string(answer), err
}
