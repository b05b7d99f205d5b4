// Package flight runs one operation for all callers that ask for the same
// thing at the same time.
//
// The operation belongs to no caller: it runs on a context of its own, keeps
// going when a caller leaves, and each caller gets its result or, when its own
// context ends first, an error that says what the operation is doing. When the
// last caller has left and none comes back within the linger time, the
// operation's context is cancelled.
package flight

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// Forever as linger lets an operation run to its end whoever leaves.
const Forever time.Duration = -1

// Group runs operations by key. The zero value is ready to use.
type Group[K comparable, V any] struct {
	// Linger is how long an operation goes on after its last caller left.
	Linger time.Duration

	mu    sync.Mutex
	calls map[K]*call[V]
	wg    sync.WaitGroup
}

type call[V any] struct {
	done    chan struct{}
	val     V
	err     error
	cancel  context.CancelCauseFunc
	callers int         // guarded by Group.mu
	expiry  *time.Timer // guarded by Group.mu; set while there is no caller
	dying   bool        // guarded by Group.mu; cancelled because nobody came back
}

// Do returns the result of fn, starting it unless an operation with this key
// runs already. fn gets the values of the first caller's ctx but not its
// cancellation. A panic in fn is returned as an error to every caller.
//
// When ctx ends first, Do returns context.Cause(ctx); the operation goes on.
func (g *Group[K, V]) Do(ctx context.Context, key K, fn func(context.Context) (V, error)) (V, error) {
	for {
		c, joined := g.join(ctx, key, fn)
		select {
		case <-c.done:
		case <-ctx.Done():
		}
		if joined {
			g.leave(c)
		}
		select {
		case <-c.done: // worth more than an end of ctx at the same moment
			if joined {
				return c.val, c.err
			}
		default:
			var zero V
			return zero, context.Cause(ctx)
		}
	}
}

// Wait blocks until every operation has ended.
func (g *Group[K, V]) Wait() { g.wg.Wait() }

// join returns the operation for key and whether the caller now takes part in
// it. An operation that is being cancelled takes nobody: wait for its end.
func (g *Group[K, V]) join(ctx context.Context, key K, fn func(context.Context) (V, error)) (*call[V], bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c, ok := g.calls[key]; ok {
		if c.dying {
			return c, false
		}
		c.callers++
		if c.expiry != nil {
			c.expiry.Stop()
			c.expiry = nil
		}
		return c, true
	}
	opCtx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	c := &call[V]{done: make(chan struct{}), cancel: cancel, callers: 1}
	if g.calls == nil {
		g.calls = map[K]*call[V]{}
	}
	g.calls[key] = c
	g.wg.Add(1)
	go func() {
		defer g.wg.Done()
		defer cancel(nil)
		c.val, c.err = protect(opCtx, fn)
		g.mu.Lock()
		delete(g.calls, key)
		if c.expiry != nil {
			c.expiry.Stop()
		}
		g.mu.Unlock()
		close(c.done)
	}()
	return c, true
}

func (g *Group[K, V]) leave(c *call[V]) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c.callers--
	if c.callers > 0 || g.Linger == Forever {
		return
	}
	c.expiry = time.AfterFunc(g.Linger, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if c.callers == 0 {
			c.dying = true
			c.cancel(fmt.Errorf("every caller left: %w", context.Canceled))
		}
	})
}

func protect[V any](ctx context.Context, fn func(context.Context) (V, error)) (v V, err error) {
	defer func() {
		if p := recover(); p != nil {
			log.G(ctx).Errorf("panic: %v\n%s", p, debug.Stack())
			err = fmt.Errorf("panic: %v: %w", p, errdefs.ErrInternal)
		}
	}()
	return fn(ctx)
}
