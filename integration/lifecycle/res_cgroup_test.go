package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/cgroups/v3"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// needSystemd skips where systemd does not run the machine. make vm-test runs
// these tests in one where it does.
func needSystemd(t *testing.T) {
	t.Helper()
	if !daemon.Systemd() {
		t.Skip("systemd does not run this machine")
	}
}

func needMode(t *testing.T, mode cgroups.CGMode, name string) {
	t.Helper()
	if cgroups.Mode() != mode {
		t.Skip("this machine has not " + name)
	}
}

// unit is a property of a systemd unit as systemctl shows it.
func unit(t *testing.T, name, property string) string {
	t.Helper()
	return systemctl(t, "show", "--value", "--property", property, name)
}

func systemctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("systemctl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("systemctl %q: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// tree is where the cgroups of a controller are.
func tree(controller string) string {
	if versionOne(controller) {
		return filepath.Join("/sys/fs/cgroup", controller)
	}
	return "/sys/fs/cgroup"
}

// memoryLimit are the files with a cgroup's limit of memory.
func memoryLimit(group string) string {
	if versionOne("memory") {
		return filepath.Join(tree("memory"), group, "memory.limit_in_bytes")
	}
	return filepath.Join(tree("memory"), group, "memory.max")
}

// makePodGroup makes the cgroup of a pod with a limit of memory, as the kubelet
// does before it asks for the pod. What it returns removes it, which fails while
// anything is left inside.
func makePodGroup(t *testing.T, d *daemon.Daemon, parent string, limit int) (remove func() error) {
	t.Helper()
	name := path.Base(parent)
	if d.SystemdCgroup() {
		file := filepath.Join("/run/systemd/system", name)
		must(os.WriteFile(file, fmt.Appendf(nil, "[Slice]\nMemoryMax=%d\n", limit), 0o644))
		systemctl(t, "daemon-reload")
		systemctl(t, "start", name)
		return func() error {
			out, err := exec.Command("systemctl", "stop", name).CombinedOutput()
			if err != nil {
				return fmt.Errorf("stop %s: %w: %s", name, err, out)
			}
			return os.Remove(file)
		}
	}
	for _, root := range hierarchyRoots(t) {
		must(os.MkdirAll(filepath.Join(root, parent), 0o755))
	}
	if !versionOne("memory") {
		handDown(parent)
	}
	must(os.WriteFile(memoryLimit(parent), fmt.Append(nil, limit), 0o644))
	return func() error {
		var errs []error
		for _, root := range hierarchyRoots(t) {
			errs = append(errs, os.Remove(filepath.Join(root, parent)))
		}
		return errors.Join(errs...)
	}
}

// handDown gives a cgroup of version 2 the controllers that its ancestors have to
// let it have.
func handDown(group string) {
	dir := "/sys/fs/cgroup"
	for name := range strings.SplitSeq(strings.Trim(group, "/"), "/") {
		must(os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+cpu +memory +pids"), 0o644))
		dir = filepath.Join(dir, name)
	}
}

// hierarchyRoots are the mount points of the hierarchies in which containers
// have cgroups.
func hierarchyRoots(t *testing.T) []string {
	t.Helper()
	if !versionOne("memory") {
		return []string{"/sys/fs/cgroup"}
	}
	var roots []string
	for _, c := range []string{"memory", "cpu", "pids", "devices", "freezer"} {
		root, err := filepath.EvalSymlinks(tree(c))
		if err == nil && !slices.Contains(roots, root) {
			roots = append(roots, root)
		}
	}
	return roots
}

func underParent(parent string) func(*cri.PodSandboxConfig) {
	return func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent }
}

// inGroup wants the processes of a pod and its container in scopes or cgroups
// right below the pod's.
func inGroup(t *testing.T, d *daemon.Daemon, parent string, ids ...string) {
	t.Helper()
	for _, id := range ids {
		for _, controller := range []string{"memory", "cpu", "pids"} {
			if got, want := cgroupPath(t, pidOf(t, d, id), controller), d.CgroupOf(parent, id); got != want {
				t.Errorf("%s cgroup is %q, want %q", controller, got, want)
			}
		}
	}
}

// driver is the cgroup driver that the kubelet is told to use.
func driver(t *testing.T, d *daemon.Daemon) cri.CgroupDriver {
	t.Helper()
	resp, err := d.Runtime().RuntimeConfig(t.Context(), &cri.RuntimeConfigRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return resp.Linux.GetCgroupDriver()
}

// TestPOD_09_SystemdSlices: pods are put into the slice that the kubelet made,
// however the path to it is written, and its limits hold them.
func TestPOD_09_SystemdSlices(t *testing.T) {
	needSystemd(t)
	d := shared(t)
	const limit = 300 << 20
	parent := d.PodParent("kubepods", "burstable", "pod3f-9d")
	slice := path.Base(parent)
	remove := makePodGroup(t, d, parent, limit)
	for name, written := range map[string]string{"path": parent, "slice": slice} {
		p := runPaused(d, name, underParent(written))
		ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
		inGroup(t, d, parent, p.id, ctr)
		for _, id := range []string{p.id, ctr} {
			scope := "cri-containerd-" + id + ".scope"
			if got := unit(t, scope, "Slice"); got != slice {
				t.Errorf("%s: %s is in slice %q, want %q", name, scope, got, slice)
			}
			if got := unit(t, scope, "ActiveState"); got != "active" {
				t.Errorf("%s: %s is %s", name, scope, got)
			}
		}
		if got := readInt(t, memoryLimit(parent)); got != limit {
			t.Errorf("%s: the slice's limit became %d", name, got)
		}
		if err := removePod(d, p.id); err != nil {
			t.Fatal(err)
		}
	}
	if err := remove(); err != nil {
		t.Error(err)
	}
}

// TestRES_13_Cgroupfs: the daemon makes cgroups itself, also where systemd runs
// the machine.
func TestRES_13_Cgroupfs(t *testing.T) {
	d := start(t, daemon.Cgroupfs())
	if got := driver(t, d); got != cri.CgroupDriver_CGROUPFS {
		t.Errorf("the kubelet is told to use %s", got)
	}
	parent := d.PodParent("kubepods", "besteffort", "pod-13")
	remove := makePodGroup(t, d, parent, 300<<20)
	p := runPaused(d, "by-hand", underParent(parent))
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	inGroup(t, d, parent, p.id, ctr)
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	if err := remove(); err != nil {
		t.Error(err)
	}
}

// TestRES_13_Systemd: processes are in transient scopes that systemd made, and
// which go with them.
func TestRES_13_Systemd(t *testing.T) {
	needSystemd(t)
	d := shared(t)
	if got := driver(t, d); got != cri.CgroupDriver_SYSTEMD {
		t.Errorf("the kubelet is told to use %s", got)
	}
	for name, parent := range map[string]string{
		"nested": d.PodParent("kubepods", "pod-13"), "own": d.CgroupParent, "plain-path": strings.TrimSuffix(d.CgroupParent, ".slice") + "/kubepods/pod13b",
	} {
		p := runPaused(d, name, underParent(parent))
		ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
		if name == "plain-path" {
			parent = d.PodParent("kubepods", "pod13b")
		}
		inGroup(t, d, parent, p.id, ctr)
		scope := "cri-containerd-" + ctr + ".scope"
		if got := unit(t, scope, "Transient") + unit(t, scope, "LoadState"); got != "yesloaded" {
			t.Errorf("%s: the scope is %q", name, got)
		}
		stopContainer(d, ctr, 0)
		eventually(t, soon, func() error {
			if got := unit(t, scope, "LoadState"); got != "not-found" {
				return fmt.Errorf("%s: after the end the scope is %s, %s", name, got, unit(t, scope, "ActiveState"))
			}
			return nil
		})
	}
}

// fullFunction tries on one kind of hierarchy what containers need of it.
func fullFunction(t *testing.T) {
	b := newBox(t)
	const limit = 48 << 20
	id := b.run(b.limits("limited", &cri.LinuxContainerResources{MemoryLimitInBytes: limit, CpuPeriod: 100000, CpuQuota: 40000, CpuShares: 512, CpusetCpus: "0"}))
	if got := b.knob(id, "memory", "memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(limit) {
		t.Errorf("memory limit is %s", got)
	}
	if got := b.knob(id, "cpu", "cpu.cfs_quota_us", "cpu.max"); !strings.HasPrefix(got, "40000") {
		t.Errorf("CPU limit is %s", got)
	}
	if got := b.knob(id, "cpuset", "cpuset.cpus", "cpuset.cpus"); got != "0" {
		t.Errorf("CPUs are %s", got)
	}
	if err := b.update(id, &cri.LinuxContainerResources{MemoryLimitInBytes: 2 * limit, CpuQuota: 60000}); err != nil {
		t.Error(err)
	}
	got := b.knob(id, "memory", "memory.limit_in_bytes", "memory.max") + " " + b.knob(id, "cpu", "cpu.cfs_quota_us", "cpu.max")
	if want := fmt.Sprint(2*limit, " 60000"); !strings.HasPrefix(got, want) {
		t.Errorf("updated limits are %s, want %s", got, want)
	}
	s := b.stats(id)
	if s.Cpu.GetUsageCoreNanoSeconds().GetValue() == 0 || s.Memory.GetWorkingSetBytes().GetValue() == 0 || s.Memory.GetAvailableBytes().GetValue() == 0 {
		t.Errorf("statistics are %v", s)
	}
	if p, err := b.Runtime().PodSandboxStats(t.Context(), &cri.PodSandboxStatsRequest{PodSandboxId: b.pod}); err != nil {
		t.Error(err)
	} else if l := p.Stats.Linux; l.Cpu.GetUsageCoreNanoSeconds().GetValue() == 0 || l.Memory.GetUsageBytes().GetValue() == 0 || l.Process.GetProcessCount().GetValue() < 2 {
		t.Errorf("statistics of the pod are %v", l)
	}
	// Devices are kept away by the same means.
	if out, code := tryExec(t, b.Daemon, id, "sh", "-c", "mknod /tmp/mem c 1 1 && cat /tmp/mem"); code == 0 || !strings.Contains(out, "not permitted") {
		t.Errorf("a device that is not allowed: %q, %d", out, code)
	}
	// Processes that left the session and ignore signals end with the rest.
	wild := b.run(b.script("wild", "trap '' TERM; for i in 1 2 3; do setsid sh -c \"trap '' TERM; touch /tmp/$i; while :; do sleep 1; done\" & done; while :; do sleep 1; done"))
	for i := 1; i <= 3; i++ {
		waitFile(t, b.Daemon, wild, fmt.Sprint("/tmp/", i))
	}
	group := filepath.Dir(cgroupFile(t, b.pid(wild), "memory", "x"))
	b.stop(wild, 0)
	if procs, err := os.ReadFile(filepath.Join(group, "cgroup.procs")); len(procs) > 0 {
		t.Errorf("after the stop there are processes %q, %v", procs, err)
	}
	oom := b.script("oom", "(tail /dev/zero); exit 7")
	oom.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: limit}
	if s := b.exited(b.run(oom)); s.Reason != "OOMKilled" {
		t.Errorf("beyond its memory it ended as %s, %d", s.Reason, s.ExitCode)
	}
}

func TestRES_14_V1(t *testing.T) {
	needMode(t, cgroups.Legacy, "version 1 hierarchies alone")
	fullFunction(t)
}

func TestRES_14_Hybrid(t *testing.T) {
	needMode(t, cgroups.Hybrid, "version 1 hierarchies with version 2 beside them")
	fullFunction(t)
}

func TestRES_14_V2(t *testing.T) {
	needMode(t, cgroups.Unified, "version 2 alone")
	fullFunction(t)
}

// TestRES_09_Unified: raw files of version 2, set at creation and later.
func TestRES_09_Unified(t *testing.T) {
	t.Parallel()
	needMode(t, cgroups.Unified, "version 2 alone")
	b := newBox(t)
	id := b.run(b.limits("app", &cri.LinuxContainerResources{
		MemoryLimitInBytes: 64 << 20, Unified: map[string]string{"memory.high": fmt.Sprint(48 << 20), "memory.min": "0", "pids.max": "77"},
	}))
	want := func(file, value string) {
		t.Helper()
		if got := b.knob(id, "memory", file, file); got != value {
			t.Errorf("%s is %s, want %s", file, got, value)
		}
	}
	want("memory.high", fmt.Sprint(48<<20))
	want("memory.max", fmt.Sprint(64<<20))
	want("pids.max", "77")
	if err := b.update(id, &cri.LinuxContainerResources{Unified: map[string]string{"memory.high": fmt.Sprint(32 << 20)}}); err != nil {
		t.Fatal(err)
	}
	want("memory.high", fmt.Sprint(32<<20))
	want("memory.max", fmt.Sprint(64<<20))
	want("pids.max", "77")
	if got := b.status(id).Resources.GetLinux().GetUnified()["memory.high"]; got != fmt.Sprint(32<<20) {
		t.Errorf("the status has a memory.high of %q", got)
	}
}

// TestRES_15_CgroupNamespace: on version 2 a container sees its own cgroup as
// the root; one that may manage the machine sees the machine's.
func TestRES_15_CgroupNamespace(t *testing.T) {
	t.Parallel()
	needMode(t, cgroups.Unified, "version 2 alone")
	b := newBox(t, privileged)
	normal, full := b.run(b.limits("normal", &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20})), b.run(b.privilegedSleeper("privileged"))
	const groups = "cat /proc/1/cgroup /proc/self/cgroup"
	if got := sh(b.Daemon, normal, groups); got != "0::/\n0::/" {
		t.Errorf("a container sees %q", got)
	}
	if got := sh(b.Daemon, normal, "cat /sys/fs/cgroup/memory.max"); got != fmt.Sprint(64<<20) {
		t.Errorf("the root of its tree has a limit of %s", got)
	}
	if got, want := sh(b.Daemon, full, "cat /proc/1/cgroup"), "0::"+b.CgroupOf(b.CgroupParent, full); got != want {
		t.Errorf("a privileged one sees %q, want %q", got, want)
	}
	if got := sh(b.Daemon, full, "ls -d /sys/fs/cgroup"+b.CgroupParent); got != "/sys/fs/cgroup"+b.CgroupParent {
		t.Errorf("a privileged one finds %q", got)
	}
	host := nsOf(t, "self", "cgroup")
	own := []string{normal}
	if defaultHandler == pausing {
		own = append(own, b.pod)
	}
	for _, id := range own {
		if got := nsOf(t, b.pid(id), "cgroup"); got == host {
			t.Errorf("%s is in the machine's cgroup namespace", id)
		}
	}
	if got := nsOf(t, b.pid(full), "cgroup"); got != host {
		t.Errorf("the privileged container is in %s, the machine in %s", got, host)
	}
}

// TestRES_20_ExecInCgroup: a command is held by the container's limits, also
// when the container has made cgroups of its own.
func TestRES_20_ExecInCgroup(t *testing.T) {
	t.Parallel()
	b := newBox(t, privileged)
	const limit = 40 << 20
	id := b.run(b.limits("app", &cri.LinuxContainerResources{MemoryLimitInBytes: limit}))
	if out, code := tryExec(t, b.Daemon, id, "sh", "-c", "tail /dev/zero"); code != 137 {
		t.Errorf("beyond the limit: exit %d, %s", code, out)
	}
	if s := b.status(id); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after a command went beyond the limit the container is %s", s.State)
	}
	c := b.privilegedSleeper("nested")
	c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: limit}
	nested := b.run(c)
	group := filepath.Dir(cgroupFile(t, b.pid(nested), "memory", "x"))
	moveInside(t, group)
	commandIn(t, b, nested, group)
	if out, code := tryExec(t, b.Daemon, nested, "sh", "-c", "tail /dev/zero"); code != 137 {
		t.Errorf("nested, beyond the limit: exit %d, %s", code, out)
	}
}

// moveInside does what an init system in a container does: it moves into a
// cgroup of its own and hands the controllers down.
func moveInside(t *testing.T, group string) {
	t.Helper()
	inner := filepath.Join(group, "init.scope")
	must(os.Mkdir(inner, 0o755))
	procs, err := os.ReadFile(filepath.Join(group, "cgroup.procs"))
	must(err)
	for p := range strings.FieldsSeq(string(procs)) {
		must(os.WriteFile(filepath.Join(inner, "cgroup.procs"), []byte(p), 0o644))
	}
	if !versionOne("memory") {
		must(os.WriteFile(filepath.Join(group, "cgroup.subtree_control"), []byte("+memory +pids"), 0o644))
	}
}

// commandIn wants a command of the container in its cgroup or beneath it.
func commandIn(t *testing.T, b *box, id, group string) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = b.Runtime().ExecSync(context.Background(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sleep", "7777"}, Timeout: 60})
	}()
	var pid int
	eventually(t, soon, func() (err error) {
		pid, err = processOf("sleep\x007777\x00")
		return err
	})
	if got := filepath.Dir(cgroupFile(t, pid, "memory", "x")); got != group && !strings.HasPrefix(got, group+"/") {
		t.Errorf("a command is in %s, the container in %s", got, group)
	}
	kill(t, pid)
	<-done
}

// processOf finds a process by its command line.
func processOf(cmdline string) (int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		if text, _ := os.ReadFile(f); string(text) == cmdline {
			var pid int
			_, err := fmt.Sscanf(f, "/proc/%d/", &pid)
			return pid, err
		}
	}
	return 0, fmt.Errorf("no process %q: %w", cmdline, fs.ErrNotExist)
}

// TestRES_30_ScopeProperties: a scope is delegated to what runs in it, and has
// the properties that annotations ask for where the handler lets them through.
func TestRES_30_ScopeProperties(t *testing.T) {
	needSystemd(t)
	const timeout, collect = "org.systemd.property.TimeoutStopUSec", "org.systemd.property.CollectMode"
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		passed := []string{"org.systemd.property.*"}
		addHandler(in, c, "units", daemon.Config{"pod_annotations": passed, "container_annotations": passed})
	}))
	for handler, want := range map[string]string{"": "1min 30s inactive", "units": "2min 3s inactive-or-failed"} {
		config := d.PodConfig("unit" + handler)
		config.Annotations = map[string]string{timeout: "uint64 123000000"}
		p := pod{d.RunPodWith(config, handler), config}
		c := daemon.ContainerConfig("main", plain(t, d))
		c.Annotations = map[string]string{timeout: "uint64 123000000", collect: "'inactive-or-failed'"}
		scope := "cri-containerd-" + p.run(d, c) + ".scope"
		if got := unit(t, scope, "TimeoutStopUSec") + " " + unit(t, scope, "CollectMode"); got != want {
			t.Errorf("handler %q: the scope has %q, want %q", handler, got, want)
		}
		if got := unit(t, scope, "Delegate"); got != "yes" {
			t.Errorf("handler %q: delegated: %s", handler, got)
		}
	}
}

// namedAfter finds the ID in a cgroup's name as cAdvisor does.
var namedAfter = regexp.MustCompile(`(?:^cri-containerd-|^)([a-z0-9]{64})(?:\.scope)?$`)

// TestRES_31_CgroupNames: every cgroup in a pod's is found by the ID in its
// name, before and after a restart.
func TestRES_31_CgroupNames(t *testing.T) {
	d := shared(t)
	parent := d.PodParent("kubepods", "pod-31")
	p := runPaused(d, "found", underParent(parent))
	want := map[string]string{p.id: "", p.run(d, daemon.ContainerConfig("a", plain(t, d))): "a", p.run(d, daemon.ContainerConfig("b", plain(t, d))): "b"}
	for range 2 {
		entries, err := os.ReadDir(filepath.Join(tree("memory"), parent))
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]string{}
		for _, e := range entries {
			m := namedAfter.FindStringSubmatch(e.Name())
			if !e.IsDir() || m == nil {
				continue
			}
			if systemd := strings.HasPrefix(e.Name(), "cri-containerd-"); systemd != d.SystemdCgroup() {
				t.Errorf("a cgroup is called %s", e.Name())
			}
			c, err := d.Client().LoadContainer(namespaced(t.Context()), m[1])
			if err != nil {
				t.Errorf("%s: %v", e.Name(), err)
				continue
			}
			labels, err := c.Labels(namespaced(t.Context()))
			if err != nil || labels["io.kubernetes.pod.name"] != "found" && labels["io.kubernetes.container.name"] == "" {
				t.Errorf("%s has labels %v, %v", e.Name(), labels, err)
			}
			found[m[1]] = labels["io.kubernetes.container.name"]
		}
		if fmt.Sprint(found) != fmt.Sprint(want) {
			t.Errorf("found are %v, want %v", found, want)
		}
		d.Restart()
	}
}

// TestRES_32_CgroupCleanup: nothing is left of many pods, of which some ended
// while the daemon was dead, and the kubelet can remove what it made for them.
func TestRES_32_CgroupCleanup(t *testing.T) {
	t.Parallel()
	d := start(t)
	plain(t, d)
	if err := removePod(d, runPaused(d, "first").id); err != nil { // the first makes the daemon's own groups
		t.Fatal(err)
	}
	before := groupTree(t, d)
	const pods = 24
	var removes [pods]func() error
	var made [pods]pod
	var wg sync.WaitGroup
	for i := range pods {
		parent := d.PodParent(fmt.Sprint("pod32x", i))
		removes[i] = makePodGroup(t, d, parent, 200<<20)
		wg.Go(func() {
			made[i] = runPaused(d, fmt.Sprint("many", i), underParent(parent), hostNetwork)
			made[i].run(d, onHost(daemon.ContainerConfig("main", plain(t, d))))
		})
	}
	wg.Wait()
	for i := range pods / 3 {
		if err := removePod(d, made[i].id); err != nil {
			t.Error(err)
		}
	}
	orphaned := pidOf(t, d, made[pods-1].id)
	d.Kill()
	kill(t, orphaned)
	waitGone(t, orphaned)
	d.Up()
	for _, p := range made {
		if err := removePod(d, p.id); err != nil {
			t.Error(err)
		}
	}
	for _, remove := range removes {
		if err := remove(); err != nil {
			t.Errorf("the kubelet cannot remove the pod's cgroup: %v", err)
		}
	}
	if after := groupTree(t, d); !slices.Equal(before, after) {
		t.Errorf("cgroups were\n%s\nand are\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
	}
	if daemon.Systemd() {
		if got := systemctl(t, "list-units", "--all", "--plain", "--no-legend", "cri-containerd-*", "*pod32x*"); got != "" {
			t.Errorf("units are left:\n%s", got)
		}
	}
}

// groupTree lists the cgroups below the daemon's own in every hierarchy.
func groupTree(t *testing.T, d *daemon.Daemon) []string {
	t.Helper()
	var dirs []string
	for _, root := range hierarchyRoots(t) {
		err := filepath.WalkDir(filepath.Join(root, d.CgroupParent), func(p string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && e.IsDir() {
				dirs = append(dirs, p)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return dirs
}

// TestMNT_23_CgroupWritableThere: a handler lets an unprivileged container manage
// the cgroups below its own, and see no others.
func TestMNT_23_CgroupWritableThere(t *testing.T) {
	needMode(t, cgroups.Unified, "version 2 alone")
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		addHandler(in, c, "managing", daemon.Config{"cgroup_writable": true})
	}))
	const manage = "cd /sys/fs/cgroup && mkdir mine && echo 0 >mine/cgroup.procs && cat /proc/self/cgroup"
	for handler, want := range map[string]string{"": "", "managing": "0::/mine"} {
		config := d.PodConfig("managed" + handler)
		p := pod{d.RunPodWith(config, handler), config}
		ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
		out, code := tryExec(t, d, ctr, "sh", "-c", manage)
		if got := strings.TrimSpace(out); want != "" && (code != 0 || got != want) || want == "" && code == 0 {
			t.Errorf("handler %q: ended with %d: %q", handler, code, got)
		}
		if err := removePod(d, p.id); err != nil {
			t.Fatal(err)
		}
	}
}
