package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/gantry-cri/gantry/plugin/container"
	"github.com/gantry-cri/gantry/plugin/record"
)

// CreateContainer implements the RPC.
func (s *Server) CreateContainer(ctx context.Context, req *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	sb, err := s.Sandboxes.Get(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	config, err := s.Validate.Container(req.GetConfig(), sb.Config, req.GetSandboxConfig())
	if err != nil {
		return nil, err
	}
	if name := config.GetImage().GetRuntimeHandler(); name != "" && name != sb.Handler.Name {
		return nil, invalid("config.image.runtime_handler", "%.256q is not the pod's, which is %q", name, sb.Handler.Name)
	}
	id, err := s.Containers.Create(ctx, container.Request{SandboxID: sb.ID, Config: config})
	if err != nil {
		return nil, createError(err)
	}
	return &cri.CreateContainerResponse{ContainerId: id}, nil
}

// createError begins with the API's own word where it has one: clients look for
// it at the beginning.
func createError(err error) error {
	if _, ok := errors.AsType[*container.ImageVolumeError](err); ok {
		return fmt.Errorf("%w: create container: %w", crierrors.ErrImageVolumeMountFailed, err)
	}
	return fmt.Errorf("create container: %w", err)
}

// StartContainer implements the RPC.
func (s *Server) StartContainer(ctx context.Context, req *cri.StartContainerRequest) (*cri.StartContainerResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if err := s.Containers.Start(ctx, req.GetContainerId()); err != nil {
		return nil, fmt.Errorf("start container: %w", err)
	}
	return &cri.StartContainerResponse{}, nil
}

// StopContainer implements the RPC. A negative timeout is none.
func (s *Server) StopContainer(ctx context.Context, req *cri.StopContainerRequest) (*cri.StopContainerResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if err := s.Containers.Stop(ctx, req.GetContainerId(), seconds(req.GetTimeout())); err != nil {
		return nil, fmt.Errorf("stop container: %w", err)
	}
	return &cri.StopContainerResponse{}, nil
}

// seconds is a duration of n seconds, without overflow.
func seconds(n int64) time.Duration {
	const longest = int64(time.Duration(1<<63-1) / time.Second)
	return time.Duration(min(max(n, 0), longest)) * time.Second
}

// RemoveContainer implements the RPC.
func (s *Server) RemoveContainer(ctx context.Context, req *cri.RemoveContainerRequest) (*cri.RemoveContainerResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if err := s.Containers.Remove(ctx, req.GetContainerId()); err != nil {
		return nil, fmt.Errorf("remove container: %w", err)
	}
	return &cri.RemoveContainerResponse{}, nil
}

// ContainerStatus implements the RPC.
func (s *Server) ContainerStatus(_ context.Context, req *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	c, err := s.Containers.Get(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &cri.ContainerStatusResponse{Status: s.containerStatus(c)}
	if req.GetVerbose() {
		resp.Info, err = verbose(map[string]any{"info": containerInfo(c)})
	}
	return resp, err
}

// ListContainers implements the RPC.
func (s *Server) ListContainers(_ context.Context, req *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	all := s.Containers.List()
	items := make([][]byte, 0, len(all))
	for _, c := range all {
		if !s.containerMatches(c, req.GetFilter()) {
			continue
		}
		state := s.containerState(c)
		item, err := s.containerItems.of(c.ID, containerVersion{c.Config, state}, func() proto.Message { return containerItem(c, state) })
		if err != nil {
			return nil, fmt.Errorf("list containers: %w", err)
		}
		items = append(items, item)
	}
	s.containerItems.trim(len(all))
	resp := &cri.ListContainersResponse{}
	setWire(resp, s.containerItems.join(items))
	return resp, nil
}

// StreamContainers implements the RPC.
func (s *Server) StreamContainers(req *cri.StreamContainersRequest, stream grpc.ServerStreamingServer[cri.StreamContainersResponse]) error {
	return sendChunks(s.containers(req.GetFilter()), func(part []*cri.Container) error {
		return stream.Send(&cri.StreamContainersResponse{Containers: part})
	})
}

func (s *Server) containers(f *cri.ContainerFilter) []*cri.Container {
	var out []*cri.Container
	for _, c := range s.Containers.List() {
		if s.containerMatches(c, f) {
			out = append(out, containerItem(c, s.containerState(c)))
		}
	}
	return out
}

// containerMatches applies the filter; all that is set must fit.
func (s *Server) containerMatches(c record.Container, f *cri.ContainerFilter) bool {
	if !strings.HasPrefix(c.ID, f.GetId()) || !strings.HasPrefix(c.SandboxID, f.GetPodSandboxId()) {
		return false
	}
	if f.GetState() != nil && f.GetState().GetState() != s.containerState(c) {
		return false
	}
	return selects(f.GetLabelSelector(), c.Config.GetLabels())
}

// UpdateContainerResources implements the RPC.
func (s *Server) UpdateContainerResources(ctx context.Context, req *cri.UpdateContainerResourcesRequest) (*cri.UpdateContainerResourcesResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if req.GetLinux() == nil {
		return nil, invalid("linux", "is required")
	}
	if err := s.Containers.Update(ctx, req.GetContainerId(), req.GetLinux(), req.GetAnnotations()); err != nil {
		return nil, fmt.Errorf("update container resources: %w", err)
	}
	return &cri.UpdateContainerResourcesResponse{}, nil
}

// ReopenContainerLog implements the RPC.
func (s *Server) ReopenContainerLog(ctx context.Context, req *cri.ReopenContainerLogRequest) (*cri.ReopenContainerLogResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if err := s.Containers.ReopenLog(ctx, req.GetContainerId()); err != nil {
		return nil, fmt.Errorf("reopen container log: %w", err)
	}
	return &cri.ReopenContainerLogResponse{}, nil
}

func (s *Server) containerState(c record.Container) cri.ContainerState {
	switch c.Phase {
	case record.ContainerCreating, record.ContainerCreated:
		return cri.ContainerState_CONTAINER_CREATED
	case record.ContainerRunning:
		if s.Containers.Silent(c.ID) {
			return cri.ContainerState_CONTAINER_UNKNOWN
		}
		return cri.ContainerState_CONTAINER_RUNNING
	}
	return cri.ContainerState_CONTAINER_EXITED
}

// containerVersion is what may change in the item of a container.
type containerVersion struct {
	config *cri.ContainerConfig
	state  cri.ContainerState
}

func containerItem(c record.Container, state cri.ContainerState) *cri.Container {
	return &cri.Container{
		Id: c.ID, PodSandboxId: c.SandboxID, Metadata: c.Config.GetMetadata(), Image: c.Config.GetImage(),
		ImageRef: c.Image.Ref, ImageId: c.Image.ID, State: state, CreatedAt: c.CreatedAt.UnixNano(),
		Labels: c.Config.GetLabels(), Annotations: c.Config.GetAnnotations(),
	}
}

func (s *Server) containerStatus(c record.Container) *cri.ContainerStatus {
	image := &cri.ImageSpec{
		Image: c.Image.Name, UserSpecifiedImage: c.Config.GetImage().GetUserSpecifiedImage(),
		Annotations: c.Config.GetImage().GetAnnotations(), RuntimeHandler: c.Config.GetImage().GetRuntimeHandler(),
	}
	return &cri.ContainerStatus{
		Id: c.ID, Metadata: c.Config.GetMetadata(), State: s.containerState(c),
		CreatedAt: c.CreatedAt.UnixNano(), StartedAt: nanos(c.StartedAt), FinishedAt: nanos(c.FinishedAt),
		ExitCode: c.ExitCode, Reason: c.Reason, Message: c.Message,
		Image: image, ImageRef: c.Image.Ref, ImageId: c.Image.ID,
		Labels: c.Config.GetLabels(), Annotations: c.Config.GetAnnotations(), Mounts: c.Mounts,
		LogPath: c.LogPath, Resources: &cri.ContainerResources{Linux: c.Resources}, User: c.User,
		StopSignal: stopSignal(c.StopSignal),
	}
}

// stopSignal is the API's name for a signal: its enumeration has letters for
// the signs in "SIGRTMIN+1".
func stopSignal(name string) cri.Signal {
	name = "SIGNAL_" + strings.NewReplacer("+", "PLUS", "-", "MINUS").Replace(name)
	return cri.Signal(cri.Signal_value[name])
}

// nanos is a time as the API has it, 0 for none.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// containerInfo is the verbose part of a container's status.
func containerInfo(c record.Container) map[string]any {
	info := map[string]any{
		"sandboxID":      c.SandboxID,
		"pid":            c.Pid,
		"phase":          c.Phase,
		"runtimeHandler": c.Handler.Name,
		"runtimeType":    c.Handler.Runtime,
		"snapshotter":    c.Handler.Snapshotter,
		"snapshotKey":    c.ID,
		"config":         c.Config,
	}
	if json.Valid(c.Spec) {
		info["runtimeSpec"] = json.RawMessage(c.Spec)
	}
	return info
}
