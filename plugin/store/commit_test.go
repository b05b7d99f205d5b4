package store

import (
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// A write that panics fails by itself or with those that share its
// transaction; the ones after it are done.
func TestPanicHoldsUpNobody(t *testing.T) {
	var busy sync.Mutex // the database's own lock
	c := &committer{update: func(apply func(*bolt.Tx) error) error {
		busy.Lock()
		defer busy.Unlock()
		return apply(nil)
	}}
	fine := func(*bolt.Tx) error { return nil }
	broken := func(*bolt.Tx) error { panic("broken") }
	results := make(chan error)
	do := func(apply func(*bolt.Tx) error) {
		go func() { results <- c.do(apply) }()
	}
	next := func() error {
		t.Helper()
		select {
		case err := <-results:
			return err
		case <-time.After(10 * time.Second):
			t.Fatal("a write waits for ever")
			return nil
		}
	}
	do(broken)
	if err := next(); !errdefs.IsInternal(err) {
		t.Errorf("the write that panics: %v, want an internal error", err)
	}
	do(fine)
	if err := next(); err != nil {
		t.Errorf("the write after it: %v", err)
	}

	// While one write is in the database, others gather and then share a turn.
	entered, goOn := make(chan struct{}), make(chan struct{})
	do(func(*bolt.Tx) error { close(entered); <-goOn; return nil })
	<-entered
	do(broken)
	do(fine)
	told := make(chan error, 1)
	c.later(broken, func(err error) { told <- err })
	for c.count() < 3 {
		time.Sleep(time.Millisecond)
	}
	close(goOn)
	failed := 0
	for range 3 {
		if err := next(); err != nil {
			failed++
		}
	}
	if failed == 0 {
		t.Error("no write of the batch failed")
	}
	if err := <-told; err == nil {
		t.Error("the write that nobody waits for did not fail")
	}
	do(fine)
	if err := next(); err != nil {
		t.Errorf("the write after the batch: %v", err)
	}
}

func (c *committer) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.waiting)
}
