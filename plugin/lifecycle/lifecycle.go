// Package lifecycle owns the goroutines that outlive a request: each is started
// with a name, can be waited for, and ends when the group is stopped.
package lifecycle

import (
	"context"
	"fmt"
	"runtime/debug"
	"sort"
	"strings"
	"sync"

	"github.com/containerd/log"
)

// Group is a set of named goroutines with one life.
type Group struct {
	ctx    context.Context
	cancel context.CancelCauseFunc

	mu      sync.Mutex
	running map[string]int
	idle    chan struct{} // closed by the last one to end after Stop
	stopped bool
}

// New returns a group whose goroutines see the values of ctx and end with Stop.
func New(ctx context.Context) *Group {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	return &Group{ctx: ctx, cancel: cancel, running: map[string]int{}, idle: make(chan struct{})}
}

// Context is the context of the group's goroutines, for subscriptions that
// outlive a request.
func (g *Group) Context() context.Context { return g.ctx }

// Go runs fn until it returns. The name says what it does and for whom; it is
// what Stop reports. After Stop it does nothing. A panic ends fn alone and is
// logged.
func (g *Group) Go(name string, fn func(context.Context)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stopped {
		return
	}
	g.running[name]++
	go func() {
		defer g.end(name)
		defer func() {
			if p := recover(); p != nil {
				log.G(g.ctx).WithField("goroutine", name).Errorf("panic: %v\n%s", p, debug.Stack())
			}
		}()
		fn(g.ctx)
	}()
}

func (g *Group) end(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.running[name]--; g.running[name] == 0 {
		delete(g.running, name)
	}
	if g.stopped && len(g.running) == 0 {
		close(g.idle)
	}
}

// Running lists the names of the goroutines that run, sorted.
func (g *Group) Running() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	names := make([]string, 0, len(g.running))
	for n := range g.running {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}

// Stop cancels every goroutine and waits for them; when ctx ends first it
// names the ones that are left. Only the first call does anything.
func (g *Group) Stop(ctx context.Context) error {
	g.mu.Lock()
	if g.stopped {
		g.mu.Unlock()
		return nil
	}
	g.stopped = true
	if len(g.running) == 0 {
		close(g.idle)
	}
	g.mu.Unlock()
	g.cancel(fmt.Errorf("shutting down: %w", context.Canceled))
	select {
	case <-g.idle:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stop: still running: %s: %w", strings.Join(g.Running(), ", "), context.Cause(ctx))
	}
}
