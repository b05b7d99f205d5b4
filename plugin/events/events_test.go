package events

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

func TestContainerEvents(t *testing.T) {
	at := func(p record.ContainerPhase) *record.Container { return &record.Container{Phase: p} }
	for _, c := range []struct {
		before, after *record.Container
		want          []cri.ContainerEventType
	}{
		{nil, at(record.ContainerCreating), nil},
		{at(record.ContainerCreating), nil, nil},
		{at(record.ContainerCreating), at(record.ContainerCreating), nil},
		{at(record.ContainerCreating), at(record.ContainerCreated), []cri.ContainerEventType{created}},
		{at(record.ContainerCreating), at(record.ContainerExited), []cri.ContainerEventType{created, stopped}},
		{at(record.ContainerCreated), at(record.ContainerCreated), nil},
		{at(record.ContainerCreated), at(record.ContainerRunning), []cri.ContainerEventType{started}},
		{at(record.ContainerCreated), at(record.ContainerExited), []cri.ContainerEventType{stopped}},
		{at(record.ContainerCreated), nil, []cri.ContainerEventType{deleted}},
		{at(record.ContainerRunning), at(record.ContainerCreated), []cri.ContainerEventType{created}},
		{at(record.ContainerRunning), at(record.ContainerExited), []cri.ContainerEventType{stopped}},
		{at(record.ContainerExited), at(record.ContainerExited), nil},
		{at(record.ContainerExited), nil, []cri.ContainerEventType{deleted}},
	} {
		if got := between(ofContainer(c.before), ofContainer(c.after)); !slices.Equal(got, c.want) {
			t.Errorf("%+v to %+v: %v, want %v", c.before, c.after, got, c.want)
		}
	}
}

func TestSandboxEvents(t *testing.T) {
	at := func(p record.Phase) *record.Sandbox { return &record.Sandbox{Phase: p} }
	for _, c := range []struct {
		before, after *record.Sandbox
		want          []cri.ContainerEventType
	}{
		{nil, at(record.Creating), nil},
		{at(record.Creating), nil, nil},
		{at(record.Creating), at(record.Ready), []cri.ContainerEventType{created, started}},
		{at(record.Creating), at(record.NotReady), []cri.ContainerEventType{created, stopped}},
		{at(record.Ready), at(record.Ready), nil},
		{at(record.Ready), at(record.NotReady), []cri.ContainerEventType{stopped}},
		{at(record.NotReady), at(record.NotReady), nil},
		{at(record.NotReady), nil, []cri.ContainerEventType{deleted}},
	} {
		if got := between(ofSandbox(c.before), ofSandbox(c.after)); !slices.Equal(got, c.want) {
			t.Errorf("%+v to %+v: %v, want %v", c.before, c.after, got, c.want)
		}
	}
}

// noRecords finds nothing.
type noRecords struct{}

func (noRecords) Sandbox(id string) (record.Sandbox, error) {
	return record.Sandbox{}, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
}

func (noRecords) ContainersOf(string) []record.Container { return nil }

// create has the hub hear of a new container.
func create(h *Hub, id string) {
	h.ContainerChanged(&record.Container{ID: id, Phase: record.ContainerCreating}, &record.Container{ID: id, Phase: record.ContainerCreated})
}

func value(t *testing.T, m prometheus.Metric) float64 {
	t.Helper()
	var out dto.Metric
	if err := m.Write(&out); err != nil {
		t.Fatal(err)
	}
	return out.GetCounter().GetValue() + out.GetGauge().GetValue()
}

func TestEachGetsEvery(t *testing.T) {
	h := New(noRecords{})
	create(h, "unwatched")
	all := []*Subscription{h.Subscribe(), h.Subscribe(), h.Subscribe()}
	for i := range 5 {
		create(h, fmt.Sprint(i))
	}
	for n, s := range all {
		for i := range 5 {
			if e, err := s.Next(t.Context()); err != nil || e.ID != fmt.Sprint(i) || e.Type != created || e.At.IsZero() {
				t.Errorf("subscriber %d, event %d: %+v, %v", n, i, e, err)
			}
		}
	}
	all[0].Close()
	create(h, "late")
	if e, err := all[1].Next(t.Context()); err != nil || e.ID != "late" {
		t.Errorf("%+v, %v", e, err)
	}
	if got := value(t, h.count); got != 2 {
		t.Errorf("%v subscribers", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := all[1].Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("no event: %v", err)
	}
}

// TestTooSlow: whoever missed an event is told so, and counted; others are not
// touched by it.
func TestTooSlow(t *testing.T) {
	h := New(noRecords{})
	h.limit = 3
	slow, fast := h.Subscribe(), h.Subscribe()
	for i := range 6 {
		create(h, fmt.Sprint(i))
		if e, err := fast.Next(t.Context()); err != nil || e.ID != fmt.Sprint(i) {
			t.Errorf("event %d: %+v, %v", i, e, err)
		}
	}
	for range 2 {
		if e, err := slow.Next(t.Context()); !errdefs.IsResourceExhausted(err) {
			t.Errorf("%+v, %v", e, err)
		}
	}
	if got := value(t, h.dropped); got != 6 {
		t.Errorf("%v events are counted as dropped", got)
	}
	slow.Close()
	create(h, "more")
	if got := value(t, h.dropped); got != 6 {
		t.Errorf("%v events are counted as dropped after the end", got)
	}
}
