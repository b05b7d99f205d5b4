package pool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	v2 "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/core/sandbox"
	client "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/fifo"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// errNobodyListens is the one proof that a shim is dead: the kernel knows of no
// process that has its socket open for connections. A stopped process has.
var errNobodyListens = errors.New("nobody listens on the shim's socket")

// errForgotten is the proof of death of a task that outlives its shim: the shim
// is there again and does not know it.
var errForgotten = errors.New("the shim does not know it")

// errBroke says that a connection closed before the shim answered, as it does
// while a process dies: the next attempt tells more.
var errBroke = errors.New("the connection closed")

// connection is a working connection to a shim.
type connection struct {
	api v2.TaskServiceClient
	// raw is the client under api, for the other services of the shim.
	raw any
	// address and version are the endpoint as it is given to others.
	address string
	version int
	closed  <-chan struct{}
	close   func() error
}

// connect returns a connection over which the shim has answered.
func (s *shim) connect(ctx context.Context) (*connection, error) {
	params, err := readBootstrap(s.bundle.Path)
	if err != nil {
		return nil, err
	}
	conn, err := s.open(ctx, params)
	if err != nil {
		return nil, err
	}
	for _, version := range []int{int(params.GetVersion()), int(params.GetVersion()) - 1} {
		conn.version = version
		if conn.api, err = v2.NewTaskClient(conn.raw, version); err != nil {
			break
		}
		// A shim of an older release may speak an older version than it says.
		if err = s.ask(ctx, conn); !errdefs.IsNotImplemented(err) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(err, conn.close())
	}
	return conn, nil
}

// open returns a connection to a shim, of the version that it says.
func (s *shim) open(ctx context.Context, params *bootapi.BootstrapResult) (*connection, error) {
	raw, closed, release, err := s.dial(params)
	if err != nil {
		return nil, err
	}
	stopLog := copyLog(ctx, s.bundle.Path)
	conn := &connection{
		raw: raw, version: int(params.GetVersion()), closed: closed,
		address: params.GetProtocol() + "+" + params.GetAddress(),
		close:   sync.OnceValue(func() error { stopLog(); return release() }),
	}
	if conn.api, err = v2.NewTaskClient(raw, conn.version); err != nil {
		return nil, errors.Join(err, conn.close())
	}
	return conn, nil
}

// dial connects to the shim: by the connection that others have too, if it is
// everybody's.
func (s *shim) dial(params *bootapi.BootstrapResult) (raw any, closed <-chan struct{}, release func() error, err error) {
	if s.lasting {
		raw, closed, leave, err := s.pool.links.take(params)
		return raw, closed, func() error { leave(); return nil }, err
	}
	c, closed, err := dial(params)
	if err != nil {
		return nil, nil, nil, err
	}
	return c, closed, c.Close, nil
}

// question is what tells whether the shim answers, and of one that takes tasks
// over whether it has taken over this.
func (s *shim) question(ctx context.Context, c *connection) (err error) {
	switch {
	case s.pod:
		var pods sandboxapi.TTRPCSandboxService
		if pods, err = sandbox.NewClient(c.raw); err == nil {
			_, err = pods.SandboxStatus(ctx, &sandboxapi.SandboxStatusRequest{SandboxID: s.bundle.ID})
		}
	case s.lasting:
		_, err = c.api.State(ctx, &api.StateRequest{ID: s.bundle.ID})
	default:
		_, err = c.api.Connect(ctx, &api.ConnectRequest{ID: s.bundle.ID})
	}
	return err
}

func (s *shim) ask(ctx context.Context, c *connection) error {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	err := s.question(ctx, c)
	if err == nil {
		return nil
	}
	known := native(err)
	switch _, answer := status.FromError(err); {
	case s.lasting && errdefs.IsNotFound(known):
		return fmt.Errorf("ask the shim: %w: %w", errForgotten, known)
	case errdefs.IsUnavailable(known):
		return fmt.Errorf("ask the shim: %w: %w", errBroke, known)
	case errdefs.IsNotImplemented(known), errdefs.IsDeadlineExceeded(known), errdefs.IsCanceled(known), !answer:
		return fmt.Errorf("ask the shim: %w", known)
	}
	// It may not know the task. Each call will hear that for itself.
	log.G(ctx).WithError(known).Warn("the shim answers with an error")
	return nil
}

// bootstrapFile is in a bundle: the shim's answer to its start.
const bootstrapFile = "bootstrap.json"

// readBootstrap reads how the shim is reached. A bundle that does not say was
// left by a daemon that ended before it heard from the shim, which therefore
// has no task; and no shim can be reached by a file that is damaged.
func readBootstrap(bundle string) (*bootapi.BootstrapResult, error) {
	data, err := os.ReadFile(filepath.Join(bundle, bootstrapFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the shim has not said where it listens: %w", errNobodyListens)
	}
	if err != nil {
		return nil, err
	}
	r, err := parseBootstrap(data)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNobodyListens, err)
	}
	return r, nil
}

func parseBootstrap(data []byte) (*bootapi.BootstrapResult, error) {
	var r bootapi.BootstrapResult
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("read bootstrap.json: %w: %w", errdefs.ErrDataLoss, err)
	}
	if r.GetAddress() == "" || r.GetVersion() < 2 {
		return nil, fmt.Errorf("read bootstrap.json: no address or version: %w", errdefs.ErrDataLoss)
	}
	return &r, nil
}

// dial connects to a shim and returns a ttrpc or grpc client, and a channel
// that is closed with the connection.
func dial(params *bootapi.BootstrapResult) (io.Closer, <-chan struct{}, error) {
	closed := make(chan struct{})
	switch strings.ToLower(params.GetProtocol()) {
	case "ttrpc":
		conn, err := knock(params.GetAddress())
		if err != nil {
			return nil, nil, err
		}
		return ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { close(closed) })), closed, nil
	case "grpc":
		conn, err := knock(params.GetAddress())
		if err != nil {
			return nil, nil, err
		}
		if err := conn.Close(); err != nil {
			return nil, nil, err
		}
		c, err := dialGRPC(params.GetAddress(), closed)
		return c, closed, err
	}
	return nil, nil, fmt.Errorf("the shim speaks %q, not ttrpc or grpc: %w", params.GetProtocol(), errdefs.ErrNotImplemented)
}

func knock(address string) (net.Conn, error) {
	conn, err := client.AnonReconnectDialer(address, probeLimit)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("connect to %s: %w: %w", address, errNobodyListens, err)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", address, err)
	}
	return conn, nil
}

func dialGRPC(address string, closed chan<- struct{}) (*grpc.ClientConn, error) {
	c, err := grpc.NewClient("passthrough:///shim", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return knock(address) }))
	if err != nil {
		return nil, err
	}
	c.Connect()
	// It ends with the connection: grpc reconnects only when asked to.
	go func() {
		defer close(closed)
		for state := c.GetState(); state != connectivity.Shutdown; state = c.GetState() {
			if state == connectivity.Idle || state == connectivity.TransientFailure {
				_ = c.Close() // nothing to be done about a connection that is no more
				return
			}
			c.WaitForStateChange(context.Background(), state)
		}
	}()
	return c, nil
}

// copyLog keeps the pipe open into which the shim writes its log, as a shim
// without a reader is stopped by it.
func copyLog(ctx context.Context, bundle string) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	f, err := fifo.OpenFifo(ctx, filepath.Join(bundle, "log"), unix.O_RDWR|unix.O_CREAT|unix.O_NONBLOCK, 0o700)
	if err != nil {
		log.G(ctx).WithError(err).Warn("open the log of the shim")
		return cancel
	}
	go func() {
		defer f.Close()
		if _, err := io.Copy(os.Stderr, f); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Warn("copy the log of the shim")
		}
	}()
	return func() {
		cancel()
		f.Close()
	}
}
