// Package cri is the CRI API: each method checks its request, calls a service
// and converts the reply. No decision about pods, containers or images is made
// here. What package rpc does for every request is not repeated.
//
// An RPC without a method here answers Unimplemented. Start reading at
// Server; sandbox.go, container.go, stream.go, events.go and image.go have the methods.
package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/container"
	"github.com/gantry-cri/gantry/plugin/image"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/sandbox"
)

// Network tells how the node's network stands.
type Network interface {
	// Ready is nil or the reason why pods cannot be connected. It waits for
	// no plugin.
	Ready(context.Context) error
	// UpdatePodCIDR passes on the node's pod address ranges.
	UpdatePodCIDR(ctx context.Context, cidr string) error
	// Path is where plugins of that network find its configuration.
	Describe() map[string]string
}

// Handlers lists the runtime handlers with their features.
type Handlers interface {
	CRI() []*cri.RuntimeHandler
	// Lookup finds a handler by name; the error names those there are.
	Lookup(name string) (record.Handler, error)
	// CgroupDriver is the one the default handler uses.
	CgroupDriver() cri.CgroupDriver
	// Problems names handlers that cannot work now, and why.
	Problems() map[string]error
	// Weaknesses are published ones, by handler, of the runtimes in use.
	Weaknesses() map[string][]string
}

// Validate checks what a kubelet sends and returns it with what the node gives
// to all; errors are InvalidArgument and name the field.
type Validate interface {
	Pod(*cri.PodSandboxConfig) (*cri.PodSandboxConfig, error)
	// Container gets the pod as it is and as it was asked for, nil if that is
	// not known.
	Container(c *cri.ContainerConfig, pod, asked *cri.PodSandboxConfig) (*cri.ContainerConfig, error)
}

// Streaming hands out URLs.
type Streaming interface {
	GetExec(*cri.ExecRequest) (*cri.ExecResponse, error)
	GetAttach(*cri.AttachRequest) (*cri.AttachResponse, error)
	GetPortForward(*cri.PortForwardRequest) (*cri.PortForwardResponse, error)
}

// Images is the image service.
type Images interface {
	Pull(context.Context, image.PullRequest) (string, error)
	List(ctx context.Context, filter *cri.ImageFilter) ([]*cri.Image, error)
	Status(ctx context.Context, spec *cri.ImageSpec, verbose bool) (*cri.Image, map[string]string, error)
	Remove(ctx context.Context, ref string) error
	FSInfo(context.Context) (images, containers []*cri.FilesystemUsage, err error)
}

// Deps is what a Server works with. All are required.
type Deps struct {
	Sandboxes  *sandbox.Service
	Containers *container.Service
	Images     Images
	Streaming  Streaming
	Network    Network
	Handlers   Handlers
	Validate   Validate
	Stats      Stats
	Events     Events
	// Version is the runtime's version, a semantic one.
	Version string
	// Warnings are the accepted settings that have no effect, and other
	// things an operator should know, for the Status conditions.
	Warnings func() []string
	// Info is the verbose part of Status.
	Info func() map[string]any
}

// Server implements both CRI services.
type Server struct {
	cri.UnimplementedRuntimeServiceServer
	cri.UnimplementedImageServiceServer
	Deps
	podItems       wireItems[podVersion]
	containerItems wireItems[containerVersion]
}

// New returns the server.
func New(d Deps) *Server { return &Server{Deps: d} }

// Version implements the RPC. The name is containerd's: container IDs in the
// cluster begin with it, and this is a containerd.
func (s *Server) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{Version: "0.1.0", RuntimeName: "containerd", RuntimeVersion: s.Deps.Version, RuntimeApiVersion: "v1"}, nil
}

// Status implements the RPC.
func (s *Server) Status(ctx context.Context, req *cri.StatusRequest) (*cri.StatusResponse, error) {
	runtime := &cri.RuntimeCondition{Type: cri.RuntimeReady, Status: true}
	network := &cri.RuntimeCondition{Type: cri.NetworkReady, Status: true}
	if err := s.Network.Ready(ctx); err != nil {
		network.Status, network.Reason, network.Message = false, "NetworkPluginNotReady", err.Error()
	}
	warnings := &cri.RuntimeCondition{Type: "ContainerdHasNoDeprecationWarnings", Status: true}
	if w := s.Warnings(); len(w) > 0 {
		b, err := json.Marshal(w)
		if err != nil {
			return nil, err
		}
		warnings.Status, warnings.Reason, warnings.Message = false, "ConfigurationWarnings", string(b)
	}
	weak, err := s.weaknesses()
	if err != nil {
		return nil, err
	}
	resp := &cri.StatusResponse{
		Status:          &cri.RuntimeStatus{Conditions: []*cri.RuntimeCondition{runtime, network, warnings, weak}},
		RuntimeHandlers: s.Handlers.CRI(),
		// By definition these do not depend on what the handlers can do.
		Features: &cri.RuntimeFeatures{SupplementalGroupsPolicy: true, UserNamespacesHostNetwork: true, MountOptions: true},
	}
	if !req.GetVerbose() {
		return resp, nil
	}
	resp.Info = map[string]string{}
	info := s.Info()
	info["network"] = s.Network.Describe()
	for name, err := range s.Handlers.Problems() {
		info["handler/"+name] = err.Error()
	}
	for k, v := range info {
		b, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", k, err)
		}
		resp.Info[k] = string(b)
	}
	return resp, nil
}

// weaknesses is the condition that nothing is known against the runtimes. Nobody
// acts on it by itself: pods run all the same.
func (s *Server) weaknesses() (*cri.RuntimeCondition, error) {
	c := &cri.RuntimeCondition{Type: "RuntimesHaveNoKnownWeaknesses", Status: true}
	found := s.Handlers.Weaknesses()
	if len(found) == 0 {
		return c, nil
	}
	b, err := json.Marshal(found)
	if err != nil {
		return nil, err
	}
	c.Status, c.Reason, c.Message = false, "KnownWeaknesses", string(b)
	return c, nil
}

// RuntimeConfig implements the RPC.
func (s *Server) RuntimeConfig(context.Context, *cri.RuntimeConfigRequest) (*cri.RuntimeConfigResponse, error) {
	return &cri.RuntimeConfigResponse{Linux: &cri.LinuxRuntimeConfiguration{CgroupDriver: s.Handlers.CgroupDriver()}}, nil
}

// UpdateRuntimeConfig implements the RPC.
func (s *Server) UpdateRuntimeConfig(ctx context.Context, req *cri.UpdateRuntimeConfigRequest) (*cri.UpdateRuntimeConfigResponse, error) {
	cidr := req.GetRuntimeConfig().GetNetworkConfig().GetPodCidr()
	if cidr != "" {
		if err := s.Network.UpdatePodCIDR(ctx, cidr); err != nil {
			return nil, fmt.Errorf("runtime_config.network_config.pod_cidr: %w", err)
		}
	}
	return &cri.UpdateRuntimeConfigResponse{}, nil
}

func invalid(field, format string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", field, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// required is the error of an empty ID.
func required(field, value string) error {
	if value == "" {
		return invalid(field, "is required")
	}
	return nil
}

// selects reports whether labels has everything that selector asks for.
func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// chunk is how many items one message of a streamed list holds, so that it
// stays far below the limit of a message.
const chunk = 500

// sendChunks sends items in messages of at most chunk of them; none makes no
// message.
func sendChunks[T any](items []T, send func([]T) error) error {
	for part := range slices.Chunk(items, chunk) {
		if err := send(part); err != nil {
			return err
		}
	}
	return nil
}

// verbose encodes info for a verbose reply.
func verbose(info map[string]any) (map[string]string, error) {
	out := map[string]string{}
	var errs []error
	for k, v := range info {
		b, err := json.Marshal(v)
		errs = append(errs, err)
		out[k] = string(b)
	}
	return out, errors.Join(errs...)
}
