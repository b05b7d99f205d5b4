package crilog

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// batch is the most that is formatted into one write, save a longer line.
const batch = 1 << 20

// writer is the only one to touch the log file and the state. Its goroutine is
// started by Open and ended by Close.
type writer struct {
	log   *Log
	state *state
	path  string
	dir   *os.File
	file  *logFile
	dirty bool // the file may have a torn record beyond the committed size

	stateDir string
}

// buffers of a writer at work. An idle one holds none.
type buffers struct {
	in []byte
	f  formatter
}

var buffersPool = sync.Pool{New: func() any { return new(buffers) }}

func (w *writer) run() {
	defer close(w.log.done)
	defer w.close()
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-w.log.quit:
			return
		case r := <-w.log.requests:
			r.reply <- r.do(w)
			w.log.notify()
			continue
		case <-w.log.wake:
		case <-retry.C:
		}
		// One pass at a time: a container that never rests must not keep
		// requests waiting.
		switch busy, err := w.pass(); {
		case err != nil:
			retry.Reset(retryAfter)
		case busy:
			w.log.notify()
		}
	}
}

// pass lets each stream take one step.
func (w *writer) pass() (busy bool, err error) {
	b := buffersPool.Get().(*buffers)
	defer buffersPool.Put(b)
	for s := range streams {
		wrote, err := w.step(s, b)
		if err != nil {
			w.log.failing.Store(true)
			for _, j := range w.log.journals {
				j.moved()
			}
			return false, err
		}
		if wrote {
			w.log.failing.Store(false)
			busy = true
		}
	}
	return busy, nil
}

// flush writes what the journals have by now, as far as it can be written.
func (w *writer) flush() error {
	var until [streams]int64
	for s, j := range w.log.journals {
		until[s] = j.end.Load()
	}
	for {
		busy, err := w.pass()
		if err != nil || !busy {
			return err
		}
		if w.log.journals[Stdout].pos.Load() >= until[Stdout] && w.log.journals[Stderr].pos.Load() >= until[Stderr] {
			return nil
		}
	}
}

// step formats what one journal has, appends it to the log file and commits.
func (w *writer) step(s Stream, b *buffers) (wrote bool, err error) {
	j := w.log.journals[s]
	ended := w.log.ended[s].Load() // before end: then end is the last one
	in, err := w.pending(j, b, ended)
	if err != nil || len(in) == 0 {
		return false, err
	}
	next := w.state.current()
	size, err := w.settle(&next)
	if err != nil {
		return false, err
	}
	last := ended && next.pos[s]+int64(len(in)) == j.end.Load()
	b.f.maxLine, b.f.out = w.log.opts.MaxLine, b.f.out[:0]
	b.f.limit = w.roomInFile(size)
	b.f.stamp(time.Now(), s)
	used := b.f.format(in, last)
	if used == 0 {
		j.scanned = next.pos[s] + int64(len(in))
		return false, nil
	}
	if w.log.opts.MaxSize > 0 && size > 0 && size+int64(len(b.f.out)) > w.log.opts.MaxSize {
		return true, w.startOver()
	}
	if err := w.append(b.f.out, size); err != nil {
		return false, err
	}
	next.pos[s] += int64(used)
	next.size = size + int64(len(b.f.out))
	next.lostBytes, next.lostLines = w.log.lostBytes.Load(), w.log.lostLines.Load()
	w.state.commit(next)
	j.consumed(next.pos[s])
	return true, nil
}

// pending reads what a journal has to format. It returns nothing while that is
// the start of a line which is neither complete, nor too long, nor the last.
func (w *writer) pending(j *journal, b *buffers, ended bool) ([]byte, error) {
	pos, end := j.pos.Load(), j.end.Load()
	if pos == end {
		return nil, nil
	}
	n := int(min(end-pos, int64(max(chunk, 2*w.log.opts.MaxLine))))
	if cap(b.in) < n {
		b.in = make([]byte, n)
	}
	in := b.in[:n]
	if seen := int(j.scanned - pos); seen > 0 && n <= w.log.opts.MaxLine && !ended {
		// The same start of a line as last time: are the new bytes its end?
		if _, err := j.file.ReadAt(in[seen:], j.scanned); err != nil {
			return nil, fmt.Errorf("read journal: %w", err)
		}
		if bytes.IndexByte(in[seen:], '\n') < 0 {
			j.scanned = end
			return nil, nil
		}
	}
	if _, err := j.file.ReadAt(in, pos); err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	return in, nil
}

// roomInFile is how long a batch may get.
func (w *writer) roomInFile(size int64) int {
	if most := w.log.opts.MaxSize; most > 0 && size < most {
		return int(min(most-size, batch))
	}
	return batch
}

// settle returns the size of the log file after making sure that it ends where
// the last commit left it. A file that somebody else cut or lengthened is
// taken as it is.
func (w *writer) settle(next *slot) (int64, error) {
	if w.dirty {
		if err := w.file.cut(next.size); err != nil {
			return 0, fmt.Errorf("cut torn record: %w", err)
		}
		w.dirty = false
	}
	size, err := w.file.size()
	if err != nil {
		return 0, fmt.Errorf("stat log: %w", err)
	}
	if size != next.size {
		next.size = size
		w.state.commit(*next)
	}
	return size, nil
}

// append writes p to the end of the log file, all of it or nothing.
func (w *writer) append(p []byte, size int64) error {
	if _, err := w.file.Write(p); err != nil {
		w.dirty = w.file.cut(size) != nil
		return fmt.Errorf("write log: %w", err)
	}
	return nil
}

// adopt makes f the log file, as long as it is now.
func (w *writer) adopt(f *logFile) error {
	size, err := f.size()
	if err != nil {
		return err
	}
	next := w.state.current()
	next.size, next.file = size, f.id
	w.state.commit(next)
	if w.file != nil && w.file != f {
		w.file.Close()
	}
	w.file, w.dirty = f, false
	return nil
}

// reopen moves to the file at path.
func (w *writer) reopen(path string) error {
	if w.dirty {
		// The torn record would stay in the old file, and come again whole.
		if err := w.file.cut(w.state.current().size); err != nil {
			return fmt.Errorf("cut torn record: %w", err)
		}
		w.dirty = false
	}
	dir, err := openParent(path, w.log.opts.Root)
	if err != nil {
		return err
	}
	f, err := openLog(dir, filepath.Base(path), unix.O_CREAT)
	if err == nil {
		if err = w.adopt(f); err != nil {
			f.Close()
		}
	}
	if err != nil {
		dir.Close()
		return err
	}
	w.dir.Close()
	w.dir, w.path = dir, path
	return plan{path, w.log.opts}.save(w.stateDir)
}

// nextOf is the name that a file has until it takes the place of a full one.
func nextOf(name string) string { return "." + name + ".next" }

// startOver puts an empty file in the place of a log file that is full. A
// crash before the commit finds the old file gone and adopts the new one.
func (w *writer) startOver() error {
	name := filepath.Base(w.path)
	fresh := nextOf(name)
	if err := unix.Unlinkat(int(w.dir.Fd()), fresh, 0); err != nil && err != unix.ENOENT {
		return fmt.Errorf("start log over: %w", err)
	}
	f, err := openLog(w.dir, fresh, unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return fmt.Errorf("start log over: %w", err)
	}
	if err := unix.Renameat(int(w.dir.Fd()), fresh, int(w.dir.Fd()), name); err != nil {
		f.Close()
		return fmt.Errorf("start log over: %w", err)
	}
	return w.adopt(f)
}

// recover makes the log file end where the state says. The file the state
// names is the one at the path; or it was renamed for a rotation that did not
// get to Reopen, and stays in use until that comes; or it was renamed and
// Reopen got no further than the new file; or it is gone.
func (w *writer) recover(cur slot, fresh bool) error {
	dir, err := openParent(w.path, w.log.opts.Root)
	if err != nil {
		return err
	}
	w.dir = dir
	name := filepath.Base(w.path)
	_ = unix.Unlinkat(int(dir.Fd()), nextOf(name), 0) // left by a crash
	if fresh {
		return w.openAndAdopt(name)
	}
	old, err := findLog(dir, cur.file)
	if err != nil {
		return err
	}
	if old == nil {
		return w.openAndAdopt(name)
	}
	if err := old.cut(cur.size); err != nil {
		old.Close()
		return err
	}
	at, err := identify(int(dir.Fd()), name, 0)
	if err != nil || at == cur.file {
		return w.adopt(old)
	}
	old.Close()
	return w.openAndAdopt(name)
}

func (w *writer) openAndAdopt(name string) error {
	f, err := openLog(w.dir, name, unix.O_CREAT)
	if err != nil {
		return err
	}
	return w.adopt(f)
}

func (w *writer) close() {
	for _, j := range w.log.journals {
		if j != nil {
			j.file.Close()
		}
	}
	if w.file != nil {
		w.file.Close()
	}
	if w.dir != nil {
		w.dir.Close()
	}
	w.state.close()
}
