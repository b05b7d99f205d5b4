package store

import (
	"errors"
	"sync"

	bolt "go.etcd.io/bbolt"
)

// committer joins writes that arrive while a transaction is being synced into
// the next one: a burst of pods then costs a few syncs, not some per pod.
type committer struct {
	update func(func(*bolt.Tx) error) error

	mu      sync.Mutex
	waiting []*write
	busy    bool
}

type write struct {
	apply func(*bolt.Tx) error
	done  chan error
	turn  chan struct{} // gets a value when this writer is to commit
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

// lead commits everything that waits, the caller's own write included, and
// passes the turn to the first of those that came meanwhile.
func (c *committer) lead() {
	c.mu.Lock()
	batch := c.waiting
	c.waiting = nil
	c.mu.Unlock()
	c.commit(batch)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy = len(c.waiting) > 0; c.busy {
		c.waiting[0].turn <- struct{}{}
	}
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
				w.done <- err
			}
			return
		}
	}
	for _, w := range batch {
		w.done <- c.update(w.apply)
	}
}
