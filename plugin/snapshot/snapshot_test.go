package snapshot_test

import (
	"context"
	"maps"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/snapshot"
)

// layers remembers the labels of what was prepared.
type layers struct {
	snapshots.Snapshotter
	labels map[string]map[string]string
}

func (l layers) Prepare(_ context.Context, key, _ string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	if _, ok := l.labels[key]; ok {
		return nil, errdefs.ErrAlreadyExists
	}
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	l.labels[key] = info.Labels
	return l.Mounts(context.Background(), key)
}

func (l layers) Mounts(_ context.Context, key string) ([]mount.Mount, error) {
	return []mount.Mount{{Type: "overlay", Source: key}}, nil
}

func TestPrepare(t *testing.T) {
	ctx := context.Background()
	able, plain := layers{labels: map[string]map[string]string{}}, layers{labels: map[string]map[string]string{}}
	s := snapshot.New(func(name string) (snapshots.Snapshotter, bool) {
		sn, ok := map[string]snapshots.Snapshotter{"able": able, "plain": plain}[name]
		return sn, ok
	}, func(string) string { return "" }, func(name string) []string {
		return map[string][]string{"able": {"rebase", "remap-ids"}, "plain": {"only-remap-ids"}}[name]
	})
	u := &cri.UserNamespace{
		Uids: []*cri.IDMapping{{HostId: 100000, Length: 65536}},
		Gids: []*cri.IDMapping{{HostId: 200000, Length: 10}, {HostId: 7, ContainerId: 10, Length: 1}},
	}
	for range 2 { // the second finds it
		if m, err := s.Prepare(ctx, "able", "mapped", "parent", u); err != nil || len(m) != 1 || m[0].Source != "mapped" {
			t.Errorf("got %v, %v", m, err)
		}
	}
	want := map[string]string{snapshots.LabelSnapshotUIDMapping: "0:100000:65536", snapshots.LabelSnapshotGIDMapping: "0:200000:10,10:7:1"}
	if got := able.labels["mapped"]; !maps.Equal(got, want) {
		t.Errorf("labels are %v, want %v", got, want)
	}
	if _, err := s.Prepare(ctx, "plain", "mapped", "parent", u); !errdefs.IsFailedPrecondition(err) || len(plain.labels) != 0 {
		t.Errorf("a snapshotter that cannot: %v, %v", err, plain.labels)
	}
	if _, err := s.Prepare(ctx, "plain", "own", "parent", nil); err != nil || plain.labels["own"] != nil {
		t.Errorf("without a user namespace: %v, %v", err, plain.labels)
	}
	if _, err := s.Prepare(ctx, "none", "own", "parent", nil); !errdefs.IsNotFound(err) {
		t.Errorf("no such snapshotter: %v", err)
	}
}
