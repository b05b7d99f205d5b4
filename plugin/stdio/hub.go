package stdio

import (
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/crilog"
)

// hub hands the output of a container to the clients that are attached.
type hub struct {
	watching atomic.Int32

	mu      sync.Mutex
	clients map[*client]struct{}
	ended   bool
}

func newHub() *hub { return &hub{clients: map[*client]struct{}{}} }

// Watching implements crilog.Observer.
func (h *hub) Watching() bool { return h.watching.Load() > 0 }

// Observe implements crilog.Observer. It never blocks: one copy is shared by
// the queues of all clients.
func (h *hub) Observe(s crilog.Stream, p []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var shared []byte
	for c := range h.clients {
		if c.to[s] == nil || !c.admit(piece{data: p}.cost()) {
			continue
		}
		if shared == nil {
			shared = append(shared, p...)
		}
		c.push(piece{to: c.to[s], data: shared})
	}
}

// join adds a client that gets the output from now on.
func (h *hub) join(s Streams, b backlog) *client {
	c := &client{to: [2]io.Writer{s.Stdout, s.Stderr}, backlog: b, ready: make(chan struct{}, 1), gone: make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended {
		c.finish()
		return c
	}
	h.clients[c] = struct{}{}
	h.watching.Add(1)
	return c
}

// leave removes a client; what it has queued is dropped.
func (h *hub) leave(c *client) {
	h.mu.Lock()
	if _, ok := h.clients[c]; ok {
		delete(h.clients, c)
		h.watching.Add(-1)
	}
	h.mu.Unlock()
	c.drop(nil)
}

// finish tells the clients that nothing more will come.
func (h *hub) finish() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = true
	for c := range h.clients {
		c.finish()
	}
}

// piece is output on its way to a client.
type piece struct {
	to   io.Writer
	data []byte
}

// overhead is what a piece takes besides its data: many small ones take memory
// too.
const overhead = 64

// cost is what a piece takes of the limit.
func (p piece) cost() int { return len(p.data) + overhead }

// backlog is how far a client may be behind.
type backlog struct {
	// limit is how much may wait for it.
	limit int
	// stall is how long it may take nothing while as much waits.
	stall time.Duration
}

// client is one attached session. Output waits in its queue. Nothing waits for
// the client: what finds no room is left out, which its session ends by saying,
// and a client that takes nothing at all is dropped.
type client struct {
	backlog
	to    [2]io.Writer  // by stream, nil when not wanted
	ready chan struct{} // capacity 1: the queue changed
	gone  chan struct{} // closed when it was dropped

	mu      sync.Mutex
	queue   []piece
	size    int       // of the queue and of what is being written
	took    time.Time // when it last took something, or had nothing to take
	full    bool      // until half of the backlog is there
	leftOut uint64    // bytes that found no room
	ended   bool
	dropped bool
	err     error // why it was dropped
}

// admit reports whether there is room for a piece of that cost.
func (c *client) admit(cost int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	switch {
	case c.dropped:
		return false
	case c.size == 0:
		c.took, c.full = now, false
	case c.size <= c.limit/2:
		c.full = false
	}
	if !c.full && (c.size == 0 || c.size+cost <= c.limit) {
		return true
	}
	c.full = true
	c.leftOut += uint64(cost - overhead)
	if idle := now.Sub(c.took); idle >= c.stall {
		c.dropLocked(fmt.Errorf("the client has taken nothing for %s and is more than %d bytes behind: %w",
			idle.Round(time.Second), c.size, errdefs.ErrResourceExhausted))
	}
	return false
}

// push adds a piece that was admitted.
func (c *client) push(p piece) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue = append(c.queue, p)
	c.size += p.cost()
	c.signal()
}

// wrote says that the client has taken n bytes of the backlog.
func (c *client) wrote(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.size -= n
	c.took = time.Now()
}

func (c *client) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	c.signal()
}

func (c *client) drop(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropLocked(err)
}

func (c *client) dropLocked(err error) {
	if c.dropped {
		return
	}
	c.dropped, c.err = true, err
	c.queue = nil
	close(c.gone)
	c.signal()
}

func (c *client) signal() {
	select {
	case c.ready <- struct{}{}:
	default:
	}
}

// cause says why the client was dropped, or what it did not get.
func (c *client) cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil && c.leftOut > 0 {
		return fmt.Errorf("%d bytes of output were left out, as the client is slower than the container: %w", c.leftOut, errdefs.ErrDataLoss)
	}
	return c.err
}

// next waits for output, which counts as backlog until it was written. more is
// false when there will be none.
func (c *client) next() (p piece, more bool) {
	for {
		c.mu.Lock()
		switch {
		case c.dropped:
			c.mu.Unlock()
			return piece{}, false
		case len(c.queue) > 0:
			p = c.queue[0]
			c.queue[0] = piece{}
			c.queue = c.queue[1:]
			c.mu.Unlock()
			return p, true
		case c.ended:
			c.mu.Unlock()
			return piece{}, false
		}
		c.mu.Unlock()
		<-c.ready
	}
}

// writeStep is what a client takes at a time. It is small, so that one which is
// slow is seen to take something.
const writeStep = 8 << 10

// deliver writes output to the client until there is no more. It ends at the
// latest when the writers fail, which is the caller's to bring about.
func (c *client) deliver() error {
	for {
		p, more := c.next()
		if !more {
			return c.cause()
		}
		for step := range slices.Chunk(p.data, writeStep) {
			if _, err := p.to.Write(step); err != nil {
				return fmt.Errorf("write to client: %w", err)
			}
			c.wrote(len(step))
		}
		c.wrote(overhead)
	}
}
