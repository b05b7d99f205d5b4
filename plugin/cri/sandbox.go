package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/sandbox"
)

// RunPodSandbox implements the RPC.
func (s *Server) RunPodSandbox(ctx context.Context, req *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error) {
	config, err := s.Validate.Pod(req.GetConfig())
	if err != nil {
		return nil, err
	}
	handler, err := handlerFor(config, req.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	id, err := s.Sandboxes.Run(ctx, sandbox.Request{Config: config, Handler: handler})
	if err != nil {
		return nil, fmt.Errorf("run pod sandbox: %w", err)
	}
	return &cri.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// A pod with the annotation, from before there were runtime classes, is run by
// the handler of that name.
const (
	untrustedAnnotation = "io.kubernetes.cri.untrusted-workload"
	untrustedHandler    = "untrusted"
)

// handlerFor returns the name of the handler that a pod is run by. A pod that
// is not trusted cannot have another one, nor namespaces of the node, which no
// handler keeps from it.
func handlerFor(c *cri.PodSandboxConfig, asked string) (string, error) {
	if c.GetAnnotations()[untrustedAnnotation] != "true" {
		return asked, nil
	}
	if asked != "" && asked != untrustedHandler {
		return "", fmt.Errorf("runtime_handler: %.256q was asked for, and the annotation %s means %q: %w",
			asked, untrustedAnnotation, untrustedHandler, errdefs.ErrInvalidArgument)
	}
	o := c.GetLinux().GetSecurityContext().GetNamespaceOptions()
	for _, ns := range []struct {
		name string
		mode cri.NamespaceMode
	}{{"network", o.GetNetwork()}, {"pid", o.GetPid()}, {"ipc", o.GetIpc()}} {
		if ns.mode == cri.NamespaceMode_NODE {
			return "", fmt.Errorf("config.linux.security_context.namespace_options.%s: a pod with the annotation %s cannot have the node's: %w",
				ns.name, untrustedAnnotation, errdefs.ErrInvalidArgument)
		}
	}
	return untrustedHandler, nil
}

// StopPodSandbox implements the RPC.
func (s *Server) StopPodSandbox(ctx context.Context, req *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	if err := s.Sandboxes.Stop(ctx, req.GetPodSandboxId()); err != nil {
		return nil, fmt.Errorf("stop pod sandbox: %w", err)
	}
	return &cri.StopPodSandboxResponse{}, nil
}

// RemovePodSandbox implements the RPC.
func (s *Server) RemovePodSandbox(ctx context.Context, req *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	if err := s.Sandboxes.Remove(ctx, req.GetPodSandboxId()); err != nil {
		return nil, fmt.Errorf("remove pod sandbox: %w", err)
	}
	return &cri.RemovePodSandboxResponse{}, nil
}

// PodSandboxStatus implements the RPC.
func (s *Server) PodSandboxStatus(_ context.Context, req *cri.PodSandboxStatusRequest) (*cri.PodSandboxStatusResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	sb, err := s.Sandboxes.Get(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	resp := &cri.PodSandboxStatusResponse{Status: sandboxStatus(sb), Timestamp: time.Now().UnixNano()}
	for _, c := range s.Containers.Of(sb.ID) {
		resp.ContainersStatuses = append(resp.ContainersStatuses, s.containerStatus(c))
	}
	if req.GetVerbose() {
		resp.Info, err = verbose(map[string]any{"info": sandboxInfo(sb)})
	}
	return resp, err
}

// ListPodSandbox implements the RPC.
func (s *Server) ListPodSandbox(_ context.Context, req *cri.ListPodSandboxRequest) (*cri.ListPodSandboxResponse, error) {
	all := s.Sandboxes.List()
	items := make([][]byte, 0, len(all))
	for _, sb := range all {
		if !sandboxMatches(sb, req.GetFilter()) {
			continue
		}
		item, err := s.podItems.of(sb.ID, podVersion{sb.Config, sandboxState(sb)}, func() proto.Message { return sandboxItem(sb) })
		if err != nil {
			return nil, fmt.Errorf("list pod sandboxes: %w", err)
		}
		items = append(items, item)
	}
	s.podItems.trim(len(all))
	resp := &cri.ListPodSandboxResponse{}
	setWire(resp, s.podItems.join(items))
	return resp, nil
}

// StreamPodSandboxes implements the RPC.
func (s *Server) StreamPodSandboxes(req *cri.StreamPodSandboxesRequest, stream grpc.ServerStreamingServer[cri.StreamPodSandboxesResponse]) error {
	return sendChunks(s.sandboxes(req.GetFilter()), func(part []*cri.PodSandbox) error {
		return stream.Send(&cri.StreamPodSandboxesResponse{PodSandboxes: part})
	})
}

func (s *Server) sandboxes(f *cri.PodSandboxFilter) []*cri.PodSandbox {
	var out []*cri.PodSandbox
	for _, sb := range s.Sandboxes.List() {
		if sandboxMatches(sb, f) {
			out = append(out, sandboxItem(sb))
		}
	}
	return out
}

// sandboxMatches applies the filter; all that is set must fit.
func sandboxMatches(sb record.Sandbox, f *cri.PodSandboxFilter) bool {
	if !strings.HasPrefix(sb.ID, f.GetId()) {
		return false
	}
	if f.GetState() != nil && f.GetState().GetState() != sandboxState(sb) {
		return false
	}
	return selects(f.GetLabelSelector(), sb.Config.GetLabels())
}

// UpdatePodSandboxResources implements the RPC.
func (s *Server) UpdatePodSandboxResources(ctx context.Context, req *cri.UpdatePodSandboxResourcesRequest) (*cri.UpdatePodSandboxResourcesResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	if err := s.Sandboxes.UpdateResources(ctx, req.GetPodSandboxId(), req.GetOverhead(), req.GetResources()); err != nil {
		return nil, fmt.Errorf("update pod sandbox resources: %w", err)
	}
	return &cri.UpdatePodSandboxResourcesResponse{}, nil
}

func sandboxState(sb record.Sandbox) cri.PodSandboxState {
	if sb.Phase == record.Ready {
		return cri.PodSandboxState_SANDBOX_READY
	}
	return cri.PodSandboxState_SANDBOX_NOTREADY
}

// podVersion is what may change in the item of a pod: a configuration is never
// changed in place.
type podVersion struct {
	config *cri.PodSandboxConfig
	state  cri.PodSandboxState
}

func sandboxItem(sb record.Sandbox) *cri.PodSandbox {
	return &cri.PodSandbox{
		Id: sb.ID, Metadata: sb.Config.GetMetadata(), State: sandboxState(sb), CreatedAt: sb.CreatedAt.UnixNano(),
		Labels: sb.Config.GetLabels(), Annotations: sb.Config.GetAnnotations(), RuntimeHandler: sb.Handler.Name,
	}
}

func sandboxStatus(sb record.Sandbox) *cri.PodSandboxStatus {
	return &cri.PodSandboxStatus{
		Id: sb.ID, Metadata: sb.Config.GetMetadata(), State: sandboxState(sb), CreatedAt: sb.CreatedAt.UnixNano(),
		Network: networkStatus(sb), Labels: sb.Config.GetLabels(), Annotations: sb.Config.GetAnnotations(),
		RuntimeHandler: sb.Handler.Name,
		Linux: &cri.LinuxPodSandboxStatus{Namespaces: &cri.Namespace{
			Options: sb.Config.GetLinux().GetSecurityContext().GetNamespaceOptions(),
		}},
	}
}

func networkStatus(sb record.Sandbox) *cri.PodSandboxNetworkStatus {
	n := &cri.PodSandboxNetworkStatus{}
	for i, ip := range sb.Network.IPs {
		if i == 0 {
			n.Ip = ip
			continue
		}
		n.AdditionalIps = append(n.AdditionalIps, &cri.PodIP{Ip: ip})
	}
	return n
}

// sandboxInfo is the verbose part of a sandbox's status.
func sandboxInfo(sb record.Sandbox) map[string]any {
	info := map[string]any{
		"pid":              sb.Instance.Pid,
		"phase":            sb.Phase,
		"reason":           sb.Reason,
		"runtimeHandler":   sb.Handler.Name,
		"runtimeType":      sb.Handler.Runtime,
		"sandboxer":        sb.Handler.Sandboxer,
		"snapshotter":      sb.Handler.Snapshotter,
		"networkNamespace": sb.Network.NetNS,
		"config":           sb.Config,
		"overhead":         sb.Overhead,
		"resources":        sb.Resources,
	}
	if json.Valid(sb.Network.Result) {
		info["cniResult"] = json.RawMessage(sb.Network.Result)
	}
	if json.Valid(sb.Instance.Spec) {
		info["runtimeSpec"] = json.RawMessage(sb.Instance.Spec)
	}
	return info
}
