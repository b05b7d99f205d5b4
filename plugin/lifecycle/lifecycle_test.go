package lifecycle_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gantry-cri/gantry/plugin/lifecycle"
)

func TestStopWaitsForAll(t *testing.T) {
	g := lifecycle.New(context.Background())
	ended := make(chan struct{}, 2)
	for _, n := range []string{"a", "b"} {
		g.Go(n, func(ctx context.Context) {
			<-ctx.Done()
			ended <- struct{}{}
		})
	}
	if err := g.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	if len(ended) != 2 {
		t.Errorf("%d ended before Stop returned, want 2", len(ended))
	}
	g.Go("late", func(context.Context) { t.Error("started after Stop") })
	if err := g.Stop(context.Background()); err != nil {
		t.Errorf("second Stop: %v", err)
	}
}

func TestStopNamesTheStuck(t *testing.T) {
	g := lifecycle.New(context.Background())
	release := make(chan struct{})
	defer close(release)
	g.Go("watch pod x", func(context.Context) { <-release })
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	err := g.Stop(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "watch pod x") {
		t.Errorf("got %v, want the name of the goroutine", err)
	}
}

func TestPanicEndsOnlyItsGoroutine(t *testing.T) {
	g := lifecycle.New(context.Background())
	g.Go("bad", func(context.Context) { panic("oops") })
	ran := make(chan struct{})
	g.Go("good", func(context.Context) { close(ran) })
	<-ran
	if err := g.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries, begin := 0, time.Now()
		lifecycle.Retry(context.Background(), "a test", lifecycle.Backoff{First: time.Second, Last: 4 * time.Second}, func() error {
			if tries++; tries < 5 {
				return errors.New("not yet")
			}
			return nil
		})
		// 1 + 2 + 4 + 4 seconds, and up to a quarter more.
		if took := time.Since(begin); tries != 5 || took < 11*time.Second || took > 14*time.Second {
			t.Errorf("%d tries in %s", tries, took)
		}
		ctx, cancel := context.WithCancel(context.Background())
		lifecycle.Retry(ctx, "a test", lifecycle.Backoff{First: time.Second, Last: time.Second}, func() error {
			cancel()
			return errors.New("never")
		})
	})
}
