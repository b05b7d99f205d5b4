package lifecycle

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

func handlers(t *testing.T, d *daemon.Daemon) (byName map[string]*cri.RuntimeHandlerFeatures, features *cri.RuntimeFeatures) {
	t.Helper()
	s, err := d.Runtime().Status(t.Context(), &cri.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	byName = map[string]*cri.RuntimeHandlerFeatures{}
	for _, h := range s.RuntimeHandlers {
		byName[h.Name] = h.Features
	}
	return byName, s.Features
}

func TestRTH_01_NamedHandlers(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Set(otherHandler, "plugins", daemon.RuntimePlugin, "containerd", "default_runtime_name"))
	names, _ := handlers(t, d)
	for _, want := range []string{"", "runc", otherHandler, stubHandler, slowHandler, brokenHandler} {
		if _, ok := names[want]; !ok {
			t.Errorf("handler %q is not in the status: %v", want, names)
		}
	}
	for handler, want := range map[string]string{"": otherHandler, otherHandler: otherHandler, "runc": "runc", slowHandler: slowHandler} {
		config := d.PodConfig("handled")
		hostNetwork(config)
		p := pod{d.RunPodWith(config, handler), config}
		if got := podStatus(t, d, p.id).RuntimeHandler; got != want {
			t.Errorf("handler %q: the pod has %q, want %q", handler, got, want)
		}
		ctr := p.run(d, onHost(daemon.ContainerConfig("main", plain(t, d))))
		if got := sh(d, ctr, "echo runs"); got != "runs" {
			t.Errorf("handler %q: exec gives %q", handler, got)
		}
		if slow := len(wrapped(t, d, runcCreate, ctr)) == 1; slow != (want == slowHandler) {
			t.Errorf("handler %q: its runtime was called: %v", handler, slow)
		}
	}
	_, err := d.StartPod(t.Context(), d.PodConfig("bogus"), "bogus")
	wantError(t, err, codes.NotFound, "bogus", otherHandler)
}

// ownRuntime is the program that runs the containers of the handler under test.
func ownRuntime(t *testing.T) string {
	t.Helper()
	switch defaultHandler {
	case crunHandler:
		path, err := exec.LookPath("crun")
		if err != nil {
			t.Fatal(err)
		}
		return path
	case oldRuncHandler:
		return oldRunc
	}
	return inBin(t, "runc")
}

// saysOfItself is what a runtime says that it can do; an old one does not know the
// question.
func saysOfItself(path string) string {
	says, err := exec.Command(path, "features").Output()
	if err != nil {
		return ""
	}
	return string(says)
}

// offered is what a runtime says that it can mount.
func offered(path string) (rro, userns bool) {
	says := saysOfItself(path)
	return strings.Contains(says, `"rro"`), strings.Contains(says, `"mountExtensions"`)
}

// TestRTH_02_Features: what a handler can do is asked of its runtime, each for
// itself.
func TestRTH_02_Features(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		// A runtime from before there was the command.
		old := filepath.Join(in.Dir, "old-runc")
		must(os.WriteFile(old, []byte("#!/bin/sh\nfor a; do [ \"$a\" != features ] || { echo 'no such command' >&2; exit 1; }; done\nexec runc \"$@\"\n"), 0o755))
		addHandler(in, c, "old", daemon.Config{"options": in.RuncOptions(daemon.Config{"BinaryName": old})})
	}))
	ownRRO, ownUserns := offered(ownRuntime(t))
	want := map[string]bool{"": ownRRO, "runc": true, otherHandler: true, "old": false, brokenHandler: false}
	eventually(t, soon, func() error { // runtimes are asked in the background
		got, _ := handlers(t, d)
		for name, rro := range want {
			if got[name].GetRecursiveReadOnlyMounts() != rro {
				return fmt.Errorf("handler %q: %v, want recursive read-only mounts %v", name, got[name], rro)
			}
		}
		if got[""].GetUserNamespaces() != ownUserns {
			return fmt.Errorf("the default handler: %v, want user namespaces %v", got[""], ownUserns)
		}
		return nil
	})
	config := d.PodConfig("old")
	hostNetwork(config)
	p := pod{d.RunPodWith(config, "old"), config}
	p.run(d, onHost(daemon.ContainerConfig("main", plain(t, d))))
	rro := onHost(daemon.ContainerConfig("rro", plain(t, d)))
	rro.Mounts = []*cri.Mount{{ContainerPath: "/data", HostPath: t.TempDir(), Readonly: true, RecursiveReadOnly: true}}
	_, err := p.create(d, rro)
	wantError(t, err, codes.Unimplemented, "recursive_read_only")
}

func TestRTH_03_SupplementalGroupsPolicy(t *testing.T) {
	t.Parallel()
	d := shared(t)
	if _, features := handlers(t, d); !features.GetSupplementalGroupsPolicy() {
		t.Errorf("features are %v", features)
	}
	// As the scheduler trusts it, it must be true.
	p := runPod(d, "grouped", hostNetwork)
	config := onHost(daemon.ContainerConfig("main", plain(t, d)))
	config.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 1000} // a member of crew in the image
	config.Linux.SecurityContext.SupplementalGroups = []int64{4000}
	if got := sh(d, p.run(d, config), "id -G"); got != "1000 3000 4000" {
		t.Errorf("merged groups are %q", got)
	}
	config.Metadata.Name = "strict"
	config.Linux.SecurityContext.SupplementalGroupsPolicy = cri.SupplementalGroupsPolicy_Strict
	if got := sh(d, p.run(d, config), "id -G"); got != "1000 4000" {
		t.Errorf("strict groups are %q", got)
	}
}

func TestRTH_09_OneShim(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPodWith(d, "runc", "grouped") // ours has one for all pods
	ids := []string{p.id}
	for i := range 3 {
		ids = append(ids, p.run(d, daemon.ContainerConfig(fmt.Sprint("c", i), plain(t, d))))
	}
	shims := map[int]bool{}
	for _, id := range ids {
		for _, pid := range shimsOf(t, id) {
			shims[pid] = true
		}
		if parent := parentOf(t, pidOf(t, d, id)); len(shims) == 0 || !shims[parent] {
			t.Errorf("%s has parent %d, shims are %v", id, parent, shims)
		}
	}
	if len(shims) != 1 {
		t.Errorf("the pod has shims %v", shims)
	}
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	for pid := range shims {
		waitGone(t, pid)
	}
}

func parentOf(t *testing.T, pid int) int { return statusNumber(t, pid, "PPid") }

// TestRTH_10_ShimSurvives: containers do not notice a crash of the daemon.
func TestRTH_10_ShimSurvives(t *testing.T) {
	d := shared(t)
	p := runPod(d, "survivor")
	beats := filepath.Join(t.TempDir(), "beats")
	if err := os.WriteFile(beats, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	config := daemon.ContainerConfig("main", plain(t, d), "sh", "-c", "trap 'exit 5' TERM; while :; do echo beat >> /beats; echo line; sleep 0.05; done")
	config.Mounts = []*cri.Mount{{ContainerPath: "/beats", HostPath: beats}}
	ctr := p.run(d, config)
	leaves := p.wait(t, d, 42)
	pid, shims := pidOf(t, d, ctr), shimsOf(t, p.id)
	size := func() int64 {
		info, err := os.Stat(beats)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	d.Kill()
	const beat = int64(len("beat\n"))
	before := size()
	eventually(t, soon, func() error {
		if size() < before+10*beat {
			return errors.New("the container stands still")
		}
		return nil
	})
	leaves.exit(t)
	d.Up()
	if s := waitExited(t, d, leaves.id); s.ExitCode != 42 {
		t.Errorf("the container that ended meanwhile has code %d", s.ExitCode)
	}
	if s := containerStatus(t, d, ctr); s.State != cri.ContainerState_CONTAINER_RUNNING || pidOf(t, d, ctr) != pid || fmt.Sprint(shimsOf(t, p.id)) != fmt.Sprint(shims) {
		t.Errorf("the container is %s, process %d, shims %v", s.State, pidOf(t, d, ctr), shimsOf(t, p.id))
	}
	if err := stopContainer(d, ctr, 10); err != nil {
		t.Fatal(err)
	}
	if s := containerStatus(t, d, ctr); s.ExitCode != 5 {
		t.Errorf("the signal after the restart gave code %d", s.ExitCode)
	}
}

// servingShims are the shims that have the pod: its own, or the one of all pods.
func servingShims(t *testing.T, d *daemon.Daemon, p pod) []int {
	t.Helper()
	return append(shimsOf(t, p.id), supervisors(t, d)...)
}

// TestRTH_11_ShimCrash: a pod whose supervisor was killed is not called running,
// nothing of it goes on, and it can be removed.
func TestRTH_11_ShimCrash(t *testing.T) {
	t.Parallel()
	d := start(t)
	p := runPaused(d, "orphaned")
	ip := ipOf(t, d, p)
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d), "sh", "-c", "sleep 100000 & sleep 100000"))
	second := p.run(d, daemon.ContainerConfig("second", plain(t, d)))
	pids := []int{pidOf(t, d, ctr), pidOf(t, d, second), pidOf(t, d, p.id)}
	for _, pid := range servingShims(t, d, p) {
		kill(t, pid)
	}
	for _, id := range []string{ctr, second} {
		if s := waitExited(t, d, id); s.ExitCode == 0 || s.FinishedAt == 0 {
			t.Errorf("status is %v", s)
		}
	}
	eventually(t, soon, func() error {
		if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
			return fmt.Errorf("the pod is %s", s.State)
		}
		return nil
	})
	for _, pid := range pids {
		waitGone(t, pid)
	}
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	if exists(ipamFile(d, ip)) {
		t.Errorf("address %s is still given out", ip)
	}
}

// TestRTH_11_ShimAndDaemonCrash: a container that was just started when the daemon
// and its shim died has ended. It is not one that may still be started, although
// its start need not have reached the disk.
func TestRTH_11_ShimAndDaemonCrash(t *testing.T) {
	t.Parallel()
	d := start(t)
	p := runPaused(d, "orphaned")
	ctr, err := p.create(d, daemon.ContainerConfig("main", plain(t, d)))
	if err != nil {
		t.Fatal(err)
	}
	shims := servingShims(t, d, p)
	if err := startContainer(d, ctr); err != nil {
		t.Fatal(err)
	}
	d.Kill()
	for _, pid := range shims {
		kill(t, pid)
	}
	d.Up()
	s := waitExited(t, d, ctr)
	if s.ExitCode == 0 || s.StartedAt == 0 || s.FinishedAt < s.StartedAt {
		t.Errorf("status is %v", s)
	}
	if _, err := d.Runtime().StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: ctr}); err == nil {
		t.Error("it was started a second time")
	}
}
