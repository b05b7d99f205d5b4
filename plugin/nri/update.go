package nri

import (
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/ttrpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/record"
)

// applyLimit bounds one change of another container that a plugin asks for.
const applyLimit = 10 * time.Second

// UpdateContainer asks the plugins about new resources of a container, and
// returns those to set. What they want of other containers follows. There is no
// place for the update's annotations but among the container's, over which they
// go.
func (p *Plugins) UpdateContainer(ctx context.Context, sb record.Sandbox, c record.Container, u facts.Update) (*cri.LinuxContainerResources, error) {
	r := u.Resources
	if p.none() {
		return r, nil
	}
	pod, ctr, err := pair(sb, c)
	if err != nil {
		return nil, err
	}
	if ctr.Annotations == nil {
		ctr.Annotations = map[string]string{}
	}
	maps.Copy(ctr.Annotations, u.Annotations)
	resp, err := p.adapt.UpdateContainer(ctx, &api.UpdateContainerRequest{Pod: pod, Container: ctr, LinuxResources: fromCRI(r)})
	if err != nil {
		return nil, p.refusal(ctx, facts.ContainerUpdate, err)
	}
	var others []*api.ContainerUpdate
	for _, u := range resp.GetUpdate() {
		if u.GetContainerId() == c.ID {
			r = toCRI(u.GetLinux().GetResources(), r)
		} else {
			others = append(others, u)
		}
	}
	// The caller has its turn with this container, so others are not waited for.
	p.later(others)
	return r, nil
}

// later does what plugins want of other containers, in the background.
func (p *Plugins) later(updates []*api.ContainerUpdate) {
	if len(updates) == 0 {
		return
	}
	p.opts.Background.Go("change containers for NRI plugins", func(ctx context.Context) {
		_, _ = p.apply(ctx, updates) // which logs what fails
	})
}

// unsolicited does what a plugin asks for by itself, and returns what could not
// be done.
func (p *Plugins) unsolicited(ctx context.Context, updates []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) {
	return p.apply(ctx, updates)
}

// evictions ends the containers that a plugin asks to be ended. The adaptation
// reads only the updates of such a request, so it is looked at on its way in.
func (p *Plugins) evictions(ctx context.Context, read ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, next ttrpc.Method) (any, error) {
	var list []*api.ContainerEviction
	resp, err := next(ctx, func(v any) error {
		err := read(v)
		if req, ok := v.(*api.UpdateContainersRequest); ok {
			list = req.GetEvict()
		}
		return err
	})
	if len(list) > 0 {
		p.opts.Background.Go("evict containers for an NRI plugin", func(ctx context.Context) { p.evict(ctx, list) })
	}
	return resp, err
}

// apply changes resources of containers, one after the other. The error is that
// of the first change that failed and was not allowed to.
func (p *Plugins) apply(ctx context.Context, updates []*api.ContainerUpdate) (failed []*api.ContainerUpdate, first error) {
	for _, u := range updates {
		err := p.applyOne(ctx, u)
		if err == nil {
			continue
		}
		log.G(ctx).WithField("container", u.GetContainerId()).WithError(err).Warn("update for an NRI plugin")
		if u.GetIgnoreFailure() {
			continue
		}
		failed = append(failed, u)
		if first == nil {
			first = err
		}
	}
	return failed, first
}

func (p *Plugins) applyOne(ctx context.Context, u *api.ContainerUpdate) error {
	r := u.GetLinux().GetResources()
	if r == nil {
		return nil
	}
	c, err := p.ready()
	if err != nil {
		return err
	}
	// A plugin's request knows nothing of the daemon's namespace.
	own, cancel := context.WithTimeout(p.opts.Background.Context(), applyLimit)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	if err := c.Apply(own, u.GetContainerId(), toCRI(r, nil)); err != nil {
		return fmt.Errorf("update container %s: %w", u.GetContainerId(), err)
	}
	return nil
}

// evict ends containers that plugins want to be gone.
func (p *Plugins) evict(ctx context.Context, list []*api.ContainerEviction) {
	for _, e := range list {
		logger := log.G(ctx).WithField("container", e.GetContainerId()).WithField("reason", e.GetReason())
		c, err := p.ready()
		if err == nil {
			logger.Warn("an NRI plugin evicts a container")
			err = c.Stop(ctx, e.GetContainerId(), 0)
		}
		if err != nil {
			logger.WithError(err).Error("evict container for an NRI plugin")
		}
	}
}

func (p *Plugins) ready() (Containers, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.containers == nil {
		return nil, fmt.Errorf("NRI plugins have not been started: %w", errdefs.ErrUnavailable)
	}
	return p.containers, nil
}
