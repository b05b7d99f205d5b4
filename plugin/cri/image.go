package cri

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/image"
)

// PullImage implements the RPC.
func (s *Server) PullImage(ctx context.Context, req *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	if err := required("image.image", req.GetImage().GetImage()); err != nil {
		return nil, err
	}
	if name := req.GetImage().GetRuntimeHandler(); name != "" {
		if _, err := s.Handlers.Lookup(name); err != nil {
			return nil, invalid("image.runtime_handler", "%v", err)
		}
	}
	id, err := s.Images.Pull(ctx, image.PullRequest{
		Ref: req.GetImage().GetImage(), Annotations: req.GetImage().GetAnnotations(), Auth: req.GetAuth(), Handler: req.GetImage().GetRuntimeHandler(), Pod: req.GetSandboxConfig(),
	})
	if err != nil {
		return nil, err
	}
	return &cri.PullImageResponse{ImageRef: id}, nil
}

// ListImages implements the RPC.
func (s *Server) ListImages(ctx context.Context, req *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	images, err := s.Images.List(ctx, req.GetFilter())
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	return &cri.ListImagesResponse{Images: images}, nil
}

// StreamImages implements the RPC.
func (s *Server) StreamImages(req *cri.StreamImagesRequest, stream grpc.ServerStreamingServer[cri.StreamImagesResponse]) error {
	images, err := s.Images.List(stream.Context(), req.GetFilter())
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	return sendChunks(images, func(part []*cri.Image) error { return stream.Send(&cri.StreamImagesResponse{Images: part}) })
}

// ImageStatus implements the RPC. An absent image is an empty answer.
func (s *Server) ImageStatus(ctx context.Context, req *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	if err := required("image.image", req.GetImage().GetImage()); err != nil {
		return nil, err
	}
	img, info, err := s.Images.Status(ctx, req.GetImage(), req.GetVerbose())
	if err != nil {
		return nil, fmt.Errorf("image status: %w", err)
	}
	return &cri.ImageStatusResponse{Image: img, Info: info}, nil
}

// RemoveImage implements the RPC.
func (s *Server) RemoveImage(ctx context.Context, req *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	if err := required("image.image", req.GetImage().GetImage()); err != nil {
		return nil, err
	}
	if err := s.Images.Remove(ctx, req.GetImage().GetImage()); err != nil {
		return nil, fmt.Errorf("remove image: %w", err)
	}
	return &cri.RemoveImageResponse{}, nil
}

// ImageFsInfo implements the RPC.
func (s *Server) ImageFsInfo(ctx context.Context, _ *cri.ImageFsInfoRequest) (*cri.ImageFsInfoResponse, error) {
	images, containers, err := s.Images.FSInfo(ctx)
	if err != nil {
		return nil, fmt.Errorf("image filesystem info: %w", err)
	}
	return &cri.ImageFsInfoResponse{ImageFilesystems: images, ContainerFilesystems: containers}, nil
}
