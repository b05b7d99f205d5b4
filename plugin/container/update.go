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
// Plugins are asked first, and may want other values. They are shown the
// annotations, and so is the runtime; nothing else is done with those, and they
// are not kept.
func (s *Service) Update(ctx context.Context, id string, update *cri.LinuxContainerResources, annotations map[string]string) error {
	c, err := s.update(ctx, id, facts.Update{Resources: update, Annotations: annotations}, s.askUpdate)
	if err == nil {
		s.tell(ctx, facts.ContainerUpdated, c)
	}
	return err
}

// Apply is Update for what plugins want: it does not ask them.
func (s *Service) Apply(ctx context.Context, id string, update *cri.LinuxContainerResources) error {
	_, err := s.update(ctx, id, facts.Update{Resources: update}, func(_ context.Context, _ record.Container, u facts.Update) (*cri.LinuxContainerResources, error) {
		return u.Resources, nil
	})
	return err
}

func (s *Service) askUpdate(ctx context.Context, c record.Container, u facts.Update) (*cri.LinuxContainerResources, error) {
	sb, err := s.Sandboxes.Get(c.SandboxID)
	if err != nil {
		return nil, err
	}
	operation.Stage(ctx, "ask plugins")
	return s.Plugins.UpdateContainer(ctx, sb, c, u)
}

// asker returns the resources to set in place of those that are asked for.
type asker func(context.Context, record.Container, facts.Update) (*cri.LinuxContainerResources, error)

func (s *Service) update(ctx context.Context, id string, u facts.Update, ask asker) (c record.Container, err error) {
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
	if u.Resources, err = ask(ctx, c, u); err != nil {
		return c, err
	}
	return s.set(ctx, c, u)
}

// set changes the container's resources.
func (s *Service) set(ctx context.Context, c record.Container, u facts.Update) (record.Container, error) {
	var spec specs.Spec
	if err := json.Unmarshal(c.Spec, &spec); err != nil || spec.Linux == nil {
		return c, fmt.Errorf("container %s has no readable specification: %w", c.ID, errdefs.ErrInternal)
	}
	after, err := s.Specs.Update(&spec, u.Resources)
	if err != nil {
		return c, fmt.Errorf("check resources: %w", err)
	}
	b, err := json.Marshal(after)
	if err != nil {
		return c, fmt.Errorf("encode specification: %w", err)
	}
	if err := s.fits(c, &spec, after); err != nil {
		return c, err
	}
	operation.Stage(ctx, "update the running container")
	undo, err := s.apply(ctx, c, Change{Before: &spec, After: after, Annotations: u.Annotations})
	if err != nil {
		return c, err
	}
	operation.Stage(ctx, "commit record")
	changed, err := s.Store.Update(ctx, c.ID, func(r *record.Container) error {
		r.Spec, r.Resources = b, merge(c.Resources, u.Resources)
		r.Rescored = c.Rescored || c.Phase == record.ContainerRunning && !sameScore(&spec, after)
		return nil
	})
	if err != nil {
		return c, errors.Join(err, undo(context.WithoutCancel(ctx)))
	}
	return changed, nil
}

// sameScore reports whether both give processes the same OOM score.
func sameScore(before, after *specs.Spec) bool {
	score := func(s *specs.Spec) (n int, set bool) {
		if s.Process == nil || s.Process.OOMScoreAdj == nil {
			return 0, false
		}
		return *s.Process.OOMScoreAdj, true
	}
	was, had := score(before)
	now, has := score(after)
	return was == now && had == has
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
func (s *Service) apply(ctx context.Context, c record.Container, change Change) (undo func(context.Context) error, err error) {
	if c.Phase != record.ContainerRunning {
		return func(context.Context) error { return nil }, nil
	}
	t, err := s.Tasks.Get(ctx, c.ID)
	if err != nil {
		return nil, err
	}
	undo = func(ctx context.Context) error {
		if err := t.Change(ctx, Change{Before: change.After, After: change.Before}); err != nil {
			return fmt.Errorf("set the old resources again: %w", err)
		}
		return nil
	}
	if err := t.Change(ctx, change); err != nil {
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
