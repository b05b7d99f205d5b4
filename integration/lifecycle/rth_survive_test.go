package lifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// supervised are the handlers of our own shim, with and without a pause process.
var supervised = []string{"gantry", "pinned"}

func supervisedPod(d *daemon.Daemon, handler, name string, edits ...func(*cri.PodSandboxConfig)) pod {
	config := d.PodConfig(name)
	for _, edit := range edits {
		edit(config)
	}
	return pod{d.RunPodWith(config, handler), config}
}

// alive fails the test unless a container runs as the process that it has had, and
// can be entered, and its pod is ready.
func (p pod) alive(t *testing.T, d *daemon.Daemon, ctr string, pid int) {
	t.Helper()
	if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_READY {
		t.Errorf("pod %s is %s", p.config.Metadata.Name, s.State)
	}
	if s := containerStatus(t, d, ctr); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("container %s is %s, code %d", s.Metadata.Name, s.State, s.ExitCode)
	}
	if now := pidOf(t, d, ctr); now != pid {
		t.Errorf("the container is process %d and was %d", now, pid)
	}
	eventually(t, soon, func() error {
		if out, code := tryExec(t, d, ctr, "echo", "here"); out != "here\n" || code != 0 {
			return fmt.Errorf("exec gives %q, %d", out, code)
		}
		return nil
	})
}

// TestRTH_12_SupervisorDies: pods and containers outlive the supervisor, alone and
// with the daemon. How a container ended is known and told once, whenever it was.
func TestRTH_12_SupervisorDies(t *testing.T) { supervisorDies(t) }

func supervisorDies(t *testing.T, opts ...daemon.Option) {
	oursAlone(t, "tasks that outlive their shim")
	t.Parallel()
	for _, handler := range supervised {
		t.Run(handler, func(t *testing.T) {
			t.Parallel()
			d := start(t, append(opts, daemon.Edit(withGantry), daemon.Edit(withPinned))...)
			p := supervisedPod(d, handler, "outlives", inNamespace("rth-12"))
			runs := p.run(d, daemon.ContainerConfig("steady", plain(t, d), "sh", "-c", "while sleep 0.05; do date +%s.%N; done"))
			ends := p.run(d, daemon.ContainerConfig("ended", plain(t, d), "sh", "-c", "exit 7"))
			waitExited(t, d, ends)
			first, second := p.wait(t, d, 9), p.wait(t, d, 11)
			unstarted, err := p.create(d, daemon.ContainerConfig("unstarted", plain(t, d)))
			if err != nil {
				t.Fatal(err)
			}
			pid, l := pidOf(t, d, runs), logEvents(t, d, "rth-12")
			uts := nsOf(t, pid, "uts")

			kill(t, supervisors(t, d)[0])
			first.exit(t)
			if s := waitExited(t, d, first.id); s.ExitCode != 9 || s.Reason == "OOMKilled" {
				t.Errorf("code %d, %s", s.ExitCode, s.Reason)
			}
			p.alive(t, d, runs, pid)
			if s := containerStatus(t, d, ends); s.ExitCode != 7 {
				t.Errorf("a container that had ended has code %d", s.ExitCode)
			}
			l.types(t, first.id, stoppedEvent)
			if err := startContainer(d, unstarted); err != nil {
				t.Error(err)
			}
			later := pidOf(t, d, unstarted)
			if ns := nsOf(t, later, "uts"); ns != uts {
				t.Errorf("a container that was started later is in %s, the pod in %s", ns, uts)
			}
			written := logText(t, containerStatus(t, d, runs).LogPath, "stdout")
			eventually(t, soon, func() error {
				if now := logText(t, containerStatus(t, d, runs).LogPath, "stdout"); len(now) == len(written) {
					return errors.New("the log does not go on")
				}
				return nil
			})

			old := supervisors(t, d)
			d.Kill()
			kill(t, old[0])
			second.exit(t)
			d.Up()
			if s := waitExited(t, d, second.id); s.ExitCode != 11 {
				t.Errorf("code %d", s.ExitCode)
			}
			p.alive(t, d, runs, pid)
			p.alive(t, d, unstarted, later)
			if n := len(l.of(runs)); n > 0 {
				t.Errorf("of a container that runs %d events are told", n)
			}
			if err := stopContainer(d, runs, 0); err != nil {
				t.Error(err)
			}
			if s := waitExited(t, d, runs); s.ExitCode != 137 {
				t.Errorf("code %d", s.ExitCode)
			}
			wholeLife(t, d, p)
			if err := removePod(d, p.id); err != nil {
				t.Error(err)
			}
			noSupervisor(t, d)
			nothingLeft(t, d)
		})
	}
}

// TestRTH_12_OutOfMemory: that the kernel killed a container for its memory is known,
// and told once, whoever was dead meanwhile.
func TestRTH_12_OutOfMemory(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(withGantry), daemon.Edit(withPinned))
	limited := func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 24 << 20}
	}
	for _, handler := range supervised {
		p := supervisedPod(d, handler, "hungry-"+handler, inNamespace("rth-12-oom"))
		for _, victims := range []string{"supervisor", "daemon", "both"} {
			eats := p.waitThen(t, d, victims, "exec tail /dev/zero", limited)
			l := logEvents(t, d, "rth-12-oom")
			crash(t, d, victims, eats)
			if s := waitExited(t, d, eats.id); s.ExitCode != 137 || s.Reason != "OOMKilled" {
				t.Errorf("%s, %s: code %d, %s", handler, victims, s.ExitCode, s.Reason)
			}
			if victims == "supervisor" {
				l.types(t, eats.id, stoppedEvent)
			}
		}
	}
}

// TestRTH_12_SandboxesSurvive: pods without a container outlive the supervisor as
// well, with a process and without, in the same namespaces; and the end of a pod's
// process is that of the pod, also when no supervisor was there.
func TestRTH_12_SandboxesSurvive(t *testing.T) { sandboxesSurvive(t) }

func sandboxesSurvive(t *testing.T, opts ...daemon.Option) {
	oursAlone(t, "tasks that outlive their shim")
	t.Parallel()
	d := start(t, append(opts, daemon.Edit(withPinned))...)
	common := &cri.NamespaceOption{Pid: cri.NamespaceMode_POD}
	apart, together, doomed := pinnedPod(d, "apart"), pinnedPod(d, "together", withNamespaces(common)), pinnedPod(d, "doomed", withNamespaces(common))
	uts, holder := pinnedAs(t, d, apart.id, "uts"), pidOfPod(t, d, together.id)
	victim := supervisors(t, d)[0]
	kill(t, victim)
	kill(t, pidOfPod(t, d, doomed.id))
	eventually(t, soon, func() error {
		if s := podStatus(t, d, doomed.id); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
			return fmt.Errorf("a pod without its process is %s", s.State)
		}
		return nil
	})
	for _, p := range []pod{apart, together} {
		if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_READY {
			t.Errorf("pod %s is %s", p.config.Metadata.Name, s.State)
		}
	}
	if now := pidOfPod(t, d, together.id); now != holder {
		t.Errorf("the pod's process is %d and was %d", now, holder)
	}
	one := apart.run(d, daemon.ContainerConfig("main", plain(t, d)))
	if ns := nsOf(t, pidOf(t, d, one), "uts"); ns != uts {
		t.Errorf("a container is in %s, the pod in %s", ns, uts)
	}
	two := together.run(d, inNamespaces(daemon.ContainerConfig("main", plain(t, d)), common))
	if nsOf(t, pidOf(t, d, two), "pid") != nsOf(t, holder, "pid") {
		t.Error("a container is not in the pod's process namespace")
	}
	for _, p := range []pod{apart, together, doomed} {
		if err := removePod(d, p.id); err != nil {
			t.Error(err)
		}
	}
	noSupervisor(t, d)
	nothingLeft(t, d)
}

// unmade makes the supervisor's record of a container that of one which was not
// made to the end.
func unmade(t *testing.T, d *daemon.Daemon, ctr string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(d.Dir, "s", "gantry-*.d", ctr, "record.json"))
	if err != nil || len(files) != 1 {
		t.Fatalf("records of the container: %v, %v", files, err)
	}
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	var record map[string]any
	if err := json.Unmarshal(data, &record); err != nil {
		t.Fatal(err)
	}
	record["Pid"] = 0
	if data, err = json.Marshal(record); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(files[0], data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestRTH_11_SupervisorForgets: a container that the next supervisor does not know
// is dead, with all its processes, and its pod's others live.
func TestRTH_11_SupervisorForgets(t *testing.T) {
	oursAlone(t, "tasks that outlive their shim")
	t.Parallel()
	d := start(t, daemon.Edit(withGantry))
	p := gantryPod(d, "forgetful", hostNetwork)
	lost, kept := p.run(d, onHost(daemon.ContainerConfig("lost", plain(t, d)))), p.run(d, onHost(daemon.ContainerConfig("kept", plain(t, d))))
	gone, pid := pidOf(t, d, lost), pidOf(t, d, kept)
	unmade(t, d, lost)
	kill(t, supervisors(t, d)[0])
	if s := waitExited(t, d, lost); s.ExitCode != 137 {
		t.Errorf("code %d", s.ExitCode)
	}
	waitGone(t, gone)
	p.alive(t, d, kept, pid)
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
	noSupervisor(t, d)
	nothingLeft(t, d)
}

// TestRTH_12_Crash kills the supervisor, the daemon or both at random moments of
// pods' lives. What runs is not touched, each code is the true one, and in the end
// there is nothing.
func TestRTH_12_Crash(t *testing.T) { supervisorCrashes(t, crashCycles()/len(supervised)) }

// counting says all numbers, some hundreds in a second.
const counting = "n=0; while :; do for i in 1 2 3 4 5 6 7 8 9 10; do echo $n; n=$((n+1)); done; sleep 0.02; done"

// counted fails the test unless a log has the numbers, each once and in order.
func counted(t *testing.T, path string) {
	t.Helper()
	next := 0
	for line := range strings.Lines(logText(t, path, "stdout")) {
		if line != fmt.Sprintln(next) {
			t.Fatalf("the log has %q in the place of %d", line, next)
		}
		next++
	}
	t.Logf("%d lines, none lost and none twice", next)
	if next == 0 {
		t.Error("the log is empty")
	}
}

// supervisorCrashes has as many crashes meet each handler.
func supervisorCrashes(t *testing.T, cycles int, opts ...daemon.Option) {
	oursAlone(t, "tasks that outlive their shim")
	t.Parallel()
	for _, handler := range supervised {
		t.Run(handler, func(t *testing.T) {
			t.Parallel()
			d := start(t, append(opts, daemon.Edit(withGantry), daemon.Edit(withPinned), daemon.Set(handler, "plugins", daemon.RuntimePlugin, "containerd", "default_runtime_name"))...)
			img := plain(t, d)
			p := supervisedPod(d, handler, "steady")
			steady := p.run(d, daemon.ContainerConfig("steady", img))
			pid := pidOf(t, d, steady)
			counts := p.run(d, daemon.ContainerConfig("counts", img, "sh", "-c", counting))
			typed := daemon.ContainerConfig("typed", img, "sh", "-c", counting)
			typed.Tty, typed.Stdin = true, true
			terminal := p.run(d, typed)
			at := pidOf(t, d, terminal)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			random := rand.New(rand.NewPCG(seed, 0))
			for i := range cycles {
				ending, code := p.wait(t, d, 1+i%100), 1+i%100
				lives := make(chan error, 1)
				go func() { lives <- life(d, fmt.Sprint("cycle", i), img) }()
				entered := make(chan error, 1)
				go func() { entered <- enter(d, steady) }()
				if random.IntN(2) == 0 {
					ending.exit(t)
				}
				timer := time.NewTimer(time.Duration(random.Int64N(int64(cycleTime))))
				<-timer.C
				victims := []string{"supervisor", "daemon", "both"}[random.IntN(3)]
				crash(t, d, victims, ending)
				if err := errors.Join(<-lives, <-entered); err != nil {
					t.Fatalf("cycle %d, %s: %v\n%s", i, victims, err, d.Tail(60))
				}
				if s := waitExited(t, d, ending.id); int(s.ExitCode) != code {
					t.Errorf("code %d, want %d", s.ExitCode, code)
				}
				p.alive(t, d, steady, pid)
				if now := pidOf(t, d, terminal); now != at {
					t.Errorf("the container with a terminal is process %d and was %d", now, at)
				}
				if err := removeContainer(d, ending.id); err != nil {
					t.Error(err)
				}
				if t.Failed() {
					t.Fatalf("after cycle %d, %s\n%s", i, victims, d.Tail(80))
				}
			}
			p.alive(t, d, terminal, at)
			if err := stopContainer(d, counts, 0); err != nil {
				t.Error(err)
			}
			counted(t, waitExited(t, d, counts).LogPath)
			if err := removePod(d, p.id); err != nil {
				t.Error(err)
			}
			noSupervisor(t, d)
			nothingLeft(t, d)
		})
	}
}

// enter has a command run that a crash may meet: that fails then, and in time.
func enter(d *daemon.Daemon, ctr string) error {
	begun := time.Now()
	_, err := d.Runtime().ExecSync(context.Background(), &cri.ExecSyncRequest{ContainerId: ctr, Cmd: []string{"sleep", "0.5"}, Timeout: 60})
	if took := time.Since(begun); took > soon {
		return fmt.Errorf("a command that a crash met ended after %s: %w", took, err)
	}
	return nil
}

// crash kills what is named; the container ends by itself while that is dead, if
// it has not ended before.
func crash(t *testing.T, d *daemon.Daemon, victims string, ending waiting) {
	t.Helper()
	pids := supervisors(t, d)
	if victims != "supervisor" {
		d.Kill()
	}
	if victims != "daemon" {
		for _, pid := range pids {
			kill(t, pid)
		}
	}
	ending.exit(t)
	if victims != "supervisor" {
		d.Up()
	}
}

// TestRTH_12_Upgrade: another program in the place of the shim's takes over what the
// running one has, by the operator's command.
func TestRTH_12_Upgrade(t *testing.T) { upgrades(t) }

func upgrades(t *testing.T, opts ...daemon.Option) {
	oursAlone(t, "tasks that outlive their shim")
	t.Parallel()
	var path string
	text, err := os.ReadFile(inBin(t, "containerd-shim-gantry-v2"))
	if err != nil {
		t.Fatal(err)
	}
	install := func() {
		must(os.MkdirAll(filepath.Dir(path), 0o755))
		must(os.WriteFile(path+".new", text, 0o755))
		must(os.Rename(path+".new", path))
	}
	d := start(t, append(opts, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		path = filepath.Join(in.Dir, "installed", "containerd-shim-gantry-v2")
		install()
		addHandler(in, c, "installed", daemon.Config{"runtime_type": "io.containerd.gantry.v2", "runtime_path": path})
	}))...)
	p := supervisedPod(d, "installed", "upgraded")
	runs, ending := p.run(d, daemon.ContainerConfig("steady", plain(t, d))), p.wait(t, d, 5)
	pid, old := pidOf(t, d, runs), supervisors(t, d)
	upgrade := func() {
		t.Helper()
		out, err := exec.Command(inBin(t, "gantry"), "supervisor", "upgrade", "--address", d.Socket).CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Fatal(err)
		}
	}
	upgrade()
	if now := supervisors(t, d); !slices.Equal(now, old) {
		t.Errorf("without another program supervisors are %v, before %v", now, old)
	}
	install()
	upgrade()
	now := supervisors(t, d)
	if len(now) != 1 || now[0] == old[0] {
		t.Fatalf("supervisors are %v, before %v", now, old)
	}
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", now[0])); err != nil || exe != path {
		t.Errorf("the supervisor runs %s, %v", exe, err)
	}
	p.alive(t, d, runs, pid)
	ending.exit(t)
	if s := waitExited(t, d, ending.id); s.ExitCode != 5 {
		t.Errorf("code %d", s.ExitCode)
	}
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
	noSupervisor(t, d)
	nothingLeft(t, d)
}
