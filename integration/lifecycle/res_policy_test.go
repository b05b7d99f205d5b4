package lifecycle

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// TestRES_03_MinMemory: at creation and at an update, in words.
func TestRES_03_MinMemory(t *testing.T) {
	t.Parallel()
	const least = 12 << 20
	b := newBoxOn(t, start(t, runtimeKey(least, "container_min_memory")))
	b.refused(b.limits("small", &cri.LinuxContainerResources{MemoryLimitInBytes: 4 << 20}), codes.InvalidArgument, "memory_limit_in_bytes", "container_min_memory", fmt.Sprint(least))
	id := b.run(b.limits("enough", &cri.LinuxContainerResources{MemoryLimitInBytes: 2 * least}))
	wantError(t, b.update(id, &cri.LinuxContainerResources{MemoryLimitInBytes: 4 << 20}), codes.InvalidArgument, "container_min_memory")
	if got := b.knob(id, "memory", "memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(2*least) {
		t.Errorf("the limit is %s", got)
	}
	b.run(b.sleeper("unlimited"))
}

// scoreOf is a process's OOM score.
func scoreOf(t *testing.T, pid int) int64 {
	t.Helper()
	return readInt(t, fmt.Sprintf("/proc/%d/oom_score_adj", pid))
}

// TestRES_06_RestrictOOMScore: no process below the daemon's own score, which
// is raised here, and which it may not lower.
func TestRES_06_RestrictOOMScore(t *testing.T) {
	t.Parallel()
	const own = 300
	b := pausedBox(t, start(t, runtimeKey(true, "restrict_oom_score_adj"), startedBy(t, "choom", "-n", fmt.Sprint(own), "--")))
	if got := scoreOf(t, b.PID()); got != own {
		t.Fatalf("the daemon has %d", got)
	}
	for want, score := range map[int64]int64{-999: own, 0: own, own: own, 500: 500, 1000: 1000} {
		id := b.run(b.limits(fmt.Sprint("score", want), &cri.LinuxContainerResources{OomScoreAdj: want}))
		if got := scoreOf(t, b.begun(id)); got != score {
			t.Errorf("%d became %d, want %d", want, got, score)
		}
	}
	if got := scoreOf(t, pidOf(t, b.Daemon, b.pod)); got != own {
		t.Errorf("the sandbox has %d", got)
	}
}

// hugepages asks for a limit of the machine's first page size.
func hugepages() *cri.LinuxContainerResources {
	return &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}}
}

// hasHugetlb says whether a runtime finds the controller: in a tree of its own,
// or in that of a machine with version 2 alone.
func hasHugetlb() bool {
	text, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	return versionOne("hugetlb") || err == nil && strings.Contains(string(text), "hugetlb")
}

// TestRES_08_HugepageLimits: with the controller the limit is set, without it
// the container runs without one, and what is no page size is refused.
func TestRES_08_HugepageLimits(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t, runtimeKey(false, "disable_hugetlb_controller")))
	id := b.run(b.limits("app", hugepages()))
	if hasHugetlb() {
		if got := b.knob(id, "hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"); got != fmt.Sprint(4<<20) {
			t.Errorf("the limit is %s", got)
		}
	}
	if got := b.status(id).Resources.Linux.HugepageLimits; len(got) != 1 || got[0].Limit != 4<<20 {
		t.Errorf("the status has %v", got)
	}
	for _, size := range []string{"2M", "", "../2MB"} {
		r := hugepages()
		r.HugepageLimits[0].PageSize = size
		b.refused(b.limits("bad", r), codes.InvalidArgument, "hugepage_limits[0].page_size")
	}
}

// hugepageBox is a container with the limit and a filesystem of huge pages at
// /huge. take has it write so many bytes there and tells whether it may.
func hugepageBox(t *testing.T) (b *box, id string, take func(file string, size int) bool) {
	t.Helper()
	if free, err := os.ReadFile("/proc/sys/vm/nr_hugepages"); !hasHugetlb() || err != nil || strings.TrimSpace(string(free)) == "0" {
		t.Skip("this machine has no huge pages, or no control group that limits them")
	}
	dir := t.TempDir()
	if err := unix.Mount("gantry-test", dir, "hugetlbfs", 0, "pagesize=2M"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	b = newBoxOn(t, start(t, runtimeKey(false, "disable_hugetlb_controller")))
	c := b.limits("app", hugepages())
	c.Mounts = []*cri.Mount{{HostPath: dir, ContainerPath: "/huge"}}
	id = b.run(c)
	return b, id, func(file string, size int) bool {
		out, code := tryExec(t, b.Daemon, id, "fallocate", "-l", fmt.Sprint(size), "/huge/"+file)
		t.Logf("%s of %d bytes: %d, %s", file, size, code, out)
		return code == 0
	}
}

// TestRES_08_HugepagesHeld: a container gets huge pages up to its limit, and no
// more.
func TestRES_08_HugepagesHeld(t *testing.T) {
	_, _, take := hugepageBox(t)
	if !take("two", 4<<20) {
		t.Error("what the limit allows is refused")
	}
	if take("third", 2<<20) {
		t.Error("the limit does not hold")
	}
}

// TestRES_11_HugepagesUpdate: a limit that is set later counts, up and down.
func TestRES_11_HugepagesUpdate(t *testing.T) {
	b, id, take := hugepageBox(t)
	for i, step := range []struct {
		pages uint64
		ok    bool
	}{{1, true}, {1, false}, {3, true}, {3, true}} {
		r := hugepages()
		r.HugepageLimits[0].Limit = step.pages << 21
		if err := b.update(id, r); err != nil {
			t.Fatal(err)
		}
		if got := b.knob(id, "hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"); got != fmt.Sprint(step.pages<<21) {
			t.Errorf("step %d: the limit is %s", i, got)
		}
		if got := take(fmt.Sprint("page-", i), 2<<20); got != step.ok {
			t.Errorf("step %d: with a limit of %d pages, one more is given: %v", i, step.pages, got)
		}
	}
	if take("one-more", 2<<20) {
		t.Error("a limit that was raised does not hold")
	}
	if err := b.update(id, &cri.LinuxContainerResources{CpuShares: 300}); err != nil {
		t.Errorf("while more pages are in use than the container was created with a limit for: %v", err)
	}
	if take("and-more", 2<<20) {
		t.Error("another update has lifted the limit")
	}
}

// TestRES_09_UnifiedElsewhere: raw files of version 2, and a clear answer where there is
// no such tree alone.
func TestRES_09_UnifiedElsewhere(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	high := b.limits("high", &cri.LinuxContainerResources{Unified: map[string]string{"memory.high": "67108864"}})
	if exists("/sys/fs/cgroup/cgroup.controllers") {
		if got := b.knob(b.run(high), "memory", "memory.high", "memory.high"); got != "67108864" {
			t.Errorf("memory.high is %s", got)
		}
	} else {
		b.refused(high, codes.FailedPrecondition, "unified", "cgroup v2")
	}
	for _, key := range []string{"cgroup.procs", "../memory.high", "memory"} {
		_, err := b.create(b.limits("bad", &cri.LinuxContainerResources{Unified: map[string]string{key: "1"}}))
		if err == nil {
			t.Errorf("%s was taken", key)
		}
	}
}

// TestRES_11_UpdateEveryField: each field alone, and what it does not name
// stays.
func TestRES_11_UpdateEveryField(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t, runtimeKey(false, "disable_hugetlb_controller")))
	const limit = 64 << 20
	c := b.script("app", "sleep 1000 & exec sleep 1000")
	c.Linux.Resources = &cri.LinuxContainerResources{
		CpuPeriod: 100000, CpuQuota: 20000, CpuShares: 100, MemoryLimitInBytes: limit, MemorySwapLimitInBytes: limit,
		OomScoreAdj: 500, CpusetCpus: "0-1", CpusetMems: "0",
	}
	id := b.run(c)
	pid := b.begun(id)
	v1 := versionOne("memory")
	knob := func(controller, one, two string) func() string {
		return func() string { return b.knob(id, controller, one, two) }
	}
	// On version 2, quota and period are in one file and swap is by itself.
	choose := func(one, two string) string {
		if v1 {
			return one
		}
		return two
	}
	rows := []struct {
		name   string
		update *cri.LinuxContainerResources
		read   func() string
		want   string
	}{
		{"cpu_period", &cri.LinuxContainerResources{CpuPeriod: 50000}, knob("cpu", "cpu.cfs_period_us", "cpu.max"), choose("50000", "20000 50000")},
		{"cpu_quota", &cri.LinuxContainerResources{CpuQuota: 30000}, knob("cpu", "cpu.cfs_quota_us", "cpu.max"), choose("30000", "30000 50000")},
		{"cpu_shares", &cri.LinuxContainerResources{CpuShares: 200}, func() string { return b.knob(id, "cpu", "cpu.shares", "cpu.weight") }, choose("200", "")},
		{"memory_limit_in_bytes", &cri.LinuxContainerResources{MemoryLimitInBytes: 2 * limit}, knob("memory", "memory.limit_in_bytes", "memory.max"), fmt.Sprint(2 * limit)},
		{"memory_swap_limit_in_bytes", &cri.LinuxContainerResources{MemorySwapLimitInBytes: 3 * limit}, knob("memory", "memory.memsw.limit_in_bytes", "memory.swap.max"), choose(fmt.Sprint(3*limit), fmt.Sprint(limit))},
		{"oom_score_adj", &cri.LinuxContainerResources{OomScoreAdj: 800}, func() string { return fmt.Sprint(scoreOf(t, pid)) }, "800"},
		{"cpuset_cpus", &cri.LinuxContainerResources{CpusetCpus: "0"}, knob("cpuset", "cpuset.cpus", "cpuset.cpus"), "0"},
		{"cpuset_mems", &cri.LinuxContainerResources{CpusetMems: "0"}, knob("cpuset", "cpuset.mems", "cpuset.mems"), "0"},
	}
	for i, row := range rows {
		if err := b.update(id, row.update); err != nil {
			t.Errorf("%s: %v", row.name, err)
		}
		for _, earlier := range rows[:i+1] {
			if got := earlier.read(); got != earlier.want && earlier.want != "" && (v1 || earlier.name != "cpu_period") {
				t.Errorf("after %s: %s is %s, want %s", row.name, earlier.name, got, earlier.want)
			}
		}
	}
	if err := b.update(id, hugepages()); err != nil {
		t.Errorf("hugepage_limits: %v", err)
	} else if hasHugetlb() {
		if got := b.knob(id, "hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"); got != fmt.Sprint(4<<20) {
			t.Errorf("hugepage_limits: the limit is %s", got)
		}
	}
	// The OOM score is that of every process.
	pids, err := os.ReadFile(cgroupFile(t, pid, "memory", "cgroup.procs"))
	if err != nil || len(strings.Fields(string(pids))) != 2 {
		t.Errorf("the container has %q, %v", pids, err)
	}
	for p := range strings.FieldsSeq(string(pids)) {
		if n, err := strconv.Atoi(p); err != nil || scoreOf(t, n) != 800 {
			t.Errorf("process %s: %v", p, err)
		}
	}
	status := b.status(id).Resources.Linux
	if status.OomScoreAdj != 800 || status.MemorySwapLimitInBytes != 3*limit || status.CpuQuota != 30000 || status.CpuPeriod != 50000 || len(status.HugepageLimits) != 1 {
		t.Errorf("the status has %v", status)
	}
	// One that fails in the middle sets everything back, the score included.
	if err := b.update(id, &cri.LinuxContainerResources{OomScoreAdj: 900, CpusetCpus: "999"}); err == nil {
		t.Error("a CPU that is not there was given")
	}
	if got := scoreOf(t, pid); got != 800 {
		t.Errorf("an update that failed left the score %d", got)
	}
	wantError(t, b.update(id, &cri.LinuxContainerResources{OomScoreAdj: 1001}), codes.InvalidArgument, "oom_score_adj")
	b.commandsHave(id, 800)
	b.Restart()
	b.commandsHave(id, 800)
	if got := scoreOf(t, pid); got != 800 {
		t.Errorf("commands have set the container's score to %d", got)
	}
	// Before the start it is the same.
	id = b.mustCreate(b.limits("later", &cri.LinuxContainerResources{OomScoreAdj: 400}))
	if err := b.update(id, &cri.LinuxContainerResources{OomScoreAdj: 600}); err != nil {
		t.Fatal(err)
	}
	if err := b.start(id); err != nil {
		t.Fatal(err)
	}
	if got := scoreOf(t, b.begun(id)); got != 600 {
		t.Errorf("set before the start: %d", got)
	}
	b.commandsHave(id, 600)
}

// commandsHave runs a command that waits until it has the score, and so has a
// child that it starts at once; the runtime begins both with its own idea.
func (b *box) commandsHave(id string, score int) {
	b.t.Helper()
	if stock {
		return // it changes no score, and a command waits for long
	}
	const script = `has() { for i in $(seq 300); do read n </proc/self/oom_score_adj; [ "$n" = $1 ] && return; sleep 0.1; done; echo "$2 has $n"; return 1; }
has $0 "a child" & has $0 "the command" && wait $!`
	if out, code := tryExec(b.t, b.Daemon, id, "sh", "-c", script, fmt.Sprint(score)); code != 0 {
		b.t.Errorf("%s, want %d", out, score)
	}
}

// TestRES_12_ShrinkBelowUsage: refused, in words, and nothing is killed; what
// the kernel could drop does not count as used.
func TestRES_12_ShrinkBelowUsage(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	const limit, block = 128 << 20, 40 << 20
	c := b.script("app", fmt.Sprintf("head -c %d /dev/zero >/dev/shm/block; head -c %[1]d /dev/zero >/cached; sync /cached; cat /cached >/dev/null; echo ready; exec sleep 1000", block))
	c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: limit}
	id := b.run(c)
	b.logged(id, "ready")
	pid := b.pid(id)
	before := b.status(id)
	wantError(t, b.update(id, &cri.LinuxContainerResources{MemoryLimitInBytes: block / 2, CpuShares: 77}), codes.FailedPrecondition, "memory_limit_in_bytes", fmt.Sprint(block/2))
	if got := b.knob(id, "memory", "memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(limit) {
		t.Errorf("the limit is %s", got)
	}
	now := b.status(id)
	if now.State != cri.ContainerState_CONTAINER_RUNNING || b.pid(id) != pid || now.Resources.Linux.CpuShares != before.Resources.Linux.CpuShares {
		t.Errorf("after a refused update: %v", now)
	}
	if err := b.update(id, &cri.LinuxContainerResources{MemoryLimitInBytes: limit - limit/8}); err != nil {
		t.Errorf("down to what is above the usage: %v", err)
	}
}

// TestRES_17_PidsLimit: a container that forks without end stops at the limit,
// and the node does not notice.
func TestRES_17_PidsLimit(t *testing.T) {
	t.Parallel()
	const limit = 40
	b := newBoxOn(t, start(t, runtimeKey(limit, "pids_limit")))
	id := b.run(b.sleeper("app"))
	if got := b.knob(id, "pids", "pids.max", "pids.max"); got != fmt.Sprint(limit) {
		t.Errorf("pids.max is %s", got)
	}
	// The shell that forks ends when it cannot any more; what it made stays.
	bomb := b.run(b.script("bomb", "sh -c 'while :; do sleep 1000 & done'; echo over; exec sleep 1000"))
	b.logged(bomb, "over")
	eventually(t, ample, func() error {
		if n := readInt(t, cgroupFile(t, b.pid(bomb), "pids", "pids.current")); n < limit-2 || n > limit {
			return fmt.Errorf("%d processes", n)
		}
		return nil
	})
	b.stop(bomb, 0)
	b.Exec(id, "true")
	if err := b.update(id, &cri.LinuxContainerResources{CpuShares: 77}); err != nil {
		t.Fatal(err)
	}
	if got := b.knob(id, "pids", "pids.max", "pids.max"); got != fmt.Sprint(limit) {
		t.Errorf("after an update of something else pids.max is %s", got)
	}
}

// TestRES_33_HugetlbSwitches: what the two switches make of a limit.
func TestRES_33_HugetlbSwitches(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		tolerate, disable bool
		runs              bool
	}{{true, true, true}, {false, true, true}, {true, false, true}, {false, false, hasHugetlb()}} {
		b := newBoxOn(t, start(t, runtimeKey(row.tolerate, "tolerate_missing_hugetlb_controller"), runtimeKey(row.disable, "disable_hugetlb_controller")))
		if !row.runs {
			b.refused(b.limits("app", hugepages()), codes.FailedPrecondition, "hugepage_limits", "controller")
			continue
		}
		id := b.run(b.limits("app", hugepages()))
		if hasHugetlb() && row.disable {
			if got := b.knob(id, "hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"); got == fmt.Sprint(4<<20) {
				t.Error("the limit is set in spite of disable_hugetlb_controller")
			}
		}
	}
}

// cgroupsMade makes a control group in every hierarchy there is, and removes it
// after the test.
func cgroupsMade(t *testing.T, name string) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if !strings.Contains(line, " - cgroup") || len(f) < 5 {
			continue
		}
		dir := filepath.Join(f[4], name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		// One of version 1 takes no process before it has CPUs and memory.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			if text, err := os.ReadFile(filepath.Join(f[4], file)); err == nil {
				if err := os.WriteFile(filepath.Join(dir, file), text, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil && !os.IsNotExist(err) {
				t.Error(err)
			}
		})
	}
}

// TestRES_18_ShimCgroup: the shim of a pod is where the handler's option says,
// and its containers are where the pod says.
func TestRES_18_ShimCgroup(t *testing.T) {
	t.Parallel()
	group := fmt.Sprintf("/gantry-shims-%d", os.Getpid())
	cgroupsMade(t, group)
	b := newBoxOn(t, start(t, runtimeKey(group, "containerd", "runtimes", ownTable(), "options", "ShimCgroup")))
	id := b.run(b.sleeper("app"))
	shim := parentOf(t, b.begun(id))
	for _, controller := range []string{"memory", "cpu", "pids"} {
		if got := cgroupPath(t, shim, controller); got != group {
			t.Errorf("the shim's %s group is %s", controller, got)
		}
		if got := cgroupPath(t, b.pid(id), controller); !strings.HasPrefix(got, b.CgroupParent) {
			t.Errorf("the container's %s group is %s", controller, got)
		}
	}
}

// TestRES_19_SupervisorMemory: what a shim takes is counted neither to the containers
// nor to their pod.
func TestRES_19_SupervisorMemory(t *testing.T) {
	t.Parallel()
	d := shared(t)
	for _, handler := range []string{"", pausing} {
		b := boxWith(t, d, handler, inPodGroup(d, "res19"+handler), func(c *cri.PodSandboxConfig) { c.Metadata.Name += handler })
		id := b.run(b.sleeper("app"))
		pid := b.begun(id)
		shim := shimOf(t, d, pid)
		of, pod := cgroupPath(t, shim, "memory"), b.config.Linux.CgroupParent
		if got := cgroupPath(t, pid, "memory"); !strings.HasPrefix(got, pod+"/") || strings.HasPrefix(of, pod) {
			t.Errorf("the container is in %s, its shim in %s, the pod in %s", got, of, pod)
		}
		takes := uint64(residentOf(t, shim)) << 10
		eventually(t, soon, func() error { // the kernel tells of little memory some seconds later
			whole := podStats(t, d, b.pod).GetLinux()
			if n := len(whole.GetContainers()); n != 1 {
				t.Fatalf("%d containers", n)
			}
			for what, memory := range map[string]*cri.MemoryUsage{"pod": whole.GetMemory(), "container": whole.GetContainers()[0].GetMemory()} {
				if got := memory.GetRssBytes().GetValue(); got == 0 || got >= takes {
					return fmt.Errorf("the %s is said to have %d bytes, its shim has %d", what, got, takes)
				}
			}
			return nil
		})
	}
}

// TestRES_19_Overhead: a shim that is for one pod is counted to that pod, and not to
// its containers, where the pod's class has memory for it; the next shim too.
func TestRES_19_Overhead(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		addHandler(in, c, "apart", daemon.Config{"runtime_type": "io.containerd.gantry-pod.v2", "sandboxer": "shim"})
	}))
	const overhead = 64 << 20
	usage := "memory.current"
	if versionOne("memory") {
		usage = "memory.usage_in_bytes"
	}
	var pods []string
	for _, handler := range []string{"apart", pausing} {
		b := boxWith(t, d, handler, inPodGroup(d, "overhead-"+handler), func(c *cri.PodSandboxConfig) {
			c.Metadata.Name = handler
			c.Linux.Overhead = &cri.LinuxContainerResources{MemoryLimitInBytes: overhead}
		})
		pods = append(pods, b.pod)
		id := b.run(b.sleeper("app"))
		pod := b.config.Linux.CgroupParent
		charged := func() error {
			shim := shimOf(t, d, b.begun(id))
			of := cgroupPath(t, shim, "memory")
			if !strings.HasPrefix(of, pod+"/") || of == cgroupPath(t, b.begun(id), "memory") {
				return fmt.Errorf("the shim is in %s, the pod in %s", of, pod)
			}
			// What it has of its own is charged, what it shares with other shims may not be.
			own := readInt(t, cgroupFile(t, shim, "memory", usage))
			if own < 1<<20 {
				return fmt.Errorf("%d bytes are charged to %s", own, of)
			}
			whole := podStats(t, d, b.pod).GetLinux()
			if got := int64(whole.GetMemory().GetUsageBytes().GetValue()); got < own/2 {
				return fmt.Errorf("the pod is said to have %d bytes, its shim has %d", got, own)
			}
			return nil
		}
		if err := charged(); err != nil {
			t.Errorf("handler %s: %v", handler, err)
		}
		if handler == pausing {
			continue
		}
		kill(t, shimOf(t, d, b.begun(id)))
		eventually(t, soon, func() error {
			shims := supervisors(t, d)
			if len(shims) != 1 || !strings.HasPrefix(cgroupPath(t, shims[0], "memory"), pod+"/") {
				return fmt.Errorf("the next supervisor %v is not in %s", shims, pod)
			}
			return nil
		})
	}
	for _, id := range pods {
		if err := removePod(d, id); err != nil {
			t.Error(err)
		}
	}
	for _, handler := range []string{"apart", pausing} {
		group := filepath.Join(d.PodParent("kubepods", "overhead-"+handler), "gantry-shim-*")
		for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
			left, err := filepath.Glob(filepath.Join(root, group))
			if err != nil || len(left) > 0 {
				t.Errorf("left are %v, %v", left, err)
			}
		}
	}
	noSupervisor(t, d)
	nothingLeft(t, d)
}
