package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
)

// Update changes the container's resources, all of them or none: the kernel
// first, the record second, and the kernel back when either fails.
func (s *Service) Update(ctx context.Context, id string, update *cri.LinuxContainerResources) error {
	c, err := s.Store.Resolve(id)
	if err != nil {
		return err
	}
	done, err := s.turns.Take(ctx, c.ID)
	if err != nil {
		return err
	}
	defer done()
	if c, err = s.Store.Get(c.ID); err != nil {
		return err
	}
	if c.Phase != record.ContainerRunning && c.Phase != record.ContainerCreated {
		return fmt.Errorf("container %s is %s: %w", c.ID, c.Phase, errdefs.ErrFailedPrecondition)
	}
	var spec specs.Spec
	if err := json.Unmarshal(c.Spec, &spec); err != nil || spec.Linux == nil {
		return fmt.Errorf("container %s has no readable specification: %w", c.ID, errdefs.ErrInternal)
	}
	before := spec.Linux.Resources
	after, err := s.Specs.Resources(&spec, update)
	if err != nil {
		return fmt.Errorf("check resources: %w", err)
	}
	spec.Linux.Resources = after
	b, err := json.Marshal(&spec)
	if err != nil {
		return fmt.Errorf("encode specification: %w", err)
	}
	operation.Stage(ctx, "update the running container")
	undo, err := s.apply(ctx, c, before, after)
	if err != nil {
		return err
	}
	operation.Stage(ctx, "commit record")
	_, err = s.Store.Update(ctx, c.ID, func(r *record.Container) error {
		r.Spec, r.Resources = b, merge(c.Resources, update)
		return nil
	})
	if err != nil {
		return errors.Join(err, undo(context.WithoutCancel(ctx)))
	}
	return nil
}

// apply sets resources of the container if it runs, and returns what sets them
// back.
func (s *Service) apply(ctx context.Context, c record.Container, before, after *specs.LinuxResources) (undo func(context.Context) error, err error) {
	if c.Phase != record.ContainerRunning {
		return func(context.Context) error { return nil }, nil
	}
	t, err := s.Tasks.Get(ctx, c.ID)
	if err != nil {
		return nil, err
	}
	undo = func(ctx context.Context) error {
		if err := t.Update(ctx, before); err != nil {
			return fmt.Errorf("set the old resources again: %w", err)
		}
		return nil
	}
	if err := t.Update(ctx, after); err != nil {
		// A runtime may have set some of them.
		return nil, errors.Join(err, undo(context.WithoutCancel(ctx)))
	}
	return undo, nil
}

// merge is old with the fields that update sets.
func merge(old, update *cri.LinuxContainerResources) *cri.LinuxContainerResources {
	merged := &cri.LinuxContainerResources{}
	proto.Merge(merged, old)
	if len(update.GetHugepageLimits()) > 0 {
		merged.HugepageLimits = nil // replaced, where Merge would append
	}
	proto.Merge(merged, update)
	return merged
}
