package flight_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gantry-cri/gantry/plugin/flight"
)

func TestCallersShareOneOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g flight.Group[string, int]
		var runs atomic.Int32
		release := make(chan struct{})
		results := make(chan int, 10)
		for range 10 {
			go func() {
				v, err := g.Do(context.Background(), "k", func(context.Context) (int, error) {
					runs.Add(1)
					<-release
					return 7, nil
				})
				if err != nil {
					t.Error(err)
				}
				results <- v
			}()
		}
		synctest.Wait() // all ten are in Do
		close(release)
		for range 10 {
			if v := <-results; v != 7 {
				t.Errorf("got %d", v)
			}
		}
		if n := runs.Load(); n != 1 {
			t.Errorf("%d runs, want 1", n)
		}
	})
}

// A caller that gives up gets its own reason; the operation goes on, and the
// next caller gets its result.
func TestRetryJoins(t *testing.T) {
	g := flight.Group[string, int]{Linger: flight.Forever}
	var runs atomic.Int32
	release := make(chan struct{})
	op := func(ctx context.Context) (int, error) {
		runs.Add(1)
		select {
		case <-release:
			return 7, nil
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	reason := errors.New("client is gone")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(reason)
	for range 3 {
		if _, err := g.Do(ctx, "k", op); !errors.Is(err, reason) {
			t.Fatalf("got %v, want the caller's reason", err)
		}
	}
	result := make(chan int)
	go func() {
		v, _ := g.Do(context.Background(), "k", op)
		result <- v
	}()
	close(release)
	if v := <-result; v != 7 {
		t.Errorf("got %d", v)
	}
	if n := runs.Load(); n > 2 {
		t.Errorf("%d runs: a retry did not join", n)
	}
	g.Wait()
}

func TestLastCallerOutCancelsAfterLinger(t *testing.T) {
	g := flight.Group[string, int]{Linger: time.Millisecond}
	ctx, cancel := context.WithCancel(context.Background())
	cause := make(chan error, 1)
	cancel()
	_, err := g.Do(ctx, "k", func(ctx context.Context) (int, error) {
		<-ctx.Done()
		cause <- context.Cause(ctx)
		return 0, ctx.Err()
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("caller got %v", err)
	}
	if err := <-cause; !strings.Contains(err.Error(), "every caller left") {
		t.Errorf("operation was told %v", err)
	}
	g.Wait()
}

// A caller that comes while an abandoned operation is being cancelled waits for
// its end and then gets one of its own, never the cancellation.
func TestNoJoiningOfTheDying(t *testing.T) {
	g := flight.Group[string, int]{Linger: 0}
	dying, unwound := make(chan struct{}), make(chan struct{})
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	g.Do(gone, "k", func(ctx context.Context) (int, error) {
		<-ctx.Done()
		close(dying)
		<-unwound
		return 0, ctx.Err()
	})
	<-dying
	result := make(chan error)
	go func() {
		_, err := g.Do(context.Background(), "k", func(context.Context) (int, error) {
			select {
			case <-unwound:
			default:
				t.Error("two operations at once")
			}
			return 1, nil
		})
		result <- err
	}()
	close(unwound)
	if err := <-result; err != nil {
		t.Errorf("got %v", err)
	}
}

func TestPanicIsAnError(t *testing.T) {
	var g flight.Group[string, int]
	_, err := g.Do(context.Background(), "k", func(context.Context) (int, error) { panic("oops") })
	if err == nil || !strings.Contains(err.Error(), "oops") {
		t.Errorf("got %v", err)
	}
}

func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var turns flight.Turns[string]
		ctx := context.Background()
		done, err := turns.Take(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		if other, err := turns.Take(ctx, "b"); err != nil {
			t.Errorf("another key: %v", err)
		} else {
			other()
		}
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if _, err := turns.Take(short, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("taken twice at once: %v", err)
		}
		got := make(chan struct{})
		go func() {
			again, err := turns.Take(ctx, "a")
			if err != nil {
				t.Error(err)
				return
			}
			close(got)
			again()
		}()
		synctest.Wait()
		select {
		case <-got:
			t.Error("did not wait for the turn to end")
		default:
		}
		done()
		<-got
	})
}
