package cri

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Event is something that happened to a pod's sandbox or to a container.
type Event struct {
	// ID is the sandbox's or the container's.
	ID   string
	Type cri.ContainerEventType
	At   time.Time
	// Sandbox is the pod's as of then, zero when it was gone already.
	Sandbox record.Sandbox
	// Containers are those of the pod as of then, without a deleted one.
	Containers []record.Container
}

// Events tells what happens.
type Events interface {
	// Follow calls tell with each event from before it calls begun, until ctx
	// ends, one of the two fails, or tell is too slow: ResourceExhausted.
	Follow(ctx context.Context, begun func() error, tell func(Event) error) error
}

// Endless are the streams that last for as long as their client likes.
var Endless = []string{"GetContainerEvents"}

// GetContainerEvents implements the RPC. The headers are sent once nothing more
// can be missed. A client that is too slow is told so, and lists.
func (s *Server) GetContainerEvents(_ *cri.GetEventsRequest, stream grpc.ServerStreamingServer[cri.ContainerEventResponse]) error {
	err := s.Events.Follow(stream.Context(), func() error { return stream.SendHeader(metadata.MD{}) }, func(e Event) error {
		return stream.Send(s.event(e))
	})
	if err != nil {
		return fmt.Errorf("get container events: %w", err)
	}
	return nil
}

func (s *Server) event(e Event) *cri.ContainerEventResponse {
	out := &cri.ContainerEventResponse{ContainerId: e.ID, ContainerEventType: e.Type, CreatedAt: e.At.UnixNano()}
	if e.Sandbox.ID != "" {
		out.PodSandboxStatus = sandboxStatus(e.Sandbox)
	}
	for _, c := range e.Containers {
		if c.Phase != record.ContainerCreating {
			out.ContainersStatuses = append(out.ContainersStatuses, s.containerStatus(c))
		}
	}
	return out
}
