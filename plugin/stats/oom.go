package stats

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/record"
)

// kills learns of processes that the kernel killed for want of memory while
// their cgroup is there. Where systemd makes the cgroups it removes that of a
// container the moment the last process ended, and the book with it. Version 2
// tells when the book changes, so it is read at once. It tells nobody when the
// book goes soon after: then the pod's book, which stays, has one kill more.
type kills struct {
	inotify *os.File // nil on version 1, or when err says why
	err     error

	mu      sync.Mutex
	watches map[int32]string // the ID of a container or the cgroup of a pod
	follows map[string]follow
	pods    map[string]*podBook // by cgroup
}

// follow is what was last read about a container.
type follow struct {
	watch int32
	group string
	oomed bool
	rung  time.Time // when the pod's book counted a kill, zero for not of late
}

// podBook is what was last read about a pod with containers that are followed.
type podBook struct {
	watch int32
	kills uint64
	ids   map[string]bool
}

// settled is how long after want of memory in its pod a container that is still
// there was not meant.
const settled = time.Second

func newKills(v2 bool) *kills {
	k := &kills{watches: map[int32]string{}, follows: map[string]follow{}, pods: map[string]*podBook{}}
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
	if s.kills.err != nil || s.books.memory == "" {
		return s.kills.err
	}
	group, err := s.group(c.ID, c.Spec)
	if err != nil {
		return fmt.Errorf("follow container: %w", err)
	}
	if s.books.v2 {
		err = s.followV2(c.ID, group)
	} else {
		err = s.alarms.add(c.ID, below(s.books.memory, group))
	}
	if err != nil {
		return fmt.Errorf("follow container: %w", err)
	}
	return nil
}

func (s *Stats) followV2(id, group string) error {
	pod := filepath.Dir(group)
	before, podErr := s.books.oomKills(pod) // the root has no book
	if podErr != nil && !errors.Is(podErr, fs.ErrNotExist) {
		return podErr
	}
	if err := s.kills.add(id, group, below(s.books.memory, group)); err != nil {
		return err
	}
	s.look(id) // what was before the watch
	if podErr != nil {
		return nil
	}
	if err := s.kills.addPod(id, pod, below(s.books.memory, pod), before); err != nil {
		return err
	}
	s.lookAtPod(pod)
	return nil
}

// Forget ends what Follow began. It is idempotent.
func (s *Stats) Forget(id string) {
	s.kills.remove(id)
	s.alarms.remove(id)
}

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
		for _, name := range s.kills.changed(buf[:n]) {
			if filepath.IsAbs(name) {
				s.lookAtPod(name)
			} else {
				s.look(name)
			}
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

// lookAtPod reads the book of a pod. A kill that it has more was in one of the
// containers; those that are there a while later were not meant.
func (s *Stats) lookAtPod(group string) {
	n, err := s.books.oomKills(group)
	if err != nil {
		return
	}
	now := time.Now()
	ids := s.kills.count(group, n, now)
	if len(ids) == 0 {
		return
	}
	time.AfterFunc(settled, func() {
		for _, id := range ids {
			if f, ok := s.kills.get(id); ok {
				if _, err := os.Stat(below(s.books.memory, f.group)); err == nil {
					s.kills.settle(id, now)
				}
			}
		}
	})
}

func (k *kills) add(id, group, dir string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	wd, err := k.watch(id, dir)
	if err == nil {
		k.follows[id] = follow{watch: wd, group: group}
	}
	return err
}

// addPod has the book of the container's pod read too, which said before.
func (k *kills) addPod(id, group, dir string, before uint64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.follows[id]; !ok {
		return nil // forgotten meanwhile
	}
	p := k.pods[group]
	if p == nil {
		wd, err := k.watch(group, dir)
		if err != nil {
			return err
		}
		p = &podBook{watch: wd, kills: before, ids: map[string]bool{}}
		k.pods[group] = p
	}
	p.ids[id] = true
	return nil
}

// watch begins to watch the book of a cgroup; mu is held.
func (k *kills) watch(name, dir string) (int32, error) {
	wd, file := -1, filepath.Join(dir, memoryEvents)
	err := k.control(func(fd int) (err error) {
		wd, err = unix.InotifyAddWatch(fd, file, unix.IN_MODIFY)
		return err
	})
	if err != nil {
		return 0, &os.PathError{Op: "watch", Path: file, Err: err}
	}
	k.watches[int32(wd)] = name
	return int32(wd), nil
}

// unwatch ends that; mu is held. It fails when the kernel has dropped the watch
// with the cgroup.
func (k *kills) unwatch(wd int32) {
	delete(k.watches, wd)
	_ = k.control(func(fd int) error {
		_, err := unix.InotifyRmWatch(fd, uint32(wd))
		return err
	})
}

func (k *kills) remove(id string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f, ok := k.follows[id]
	if !ok {
		return
	}
	delete(k.follows, id)
	k.unwatch(f.watch)
	pod := filepath.Dir(f.group)
	if p := k.pods[pod]; p != nil {
		if delete(p.ids, id); len(p.ids) == 0 {
			delete(k.pods, pod)
			k.unwatch(p.watch)
		}
	}
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

// count notes how many kills the book of a pod has, and rings its containers and
// returns them if that is more than before.
func (k *kills) count(group string, n uint64, now time.Time) []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	p := k.pods[group]
	if p == nil || n <= p.kills {
		return nil
	}
	p.kills = n
	ids := slices.Collect(maps.Keys(p.ids))
	for _, id := range ids {
		f := k.follows[id]
		f.rung = now
		k.follows[id] = f
	}
	return ids
}

// settle ends what count noted then, unless there was another kill since.
func (k *kills) settle(id string, then time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if f, ok := k.follows[id]; ok && f.rung.Equal(then) {
		f.rung = time.Time{}
		k.follows[id] = f
	}
}

// changed names what the events are about, the ID of a container or the cgroup of
// a pod: all of them when the kernel dropped some.
func (k *kills) changed(events []byte) (ids []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events))
		mask, length := binary.NativeEndian.Uint32(events[4:]), binary.NativeEndian.Uint32(events[12:])
		events = events[min(len(events), unix.SizeofInotifyEvent+int(length)):]
		if mask&unix.IN_Q_OVERFLOW != 0 {
			return slices.Collect(maps.Values(k.watches))
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
		s.lookAtPod(filepath.Dir(group)) // nobody may have told yet
		f, _ := s.kills.get(c.ID)
		return f.oomed || !f.rung.IsZero() || s.alarms.killed(c.ID), nil
	}
	return killed > 0, err
}
