// Package sandboxertest has sandboxes in memory and the contract that every
// sandboxer keeps.
//
// Fake behaves as the real ones do, shows what is still alive and what was not
// released, and fails where a test says. Start reading at Fake; Suite is the
// contract.
package sandboxertest

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Fault makes a call fail.
type Fault struct {
	// Op is start, wait, stop, shutdown, alive or namespaces; ID the sandbox, "" for any.
	Op, ID string
	// Nth is which such call from now on fails, from 1; 0 for every one.
	Nth int
	// After lets the call take effect before it fails.
	After bool
	Err   error
}

// Call is one call that was made.
type Call struct{ Op, ID string }

// Fake is a sandboxer.Sandboxer.
type Fake struct {
	mu     sync.Mutex
	pids   uint32
	all    map[string]*instance
	faults []*Fault
	calls  []Call
}

type instance struct {
	netns string
	done  chan struct{}
	exit  record.Exit // valid when done is closed
}

func (i *instance) alive() bool {
	select {
	case <-i.done:
		return false
	default:
		return true
	}
}

// end is called with the lock held.
func (i *instance) end(code uint32) {
	if i.alive() {
		i.exit = record.Exit{Code: code, At: time.Now()}
		close(i.done)
	}
}

// New returns a sandboxer without sandboxes.
func New() *Fake { return &Fake{all: map[string]*instance{}} }

// Inject adds a fault.
func (f *Fake) Inject(fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, &fault)
}

// Heal removes every fault.
func (f *Fake) Heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = nil
}

// Calls lists the calls made so far.
func (f *Fake) Calls() []Call {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// Running lists the sandboxes whose process lives.
func (f *Fake) Running() []string { return f.list((*instance).alive) }

// Held lists the sandboxes of which something has not been released.
func (f *Fake) Held() []string { return f.list(func(*instance) bool { return true }) }

func (f *Fake) list(want func(*instance) bool) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var ids []string
	for id, i := range f.all {
		if want(i) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// NetNS returns the network namespace that a sandbox was started in.
func (f *Fake) NetNS(id string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i := f.all[id]; i != nil {
		return i.netns
	}
	return ""
}

// Exit ends a sandbox's process by itself.
func (f *Fake) Exit(id string, code uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i := f.all[id]; i != nil {
		i.end(code)
	}
}

// Lose kills a sandbox together with its shim: the runtime forgets it, and
// those who wait hear of an end that nobody saw.
func (f *Fake) Lose(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i := f.all[id]; i != nil {
		i.end(137)
		delete(f.all, id)
	}
}

func (f *Fake) call(op, id string, effect func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, Call{op, id})
	if err := f.fault(op, id, false); err != nil {
		return err
	}
	if err := effect(); err != nil {
		return err
	}
	return f.fault(op, id, true)
}

// fault is called with the lock held.
func (f *Fake) fault(op, id string, after bool) error {
	for _, x := range f.faults {
		if x.Op != op || x.ID != "" && x.ID != id || x.After != after || x.Nth < 0 {
			continue
		}
		if x.Nth == 0 {
			return x.Err
		}
		if x.Nth--; x.Nth == 0 {
			x.Nth = -1 // spent
			return x.Err
		}
	}
	return nil
}

// Start implements sandboxer.Sandboxer.
func (f *Fake) Start(_ context.Context, sb record.Sandbox) (inst record.Instance, err error) {
	err = f.call("start", sb.ID, func() error {
		if f.all[sb.ID] != nil {
			return fmt.Errorf("start sandbox %s: %w", sb.ID, errdefs.ErrAlreadyExists)
		}
		f.pids++
		f.all[sb.ID] = &instance{netns: sb.Network.NetNS, done: make(chan struct{})}
		inst = record.Instance{Pid: 1000 + f.pids, StartedAt: time.Now()}
		return nil
	})
	if err != nil {
		return record.Instance{}, err
	}
	return inst, nil
}

// Wait implements sandboxer.Sandboxer.
func (f *Fake) Wait(ctx context.Context, sb record.Sandbox) (<-chan record.Exit, error) {
	var i *instance
	err := f.call("wait", sb.ID, func() error {
		if i = f.all[sb.ID]; i == nil {
			return fmt.Errorf("watch sandbox %s: %w", sb.ID, errdefs.ErrNotFound)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	exits := make(chan record.Exit, 1)
	go func() {
		defer close(exits)
		select {
		case <-i.done:
			exits <- i.exit
		case <-ctx.Done():
		}
	}()
	return exits, nil
}

// Stop implements sandboxer.Sandboxer.
func (f *Fake) Stop(_ context.Context, sb record.Sandbox) error {
	return f.call("stop", sb.ID, func() error {
		if i := f.all[sb.ID]; i != nil {
			i.end(137)
		}
		return nil
	})
}

// Shutdown implements sandboxer.Sandboxer.
func (f *Fake) Shutdown(_ context.Context, sb record.Sandbox) error {
	return f.call("shutdown", sb.ID, func() error {
		if i := f.all[sb.ID]; i != nil {
			i.end(137)
			delete(f.all, sb.ID)
		}
		return nil
	})
}

// Namespaces implements sandboxer.Sandboxer. A sandbox that runs has one, which is
// that of this process.
func (f *Fake) Namespaces(_ context.Context, sb record.Sandbox) (paths map[string]string, err error) {
	err = f.call("namespaces", sb.ID, func() error {
		if i := f.all[sb.ID]; i == nil || !i.alive() {
			return fmt.Errorf("sandbox %s: %w", sb.ID, errdefs.ErrNotFound)
		}
		paths = map[string]string{"uts": "/proc/self/ns/uts"}
		return nil
	})
	return paths, err
}

// Alive implements sandboxer.Sandboxer.
func (f *Fake) Alive(_ context.Context, sb record.Sandbox) (alive bool, err error) {
	err = f.call("alive", sb.ID, func() error {
		i := f.all[sb.ID]
		alive = i != nil && i.alive()
		return nil
	})
	return alive && err == nil, err
}
