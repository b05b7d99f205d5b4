package image

import (
	"context"
	"sync"
)

// keyedLock lets one holder at a time have a key: a blob being fetched or a
// layer being unpacked, so that others wait for it instead of doing it again.
// The zero value is ready to use.
type keyedLock struct {
	mu    sync.Mutex
	slots map[string]*slot
}

type slot struct {
	held chan struct{} // holds one value while the key is free
	refs int           // guarded by keyedLock.mu: the holder and who waits
}

// lock waits for the key or the end of ctx.
func (l *keyedLock) lock(ctx context.Context, key string) error {
	l.mu.Lock()
	s, ok := l.slots[key]
	if !ok {
		if l.slots == nil {
			l.slots = map[string]*slot{}
		}
		s = &slot{held: make(chan struct{}, 1)}
		s.held <- struct{}{}
		l.slots[key] = s
	}
	s.refs++
	l.mu.Unlock()
	select {
	case <-s.held:
		return nil
	case <-ctx.Done():
		l.drop(key, s)
		return context.Cause(ctx)
	}
}

// unlock gives the key to the next who waits.
func (l *keyedLock) unlock(key string) {
	l.mu.Lock()
	s := l.slots[key]
	l.mu.Unlock()
	s.held <- struct{}{}
	l.drop(key, s)
}

func (l *keyedLock) drop(key string, s *slot) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.refs--; s.refs == 0 {
		delete(l.slots, key)
	}
}
