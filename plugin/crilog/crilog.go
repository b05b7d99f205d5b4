// Package crilog writes container output in the CRI log format and loses
// nothing, whatever kills the writer.
//
// It owns the journal and the two state slots of one container under a
// directory on tmpfs, and the position of the log file that belongs to them.
// Output goes from the FIFO into the journal by splice(2): the size of the
// journal is what says how far that came, so no byte is ever only in memory.
// One goroutine per Log then formats what the journal has, appends it to the
// log file and flips an index between two slots {journal positions, log size,
// log identity}. After a crash Open cuts the log file back to the size of the
// slot in force and formats again from its journal positions. So a log may pass
// from one process to another at any moment: the lock of its state says whose it
// is, and Continue needs nothing but the directory.
//
// It never makes the FIFOs, never follows a symlink to a log file, never
// blocks the container for longer than Options.Stall, and knows nothing of
// containers or tasks.
//
// Start reading at Open, then Log.Copy (FIFO to journal) and write.go (journal
// to log file).
package crilog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// Stream is one of the two outputs of a container.
type Stream int

// The streams in the order of their slots.
const (
	Stdout Stream = iota
	Stderr
	streams
)

// String returns the name that the CRI log format has for the stream.
func (s Stream) String() string {
	if s == Stderr {
		return "stderr"
	}
	return "stdout"
}

// Options of a Log. Each zero value means the default.
type Options struct {
	// Root is a trusted directory above the log file. When set, no component
	// below it may be a symlink; without it only the last one is checked.
	Root string
	// MaxLine is the most bytes of one record; a longer line is split into
	// records tagged P. Default 16 KiB; a negative one has no limit of its own
	// and is split at 1 MiB only, so that memory stays bounded.
	MaxLine int
	// MaxSize is the most bytes of the log file: when the next record would not
	// fit, an empty file takes its place. Zero means no limit; the least is 8 KiB.
	MaxSize int64
	// Journal is the most bytes of one stream that wait for the log file.
	// Default 1 MiB, at least twice MaxLine.
	Journal int64
	// Stall is how long a full journal may block the container before output is
	// dropped and counted. Default 10 s. A log file that answers with an error
	// (no space) does not get that time.
	Stall time.Duration
}

const (
	defaultMaxLine = 16 << 10
	unlimitedLine  = 1 << 20
	largestLine    = 16 << 20
	leastMaxSize   = 8 << 10
	defaultJournal = 1 << 20
	defaultStall   = 10 * time.Second
	retryAfter     = 200 * time.Millisecond
	resumeAfter    = 10 * time.Second // at most, see Resume
	closeWait      = 5 * time.Second
	// recordRoom is more than the timestamp, stream and tag of a record take.
	recordRoom = 64
)

func (o Options) withDefaults() Options {
	switch {
	case o.MaxLine < 0:
		o.MaxLine = unlimitedLine
	case o.MaxLine == 0:
		o.MaxLine = defaultMaxLine
	}
	o.MaxLine = min(o.MaxLine, largestLine)
	if o.MaxSize > 0 {
		o.MaxSize = max(o.MaxSize, leastMaxSize)
		o.MaxLine = int(min(int64(o.MaxLine), o.MaxSize/2))
	}
	if o.Journal <= 0 {
		o.Journal = defaultJournal
	}
	o.Journal = max(o.Journal, 2*int64(o.MaxLine))
	if o.Stall <= 0 {
		o.Stall = defaultStall
	}
	return o
}

// Lost counts the output that did not reach the log file.
type Lost struct {
	Bytes, Lines uint64
}

// Observer sees output beside the log. Its methods are called from the
// goroutine that reads the container and must not block.
type Observer interface {
	// Watching says whether Observe is worth calling.
	Watching() bool
	// Observe gets bytes as the container wrote them. It must not keep p.
	Observe(s Stream, p []byte)
}

// Log is the log of one container. Its methods may be called concurrently,
// Copy once per stream.
type Log struct {
	opts    Options
	discard bool

	opened   chan struct{}     // closed when there are journals
	journals [streams]*journal // once opened

	ended     [streams]atomic.Bool // nothing will follow what the journal has
	failing   atomic.Bool          // the last write to the log file failed
	lostBytes atomic.Uint64
	lostLines atomic.Uint64

	wake     chan struct{} // capacity 1: there is something to write
	requests chan request
	quit     chan struct{} // closed by Close
	done     chan struct{} // closed when the writer has let go of its files
	closing  sync.Once
}

// request is a piece of work for the goroutine that owns the log file.
type request struct {
	do    func(*writer) error
	reply chan error // capacity 1
}

// Open takes up the log whose state is in dir, or begins a new one, and
// recovers what a killed writer left unfinished. dir is made when missing and
// belongs on tmpfs. path is absolute; when it is empty the output is thrown
// away and only observers see it. One directory has one open Log at a time.
func Open(dir, path string, opts Options) (*Log, error) {
	l, err := newLog(path, opts)
	if err != nil || l.discard {
		return l, err
	}
	w, err := l.openWriter(dir, path)
	if err != nil {
		return nil, fmt.Errorf("open log %s: %w", path, err)
	}
	close(l.opened)
	l.notify()
	go w.run()
	return l, nil
}

// Resume is Open for a container that runs already, which is neither to wait
// for its log nor to go without one: it returns at once, and what cannot be
// opened is tried again until Close, and at once for Reopen and Flush. Meanwhile
// the output stays in the FIFO, for Options.Stall at most; then it is dropped
// and counted. A state that makes no sense is given up for a new one.
func Resume(dir, path string, opts Options) (*Log, error) {
	l, err := newLog(path, opts)
	if err == nil && !l.discard {
		go l.resume(dir, path)
	}
	return l, err
}

func newLog(path string, opts Options) (*Log, error) {
	l := &Log{
		opts:     opts.withDefaults(),
		opened:   make(chan struct{}),
		wake:     make(chan struct{}, 1),
		requests: make(chan request),
		quit:     make(chan struct{}),
		done:     make(chan struct{}),
	}
	if path == "" {
		l.discard = true
		close(l.done)
		return l, nil
	}
	if err := checkPath(path, l.opts.Root); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return l, nil
}

// resume opens the log, however long that takes, and writes it.
func (l *Log) resume(dir, path string) {
	retry := time.NewTimer(0)
	defer retry.Stop()
	wait := retryAfter
	for failed := false; ; failed = true {
		var asked *request // waits for this attempt
		select {
		case <-l.quit:
			close(l.done)
			return
		case r := <-l.requests:
			asked = &r
		case <-retry.C:
		}
		w, err := l.openAgain(dir, path)
		if err == nil {
			l.goOn(w, asked)
			return
		}
		if asked != nil {
			asked.reply <- fmt.Errorf("continue it after the daemon's restart: %w", err)
		}
		if !failed {
			log.L.WithField("path", path).WithError(err).Error("the log of a container cannot be continued: will be tried again")
		}
		retry.Reset(wait)
		wait = min(2*wait, resumeAfter)
	}
}

// goOn writes a log that was resumed, after the request that waited for that.
func (l *Log) goOn(w *writer, asked *request) {
	close(l.opened)
	if asked != nil {
		asked.reply <- asked.do(w)
	}
	l.notify()
	w.run()
}

// openAgain opens what an earlier daemon left.
func (l *Log) openAgain(dir, path string) (*writer, error) {
	w, err := l.openWriter(dir, path)
	if !errdefs.IsDataLoss(err) {
		return w, err
	}
	log.L.WithField("path", path).WithError(err).Error("the log of a container goes on without what was last on its way to it")
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	return l.openWriter(dir, path)
}

// openWriter opens state, journals and log file and makes them agree.
func (l *Log) openWriter(dir, path string) (_ *writer, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	st, fresh, err := openState(filepath.Join(dir, "state"))
	if err != nil {
		return nil, err
	}
	w := &writer{log: l, state: st, path: path, stateDir: dir}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if err := (plan{path, l.opts}).save(dir); err != nil {
		return nil, err
	}
	cur := st.current()
	for s := range streams {
		j, err := openJournal(filepath.Join(dir, s.String()), cur.pos[s], l.opts.Journal)
		if err != nil {
			return nil, err
		}
		l.journals[s] = j
	}
	if err := w.recover(cur, fresh); err != nil {
		return nil, err
	}
	l.lostBytes.Add(cur.lostBytes)
	l.lostLines.Add(cur.lostLines)
	return w, nil
}

// Reopen continues the log in the file that is at path now, which is made when
// missing; it is called after the old file was renamed. No line is lost,
// doubled or split by it. On an error the old file stays in use. The caller
// has made sure that the container runs.
func (l *Log) Reopen(ctx context.Context, path string) error {
	if l.discard {
		return fmt.Errorf("reopen log: the container has no log path: %w", errdefs.ErrFailedPrecondition)
	}
	if err := checkPath(path, l.opts.Root); err != nil {
		return fmt.Errorf("reopen log: %w", err)
	}
	if err := l.call(ctx, func(w *writer) error { return w.reopen(path) }); err != nil {
		return fmt.Errorf("reopen log %s: %w", path, err)
	}
	return nil
}

// Flush returns when everything that the streams brought so far, and the last
// line of each ended stream, is in the log file. While the log file refuses
// writes it keeps trying until ctx ends.
func (l *Log) Flush(ctx context.Context) error {
	if l.discard {
		return nil
	}
	for {
		err := l.call(ctx, (*writer).flush)
		if err == nil {
			return nil
		}
		if errors.Is(err, os.ErrClosed) {
			return fmt.Errorf("flush log: %w", err)
		}
		select {
		case <-time.After(retryAfter):
		case <-ctx.Done():
			return fmt.Errorf("flush log: %w", errors.Join(err, context.Cause(ctx)))
		}
	}
}

// call runs do in the goroutine that owns the log file.
func (l *Log) call(ctx context.Context, do func(*writer) error) error {
	r := request{do: do, reply: make(chan error, 1)}
	select {
	case l.requests <- r:
	case <-l.quit:
		return os.ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("log file is busy: %w", context.Cause(ctx))
	}
	select {
	case err := <-r.reply:
		return err
	case <-l.done:
		return os.ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("log file is busy: %w", context.Cause(ctx))
	}
}

// Lost tells how much output was dropped since the log began, by this process
// or one before it.
func (l *Log) Lost() Lost {
	return Lost{Bytes: l.lostBytes.Load(), Lines: l.lostLines.Load()}
}

// Behind says that a container's output waits for the log file to take what
// came before.
func (l *Log) Behind() bool {
	if l.discard {
		return false
	}
	select {
	case <-l.opened:
	default:
		return true
	}
	return slices.ContainsFunc(l.journals[:], func(j *journal) bool { return j.room() <= 0 })
}

// Close ends the writer after the write at hand and keeps the state: Open
// continues there. Close the FIFOs and wait for Copy before. A log file that
// does not answer is waited for a few seconds only and closed when it does.
func (l *Log) Close() error {
	l.closing.Do(func() { close(l.quit) })
	select {
	case <-l.done:
		return nil
	case <-time.After(closeWait):
		return fmt.Errorf("close log: a write does not end: %w", errdefs.ErrUnavailable)
	}
}

// notify tells the writer that there is something to do.
func (l *Log) notify() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}
