package container

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
)

// Volumes makes what a container mounts of images besides its root filesystem.
type Volumes interface {
	// Mount mounts what is at sub in an image as volume number i and returns
	// where.
	Mount(ctx context.Context, id string, i int, image []mount.Mount, sub string) (string, error)
	// Copy makes a directory for each path, with what the root filesystem has
	// there.
	Copy(ctx context.Context, id string, rootfs []mount.Mount, paths []string) ([]facts.Mount, error)
	// Remove takes away what both have made; none is fine.
	Remove(ctx context.Context, id string) error
}

// VolumeSet is what there is of images for one container.
type VolumeSet struct {
	// Images are where the images of the configuration's mounts are, by the
	// mount's index.
	Images map[int]string
	// Refs say what these images are, as a container's record does of its own:
	// their digests, by the mount's index.
	Refs map[int]string
	// Declared are the directories for the volumes that the container's own
	// image declares.
	Declared []facts.Mount
}

// ImageVolumeError says that an image could not be mounted as a volume.
type ImageVolumeError struct {
	// Field names the mount in the request.
	Field string
	Err   error
}

func (e *ImageVolumeError) Error() string {
	return fmt.Sprintf("mount image volume: %s: %v", e.Field, e.Err)
}

// Unwrap gives the reason.
func (e *ImageVolumeError) Unwrap() error { return e.Err }

// makeVolumes makes all volumes of a container.
func (s *Service) makeVolumes(ctx context.Context, sb record.Sandbox, c record.Container, declared []string, rootfs []mount.Mount) (v VolumeSet, err error) {
	v.Images, v.Refs = map[int]string{}, map[int]string{}
	for i, m := range c.Config.GetMounts() {
		if m.GetImage() == nil {
			continue
		}
		operation.Stage(ctx, "mount image volume")
		if v.Images[i], v.Refs[i], err = s.mountImage(ctx, sb, c, i); err != nil {
			return v, &ImageVolumeError{Field: fmt.Sprintf("config.mounts[%d]", i), Err: err}
		}
	}
	if len(declared) == 0 {
		return v, nil
	}
	operation.Stage(ctx, "copy image volumes")
	if v.Declared, err = s.Volumes.Copy(ctx, c.ID, rootfs, declared); err != nil {
		return v, fmt.Errorf("copy image volumes: %w", err)
	}
	for i := range v.Declared {
		v.Declared[i].UIDMappings, v.Declared[i].GIDMappings = sb.UserNS().GetUids(), sb.UserNS().GetGids()
	}
	return v, nil
}

// mountImage mounts the image of mount i, with the owners of the pod's user
// namespace, and returns where it is and what. The image must be on the node: the
// kubelet has pulled it.
func (s *Service) mountImage(ctx context.Context, sb record.Sandbox, c record.Container, i int) (path, ref string, err error) {
	m := c.Config.GetMounts()[i]
	img, err := s.Images.Resolve(ctx, m.GetImage(), c.Handler)
	if err != nil {
		return "", "", err
	}
	view, err := s.Snapshots.View(ctx, img.Snapshotter, c.VolumeKey(i), img.Parent, sb.UserNS())
	if err != nil {
		return "", "", fmt.Errorf("view image: %w", err)
	}
	path, err = s.Volumes.Mount(ctx, c.ID, i, view, m.GetImageSubPath())
	return path, img.Ref, err
}
