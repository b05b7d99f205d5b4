package stats

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/record"
)

// kills learns of processes that the kernel killed for want of memory while
// their cgroup is there. Where systemd makes the cgroups it removes that of a
// container the moment the last process ended, and the book with it. Version 2
// tells when the book changes, so it is read at once.
type kills struct {
	inotify *os.File // nil on version 1, or when err says why
	err     error

	mu      sync.Mutex
	watches map[int32]string // ID by watch
	follows map[string]follow
}

// follow is what was last read about a container.
type follow struct {
	watch int32
	group string
	oomed bool
}

func newKills(v2 bool) *kills {
	k := &kills{watches: map[int32]string{}, follows: map[string]follow{}}
	if !v2 {
		return k
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		k.err = fmt.Errorf("watch cgroups: %w", err)
		return k
	}
	k.inotify = os.NewFile(uintptr(fd), "inotify")
	return k
}

// Follow begins to look out for processes of the container that are killed for
// want of memory. The cgroup must be there; OOMKilled tells, and Forget ends it.
func (s *Stats) Follow(c record.Container) error {
	if s.kills.inotify == nil {
		return s.kills.err
	}
	group, err := s.group(c.ID, c.Spec)
	if err != nil {
		return fmt.Errorf("follow container: %w", err)
	}
	if err := s.kills.add(c.ID, group, filepath.Join(below(s.books.memory, group), memoryEvents)); err != nil {
		return fmt.Errorf("follow container: %w", err)
	}
	s.look(c.ID) // what was before the watch
	return nil
}

// Forget ends what Follow began. It is idempotent.
func (s *Stats) Forget(id string) { s.kills.remove(id) }

// Run reads the books that change until ctx ends.
func (s *Stats) Run(ctx context.Context) error {
	if s.kills.inotify == nil {
		return s.kills.err
	}
	stop := context.AfterFunc(ctx, func() { s.kills.inotify.Close() })
	defer stop()
	buf := make([]byte, 64*(unix.SizeofInotifyEvent+unix.NAME_MAX+1))
	for {
		n, err := s.kills.inotify.Read(buf)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("watch cgroups: %w", err)
		}
		for _, id := range s.kills.changed(buf[:n]) {
			s.look(id)
		}
	}
}

// look reads the book of a container that is followed.
func (s *Stats) look(id string) {
	f, ok := s.kills.get(id)
	if !ok {
		return
	}
	if oomed, err := s.books.oomed(f.group); err == nil && oomed {
		s.kills.note(id)
	}
}

func (k *kills) add(id, group, file string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	wd := -1
	err := k.control(func(fd int) (err error) {
		wd, err = unix.InotifyAddWatch(fd, file, unix.IN_MODIFY)
		return err
	})
	if err != nil {
		return &os.PathError{Op: "watch", Path: file, Err: err}
	}
	k.watches[int32(wd)] = id
	k.follows[id] = follow{watch: int32(wd), group: group}
	return nil
}

func (k *kills) remove(id string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f, ok := k.follows[id]
	if !ok {
		return
	}
	delete(k.follows, id)
	delete(k.watches, f.watch)
	// It fails when the kernel has dropped the watch with the cgroup.
	_ = k.control(func(fd int) error {
		_, err := unix.InotifyRmWatch(fd, uint32(f.watch))
		return err
	})
}

// control calls f with the descriptor, which stays open meanwhile.
func (k *kills) control(f func(fd int) error) error {
	conn, err := k.inotify.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = conn.Control(func(fd uintptr) { failed = f(int(fd)) })
	return errors.Join(err, failed)
}

func (k *kills) get(id string) (follow, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f, ok := k.follows[id]
	return f, ok
}

func (k *kills) note(id string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if f, ok := k.follows[id]; ok {
		f.oomed = true
		k.follows[id] = f
	}
}

// changed names the containers that the events are about: all of them when the
// kernel dropped some.
func (k *kills) changed(events []byte) (ids []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events))
		mask, length := binary.NativeEndian.Uint32(events[4:]), binary.NativeEndian.Uint32(events[12:])
		events = events[min(len(events), unix.SizeofInotifyEvent+int(length)):]
		if mask&unix.IN_Q_OVERFLOW != 0 {
			ids = ids[:0]
			for id := range k.follows {
				ids = append(ids, id)
			}
			return ids
		}
		if id, ok := k.watches[wd]; ok {
			ids = append(ids, id)
		}
	}
	return ids
}

// OOMKilled reports whether the kernel killed a process of the container for
// want of memory: the container's, the pod's or the machine's. When the cgroup
// is gone the answer is what Follow saw of it, and no if that is nothing.
func (s *Stats) OOMKilled(c record.Container) (bool, error) {
	group, err := s.group(c.ID, c.Spec)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	killed, err := s.books.oomKills(group)
	if errors.Is(err, fs.ErrNotExist) {
		f, _ := s.kills.get(c.ID)
		return f.oomed, nil
	}
	return killed > 0, err
}
