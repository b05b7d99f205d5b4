package lifecycle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/client"
	coreevents "github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// taskClient is a container's task by containerd's own API, as ctr uses it.
type taskClient struct {
	client.Task
	t         *testing.T
	d         *daemon.Daemon
	container client.Container
	ctx       context.Context
}

func taskAPI(t *testing.T, d *daemon.Daemon, id string) taskClient {
	t.Helper()
	ctx := namespaced(t.Context())
	c, err := d.Client().LoadContainer(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	task, err := c.Task(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	return taskClient{task, t, d, c, ctx}
}

func (a taskClient) must(what string, err error) {
	a.t.Helper()
	if err != nil {
		a.t.Fatalf("%s: %v", what, err)
	}
}

func (a taskClient) is(want client.ProcessStatus) {
	a.t.Helper()
	s, err := a.Status(a.ctx)
	if err != nil || s.Status != want {
		a.t.Errorf("the task is %v, %v, want %s", s, err, want)
	}
}

// ended is the exit code of a process.
func ended(t *testing.T, exit <-chan client.ExitStatus) uint32 {
	t.Helper()
	select {
	case s := <-exit:
		if s.Error() != nil {
			t.Fatal(s.Error())
		}
		return s.ExitCode()
	case <-time.After(soon):
		t.Fatal("the process does not end")
		return 0
	}
}

// exec starts a shell script beside the first process.
func (a taskClient) exec(id, script, input string) (p client.Process, exit <-chan client.ExitStatus, out *bytes.Buffer) {
	a.t.Helper()
	spec, err := a.container.Spec(a.ctx)
	a.must("read specification", err)
	process := *spec.Process
	process.Args = []string{"sh", "-c", script}
	out = &bytes.Buffer{}
	p, err = a.Exec(a.ctx, id, &process, cio.NewCreator(cio.WithStreams(strings.NewReader(input), out, io.Discard), cio.WithFIFODir(a.t.TempDir())))
	a.must("exec", err)
	exit, err = p.Wait(a.ctx)
	a.must("wait for exec", err)
	a.must("start exec", p.Start(a.ctx))
	return p, exit, out
}

// TestRTH_07_TaskAPI: the task of a container does by containerd's API what it
// does for any other client; so does that of a shim which was there before the
// daemon.
func TestRTH_07_TaskAPI(t *testing.T) {
	t.Parallel()
	d := start(t)
	tasked(t, d, runPod(d, "tasked", hostNetwork))
}

// tasked has a task do all that it can, before and after restarts of the daemon.
func tasked(t *testing.T, d *daemon.Daemon, p pod) {
	t.Helper()
	ctr := p.run(d, onHost(daemon.ContainerConfig("main", plain(t, d), "sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.1; done")))
	begun(t, pidOf(t, d, ctr))
	for i, when := range []string{"of this daemon", "of an earlier daemon"} {
		a := taskAPI(t, d, ctr)
		if s := containerStatus(t, d, ctr); s.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Fatalf("a task %s is %s", when, s.State)
		}
		a.is(client.Running)
		a.execs()
		a.freezes()
		a.updates(int64(64+i) << 20)
		a.checkpoints()
		a.another(p, filepath.Join(d.CgroupParent, "another-task"))
		a.outlivesShutdown()
		d.Kill()
		d.Up()
	}
	a := taskAPI(t, d, ctr)
	a.must("kill", a.Kill(a.ctx, syscall.SIGTERM))
	if s := waitExited(t, d, ctr); s.ExitCode != 9 {
		t.Errorf("killed by the API, the container has code %d", s.ExitCode)
	}
}

// execs: exec, start, wait, kill, pids, close of the input, resize, delete.
func (a taskClient) execs() {
	a.t.Helper()
	p, exit, out := a.exec("ends", "read line; echo got $line; cat; exit 3", "in")
	a.must("close input", p.CloseIO(a.ctx, client.WithStdinCloser))
	code := ended(a.t, exit)
	gone, err := p.Delete(a.ctx)
	if code != 3 || err != nil || gone.ExitCode() != 3 || out.String() != "got in\n" {
		a.t.Errorf("exec: code %d, deleted with %v, %v, output %q", code, gone, err, out)
	}
	p, exit, _ = a.exec("killed", "sleep 1000000", "")
	list, err := a.Pids(a.ctx)
	var pids []uint32
	for _, info := range list {
		pids = append(pids, info.Pid)
	}
	if err != nil || !slices.Contains(pids, a.Pid()) || !slices.Contains(pids, p.Pid()) {
		a.t.Errorf("of %d and %d there are %v, %v", a.Pid(), p.Pid(), pids, err)
	}
	if err := p.Resize(a.ctx, 80, 25); err != nil {
		a.t.Errorf("resize of a process without a terminal: %v", err)
	}
	a.must("kill exec", p.Kill(a.ctx, syscall.SIGKILL))
	if code := ended(a.t, exit); code != 137 {
		a.t.Errorf("killed with code %d", code)
	}
	if _, err := p.Delete(a.ctx); err != nil {
		a.t.Errorf("delete exec: %v", err)
	}
	if _, err := a.LoadProcess(a.ctx, "killed", nil); err == nil {
		a.t.Error("a deleted exec is still there")
	}
}

// freezes: pause and resume.
func (a taskClient) freezes() {
	a.t.Helper()
	a.must("pause", a.Pause(a.ctx))
	a.is(client.Paused)
	a.must("resume", a.Resume(a.ctx))
	a.is(client.Running)
}

// updates: update and stats.
func (a taskClient) updates(limit int64) {
	a.t.Helper()
	a.must("update", a.Update(a.ctx, client.WithResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}})))
	if got := readInt(a.t, memoryLimit(cgroupPath(a.t, int(a.Pid()), "memory"))); got != limit {
		a.t.Errorf("the memory limit is %d, want %d", got, limit)
	}
	m, err := a.Metrics(a.ctx)
	if err != nil || m.ID != a.ID() || len(m.Data.GetValue()) == 0 || !strings.Contains(m.Data.GetTypeUrl(), "cgroups") {
		a.t.Errorf("stats are %v, %v", m, err)
	}
}

// checkpoints: without CRIU a checkpoint fails and hurts nobody.
func (a taskClient) checkpoints() {
	a.t.Helper()
	if _, err := exec.LookPath("criu"); err == nil {
		return
	}
	if _, err := a.Checkpoint(a.ctx, client.WithCheckpointImagePath(a.t.TempDir())); err == nil ||
		!strings.Contains(err.Error(), "criu") && !strings.Contains(err.Error(), "unknown command checkpoint") { // crun may be built without
		a.t.Errorf("checkpoint without criu: %v", err)
	}
	a.is(client.Running)
}

// another: create, start, wait and delete of a task in the pod's shim that is
// no container of Kubernetes.
func (a taskClient) another(p pod, group string) {
	a.t.Helper()
	root := a.t.TempDir()
	text, err := os.ReadFile("/bin/busybox")
	a.must("read busybox", errors.Join(err, os.WriteFile(path.Join(root, "busybox"), text, 0o755), os.Chmod(root, 0o755),
		os.Mkdir(path.Join(root, "proc"), 0o755), os.Mkdir(path.Join(root, "dev"), 0o755)))
	spec, err := a.container.Spec(a.ctx)
	a.must("read specification", err)
	info, err := a.container.Info(a.ctx)
	a.must("read container", err)
	spec.Root = &specs.Root{Path: root}
	spec.Process.Args = []string{"/busybox", "sh", "-c", "exit 4"}
	spec.Linux.CgroupsPath = group
	spec.Mounts = []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}}
	c, err := a.d.Client().NewContainer(a.ctx, "another", client.WithSpec(spec), client.WithRuntime(info.Runtime.Name, info.Runtime.Options), client.WithSandbox(p.id))
	a.must("make a container", err)
	task, err := c.NewTask(a.ctx, cio.NullIO)
	a.must("create a task", err)
	if parent := parentOf(a.t, int(task.Pid())); parent != parentOf(a.t, int(a.Pid())) {
		a.t.Errorf("the other task's shim is %d", parent)
	}
	if s, err := task.Status(a.ctx); err != nil || s.Status != client.Created {
		a.t.Errorf("before its start it is %v, %v", s, err)
	}
	exit, err := task.Wait(a.ctx)
	a.must("wait", err)
	a.must("start", task.Start(a.ctx))
	code := ended(a.t, exit)
	gone, err := task.Delete(a.ctx)
	if code != 4 || err != nil || gone.ExitCode() != 4 {
		a.t.Errorf("code %d, deleted with %v, %v", code, gone, err)
	}
	a.must("delete the container", c.Delete(a.ctx))
}

// outlivesShutdown: a shim that has tasks does not follow a request to end.
func (a taskClient) outlivesShutdown() {
	a.t.Helper()
	shim := parentOf(a.t, int(a.Pid()))
	c := taskv3.NewTTRPCTaskClient(shimClient(a.t, endpointOf(a.t, a.d, a.ID())))
	if _, err := c.Shutdown(a.ctx, &taskv3.ShutdownRequest{ID: a.ID()}); err != nil {
		a.t.Errorf("shutdown: %v", err)
	}
	if got, err := c.Connect(a.ctx, &taskv3.ConnectRequest{ID: a.ID()}); err != nil || int(got.ShimPid) != shim {
		a.t.Errorf("after a shutdown the shim says %v, %v", got, err)
	}
}

// ctr runs containerd's command for the daemon.
func ctr(t *testing.T, d *daemon.Daemon, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), inBin(t, "ctr"), append([]string{"-a", d.Socket, "-n", daemon.Namespace}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("ctr %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// exitsOf collects the ends of a container's processes until it has seen n.
func exitsOf(t *testing.T, d *daemon.Daemon, id string, n int) (ended func() []*events.TaskExit) {
	t.Helper()
	ctx, cancel := context.WithTimeout(namespaced(t.Context()), soon)
	t.Cleanup(cancel)
	stream, failed := d.Client().Subscribe(ctx, `topic=="/tasks/exit"`, `topic=="`+readyTopic+`"`)
	awaitSubscribed(ctx, t, d, stream)
	return func() (list []*events.TaskExit) {
		t.Helper()
		for len(list) < n {
			select {
			case e := <-stream:
				if e.Topic == readyTopic {
					continue
				}
				var exit events.TaskExit
				if err := typeurl.UnmarshalTo(e.Event, &exit); err != nil {
					t.Fatal(err)
				}
				if exit.ContainerID == id {
					list = append(list, &exit)
				}
			case err := <-failed:
				t.Fatalf("after %d exits: %v", len(list), err)
			}
		}
		return list
	}
}

// readyTopic is of events that only say that a subscription is there.
const readyTopic = "/gantry.test/ready"

// awaitSubscribed sends events until one arrives: a subscription begins in the
// background.
func awaitSubscribed(ctx context.Context, t *testing.T, d *daemon.Daemon, stream <-chan *coreevents.Envelope) {
	t.Helper()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		if err := d.Client().EventService().Publish(ctx, readyTopic, &events.TaskStart{}); err != nil {
			t.Fatal(err)
		}
		select {
		case <-stream:
			return
		case <-ctx.Done():
			t.Fatal("no event arrives")
		case <-tick.C:
		}
	}
}

// TestRTH_13_ExitOrder: the end of a container's first process is told after
// those of all others that were run in it.
func TestRTH_13_ExitOrder(t *testing.T) {
	t.Parallel()
	d := shared(t)
	for _, mode := range []cri.NamespaceMode{cri.NamespaceMode_CONTAINER, cri.NamespaceMode_NODE} {
		p := runPod(d, "ordered", hostNetwork, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = mode })
		c := onHost(daemon.ContainerConfig("main-"+strings.ToLower(mode.String()), plain(t, d)))
		c.Linux.SecurityContext.NamespaceOptions.Pid = mode
		id := p.run(d, c)
		a := taskAPI(t, d, id)
		const execs = 4
		for i := range execs {
			a.exec(fmt.Sprint("stays", i), "sleep 1000000", "")
		}
		ended := exitsOf(t, d, id, execs+1)
		if err := stopContainer(d, id, 0); err != nil {
			t.Fatal(err)
		}
		list := ended()
		for i, exit := range list {
			if first := exit.ID == id; first != (i == execs) || exit.ExitStatus != 137 {
				t.Errorf("%s: end %d is that of %q, code %d", mode, i, exit.ID, exit.ExitStatus)
			}
		}
	}
}

// TestRTH_13_Reaping: what a container leaves is reaped by its shim, and the ends
// of short commands are told whole, also when they get the number of one before.
// It is not parallel: it has the machine give out numbers again.
func TestRTH_13_Reaping(t *testing.T) {
	d := shared(t)
	hostPids := withNamespaces(&cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_NODE})
	p := runPod(d, "reaped", hostPids, func(c *cri.PodSandboxConfig) { c.Hostname = "" })
	c := onHost(daemon.ContainerConfig("main", plain(t, d)))
	c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_NODE
	id := p.run(d, c)
	shim := parentOf(t, pidOf(t, d, id))

	var orphan int
	if _, err := fmt.Sscan(sh(d, id, "sh -c 'sleep 1000000 >/dev/null 2>&1 & echo $!'"), &orphan); err != nil {
		t.Fatal(err)
	}
	if parent := parentOf(t, orphan); parent != shim {
		t.Errorf("an orphan has parent %d, the shim is %d", parent, shim)
	}
	kill(t, orphan)
	const commands = 80
	numbers := map[int]int{}
	for i := range commands {
		again(t, shim)
		out, code := tryExec(t, d, id, "sh", "-c", fmt.Sprintf("echo $$; exit %d", i))
		var pid int
		if _, err := fmt.Sscan(out, &pid); err != nil || code != int32(i) {
			t.Fatalf("command %d: code %d, output %q, %v", i, code, out, err)
		}
		numbers[pid]++
	}
	most := 0
	for _, n := range numbers {
		most = max(most, n)
	}
	t.Logf("%d commands had %d numbers, one of them %d times", commands, len(numbers), most)
	if most < 3 {
		t.Errorf("no number came again: %v", numbers)
	}
	eventually(t, soon, func() error { return noZombies(shim) })
}

// again has the kernel give out the numbers after that one next.
func again(t *testing.T, pid int) {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/kernel/pid_max")
	if err != nil {
		t.Fatal(err)
	}
	limit, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	last := pid + 1000
	if last >= limit { // the kernel begins anew too, after the low ones
		last -= limit - 1000
	}
	if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", fmt.Append(nil, last), 0); err != nil {
		t.Fatal(err)
	}
}

// noZombies looks for children of a process that it has not waited for.
func noZombies(parent int) error {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return err
	}
	for _, f := range stats {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // ended meanwhile
		}
		rest := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		if rest[0] == "Z" && rest[1] == fmt.Sprint(parent) {
			return fmt.Errorf("zombie: %s", text)
		}
	}
	return nil
}

// TestRTH_28_Pause: an operator freezes a container, which counts as running,
// and can be stopped and removed all the same.
func TestRTH_28_Pause(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "frozen", hostNetwork)
	counts := func(name string) (id string, count func() int) {
		dir := t.TempDir()
		c := onHost(daemon.ContainerConfig(name, plain(t, d), "sh", "-c", "trap 'exit 5' TERM; mkfifo /beats/never; exec 3<>/beats/never; while :; do echo beat >>/beats/file; read -t 0.02 x <&3; done"))
		c.Mounts = []*cri.Mount{{ContainerPath: "/beats", HostPath: dir}}
		id = p.run(d, c)
		return id, func() int {
			text, err := os.ReadFile(filepath.Join(dir, "file"))
			if err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
			return len(text)
		}
	}
	beats := func(count func() int) {
		t.Helper()
		before := count()
		eventually(t, soon, func() error {
			if count() == before {
				return errors.New("the container stands still")
			}
			return nil
		})
	}
	resumed, count := counts("resumed")
	stopped, _ := counts("stopped")
	removed, _ := counts("removed")
	beats(count)
	for _, id := range []string{resumed, stopped, removed} {
		ctr(t, d, "tasks", "pause", id)
		if list := ctr(t, d, "tasks", "ls"); !slices.ContainsFunc(strings.Split(list, "\n"), func(line string) bool {
			return strings.Contains(line, id) && strings.Contains(line, "PAUSED")
		}) {
			t.Errorf("%s is not paused:\n%s", id, list)
		}
		if s := containerStatus(t, d, id); s.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("a frozen container is %s", s.State)
		}
	}
	before, tick := count(), time.NewTicker(poll)
	defer tick.Stop()
	for range 10 {
		<-tick.C
		if after := count(); after != before {
			t.Errorf("a frozen container goes on: %d after %d", after, before)
		}
	}
	if _, err := d.Runtime().ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: resumed, Cmd: []string{"true"}, Timeout: 20}); err == nil {
		t.Error("a command runs in a frozen container")
	}
	ctr(t, d, "tasks", "resume", resumed)
	beats(count)
	if err := stopContainer(d, resumed, 30); err != nil {
		t.Error(err)
	}
	if s := waitExited(t, d, resumed); s.ExitCode != 5 {
		t.Errorf("resumed and stopped with code %d", s.ExitCode)
	}
	if err := stopContainer(d, stopped, 1); err != nil {
		t.Error(err)
	}
	if s := waitExited(t, d, stopped); s.ExitCode != 137 {
		t.Errorf("frozen and stopped with code %d", s.ExitCode)
	}
	pid := pidOf(t, d, removed)
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
	waitGone(t, pid)
}
