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

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
)

// Update changes the container's resources, all of them or none: the kernel
// first, the record second, and the kernel back when either fails.
//
// Plugins are asked first, and may want other values.
func (s *Service) Update(ctx context.Context, id string, update *cri.LinuxContainerResources) error {
	c, err := s.update(ctx, id, update, s.askUpdate)
	if err == nil {
		s.tell(ctx, facts.ContainerUpdated, c)
	}
	return err
}

// Apply is Update for what plugins want: it does not ask them.
func (s *Service) Apply(ctx context.Context, id string, update *cri.LinuxContainerResources) error {
	_, err := s.update(ctx, id, update, func(_ context.Context, _ record.Container, r *cri.LinuxContainerResources) (*cri.LinuxContainerResources, error) {
		return r, nil
	})
	return err
}

func (s *Service) askUpdate(ctx context.Context, c record.Container, r *cri.LinuxContainerResources) (*cri.LinuxContainerResources, error) {
	sb, err := s.Sandboxes.Get(c.SandboxID)
	if err != nil {
		return nil, err
	}
	operation.Stage(ctx, "ask plugins")
	return s.Plugins.UpdateContainer(ctx, sb, c, r)
}

// asker returns the resources to set in place of those that are asked for.
type asker func(context.Context, record.Container, *cri.LinuxContainerResources) (*cri.LinuxContainerResources, error)

func (s *Service) update(ctx context.Context, id string, update *cri.LinuxContainerResources, ask asker) (c record.Container, err error) {
	if c, err = s.Store.Resolve(id); err != nil {
		return c, err
	}
	done, err := s.turns.Take(ctx, c.ID)
	if err != nil {
		return c, err
	}
	defer done()
	if c, err = s.Store.Get(c.ID); err != nil {
		return c, err
	}
	if c.Phase != record.ContainerRunning && c.Phase != record.ContainerCreated {
		return c, fmt.Errorf("container %s is %s: %w", c.ID, c.Phase, errdefs.ErrFailedPrecondition)
	}
	if update, err = ask(ctx, c, update); err != nil {
		return c, err
	}
	return s.set(ctx, c, update)
}

// set changes the container's resources.
func (s *Service) set(ctx context.Context, c record.Container, update *cri.LinuxContainerResources) (record.Container, error) {
	var spec specs.Spec
	if err := json.Unmarshal(c.Spec, &spec); err != nil || spec.Linux == nil {
		return c, fmt.Errorf("container %s has no readable specification: %w", c.ID, errdefs.ErrInternal)
	}
	before := spec.Linux.Resources
	after, err := s.Specs.Resources(&spec, update)
	if err != nil {
		return c, fmt.Errorf("check resources: %w", err)
	}
	spec.Linux.Resources = after
	b, err := json.Marshal(&spec)
	if err != nil {
		return c, fmt.Errorf("encode specification: %w", err)
	}
	operation.Stage(ctx, "update the running container")
	undo, err := s.apply(ctx, c, before, after)
	if err != nil {
		return c, err
	}
	operation.Stage(ctx, "commit record")
	changed, err := s.Store.Update(ctx, c.ID, func(r *record.Container) error {
		r.Spec, r.Resources = b, merge(c.Resources, update)
		return nil
	})
	if err != nil {
		return c, errors.Join(err, undo(context.WithoutCancel(ctx)))
	}
	return changed, nil
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
