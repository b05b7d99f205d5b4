package sandbox_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gantry-cri/gantry/plugin/record"
)

// A subscription that ends says nothing of the sandbox: it is watched anew.
func TestWatchAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		id, err := d.Run(context.Background(), pod("a"))
		if err != nil {
			t.Fatal(err)
		}
		w.mu.Lock()
		close(w.instances[id])
		w.instances[id] = make(chan record.Exit, 1)
		w.mu.Unlock()
		time.Sleep(time.Minute)
		if sb, err := d.Get(id); err != nil || sb.Phase != record.Ready {
			t.Errorf("the pod is %s (%s), %v", sb.Phase, sb.Reason, err)
		}
		w.end(id, 3)
		time.Sleep(time.Minute)
		if sb, err := d.Get(id); err != nil || sb.Phase != record.NotReady {
			t.Errorf("after its end the pod is %s, %v", sb.Phase, err)
		}
		d.bg.Stop(context.Background())
	})
}
