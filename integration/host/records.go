package host

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
)

// records lists what the daemon's own stores hold for pods: containers,
// sandboxes, leases, active snapshots, unfinished downloads. Images, their
// content and their committed snapshots may stay.
func (s Scope) records(ctx context.Context) ([]string, error) {
	if s.Client == nil {
		return nil, nil
	}
	spaces, err := s.Client.NamespaceService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	names, err := s.snapshotters(ctx)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, ns := range spaces {
		in := namespaces.WithNamespace(ctx, ns)
		add := func(kind, name string) { found = append(found, fmt.Sprintf("%s %s/%s", kind, ns, name)) }
		if err := s.objects(in, add); err != nil {
			return nil, err
		}
		for _, sn := range names {
			err := s.Client.SnapshotService(sn).Walk(in, func(_ context.Context, i snapshots.Info) error {
				if i.Kind != snapshots.KindCommitted {
					add("snapshot "+sn, i.Name)
				}
				return nil
			})
			if err != nil && !errdefs.IsNotFound(err) {
				return nil, fmt.Errorf("list snapshots of %s: %w", sn, err)
			}
		}
	}
	return found, nil
}

// collect has the daemon collect its garbage if snapshots are left: it does so in
// its own time, which on a busy machine is longer than a test waits. What still
// has an owner stays.
func (s Scope) collect(ctx context.Context, diff []string) error {
	if s.Client == nil || !slices.ContainsFunc(diff, func(l string) bool { return strings.Contains(l, ": snapshot ") }) {
		return nil
	}
	ctx = namespaces.WithNamespace(ctx, "k8s.io")
	store := s.Client.LeasesService()
	l, err := store.Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Minute))
	if err == nil {
		err = store.Delete(ctx, l, leases.SynchronousDelete)
	}
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("collect garbage: %w", err)
	}
	return nil
}

func (s Scope) objects(ctx context.Context, add func(kind, name string)) error {
	containers, err := s.Client.ContainerService().List(ctx)
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	for _, c := range containers {
		add("container", c.ID)
	}
	sandboxes, err := s.Client.SandboxStore().List(ctx)
	if err != nil {
		return fmt.Errorf("list sandboxes: %w", err)
	}
	for _, sb := range sandboxes {
		add("sandbox", sb.ID)
	}
	leases, err := s.Client.LeasesService().List(ctx)
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	for _, l := range leases {
		add("lease", l.ID)
	}
	var ingests []content.Status
	if ingests, err = s.Client.ContentStore().ListStatuses(ctx); err != nil {
		return fmt.Errorf("list downloads: %w", err)
	}
	for _, i := range ingests {
		add("download", i.Ref)
	}
	return nil
}

// snapshotters names those that work on this machine.
func (s Scope) snapshotters(ctx context.Context) ([]string, error) {
	resp, err := s.Client.IntrospectionService().Plugins(ctx, "type=="+string(plugins.SnapshotPlugin))
	if err != nil {
		return nil, fmt.Errorf("list snapshotters: %w", err)
	}
	var names []string
	for _, p := range resp.Plugins {
		if p.InitErr == nil {
			names = append(names, p.ID)
		}
	}
	return names, nil
}
