package image

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// slowLayer is a snapshotter with one writable layer that takes long to walk.
type slowLayer struct {
	snapshots.Snapshotter
	takes time.Duration
	walks int
}

func (l *slowLayer) Walk(ctx context.Context, fn snapshots.WalkFunc, _ ...string) error {
	return fn(ctx, snapshots.Info{Name: "layer", Kind: snapshots.KindActive})
}

func (l *slowLayer) Usage(ctx context.Context, _ string) (snapshots.Usage, error) {
	l.walks++
	return snapshots.Usage{Size: int64(l.walks)}, sleep(ctx, l.takes)
}

// However often somebody asks, a measurement is no older than it must be, and
// at most a tenth of the time goes into them.
func TestFSInfoRestsBetweenWalks(t *testing.T) {
	const period = 10 * time.Second
	for name, tc := range map[string]struct {
		takes time.Duration
		most  int
	}{
		"quick": {10 * time.Millisecond, 100},
		"slow":  {20 * time.Second, 5},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				layer := &slowLayer{takes: tc.takes}
				s := &Service{usage: newUsage(map[string]Snapshotter{"slow": {Snapshotter: layer}}, "slow", period)}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan struct{})
				go func() { defer close(done); s.usage.run(ctx) }()
				last := uint64(0)
				for begun := time.Now(); time.Since(begun) < 1000*time.Second; time.Sleep(time.Second) {
					images, _, err := s.FSInfo(ctx)
					must(t, err)
					last = images[0].UsedBytes.Value
				}
				cancel()
				<-done
				if layer.walks > tc.most || last < uint64(tc.most)*8/10 {
					t.Errorf("%d walks in 100 periods, the last answer is of number %d; want %d", layer.walks, last, tc.most)
				}
			})
		})
	}
}
