package sandbox

import (
	"context"

	"github.com/containerd/log"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/undo"
)

// Plugins have a say about pods; see package nri. Each call to one is bounded
// there.
type Plugins interface {
	TellPod(ctx context.Context, e facts.PluginEvent, sb record.Sandbox) error
	// UpdatePod asks about new sums of a pod's resources.
	UpdatePod(ctx context.Context, sb record.Sandbox, overhead, resources *cri.LinuxContainerResources) error
	// Hold keeps new plugins waiting until the release is called, so that they
	// hear of a pod either by an event or when they are introduced.
	Hold() (release func())
}

// commit asks the plugins and makes the sandbox ready.
func (s *Service) commit(ctx context.Context, u *undo.Stack, sb record.Sandbox) (record.Sandbox, error) {
	release := s.Plugins.Hold()
	defer release()
	operation.Stage(ctx, "ask plugins")
	s.push(u, releasePlugins, sb)
	if err := s.Plugins.TellPod(ctx, facts.PodRun, sb); err != nil {
		return sb, err
	}
	operation.Stage(ctx, "commit record")
	return s.Store.Move(ctx, sb.ID, record.Started, func(r *record.Sandbox) {
		r.Network, r.Instance = sb.Network, sb.Instance
	})
}

// forget tells the plugins that the pod is gone, and before that, that it has
// ended, unless they were told.
func (s *Service) forget(ctx context.Context, sb record.Sandbox) error {
	if sb.Phase == record.Creating {
		s.tell(ctx, facts.PodStopped, sb)
	}
	s.tell(ctx, facts.PodRemoved, sb)
	return nil
}

// tell tells the plugins what has happened. They cannot change that, so their
// errors are logged.
func (s *Service) tell(ctx context.Context, e facts.PluginEvent, sb record.Sandbox) {
	if err := s.Plugins.TellPod(ctx, e, sb); err != nil {
		log.G(ctx).WithField("sandbox", sb.ID).WithField("event", e).WithError(err).Warn("tell plugins")
	}
}
