package sandboxer_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/pause"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/runtime"
	"github.com/gantry-cri/gantry/plugin/runtime/runtimetest"
	"github.com/gantry-cri/gantry/plugin/runtime/shimtest"
	"github.com/gantry-cri/gantry/plugin/sandboxer"
	"github.com/gantry-cri/gantry/plugin/sandboxer/sandboxertest"
)

// pauseSpec has what a pod's specification asks of the root filesystem.
func pauseSpec(cgroup string) sandboxer.SpecFunc {
	return func(sb record.Sandbox, _ string, args []string) (*specs.Spec, error) {
		return &specs.Spec{
			Version: specs.Version,
			Process: &specs.Process{
				Args: args, Cwd: "/", NoNewPrivileges: true, User: specs.User{UID: 65535, GID: 65535},
				Capabilities: &specs.LinuxCapabilities{},
			},
			Hostname: "pod",
			Mounts: []specs.Mount{
				{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
				{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755"}},
				{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance"}},
				{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "nodev"}},
				{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
				{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
				{Destination: "/etc/resolv.conf", Type: "bind", Source: "/etc/resolv.conf", Options: []string{"bind", "ro"}},
			},
			Annotations: map[string]string{"io.kubernetes.cri.sandbox-id": sb.ID},
			Linux: &specs.Linux{
				CgroupsPath: cgroup + "/" + sb.ID,
				Namespaces: []specs.LinuxNamespace{
					{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace},
					{Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace},
				},
			},
		}, nil
	}
}

func TestPauseOnFake(t *testing.T) {
	sandboxertest.Suite(t, func(t *testing.T) sandboxertest.Subject {
		fake := runtimetest.New()
		p, err := sandboxer.NewPause(runtime.New(fake, fake), t.TempDir(), pauseSpec("/test"))
		if err != nil {
			t.Fatal(err)
		}
		return sandboxertest.Subject{
			Sandboxer: p, Context: t.Context(),
			Record: func(_ *testing.T, id string) record.Sandbox { return record.Sandbox{ID: id} },
			Exit:   func(_ *testing.T, sb record.Sandbox) { fake.Exit(sb.ID, 0) },
			Lose:   func(_ *testing.T, sb record.Sandbox) { fake.KillShim(sb.ID, true) },
			Remains: func(t *testing.T, id string) {
				if slices.Contains(fake.Known(), id) || slices.Contains(fake.Alive(), "/test/"+id) {
					t.Errorf("left of %s: tasks %v, processes %v", id, fake.Known(), fake.Alive())
				}
			},
		}
	})
}

// Whatever call fails, before or after its effect, Shutdown leaves nothing
// behind once the fault is gone, and claims nothing before.
func TestPauseFaults(t *testing.T) {
	boom := errors.New("boom")
	for _, op := range []string{"create", "pid", "start", "get", "kill", "wait", "delete", "state", "cgroupkill", "procs", "remove"} {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,%t", op, after), func(t *testing.T) {
				fake := runtimetest.New()
				p, err := sandboxer.NewPause(runtime.New(fake, fake), t.TempDir(), pauseSpec("/test"))
				if err != nil {
					t.Fatal(err)
				}
				sb := record.Sandbox{ID: "a"}
				fake.Inject(runtimetest.Fault{Op: op, Nth: 1, After: after, Err: boom})
				_, started := p.Start(t.Context(), sb)
				if err := p.Shutdown(t.Context(), sb); err == nil && len(fake.Alive()) > 0 {
					t.Errorf("shutdown (start: %v) claims success, alive: %v", started, fake.Alive())
				}
				fake.Heal()
				if err := p.Shutdown(t.Context(), sb); err != nil {
					t.Error(err)
				}
				if len(fake.Alive())+len(fake.Known()) > 0 {
					t.Errorf("alive %v, known %v", fake.Alive(), fake.Known())
				}
			})
		}
	}
}

// real is pause processes on the runc shim and runc.
type real struct {
	*shimtest.Env
	pause *sandboxer.Pause
	tasks *runtime.Tasks
	cgs   *runtime.Hierarchies
	ctx   context.Context
}

func newReal(t *testing.T) real {
	t.Helper()
	env := shimtest.New(t)
	ctx := env.Context(t)
	rt, err := env.TaskManager(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cgs, err := runtime.NewHierarchies()
	if err != nil {
		t.Fatal(err)
	}
	tasks := runtime.New(rt, cgs)
	p, err := sandboxer.NewPause(tasks, filepath.Join(env.Dir, "pause"), pauseSpec(env.Cgroup))
	if err != nil {
		t.Fatal(err)
	}
	return real{env, p, tasks, cgs, ctx}
}

func (r real) record(t *testing.T, id string) record.Sandbox {
	t.Helper()
	if err := r.Record(r.ctx, id); err != nil {
		t.Fatal(err)
	}
	return record.Sandbox{ID: id, Handler: r.Handler}
}

func (r real) remains(t *testing.T, id string) {
	t.Helper()
	if pids, err := r.cgs.Procs(r.Cgroup + "/" + id); err != nil || len(pids) > 0 {
		t.Errorf("processes of %s: %v, %v", id, pids, err)
	}
	for _, dir := range []string{filepath.Join(r.State, shimtest.Namespace, id), filepath.Join("/sys/fs/cgroup/pids", r.Cgroup, id)} {
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Errorf("%s: %v", dir, err)
		}
	}
}

func TestPauseOnRunc(t *testing.T) {
	sandboxertest.Suite(t, func(t *testing.T) sandboxertest.Subject {
		r := newReal(t)
		return sandboxertest.Subject{
			Sandboxer: r.pause, Context: r.ctx, Record: r.record, Remains: r.remains,
			Exit: func(t *testing.T, sb record.Sandbox) {
				// Until it listens, process 1 of a namespace ignores what comes
				// from within and without.
				eventually(t, "the pause process listens", func() bool { return listens(t, sb.Instance.Pid) })
				if err := unix.Kill(int(sb.Instance.Pid), unix.SIGTERM); err != nil {
					t.Fatal(err)
				}
			},
			Lose: func(t *testing.T, _ record.Sandbox) {
				if err := r.Signal(unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
			},
		}
	})
}

// Process 1 of a shared pid namespace collects the orphans of the containers.
func TestPauseReapsOrphans(t *testing.T) {
	r := newReal(t)
	sb := r.record(t, "pod")
	t.Cleanup(func() {
		if err := r.pause.Shutdown(context.WithoutCancel(r.ctx), sb); err != nil {
			t.Error(err)
		}
	})
	inst, err := r.pause.Start(r.ctx, sb)
	if err != nil {
		t.Fatal(err)
	}
	sb.Instance = inst
	if err := r.RecordSandbox(r.ctx, "pod"); err != nil {
		t.Fatal(err)
	}
	// Each subshell leaves a sleep behind that ends long before the container.
	stop := r.startInPod(t, sb, "for i in 1 2 3 4 5; do (busybox sleep 1 &); done; exec busybox sleep 1000")
	defer stop()
	adopted := func() bool { return len(children(t, int(inst.Pid))) > 0 }
	eventually(t, "the pause process has adopted the orphans", adopted)
	eventually(t, "the pause process has collected them", func() bool { return !adopted() })
	if alive, err := r.pause.Alive(r.ctx, sb); err != nil || !alive {
		t.Errorf("alive: %t, %v", alive, err)
	}
}

// startInPod runs a script in a container of the pod's pid namespace.
func (r real) startInPod(t *testing.T, sb record.Sandbox, script string) (stop func()) {
	t.Helper()
	if err := r.Record(r.ctx, "member"); err != nil {
		t.Fatal(err)
	}
	spec, err := r.Spec("member", sb.ID, "busybox", "sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	joined := strings.Replace(string(spec), `{"type":"pid"}`, fmt.Sprintf(`{"type":"pid","path":"/proc/%d/ns/pid"}`, sb.Instance.Pid), 1)
	if joined == string(spec) {
		t.Fatal("the specification has no pid namespace to replace")
	}
	task, err := r.tasks.Create(r.ctx, runtime.CreateRequest{ID: "member", SandboxID: sb.ID, Handler: r.Handler, Spec: []byte(joined)})
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Start(r.ctx); err != nil {
		t.Error(err)
	}
	return func() {
		if err := r.tasks.Release(r.ctx, "member", []byte(joined)); err != nil {
			t.Error(err)
		}
	}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not so: %s", what)
		}
	}
}

// listens reports whether the pause program is running and waits for signals.
// Before it, the runtime's own program is that process.
func listens(t *testing.T, pid uint32) bool {
	t.Helper()
	program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	return program == pause.Program && strings.Contains(string(status), "\nState:\tS ")
}

func children(t *testing.T, pid int) []string {
	t.Helper()
	p := strconv.Itoa(pid)
	b, err := os.ReadFile(filepath.Join("/proc", p, "task", p, "children"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(b))
}
