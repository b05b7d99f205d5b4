package crilog

import (
	"fmt"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// trimStep is how much formatted output a journal keeps before its pages are
// given back.
const trimStep = 64 << 10

// journal is the output of one stream that is not yet in the log file, and
// some that is. Offsets in it only grow; what was formatted becomes a hole, so
// the file takes no more memory than what waits.
//
// The copying goroutine appends and moves end, the writer reads and moves pos.
type journal struct {
	file  *os.File
	raw   syscall.RawConn // of file
	bound int64

	end atomic.Int64 // the size of the file
	pos atomic.Int64 // formatted and committed up to here

	progress chan struct{} // capacity 1: pos moved, or the log began to fail

	trimmed int64 // hole up to here; for the writer
	scanned int64 // no newline between pos and here; for the writer
}

// openJournal opens the journal at path, whose output was formatted up to pos.
func openJournal(path string, pos, bound int64) (*journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	if pos > st.Size() {
		f.Close()
		return nil, fmt.Errorf("journal %s ends before its position: %w", path, errdefs.ErrDataLoss)
	}
	j := &journal{file: f, raw: raw, bound: bound, progress: make(chan struct{}, 1)}
	j.end.Store(st.Size())
	j.pos.Store(pos)
	return j, nil
}

// room is how many bytes may be appended.
func (j *journal) room() int64 { return j.bound - (j.end.Load() - j.pos.Load()) }

// consumed moves pos and gives pages back.
func (j *journal) consumed(pos int64) {
	j.pos.Store(pos)
	if pos-j.trimmed >= trimStep {
		// Only memory is at stake, and the next time punches this part too.
		if unix.Fallocate(int(j.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, j.trimmed, pos-j.trimmed) == nil {
			j.trimmed = pos &^ 4095
		}
	}
	j.moved()
}

// moved wakes the copying goroutine if it waits for room.
func (j *journal) moved() {
	select {
	case j.progress <- struct{}{}:
	default:
	}
}

// append writes p at the end: for output that was read already.
func (j *journal) append(p []byte) error {
	end := j.end.Load()
	if _, err := j.file.WriteAt(p, end); err != nil {
		// A short write must not become the size that counts.
		_ = j.file.Truncate(end)
		return err
	}
	j.end.Store(end + int64(len(p)))
	return nil
}
