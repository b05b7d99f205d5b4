package flight

import (
	"context"
	"sync"
)

// Turns lets operations on one thing happen one after the other, and those on
// different things side by side. The zero value is ready to use.
type Turns[K comparable] struct {
	mu    sync.Mutex
	turns map[K]*turn
}

type turn struct {
	token chan struct{} // holds a value while it is nobody's turn
	users int           // guarded by Turns.mu; holders and waiters
}

// Take waits for the turn at key and returns the function that ends it, or the
// cause of ctx's end.
func (t *Turns[K]) Take(ctx context.Context, key K) (done func(), err error) {
	tn := t.enter(key)
	select {
	case <-tn.token:
		return func() {
			tn.token <- struct{}{}
			t.exit(key, tn)
		}, nil
	case <-ctx.Done():
		t.exit(key, tn)
		return nil, context.Cause(ctx)
	}
}

func (t *Turns[K]) enter(key K) *turn {
	t.mu.Lock()
	defer t.mu.Unlock()
	tn, ok := t.turns[key]
	if !ok {
		tn = &turn{token: make(chan struct{}, 1)}
		tn.token <- struct{}{}
		if t.turns == nil {
			t.turns = map[K]*turn{}
		}
		t.turns[key] = tn
	}
	tn.users++
	return tn
}

func (t *Turns[K]) exit(key K, tn *turn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if tn.users--; tn.users == 0 {
		delete(t.turns, key)
	}
}
