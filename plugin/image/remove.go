package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

// Remove removes the image that ref means, with all its tags and digests. An
// image that is not there is a success. On return no list shows the image;
// its disk space is freed afterwards, except for what containers still use.
func (s *Service) Remove(ctx context.Context, ref string) error {
	if ref == "" {
		return fmt.Errorf("remove image: field image.image is empty: %w", errdefs.ErrInvalidArgument)
	}
	// Of two removals at once, the second may find its name gone while the image
	// still has others.
	if err := s.removal.lock(ctx, ""); err != nil {
		return fmt.Errorf("remove image: wait for another removal: %w", err)
	}
	defer s.removal.unlock("")
	img, err := s.index.now.Load().find(ref, func(r row) *image { return cmp.Or(r.on(s.platforms.of("")), r.any()) })
	if err != nil {
		return fmt.Errorf("remove image: %w", err)
	}
	if img == nil {
		return nil
	}
	ctx = inNamespace(ctx)
	var errs []error
	for _, name := range img.records {
		if err := s.o.Images.Delete(ctx, name); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("delete image record %s: %w", name, err))
		}
	}
	if err := s.index.refresh(ctx, img.records...); err != nil {
		errs = append(errs, fmt.Errorf("update index: %w", err))
	}
	s.requestCollect()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove image %s: %w", img.id, err)
	}
	return nil
}
