package network

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// sweepGrace is how long a pod waits for a running CNI GC before it ends it.
const sweepGrace = 3 * time.Second

// gate keeps the order that the CNI specification asks for: never two calls
// for the same container, and no ADD or DEL while a GC runs. Whoever waits,
// waits on his own context, so nobody waits for another pod.
type gate struct {
	mu    sync.Mutex
	busy  map[string]chan struct{} // by container; closed when it is let go
	idle  chan struct{}            // closed when busy gets empty; nil if nobody waits
	sweep *sweep                   // the GC in progress
}

type sweep struct {
	done   chan struct{}
	cancel context.CancelCauseFunc
}

// enter waits until nothing else is done for the container and returns the
// function that lets it go.
func (g *gate) enter(ctx context.Context, id string) (func(), error) {
	for {
		wait, sw := g.tryEnter(id)
		if wait == nil {
			return func() { g.leave(id) }, nil
		}
		if err := await(ctx, wait, sw); err != nil {
			return nil, fmt.Errorf("wait for an earlier call for %s: %w", id, err)
		}
	}
}

// tryEnter takes the container, or returns what to wait for.
func (g *gate) tryEnter(id string) (<-chan struct{}, *sweep) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.sweep != nil {
		return g.sweep.done, g.sweep
	}
	if c, ok := g.busy[id]; ok {
		return c, nil
	}
	if g.busy == nil {
		g.busy = map[string]chan struct{}{}
	}
	g.busy[id] = make(chan struct{})
	return nil, nil
}

// await waits for c. A GC that is in the way is ended after a while: it comes
// again, and a pod should not pay for a plugin whose GC hangs.
func await(ctx context.Context, c <-chan struct{}, sw *sweep) error {
	var impatient <-chan time.Time
	if sw != nil {
		t := time.NewTimer(sweepGrace)
		defer t.Stop()
		impatient = t.C
	}
	for {
		select {
		case <-c:
			return nil
		case <-impatient:
			sw.cancel(fmt.Errorf("a pod waits: %w", context.Canceled))
			impatient = nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (g *gate) leave(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.busy[id])
	delete(g.busy, id)
	if len(g.busy) == 0 && g.idle != nil {
		close(g.idle)
		g.idle = nil
	}
}

// alone waits for a moment in which no container is taken and keeps all out
// until the returned function is called. The returned context ends when a pod
// is tired of waiting.
func (g *gate) alone(ctx context.Context) (context.Context, func(), error) {
	for {
		wait, sw, swCtx := g.tryAlone(ctx)
		if wait == nil {
			return swCtx, func() { g.endSweep(sw) }, nil
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("wait for a moment without plugin calls: %w", context.Cause(ctx))
		}
	}
}

func (g *gate) tryAlone(ctx context.Context) (<-chan struct{}, *sweep, context.Context) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.sweep != nil {
		return g.sweep.done, nil, nil
	}
	if len(g.busy) > 0 {
		if g.idle == nil {
			g.idle = make(chan struct{})
		}
		return g.idle, nil, nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	g.sweep = &sweep{done: make(chan struct{}), cancel: cancel}
	return nil, g.sweep, ctx
}

func (g *gate) endSweep(sw *sweep) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sweep = nil
	sw.cancel(nil)
	close(sw.done)
}
