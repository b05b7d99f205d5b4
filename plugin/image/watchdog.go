package image

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// minRate is the slowest download, in bytes per second over a whole timeout,
// that counts as progress. Below it a pull would not end in a pod's life.
const minRate = 1024

// progress counts what a pull has done. Everything in it is updated by the
// pull and looked at by its watchdog.
type progress struct {
	mu         sync.Mutex
	downloaded int64 // bytes read from registries
	steps      int64 // other signs of life: bytes unpacked, things finished
	waiting    int   // waits for another pull that has a watchdog of its own
	applying   map[*applyProgress]struct{}
}

// applyProgress is one layer being unpacked.
type applyProgress struct{ read, total int64 }

func (p *progress) download(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.downloaded += int64(n)
}

func (p *progress) step() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.steps++
}

func (p *progress) wait(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting += n
	p.steps++
}

// beginApply returns what counts the bytes of one layer and what ends it.
func (p *progress) beginApply(total int64) (read func(int64), end func()) {
	a := &applyProgress{total: total}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.applying == nil {
		p.applying = map[*applyProgress]struct{}{}
	}
	p.applying[a] = struct{}{}
	read = func(n int64) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if n > a.read {
			a.read = n
			p.steps++
		}
	}
	end = func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.applying, a)
		p.steps++
	}
	return read, end
}

// reading is one look at the counters.
type reading struct {
	downloaded, steps int64
	// excused: something goes on whose progress cannot be seen from here.
	excused bool
}

func (p *progress) look() reading {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := reading{downloaded: p.downloaded, steps: p.steps, excused: p.waiting > 0}
	for a := range p.applying {
		// An applier in another process reports nothing, and one that has
		// read all its input writes files out and syncs them.
		if a.read == 0 || a.read >= a.total {
			r.excused = true
		}
	}
	return r
}

// judge decides about one pull, purely: feed it readings with their times.
type judge struct {
	timeout time.Duration
	since   time.Time
	base    reading
}

// stalled takes a reading and returns how long there has been no progress, 0
// while the pull may go on.
func (j *judge) stalled(now time.Time, r reading) time.Duration {
	need := int64(j.timeout.Seconds() * minRate)
	if need < 1 {
		need = 1
	}
	if r.excused || r.steps != j.base.steps || r.downloaded-j.base.downloaded >= need {
		j.since, j.base = now, r
		return 0
	}
	if idle := now.Sub(j.since); idle > j.timeout {
		return idle
	}
	return 0
}

// stallError ends a pull that made no progress.
type stallError struct {
	stage string
	idle  time.Duration
	bytes int64
}

// Error names the stage and the time.
func (e *stallError) Error() string {
	return fmt.Sprintf("no progress for %s during %s, %d bytes downloaded so far", e.idle.Round(time.Millisecond), e.stage, e.bytes)
}

// Unwrap gives the error its class.
func (e *stallError) Unwrap() error { return context.DeadlineExceeded }

// watch cancels a pull that stalls. It returns when ctx ends.
func (p *progress) watch(ctx context.Context, timeout time.Duration, stage func() string, cancel context.CancelCauseFunc) {
	if timeout <= 0 {
		return
	}
	tick := time.NewTicker(max(timeout/10, time.Millisecond))
	defer tick.Stop()
	j := judge{timeout: timeout, since: time.Now(), base: p.look()}
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			r := p.look()
			if idle := j.stalled(now, r); idle > 0 {
				cancel(&stallError{stage: stage(), idle: idle, bytes: r.downloaded})
				return
			}
		}
	}
}
