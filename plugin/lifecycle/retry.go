package lifecycle

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/containerd/log"
)

// Backoff says how the pauses between tries grow: they double from First to
// Last.
type Backoff struct{ First, Last time.Duration }

// Retry calls do until it succeeds or ctx ends, less and less often. What says
// in the log what is tried.
func Retry(ctx context.Context, what string, b Backoff, do func() error) {
	for wait := b.First; ctx.Err() == nil; wait = min(2*wait, b.Last) {
		err := do()
		if err == nil {
			return
		}
		log.G(ctx).WithError(err).Warnf("%s: will be tried again in %s", what, wait)
		Pause(ctx, wait)
	}
}

// Pause waits about d, so that many that failed together do not come back
// together, or until ctx ends.
func Pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d + rand.N(d/4+1))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
