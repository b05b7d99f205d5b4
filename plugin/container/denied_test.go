package container_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/record"
)

// A container that is to end for a denied call ends a while after the last one,
// and at last although they go on; one that ends before has its own reason.
func TestDenied(t *testing.T) {
	const stop = true
	for name, tc := range map[string]struct {
		calls  int // one each second
		stop   bool
		exit   uint32 // of its own, 0 for none
		within time.Duration
		reason string
	}{
		"recorded":       {calls: 3, reason: ""},
		"one":            {calls: 1, stop: stop, within: 6 * time.Second, reason: record.ReasonSeccompKilled},
		"some":           {calls: 4, stop: stop, within: 9 * time.Second, reason: record.ReasonSeccompKilled},
		"without end":    {calls: 100, stop: stop, within: 31 * time.Second, reason: record.ReasonSeccompKilled},
		"ends by itself": {calls: 1, stop: stop, exit: 3, within: 2 * time.Second, reason: record.ReasonError},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				d := w.start()
				ctx := context.Background()
				id := mustStart(t, d)
				begin := time.Now()
				for i := range tc.calls {
					call := facts.DeniedCall{Name: fmt.Sprint("call", i), Stop: tc.stop}
					for range 2 {
						if err := d.Denied(ctx, id, call); err != nil {
							t.Fatal(err)
						}
					}
					time.Sleep(time.Second)
				}
				if tc.exit != 0 {
					w.runtime.Exit(id, tc.exit)
				}
				time.Sleep(time.Hour)
				c, err := d.Get(id)
				if err != nil || c.Reason != tc.reason || tc.calls < 10 && len(c.Denied) != tc.calls || len(c.Denied) == 0 {
					t.Errorf("reason %q, %d calls are recorded, %v", c.Reason, len(c.Denied), err)
				}
				if tc.reason == "" {
					return
				}
				if took := c.FinishedAt.Sub(begin); took > tc.within {
					t.Errorf("it ended after %s", took)
				}
				if named := c.Message != ""; named != (tc.reason == record.ReasonSeccompKilled) {
					t.Errorf("the message is %q", c.Message)
				}
				removed(t, d, id)
			})
		})
	}
}

// A call that cannot be recorded ends the container all the same; the next daemon
// does what one that crashed was about to.
func TestDeniedFaults(t *testing.T) {
	for _, crash := range []bool{false, true} {
		t.Run(fmt.Sprint("crash=", crash), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				d := w.start()
				ctx := context.Background()
				id := mustStart(t, d)
				time.Sleep(time.Minute) // its start is on disk
				if !crash {
					w.strike = func(_ int, name string) (before, after error) {
						w.strike = nil
						return errStruck, nil
					}
				}
				if err := d.Denied(ctx, id, facts.DeniedCall{Name: "mount", Stop: true}); errors.Is(err, errStruck) == crash {
					t.Fatalf("denied: %v", err)
				}
				if crash {
					w.crash()
					d.bg.Stop(ctx)
					d = w.start()
					<-d.Recover(ctx)
				}
				time.Sleep(time.Minute)
				want := map[bool]string{false: record.ReasonError, true: record.ReasonSeccompKilled}[crash]
				if c, err := d.Get(id); err != nil || c.Phase != record.ContainerExited || c.Reason != want {
					t.Errorf("%s, %q, %v", c.Phase, c.Reason, err)
				}
				if err := d.Denied(ctx, id, facts.DeniedCall{Name: "mount", Stop: true}); err != nil {
					t.Errorf("of a container that has ended: %v", err)
				}
				removed(t, d, id)
			})
		})
	}
}

// A call by which the first process ends is the reason of that end.
func TestDeniedByItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		id := mustStart(t, d)
		if err := d.Denied(context.Background(), id, facts.DeniedCall{Name: "reboot", Ends: true}); err != nil {
			t.Fatal(err)
		}
		w.runtime.Exit(id, 137)
		synctest.Wait()
		if c, err := d.Get(id); err != nil || c.Reason != record.ReasonSeccompKilled || c.Message != "system calls that the seccomp profile denies: reboot" {
			t.Errorf("%q, %q, %v", c.Reason, c.Message, err)
		}
		removed(t, d, id)
	})
}

// removed removes the container and wants nothing to be left.
func removed(t *testing.T, d *daemon, id string) {
	t.Helper()
	if err := d.Remove(context.Background(), id); err != nil {
		t.Error(err)
	}
	d.clean()
}
