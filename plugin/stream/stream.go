// Package stream serves exec, attach and port-forward sessions over HTTP.
//
// It owns the listener, the one-time URLs that the Get methods hand out, and
// every session from the first request to the end of its connection. The
// protocols, SPDY and WebSocket, are those of k8s.io/cri-streaming. A session's
// context ends as soon as its client has gone, also when the protocol would not
// notice; whatever a session started is bound to that context or to the
// connection, which is closed when the session ends.
//
// It never looks at containers: what a session does is the Runtime's business.
//
// Start reading at New and Server.session; Forward is the data path of a
// forwarded port.
package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// Size is the size of a terminal.
type Size = remotecommand.TerminalSize

// Session is one exec or attach. Streams the client did not ask for are nil.
type Session struct {
	ContainerID string
	// Cmd is the command of an exec.
	Cmd            []string
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	TTY            bool
	// Resize brings the sizes of the terminal. It may be nil, and need not be
	// read.
	Resize <-chan Size
}

// Runtime does what the sessions ask for. Each method returns when the session
// is over, at the latest soon after ctx has ended.
type Runtime interface {
	// Exec runs a command. ExitStatus makes the error that says how it exited.
	Exec(ctx context.Context, s Session) error
	// Attach joins the streams of a running container.
	Attach(ctx context.Context, s Session) error
	// PortForward connects conn to a port of a pod; see Forward.
	PortForward(ctx context.Context, sandboxID string, port int32, conn io.ReadWriteCloser) error
}

// ExitStatus returns what Exec returns for a command that exited with code.
func ExitStatus(code int) error {
	if code == 0 {
		return nil
	}
	return utilexec.CodeExitError{Err: fmt.Errorf("command exited with code %d", code), Code: code}
}

// Config of a Server.
type Config struct {
	// Address and Port to listen on. Port "0" lets the kernel choose; without an
	// address all are listened on, and URLs name one of the machine.
	Address, Port string
	// IdleTimeout ends a session over which nothing went. Zero, or less, is no
	// limit.
	IdleTimeout time.Duration
	// CreationTimeout is how long a client may take to make its streams.
	// Default 30 s.
	CreationTimeout time.Duration
	// TLS is nil for plain HTTP.
	TLS *TLS
}

const (
	headerTimeout = 30 * time.Second
	keepAlive     = time.Minute
	maxHeader     = 64 << 10
	closeWait     = 10 * time.Second
	// lingerTime is how long a client may take to close the connection of a
	// session that is over, and how long it may fetch nothing of what is left
	// for it then.
	lingerTime = 5 * time.Second
	// watchTime is how often a session looks whether its client is still there
	// when nothing is being read.
	watchTime = 5 * time.Second
)

// Server serves sessions.
type Server struct {
	cfg      Config
	runtime  Runtime
	listener *listener
	http     *http.Server
	base     url.URL
	tokens   tokens
	cancel   context.CancelFunc
	watch    time.Duration

	mu       sync.Mutex
	closing  bool
	sessions sync.WaitGroup // Add only while not closing
}

// New listens and returns a server that hands out URLs; they work once Serve
// runs.
func New(cfg Config, rt Runtime) (*Server, error) {
	cfg.IdleTimeout = max(cfg.IdleTimeout, 0) // the protocols disagree about less
	if cfg.CreationTimeout <= 0 {
		cfg.CreationTimeout = remotecommand.DefaultStreamCreationTimeout
	}
	if cfg.Port == "" {
		cfg.Port = "0"
	}
	l, err := net.Listen("tcp", net.JoinHostPort(cfg.Address, cfg.Port))
	if err != nil {
		return nil, fmt.Errorf("listen for streams: %w", err)
	}
	s := &Server{cfg: cfg, runtime: rt, watch: watchTime,
		listener: &listener{Listener: l, linger: lingerTime, conns: map[*conn]struct{}{}}}
	s.base = url.URL{Scheme: "http", Host: advertised(l.Addr().(*net.TCPAddr))}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.http = &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       keepAlive,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       bind,
		ErrorLog:          stdlog.New(debugWriter{}, "", 0),
		// Sessions take over the connection, which HTTP/2 does not allow.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	if cfg.TLS != nil {
		s.base.Scheme = "https"
		if s.http.TLSConfig, err = cfg.TLS.config(s.base.Hostname()); err != nil {
			l.Close()
			cancel()
			return nil, fmt.Errorf("set up TLS of streams: %w", err)
		}
	}
	return s, nil
}

// debugWriter takes what net/http has to say about single connections.
type debugWriter struct{}

func (debugWriter) Write(p []byte) (int, error) {
	log.L.WithField("component", "stream").Debug(string(p))
	return len(p), nil
}

// advertised is the host and port for URLs.
func advertised(a *net.TCPAddr) string {
	ip := a.IP
	if ip.IsUnspecified() {
		ip = machineIP()
	}
	return net.JoinHostPort(ip.String(), fmt.Sprint(a.Port))
}

// machineIP returns an address by which the machine reaches itself.
func machineIP() net.IP {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return net.IPv4(127, 0, 0, 1)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			return n.IP
		}
	}
	return net.IPv4(127, 0, 0, 1)
}

// URL is the beginning of the URLs that the server hands out.
func (s *Server) URL() string { return s.base.String() }

// Serve serves until ctx ends or Close is called.
func (s *Server) Serve(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = s.Close() })()
	var err error
	if s.cfg.TLS != nil {
		err = s.http.ServeTLS(s.listener, "", "")
	} else {
		err = s.http.Serve(s.listener)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve streams: %w", err)
}

// Close ends all sessions and waits for what they do, for some seconds.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.cancel()
	err := s.http.Close()
	s.listener.closeAll() // net/http has let go of those a session took over
	if cerr := s.listener.Close(); cerr != nil && !errors.Is(cerr, net.ErrClosed) {
		err = errors.Join(err, cerr)
	}
	ended := make(chan struct{})
	go func() {
		s.sessions.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(closeWait):
		err = errors.Join(err, fmt.Errorf("sessions do not end: %w", errdefs.ErrUnavailable))
	}
	if err != nil {
		return fmt.Errorf("close streams: %w", err)
	}
	return nil
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		mux.HandleFunc(method+" /exec/{token}", s.serveExec)
		mux.HandleFunc(method+" /attach/{token}", s.serveAttach)
		mux.HandleFunc(method+" /portforward/{token}", s.servePortForward)
	}
	return mux
}

// atWork runs what a session does, unless the server is closing. A protocol
// that still waits for its client does nothing that Close would wait for.
func (s *Server) atWork(do func() error) error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return fmt.Errorf("begin session: shutting down: %w", errdefs.ErrUnavailable)
	}
	s.sessions.Add(1)
	s.mu.Unlock()
	defer s.sessions.Done()
	return do()
}

// session runs one session and ends its connection.
func (s *Server) session(w http.ResponseWriter, r *http.Request, run func(http.ResponseWriter, *http.Request)) {
	c := connOf(r.Context())
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(context.Canceled)
	var watch sync.WaitGroup
	watch.Go(func() { c.watch(ctx, s.watch, cancel) })
	tw := &takenOver{ResponseWriter: w}
	run(tw, r.WithContext(ctx))
	cancel(context.Canceled)
	watch.Wait()
	if !tw.hijacked {
		return
	}
	// The protocol closes the connection, but not in every case of failure.
	select {
	case <-c.gone.Done():
	case <-time.After(s.listener.linger):
	}
	c.Close()
}

func (s *Server) serveExec(w http.ResponseWriter, r *http.Request) {
	req, ok := take[*execRequest](&s.tokens, r.PathValue("token"))
	if !ok {
		http.NotFound(w, r)
		return
	}
	s.session(w, r, func(w http.ResponseWriter, r *http.Request) {
		a := &adapter{ctx: r.Context(), server: s, want: req.streams}
		remotecommand.ServeExec(w, r, a, "", "", req.id, req.cmd, req.streams.options(),
			s.cfg.IdleTimeout, s.cfg.CreationTimeout, remotecommand.SupportedStreamingProtocols)
	})
}

func (s *Server) serveAttach(w http.ResponseWriter, r *http.Request) {
	req, ok := take[*attachRequest](&s.tokens, r.PathValue("token"))
	if !ok {
		http.NotFound(w, r)
		return
	}
	s.session(w, r, func(w http.ResponseWriter, r *http.Request) {
		a := &adapter{ctx: r.Context(), server: s, want: req.streams}
		remotecommand.ServeAttach(w, r, a, "", "", req.id, req.streams.options(),
			s.cfg.IdleTimeout, s.cfg.CreationTimeout, remotecommand.SupportedStreamingProtocols)
	})
}

func (s *Server) servePortForward(w http.ResponseWriter, r *http.Request) {
	req, ok := take[*portForwardRequest](&s.tokens, r.PathValue("token"))
	if !ok {
		http.NotFound(w, r)
		return
	}
	s.session(w, r, func(w http.ResponseWriter, r *http.Request) {
		a := &adapter{ctx: r.Context(), server: s}
		portforward.ServePortForward(w, r, a, req.id, "", &portforward.V4Options{Ports: req.ports},
			s.cfg.IdleTimeout, s.cfg.CreationTimeout, portforward.SupportedProtocols)
	})
}

// adapter is the Runtime as the protocols call it, for one session. It keeps
// the context of the session because for a forwarded port they pass one that
// never ends.
type adapter struct {
	ctx    context.Context
	server *Server
	want   streams
}

// ExecInContainer implements remotecommand.Executor.
func (a *adapter) ExecInContainer(_ context.Context, _, _ string, container string, cmd []string, in io.Reader, out, errs io.WriteCloser, _ bool, resize <-chan Size, _ time.Duration) error { //lint:house param-count: an interface of k8s.io/cri-streaming
	s := a.session(container, in, out, errs, resize)
	s.Cmd = cmd
	err := a.server.atWork(func() error { return a.server.runtime.Exec(a.ctx, s) })
	var exit utilexec.ExitError
	if errors.As(err, &exit) {
		return exit // the protocol does not look into wrapped errors
	}
	return err
}

// AttachContainer implements remotecommand.Attacher.
func (a *adapter) AttachContainer(_ context.Context, _, _ string, container string, in io.Reader, out, errs io.WriteCloser, _ bool, resize <-chan Size) error { //lint:house param-count: an interface of k8s.io/cri-streaming
	s := a.session(container, in, out, errs, resize)
	return a.server.atWork(func() error { return a.server.runtime.Attach(a.ctx, s) })
}

// PortForward implements portforward.PortForwarder.
func (a *adapter) PortForward(_ context.Context, sandbox, _ string, port int32, conn io.ReadWriteCloser) error {
	return a.server.atWork(func() error { return a.server.runtime.PortForward(a.ctx, sandbox, port, conn) })
}

// session keeps the streams that were asked for. WebSocket makes all of them,
// and an unwanted stdin would look like one that has ended.
func (a *adapter) session(id string, in io.Reader, out, errs io.Writer, resize <-chan Size) Session {
	s := Session{ContainerID: id, TTY: a.want.tty, Resize: resize}
	if a.want.stdin {
		s.Stdin = in
	}
	if a.want.stdout {
		s.Stdout = out
	}
	if a.want.stderr {
		s.Stderr = errs
	}
	return s
}
