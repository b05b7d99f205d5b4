package image

import (
	"context"
	"fmt"
	"time"

	eventtypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
)

// resubscribePause keeps a subscription that breaks at once from spinning.
const resubscribePause = time.Second

// follow keeps the index up to date with what others do to the image store.
// It subscribes before it loads, so that nothing falls between, and reports
// the end of the first load. When the stream of events breaks, it begins
// again.
func (s *Service) follow(ctx context.Context, loaded chan<- error) {
	for first := true; ; first = false {
		var failed error
		err := s.followOnce(ctx, func(err error) {
			failed = err
			if first {
				loaded <- err
			}
		})
		if first && failed != nil {
			return // New reports it
		}
		if ctx.Err() != nil {
			return
		}
		logFailure(ctx, "image events were interrupted", err)
		if sleep(ctx, resubscribePause) != nil {
			return
		}
	}
}

func (s *Service) followOnce(ctx context.Context, loaded func(error)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	envelopes, errs := s.o.Events.Subscribe(ctx, `topic~="^/images/"`)
	err := s.index.load(ctx)
	loaded(err)
	if err != nil {
		return fmt.Errorf("load images: %w", err)
	}
	for {
		select {
		case env, ok := <-envelopes:
			if !ok {
				return fmt.Errorf("receive event: stream ended: %w", errdefs.ErrUnavailable)
			}
			if err := s.take(ctx, env); err != nil {
				return err
			}
		case err := <-errs:
			if err == nil {
				err = context.Cause(ctx)
			}
			if err == nil {
				err = errdefs.ErrUnavailable
			}
			return fmt.Errorf("receive event: %w", err)
		}
	}
}

// take applies one event. It is a hint: what counts is what the store says.
func (s *Service) take(ctx context.Context, env *events.Envelope) error {
	if env.Namespace != namespace {
		return nil
	}
	event, err := typeurl.UnmarshalAny(env.Event)
	if err != nil {
		return fmt.Errorf("read event %s: %w", env.Topic, err)
	}
	var name string
	switch e := event.(type) {
	case *eventtypes.ImageCreate:
		name = e.GetName()
	case *eventtypes.ImageUpdate:
		name = e.GetName()
	case *eventtypes.ImageDelete:
		name = e.GetName()
	default:
		return nil
	}
	if err := s.index.refresh(ctx, name); err != nil {
		return fmt.Errorf("take over image %s: %w", name, err)
	}
	return nil
}
