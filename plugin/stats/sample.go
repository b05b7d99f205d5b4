package stats

import (
	"math/bits"
	"time"
)

const (
	// window is the least time between the two readings that a rate is
	// computed from. Less of it would make the rate one of the scheduler.
	window = time.Second
	// retention is the most: an older reading says nothing about now.
	retention = 2 * time.Minute
)

// sample is the CPU time used up to a moment.
type sample struct {
	at  time.Time
	cpu uint64
}

// samples are the last readings of a cgroup, at least a window apart. Two are
// enough for a rate whenever it is asked for, by however many clients.
type samples struct{ last, before sample }

// rate enters a reading and returns the CPU time used per second since an
// earlier one, in ns. There is none for the first reading, for one that comes
// too soon after it, and for a counter or a clock that went backwards.
func (s *samples) rate(now sample) count {
	age := now.at.Sub(s.last.at)
	if s.last.at.IsZero() || age <= -window || age >= window && now.cpu < s.last.cpu {
		*s = samples{last: now}
		return count{}
	}
	base := s.before
	if age >= window {
		base = s.last
		*s = samples{last: now, before: base}
	}
	over := now.at.Sub(base.at)
	if base.at.IsZero() || over < window || over > retention || now.cpu < base.cpu {
		return count{}
	}
	hi, lo := bits.Mul64(now.cpu-base.cpu, uint64(time.Second))
	if hi >= uint64(over) {
		return count{}
	}
	n, _ := bits.Div64(hi, lo, uint64(over))
	return known(n)
}
