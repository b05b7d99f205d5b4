package bootstrap

import (
	"context"
	"runtime"
	"testing"

	"github.com/containerd/ttrpc"
)

// A closed gate lets nothing in, and is closed when what was inside has left. Who
// waits for the end of something is not inside.
func TestGate(t *testing.T) {
	g := newGate()
	call := func(ctx context.Context, method string, m ttrpc.Method) <-chan error {
		done := make(chan error, 1)
		go func() {
			_, err := g.intercept(ctx, nil, &ttrpc.UnaryServerInfo{FullMethod: method}, m)
			done <- err
		}()
		return done
	}
	begun, let := make(chan struct{}), make(chan struct{})
	held := func(ctx context.Context, _ func(any) error) (any, error) {
		begun <- struct{}{}
		<-let
		return nil, ctx.Err()
	}
	create := call(t.Context(), "/containerd.task.v3.Task/Create", held)
	wait := call(t.Context(), "/containerd.task.v3.Task/Wait", held)
	<-begun
	<-begun
	closed := make(chan struct{})
	go func() {
		g.close(t.Context())
		close(closed)
	}()
	for g.enter() { // until it is closed
		g.leave()
		runtime.Gosched()
	}
	late, cancel := context.WithCancel(t.Context())
	refused := call(late, "/containerd.task.v3.Task/Start", func(context.Context, func(any) error) (any, error) {
		t.Error("a request came in")
		return nil, nil
	})
	select {
	case <-closed:
		t.Error("it is closed while a request is under way")
	default:
	}
	let <- struct{}{} // either: the one that waits does not count
	let <- struct{}{}
	if err := <-create; err != nil {
		t.Error(err)
	}
	if err := <-wait; err != nil {
		t.Error(err)
	}
	<-closed
	cancel()
	if err := <-refused; err == nil {
		t.Error("a request was answered")
	}
}
