package task

import (
	"context"
	"sync"
	"time"

	events "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/containerd/v2/pkg/ttrpcutil"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// queued is how many events wait for a daemon that is away. It asks for the
	// state of every task when it is back.
	queued       = 4096
	publishLimit = 5 * time.Second
	publishRetry = 200 * time.Millisecond
	publishPause = 5 * time.Second
)

// Publisher sends events to containerd, one after the other in the order in
// which they were given. Nobody waits for it.
type Publisher struct {
	namespace string
	client    *ttrpcutil.Client

	mu    sync.Mutex
	queue []*types.Envelope
	more  chan struct{} // capacity 1
}

// NewPublisher returns a Publisher for the containerd at a ttrpc address. Run
// sends.
func NewPublisher(address, namespace string) (*Publisher, error) {
	c, err := ttrpcutil.NewClient(address)
	if err != nil {
		return nil, err
	}
	return &Publisher{namespace: namespace, client: c, more: make(chan struct{}, 1)}, nil
}

// Publish puts an event into the queue; the oldest is dropped from one that is
// full.
func (p *Publisher) Publish(ctx context.Context, event any) {
	a, err := typeurl.MarshalAnyToProto(event)
	if err != nil {
		log.G(ctx).WithError(err).Error("encode an event")
		return
	}
	e := &types.Envelope{Timestamp: timestamppb.Now(), Namespace: p.namespace, Topic: runtime.GetTopic(event), Event: a}
	p.mu.Lock()
	if len(p.queue) == queued {
		log.G(ctx).WithField("topic", p.queue[0].GetTopic()).Warn("too many events wait for containerd; the oldest is dropped")
		p.queue = p.queue[1:]
	}
	p.queue = append(p.queue, e)
	p.mu.Unlock()
	select {
	case p.more <- struct{}{}:
	default:
	}
}

// Run sends until ctx ends. An event that cannot be sent is tried again before
// the next.
func (p *Publisher) Run(ctx context.Context) {
	pause := publishRetry
	for ctx.Err() == nil {
		e := p.first()
		if e == nil {
			select {
			case <-p.more:
			case <-ctx.Done():
			}
			continue
		}
		if err := p.forward(ctx, e); err != nil {
			log.G(ctx).WithError(err).WithField("topic", e.GetTopic()).Debug("send an event; trying again")
			timer := time.NewTimer(pause)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
			}
			pause = min(2*pause, publishPause)
			continue
		}
		pause = publishRetry
		p.drop(e)
	}
}

func (p *Publisher) first() *types.Envelope {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 {
		return nil
	}
	return p.queue[0]
}

// drop takes the event away, unless it was dropped for another.
func (p *Publisher) drop(e *types.Envelope) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) > 0 && p.queue[0] == e {
		p.queue[0] = nil
		p.queue = p.queue[1:]
	}
}

func (p *Publisher) forward(ctx context.Context, e *types.Envelope) error {
	ctx, cancel := context.WithTimeout(ctx, publishLimit)
	defer cancel()
	service, err := p.client.EventsService()
	if err == nil {
		if _, err = service.Forward(ctx, &events.ForwardRequest{Envelope: e}); err == nil {
			return nil
		}
		// The daemon may be another one by now.
		_ = p.client.Reconnect()
	}
	return err
}
