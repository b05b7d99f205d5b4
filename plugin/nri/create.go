package nri

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/blockio"
	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/plugin"
	"github.com/containerd/nri/pkg/runtime-tools/generate"
	"github.com/opencontainers/runtime-spec/specs-go"
	"sigs.k8s.io/yaml"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/record"
)

// CreateContainer asks the plugins about a container that is being made, whose
// specification is in c, and returns the specification as they want it. Changes
// of other containers are made before it returns, because they may make room
// for this one; that one fails is not this container's fault.
func (p *Plugins) CreateContainer(ctx context.Context, sb record.Sandbox, c record.Container) ([]byte, error) {
	if p.none() {
		return c.Spec, nil
	}
	pod, ctr, err := pair(sb, c)
	if err != nil {
		return nil, err
	}
	begun, env := time.Now(), slices.Clone(ctr.GetEnv())
	resp, err := p.adapt.CreateContainer(ctx, &api.CreateContainerRequest{Pod: pod, Container: ctr})
	if err == nil {
		err = p.required(pod, ctr, begun)
	}
	if err != nil {
		return nil, p.refusal(ctx, facts.ContainerCreate, err)
	}
	if _, err := p.apply(ctx, resp.GetUpdate()); ctx.Err() != nil {
		return nil, err
	}
	if resp.GetAdjust() == nil {
		return c.Spec, nil
	}
	resp.Adjust.Env = append(resp.Adjust.Env, removed(env, ctr.GetEnv())...)
	return p.adjust(c.Spec, resp.GetAdjust())
}

// removed marks the variables that plugins have removed. The adaptation removes
// them from what later plugins see, and does not say so in its result.
func removed(before, after []string) (list []*api.KeyValue) {
	left := map[string]bool{}
	for _, e := range after {
		name, _, _ := strings.Cut(e, "=")
		left[name] = true
	}
	for _, e := range before {
		if name, _, _ := strings.Cut(e, "="); !left[name] {
			list = append(list, &api.KeyValue{Key: api.MarkForRemoval(name)})
		}
	}
	return list
}

// adjust changes a specification as the plugins want it.
func (p *Plugins) adjust(spec []byte, a *api.ContainerAdjustment) ([]byte, error) {
	s := &specs.Spec{}
	if err := json.Unmarshal(spec, s); err != nil {
		return nil, fmt.Errorf("read specification: %w (%w)", err, errdefs.ErrInternal)
	}
	fill(s)
	g := generate.SpecGenerator(generator{s},
		generate.WithCDIDeviceInjector(p.opts.Inject),
		generate.WithBlockIOResolver(func(class string) (*specs.LinuxBlockIO, error) {
			if !blockio.IsEnabled() {
				return nil, fmt.Errorf("block I/O class %q: containerd's blockio_config_file configures none: %w", class, errdefs.ErrFailedPrecondition)
			}
			return blockio.ClassNameToLinuxOCI(class)
		}),
		generate.WithRdtResolver(func(class string) (*specs.LinuxIntelRdt, error) {
			return &specs.LinuxIntelRdt{ClosID: class}, nil
		}))
	if err := g.Adjust(a); err != nil {
		return nil, fmt.Errorf("adjust specification for NRI plugins: %w (%w)", err, errdefs.ErrFailedPrecondition)
	}
	p.opts.Check(s)
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode specification: %w", err)
	}
	return b, nil
}

// required refuses a container when a plugin that it needs has failed while it
// was asked. The adaptation goes on without such a plugin, and the validator
// looks only at which plugins there were at the beginning.
func (p *Plugins) required(pod *api.PodSandbox, ctr *api.Container, since time.Time) error {
	v := p.opts.Config.Validator
	if !v.Enable {
		return nil
	}
	if key := v.TolerateMissingAnnotation; key != "" {
		if value, ok := plugin.GetEffectiveAnnotation(pod, key, ctr.GetName()); ok {
			if tolerate, err := strconv.ParseBool(value); err == nil && tolerate {
				return nil
			}
		}
	}
	need := slices.Clone(v.RequiredPlugins)
	if value, ok := plugin.GetEffectiveAnnotation(pod, plugin.RequiredPluginsAnnotation, ctr.GetName()); ok {
		var more []string
		if err := yaml.Unmarshal([]byte(value), &more); err != nil {
			return fmt.Errorf("annotation %s: %w (%w)", plugin.RequiredPluginsAnnotation, err, errdefs.ErrInvalidArgument)
		}
		need = append(need, more...)
	}
	for _, name := range need {
		if err := p.metrics.failedSince(name, since); err != nil {
			return fmt.Errorf("required plugin %q: %w", name, err)
		}
	}
	return nil
}
