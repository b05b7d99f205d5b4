package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// A pod whose shim does not answer is stopped and removed all the same: once its
// parts have failed for that reason the shim is ended.
func TestSilentShim(t *testing.T) {
	ctx := context.Background()
	for name, silence := range map[string]error{
		"no answer":     fmt.Errorf("kill task: no answer in time: %w", context.DeadlineExceeded),
		"not connected": fmt.Errorf("the shim does not answer: %w", errdefs.ErrUnavailable),
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			d := w.start()
			id, err := d.Run(ctx, pod("p"))
			if err != nil {
				t.Fatal(err)
			}
			w.with(func() { w.silence = silence })
			if err := d.Stop(ctx, id); err != nil {
				t.Errorf("stop: %v", err)
			}
			w.with(func() { w.silence = silence })
			if err := d.Remove(ctx, id); err != nil {
				t.Errorf("remove: %v", err)
			}
			if l := w.left(); len(l) > 0 {
				t.Errorf("left: %v", l)
			}
			if n := countOf(w, "end silent shim"); n != 2 {
				t.Errorf("a shim was ended %d times, want 2", n)
			}
		})
	}
}

// Any other trouble is no reason to end a shim, and one that answers stays.
func TestOtherTrouble(t *testing.T) {
	ctx := context.Background()
	for name, c := range map[string]struct {
		trouble error
		asked   bool
		words   string
	}{
		"no silence":         {errors.New("trouble"), false, "trouble"},
		"of something else":  {fmt.Errorf("trouble: %w", errdefs.ErrUnavailable), true, "it answers"},
		"a failed condition": {fmt.Errorf("trouble: %w", errdefs.ErrFailedPrecondition), false, "trouble"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			d := w.start()
			id, err := d.Run(ctx, pod("p"))
			if err != nil {
				t.Fatal(err)
			}
			w.with(func() {
				w.strike = func(_ int, name string) (before, after error) {
					if name == "stop containers" {
						before = c.trouble
					}
					return before, nil
				}
			})
			if err := d.Stop(ctx, id); !errors.Is(err, c.trouble) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("stop: %v", err)
			}
			if asked := countOf(w, "end silent shim") > 0; asked != c.asked {
				t.Errorf("the shim was asked for: %v, want %v", asked, c.asked)
			}
			w.with(func() { w.strike = nil })
			if err := d.Remove(ctx, id); err != nil {
				t.Error(err)
			}
		})
	}
}

func (w *world) with(fn func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fn()
}

func countOf(w *world, name string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, did := range w.names {
		if did == name {
			n++
		}
	}
	return n
}
