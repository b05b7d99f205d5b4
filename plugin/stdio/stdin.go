package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/log"
)

// The shim opens stdin a moment after it has started the process; until then
// nobody reads the FIFO.
const (
	firstTry = time.Millisecond
	nextTry  = 50 * time.Millisecond
)

// stdin is the writing side of an input FIFO. The shim holds both sides open
// too, so the process sees the end only when all of ours are closed and the
// shim was asked to close its own.
type stdin struct {
	path    string
	closeIO func(context.Context) error
	once    sync.Once
	closed  chan struct{} // closed when no input is taken any more

	mu    sync.Mutex
	ended bool
	files map[*os.File]struct{}
}

func newStdin(path string, closeIO func(context.Context) error) *stdin {
	return &stdin{path: path, closeIO: closeIO, closed: make(chan struct{}), files: map[*os.File]struct{}{}}
}

// mark is a file that says that input was brought.
func (s *stdin) mark() string { return s.path + "-used" }

func (s *stdin) wasUsed() bool {
	_, err := os.Stat(s.mark())
	return err == nil
}

// feed copies r into the FIFO until r or ctx ends. When the process no longer
// reads, r is read to its end without a use for it: a connection that is not
// read does not show when its client goes.
func (s *stdin) feed(ctx context.Context, r io.Reader, once bool) error {
	if once {
		if err := os.WriteFile(s.mark(), nil, 0o600); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("feed stdin: %w", err)
		}
	}
	w, err := s.open(ctx)
	if err == nil {
		stop := context.AfterFunc(ctx, func() { s.release(w) })
		_, err = io.Copy(w, r)
		stop()
		s.release(w)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("feed stdin: %w", context.Cause(ctx))
	}
	if errors.Is(err, unix.EPIPE) || errors.Is(err, os.ErrClosed) {
		_, err = io.Copy(io.Discard, r)
	}
	if err != nil {
		return fmt.Errorf("feed stdin: %w", err)
	}
	return nil
}

// open waits for a reader of the FIFO.
func (s *stdin) open(ctx context.Context) (*os.File, error) {
	wait := firstTry
	for {
		fd, err := unix.Open(s.path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err == nil {
			return s.register(os.NewFile(uintptr(fd), s.path))
		}
		if err != unix.ENXIO && err != unix.EINTR {
			return nil, &os.PathError{Op: "open", Path: s.path, Err: err}
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
			wait = min(2*wait, nextTry)
		case <-s.closed:
			timer.Stop()
			return nil, os.ErrClosed
		case <-ctx.Done():
			timer.Stop()
			return nil, context.Cause(ctx)
		}
	}
}

func (s *stdin) register(w *os.File) (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		w.Close()
		return nil, os.ErrClosed
	}
	s.files[w] = struct{}{}
	return w, nil
}

func (s *stdin) release(w *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.files[w]; ok {
		delete(s.files, w)
		w.Close()
	}
}

// shut closes our side for good.
func (s *stdin) shut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	s.ended = true
	close(s.closed)
	for w := range s.files {
		w.Close()
	}
	clear(s.files)
}

// finish gives the process the end of its input. It happens once, whoever asks,
// and also when the client that caused it has gone: hence a context of its own.
func (s *stdin) finish(ctx context.Context) {
	s.shut()
	if s.closeIO == nil {
		return
	}
	s.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callbackTimeout)
		defer cancel()
		if err := s.closeIO(ctx); err != nil {
			log.G(ctx).WithError(err).WithField("stdin", s.path).Warn("close stdin")
		}
	})
}
