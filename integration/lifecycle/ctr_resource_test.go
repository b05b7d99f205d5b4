package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// limits is a sleeper with resources.
func (b *box) limits(name string, r *cri.LinuxContainerResources) *cri.ContainerConfig {
	c := b.sleeper(name)
	c.Linux.Resources = r
	return c
}

// knob reads a file of the container's cgroup: the version 1 name first, that
// of version 2 second.
func (b *box) knob(id, controller, v1, v2 string) string {
	b.t.Helper()
	path := cgroupFile(b.t, b.pid(id), controller, v1)
	if !exists(path) {
		path = cgroupFile(b.t, b.pid(id), controller, v2)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// versionOne says whether the machine has the controller in a version 1 tree.
func versionOne(controller string) bool { return exists("/sys/fs/cgroup/" + controller) }

func TestRES_01_CPU(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.limits("app", &cri.LinuxContainerResources{CpuPeriod: 50000, CpuQuota: 25000, CpuShares: 512}))
	if versionOne("cpu") {
		got := fmt.Sprint(b.knob(id, "cpu", "cpu.cfs_quota_us", ""), b.knob(id, "cpu", "cpu.cfs_period_us", ""), b.knob(id, "cpu", "cpu.shares", ""))
		if got != "2500050000512" {
			t.Errorf("quota, period and shares are %s", got)
		}
	} else if got := b.knob(id, "cpu", "cpu.max", "cpu.max"); got != "25000 50000" {
		t.Errorf("cpu.max is %s", got)
	}
	id = b.run(b.limits("free", &cri.LinuxContainerResources{CpuQuota: -1}))
	if got := b.knob(id, "cpu", "cpu.cfs_quota_us", "cpu.max"); !strings.HasPrefix(got, "-1") && !strings.HasPrefix(got, "max") {
		t.Errorf("without a limit it is %s", got)
	}
}

func TestRES_02_Memory(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	const limit = 40 << 20
	id := b.run(b.limits("limited", &cri.LinuxContainerResources{MemoryLimitInBytes: limit}))
	if got := b.knob(id, "memory", "memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(limit) {
		t.Errorf("limit is %s", got)
	}
	for name, none := range map[string]int64{"zero": 0, "minus": -1} {
		id = b.run(b.limits(name, &cri.LinuxContainerResources{MemoryLimitInBytes: none}))
		if got := b.knob(id, "memory", "memory.limit_in_bytes", "memory.max"); got != "max" && len(got) < 18 {
			t.Errorf("limit of %d is %s", none, got)
		}
	}
	c := b.script("beyond", "tail /dev/zero")
	c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: limit}
	if s := b.exited(b.run(c)); s.Reason != "OOMKilled" || s.ExitCode != 137 {
		t.Errorf("beyond the limit: %s, %d", s.Reason, s.ExitCode)
	}
	c = b.script("within", "head -c 10000000 /dev/zero | tail -c 10000000 >/dev/null && echo fine")
	c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: limit}
	if got := b.output(c); got != "fine\n" {
		t.Errorf("within the limit: %q", got)
	}
}

func TestRES_04_Swap(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	const limit = 32 << 20
	for name, row := range map[string]struct {
		swap int64
		v1   string
		v2   string
	}{
		"none":   {limit, fmt.Sprint(limit), "0"},
		"some":   {limit + 8<<20, fmt.Sprint(limit + 8<<20), fmt.Sprint(8 << 20)},
		"silent": {0, fmt.Sprint(limit), "0"},
	} {
		id := b.run(b.limits(name, &cri.LinuxContainerResources{MemoryLimitInBytes: limit, MemorySwapLimitInBytes: row.swap}))
		want := row.v1
		if !versionOne("memory") {
			want = row.v2
		}
		if got := b.knob(id, "memory", "memory.memsw.limit_in_bytes", "memory.swap.max"); got != want {
			t.Errorf("%s: memory with swap is %s, want %s", name, got, want)
		}
	}
}

func TestRES_05_OOMScore(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	for _, score := range []int64{0, 500, 1000} {
		c := b.sleeper(fmt.Sprint("score-", score))
		c.Linux.Resources = &cri.LinuxContainerResources{OomScoreAdj: score}
		id := b.run(c)
		// A score below that of the daemon takes a capability.
		own := readInt(t, fmt.Sprintf("/proc/%d/oom_score_adj", b.PID()))
		if got := readInt(t, fmt.Sprintf("/proc/%d/oom_score_adj", b.begun(id))); got != max(score, own) {
			t.Errorf("score %d became %d", score, got)
		}
		// With crun it is the shim that sets it, a moment after the beginning.
		if got := sh(b.Daemon, id, "sleep 0.5; cat /proc/self/oom_score_adj"); got != fmt.Sprint(max(score, own)) {
			t.Errorf("of a command score %d became %s", score, got)
		}
	}
}

func TestRES_07_Cpuset(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.limits("app", &cri.LinuxContainerResources{CpusetCpus: "1", CpusetMems: "0"}))
	if got := field(t, b.procStatus(id), "Cpus_allowed_list:"); got != "1" {
		t.Errorf("allowed CPUs are %s", got)
	}
	if got := b.knob(id, "cpuset", "cpuset.mems", "cpuset.mems"); got != "0" {
		t.Errorf("memory nodes are %s", got)
	}
	if got := field(t, b.Exec(id, "cat", "/proc/self/status"), "Cpus_allowed_list:"); got != "1" {
		t.Errorf("a command may run on %s", got)
	}
	id, err := b.create(b.limits("beyond", &cri.LinuxContainerResources{CpusetCpus: "999"}))
	if err == nil {
		err = b.start(id)
	}
	if err == nil {
		t.Error("a CPU that is not there was given")
	}
}

func (b *box) update(id string, r *cri.LinuxContainerResources) error {
	_, err := b.Runtime().UpdateContainerResources(context.Background(), &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: r})
	return err
}

// TestRES_10_Update: limits change in place, before the start and after it, and
// an update that fails changes nothing.
func TestRES_10_Update(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	first := &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 20000, CpuShares: 100, MemoryLimitInBytes: 64 << 20, CpusetCpus: "0-1"}
	id := b.mustCreate(b.limits("app", first))
	read := func() string {
		return strings.Join([]string{
			b.knob(id, "cpu", "cpu.cfs_quota_us", "cpu.max"), b.knob(id, "memory", "memory.limit_in_bytes", "memory.max"),
			b.knob(id, "cpuset", "cpuset.cpus", "cpuset.cpus"),
		}, " ")
	}
	if err := b.update(id, &cri.LinuxContainerResources{CpuQuota: 30000}); err != nil {
		t.Fatalf("of a created container: %v", err)
	}
	if err := b.start(id); err != nil {
		t.Fatal(err)
	}
	if got := read(); !strings.HasPrefix(got, "30000") || !strings.Contains(got, fmt.Sprint(64<<20)) {
		t.Errorf("set before the start: %s", got)
	}
	pid := b.pid(id)
	if err := b.update(id, &cri.LinuxContainerResources{CpuQuota: 40000, MemoryLimitInBytes: 96 << 20, CpusetCpus: "0"}); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("40000 %d 0", 96<<20)
	if !versionOne("cpu") {
		want = fmt.Sprintf("40000 100000 %d 0", 96<<20)
	}
	if read() != want {
		t.Errorf("set while it runs: %s, want %s", read(), want)
	}
	// The kubelet says -1 for no limit; what it changes next does not bring one back.
	for _, u := range []*cri.LinuxContainerResources{{CpuQuota: -1}, {CpuShares: 200}, {MemoryLimitInBytes: 80 << 20}} {
		if err := b.update(id, u); err != nil {
			t.Fatal(err)
		}
		wantQuota(t, b.Daemon, id, "-1", "max")
	}
	if got := b.status(id).Resources.GetLinux().GetCpuQuota(); got != -1 {
		t.Errorf("the status has quota %d", got)
	}
	before, status := read(), b.status(id).Resources
	if err := b.update(id, &cri.LinuxContainerResources{CpuQuota: 50000, MemoryLimitInBytes: 128 << 20, CpusetCpus: "999"}); err == nil {
		t.Error("a CPU that is not there was given")
	}
	if got := read(); got != before {
		t.Errorf("an update that failed left %s, before %s", got, before)
	}
	if got := b.status(id).Resources; !proto.Equal(got, status) {
		t.Errorf("an update that failed left the status %v, before %v", got, status)
	}
	if b.pid(id) != pid {
		t.Error("the process is another")
	}
	b.stop(id, 0)
	if err := b.update(id, first); err == nil {
		t.Error("a stopped container was updated")
	}
}

func TestCTR_23_StatusResources(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	asked := &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 20000, CpuShares: 100, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 900, CpusetCpus: "0"}
	id := b.run(b.limits("app", asked))
	check := func(want *cri.LinuxContainerResources) {
		t.Helper()
		got := b.status(id).Resources.GetLinux()
		if got.GetCpuQuota() != want.CpuQuota || got.GetCpuPeriod() != want.CpuPeriod || got.GetCpuShares() != want.CpuShares ||
			got.GetMemoryLimitInBytes() != want.MemoryLimitInBytes || got.GetOomScoreAdj() != want.OomScoreAdj || got.GetCpusetCpus() != want.CpusetCpus {
			t.Errorf("status has %v, want %v", got, want)
		}
		if kernel := b.knob(id, "memory", "memory.limit_in_bytes", "memory.max"); kernel != fmt.Sprint(want.MemoryLimitInBytes) {
			t.Errorf("the kernel has a limit of %s", kernel)
		}
	}
	check(asked)
	if err := b.update(id, &cri.LinuxContainerResources{CpuQuota: 30000, MemoryLimitInBytes: 128 << 20}); err != nil {
		t.Fatal(err)
	}
	asked.CpuQuota, asked.MemoryLimitInBytes = 30000, 128<<20
	check(asked)
}

// TestRES_16_OOMDetection: also when it hits a child and the first process
// lives on for a while.
func TestRES_16_OOMDetection(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	for name, script := range map[string]string{
		"first": "exec tail /dev/zero", "child": "tail /dev/zero; exit 3", "grandchild": "(sh -c 'tail /dev/zero; exit 4'; exit 5); sleep 1; exit 6",
	} {
		c := b.script(name, script)
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 24 << 20}
		if s := b.exited(b.run(c)); s.Reason != "OOMKilled" || s.ExitCode == 0 {
			t.Errorf("%s: reason %s, exit code %d", name, s.Reason, s.ExitCode)
		}
	}
	c := b.script("none", "exit 137")
	c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 24 << 20}
	if s := b.exited(b.run(c)); s.Reason != "Error" {
		t.Errorf("exit 137 by itself: %s", s.Reason)
	}
}

func (b *box) stats(id string) *cri.ContainerStats {
	b.t.Helper()
	resp, err := b.Runtime().ContainerStats(context.Background(), &cri.ContainerStatsRequest{ContainerId: id})
	if err != nil {
		b.t.Fatal(err)
	}
	return resp.Stats
}

func TestSTA_01_CPUUsage(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	usage := func() int64 { return int64(b.stats(id).Cpu.GetUsageCoreNanoSeconds().GetValue()) }
	kernel := func() int64 {
		if versionOne("cpuacct") {
			return readInt(t, cgroupFile(t, b.pid(id), "cpuacct", "cpuacct.usage"))
		}
		us, err := strconv.ParseInt(field(t, b.knob(id, "cpu", "cpu.stat", "cpu.stat"), "usage_usec "), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return us * 1000
	}
	first := usage()
	b.Exec(id, "sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done")
	low := kernel()
	second := usage()
	high := kernel()
	if second <= first || second < low*95/100 || second > high*105/100 {
		t.Errorf("usage went from %d to %d; the kernel says %d and then %d", first, second, low, high)
	}
	if at := b.stats(id).Cpu.Timestamp; time.Since(time.Unix(0, at)) > time.Minute {
		t.Errorf("measured at %v", time.Unix(0, at))
	}
}

func TestSTA_03_MemoryUsage(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	const limit, block = 200 << 20, 30 << 20
	c := b.script("app", fmt.Sprintf("head -c %d /dev/zero >/dev/shm/block; head -c %[1]d /dev/zero >/cached; cat /cached >/dev/null; echo ready; exec sleep 1000", block))
	c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: limit}
	id := b.run(c)
	b.logged(id, "ready")
	m := b.stats(id).Memory
	usage, set, available := m.GetUsageBytes().GetValue(), m.GetWorkingSetBytes().GetValue(), m.GetAvailableBytes().GetValue()
	kernel, err := strconv.ParseInt(b.knob(id, "memory", "memory.usage_in_bytes", "memory.current"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	if d := int64(usage) - kernel; d < -4<<20 || d > 4<<20 {
		t.Errorf("usage %d, the kernel says %d", usage, kernel)
	}
	if set < block || set > usage || usage < 2*block {
		t.Errorf("usage %d, working set %d, with %d in shared memory and as much in the cache", usage, set, block)
	}
	if available != limit-set {
		t.Errorf("available %d, want %d", available, limit-set)
	}
	if m.GetPageFaults().GetValue() == 0 || m.GetRssBytes() == nil || m.GetMajorPageFaults() == nil || m.Timestamp == 0 {
		t.Errorf("memory is %v", m)
	}
}

// TestSTA_04_WritableLayer: the usage follows what the container writes.
func TestSTA_04_WritableLayer(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	first := b.stats(id).WritableLayer
	const size = 20 << 20
	b.Exec(id, "sh", "-c", fmt.Sprintf("mkdir /data; head -c %d /dev/zero >/data/big; for i in 1 2 3 4 5; do touch /data/$i; done", size))
	eventually(t, ample, func() error {
		now := b.stats(id).WritableLayer
		if bytes := now.GetUsedBytes().GetValue() - first.GetUsedBytes().GetValue(); bytes < size || bytes > size*11/10 {
			return fmt.Errorf("%d bytes more after writing %d", bytes, size)
		}
		if n := now.GetInodesUsed().GetValue() - first.GetInodesUsed().GetValue(); n < 7 || n > 15 {
			return fmt.Errorf("%d inodes more after making 7", n)
		}
		return nil
	})
	mount := b.stats(id).WritableLayer.GetFsId().GetMountpoint()
	if info, err := os.Stat(mount); err != nil || !info.IsDir() || !strings.HasPrefix(mount, filepath.Clean(b.Root)) {
		t.Errorf("mountpoint is %q: %v", mount, err)
	}
}

// TestSTA_10_States: created and running containers are measured, ended ones
// are left out, and those that come and go meanwhile are no error.
func TestSTA_10_States(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	created, running, ended := b.mustCreate(b.sleeper("created")), b.run(b.sleeper("running")), b.run(b.script("ended", "exit 0"))
	b.exited(ended)
	list := func() ([]string, error) {
		resp, err := b.Runtime().ListContainerStats(context.Background(), &cri.ListContainerStatsRequest{Filter: &cri.ContainerStatsFilter{PodSandboxId: b.pod}})
		var ids []string
		for _, s := range resp.GetStats() {
			ids = append(ids, s.Attributes.Id)
		}
		return ids, err
	}
	ids, err := list()
	if err != nil || len(ids) != 2 || !strings.Contains(strings.Join(ids, " "), created) || !strings.Contains(strings.Join(ids, " "), running) {
		t.Errorf("listed are %q, %v; created %s, running %s", ids, err, created, running)
	}
	done := make(chan error, 1)
	go func() {
		var errs []error
		for i := range 6 {
			errs = append(errs, b.lifeOf(fmt.Sprint("busy", i)))
		}
		done <- errors.Join(errs...)
	}()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			return
		default:
			if _, err := list(); err != nil {
				t.Errorf("while containers come and go: %v", err)
			}
		}
	}
}
