package container_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// TestPluginsHear: of everything that happens to a container, in order and
// once, and what they want set is set.
func TestPluginsHear(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		ctx := context.Background()
		id, err := d.Create(ctx, d.request("sleep"))
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Start(ctx, id); err != nil {
			t.Fatal(err)
		}
		if err := d.Update(ctx, id, &cri.LinuxContainerResources{CpuQuota: 6}, nil); err != nil {
			t.Fatal(err)
		}
		if c, err := d.Get(id); err != nil || c.Resources.GetCpuQuota() != 7 {
			t.Errorf("the quota is %d, %v", c.Resources.GetCpuQuota(), err)
		}
		if err := d.Apply(ctx, id, &cri.LinuxContainerResources{CpuQuota: 6}); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := d.Stop(ctx, id, 0); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		}
		for range 2 {
			if err := d.Remove(ctx, id); err != nil {
				t.Fatal(err)
			}
		}
		want := []facts.PluginEvent{
			facts.ContainerCreate, facts.ContainerCreated, facts.ContainerStart, facts.ContainerStarted,
			facts.ContainerUpdate, facts.ContainerUpdated, facts.ContainerStopped, facts.ContainerRemoved,
		}
		if got := w.heard(); !slices.Equal(got, want) {
			t.Errorf("heard %q, want %q", got, want)
		}
	})
}

// TestPluginsRefuse: a container or a start that plugins refuse leaves nothing
// running, and they hear of its end.
func TestPluginsRefuse(t *testing.T) {
	for refused, want := range map[string][]facts.PluginEvent{
		"ask plugins about a container": {facts.ContainerCreate, facts.ContainerStopped, facts.ContainerRemoved},
		"ask plugins about a start":     {facts.ContainerCreate, facts.ContainerCreated, facts.ContainerStart, facts.ContainerStopped, facts.ContainerRemoved},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			d := w.start()
			w.strike = func(_ int, name string) (before, after error) {
				if name == refused {
					return errStruck, nil
				}
				return nil, nil
			}
			ctx := context.Background()
			id, err := d.Create(ctx, d.request("sleep"))
			if err == nil {
				err = d.Start(ctx, id)
			}
			if err == nil {
				t.Fatalf("%s: no error", refused)
			}
			if len(w.runtime.Alive()) > 0 {
				t.Errorf("%s: %q run", refused, w.runtime.Alive())
			}
			if id != "" {
				if err := d.Remove(ctx, id); err != nil {
					t.Fatal(err)
				}
			}
			d.clean()
			if got := w.heard(); !slices.Equal(got, want) {
				t.Errorf("%s: heard %q, want %q", refused, got, want)
			}
		})
	}
}
