package pool

import (
	"io"
	"sync"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/log"
)

// linkLinger is how long a connection stays open that nobody uses any more: where
// one pod goes, the next one often comes.
const linkLinger = time.Second

// links are the connections to shims that serve many tasks: one to each address,
// which is closed a moment after its last user has gone. Of one that closes by
// itself all users hear.
type links struct {
	mu sync.Mutex
	by map[string]*link
}

// link is one connection. What is in it is guarded by the links' mu.
type link struct {
	raw   io.Closer
	users map[chan struct{}]bool
	idle  *time.Timer // while there are no users
}

func newLinks() *links { return &links{by: map[string]*link{}} }

// take returns the client of the connection to an address, a channel that is
// closed when the connection is or release was called, and release.
func (l *links) take(params *bootapi.BootstrapResult) (raw any, closed <-chan struct{}, release func(), err error) {
	address := params.GetAddress()
	k, user := l.join(address, nil)
	if k == nil {
		c, broken, err := dial(params)
		if err != nil {
			return nil, nil, nil, err
		}
		k, user = l.join(address, &link{raw: c, users: map[chan struct{}]bool{}})
		if k.raw != c { // somebody was faster
			if err := c.Close(); err != nil {
				return nil, nil, nil, err
			}
		} else {
			// It ends with the connection.
			go func() {
				<-broken
				l.broke(address, k)
			}()
		}
	}
	return k.raw, user, func() { l.leave(address, k, user) }, nil
}

// join adds a user to the link to an address, which is next if there is none.
func (l *links) join(address string, next *link) (*link, chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.by[address]
	if k == nil {
		if k = next; k == nil {
			return nil, nil
		}
		l.by[address] = k
	}
	if k.idle != nil {
		k.idle.Stop()
		k.idle = nil
	}
	user := make(chan struct{})
	k.users[user] = true
	return k, user
}

// has reports whether there is a connection to an address.
func (l *links) has(address string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.by[address] != nil
}

func (l *links) leave(address string, k *link, user chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !k.users[user] {
		return
	}
	delete(k.users, user)
	close(user)
	if len(k.users) == 0 {
		k.idle = time.AfterFunc(linkLinger, func() { l.expire(address, k) })
	}
}

// expire closes a connection that still has no user. Its closing ends it here too.
func (l *links) expire(address string, k *link) {
	l.mu.Lock()
	if len(k.users) > 0 || l.by[address] != k {
		l.mu.Unlock()
		return
	}
	delete(l.by, address)
	l.mu.Unlock()
	if err := k.raw.Close(); err != nil {
		log.L.WithError(err).Debug("close the connection to a shim that nobody uses")
	}
}

func (l *links) broke(address string, k *link) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.by[address] == k {
		delete(l.by, address)
	}
	for user := range k.users {
		close(user)
	}
	clear(k.users)
}

// broken tells whether the connection has closed.
func (c *connection) broken() bool {
	select {
	case <-c.closed:
		return true
	default:
		return false
	}
}
