package container

import (
	"context"

	"github.com/containerd/log"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/undo"
)

// Plugins have a say about containers; see package nri. Each call to one is
// bounded there.
type Plugins interface {
	// CreateContainer returns the specification of c as the plugins want it.
	CreateContainer(ctx context.Context, sb record.Sandbox, c record.Container) ([]byte, error)
	// UpdateContainer returns the resources to set in place of the update's.
	UpdateContainer(ctx context.Context, sb record.Sandbox, c record.Container, u facts.Update) (*cri.LinuxContainerResources, error)
	TellContainer(ctx context.Context, e facts.PluginEvent, sb record.Sandbox, c record.Container) error
	// Hold keeps new plugins waiting until the release is called, so that they
	// hear of a container either by an event or when they are introduced.
	Hold() (release func())
}

// adjust lets the plugins have their say about a new container, whose
// specification is spec, and changes it in place.
func (s *Service) adjust(ctx context.Context, u *undo.Stack, sb record.Sandbox, c record.Container, spec *Spec) error {
	operation.Stage(ctx, "ask plugins")
	c.Spec = spec.JSON
	s.push(u, releasePlugins, c)
	adjusted, err := s.Plugins.CreateContainer(ctx, sb, c)
	if err != nil {
		return err
	}
	spec.JSON = adjusted
	return nil
}

// forget tells the plugins that the container is gone, and before that, that it
// has ended, unless they were told.
func (s *Service) forget(ctx context.Context, c record.Container) error {
	if c.Phase != record.ContainerExited {
		s.tell(ctx, facts.ContainerStopped, c)
	}
	s.tell(ctx, facts.ContainerRemoved, c)
	return nil
}

// tell tells the plugins what has happened. They cannot change that, so their
// errors are logged. The pod may be gone from the records already.
func (s *Service) tell(ctx context.Context, e facts.PluginEvent, c record.Container) {
	sb, err := s.Sandboxes.Get(c.SandboxID)
	if err != nil {
		sb = record.Sandbox{ID: c.SandboxID, Handler: c.Handler}
	}
	if err := s.Plugins.TellContainer(ctx, e, sb, c); err != nil {
		log.G(ctx).WithField("container", c.ID).WithField("event", e).WithError(err).Warn("tell plugins")
	}
}
