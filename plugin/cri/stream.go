package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// ExecSync implements the RPC.
func (s *Server) ExecSync(ctx context.Context, req *cri.ExecSyncRequest) (*cri.ExecSyncResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if len(req.GetCmd()) == 0 {
		return nil, invalid("cmd", "is required")
	}
	out, err := s.Containers.ExecSync(ctx, req.GetContainerId(), req.GetCmd(), seconds(req.GetTimeout()))
	if err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	return &cri.ExecSyncResponse{Stdout: out.Stdout, Stderr: out.Stderr, ExitCode: out.ExitCode}, nil
}

// Exec implements the RPC.
func (s *Server) Exec(_ context.Context, req *cri.ExecRequest) (*cri.ExecResponse, error) {
	if err := s.mustRun(req.GetContainerId()); err != nil {
		return nil, err
	}
	if len(req.GetCmd()) == 0 {
		return nil, invalid("cmd", "is required")
	}
	return s.Streaming.GetExec(req)
}

// Attach implements the RPC.
func (s *Server) Attach(_ context.Context, req *cri.AttachRequest) (*cri.AttachResponse, error) {
	if err := s.mustRun(req.GetContainerId()); err != nil {
		return nil, err
	}
	return s.Streaming.GetAttach(req)
}

// PortForward implements the RPC.
func (s *Server) PortForward(_ context.Context, req *cri.PortForwardRequest) (*cri.PortForwardResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	sb, err := s.Sandboxes.Get(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if sb.Phase != record.Ready {
		return nil, fmt.Errorf("sandbox %s is %s: %w", sb.ID, sb.Phase, errdefs.ErrFailedPrecondition)
	}
	return s.Streaming.GetPortForward(req)
}

func (s *Server) mustRun(id string) error {
	if err := required("container_id", id); err != nil {
		return err
	}
	c, err := s.Containers.Get(id)
	if err != nil {
		return err
	}
	if c.Phase != record.ContainerRunning {
		return fmt.Errorf("container %s is %s, not running: %w", c.ID, c.Phase, errdefs.ErrFailedPrecondition)
	}
	return nil
}
