package crilog

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// A state file is one page: magic, index, and two slots of which the index
// names the one in force by its lowest bit. The slot not in force is written
// first, then the index, a single aligned word.
const (
	stateSize  = 4096
	magicAt    = 0
	indexAt    = 8
	slotsAt    = 64
	slotStride = 128
	stateMagic = uint64(0x31676f6c69726367)
)

// slot is one consistent state of the log.
type slot struct {
	pos       [streams]int64 // formatted up to here, in each journal
	size      int64          // of the log file
	file      identity       // of the log file
	lostBytes uint64
	lostLines uint64
}

func (s slot) encode(b []byte) {
	for i, v := range []uint64{
		uint64(s.pos[Stdout]), uint64(s.pos[Stderr]), uint64(s.size),
		s.file.dev, s.file.ino, uint64(s.file.born), s.lostBytes, s.lostLines,
	} {
		binary.NativeEndian.PutUint64(b[8*i:], v)
	}
}

func decodeSlot(b []byte) (slot, error) {
	word := func(i int) uint64 { return binary.NativeEndian.Uint64(b[8*i:]) }
	s := slot{
		pos:       [streams]int64{int64(word(0)), int64(word(1))},
		size:      int64(word(2)),
		file:      identity{dev: word(3), ino: word(4), born: int64(word(5))},
		lostBytes: word(6),
		lostLines: word(7),
	}
	if s.pos[Stdout] < 0 || s.pos[Stderr] < 0 || s.size < 0 {
		return slot{}, fmt.Errorf("state has a negative position: %w", errdefs.ErrDataLoss)
	}
	return s, nil
}

// decodeState returns the slot in force of a state file. A file whose magic
// was not written yet is fresh.
func decodeState(b []byte) (s slot, fresh bool, err error) {
	if len(b) != stateSize {
		return slot{}, false, fmt.Errorf("state is %d bytes long, want %d: %w", len(b), stateSize, errdefs.ErrDataLoss)
	}
	switch binary.NativeEndian.Uint64(b[magicAt:]) {
	case 0:
		return slot{}, true, nil
	case stateMagic:
	default:
		return slot{}, false, fmt.Errorf("state is not ours: %w", errdefs.ErrDataLoss)
	}
	i := binary.NativeEndian.Uint64(b[indexAt:])
	s, err = decodeSlot(b[slotsAt+slotStride*int(i&1):])
	return s, false, err
}

// state is the mapped state file. It is for one goroutine.
type state struct {
	file *os.File
	page []byte
	cur  slot
}

// openState maps the state file at path and locks it, so that no second writer
// takes the same FIFOs.
func openState(path string) (_ *state, fresh bool, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, false, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, false, fmt.Errorf("lock state: in use by another writer: %w", errdefs.ErrFailedPrecondition)
	}
	st, err := f.Stat()
	if err != nil {
		return nil, false, err
	}
	if st.Size() < stateSize {
		// Written, not truncated to length: a mapped hole on a full tmpfs is a
		// fatal signal.
		if _, err := f.WriteAt(make([]byte, stateSize), 0); err != nil {
			return nil, false, err
		}
	}
	page, err := unix.Mmap(int(f.Fd()), 0, stateSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, false, fmt.Errorf("map state: %w", err)
	}
	cur, fresh, err := decodeState(page)
	if err != nil {
		_ = unix.Munmap(page)
		return nil, false, err
	}
	return &state{file: f, page: page, cur: cur}, fresh, nil
}

func (s *state) current() slot { return s.cur }

// commit makes next the state in force.
func (s *state) commit(next slot) {
	index := s.word(indexAt)
	i := atomic.LoadUint64(index) + 1
	next.encode(s.page[slotsAt+slotStride*int(i&1):])
	atomic.StoreUint64(index, i)
	atomic.StoreUint64(s.word(magicAt), stateMagic)
	s.cur = next
}

func (s *state) word(at int) *uint64 { return (*uint64)(unsafe.Pointer(&s.page[at])) }

func (s *state) close() {
	_ = unix.Munmap(s.page)
	_ = s.file.Close()
}
