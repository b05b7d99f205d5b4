package lifecycle

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// TestRTH_26_OtherRuntimes: runtimes with runc's verbs, side by side on one
// node: crun, also with our own shim, and an old runc as Debian has them, and a script
// around ours.
func TestRTH_26_OtherRuntimes(t *testing.T) {
	t.Parallel()
	crun, err := exec.LookPath("crun")
	if err != nil {
		t.Fatalf("%v; scripts/install-deps installs it", err)
	}
	const old = oldRunc
	runtimes := map[string]string{"debian-crun": crun, "old-runc": old}
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		for name, path := range runtimes {
			if path == crun {
				path = withoutHybrid(in.Dir, path)
			}
			addHandler(in, c, name, daemon.Config{"options": in.RuncOptions(daemon.Config{"BinaryName": path})})
		}
		addCrun(in, c)
		addOldRunc(in, c)
	}))
	runtimes[slowHandler], runtimes[crunHandler], runtimes[oldRuncHandler] = "", crun, old
	known := runtimesKnown(t, d, crun, old)
	for _, name := range slices.Sorted(maps.Keys(runtimes)) {
		config := d.PodConfig(name)
		p := pod{d.RunPodWith(config, name), config}
		if s := podStatus(t, d, p.id); s.RuntimeHandler != name || s.Network.GetIp() == "" {
			t.Errorf("the pod is %v", s)
		}
		t.Logf("handler %s", name) // to which what follows belongs
		wholeLife(t, d, p)
		hasItsLimits(t, d, p)
		if name != "debian-crun" {
			hasItsScore(t, d, p)
		}
		inUserNamespace(t, d, name, known[name].GetUserNamespaces())
	}
}

// crunHandler runs pods by our own shim, as the default does, with crun.
const crunHandler = "crun"

func addCrun(in *daemon.Instance, c daemon.Config) {
	path, err := exec.LookPath("crun")
	must(err)
	addHandler(in, c, crunHandler, daemon.Config{
		"runtime_type": "io.containerd.gantry.v2", "sandboxer": "shim",
		"options": in.RuncOptions(daemon.Config{"BinaryName": withoutHybrid(in.Dir, path)}),
	})
}

// oldRuncHandler does the same with Debian's runc.
const (
	oldRuncHandler = "own-old-runc"
	oldRunc        = "/usr/sbin/runc" // before any that is found by name
)

func addOldRunc(in *daemon.Instance, c daemon.Config) {
	addHandler(in, c, oldRuncHandler, daemon.Config{
		"runtime_type": "io.containerd.gantry.v2", "sandboxer": "shim", "options": in.RuncOptions(daemon.Config{"BinaryName": oldRunc}),
	})
}

const secondHierarchy = "/sys/fs/cgroup/unified"

// withoutHybrid makes a script that hides the second hierarchy from crun, which
// refuses to run where that has controllers beside those of version 1. It takes an empty
// directory in its place for a hierarchy, so that is one of its own. All other mounts are
// as on the host, so that those of a container may spread to it.
func withoutHybrid(dir, crun string) (path string) {
	if have, err := os.ReadFile(secondHierarchy + "/cgroup.controllers"); err != nil || len(strings.TrimSpace(string(have))) == 0 {
		return crun
	}
	path = filepath.Join(dir, "crun-without-hybrid")
	must(os.WriteFile(path, fmt.Appendf(nil, "#!/bin/sh\nexec unshare -m --propagation unchanged sh -c 'mount --make-rslave /sys/fs/cgroup && umount %[1]s && mount -t tmpfs none %[1]s && exec %[2]s \"$@\"' crun \"$@\"\n", secondHierarchy, crun), 0o755))
	return path
}

// A daemon under this program, and all that it starts, sees no second hierarchy: crun can
// be run as it is.
const (
	noHybridProgram = "gantry-test-no-hybrid"
	noHybridDaemon  = "GANTRY_TEST_NO_HYBRID_DAEMON"
)

// noHybridMain becomes the daemon, in a mount namespace of its own.
func noHybridMain() {
	runtime.LockOSThread() // the namespace is the thread's, and so is what it becomes
	must(unix.Unshare(unix.CLONE_NEWNS))
	must(unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""))
	switch err := unix.Unmount(secondHierarchy, 0); {
	case err == nil:
		must(unix.Mount("none", secondHierarchy, "tmpfs", 0, ""))
	case !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT): // there is none
		must(err)
	}
	real := os.Getenv(noHybridDaemon)
	must(unix.Exec(real, append([]string{real}, os.Args[1:]...), os.Environ()))
}

// runtimesKnown is what the daemon has learnt of its runtimes, which must be
// what they say themselves.
func runtimesKnown(t *testing.T, d *daemon.Daemon, crun, old string) (known map[string]*cri.RuntimeHandlerFeatures) {
	t.Helper()
	eventually(t, soon, func() error { // they are asked in the background
		known, _ = handlers(t, d)
		for handler, path := range map[string]string{crunHandler: crun, "debian-crun": crun, "old-runc": old, oldRuncHandler: old} {
			rro, userns := offered(path)
			if f := known[handler]; f.GetRecursiveReadOnlyMounts() != rro || f.GetUserNamespaces() != userns {
				return fmt.Errorf("handler %q has %v, its runtime says %v and %v", handler, f, rro, userns)
			}
		}
		if !known[slowHandler].GetUserNamespaces() {
			return fmt.Errorf("handler %q has %v", slowHandler, known[slowHandler])
		}
		return nil
	})
	return known
}

// wholeLife runs containers with output, commands, exit codes and stops.
func wholeLife(t *testing.T, d *daemon.Daemon, p pod) {
	t.Helper()
	main := p.run(d, daemon.ContainerConfig("main", plain(t, d), "sh", "-c", "trap 'exit 9' TERM; touch /tmp/ready; while :; do sleep 0.1; done"))
	stubborn := p.run(d, daemon.ContainerConfig("stubborn", plain(t, d), "sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"))
	ends := p.run(d, daemon.ContainerConfig("ends", plain(t, d), "sh", "-c", "echo out; echo err >&2; exit 7"))
	if s := waitExited(t, d, ends); s.ExitCode != 7 || logText(t, s.LogPath, "stdout") != "out\n" || logText(t, s.LogPath, "stderr") != "err\n" {
		t.Errorf("status %v, log %v", s, readLog(t, s.LogPath))
	}
	if out, code := tryExec(t, d, main, "sh", "-c", "hostname; exit 3"); out != p.config.Hostname+"\n" || code != 3 {
		t.Errorf("command: %q, code %d", out, code)
	}
	if _, code := tryExec(t, d, main, "sh", "-c", "kill -9 $$"); code != 137 {
		t.Errorf("killed command: code %d", code)
	}
	if _, err := d.Runtime().ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: main, Cmd: []string{"/no/such/program"}, Timeout: 60}); err == nil {
		t.Error("a program runs that is not there")
	}
	missing, err := p.create(d, daemon.ContainerConfig("missing", plain(t, d), "/no/such/program"))
	if err == nil {
		_, err = d.Runtime().StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: missing})
	}
	if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("a container without its program: %v", err)
	}
	waitFile(t, d, main, "/tmp/ready")
	for _, stop := range []struct {
		id    string
		grace int64
		code  int32
	}{{main, 60, 9}, {stubborn, 1, 137}} {
		if err := stopContainer(d, stop.id, stop.grace); err != nil {
			t.Error(err)
		}
		if s := waitExited(t, d, stop.id); s.ExitCode != stop.code {
			t.Errorf("stopped: %v, want code %d", s, stop.code)
		}
	}
}

// hasItsLimits: a memory limit is set, and changed later; a quota of CPU time is set and
// lifted, and stays so when others change.
func hasItsLimits(t *testing.T, d *daemon.Daemon, p pod) {
	t.Helper()
	c := daemon.ContainerConfig("limited", plain(t, d))
	c.Linux.Resources.MemoryLimitInBytes, c.Linux.Resources.CpuQuota = 64<<20, -1
	id := p.run(d, c)
	wantQuota(t, d, id, "-1", "max")
	for _, quota := range []int64{30000, -1} {
		if err := update(d, id, &cri.LinuxContainerResources{CpuQuota: quota, CpuPeriod: 100000}); err != nil {
			t.Fatal(err)
		}
		wantQuota(t, d, id, fmt.Sprint(quota), strings.Replace(fmt.Sprint(quota), "-1", "max", 1))
	}
	for _, limit := range []int64{64 << 20, 32 << 20} {
		if _, err := d.Runtime().UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{
			ContainerId: id, Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: limit},
		}); err != nil {
			t.Fatal(err)
		}
		if got := readInt(t, memoryLimit(cgroupPath(t, pidOf(t, d, id), "memory"))); got != limit {
			t.Errorf("the memory limit is %d, want %d", got, limit)
		}
		if got := sh(d, id, "echo $(echo here)"); got != "here" { // the number of processes is as it was
			t.Errorf("a command says %q", got)
		}
	}
	wantQuota(t, d, id, "-1", "max")
}

// wantQuota wants a quota of CPU time to be in force, as the version of control groups
// has it.
func wantQuota(t *testing.T, d *daemon.Daemon, id, v1, v2 string) {
	t.Helper()
	file, want := "cpu.max", v2
	if versionOne("cpu") {
		file, want = "cpu.cfs_quota_us", v1
	}
	text, err := os.ReadFile(cgroupFile(t, pidOf(t, d, id), "cpu", file))
	if f := strings.Fields(string(text)); err != nil || len(f) == 0 || f[0] != want {
		t.Errorf("the quota is %q, %v, want %s", text, err, want)
	}
}

// hasItsScore: so have its commands and what they start at once. crun itself gives them that of the shim.
func hasItsScore(t *testing.T, d *daemon.Daemon, p pod) {
	t.Helper()
	c := daemon.ContainerConfig("scored", plain(t, d))
	c.Linux.Resources.OomScoreAdj = 500
	id := p.run(d, c)
	if got := scoreOf(t, pidOf(t, d, id)); got != 500 {
		t.Errorf("the score is %d", got)
	}
	if got := sh(d, id, "{ sleep 0.5; cat /proc/self/oom_score_adj; } & wait; cat /proc/self/oom_score_adj"); got != "500\n500" {
		t.Errorf("the scores of a command's child and of the command are %s", got)
	}
}

// inUserNamespace: a pod gets one, or is refused, as its handler says.
func inUserNamespace(t *testing.T, d *daemon.Daemon, handler string, able bool) {
	t.Helper()
	u := newRange()
	config := d.PodConfig("user-" + handler)
	withUserns(u)(config)
	id, err := d.StartPod(t.Context(), config, handler)
	if !able {
		wantError(t, err, codes.FailedPrecondition, handler, "user namespace")
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	p := pod{id, config}
	c := daemon.ContainerConfig("main", plain(t, d))
	c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = u
	pid := pidOf(t, d, p.run(d, c))
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/uid_map", pid)); err != nil || lines(string(text)) != fmt.Sprintf("0 %d %d", hostRoot(u), rangeSize) {
		t.Errorf("uid_map is %q, %v", text, err)
	}
}
