package lifecycle

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// TestPOD_11_OverheadAndResources: the pod's sums reach the runtime as
// annotations and are told by a verbose status, also after an update.
func TestPOD_11_OverheadAndResources(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPaused(d, "sums", func(c *cri.PodSandboxConfig) {
		c.Linux.Overhead = &cri.LinuxContainerResources{CpuQuota: 1000, MemoryLimitInBytes: 16 << 20}
		c.Linux.Resources = &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 256 << 20}
	})
	verbose := func() (info struct {
		Overhead, Resources struct {
			CPUQuota int64 `json:"cpu_quota"`
			Memory   int64 `json:"memory_limit_in_bytes"`
		}
		RuntimeSpec struct{ Annotations map[string]string }
	}) {
		t.Helper()
		resp, err := d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
		if err == nil {
			err = json.Unmarshal([]byte(resp.Info["info"]), &info)
		}
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	info := verbose()
	for name, want := range map[string]string{"cpu-period": "100000", "cpu-quota": "50000", "cpu-shares": "512", "memory": fmt.Sprint(256 << 20)} {
		if got := info.RuntimeSpec.Annotations["io.kubernetes.cri.sandbox-"+name]; got != want {
			t.Errorf("annotation %s is %q, want %s", name, got, want)
		}
	}
	if info.Overhead.Memory != 16<<20 || info.Overhead.CPUQuota != 1000 || info.Resources.Memory != 256<<20 || info.Resources.CPUQuota != 50000 {
		t.Errorf("a verbose status has %+v", info)
	}
	if _, err := d.Runtime().UpdatePodSandboxResources(t.Context(), &cri.UpdatePodSandboxResourcesRequest{
		PodSandboxId: p.id, Overhead: p.config.Linux.Overhead, Resources: &cri.LinuxContainerResources{MemoryLimitInBytes: 512 << 20},
	}); err != nil {
		t.Fatal(err)
	}
	if info = verbose(); info.Overhead.Memory != 16<<20 || info.Resources.Memory != 512<<20 {
		t.Errorf("after an update a verbose status has %+v", info)
	}
}

// podProcess is /proc/PID/status of the pod's own process.
func podProcess(t *testing.T, d *daemon.Daemon, id string) string {
	t.Helper()
	pid := pidOf(t, d, id)
	begun(t, pid)
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestPOD_19_SandboxIdentity: who the pod's own process is, and what is no
// identity.
func TestPOD_19_SandboxIdentity(t *testing.T) {
	t.Parallel()
	d := shared(t)
	number := func(n int64) *cri.Int64Value { return &cri.Int64Value{Value: n} }
	for name, row := range map[string]struct {
		user, group *cri.Int64Value
		want        string
	}{
		"both": {number(1234), number(77), "1234:77"}, "user": {number(1234), nil, "1234:0"}, "root": {number(0), nil, "0:0"}, "none": {nil, nil, "65535:65535"},
	} {
		p := runPaused(d, "identity-"+name, func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.RunAsUser, c.Linux.SecurityContext.RunAsGroup = row.user, row.group
		})
		text := podProcess(t, d, p.id)
		if got := strings.Fields(field(t, text, "Uid:"))[1] + ":" + strings.Fields(field(t, text, "Gid:"))[1]; got != row.want {
			t.Errorf("%s: the process is %s, want %s", name, got, row.want)
		}
		if got := capsOf(t, text, "CapEff"); got != 0 {
			t.Errorf("%s: it has capabilities %x", name, got)
		}
	}
	for field, sc := range map[string]*cri.LinuxSandboxSecurityContext{
		"run_as_group":           {RunAsGroup: number(77)},
		"run_as_user":            {RunAsUser: number(-1)},
		"run_as_group: 42949672": {RunAsUser: number(1), RunAsGroup: number(4294967296)},
	} {
		config := d.PodConfig("refused")
		config.Linux.SecurityContext = sc
		_, err := d.StartPod(t.Context(), config, "")
		if err == nil {
			t.Errorf("%s: the pod runs", field)
			continue
		}
		if !strings.Contains(err.Error(), "InvalidArgument") || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
}

// TestPOD_21_SandboxGroups: the pod's process has the groups that are asked for
// and its own, under both policies: there is no image to add to them.
func TestPOD_21_SandboxGroups(t *testing.T) {
	t.Parallel()
	d := shared(t)
	for _, policy := range []cri.SupplementalGroupsPolicy{cri.SupplementalGroupsPolicy_Merge, cri.SupplementalGroupsPolicy_Strict} {
		p := runPaused(d, "groups-"+strings.ToLower(policy.String()), func(c *cri.PodSandboxConfig) {
			sc := c.Linux.SecurityContext
			sc.RunAsUser, sc.RunAsGroup = &cri.Int64Value{Value: images.AliceUID}, &cri.Int64Value{Value: 77}
			sc.SupplementalGroups, sc.SupplementalGroupsPolicy = []int64{5000, 6000, 5000}, policy
		})
		got := strings.Fields(field(t, podProcess(t, d, p.id), "Groups:"))
		slices.Sort(got)
		if !slices.Equal(got, []string{"5000", "6000", "77"}) {
			t.Errorf("%s: groups are %q", policy, got)
		}
	}
	config := d.PodConfig("refused")
	config.Linux.SecurityContext.SupplementalGroupsPolicy = 77
	if _, err := d.StartPod(t.Context(), config, ""); err == nil || !strings.Contains(err.Error(), "supplemental_groups_policy") {
		t.Errorf("an unknown policy: %v", err)
	}
}

// TestCTR_04_ImageRuntimeHandler: an image is unpacked where its handler has
// its snapshots, and a handler that nobody configured is refused.
func TestCTR_04_ImageRuntimeHandler(t *testing.T) {
	t.Parallel()
	handler := func(key string) []string { return []string{"containerd", "runtimes", "special", key} }
	d := start(t, runtimeKey("io.containerd.runc.v2", handler("runtime_type")...), runtimeKey("native", handler("snapshotter")...))
	ref := push(t, "handler:1", blobImage(t, 1000))
	layers := func(snapshotter string) int {
		list, err := filepath.Glob(filepath.Join(d.Root, "io.containerd.snapshotter.v1."+snapshotter, "snapshots", "*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	pullFor := func(name string) error {
		_, err := d.Images().PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref, RuntimeHandler: name}})
		return err
	}
	wantError(t, pullFor("nobody"), codes.InvalidArgument, "image.runtime_handler", "nobody", "special")
	if err := pullFor("special"); err != nil || layers("native") != 1 || layers("overlayfs") != 0 {
		t.Errorf("pulled for the handler: %v, %d and %d layers", err, layers("native"), layers("overlayfs"))
	}
	if err := pullFor(""); err != nil || layers("overlayfs") != 1 {
		t.Errorf("pulled for the default: %v, %d layers", err, layers("overlayfs"))
	}
	run := image(t, d, images.Spec{})
	config := d.PodConfig("special")
	b := &box{Daemon: d, t: t, image: run, config: config, pod: d.RunPodWith(config, "special")}
	c := b.sleeper("app")
	c.Image.RuntimeHandler = "special"
	id := b.run(c)
	if got := b.status(id).Image.RuntimeHandler; got != "special" {
		t.Errorf("the status has handler %q", got)
	}
	resp, err := d.Runtime().ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil || !strings.Contains(resp.Info["info"], `"snapshotter":"native"`) {
		t.Errorf("verbose: %v, %v", resp.GetInfo(), err)
	}
	for _, other := range []string{"runc", "nobody"} {
		c := b.sleeper("other")
		c.Image.RuntimeHandler = other
		b.refused(c, codes.InvalidArgument, "config.image.runtime_handler", other)
	}
}

// TestCTR_04_DefaultHandlerSnapshotter: an image pulled for no handler is one
// for the default handler, and is unpacked where that one has its snapshots.
func TestCTR_04_DefaultHandlerSnapshotter(t *testing.T) {
	t.Parallel()
	d := start(t, runtimeKey("native", "containerd", "runtimes", ownTable(), "snapshotter"))
	ref := push(t, "default:1", blobImage(t, 1000))
	mustPull(t, d, ref)
	layers := func(snapshotter string) int {
		list, err := filepath.Glob(filepath.Join(d.Root, "io.containerd.snapshotter.v1."+snapshotter, "snapshots", "*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	if layers("native") != 1 || layers("overlayfs") != 0 {
		t.Errorf("%d layers in the default handler's snapshotter, %d in the node's", layers("native"), layers("overlayfs"))
	}
	info, err := d.Images().ImageFsInfo(t.Context(), &cri.ImageFsInfoRequest{})
	if err != nil || !strings.HasSuffix(info.ImageFilesystems[0].FsId.Mountpoint, "native") {
		t.Errorf("the first image filesystem: %v, %v", info, err)
	}
}

// TestCTR_31_DefaultEnv: the node's environment yields to the image's, and both
// to the pod's.
func TestCTR_31_DefaultEnv(t *testing.T) {
	t.Parallel()
	d := start(t, runtimeKey([]string{"NODE=node", "IMAGE=node", "POD=node", "EMPTY="}, "default_env"))
	b := newBoxOn(t, d)
	b.image = image(t, d, images.Spec{Env: []string{"IMAGE=image", "POD=image"}})
	c := b.sleeper("app")
	c.Envs = []*cri.KeyValue{{Key: "POD", Value: []byte("pod")}}
	id := b.run(c)
	vars := b.environ(id)
	for _, want := range []string{"NODE=node", "IMAGE=image", "POD=pod", "EMPTY=", "HOSTNAME=pod-host"} {
		if !slices.Contains(vars, want) {
			t.Errorf("no %s in %q", want, vars)
		}
	}
	if got := sh(d, id, "echo $NODE $IMAGE $POD"); got != "node image pod" {
		t.Errorf("a command has %q", got)
	}
}

// TestCTR_28_Systemd: a container whose command leads to systemd begins with
// empty run-time directories, knows that it is in a container, and is ended by
// the signal that makes it shut down. Another init is left alone.
func TestCTR_28_Systemd(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	// 37 is SIGRTMIN+3.
	const program = "#!/bin/sh\ntrap 'echo shut down; exit 0' 37\ntrap 'echo start again' TERM\necho ready\nwhile :; do sleep 1000 & wait $!; done\n"
	inits := func(target string) string {
		return image(t, b.Daemon, images.Spec{Entrypoint: []string{"/sbin/init"}, Layers: [][]images.File{{
			images.Executable("usr/lib/systemd/systemd", []byte(program)), images.Executable("usr/lib/other", []byte(program)),
			images.Symlink("sbin/init", target), images.Text("run/left", "by the image"), images.Text("tmp/left", "by the image"),
		}}})
	}
	id := b.run(daemon.ContainerConfig("systemd", inits("../usr/lib/systemd/systemd")))
	b.logged(id, "ready")
	for _, dir := range []string{"/run", "/run/lock", "/tmp", "/var/log/journal"} {
		if got := sh(b.Daemon, id, "stat -f -c %T "+dir+"; ls -A "+dir+" | grep -v lock; touch "+dir+"/x"); got != "tmpfs" {
			t.Errorf("%s is %q", dir, got)
		}
	}
	if got := sh(b.Daemon, id, "echo $container"); got != "oci" {
		t.Errorf("container is %q", got)
	}
	group := makesGroups(b, id)
	if got := b.status(id).StopSignal; got != cri.Signal_SIGNAL_SIGRTMINPLUS3 {
		t.Errorf("it is ended by %s", got)
	}
	b.stop(id, 30)
	if s := b.exited(id); s.ExitCode != 0 || !strings.Contains(logText(t, s.LogPath, "stdout"), "shut down") {
		t.Errorf("ended with %d, %q", s.ExitCode, logText(t, s.LogPath, "stdout"))
	}
	b.remove(id)
	if exists(group) {
		t.Errorf("%s is left", group)
	}
	id = b.run(daemon.ContainerConfig("other", inits("../usr/lib/other")))
	b.logged(id, "ready")
	if _, code := tryExec(t, b.Daemon, id, "sh", "-c", "for d in $(if test -e /sys/fs/cgroup/cgroup.procs; then echo /sys/fs/cgroup; else echo /sys/fs/cgroup/*/; fi); do ! mkdir $d/mine || exit 0; done; exit 1"); code == 0 {
		t.Error("another init makes control groups")
	}
	if got := sh(b.Daemon, id, "cat /run/left /tmp/left; echo $container"); got != "by the imageby the image\n" && got != "by the imageby the image" {
		t.Errorf("another init sees %q", got)
	}
	if got := b.status(id).StopSignal; got != cri.Signal_SIGNAL_SIGTERM {
		t.Errorf("another init is ended by %s", got)
	}
	b.stop(id, 0)
}

// nested makes groups in groups, deeper than a path can tell.
const nested = "cd %s; i=0; while test $i -lt 25; do n=$(printf %%0250d $i); mkdir $n && cd -P $n || exit 1; i=$((i+1)); done"

// makesGroups has a container make control groups where systemd does, below its own, with
// a process in one of them, and fail elsewhere. It returns the path of its own.
func makesGroups(b *box, id string) string {
	b.t.Helper()
	if exists("/sys/fs/cgroup/cgroup.controllers") {
		b.Exec(id, "sh", "-c", "mkdir -p /sys/fs/cgroup/mine/one; "+fmt.Sprintf(nested, "/sys/fs/cgroup/mine"))
		return filepath.Dir(cgroupFile(b.t, b.pid(id), "", "cgroup.procs"))
	}
	if !exists("/sys/fs/cgroup/systemd") {
		b.t.Log("systemd has no hierarchy on this machine")
		return ""
	}
	own := filepath.Join("/sys/fs/cgroup/systemd", cgroupPath(b.t, b.pid(id), "name=systemd"))
	b.Exec(id, "sh", "-c", "mkdir -p /sys/fs/cgroup/systemd/mine/one && (sleep 1000 & echo $! >/sys/fs/cgroup/systemd/mine/one/cgroup.procs); "+fmt.Sprintf(nested, "/sys/fs/cgroup/systemd/mine"))
	if procs, err := os.ReadFile(filepath.Join(own, "mine/one/cgroup.procs")); err != nil || len(procs) == 0 {
		b.t.Errorf("the group has the processes %q, %v", procs, err)
	}
	if got := sh(b.Daemon, id, "grep :name=systemd: /proc/1/cgroup | cut -d: -f3"); got != "/" {
		b.t.Errorf("its own group is %q to it", got)
	}
	if _, code := tryExec(b.t, b.Daemon, id, "sh", "-c", "mkdir /sys/fs/cgroup/memory/mine || echo 1 >/sys/fs/cgroup/pids/pids.max"); code == 0 {
		b.t.Error("it makes groups that limit something")
	}
	return own
}

// TestCTR_19_SeccompKill: the status tells that a filter ended the process, and
// does not take a like exit code for it.
func TestCTR_19_SeccompKill(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	path := filepath.Join(t.TempDir(), "kill.json")
	text := `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_KILL_PROCESS"}]}`
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	killing := &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: path}
	for name, row := range map[string]struct {
		script  string
		profile *cri.SecurityProfile
		reason  string
		code    int32
	}{
		"killed": {"exec mkdir /tmp/x", killing, "seccomp killed", 159},
		"child":  {"mkdir /tmp/x; exit 3", killing, "Error", 3},
		"fine":   {"exit 0", killing, "Completed", 0},
		"alike":  {"exit 159", nil, "Error", 159},
	} {
		c := b.script(name, row.script)
		c.Linux.SecurityContext.Seccomp = row.profile
		if s := b.exited(b.run(c)); s.Reason != row.reason || s.ExitCode != row.code {
			t.Errorf("%s: %s, %d, want %s, %d", name, s.Reason, s.ExitCode, row.reason, row.code)
		}
	}
}

// TestCTR_26_PasswdEntries: a user that the image does not know has a name, in
// files of the container's own, which go with it; a known one has the image's.
func TestCTR_26_PasswdEntries(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	as := func(name string, user, group int64) string {
		c := b.sleeper(name)
		c.Linux.SecurityContext.RunAsUser, c.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: user}, &cri.Int64Value{Value: group}
		return b.run(c)
	}
	files := func() int {
		list, err := filepath.Glob(filepath.Join(b.State, daemon.CRIPlugin, "sandboxes", b.pod, "containers", "*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	stranger := as("stranger", 4242, 77)
	if got := sh(b.Daemon, stranger, "whoami; id -gn; grep -c alice /etc/passwd; echo ~"); got != "4242\n77\n1\n/" {
		t.Errorf("a stranger is %q", got)
	}
	other := as("other", 4243, 77)
	if got := sh(b.Daemon, other, "whoami; grep -c 4242 /etc/passwd; true"); got != "4243\n0" {
		t.Errorf("another stranger is %q", got)
	}
	known := as("known", images.AliceUID, images.AliceUID)
	if got := sh(b.Daemon, known, "whoami; grep -c passwd /proc/mounts; true"); got != images.Alice+"\n0" {
		t.Errorf("a known user is %q", got)
	}
	if n := files(); n != 2 {
		t.Errorf("%d containers have files", n)
	}
	b.remove(stranger)
	if n := files(); n != 1 {
		t.Errorf("after a removal %d containers have files", n)
	}
}
