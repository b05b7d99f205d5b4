// Package rpc does for every request what no request should do by itself:
// readiness, namespace, an entry in the operations table, log, metrics, a guard
// against panics, and the mapping of errors to gRPC. It is a decorator around
// the registrar that a service is registered with, so a service cannot be
// registered without it. It knows nothing of what the requests mean.
package rpc

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/gantry-cri/gantry/plugin/operation"
)

// Options say how requests are treated. Namespace and Ops are required.
type Options struct {
	// Namespace is the containerd namespace requests work in.
	Namespace string
	Ops       *operation.Table
	// Ready reports nil once requests can be served; the error is what the
	// client gets until then, as Unavailable.
	Ready func() error
	// Observe is told how each request went; nil for nobody.
	Observe func(method string, code codes.Code, took time.Duration)
	// Endless are the streams that last for as long as their client likes. They
	// are no operations, which an operator would take for hanging ones, and how
	// long they took is not measured.
	Endless []string
	// Object names what a request is about, for log and operations table.
	Object func(request any) (object, id string)
}

// Registrar registers services on inner with every method decorated.
func Registrar(inner grpc.ServiceRegistrar, o Options) grpc.ServiceRegistrar {
	return registrar{inner, o}
}

type registrar struct {
	inner grpc.ServiceRegistrar
	o     Options
}

// RegisterService implements grpc.ServiceRegistrar.
func (r registrar) RegisterService(desc *grpc.ServiceDesc, impl any) {
	d := *desc
	d.Methods = make([]grpc.MethodDesc, len(desc.Methods))
	for i, m := range desc.Methods {
		d.Methods[i] = grpc.MethodDesc{MethodName: m.MethodName, Handler: r.unary(m)}
	}
	d.Streams = make([]grpc.StreamDesc, len(desc.Streams))
	for i, s := range desc.Streams {
		d.Streams[i] = s
		d.Streams[i].Handler = r.stream(s)
	}
	r.inner.RegisterService(&d, impl)
}

func (r registrar) unary(m grpc.MethodDesc) grpc.MethodHandler {
	return func(srv any, ctx context.Context, dec func(any) error, outer grpc.UnaryServerInterceptor) (any, error) {
		return m.Handler(srv, ctx, dec, func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			decorated := func(ctx context.Context, req any) (any, error) {
				var resp any
				err := r.serve(ctx, m.MethodName, req, func(ctx context.Context) (err error) {
					resp, err = handler(ctx, req)
					return err
				})
				if err != nil {
					return nil, err
				}
				return resp, nil
			}
			if outer == nil {
				return decorated(ctx, req)
			}
			return outer(ctx, req, info, decorated)
		})
	}
}

func (r registrar) stream(s grpc.StreamDesc) grpc.StreamHandler {
	return func(srv any, stream grpc.ServerStream) error {
		return r.serve(stream.Context(), s.StreamName, nil, func(ctx context.Context) error {
			return s.Handler(srv, contextStream{stream, ctx})
		})
	}
}

// contextStream is a stream with the decorated context.
type contextStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (s contextStream) Context() context.Context { return s.ctx }

// serve runs one request.
func (r registrar) serve(ctx context.Context, method string, req any, handle func(context.Context) error) error {
	begin := time.Now()
	info := operation.Info{Name: method}
	if r.o.Object != nil && req != nil {
		info.Object, info.ID = r.o.Object(req)
	}
	ctx = namespaces.WithNamespace(ctx, r.o.Namespace)
	ctx = log.WithLogger(ctx, log.G(ctx).WithFields(fields(info)))
	endless := slices.Contains(r.o.Endless, method)
	if !endless {
		var op *operation.Op
		ctx, op = r.o.Ops.Begin(ctx, info)
		defer op.End()
	}
	ctx, cancel := answerInTime(ctx, begin)
	defer cancel()
	err := r.ready()
	if err == nil {
		err = guard(ctx, handle)
	}
	err = ToGRPC(ctx, err)
	code := status.Code(err)
	if r.o.Observe != nil && !endless {
		r.o.Observe(method, code, time.Since(begin))
	}
	l := log.G(ctx).WithField("took", time.Since(begin))
	switch {
	case err == nil:
		l.Debug("done")
	case code == codes.NotFound || code == codes.Canceled || code == codes.Unimplemented:
		l.WithError(err).Debug("failed") // clients ask and leave as they like
	default:
		l.WithError(err).Warn("failed")
	}
	return err
}

// errLate is what a request is told whose client is about to give up.
var errLate = fmt.Errorf("the client's deadline has come: %w", context.DeadlineExceeded)

// answerInTime ends the request a little before its client gives up. A client
// that gives up by itself hears nothing of what its request was waiting for.
func answerInTime(ctx context.Context, begin time.Time) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return ctx, func() {}
	}
	margin := min(deadline.Sub(begin)/10, 500*time.Millisecond)
	return context.WithDeadlineCause(ctx, deadline.Add(-margin), errLate)
}

func fields(i operation.Info) log.Fields {
	f := log.Fields{"rpc": i.Name}
	if i.Object != "" {
		f["object"] = i.Object
	}
	if i.ID != "" {
		f["id"] = i.ID
	}
	return f
}

func (r registrar) ready() error {
	if r.o.Ready == nil {
		return nil
	}
	if err := r.o.Ready(); err != nil {
		return fmt.Errorf("not ready: %w: %w", err, errdefs.ErrUnavailable)
	}
	return nil
}

// guard turns a panic of one request into its error: the daemon serves every
// pod of the node.
func guard(ctx context.Context, handle func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			log.G(ctx).Errorf("panic: %v\n%s", p, debug.Stack())
			err = fmt.Errorf("panic: %v (the log has the stack): %w", p, errdefs.ErrInternal)
		}
	}()
	return handle(ctx)
}

// ToGRPC gives err the status of its class. An error that has none, after the
// request's own end, gets the class of that end.
func ToGRPC(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded), ctx.Err() == context.DeadlineExceeded && errdefs.IsUnknown(err):
		return status.Error(codes.DeadlineExceeded, err.Error())
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	}
	if st, ok := status.FromError(err); ok {
		return st.Err()
	}
	// Of its class alone: errgrpc looks at every error of a chain for details
	// to send, and panics at one that wraps nothing, such as a failed lookup
	// of a host's name.
	return status.Error(status.Code(errgrpc.ToGRPC(errdefs.Resolve(err))), err.Error())
}
