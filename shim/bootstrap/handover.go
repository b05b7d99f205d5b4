package bootstrap

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"

	"github.com/gantry-cri/gantry/shim/task"
)

// handOverLimit is how long what has begun may take before a supervisor ends that
// hands over.
const handOverLimit = 30 * time.Second

// gate counts the requests that are under way, and once closed holds further ones
// until the process ends. Whoever waits for the end of something does not count.
type gate struct {
	mu     sync.Mutex
	busy   int
	closed bool
	quiet  chan struct{} // closed when it is closed and nothing is under way
}

func newGate() *gate { return &gate{quiet: make(chan struct{})} }

// intercept is task.Intercept behind the gate.
func (g *gate) intercept(ctx context.Context, u ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
	if !strings.HasSuffix(info.FullMethod, "/Wait") && !strings.HasSuffix(info.FullMethod, "/WaitSandbox") {
		if !g.enter() {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		defer g.leave()
	}
	return task.Intercept(ctx, u, info, m)
}

func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.busy++
	return true
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.busy--; g.busy == 0 && g.closed {
		close(g.quiet)
	}
}

// close returns when nothing is under way any more, or after the limit.
func (g *gate) close(ctx context.Context) {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return
	}
	g.closed = true
	if g.busy == 0 {
		close(g.quiet)
	}
	g.mu.Unlock()
	timer := time.NewTimer(handOverLimit)
	defer timer.Stop()
	select {
	case <-g.quiet:
	case <-timer.C:
		log.G(ctx).Warn("the supervisor hands over while a request is under way")
	}
}
