package sandbox

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/undo"
)

// The resources of a sandbox besides its record, in the order in which a run
// acquires them.
const (
	releaseFiles    = "files"
	releaseUserNS   = "user namespace"
	releaseNetwork  = "network"
	releaseInstance = "instance"
	releasePlugins  = "plugins"
)

var resources = []string{releaseFiles, releaseUserNS, releaseNetwork, releaseInstance, releasePlugins}

// push puts the release of a resource on the stack. There is one release for
// each, whoever needs it.
func (s *Service) push(u *undo.Stack, resource string, sb record.Sandbox) {
	release := map[string]func(context.Context, record.Sandbox) error{
		releaseFiles:    s.Files.Remove,
		releaseUserNS:   s.UserNS.Remove,
		releaseNetwork:  s.detach,
		releaseInstance: s.Instances.Shutdown,
		releasePlugins:  s.forget,
	}[resource]
	u.Push(resource, func(ctx context.Context) error { return release(ctx, sb) })
}

func (s *Service) detach(ctx context.Context, sb record.Sandbox) error {
	if sb.HostNetwork() {
		return nil
	}
	return s.Network.Detach(ctx, sb)
}

// Stop ends everything that runs in the pod and gives its network back. It may
// be called at any time and any number of times; an unknown pod is stopped.
func (s *Service) Stop(ctx context.Context, id string) error {
	sb, err := s.Store.Resolve(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = s.stops.Do(ctx, sb.ID, func(ctx context.Context) (struct{}, error) {
		ctx, op := s.Ops.Begin(ctx, operation.Info{Name: "stop", Object: objectName(sb.Key()), ID: sb.ID})
		defer op.End()
		done, err := s.teardown.Take(ctx, sb.ID)
		if err != nil {
			return struct{}{}, err
		}
		defer done()
		if err = s.stop(ctx, sb.ID); err != nil {
			s.later(sb.ID) // also when the client does not come back
		}
		return struct{}{}, err
	})
	return err
}

func (s *Service) stop(ctx context.Context, id string) error {
	sb, err := s.Store.Get(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	// Plugins hear of a stop once, unless it has to be tried again.
	news := sb.Phase != record.NotReady || s.goesOn(id)
	if sb.Phase != record.NotReady {
		// First of all, so that nothing new begins in the pod.
		if sb, err = s.Store.Move(ctx, id, record.Stopped, nil); err != nil {
			return err
		}
	}
	operation.Stage(ctx, "stop containers")
	if err := s.insist(ctx, sb, s.stopContainers); err != nil {
		return err
	}
	if news {
		s.tell(ctx, facts.PodStopped, sb)
	}
	operation.Stage(ctx, "stop sandbox, detach network")
	// Side by side, as they were made: neither needs the other.
	var g errgroup.Group
	g.Go(func() error { return s.insist(ctx, sb, s.stopInstance) })
	var detached error
	g.Go(func() error {
		if detached = s.detach(ctx, sb); detached != nil {
			detached = fmt.Errorf("detach network: %w", detached)
		}
		return nil
	})
	return errors.Join(g.Wait(), detached)
}

func (s *Service) stopContainers(ctx context.Context, sb record.Sandbox) error {
	if err := s.Containers.StopAll(ctx, sb.ID); err != nil {
		return fmt.Errorf("stop containers: %w", err)
	}
	return nil
}

func (s *Service) stopInstance(ctx context.Context, sb record.Sandbox) error {
	if err := s.Instances.Stop(ctx, sb); err != nil {
		return fmt.Errorf("stop sandbox: %w", err)
	}
	// The kubelet keeps stopped pods for a while; their shims need not stay.
	if err := s.Instances.Shutdown(ctx, sb); err != nil {
		return fmt.Errorf("shut sandbox down: %w", err)
	}
	return nil
}

func (s *Service) removeContainers(ctx context.Context, sb record.Sandbox) error {
	if err := s.Containers.RemoveAll(ctx, sb.ID); err != nil {
		return fmt.Errorf("remove containers: %w", err)
	}
	return nil
}

// insist does a part of the end of a pod for which the pod's shim must answer.
// If it does not, the shim is ended, and the part is done again as after its
// death: a pod that is to end is not held up by a shim for ever.
func (s *Service) insist(ctx context.Context, sb record.Sandbox, part func(context.Context, record.Sandbox) error) error {
	err := part(ctx, sb)
	if silent := errdefs.IsUnavailable(err) || errdefs.IsDeadlineExceeded(err); !silent || ctx.Err() != nil {
		return err
	}
	operation.Stage(ctx, "end the shim of the pod if it does not answer")
	if ended := s.Shims.EndSilent(ctx, sb); ended != nil {
		return errors.Join(err, ended)
	}
	return part(ctx, sb)
}

// Remove stops the pod, removes its containers, releases everything and
// forgets it. An unknown pod is removed already.
func (s *Service) Remove(ctx context.Context, id string) error {
	sb, err := s.Store.Resolve(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.Stop(ctx, sb.ID); err != nil {
		return err
	}
	done, err := s.teardown.Take(ctx, sb.ID)
	if err != nil {
		return err
	}
	defer done()
	operation.Stage(ctx, "remove containers")
	if err := s.insist(ctx, sb, s.removeContainers); err != nil {
		return err
	}
	return s.release(ctx, sb)
}

// release gives everything of the sandbox back and then forgets it.
func (s *Service) release(ctx context.Context, sb record.Sandbox) error {
	operation.Stage(ctx, "release sandbox")
	u := &undo.Stack{}
	for _, r := range resources {
		s.push(u, r, sb)
	}
	if err := u.Unwind(ctx); err != nil {
		return err
	}
	return s.Store.Delete(ctx, sb.ID)
}
