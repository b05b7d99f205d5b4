package lifecycle

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// nriSet sets a key of the NRI table.
func nriSet(value any, path ...string) daemon.Option {
	return daemon.Set(value, append([]string{"plugins", nriTable}, path...)...)
}

// TestDEV_11_NRIRegistration: plugins that the daemon starts and one that
// connects are asked in the order of their numbers, and each begins with the
// pods and containers there are.
func TestDEV_11_NRIRegistration(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "plugins")
	config := `{"file": "` + file + `"}`
	d := start(t, daemon.Edit(func(in *daemon.Instance, _ daemon.Config) {
		install(t, in, "30-late"+nriProgram, config)
		install(t, in, "10-early"+nriProgram, config)
	}), daemon.Expect("30-late"+nriProgram, "10-early"+nriProgram))
	b := newBoxOn(t, d)
	running, created, gone := b.run(b.sleeper("running")), b.mustCreate(b.sleeper("created")), b.run(b.sleeper("gone"))
	b.stop(gone, 0)
	stopped := runPod(d, "stopped")
	if err := stopPod(d, stopped.id); err != nil {
		t.Fatal(err)
	}
	p := &nriPlugin{t: t, name: "20-middle"}
	p.on = func(event string, _ *api.PodSandbox, ctr *api.Container) error {
		if event == "CreateContainer" {
			return appendLine(file, p.name+" create "+ctr.GetName())
		}
		return nil
	}
	p.connect(d)
	var pods, ctrs []string
	for _, pod := range p.pods {
		pods = append(pods, pod.Id)
	}
	for _, c := range p.ctrs {
		ctrs = append(ctrs, c.Id+" "+c.State.String())
	}
	slices.Sort(pods)
	slices.Sort(ctrs)
	wantPods := []string{b.pod, stopped.id}
	wantCtrs := []string{running + " CONTAINER_RUNNING", created + " CONTAINER_CREATED"}
	slices.Sort(wantPods)
	slices.Sort(wantCtrs)
	if !slices.Equal(pods, wantPods) || !slices.Equal(ctrs, wantCtrs) {
		t.Errorf("introduced with pods %q, containers %q, want %q, %q", pods, ctrs, wantPods, wantCtrs)
	}
	id := b.run(b.sleeper("seen"))
	if got := sh(d, id, "env | grep -c SEEN_BY"); got != "2" {
		t.Errorf("plugins of the daemon that had their say: %s", got)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for line := range strings.Lines(string(text)) {
		if name, ok := strings.CutSuffix(strings.TrimSpace(line), " create seen"); ok {
			order = append(order, name)
		}
	}
	if got := strings.Join(order, " "); got != "10-early"+nriProgram+" 20-middle 30-late"+nriProgram {
		t.Errorf("asked in the order %q", got)
	}
	if !strings.Contains(string(text), "configured by containerd") || !strings.Contains(string(text), "synchronised with 0 pods, 0 containers") {
		t.Errorf("the plugins wrote %q", text)
	}
	// After a restart the daemon starts them anew, with what there is.
	d.Restart()
	text, err = os.ReadFile(file)
	if err != nil || strings.Count(string(text), "synchronised with 2 pods, 3 containers") != 2 {
		t.Errorf("after a restart: %q, %v", text, err)
	}
}

func appendLine(file, line string) error {
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, line)
	return errors.Join(err, f.Close())
}

// TestDEV_12_NRIPodEvents: what happens to a pod, once, in order, and with what
// a plugin needs to know of it.
func TestDEV_12_NRIPodEvents(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(withPinned))
	var seen *api.PodSandbox
	p := &nriPlugin{t: t, name: "10-recorder"}
	p.on = func(event string, pod *api.PodSandbox, _ *api.Container) error {
		switch {
		case event == "RunPodSandbox" && pod.GetName() == "refused":
			return errors.New("there is no room")
		case event == "RunPodSandbox" && strings.HasPrefix(pod.GetName(), "dev12"):
			seen = pod
		}
		return nil
	}
	p.connect(d)
	config := d.PodConfig("dev12")
	config.Labels, config.Annotations = map[string]string{"l": "1"}, map[string]string{"a": "2"}
	id := d.RunPodWith(config, pausing)
	if _, err := d.Runtime().UpdatePodSandboxResources(t.Context(), &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: id}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := errors.Join(stopPod(d, id), stopPod(d, id), removePod(d, id)); err != nil {
			t.Fatal(err)
		}
	}
	p.heard([]string{"RunPodSandbox dev12", "UpdatePodSandbox dev12", "PostUpdatePodSandbox dev12", "StopPodSandbox dev12", "RemovePodSandbox dev12"}, "dev12")
	if seen.GetId() != id || seen.GetUid() != config.Metadata.Uid || seen.GetNamespace() != config.Metadata.Namespace || seen.GetLabels()["l"] != "1" ||
		seen.GetAnnotations()["a"] != "2" || len(seen.GetIps()) == 0 || seen.GetPid() == 0 || len(seen.GetLinux().GetNamespaces()) == 0 || seen.GetRuntimeHandler() == "" {
		t.Errorf("the pod is told as %v", seen)
	}
	// One without a process has its network at least.
	pinned := d.RunPodWith(d.PodConfig("dev12-pinned"), "pinned")
	if ns := seen.GetLinux().GetNamespaces(); seen.GetId() != pinned || len(ns) != 1 || ns[0].GetType() != "network" || ns[0].GetPath() != pinOf(t, d, pinned) {
		t.Errorf("the pod without a process is told as %v", seen)
	}
	if err := removePod(d, pinned); err != nil {
		t.Fatal(err)
	}
	_, err := d.Runtime().RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: d.PodConfig("refused")})
	wantError(t, err, codes.FailedPrecondition, "there is no room", "RunPodSandbox", "10-recorder")
	if list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{}); err != nil || len(list.Items) > 0 {
		t.Errorf("after a refused pod there are %v, %v", list.GetItems(), err)
	}
	p.heard([]string{"RunPodSandbox refused", "StopPodSandbox refused", "RemovePodSandbox refused"}, "refused")
}

// TestDEV_13_NRIContainerEvents: the same for containers: one that is stopped,
// one that ends by itself, one that was never started, and refusals.
func TestDEV_13_NRIContainerEvents(t *testing.T) {
	t.Parallel()
	d := start(t)
	p := &nriPlugin{t: t, name: "10-recorder"}
	p.on = func(event string, _ *api.PodSandbox, ctr *api.Container) error {
		if event+" "+ctr.GetName() == "StartContainer not-started" || event+" "+ctr.GetName() == "CreateContainer not-created" {
			return errors.New("not this one")
		}
		return nil
	}
	p.connect(d)
	b := newBoxOn(t, d)
	id := b.run(b.sleeper("stopped"))
	if _, err := d.Runtime().UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{
		ContainerId: id, Linux: &cri.LinuxContainerResources{CpuShares: 300},
	}); err != nil {
		t.Fatal(err)
	}
	b.stop(id, 0)
	b.stop(id, 0)
	b.remove(id)
	b.remove(id)
	whole := func(name string) (list []string) {
		for _, e := range []string{"CreateContainer", "PostCreateContainer", "StartContainer", "PostStartContainer", "UpdateContainer", "PostUpdateContainer", "StopContainer", "RemoveContainer"} {
			list = append(list, e+" "+name)
		}
		return list
	}
	p.heard(whole("stopped"), "stopped")
	ended := b.run(b.script("ended", "exit 3"))
	b.exited(ended)
	p.heard([]string{"CreateContainer ended", "PostCreateContainer ended", "StartContainer ended", "PostStartContainer ended", "StopContainer ended"}, "ended")
	never := b.mustCreate(b.sleeper("never"))
	b.remove(never)
	p.heard([]string{"CreateContainer never", "PostCreateContainer never", "StopContainer never", "RemoveContainer never"}, "never")

	c := b.sleeper("not-created")
	_, err := b.create(c)
	wantError(t, err, codes.FailedPrecondition, "not this one", "CreateContainer", "10-recorder")
	p.heard([]string{"CreateContainer not-created", "StopContainer not-created", "RemoveContainer not-created"}, "not-created")
	id = b.mustCreate(b.sleeper("not-started"))
	wantError(t, b.start(id), codes.FailedPrecondition, "not this one", "StartContainer", "10-recorder")
	if s := b.status(id); s.State != cri.ContainerState_CONTAINER_EXITED || s.Reason != "StartError" {
		t.Errorf("status is %v", s)
	}
	// The rest goes with the pod.
	if err := removePod(d, b.pod); err != nil {
		t.Fatal(err)
	}
	p.heard([]string{"CreateContainer ended", "PostCreateContainer ended", "StartContainer ended", "PostStartContainer ended", "StopContainer ended", "RemoveContainer ended"}, "ended")
	p.heard([]string{"CreateContainer not-started", "PostCreateContainer not-started", "StartContainer not-started", "StopContainer not-started", "RemoveContainer not-started"}, "not-started")
}

// TestDEV_14_NRIAdjustments: everything that a plugin may change of a container
// is changed, in the container and in its record.
func TestDEV_14_NRIAdjustments(t *testing.T) {
	t.Parallel()
	d := start(t)
	dir := t.TempDir()
	script, marker := hookScript(t)
	placeFile(t, dir, "file", "mounted by a plugin")
	describe(t, cdiDir(d), "dev14.json", envDevices("dev14.test/card", map[string]string{"cdi_env": "yes"}))
	p := &nriPlugin{t: t, name: "10-adjuster"}
	p.adjust = func(_ *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
		a := &api.ContainerAdjustment{}
		if ctr.GetName() != "adjusted" {
			return nil, nil
		}
		a.AddAnnotation("from.plugin", "yes")
		a.AddMount(&api.Mount{Source: dir, Destination: "/plugin", Type: "bind", Options: []string{"bind", "ro"}})
		a.AddEnv("ADDED", "1")
		a.AddEnv("REPLACED", "new")
		a.RemoveEnv("REMOVED")
		a.SetArgs([]string{"sleep", "999999"})
		a.AddHooks(&api.Hooks{CreateRuntime: []*api.Hook{{Path: script, Args: []string{"hook", "by-plugin"}}}})
		a.AddDevice(&api.LinuxDevice{Path: "/dev/plugged", Type: "c", Major: 10, Minor: 229, FileMode: api.FileMode(os.FileMode(0o666))})
		a.AddCDIDevice(&api.CDIDevice{Name: "dev14.test/card=cdi_env"})
		a.AddRlimit("RLIMIT_NOFILE", 777, 555)
		a.SetLinuxMemoryLimit(64 << 20)
		a.SetLinuxCPUShares(345)
		a.SetLinuxCPUSetCPUs("0")
		a.SetLinuxPidLimits(99)
		a.SetLinuxOomScoreAdj(new(777))
		a.SetLinuxCgroupsPath(ctr.GetLinux().GetCgroupsPath() + "-plugged")
		return a, nil
	}
	p.connect(d)
	b := newBoxOn(t, d)
	c := b.sleeper("adjusted")
	c.Envs = []*cri.KeyValue{{Key: "REPLACED", Value: []byte("old")}, {Key: "REMOVED", Value: []byte("x")}, {Key: "KEPT", Value: []byte("k")}}
	id := b.run(c)
	pid := b.begun(id)
	got := sh(d, id, `echo $ADDED $REPLACED ${REMOVED-none} $KEPT $CDI_ENV; cat /plugin/file; echo; tr '\0' ' ' </proc/1/cmdline; echo
		awk '/open files/ {print $4, $5}' /proc/1/limits; cat /proc/1/oom_score_adj; : <>/dev/plugged && echo opened; touch /plugin/x 2>/dev/null || echo readonly`)
	want := "1 new none k yes\nmounted by a plugin\nsleep 999999 \n555 777\n777\nopened\nreadonly"
	if got != want {
		t.Errorf("inside is %q, want %q", got, want)
	}
	for file, want := range map[[2]string]int64{{"memory", "memory.limit_in_bytes"}: 64 << 20, {"cpu", "cpu.shares"}: 345, {"pids", "pids.max"}: 99} {
		if got := readInt(t, cgroupFile(t, pid, file[0], file[1])); got != want {
			t.Errorf("%s is %d, want %d", file[1], got, want)
		}
	}
	if path := cgroupPath(t, pid, "pids"); !strings.HasSuffix(path, "-plugged") {
		t.Errorf("the cgroup is %s", path)
	}
	if s := specOf(t, d, id); s.Annotations["from.plugin"] != "yes" || s.Annotations["io.kubernetes.cri.container-type"] != "container" {
		t.Errorf("annotations are %v", s.Annotations)
	}
	if text, err := os.ReadFile(marker); err != nil || !strings.Contains(string(text), "args by-plugin") || strings.Contains(string(text), "env ADDED") {
		t.Errorf("the hook wrote %q, %v", text, err)
	}
	// What another plugin has set is no longer free.
	second := &nriPlugin{t: t, name: "20-second", adjust: func(*api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
		a := &api.ContainerAdjustment{}
		a.AddEnv("ADDED", "2")
		return a, nil
	}}
	second.connect(d)
	c = b.sleeper("adjusted")
	c.Metadata.Attempt = 1
	_, err := b.create(c)
	wantError(t, err, codes.FailedPrecondition, "10-adjuster", "20-second")
}

// TestDEV_15_NRINewerAdjustments: what newer plugins may change reaches the
// specification; what cannot be done is refused by name.
func TestDEV_15_NRINewerAdjustments(t *testing.T) {
	t.Parallel()
	d := start(t)
	adjust := map[string]func(*api.ContainerAdjustment){
		"seccomp": func(a *api.ContainerAdjustment) {
			a.SetLinuxSeccompPolicy(&api.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: []*api.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: "SCMP_ACT_ERRNO"}}})
		},
		"sysctl": func(a *api.ContainerAdjustment) { a.SetLinuxSysctl("net.ipv4.ip_default_ttl", "77") },
		"priority": func(a *api.ContainerAdjustment) {
			a.SetLinuxIOPriority(&api.LinuxIOPriority{Class: api.IOPrioClass_IOPRIO_CLASS_IDLE})
		},
		"scheduler": func(a *api.ContainerAdjustment) {
			a.SetLinuxScheduler(&api.LinuxScheduler{Policy: api.LinuxSchedulerPolicy_SCHED_BATCH})
		},
		"namespace": func(a *api.ContainerAdjustment) { a.AddOrReplaceNamespace(&api.LinuxNamespace{Type: "uts"}) },
		"block-io":  func(a *api.ContainerAdjustment) { a.SetLinuxBlockIOClass("fast") },
		"rdt":       func(a *api.ContainerAdjustment) { a.SetLinuxRDTClass("gold") },
	}
	p := &nriPlugin{t: t, name: "10-adjuster"}
	p.adjust = func(_ *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
		a := &api.ContainerAdjustment{}
		if f := adjust[ctr.GetName()]; f != nil {
			f(a)
		}
		return a, nil
	}
	p.connect(d)
	b := pausedBox(t, d)
	run := func(name string) string { return b.run(b.sleeper(name)) }
	if got := sh(d, run("seccomp"), "mkdir /made 2>/dev/null || echo refused"); got != "refused" {
		t.Errorf("seccomp: %q", got)
	}
	if got := sh(d, run("sysctl"), "cat /proc/sys/net/ipv4/ip_default_ttl"); got != "77" {
		t.Errorf("sysctl: %q", got)
	}
	if s := specOf(t, d, run("priority")); s.Process.IOPriority == nil || s.Process.IOPriority.Class != "IOPRIO_CLASS_IDLE" {
		t.Errorf("priority: %+v", s.Process.IOPriority)
	}
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", b.begun(run("scheduler")))); err != nil || strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')'):]))[39] != "3" {
		t.Errorf("scheduler: %s, %v", stat, err)
	}
	if ns := nsOf(t, b.pid(run("namespace")), "uts"); ns == nsOf(t, pidOf(t, d, b.pod), "uts") {
		t.Errorf("namespace: still the pod's")
	}
	b.refused(b.sleeper("block-io"), codes.FailedPrecondition, "fast")
	id := b.mustCreate(b.sleeper("rdt"))
	if s := specOf(t, d, id); s.Linux.IntelRdt == nil || s.Linux.IntelRdt.ClosID != "gold" {
		t.Errorf("RDT: %+v", s.Linux.IntelRdt)
	}
}

// TestDEV_16_NRIUpdates: a plugin changes a container when it likes, when it is
// introduced, in answer to an update, and when another one is made or ends; and
// it evicts one.
func TestDEV_16_NRIUpdates(t *testing.T) {
	t.Parallel()
	d := start(t)
	b := newBoxOn(t, d)
	id := b.run(b.sleeper("changed"))
	cpuset := cgroupFile(t, b.pid(id), "cpuset", "cpuset.cpus")
	shares := cgroupFile(t, b.pid(id), "cpu", "cpu.shares")
	want := func(file, value string) {
		t.Helper()
		eventually(t, ample, func() error {
			got, err := os.ReadFile(file)
			if err == nil && strings.TrimSpace(string(got)) != value {
				err = fmt.Errorf("%s is %q, want %q", filepath.Base(file), got, value)
			}
			return err
		})
	}
	share := func(n uint64) *api.ContainerUpdate {
		u := &api.ContainerUpdate{ContainerId: id}
		u.SetLinuxCPUShares(n)
		return u
	}
	var evict []*api.ContainerEviction
	p := &nriPlugin{t: t, name: "10-changer"}
	p.sync = func([]*api.PodSandbox, []*api.Container) []*api.ContainerUpdate {
		return []*api.ContainerUpdate{cpus(id, "0")}
	}
	p.adjust = func(*api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
		return nil, []*api.ContainerUpdate{share(400)}
	}
	p.stop = func(ctr *api.Container) []*api.ContainerUpdate {
		if ctr.GetName() != "second" {
			return nil
		}
		return []*api.ContainerUpdate{share(500)}
	}
	p.update = func(ctr *api.Container, r *api.LinuxResources) []*api.ContainerUpdate {
		u := share(r.GetCpu().GetShares().GetValue() + 1)
		u.ContainerId = ctr.GetId()
		return []*api.ContainerUpdate{u}
	}
	p.connect(d, evicting(&evict))
	want(cpuset, "0")
	if failed, err := p.stub.UpdateContainers(nil); err != nil || len(failed) > 0 {
		t.Fatalf("an empty update: %v, %v", failed, err)
	}
	second := b.run(b.sleeper("second")) // its creation changes the first
	want(shares, "400")
	b.stop(second, 0)
	want(shares, "500")
	if _, err := d.Runtime().UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{
		ContainerId: id, Linux: &cri.LinuxContainerResources{CpuShares: 600},
	}); err != nil {
		t.Fatal(err)
	}
	want(shares, "601")
	if got := b.status(id).GetResources().GetLinux().GetCpuShares(); got != 601 {
		t.Errorf("the status has %d shares", got)
	}
	evict = []*api.ContainerEviction{{ContainerId: id, Reason: "test"}}
	if _, err := p.stub.UpdateContainers(nil); err != nil {
		t.Fatal(err)
	}
	if s := b.exited(id); s.ExitCode != 137 {
		t.Errorf("an evicted container has exit code %d", s.ExitCode)
	}
}

// TestDEV_16_NRIUnsolicited: a plugin hears which of the changes it asked for
// could not be made; the others are, and are kept.
func TestDEV_16_NRIUnsolicited(t *testing.T) {
	t.Parallel()
	d := start(t)
	b := newBoxOn(t, d)
	id := b.run(b.sleeper("changed"))
	p := (&nriPlugin{t: t, name: "10-changer"}).connect(d)
	tolerated := cpus("no-such-container", "0")
	tolerated.IgnoreFailure = true
	failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{cpus("missing", "0"), tolerated, cpus(id, "1")})
	if err == nil && (len(failed) != 1 || failed[0].ContainerId != "missing") {
		t.Errorf("failed are %v", failed)
	}
	if err != nil && !strings.Contains(err.Error(), "missing") {
		t.Errorf("the error is %v", err)
	}
	if got, err := os.ReadFile(cgroupFile(t, b.pid(id), "cpuset", "cpuset.cpus")); err != nil || strings.TrimSpace(string(got)) != "1" {
		t.Errorf("the CPUs are %q, %v", got, err)
	}
	if got := b.status(id).GetResources().GetLinux().GetCpusetCpus(); got != "1" {
		t.Errorf("the status has the CPUs %q", got)
	}
}

// TestDEV_17_NRIValidation: what a validating plugin or the built-in rules
// refuse is not made, and the error says why; required plugins must be there,
// unless a pod does without.
func TestDEV_17_NRIValidation(t *testing.T) {
	t.Parallel()
	d := start(t, nriSet(daemon.Config{
		"enable": true, "reject_oci_hook_adjustment": true, "required_plugins": []string{"needed"},
		"tolerate_missing_plugins_annotation": "tolerate.test",
	}, "default_validator"))
	b := newBoxOn(t, d)
	b.refused(b.sleeper("without"), codes.FailedPrecondition, `"needed"`)
	tolerant := newBoxNamed(t, d, "tolerant", func(c *cri.PodSandboxConfig) { c.Annotations = map[string]string{"tolerate.test": "true"} })
	tolerant.run(tolerant.sleeper("without"))

	needed := (&nriPlugin{t: t, name: "50-needed"}).connect(d)
	b.run(b.sleeper("with"))
	hooks := &nriPlugin{t: t, name: "10-hooks", adjust: func(_ *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
		a := &api.ContainerAdjustment{}
		if ctr.GetName() == "hooked" {
			a.AddHooks(&api.Hooks{Prestart: []*api.Hook{{Path: "/bin/true"}}})
		}
		a.AddEnv("SEEN", "yes")
		return a, nil
	}}
	hooks.connect(d)
	b.refused(b.sleeper("hooked"), codes.FailedPrecondition, "hook", "10-hooks")
	judge := &nriValidator{nriPlugin: &nriPlugin{t: t, name: "90-judge"}}
	judge.judge = func(req *api.ValidateContainerAdjustmentRequest) error {
		if req.GetContainer().GetName() == "judged" && len(req.GetAdjust().GetEnv()) > 0 {
			return errors.New("no new variables here")
		}
		return nil
	}
	if err := judge.tryConnect(d, judge); err != nil {
		t.Fatal(err)
	}
	b.refused(b.sleeper("judged"), codes.FailedPrecondition, "no new variables here")
	b.run(b.sleeper("fine"))

	other := newBoxNamed(t, d, "more", func(c *cri.PodSandboxConfig) {
		c.Annotations = map[string]string{"required-plugins.noderesource.dev": `["hooks", "further"]`}
	})
	other.refused(other.sleeper("without"), codes.FailedPrecondition, `"further"`)
	needed.stub.Stop()
	eventually(t, ample, func() error {
		c := b.sleeper("needed-gone")
		c.Metadata.Attempt = uint32(time.Now().UnixNano())
		_, err := b.create(c)
		if err == nil || !strings.Contains(err.Error(), `"needed"`) {
			return fmt.Errorf("with the required plugin gone: %w", err)
		}
		return nil
	})
}

// newBoxNamed is newBoxOn for a second pod of a test.
func newBoxNamed(t *testing.T, d *daemon.Daemon, name string, edits ...func(*cri.PodSandboxConfig)) *box {
	t.Helper()
	p := runPod(d, name, edits...)
	return &box{Daemon: d, t: t, pod: p.id, config: p.config, image: plain(t, d)}
}

// TestDEV_18_NRITimeout: a plugin that does not answer is left out after its
// time; pods and containers are made without it, unless it is required or wants
// them to fail, and then the error names it. The log names it too.
func TestDEV_18_NRITimeout(t *testing.T) {
	t.Parallel()
	d := start(t, nriSet("5s", "plugin_request_timeout"),
		nriSet(daemon.Config{"enable": true, "tolerate_missing_plugins_annotation": "tolerate.test", "required_plugins": []string{"required"}}, "default_validator"))
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	hanging := func(name, object string) *nriPlugin {
		return &nriPlugin{t: t, name: name, on: func(_ string, pod *api.PodSandbox, ctr *api.Container) error {
			if pod.GetName() == object || ctr.GetName() == object {
				<-hang
			}
			return nil
		}}
	}
	required := hanging("20-required", "hangs").connect(d)
	pods := hanging("10-sleeper", "dev18").connect(d)
	begun := time.Now()
	b := newBoxNamed(t, d, "dev18")
	if took := time.Since(begun); took < 5*time.Second {
		t.Errorf("the pod did not wait for the plugin: %s", took)
	}
	select {
	case <-pods.closed:
	case <-time.After(ample):
		t.Error("a plugin that hangs stays connected")
	}
	if log := d.Tail(1 << 20); !strings.Contains(log, "10-sleeper") {
		t.Errorf("the log does not name the plugin:\n%s", log)
	}
	b.run(b.sleeper("fine"))
	// A required plugin that fails is no reason to do without it.
	b.refused(b.sleeper("hangs"), codes.FailedPrecondition, "required")
	b.refused(b.sleeper("after"), codes.FailedPrecondition, "required")
	<-required.closed
	hanging("20-required", "nothing").connect(d)
	b.run(b.sleeper("again"))
	// One that says so itself.
	hanging("30-strict", "strictly").connect(d, stub.WithFailurePolicy(&api.FailurePolicy{FailRequest: true, KeepConnected: true}))
	b.refused(b.sleeper("strictly"), codes.FailedPrecondition, "30-strict")
	b.run(b.sleeper("not-strictly"))
}

// TestDEV_18_NRICrash: a plugin of the daemon's own that hangs and is killed
// from outside holds up one container for as long, and nothing is left of it.
func TestDEV_18_NRICrash(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "plugin")
	d := start(t, nriSet("10m", "plugin_request_timeout"), daemon.Edit(func(in *daemon.Instance, _ daemon.Config) {
		install(t, in, "10-hangs"+nriProgram, `{"file": "`+file+`", "hang": "victim"}`)
	}))
	b := newBoxOn(t, d)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	pid, err := strconv.Atoi(line[strings.LastIndexByte(line, ' ')+1:])
	if err != nil {
		t.Fatal(err)
	}
	made := make(chan error, 1)
	go func() {
		_, err := b.create(b.sleeper("victim"))
		made <- err
	}()
	eventually(t, ample, func() error {
		text, err := os.ReadFile(file)
		if err == nil && !strings.Contains(string(text), "hangs") {
			err = errors.New("the plugin has not been asked")
		}
		return err
	})
	process, err := os.FindProcess(pid)
	if err == nil {
		err = process.Kill()
	}
	if err != nil {
		t.Fatal(err)
	}
	// Long before the plugin's time is over.
	if err := <-made; err != nil {
		t.Errorf("a container whose plugin died: %v", err)
	}
	waitGone(t, pid)
	if got := sh(d, b.run(b.sleeper("after")), "env | grep -c SEEN_BY || true"); got != "0" {
		t.Errorf("plugins that had their say: %s", got)
	}
}

// TestDEV_19_NRIConfig: what the table switches.
func TestDEV_19_NRIConfig(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		opts            []daemon.Option
		socket, started bool
	}{
		"default":     {nil, true, true},
		"disabled":    {[]daemon.Option{nriSet(true, "disable")}, false, false},
		"no plugin":   {[]daemon.Option{daemon.Set([]string{nriTable}, "disabled_plugins")}, false, false},
		"no sockets":  {[]daemon.Option{nriSet(true, "disable_connections")}, false, true},
		"other paths": {[]daemon.Option{nriSet("/nonexistent", "plugin_path")}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "plugin")
			opts := append(tc.opts, daemon.Edit(func(in *daemon.Instance, _ daemon.Config) {
				install(t, in, "10-one"+nriProgram, `{"file": "`+file+`"}`)
			}))
			d := start(t, opts...)
			b := newBoxOn(t, d)
			b.run(b.sleeper("app"))
			if exists(nriSocket(d)) != tc.socket {
				t.Errorf("there is a socket: %t", !tc.socket)
			}
			if text, _ := os.ReadFile(file); strings.Contains(string(text), "create app") != tc.started {
				t.Errorf("the plugin wrote %q", text)
			}
		})
	}
}
