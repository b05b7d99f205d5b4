// Package events tells subscribers what becomes of pods and containers. Events
// are made from what is recorded, as it is recorded, so that they never disagree
// with what a list or a status answers. Start reading at Hub.
package events

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// What can happen. Of one pod or container, created comes first and deleted
// last, and each at most once, but for created, which comes again for a container
// that was taken for started and had not been.
const (
	created = cri.ContainerEventType_CONTAINER_CREATED_EVENT
	started = cri.ContainerEventType_CONTAINER_STARTED_EVENT
	stopped = cri.ContainerEventType_CONTAINER_STOPPED_EVENT
	deleted = cri.ContainerEventType_CONTAINER_DELETED_EVENT
)

// Event is something that happened to a pod's sandbox or to a container.
type Event struct {
	// ID is the sandbox's or the container's.
	ID   string
	Type cri.ContainerEventType
	At   time.Time
	// Sandbox is the pod's as of then; of a deleted one, as it was before. It
	// is zero when the pod was gone before its container.
	Sandbox record.Sandbox
	// Containers are those of the pod as of then, without a deleted one.
	Containers []record.Container
}

// Records finds what belongs to an event.
type Records interface {
	Sandbox(id string) (record.Sandbox, error)
	ContainersOf(sandboxID string) []record.Container
}

// Limit is how many events may wait for one subscriber.
const Limit = 256

// Hub hands events to subscribers. It never waits for one.
type Hub struct {
	records Records
	limit   int
	now     func() time.Time
	dropped prometheus.Counter
	count   prometheus.GaugeFunc

	mu          sync.Mutex
	subscribers map[*Subscription]struct{}
}

// New returns a hub without subscribers.
func New(r Records) *Hub {
	h := &Hub{records: r, limit: Limit, now: time.Now, subscribers: map[*Subscription]struct{}{},
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "gantry_container_events_dropped_total",
			Help: "Container events that a subscriber did not get because it was too slow.",
		})}
	h.count = prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "gantry_container_event_subscribers", Help: "Clients that are told of container events.",
	}, func() float64 {
		h.mu.Lock()
		defer h.mu.Unlock()
		return float64(len(h.subscribers))
	})
	return h
}

// Metrics are the collectors to be registered.
func (h *Hub) Metrics() []prometheus.Collector { return []prometheus.Collector{h.dropped, h.count} }

// SandboxChanged makes events of a change of a sandbox's record; before is nil
// for a new one and after for a deleted one. Changes of one record come one at a
// time and in order.
func (h *Hub) SandboxChanged(before, after *record.Sandbox) {
	types := between(ofSandbox(before), ofSandbox(after))
	if len(types) == 0 || !h.watched() {
		return
	}
	sb := after
	if sb == nil {
		sb = before
	}
	for _, typ := range types {
		h.publish(Event{ID: sb.ID, Type: typ, At: h.now(), Sandbox: *sb, Containers: h.records.ContainersOf(sb.ID)})
	}
}

// ContainerChanged is SandboxChanged for a container.
func (h *Hub) ContainerChanged(before, after *record.Container) {
	types := between(ofContainer(before), ofContainer(after))
	if len(types) == 0 || !h.watched() {
		return
	}
	c := after
	if c == nil {
		c = before
	}
	sb, err := h.records.Sandbox(c.SandboxID)
	if err != nil {
		sb = record.Sandbox{} // removed meanwhile
	}
	for _, typ := range types {
		h.publish(Event{ID: c.ID, Type: typ, At: h.now(), Sandbox: sb, Containers: h.records.ContainersOf(c.SandboxID)})
	}
}

// shown is what a list shows of a record.
type shown int

const (
	nothing shown = iota
	unstarted
	running
	ended
)

func ofSandbox(sb *record.Sandbox) shown {
	switch {
	case sb == nil || sb.Phase == record.Creating:
		return nothing
	case sb.Phase == record.Ready:
		return running
	}
	return ended
}

func ofContainer(c *record.Container) shown {
	switch {
	case c == nil || c.Phase == record.ContainerCreating:
		return nothing
	case c.Phase == record.ContainerCreated:
		return unstarted
	case c.Phase == record.ContainerRunning:
		return running
	}
	return ended
}

// between is what is told when a list shows something else than before.
func between(was, is shown) (types []cri.ContainerEventType) {
	switch is {
	case was:
		return nil
	case nothing:
		return []cri.ContainerEventType{deleted}
	case unstarted:
		return []cri.ContainerEventType{created}
	case running:
		types = []cri.ContainerEventType{created, started}
	case ended:
		types = []cri.ContainerEventType{created, stopped}
	}
	if was != nothing {
		types = types[1:]
	}
	return types
}

func (h *Hub) watched() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.subscribers) > 0
}

func (h *Hub) publish(e Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range h.subscribers {
		s.add(e)
	}
}

// Subscription is one subscriber's queue.
type Subscription struct {
	hub   *Hub
	ready chan struct{} // capacity 1: there is something for Next

	// Guarded by hub.mu.
	queue  []Event
	missed int
}

// Subscribe returns a subscription to what happens from now on. The caller
// closes it.
func (h *Hub) Subscribe() *Subscription {
	s := &Subscription{hub: h, ready: make(chan struct{}, 1)}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.subscribers[s] = struct{}{}
	return s
}

// Close ends the subscription.
func (s *Subscription) Close() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	delete(s.hub.subscribers, s)
	s.queue = nil
}

// add queues the event. A subscriber that has missed one gets no other: it has
// to look for itself how things stand, and what is queued would be old news.
func (s *Subscription) add(e Event) {
	if s.missed > 0 || len(s.queue) == s.hub.limit {
		s.missed += len(s.queue) + 1
		s.hub.dropped.Add(float64(len(s.queue) + 1))
		s.queue = nil
	} else {
		s.queue = append(s.queue, e)
	}
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

// Next waits for the next event. A subscriber that was too slow and missed some
// gets ResourceExhausted; it subscribes anew and lists.
func (s *Subscription) Next(ctx context.Context) (Event, error) {
	for {
		e, ok, err := s.take()
		if ok || err != nil {
			return e, err
		}
		select {
		case <-s.ready:
		case <-ctx.Done():
			return Event{}, context.Cause(ctx)
		}
	}
}

func (s *Subscription) take() (Event, bool, error) {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	if s.missed > 0 {
		return Event{}, false, fmt.Errorf("%d container events were missed, as the client is too slow; subscribe again and list: %w",
			s.missed, errdefs.ErrResourceExhausted)
	}
	if len(s.queue) == 0 {
		return Event{}, false, nil
	}
	e := s.queue[0]
	s.queue[0] = Event{}
	s.queue = s.queue[1:]
	return e, true, nil
}
