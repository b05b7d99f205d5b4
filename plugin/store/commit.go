package store

import (
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
)

// committer joins writes that arrive while a transaction is being synced into
// the next one: a burst of pods then costs a few syncs, not some per pod.
type committer struct {
	update func(func(*bolt.Tx) error) error

	mu      sync.Mutex
	waiting []*write
	busy    bool
	flush   *time.Timer // set while a write without a writer may wait
}

// patience is how long a write that nobody waits for may stay undone.
const patience = time.Second

type write struct {
	apply func(*bolt.Tx) error
	done  chan error
	turn  chan struct{} // gets a value when this writer is to commit
	// failed is set for a write that nobody waits for.
	failed func(error)
	ended  bool
}

// end tells the result; only the first call does anything.
func (w *write) end(err error) {
	if w.ended {
		return
	}
	w.ended = true
	w.done <- err
	if err != nil && w.failed != nil {
		w.failed(err)
	}
}

// do returns when apply is durable or has failed. apply may run more than once,
// of which at most one is committed.
func (c *committer) do(apply func(*bolt.Tx) error) error {
	w := &write{apply: apply, done: make(chan error, 1), turn: make(chan struct{}, 1)}
	c.mu.Lock()
	c.waiting = append(c.waiting, w)
	if !c.busy {
		c.busy = true
		w.turn <- struct{}{}
	}
	c.mu.Unlock()
	select {
	case err := <-w.done:
		return err
	case <-w.turn:
	}
	c.lead()
	return <-w.done
}

// later has apply done with the next write, or by itself after a while. failed
// is told if it could not be.
func (c *committer) later(apply func(*bolt.Tx) error, failed func(error)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting = append(c.waiting, &write{apply: apply, done: make(chan error, 1), turn: make(chan struct{}, 1), failed: failed})
	if c.flush == nil {
		c.flush = time.AfterFunc(patience, func() {
			c.mu.Lock()
			c.flush = nil
			c.mu.Unlock()
			// Commits what waits; by itself it does nothing.
			_ = c.do(func(*bolt.Tx) error { return nil })
		})
	}
}

// lead commits everything that waits, the caller's own write included, and
// passes the turn on. A panic is an error to all whom it left without an answer:
// the caller leads for others, who would wait for ever.
func (c *committer) lead() {
	c.mu.Lock()
	batch := c.waiting
	c.waiting = nil
	c.mu.Unlock()
	defer c.pass()
	defer func() {
		if p := recover(); p != nil {
			log.L.Errorf("panic in a transaction: %v\n%s", p, debug.Stack())
			for _, w := range batch {
				w.end(fmt.Errorf("panic in a transaction: %v: %w", p, errdefs.ErrInternal))
			}
		}
	}()
	c.commit(batch)
}

// pass gives the turn to the first of those that came meanwhile.
func (c *committer) pass() {
	c.mu.Lock()
	defer c.mu.Unlock()
	// A write that nobody waits for cannot lead; it goes with the next.
	for _, w := range c.waiting {
		if w.failed == nil {
			w.turn <- struct{}{}
			return
		}
	}
	c.busy = false
}

var errAlone = errors.New("a write of the batch failed")

// commit makes one transaction of the batch. A write that fails would take the
// others with it, so then each gets a transaction of its own.
func (c *committer) commit(batch []*write) {
	if len(batch) > 1 {
		err := c.update(func(tx *bolt.Tx) error {
			for _, w := range batch {
				if w.apply(tx) != nil {
					return errAlone
				}
			}
			return nil
		})
		if !errors.Is(err, errAlone) {
			for _, w := range batch {
				w.end(err)
			}
			return
		}
	}
	for _, w := range batch {
		w.end(c.update(w.apply))
	}
}
