package main

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// pod is a pod with one container, and how long each call for it took.
type pod struct {
	config        *cri.PodSandboxConfig
	id, container string
	took          map[string]time.Duration // by RPC; "up" and "down" are the sums
}

// Calls of a pod's life in their order.
var (
	upCalls   = []string{"RunPodSandbox", "CreateContainer", "StartContainer"}
	downCalls = []string{"StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox"}
)

// up brings a pod with one container up, as the kubelet does.
func (n *node) up(ctx context.Context, network cri.NamespaceMode, name string, edits ...func(*cri.ContainerConfig)) (*pod, error) {
	p := &pod{config: n.PodConfig(name), took: map[string]time.Duration{}}
	p.config.Linux.SecurityContext.NamespaceOptions.Network = network
	if network == cri.NamespaceMode_NODE {
		p.config.Hostname = ""
	}
	if err := os.MkdirAll(p.config.LogDirectory, 0o755); err != nil {
		return nil, fmt.Errorf("make log directory: %w", err)
	}
	container := daemon.ContainerConfig("main", n.image)
	for _, edit := range edits {
		edit(container)
	}
	rt := n.Runtime()
	err := p.calls("up", []call{
		{upCalls[0], func() error {
			r, err := rt.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p.config, RuntimeHandler: n.handler})
			p.id = r.GetPodSandboxId()
			return err
		}},
		{upCalls[1], func() error {
			r, err := rt.CreateContainer(ctx, &cri.CreateContainerRequest{
				PodSandboxId: p.id, Config: container, SandboxConfig: p.config,
			})
			p.container = r.GetContainerId()
			return err
		}},
		{upCalls[2], func() error {
			_, err := rt.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: p.container})
			return err
		}},
	})
	return p, err
}

// down stops and removes the pod without grace.
func (n *node) down(ctx context.Context, p *pod) error {
	rt := n.Runtime()
	if err := p.calls("down", []call{
		{downCalls[0], func() error {
			_, err := rt.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: p.container, Timeout: 0})
			return err
		}},
		{downCalls[1], func() error {
			_, err := rt.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: p.container})
			return err
		}},
		{downCalls[2], func() error {
			_, err := rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id})
			return err
		}},
		{downCalls[3], func() error {
			_, err := rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
			return err
		}},
	}); err != nil {
		return err
	}
	return os.RemoveAll(p.config.LogDirectory)
}

type call struct {
	name string
	do   func() error
}

// calls makes the calls one after the other and notes how long each took, and
// all of them under the name of the sum.
func (p *pod) calls(sum string, all []call) error {
	began := time.Now()
	for _, c := range all {
		t := time.Now()
		if err := c.do(); err != nil {
			return fmt.Errorf("%s for pod %s: %w", c.name, p.config.Metadata.Name, err)
		}
		p.took[c.name] = time.Since(t)
	}
	p.took[sum] = time.Since(began)
	return nil
}

// upMany brings pods up, several at once, and returns those that came up.
func (n *node) upMany(ctx context.Context, network cri.NamespaceMode, count, together int, edits ...func(*cri.ContainerConfig)) ([]*pod, error) { //lint:house param-count: what up takes, and how often
	var mu sync.Mutex
	var pods []*pod
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(together)
	for i := range count {
		g.Go(func() error {
			p, err := n.up(ctx, network, fmt.Sprint("pod-", i), edits...)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			pods = append(pods, p)
			return nil
		})
	}
	err := g.Wait()
	return pods, err
}

func (n *node) downMany(ctx context.Context, pods []*pod, together int) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(together)
	for _, p := range pods {
		g.Go(func() error { return n.down(ctx, p) })
	}
	return g.Wait()
}

// millis are the times of one call over all pods.
func millis(pods []*pod, call string) []float64 {
	var all []float64
	for _, p := range pods {
		all = append(all, p.took[call].Seconds()*1000)
	}
	return all
}
