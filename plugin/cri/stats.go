package cri

import (
	"context"
	"fmt"

	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Stats measures containers and pods.
type Stats interface {
	Container(ctx context.Context, c record.Container) (*cri.ContainerStats, error)
	Sandbox(ctx context.Context, sb record.Sandbox, containers []record.Container) (*cri.PodSandboxStats, error)
}

// measureAtOnce bounds how many containers one list measures side by side; each
// may wait for the size of its writable layer.
const measureAtOnce = 32

// ContainerStats implements the RPC.
func (s *Server) ContainerStats(ctx context.Context, req *cri.ContainerStatsRequest) (*cri.ContainerStatsResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	c, err := s.Containers.Get(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	stats, err := s.Stats.Container(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("container stats: %w", err)
	}
	return &cri.ContainerStatsResponse{Stats: stats}, nil
}

// ListContainerStats implements the RPC.
func (s *Server) ListContainerStats(ctx context.Context, req *cri.ListContainerStatsRequest) (*cri.ListContainerStatsResponse, error) {
	return &cri.ListContainerStatsResponse{Stats: s.listContainerStats(ctx, req.GetFilter())}, nil
}

// StreamContainerStats implements the RPC.
func (s *Server) StreamContainerStats(req *cri.StreamContainerStatsRequest, stream grpc.ServerStreamingServer[cri.StreamContainerStatsResponse]) error {
	return sendChunks(s.listContainerStats(stream.Context(), req.GetFilter()), func(part []*cri.ContainerStats) error {
		return stream.Send(&cri.StreamContainerStatsResponse{ContainerStats: part})
	})
}

func (s *Server) listContainerStats(ctx context.Context, f *cri.ContainerStatsFilter) []*cri.ContainerStats {
	filter := &cri.ContainerFilter{Id: f.GetId(), PodSandboxId: f.GetPodSandboxId(), LabelSelector: f.GetLabelSelector()}
	var chosen []record.Container
	for _, c := range s.Containers.List() {
		if c.Phase != record.ContainerExited && s.containerMatches(c, filter) {
			chosen = append(chosen, c)
		}
	}
	return measure(ctx, chosen, s.Stats.Container)
}

// PodSandboxStats implements the RPC.
func (s *Server) PodSandboxStats(ctx context.Context, req *cri.PodSandboxStatsRequest) (*cri.PodSandboxStatsResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	sb, err := s.Sandboxes.Get(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	stats, err := s.sandboxStats(ctx, sb)
	if err != nil {
		return nil, fmt.Errorf("pod sandbox stats: %w", err)
	}
	return &cri.PodSandboxStatsResponse{Stats: stats}, nil
}

// ListPodSandboxStats implements the RPC.
func (s *Server) ListPodSandboxStats(ctx context.Context, req *cri.ListPodSandboxStatsRequest) (*cri.ListPodSandboxStatsResponse, error) {
	return &cri.ListPodSandboxStatsResponse{Stats: s.listSandboxStats(ctx, req.GetFilter())}, nil
}

// StreamPodSandboxStats implements the RPC.
func (s *Server) StreamPodSandboxStats(req *cri.StreamPodSandboxStatsRequest, stream grpc.ServerStreamingServer[cri.StreamPodSandboxStatsResponse]) error {
	return sendChunks(s.listSandboxStats(stream.Context(), req.GetFilter()), func(part []*cri.PodSandboxStats) error {
		return stream.Send(&cri.StreamPodSandboxStatsResponse{PodSandboxStats: part})
	})
}

func (s *Server) listSandboxStats(ctx context.Context, f *cri.PodSandboxStatsFilter) []*cri.PodSandboxStats {
	filter := &cri.PodSandboxFilter{Id: f.GetId(), LabelSelector: f.GetLabelSelector()}
	var chosen []record.Sandbox
	for _, sb := range s.Sandboxes.List() {
		if sb.Phase == record.Ready && sandboxMatches(sb, filter) {
			chosen = append(chosen, sb)
		}
	}
	return measure(ctx, chosen, s.sandboxStats)
}

func (s *Server) sandboxStats(ctx context.Context, sb record.Sandbox) (*cri.PodSandboxStats, error) {
	return s.Stats.Sandbox(ctx, sb, s.Containers.Of(sb.ID))
}

// measure applies one to all, side by side, and keeps their order. What cannot
// be measured, as it may just have ended, is left out: it is no reason to tell
// nothing of the rest.
func measure[T, R any](ctx context.Context, all []T, one func(context.Context, T) (*R, error)) []*R {
	results := make([]*R, len(all))
	var g errgroup.Group
	g.SetLimit(measureAtOnce)
	for i, v := range all {
		g.Go(func() error {
			r, err := one(ctx, v)
			if err != nil {
				log.G(ctx).WithError(err).Debug("not measured")
				return nil
			}
			results[i] = r
			return nil
		})
	}
	_ = g.Wait() // nothing above returns an error
	out := results[:0]
	for _, r := range results {
		if r != nil {
			out = append(out, r)
		}
	}
	return out
}
