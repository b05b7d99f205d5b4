package runtime_test

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/runtime"
	"github.com/gantry-cri/gantry/plugin/runtime/runtimetest"
	"github.com/gantry-cri/gantry/plugin/runtime/shimtest"
)

// real is Tasks on the runc shim and runc.
type real struct {
	*shimtest.Env
	tasks *runtime.Tasks
	cgs   *runtime.Hierarchies
	ctx   context.Context
}

// newReal returns Tasks on containerd's own TaskManager.
func newReal(t *testing.T) real {
	t.Helper()
	env := shimtest.New(t)
	rt, err := env.TaskManager(env.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	return newRealOn(t, env, rt)
}

func newRealOn(t *testing.T, env *shimtest.Env, rt runtime.Platform) real {
	t.Helper()
	cgs, err := runtime.NewHierarchies()
	if err != nil {
		t.Fatal(err)
	}
	return real{env, runtime.New(rt, cgs), cgs, env.Context(t)}
}

func program(code int) []string {
	if code < 0 {
		return []string{"busybox", "sleep", "1000"}
	}
	return []string{"busybox", "sh", "-c", "exit " + strconv.Itoa(code)}
}

func (r real) request(t *testing.T, id, sandbox string, code int) runtime.CreateRequest {
	t.Helper()
	spec, err := r.Spec(id, sandbox, program(code)...)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Record(r.ctx, id); err != nil {
		t.Fatal(err)
	}
	if sandbox != "" {
		if err := r.RecordSandbox(r.ctx, sandbox); err != nil {
			t.Fatal(err)
		}
	}
	return runtime.CreateRequest{ID: id, SandboxID: sandbox, Handler: r.Handler, Spec: spec}
}

func (r real) signal(t *testing.T, s unix.Signal) {
	t.Helper()
	if err := r.Signal(s); err != nil {
		t.Fatal(err)
	}
}

func (r real) subject(t *testing.T) runtimetest.Subject {
	return runtimetest.Subject{
		Tasks: r.tasks, Context: r.ctx, Request: r.request,
		Process: func(code int) *specs.Process {
			return &specs.Process{Args: program(code), Cwd: "/", Env: []string{"PATH=/bin"}}
		},
		KillShim: func(t *testing.T, _ string) { r.signal(t, unix.SIGKILL) },
		Silence: func(t *testing.T, _ string) func() {
			r.signal(t, unix.SIGSTOP)
			return func() { r.signal(t, unix.SIGCONT) }
		},
		Alive: func(t *testing.T, id string) int {
			pids, err := r.cgs.Procs(r.Cgroup + "/" + id)
			if err != nil {
				t.Fatal(err)
			}
			return len(pids)
		},
	}
}

func TestTaskManager(t *testing.T) {
	runtimetest.Suite(t, func(t *testing.T) runtimetest.Subject { return newReal(t).subject(t) })
}

// Our own shim keeps the contract that the runc shim does.
func TestGantryShim(t *testing.T) {
	shim, err := shimtest.BuildGantry(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	runtimetest.Suite(t, func(t *testing.T) runtimetest.Subject {
		r := newReal(t)
		r.Handler.Runtime = shim
		return r.subject(t)
	})
}

// A silent shim does not keep the processes of a released task alive.
func TestReleaseSilent(t *testing.T) {
	r := newReal(t)
	req := r.request(t, "silent", "", -1)
	task, err := r.tasks.Create(r.ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	r.signal(t, unix.SIGSTOP)
	ctx, cancel := context.WithTimeout(r.ctx, shortly)
	defer cancel()
	if err := r.tasks.Release(ctx, "silent", req.Spec); !errdefs.IsDeadlineExceeded(err) {
		t.Errorf("release with a silent shim: %v", err)
	}
	r.signal(t, unix.SIGCONT)
	if exit, err := task.Wait(r.ctx); err != nil || exit.Code != 137 {
		t.Errorf("wait: %+v, %v", exit, err)
	}
	if err := r.tasks.Release(r.ctx, "silent", req.Spec); err != nil {
		t.Errorf("release once it answers: %v", err)
	}
	if _, err := os.Stat(filepath.Join("/sys/fs/cgroup/pids", r.Cgroup, "silent")); !os.IsNotExist(err) {
		t.Errorf("cgroup: %v", err)
	}
}

// TaskManager says NotFound as well when the container record is missing.
func TestDeleteWithoutRecord(t *testing.T) {
	r := newReal(t)
	req := r.request(t, "norecord", "", -1)
	if _, err := r.tasks.Create(r.ctx, req); err != nil {
		t.Fatal(err)
	}
	if err := r.Containers.Delete(r.ctx, "norecord"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.tasks.Delete(r.ctx, "norecord"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete: %v", err)
	}
	if err := r.Record(r.ctx, "norecord"); err != nil {
		t.Fatal(err)
	}
	if err := r.tasks.Release(r.ctx, "norecord", req.Spec); err != nil {
		t.Error(err)
	}
}

func TestCreateFails(t *testing.T) {
	r := newReal(t)
	req := r.request(t, "bad", "", 0)
	spec, err := r.Spec("bad", "", "no-such-program")
	if err != nil {
		t.Fatal(err)
	}
	req.Spec = spec
	if _, err := r.tasks.Create(r.ctx, req); err == nil {
		t.Error("created a task without a program")
	}
	if err := r.tasks.Release(r.ctx, "bad", spec); err != nil {
		t.Error(err)
	}
}
