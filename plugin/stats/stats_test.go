package stats

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/record"
)

// usageFunc is a Usage with one filesystem.
type usageFunc func(ctx context.Context, snapshotter, key string) (bytes, inodes uint64, err error)

func (f usageFunc) Usage(ctx context.Context, snapshotter, key string) (bytes, inodes uint64, err error) {
	return f(ctx, snapshotter, key)
}

func (usageFunc) Mountpoint(snapshotter string) string { return "/var/lib/" + snapshotter }

// fixed is a Usage that finds the same in every layer.
var fixed = usageFunc(func(context.Context, string, string) (uint64, uint64, error) { return 4096, 3, nil })

// clock is a time that passes when told to.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func newClock() *clock { return &clock{time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)} }

// hosts are the layouts under testdata. Version 1 and the pressure files were
// recorded; version 2 of memory has the same numbers in its own form.
func hosts(t *testing.T) map[facts.CgroupMode]facts.Host {
	t.Helper()
	dir, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	v1 := map[string]string{"cpuacct": dir + "/v1/cpuacct", "memory": dir + "/v1/memory"}
	return map[facts.CgroupMode]facts.Host{
		facts.CgroupV1:     {Cgroup: facts.Cgroup{Mode: facts.CgroupV1, Controllers: v1, SwapAccounting: true}},
		facts.CgroupHybrid: {Cgroup: facts.Cgroup{Mode: facts.CgroupHybrid, Controllers: v1, Unified: dir + "/hybrid/unified"}},
		facts.CgroupV2: {Cgroup: facts.Cgroup{
			Mode: facts.CgroupV2, Controllers: map[string]string{"memory": dir + "/v2"}, Unified: dir + "/v2", SwapAccounting: true,
		}},
	}
}

func newContainer(phase record.ContainerPhase, cgroup string) record.Container {
	return record.Container{
		ID: "c1", Phase: phase, Handler: record.Handler{Snapshotter: "overlayfs"},
		Spec: fmt.Appendf(nil, `{"linux":{"cgroupsPath":%q}}`, cgroup),
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "web", Attempt: 2},
			Labels:   map[string]string{"l": "1"}, Annotations: map[string]string{"a": "2"},
		},
	}
}

func value(n uint64) *cri.UInt64Value { return &cri.UInt64Value{Value: n} }

func psi(avg [3]float64, total uint64, favg [3]float64, ftotal uint64) *cri.PsiStats {
	return &cri.PsiStats{
		Some: &cri.PsiData{Avg10: avg[0], Avg60: avg[1], Avg300: avg[2], Total: total},
		Full: &cri.PsiData{Avg10: favg[0], Avg60: favg[1], Avg300: favg[2], Total: ftotal},
	}
}

func TestRunningContainer(t *testing.T) {
	now := newClock()
	at := now.t.UnixNano()
	cpuPSI := psi([3]float64{2.53, 0.45, 0.09}, 537881000, [3]float64{1.99, 0.35, 0.07}, 470894000)
	ioPSI := psi([3]float64{4.16, 0.75, 0.15}, 611851000, [3]float64{4.16, 0.75, 0.15}, 611851000)
	memPSI := psi([3]float64{}, 221000, [3]float64{}, 221000)
	memory := &cri.MemoryUsage{
		Timestamp: at, UsageBytes: value(199925760), WorkingSetBytes: value(199925760 - 2605056), RssBytes: value(385024),
		AvailableBytes: value(199999488 - (199925760 - 2605056)), PageFaults: value(19288), MajorPageFaults: value(1),
	}
	hybridMemory := proto.Clone(memory).(*cri.MemoryUsage)
	hybridMemory.Psi = memPSI
	v2Memory := proto.Clone(hybridMemory).(*cri.MemoryUsage)
	v2Memory.AvailableBytes = nil // it has no limit
	for mode, want := range map[facts.CgroupMode]*cri.ContainerStats{
		facts.CgroupV1: {
			Cpu:    &cri.CpuUsage{Timestamp: at, UsageCoreNanoSeconds: value(874668791)},
			Memory: memory,
			Swap:   &cri.SwapUsage{Timestamp: at, SwapUsageBytes: value(40960), SwapAvailableBytes: value(249999360 - 199999488 - 40960)},
		},
		facts.CgroupHybrid: {
			Cpu:    &cri.CpuUsage{Timestamp: at, UsageCoreNanoSeconds: value(874668791), Psi: cpuPSI},
			Memory: hybridMemory,
			Io:     &cri.IoUsage{Timestamp: at, Psi: ioPSI},
		},
		facts.CgroupV2: {
			Cpu:    &cri.CpuUsage{Timestamp: at, UsageCoreNanoSeconds: value(887305000), Psi: cpuPSI},
			Memory: v2Memory,
			Swap:   &cri.SwapUsage{Timestamp: at, SwapUsageBytes: value(40960), SwapAvailableBytes: value(0)},
			Io:     &cri.IoUsage{Timestamp: at, Psi: ioPSI},
		},
	} {
		c := newContainer(record.ContainerRunning, "/kubepods/pod1/c1")
		want.Attributes = &cri.ContainerAttributes{Id: "c1", Metadata: c.Config.Metadata, Labels: c.Config.Labels, Annotations: c.Config.Annotations}
		want.WritableLayer = &cri.FilesystemUsage{
			Timestamp: at, FsId: &cri.FilesystemIdentifier{Mountpoint: "/var/lib/overlayfs"}, UsedBytes: value(4096), InodesUsed: value(3),
		}
		s := New(hosts(t)[mode], fixed, time.Minute)
		s.now = now.now
		got, err := s.Container(t.Context(), c)
		if err != nil || !proto.Equal(got, want) {
			t.Errorf("%s: %v\ngot  %v\nwant %v", mode, err, got, want)
		}
	}
}

func TestContainerOfEachPhase(t *testing.T) {
	s := New(hosts(t)[facts.CgroupV1], fixed, time.Minute)
	for name, tc := range map[string]struct {
		c        record.Container
		measured bool
		usage    uint64
		class    func(error) bool
	}{
		"creating":       {c: newContainer(record.ContainerCreating, ""), measured: true},
		"created":        {c: newContainer(record.ContainerCreated, "/kubepods/pod1/c9"), measured: true},
		"running":        {c: newContainer(record.ContainerRunning, "/kubepods/pod1/c1"), measured: true, usage: 874668791},
		"just ended":     {c: newContainer(record.ContainerRunning, "/kubepods/pod1/c9")},
		"exited":         {c: newContainer(record.ContainerExited, "/kubepods/pod1/c1")},
		"of no phase":    {c: record.Container{}, class: errdefs.IsNotFound},
		"without cgroup": {c: newContainer(record.ContainerRunning, ""), class: errdefs.IsNotFound},
		"of a bad spec":  {c: newContainer(record.ContainerRunning, "relative"), class: errdefs.IsInvalidArgument},
	} {
		tc.c.ID = name
		got, err := s.Container(t.Context(), tc.c)
		if tc.class != nil {
			if !tc.class(err) || got != nil {
				t.Errorf("%s: %v, %v", name, got, err)
			}
			continue
		}
		if err != nil || got.GetAttributes().GetId() != name || got.GetWritableLayer().GetUsedBytes().GetValue() != 4096 {
			t.Errorf("%s: %v, %v", name, got, err)
			continue
		}
		if (got.Cpu != nil) != tc.measured || (got.Memory != nil) != tc.measured || (got.Swap != nil) != tc.measured {
			t.Errorf("%s: %v", name, got)
		}
		if got.GetCpu().GetUsageCoreNanoSeconds().GetValue() != tc.usage || (got.GetMemory().GetUsageBytes().GetValue() != 0) != (tc.usage != 0) {
			t.Errorf("%s: %v", name, got)
		}
		if tc.measured && (got.Cpu.Timestamp <= 0 || got.Memory.Timestamp <= 0) {
			t.Errorf("%s: no time: %v", name, got)
		}
	}
}

// A file that is no longer what it was must not pass for a small number.
func TestDamagedBooks(t *testing.T) {
	for name, damage := range map[string]func(dir string) error{
		"usage":  func(dir string) error { return os.WriteFile(dir+"/cpuacct.usage", []byte("many\n"), 0o600) },
		"stat":   func(dir string) error { return os.WriteFile(dir+"/memory.stat", []byte("total_rss x\n"), 0o600) },
		"no dir": func(dir string) error { return os.RemoveAll(dir) },
	} {
		root := t.TempDir()
		dir := root + "/c1"
		if err := os.CopyFS(dir, os.DirFS("testdata/v1/memory/kubepods/pod1/c1")); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(dir, os.DirFS("testdata/v1/cpuacct/kubepods/pod1/c1")); err != nil {
			t.Fatal(err)
		}
		cg := facts.Cgroup{Mode: facts.CgroupV1, Controllers: map[string]string{"cpuacct": root, "memory": root}}
		c := newContainer(record.ContainerRunning, "/c1")
		if got, err := New(facts.Host{Cgroup: cg}, fixed, 0).Container(t.Context(), c); err != nil || got.Cpu == nil {
			t.Fatalf("%s: before: %v, %v", name, got, err)
		}
		if err := damage(dir); err != nil {
			t.Fatal(err)
		}
		got, err := New(facts.Host{Cgroup: cg}, fixed, 0).Container(t.Context(), c)
		if name == "no dir" {
			if err != nil || got.Cpu != nil || got.Memory != nil {
				t.Errorf("%s: %v, %v", name, got, err)
			}
		} else if !errdefs.IsInternal(err) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestOOMKilled(t *testing.T) {
	for mode, host := range hosts(t) {
		s := New(host, fixed, time.Minute)
		for cgroup, want := range map[string]bool{"/kubepods/pod1/c1": true, "/kubepods/pod1/c9": false} {
			c := newContainer(record.ContainerExited, cgroup)
			c.ID = cgroup
			if got, err := s.OOMKilled(c); got != want || err != nil {
				t.Errorf("%s: %s: %v, %v", mode, cgroup, got, err)
			}
		}
		never := newContainer(record.ContainerExited, "")
		never.ID, never.Spec = "never", nil
		if got, err := s.OOMKilled(never); got || err != nil {
			t.Errorf("%s: never started: %v, %v", mode, got, err)
		}
		if got, err := s.OOMKilled(record.Container{ID: "bad", Spec: []byte("{")}); got || !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: bad specification: %v, %v", mode, got, err)
		}
	}
	none := New(facts.Host{Cgroup: facts.Cgroup{Mode: facts.CgroupV1}}, fixed, time.Minute)
	if got, err := none.OOMKilled(newContainer(record.ContainerExited, "/a")); got || err != nil {
		t.Errorf("without the controller: %v, %v", got, err)
	}
}

func TestRate(t *testing.T) {
	const s = time.Second
	type step struct {
		at   time.Duration
		cpu  uint64
		want count
	}
	for name, steps := range map[string][]step{
		"half a core":      {{0, 0, count{}}, {10 * s, 5e9, known(5e8)}, {20 * s, 10e9, known(5e8)}},
		"too soon":         {{0, 0, count{}}, {s / 2, 5e8, count{}}, {s, 1e9, known(1e9)}},
		"two clients":      {{0, 0, count{}}, {10 * s, 1e9, known(1e8)}, {10*s + 1, 1e9, known(1e8 - 1)}, {20 * s, 11e9, known(1e9)}},
		"long ago":         {{0, 0, count{}}, {time.Hour, 5e9, count{}}, {time.Hour + s, 6e9, known(1e9)}},
		"counter back":     {{0, 5e9, count{}}, {10 * s, 1e9, count{}}, {20 * s, 2e9, known(1e8)}},
		"a little back":    {{0, 5e9, count{}}, {10 * s, 6e9, known(1e8)}, {10*s + 1, 6e9 - 1, known(1e8 - 1)}},
		"clock back":       {{time.Hour, 5e9, count{}}, {0, 6e9, count{}}, {10 * s, 7e9, known(1e8)}},
		"a huge number":    {{0, 0, count{}}, {s, 1 << 63, known(1 << 63)}},
		"more than fits":   {{0, 0, count{}}, {s, 1<<64 - 1, known(1<<64 - 1)}},
		"many cores, idle": {{0, 0, count{}}, {s, 256e9, known(256e9)}, {2 * s, 256e9, known(0)}},
	} {
		var m samples
		for i, st := range steps {
			if got := m.rate(sample{newClock().t.Add(st.at), st.cpu}); got != st.want {
				t.Errorf("%s: step %d: %v, want %v", name, i, got, st.want)
			}
		}
	}
}

// A young container has a rate at once: it had used nothing when it started.
func TestRateSinceStart(t *testing.T) {
	for age, want := range map[time.Duration]*cri.UInt64Value{
		time.Second / 2: nil, 4 * time.Second: value(874668791 / 4), time.Hour: nil,
	} {
		now := newClock()
		s := New(hosts(t)[facts.CgroupV1], fixed, time.Minute)
		s.now = now.now
		c := newContainer(record.ContainerRunning, "/kubepods/pod1/c1")
		c.StartedAt = now.t.Add(-age)
		got, err := s.Container(t.Context(), c)
		if err != nil || !proto.Equal(got.Cpu.UsageNanoCores, want) {
			t.Errorf("%s: %v, %v, want %v", age, got.GetCpu(), err, want)
		}
	}
}

func TestForget(t *testing.T) {
	now := newClock()
	s := New(hosts(t)[facts.CgroupV1], fixed, time.Minute)
	s.now = now.now
	for i := range 1000 {
		c := newContainer(record.ContainerRunning, "/kubepods/pod1/c1")
		c.ID = fmt.Sprint(i)
		if _, err := s.Container(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		now.t = now.t.Add(10 * time.Second)
	}
	// Retention, and as much again until the next sweep, at one in ten seconds.
	if len(s.entries) > 26 {
		t.Errorf("%d entries are kept", len(s.entries))
	}
}

func TestLayerPeriod(t *testing.T) {
	now := newClock()
	var calls, cost, fail = 0, time.Duration(0), error(nil)
	s := New(hosts(t)[facts.CgroupV1], usageFunc(func(_ context.Context, snapshotter, key string) (uint64, uint64, error) {
		if snapshotter != "overlayfs" || key != "c1" {
			t.Errorf("asked for %s of %s", key, snapshotter)
		}
		calls++
		now.t = now.t.Add(cost)
		return uint64(1000 * calls), uint64(calls), fail
	}), 10*time.Second)
	s.now = now.now
	for i, st := range []struct {
		after, cost time.Duration
		fail        error
		calls       int
		bytes       *cri.UInt64Value
	}{
		{calls: 1, bytes: value(1000)},
		{after: 10 * time.Second, calls: 1, bytes: value(1000)},
		{after: 1, calls: 2, bytes: value(2000)},
		{after: 11 * time.Second, fail: errdefs.ErrUnavailable, calls: 3, bytes: value(2000)},
		{after: 5 * time.Second, calls: 3, bytes: value(2000)},
		{after: 6 * time.Second, cost: 5 * time.Second, calls: 4, bytes: value(4000)},
		{after: 44 * time.Second, calls: 4, bytes: value(4000)},
		{after: 2 * time.Second, fail: errdefs.ErrNotFound, calls: 5},
		{after: 11 * time.Second, calls: 6, bytes: value(6000)},
	} {
		now.t = now.t.Add(st.after)
		cost, fail = st.cost, st.fail
		got, err := s.Container(t.Context(), newContainer(record.ContainerExited, ""))
		if err != nil || calls != st.calls || !proto.Equal(got.GetWritableLayer().GetUsedBytes(), st.bytes) {
			t.Fatalf("step %d: %d calls, %v, %v", i, calls, got, err)
		}
	}
}

// Many requests for one container measure its layer once; none waits longer
// than it has patience, and the measurement is there when it is done.
func TestSlowLayer(t *testing.T) {
	var calls atomic.Int32
	release := make(chan struct{})
	s := New(hosts(t)[facts.CgroupV1], usageFunc(func(context.Context, string, string) (uint64, uint64, error) {
		calls.Add(1)
		<-release
		return 7, 1, nil
	}), time.Minute)
	s.patience = time.Millisecond
	c := newContainer(record.ContainerExited, "")
	results := make(chan error)
	for range 20 {
		go func() {
			got, err := s.Container(context.Background(), c)
			if err == nil && got.WritableLayer != nil {
				err = fmt.Errorf("a layer that was not measured: %v", got.WritableLayer)
			}
			results <- err
		}()
	}
	for range 20 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if got, err := s.Container(ended, c); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of the request: %v, %v", got, err)
	}
	close(release)
	s.Wait()
	got, err := s.Container(t.Context(), c)
	if err != nil || got.GetWritableLayer().GetUsedBytes().GetValue() != 7 || calls.Load() != 1 {
		t.Errorf("%v, %v after %d measurements", got, err, calls.Load())
	}
}

func TestReaderBounds(t *testing.T) {
	dir := t.TempDir()
	long := strings.Repeat("1234567\n", 100_000)
	if err := os.WriteFile(dir+"/long", []byte(long), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("long", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	r := &reader{}
	if b, err := r.file(dir, "long"); err != nil || string(b) != long {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if _, err := r.file(dir, "link"); err == nil {
		t.Error("a symbolic link is followed")
	}
	if b, err := r.file("/dev", "zero"); !errdefs.IsInternal(err) {
		t.Errorf("an endless file: %d bytes, %v", len(b), err)
	}
}
