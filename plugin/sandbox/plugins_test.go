package sandbox_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// TestPluginsHear: of everything that happens to a pod, in order and once,
// however often it is asked for.
func TestPluginsHear(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		ctx := context.Background()
		id, err := d.Run(ctx, pod("a"))
		if err != nil {
			t.Fatal(err)
		}
		if err := d.UpdateResources(ctx, id, nil, nil); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := d.Stop(ctx, id); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			if err := d.Remove(ctx, id); err != nil {
				t.Fatal(err)
			}
		}
		want := []facts.PluginEvent{facts.PodRun, facts.PodUpdate, facts.PodUpdated, facts.PodStopped, facts.PodRemoved}
		if !slices.Equal(w.told, want) {
			t.Errorf("heard %q, want %q", w.told, want)
		}
	})
}

// TestPluginsHearOfDeath: a pod that ends by itself.
func TestPluginsHearOfDeath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		id, err := d.Run(context.Background(), pod("a"))
		if err != nil {
			t.Fatal(err)
		}
		w.end(id, 1)
		time.Sleep(time.Minute)
		if err := d.Remove(context.Background(), id); err != nil {
			t.Fatal(err)
		}
		if want := []facts.PluginEvent{facts.PodRun, facts.PodStopped, facts.PodRemoved}; !slices.Equal(w.told, want) {
			t.Errorf("heard %q, want %q", w.told, want)
		}
	})
}

// TestPluginsRefuse: a pod that plugins refuse leaves nothing, and they hear
// that it is gone.
func TestPluginsRefuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		w.strike = func(_ int, name string) (before, after error) {
			if name == "ask plugins" {
				return errStruck, nil
			}
			return nil, nil
		}
		if _, err := d.Run(context.Background(), pod("a")); err == nil {
			t.Fatal("no error")
		}
		d.clean()
		if want := []facts.PluginEvent{facts.PodRun, facts.PodStopped, facts.PodRemoved}; !slices.Equal(w.told, want) {
			t.Errorf("heard %q, want %q", w.told, want)
		}
	})
}
