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
	after, err := s.Specs.Update(&spec, update)
	if err != nil {
		return fmt.Errorf("check resources: %w", err)
	}
	b, err := json.Marshal(after)
	if err != nil {
		return fmt.Errorf("encode specification: %w", err)
	}
	if err := s.fits(c, &spec, after); err != nil {
		return err
	}
	operation.Stage(ctx, "update the running container")
	undo, err := s.apply(ctx, c, &spec, after)
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

// fits refuses a memory limit that the container is above already: the kernel
// would kill it, or say no without a reason.
func (s *Service) fits(c record.Container, before, after *specs.Spec) error {
	was, now := memoryLimit(before), memoryLimit(after)
	if c.Phase != record.ContainerRunning || now <= 0 || was > 0 && now >= was {
		return nil
	}
	used, known, err := s.Cgroups.WorkingSet(c)
	if err != nil {
		return fmt.Errorf("read the memory in use: %w", err)
	}
	if known && used > uint64(now) {
		return fmt.Errorf("linux.memory_limit_in_bytes: %d is less than the %d bytes that container %s uses: %w", now, used, c.ID, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// memoryLimit is the limit of a specification, 0 or less for none.
func memoryLimit(s *specs.Spec) int64 {
	if r := s.Linux.Resources; r != nil && r.Memory != nil && r.Memory.Limit != nil {
		return *r.Memory.Limit
	}
	return 0
}

// apply changes the container if it runs, and returns what changes it back.
func (s *Service) apply(ctx context.Context, c record.Container, before, after *specs.Spec) (undo func(context.Context) error, err error) {
	if c.Phase != record.ContainerRunning {
		return func(context.Context) error { return nil }, nil
	}
	t, err := s.Tasks.Get(ctx, c.ID)
	if err != nil {
		return nil, err
	}
	undo = func(ctx context.Context) error {
		if err := t.Change(ctx, after, before); err != nil {
			return fmt.Errorf("set the old resources again: %w", err)
		}
		return nil
	}
	if err := t.Change(ctx, before, after); err != nil {
		// Some of it may be done.
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
