package crilog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// chunk is the most that one step moves out of a FIFO.
const chunk = 128 << 10

// A program that writes line by line would have each of them moved, formatted and
// written alone, which costs more than all else. When a step that moved less than
// little follows the last one within gather, the next waits for as long: the FIFO
// takes what comes meanwhile, at some hundred MiB/s.
const (
	little = 2 << 10
	gather = time.Millisecond
)

// lineWait is how long a log that can go on waits for a new line to do so.
const lineWait = time.Second

var chunks = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

// Copy moves what comes out of f into the log until f ends, and returns nil
// then: the last line, if it has no newline, goes out too. It ends with an
// error when f or the log is closed; the next Copy of the same stream
// continues there. obs may be nil.
func (l *Log) Copy(s Stream, f *Fifo, obs Observer) error {
	c := &copier{log: l, stream: s, fifo: f, obs: obs}
	step := c.step
	if l.discard {
		step = c.discard
	}
	for {
		switch err := step(); {
		case err == nil:
		case errors.Is(err, io.EOF):
			if !l.discard {
				l.ended[s].Store(true)
				l.notify()
			}
			return nil
		default:
			return fmt.Errorf("copy %s: %w", s, err)
		}
	}
}

// copier is one stream on its way from the FIFO into the journal.
type copier struct {
	log     *Log
	stream  Stream
	fifo    *Fifo
	obs     Observer
	journal *journal // nil until the log is open

	dropping bool      // output is thrown away until there is room and a new line
	well     time.Time // since when only the new line is missing
	skipped  int       // bytes thrown away since then
	refused  time.Time // when the journal itself began to refuse data
	moved    time.Time // when the last step ended
}

func (c *copier) step() error {
	if err := c.waitForLog(); err != nil {
		return err
	}
	if err := c.waitForRoom(); err != nil {
		return err
	}
	if c.dropping {
		return c.drop()
	}
	j := c.journal
	at := j.end.Load()
	n, err := c.fifo.spliceTo(j.raw, at, int(min(j.room(), chunk)))
	if err != nil {
		if isFull(err) {
			return c.waitForMemory()
		}
		return err
	}
	c.refused = time.Time{}
	c.show(at, n) // before the writer may make a hole of it
	j.end.Store(at + int64(n))
	c.log.notify()
	return c.gather(n)
}

// gather waits for more to come where little comes often.
func (c *copier) gather(n int) error {
	last := c.moved
	c.moved = time.Now()
	if n >= little || c.moved.Sub(last) > gather {
		return nil
	}
	c.fifo.unwatch()
	wait := time.NewTimer(gather)
	defer wait.Stop()
	select {
	case <-wait.C:
		c.moved = time.Now()
		return nil
	case <-c.log.quit:
		return os.ErrClosed
	}
}

// discard is the step of a log without a file.
func (c *copier) discard() error {
	select {
	case <-c.log.quit:
		return os.ErrClosed
	default:
	}
	b := chunks.Get().(*[]byte)
	defer chunks.Put(b)
	n, err := c.fifo.Read(*b)
	if n > 0 && c.watched() {
		c.obs.Observe(c.stream, (*b)[:n])
	}
	return err
}

func (c *copier) watched() bool { return c.obs != nil && c.obs.Watching() }

// show gives the observer what the journal has got.
func (c *copier) show(at int64, n int) {
	if !c.watched() {
		return
	}
	b := chunks.Get().(*[]byte)
	defer chunks.Put(b)
	if n, err := c.journal.file.ReadAt((*b)[:n], at); err == nil {
		c.obs.Observe(c.stream, (*b)[:n])
	}
}

// waitForLog returns when the log is open or output is to be dropped.
func (c *copier) waitForLog() error {
	if c.isOpen() || c.dropping {
		return nil
	}
	stall := time.NewTimer(c.log.opts.Stall)
	defer stall.Stop()
	select {
	case <-c.log.opened:
		c.isOpen()
	case <-stall.C:
		c.dropping = true
	case <-c.log.quit:
		return os.ErrClosed
	}
	return nil
}

// isOpen reports whether there is a journal, and has the copier use it.
func (c *copier) isOpen() bool {
	select {
	case <-c.log.opened:
		c.journal = c.log.journals[c.stream]
		return true
	default:
		return false
	}
}

// waitForRoom returns when the journal has room or output is to be dropped.
func (c *copier) waitForRoom() error {
	if c.dropping || c.journal.room() > 0 {
		select {
		case <-c.log.quit:
			return os.ErrClosed
		default:
			return nil
		}
	}
	stall := time.NewTimer(c.log.opts.Stall)
	defer stall.Stop()
	for c.journal.room() <= 0 {
		if c.log.failing.Load() {
			c.startDropping()
			return nil
		}
		select {
		case <-c.journal.progress:
		case <-stall.C:
			c.startDropping()
			return nil
		case <-c.log.quit:
			return os.ErrClosed
		}
	}
	return nil
}

// waitForMemory is for a journal that cannot grow though it may: tmpfs is full.
func (c *copier) waitForMemory() error {
	if c.refused.IsZero() {
		c.refused = time.Now()
	}
	if time.Since(c.refused) >= c.log.opts.Stall {
		c.startDropping()
		return nil
	}
	retry := time.NewTimer(min(retryAfter, c.log.opts.Stall))
	defer retry.Stop()
	select {
	case <-c.journal.progress:
	case <-retry.C:
	case <-c.log.quit:
		return os.ErrClosed
	}
	return nil
}

// startDropping ends the line at hand, so that it does not run into the one
// that follows the gap. While the log is not open yet that has to wait.
func (c *copier) startDropping() {
	c.dropping = true
	c.endLine()
}

// endLine completes the last line of the journal.
func (c *copier) endLine() {
	j := c.journal
	end := j.end.Load()
	if end == j.pos.Load() {
		return
	}
	var last [1]byte
	if _, err := j.file.ReadAt(last[:], end-1); err == nil && last[0] != '\n' {
		if j.append([]byte{'\n'}) == nil {
			c.log.notify()
		}
	}
}

// drop reads and counts output instead of keeping it, until the log can go on.
func (c *copier) drop() error {
	b := chunks.Get().(*[]byte)
	defer chunks.Put(b)
	n, err := c.fifo.Read(*b)
	if err != nil {
		return err
	}
	p := (*b)[:n]
	if c.watched() {
		c.obs.Observe(c.stream, p)
	}
	if i := c.goesOn(p); i >= 0 {
		c.endLine()
		if c.journal.append(p[i:]) == nil {
			c.dropping, c.refused, c.well = false, time.Time{}, time.Time{}
			c.log.notify()
			p = p[:i]
		}
	}
	c.log.lostBytes.Add(uint64(len(p)))
	c.log.lostLines.Add(uint64(bytes.Count(p, []byte{'\n'})))
	return nil
}

// goesOn is where in p the log goes on, -1 for not yet: once half of the journal
// is free at the first new line, or anywhere if none comes, as there are
// programs that write none.
func (c *copier) goesOn(p []byte) int {
	if !c.isOpen() || c.journal.room() <= c.journal.bound/2 || c.log.failing.Load() {
		c.well = time.Time{}
		return -1
	}
	if c.well.IsZero() {
		c.well, c.skipped = time.Now(), 0
	}
	if i := bytes.IndexByte(p, '\n'); i >= 0 {
		return i + 1
	}
	if c.skipped > c.log.opts.MaxLine || time.Since(c.well) > lineWait {
		return 0
	}
	c.skipped += len(p)
	return -1
}

func isFull(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EIO)
}
