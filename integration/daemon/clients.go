package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/client"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// callTimeout bounds a unary call whose context has no deadline, so that a
// daemon that hangs fails one test and not the run.
var callTimeout = Patience(2 * time.Minute)

const (
	// Namespace is containerd's, for everything that CRI makes.
	Namespace = "k8s.io"
	// maxMessage is the size that the kubelet accepts.
	maxMessage = 16 << 20
)

// connect makes the connections. They are lazy: the daemon need not run yet,
// and they outlive its restarts.
func (in *Instance) connect() error {
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithChainUnaryInterceptor(withDeadline),
	}
	var err error
	if in.conn, err = grpc.NewClient(in.Endpoint(), opts...); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if in.client, err = client.NewWithConn(in.conn, client.WithDefaultNamespace(Namespace)); err != nil {
		return fmt.Errorf("connect containerd client: %w", err)
	}
	return nil
}

func withDeadline(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error { //lint:house param-count: gRPC's signature
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	return invoke(ctx, method, req, reply, cc, opts...)
}

func (in *Instance) disconnect() {
	if in.conn != nil {
		in.conn.Close()
	}
}

// Endpoint is the daemon's address as the kubelet writes it.
func (in *Instance) Endpoint() string { return "unix://" + in.Socket }

// Conn is the connection that the clients below share.
func (in *Instance) Conn() *grpc.ClientConn { return in.conn }

// Runtime is the CRI runtime service, called directly. A call without a deadline
// gets one of two minutes.
func (in *Instance) Runtime() cri.RuntimeServiceClient { return cri.NewRuntimeServiceClient(in.conn) }

// Images is the CRI image service, called directly.
func (in *Instance) Images() cri.ImageServiceClient { return cri.NewImageServiceClient(in.conn) }

// Client is a containerd client. Give its contexts a namespace
// (namespaces.WithNamespace(ctx, daemon.Namespace)).
func (in *Instance) Client() *client.Client { return in.client }

// readyPoll is how often a daemon that does not serve yet is asked again.
const readyPoll = 20 * time.Millisecond

// WaitReady waits until the daemon serves containerd's API and, unless NoCRI was
// given, CRI. It does not wait for the node's network: Status tells about that.
func (in *Instance) WaitReady(ctx context.Context) error {
	r := in.running()
	if r == nil {
		return errors.New("wait until ready: it does not run")
	}
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		err := in.serves(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-r.ended:
			in.forget()
			return fmt.Errorf("wait until ready: it ended: %v", r.err)
		case <-ctx.Done():
			return fmt.Errorf("wait until ready: %w (last answer: %v)", context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

func (in *Instance) serves(ctx context.Context) error {
	if in.conn.GetState() == connectivity.TransientFailure {
		in.conn.ResetConnectBackoff()
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := in.client.Version(ctx); err != nil {
		return err
	}
	if in.set.noCRI {
		return nil
	}
	_, err := in.Runtime().Version(ctx, &cri.VersionRequest{})
	return err
}
