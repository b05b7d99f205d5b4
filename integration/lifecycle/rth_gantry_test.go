package lifecycle

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// withGantry adds a handler that runs our own shim.
func withGantry(in *daemon.Instance, c daemon.Config) {
	addHandler(in, c, "gantry", daemon.Config{"runtime_type": "io.containerd.gantry.v2"})
}

// gantryPod runs a pod by our own shim.
func gantryPod(d *daemon.Daemon, name string, edits ...func(*cri.PodSandboxConfig)) pod {
	return supervisedPod(d, "gantry", name, edits...)
}

// supervisors are the processes of our own shim that belong to a daemon.
func supervisors(t *testing.T, d *daemon.Daemon) []int {
	t.Helper()
	return started(t, func(args []string) bool {
		return strings.HasPrefix(filepath.Base(args[0]), "containerd-shim-gantry-") && slices.Contains(args, "serve") && strings.Contains(strings.Join(args, " "), d.Dir+"/")
	})
}

// started are the processes that were started with certain arguments, the first of which
// is their name.
func started(t *testing.T, with func(args []string) bool) (pids []int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		line, err := os.ReadFile(f)
		if err != nil || !with(strings.Split(string(line), "\x00")) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// shimOf is the shim that the first process of a container has: its parent, or where that
// is an anchor, the supervisor below it.
func shimOf(t *testing.T, d *daemon.Daemon, pid int) int {
	t.Helper()
	parent := parentOf(t, pid)
	for _, s := range supervisors(t, d) {
		if parentOf(t, s) == parent {
			return s
		}
	}
	return parent
}

// TestRTH_07_GantryTask: a task of our own shim does all that one of the runc
// shim does, also when the daemon is another than the one that made it.
func TestRTH_07_GantryTask(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(withGantry))
	p := gantryPod(d, "tasked", hostNetwork)
	tasked(t, d, p)
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
	whole := gantryPod(d, "whole")
	wholeLife(t, d, whole)
	hasItsLimits(t, d, whole)
	if err := removePod(d, whole.id); err != nil {
		t.Error(err)
	}
}

// TestRTH_07_GantryTerminal: a terminal has the size that it is given, and what is
// typed comes back.
func TestRTH_07_GantryTerminal(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(withGantry))
	p := gantryPod(d, "terminal", hostNetwork)
	config := onHost(daemon.ContainerConfig("main", plain(t, d), "sh", "-c", "until [ \"$(stty size)\" = '25 80' ]; do sleep 0.1; done; stty size; read line; echo got $line; exit 5"))
	config.Tty, config.Stdin = true, true
	ctr := p.run(d, config)
	a := taskAPI(t, d, ctr)
	a.must("resize", a.Resize(a.ctx, 80, 25))
	s := containerStatus(t, d, ctr)
	eventually(t, soon, func() error {
		if text := logText(t, s.LogPath, "stdout"); !strings.Contains(text, "25 80") {
			return fmt.Errorf("the log is %q", text)
		}
		return nil
	})
	a.must("kill", a.Kill(a.ctx, syscall.SIGKILL))
	if s := waitExited(t, d, ctr); s.ExitCode != 137 {
		t.Errorf("code %d", s.ExitCode)
	}
}

// TestRTH_14_OneSupervisor: pods share one process, each of them adds little to
// it, and it ends when the last one has.
func TestRTH_14_OneSupervisor(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(withGantry))
	first := gantryPod(d, "idle-0", hostNetwork)
	pids := supervisors(t, d)
	if len(pids) != 1 {
		t.Fatalf("one pod has supervisors %v", pids)
	}
	before, threads := residentOf(t, pids[0]), threadsOf(t, pids[0])
	const more = 5
	pods := []pod{first}
	for i := range more {
		pods = append(pods, gantryPod(d, fmt.Sprint("idle-", i+1), hostNetwork))
	}
	if now := supervisors(t, d); !slices.Equal(now, pids) {
		t.Errorf("after more pods there are supervisors %v, before %v", now, pids)
	}
	after := residentOf(t, pids[0])
	t.Logf("one pod: %d KiB, %d threads; %d pods: %d KiB, %d threads", before, threads, len(pods), after, threadsOf(t, pids[0]))
	// With the race detector it is many times as much as without.
	if grown := (after - before) / more; grown > 4<<10 {
		t.Errorf("each further pod adds %d KiB", grown)
	}
	if now := threadsOf(t, pids[0]); now > threads+2*more {
		t.Errorf("%d threads have become %d", threads, now)
	}
	for _, p := range pods {
		if s := parentOf(t, pidOf(t, d, p.id)); s != pids[0] {
			t.Errorf("the parent of pod %s is %d", p.id, s)
		}
		if err := removePod(d, p.id); err != nil {
			t.Error(err)
		}
	}
	eventually(t, soon, func() error {
		if left := supervisors(t, d); len(left) > 0 {
			return fmt.Errorf("without pods there are supervisors %v", left)
		}
		return nil
	})
	if left, err := filepath.Glob(filepath.Join(d.Dir, "s", "gantry-*")); err != nil || len(left) > 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}

func residentOf(t *testing.T, pid int) int { return statusNumber(t, pid, "VmRSS") }
func threadsOf(t *testing.T, pid int) int  { return statusNumber(t, pid, "Threads") }

// TestRTH_14_SupervisorPerPod: by its other name our shim has a process for each pod.
// The end of one is the matter of its pod alone, which goes on too.
func TestRTH_14_SupervisorPerPod(t *testing.T) {
	oursAlone(t, "tasks that outlive their shim")
	t.Parallel()
	for _, sandboxer := range []string{"shim", "podsandbox"} {
		t.Run(sandboxer, func(t *testing.T) {
			t.Parallel()
			d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
				addHandler(in, c, "apart", daemon.Config{"runtime_type": "io.containerd.gantry-pod.v2", "sandboxer": sandboxer})
			}))
			one := supervisedPod(d, "apart", "one")
			first, steady := one.wait(t, d, 5), one.run(d, daemon.ContainerConfig("steady", plain(t, d)))
			of := supervisors(t, d)
			two := supervisedPod(d, "apart", "two")
			second := two.wait(t, d, 6)
			all := supervisors(t, d)
			if len(of) != 1 || len(all) != 2 {
				t.Fatalf("one pod has supervisors %v, two have %v", of, all)
			}
			kill(t, of[0])
			first.exit(t)
			second.exit(t)
			for id, code := range map[string]int32{first.id: 5, second.id: 6} {
				if s := waitExited(t, d, id); s.ExitCode != code {
					t.Errorf("code %d, want %d", s.ExitCode, code)
				}
			}
			if got := sh(d, steady, "echo here"); got != "here" {
				t.Errorf("the other container says %q", got)
			}
			later := one.run(d, daemon.ContainerConfig("later", plain(t, d)))
			now := supervisors(t, d)
			if len(now) != 2 || slices.Contains(now, of[0]) {
				t.Errorf("supervisors are %v, were %v", now, all)
			}
			d.Kill()
			d.Up()
			for _, id := range []string{steady, later} {
				if got := sh(d, id, "echo here"); got != "here" {
					t.Errorf("after a restart of the daemon a container says %q", got)
				}
			}
			if err := removePod(d, two.id); err != nil {
				t.Error(err)
			}
			eventually(t, soon, func() error {
				if left := supervisors(t, d); len(left) != 1 {
					return fmt.Errorf("one pod has supervisors %v", left)
				}
				return nil
			})
			if err := removePod(d, one.id); err != nil {
				t.Error(err)
			}
			noSupervisor(t, d)
			nothingLeft(t, d)
		})
	}
}

// TestRTH_08_StockContainerd: our shim works for a containerd that knows nothing of
// it, by ctr and as a handler of its own CRI service whose table has only another
// runtime_type.
func TestRTH_08_StockContainerd(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Stock(), daemon.Edit(withGantry))
	images.Load(t, d.Client(), daemon.PauseImage, images.MustBuild(images.Spec{Entrypoint: []string{"sleep", "1000000"}}))
	ref := images.Serve(t).Push(t, "app:v1", images.MustBuild(images.Spec{}))
	if _, err := d.Images().PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Fatal(err)
	}
	if out := ctr(t, d, "run", "--rm", "--runtime", "io.containerd.gantry.v2", ref, "once", "sh", "-c", "echo hello from ctr"); !strings.HasSuffix(out, "hello from ctr\n") {
		t.Errorf("ctr says %q", out)
	}
	ctr(t, d, "run", "-d", "--runtime", "io.containerd.gantry.v2", ref, "stays", "sleep", "1000000")
	if out := ctr(t, d, "task", "exec", "--exec-id", "e", "stays", "sh", "-c", "echo in it"); !strings.HasSuffix(out, "in it\n") {
		t.Errorf("exec says %q", out)
	}
	if out := ctr(t, d, "task", "metrics", "stays"); !strings.Contains(out, "pids.current") {
		t.Errorf("metrics are %q", out)
	}
	config := d.PodConfig("web")
	p := pod{d.RunPodWith(config, "gantry"), config}
	id := p.run(d, daemon.ContainerConfig("main", ref, "sh", "-c", "trap 'exit 9' TERM; touch /tmp/ready; while :; do sleep 0.1; done"))
	waitFile(t, d, id, "/tmp/ready")
	if got := d.Exec(id, "hostname"); got != "web\n" {
		t.Errorf("exec gave %q", got)
	}
	d.Kill()
	d.Up()
	if n := len(supervisors(t, d)); n != 1 {
		t.Errorf("there are %d supervisors", n)
	}
	a := taskAPI(t, d, id)
	a.is(client.Running)
	if err := stopContainer(d, id, 60); err != nil {
		t.Error(err)
	}
	if s := waitExited(t, d, id); s.ExitCode != 9 {
		t.Errorf("code %d", s.ExitCode)
	}
	ctr(t, d, "task", "rm", "-f", "stays")
	ctr(t, d, "container", "rm", "stays")
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
}
