package stats

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// alarms does on version 1 what kills does on version 2. The kernel tells of want
// of memory in a group, or in one above it, before it kills a process, and once
// more when the group is removed; it does not say which of both it was.
type alarms struct {
	mu      sync.Mutex
	follows map[string]*alarm
}

type alarm struct {
	dir    string
	events *os.File
	rung   time.Time // when memory was short, zero for not of late
	killed bool      // the group's book says so
}

// add follows a container whose cgroup in the hierarchy of memory is dir.
func (a *alarms) add(id, dir string) error {
	events, err := registerAlarm(dir)
	if err != nil {
		return err
	}
	a.mu.Lock()
	old := a.follows[id]
	f := &alarm{dir: dir, events: events}
	a.follows[id] = f
	a.mu.Unlock()
	if old != nil {
		old.events.Close()
	}
	go a.listen(f)
	return nil
}

// registerAlarm returns a counter of the events.
func registerAlarm(dir string) (*os.File, error) {
	book, err := os.Open(filepath.Join(dir, "memory.oom_control"))
	if err != nil {
		return nil, err
	}
	defer book.Close()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make event counter: %w", err)
	}
	events := os.NewFile(uintptr(fd), "oom events of "+dir)
	line := fmt.Sprintf("%d %d", fd, book.Fd())
	if err := os.WriteFile(filepath.Join(dir, "cgroup.event_control"), []byte(line), 0); err != nil {
		events.Close()
		return nil, err
	}
	return events, nil
}

// listen takes events until the container is forgotten.
func (a *alarms) listen(f *alarm) {
	var buf [8]byte
	for gone := uint64(0); ; {
		if _, err := f.events.Read(buf[:]); err != nil {
			return // forgotten
		}
		if _, err := os.Stat(f.dir); err != nil {
			// One of the events is the removal.
			if gone += binary.NativeEndian.Uint64(buf[:]); gone > 1 {
				a.ring(f, time.Now())
			}
			continue
		}
		now := time.Now()
		a.ring(f, now)
		time.AfterFunc(settled, func() {
			if kills, err := oomKillsV1(f.dir); err == nil {
				a.settle(f, now, kills > 0)
			}
		})
	}
}

func (a *alarms) ring(f *alarm, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f.rung = now
}

// settle ends what ring noted then, unless memory was short again since, and notes
// what the book says: it may go with the group before anybody asks.
func (a *alarms) settle(f *alarm, then time.Time, killed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f.killed = f.killed || killed
	if f.rung.Equal(then) {
		f.rung = time.Time{}
	}
}

// killed reports whether a process of the container was killed, or its group went
// when memory was short.
func (a *alarms) killed(id string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	f := a.follows[id]
	return f != nil && (f.killed || !f.rung.IsZero())
}

func (a *alarms) remove(id string) {
	a.mu.Lock()
	f := a.follows[id]
	delete(a.follows, id)
	a.mu.Unlock()
	if f != nil {
		f.events.Close()
	}
}
