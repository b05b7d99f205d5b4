package crilog

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// fifoSize is asked of the kernel for each FIFO: fewer, bigger batches.
const fifoSize = 256 << 10

// afterStop is the most that is read once Stop was called: more than a FIFO
// holds, so all that was there comes through, and still an end for a writer
// that goes on for ever.
const afterStop = 1 << 20

// How the end of a FIFO is found.
const (
	untilHangup  = iota // a writer came and went
	untilUnused         // no writer is there
	untilDrained        // nothing is there to read
)

// Fifo reads a FIFO without ever blocking in the kernel. It waits for the
// first writer, as long as it takes, and ends when the last one has gone.
// A reader that opens a FIFO after its writers went never sees them go: Exited
// tells it that none will come.
type Fifo struct {
	end  atomic.Int32
	left int // bytes that may be read after Stop; for the reading goroutine only

	mu   sync.Mutex // held by the reader while it moves what is there
	file *os.File   // closed while there is fd, and in the end
	raw  syscall.RawConn
	fd   int // the FIFO while the runtime's poller is not to know it, else -1
}

// OpenFifo opens the FIFO at path for reading, at once, whether or not somebody
// writes to it. Reads are for one goroutine.
func OpenFifo(path string) (*Fifo, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open fifo: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	return NewFifo(os.NewFile(uintptr(fd), path))
}

// NewFifo reads from file, a FIFO opened with O_NONBLOCK, and takes it over.
// When it was opened for writing too, only Stop brings the end.
func NewFifo(file *os.File) (_ *Fifo, err error) {
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	st, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("open fifo: %w", err)
	}
	if st.Mode()&os.ModeNamedPipe == 0 {
		return nil, fmt.Errorf("open fifo %s: is not a fifo: %w", file.Name(), errdefs.ErrInvalidArgument)
	}
	if err := file.SetReadDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("open fifo %s: cannot be polled: %w", file.Name(), err)
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("open fifo: %w", err)
	}
	f := &Fifo{file: file, raw: raw, left: afterStop, fd: -1}
	// Best effort: the limit of pages per user may forbid it.
	_ = f.raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, fifoSize) })
	return f, nil
}

// Exited says that no new writer will come: reading ends when no writer is
// there and the FIFO is empty.
func (f *Fifo) Exited() { f.endAt(untilUnused) }

// Stop ends reading as soon as the FIFO is empty, whoever still holds it.
func (f *Fifo) Stop() { f.endAt(untilDrained) }

func (f *Fifo) endAt(when int32) {
	for {
		old := f.end.Load()
		if old >= when {
			return
		}
		if f.end.CompareAndSwap(old, when) {
			break
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd < 0 {
		// Wakes the reader, which looks again. An error means it is closed.
		_ = f.file.SetReadDeadline(time.Unix(1, 0))
	}
}

// Close ends reading at once; what is in the FIFO stays there.
func (f *Fifo) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd < 0 {
		return f.file.Close()
	}
	fd := f.fd
	f.fd = -1
	return unix.Close(fd)
}

// unwatch takes the FIFO from the poller until there is nothing to read. The poller is
// woken by every single write, which costs it, and the writer, more than a line does.
func (f *Fifo) unwatch() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd >= 0 {
		return
	}
	var dup int
	var err error
	cerr := f.raw.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if cerr != nil || err != nil {
		return // it is closed, or stays as it is
	}
	f.file.Close()
	f.fd = dup
}

// watched returns the FIFO as the poller knows it.
func (f *Fifo) watched() (*os.File, syscall.RawConn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd < 0 {
		return f.file, f.raw, nil
	}
	file := os.NewFile(uintptr(f.fd), f.file.Name())
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	f.file, f.raw, f.fd = file, raw, -1
	return file, raw, nil
}

// tryUnwatched is try for a FIFO that the poller does not know.
func (f *Fifo) tryUnwatched(move func(fd int) (int, error)) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd < 0 {
		return 0, nil
	}
	return f.try(f.fd, move)
}

// Read implements io.Reader.
func (f *Fifo) Read(p []byte) (int, error) {
	return f.transfer(func(fd int) (int, error) { return unix.Read(fd, p) })
}

// spliceTo moves at most limit bytes into the file dst at offset off. When it is
// killed the bytes are either there, and the file is longer, or still here.
func (f *Fifo) spliceTo(dst syscall.RawConn, off int64, limit int) (int, error) {
	return f.transfer(func(fd int) (n int, err error) {
		cerr := dst.Control(func(to uintptr) { // holds dst open meanwhile
			at := off
			var moved int64
			moved, err = unix.Splice(fd, nil, int(to), &at, limit, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
			n = int(moved)
		})
		if cerr != nil {
			return 0, cerr
		}
		return n, err
	})
}

// transfer calls move until it has moved something, failed or found the end.
func (f *Fifo) transfer(move func(fd int) (int, error)) (n int, err error) {
	if n, err := f.tryUnwatched(move); n > 0 || err != nil {
		return n, err
	}
	for {
		file, raw, err := f.watched()
		if err != nil {
			return 0, err
		}
		n := 0
		rerr := raw.Read(func(fd uintptr) bool {
			n, err = f.try(int(fd), move)
			return n > 0 || err != nil
		})
		switch {
		case errors.Is(rerr, os.ErrDeadlineExceeded):
			// Exited or Stop: the end is judged anew. Cleared before that, so
			// that one which comes meanwhile wakes us again.
			if err := file.SetReadDeadline(time.Time{}); err != nil {
				return 0, err
			}
		case rerr != nil:
			return 0, rerr
		default:
			return n, err
		}
	}
}

// try moves once. Zero and no error means: not yet.
func (f *Fifo) try(fd int, move func(fd int) (int, error)) (int, error) {
	end := f.end.Load() // before looking: what it promises holds for what we see
	if end == untilDrained && f.left <= 0 {
		return 0, io.EOF
	}
	n, err := move(fd)
	for err == unix.EINTR {
		n, err = move(fd)
	}
	switch {
	case n > 0:
		if end == untilDrained {
			f.left -= n
		}
		return n, nil
	case err == unix.EAGAIN && end == untilDrained:
		return 0, io.EOF
	case err == unix.EAGAIN:
		return 0, nil
	case err != nil:
		return 0, err
	case end >= untilUnused || hungUp(fd):
		return 0, io.EOF
	}
	return 0, nil // no writer yet
}

// hungUp tells whether a writer came and went since fd was opened. The kernel
// keeps that for us; read(2) returns 0 in both cases.
func hungUp(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	for {
		_, err := unix.Poll(p, 0)
		if err == unix.EINTR {
			continue
		}
		return err == nil && p[0].Revents&unix.POLLHUP != 0
	}
}
