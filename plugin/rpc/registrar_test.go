package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/rpc"
)

type service struct {
	cri.UnimplementedRuntimeServiceServer
	version func(context.Context) error
	stream  func(context.Context) error
}

func (s *service) Version(ctx context.Context, _ *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{}, s.version(ctx)
}

func (s *service) GetContainerEvents(_ *cri.GetEventsRequest, stream grpc.ServerStreamingServer[cri.ContainerEventResponse]) error {
	return s.stream(stream.Context())
}

func serve(t *testing.T, s *service, o rpc.Options) cri.RuntimeServiceClient {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	server := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(rpc.Registrar(server, o), s)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("passthrough:x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return l.Dial() }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return cri.NewRuntimeServiceClient(conn)
}

func TestErrorsGetTheirStatus(t *testing.T) {
	for _, c := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{fmt.Errorf("x: %w", errdefs.ErrNotFound), codes.NotFound},
		{fmt.Errorf("x: %w", errdefs.ErrInvalidArgument), codes.InvalidArgument},
		{fmt.Errorf("x: %w", errdefs.ErrFailedPrecondition), codes.FailedPrecondition},
		{fmt.Errorf("x: %w", errdefs.ErrAlreadyExists), codes.AlreadyExists},
		{fmt.Errorf("x: %w", errdefs.ErrUnavailable), codes.Unavailable},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), codes.DeadlineExceeded},
		{fmt.Errorf("x: %w", context.Canceled), codes.Canceled},
		{errors.New("x"), codes.Unknown},
		{status.Error(codes.ResourceExhausted, "x"), codes.ResourceExhausted},
		{fmt.Errorf("x: %w", status.Error(codes.ResourceExhausted, "y")), codes.ResourceExhausted},
		{fmt.Errorf("x: %w: %w", errdefs.ErrUnavailable, &net.DNSError{Err: "an error that wraps nothing"}), codes.Unavailable},
	} {
		s := &service{version: func(context.Context) error { return c.err }}
		_, err := serve(t, s, rpc.Options{Namespace: "k8s.io", Ops: &operation.Table{}}).Version(context.Background(), &cri.VersionRequest{})
		if status.Code(err) != c.want {
			t.Errorf("%v: got %v, want %v", c.err, status.Code(err), c.want)
		}
		if err != nil && !strings.Contains(err.Error(), "x") {
			t.Errorf("%v: the words are lost: %v", c.err, err)
		}
	}
}

func TestUnimplementedIsSaid(t *testing.T) {
	_, err := serve(t, &service{}, rpc.Options{Namespace: "k8s.io", Ops: &operation.Table{}}).CheckpointPod(context.Background(), &cri.CheckpointPodRequest{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("got %v", err)
	}
}

func TestRequestIsDecorated(t *testing.T) {
	ops := &operation.Table{}
	check := func(ctx context.Context, method string) {
		if ns, _ := namespaces.Namespace(ctx); ns != "k8s.io" {
			t.Errorf("%s: namespace %q", method, ns)
		}
		if l := ops.List(); len(l) != 1 || l[0].Name != method || operation.From(ctx) == nil {
			t.Errorf("%s: operations %+v", method, l)
		}
	}
	var seen []string
	s := &service{
		version: func(ctx context.Context) error { check(ctx, "Version"); return nil },
		stream:  func(ctx context.Context) error { check(ctx, "GetContainerEvents"); return nil },
	}
	c := serve(t, s, rpc.Options{Namespace: "k8s.io", Ops: ops,
		Observe: func(m string, code codes.Code, _ time.Duration) { seen = append(seen, m+" "+code.String()) }})
	if _, err := c.Version(context.Background(), &cri.VersionRequest{}); err != nil {
		t.Fatal(err)
	}
	stream, err := c.GetContainerEvents(context.Background(), &cri.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	stream.Recv() // until its end
	if got := strings.Join(seen, ", "); got != "Version OK, GetContainerEvents OK" {
		t.Errorf("observed %s", got)
	}
	if l := ops.List(); len(l) != 0 {
		t.Errorf("left in the table: %+v", l)
	}
}

// TestEndlessIsNoOperation: what lasts as long as its client likes does not look
// like something that hangs.
func TestEndlessIsNoOperation(t *testing.T) {
	ops := &operation.Table{}
	s := &service{stream: func(ctx context.Context) error {
		if l := ops.List(); len(l) != 0 {
			t.Errorf("operations %+v", l)
		}
		return nil
	}}
	c := serve(t, s, rpc.Options{Namespace: "k8s.io", Ops: ops, Endless: []string{"GetContainerEvents"},
		Observe: func(m string, _ codes.Code, took time.Duration) { t.Errorf("%s took %s", m, took) }})
	stream, err := c.GetContainerEvents(context.Background(), &cri.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("it ends with %v", err)
	}
}

func TestPanicIsOneRequestsError(t *testing.T) {
	s := &service{version: func(context.Context) error { panic("oops") }}
	_, err := serve(t, s, rpc.Options{Namespace: "k8s.io", Ops: &operation.Table{}}).Version(context.Background(), &cri.VersionRequest{})
	if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "oops") {
		t.Errorf("got %v", err)
	}
}

func TestNotReady(t *testing.T) {
	s := &service{version: func(context.Context) error { t.Error("served"); return nil }}
	_, err := serve(t, s, rpc.Options{Namespace: "k8s.io", Ops: &operation.Table{}, Ready: func() error { return errors.New("records are being loaded") }}).
		Version(context.Background(), &cri.VersionRequest{})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "records are being loaded") {
		t.Errorf("got %v", err)
	}
}

// The words of a request that takes too long reach its client.
func TestAnswersBeforeTheClientGivesUp(t *testing.T) {
	s := &service{version: func(ctx context.Context) error {
		<-ctx.Done()
		return fmt.Errorf("%w; it waits for the plugin", context.Cause(ctx))
	}}
	c := serve(t, s, rpc.Options{Namespace: "k8s.io", Ops: &operation.Table{}})
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_, err := c.Version(ctx, &cri.VersionRequest{})
	if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "waits for the plugin") {
		t.Errorf("got %v", err)
	}
}
