package stdio

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"

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
		if c.to[s] == nil {
			continue
		}
		if shared == nil {
			shared = append(shared, p...)
		}
		c.push(piece{to: c.to[s], data: shared})
	}
}

// join adds a client that gets the output from now on.
func (h *hub) join(stdout, stderr io.Writer, limit int) *client {
	c := &client{to: [2]io.Writer{stdout, stderr}, limit: limit, ready: make(chan struct{}, 1), gone: make(chan struct{})}
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

// cost is what a piece takes of the limit: many small ones take memory too.
func (p piece) cost() int { return len(p.data) + 64 }

// client is one attached session. Output waits in its queue.
type client struct {
	to    [2]io.Writer // by stream, nil when not wanted
	limit int
	ready chan struct{} // capacity 1: the queue changed
	gone  chan struct{} // closed when it was dropped

	mu      sync.Mutex
	queue   []piece
	size    int
	ended   bool
	dropped bool
	err     error // why it was dropped
}

func (c *client) push(p piece) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dropped {
		return
	}
	if c.size+p.cost() > c.limit {
		c.dropLocked(fmt.Errorf("client is more than %d bytes behind: %w", c.limit, errdefs.ErrResourceExhausted))
		return
	}
	c.queue = append(c.queue, p)
	c.size += p.cost()
	c.signal()
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
	c.queue, c.size = nil, 0
	close(c.gone)
	c.signal()
}

func (c *client) signal() {
	select {
	case c.ready <- struct{}{}:
	default:
	}
}

// cause says why the client was dropped.
func (c *client) cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// next waits for output. more is false when there will be none.
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
			c.size -= p.cost()
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

// deliver writes output to the client until there is no more. It ends at the
// latest when the writers fail, which is the caller's to bring about.
func (c *client) deliver() error {
	for {
		p, more := c.next()
		if !more {
			return c.cause()
		}
		if _, err := p.to.Write(p.data); err != nil {
			return fmt.Errorf("write to client: %w", err)
		}
	}
}
