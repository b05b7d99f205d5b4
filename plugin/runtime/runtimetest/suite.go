package runtimetest

import (
	"context"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantry-cri/gantry/plugin/runtime"
)

// Subject is a task runtime under test, empty.
type Subject struct {
	Tasks *runtime.Tasks
	// Context carries the namespace and ends with the test.
	Context context.Context
	// Request describes a task whose record is written and whose program
	// runs until it is killed, or with code 0 or more ends with that code as
	// soon as it is started. A task with a sandbox joins that task's shim.
	Request func(t *testing.T, id, sandbox string, code int) runtime.CreateRequest
	// Process is such a program as an exec.
	Process func(code int) *specs.Process
	// KillShim kills the shim of a pod with SIGKILL.
	KillShim func(t *testing.T, pod string)
	// Silence stops the shim of a pod until the function it returns is called.
	Silence func(t *testing.T, pod string) (resume func())
	// Alive lists the processes of a task, known or not.
	Alive func(t *testing.T, id string) int
}

// Suite runs the contract against what open returns.
func Suite(t *testing.T, open func(t *testing.T) Subject) {
	for name, test := range map[string]func(*testing.T, bench){
		"exit":              testExit,
		"kill":              testKill,
		"kill all":          testKillAll,
		"delete running":    testDeleteRunning,
		"delete absent":     testDeleteAbsent,
		"get absent":        testGetAbsent,
		"create twice":      testCreateTwice,
		"wait cancelled":    testWaitCancelled,
		"wait by many":      testWaitByMany,
		"exec":              testExec,
		"exec after exit":   testExecAfterExit,
		"exec of nobody":    testEndExec,
		"pids":              testPids,
		"pod shares a shim": testPod,
		"release":           testRelease,
		"release absent":    testReleaseAbsent,
		"shim killed":       testShimKilled,
		"release, dead":     testReleaseDead,
		"shim silent":       testShimSilent,
	} {
		t.Run(name, func(t *testing.T) { test(t, bench{open(t)}) })
	}
}

type bench struct{ Subject }

// create makes a task that is released with the test.
func (b bench) create(t *testing.T, id, sandbox string, code int) (*runtime.Task, []byte) {
	t.Helper()
	req := b.Request(t, id, sandbox, code)
	t.Cleanup(func() {
		if err := b.Tasks.Release(context.WithoutCancel(b.Context), id, req.Spec); err != nil {
			t.Error(err)
		}
	})
	task, err := b.Tasks.Create(b.Context, req)
	if err != nil {
		t.Fatal(err)
	}
	return task, req.Spec
}

func (b bench) start(t *testing.T, id, sandbox string, code int) (*runtime.Task, []byte) {
	t.Helper()
	task, spec := b.create(t, id, sandbox, code)
	if err := task.Start(b.Context); err != nil {
		t.Fatal(err)
	}
	return task, spec
}

func (b bench) status(t *testing.T, task *runtime.Task, want runtime.Status) runtime.State {
	t.Helper()
	s, err := task.State(b.Context)
	if err != nil {
		t.Fatal(err)
	}
	if s.Status != want {
		t.Fatalf("task is %s, want %s", s.Status, want)
	}
	return s
}

func testExit(t *testing.T, b bench) {
	begin := time.Now()
	task, _ := b.create(t, "a", "", 42)
	if s := b.status(t, task, runtime.Created); s.Pid == 0 {
		t.Error("created without a pid")
	}
	if err := task.Start(b.Context); err != nil {
		t.Fatal(err)
	}
	exit, err := task.Wait(b.Context)
	if err != nil {
		t.Fatal(err)
	}
	if exit.Code != 42 || exit.At.Before(begin) || exit.At.After(time.Now()) {
		t.Errorf("exit %+v", exit)
	}
	if s := b.status(t, task, runtime.Stopped); s.Exit.Code != 42 || !s.Exit.At.Equal(exit.At) {
		t.Errorf("state says %+v, wait said %+v", s.Exit, exit)
	}
	got, err := b.Tasks.Delete(b.Context, "a")
	if err != nil || got.Code != 42 || !got.At.Equal(exit.At) {
		t.Errorf("delete says %+v, %v; wait said %+v", got, err, exit)
	}
}

func testKill(t *testing.T, b bench) {
	task, _ := b.start(t, "a", "", -1)
	b.status(t, task, runtime.Running)
	if err := task.Kill(b.Context, syscall.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if exit, err := task.Wait(b.Context); err != nil || exit.Code != 137 {
		t.Errorf("wait: %+v, %v", exit, err)
	}
	if err := task.Kill(b.Context, syscall.SIGKILL, false); !errdefs.IsNotFound(err) {
		t.Errorf("second kill: %v", err)
	}
}

func testKillAll(t *testing.T, b bench) {
	task, _ := b.start(t, "a", "", -1)
	e, err := task.Exec(b.Context, "e", runtime.ExecRequest{Process: b.Process(-1)})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Start(b.Context); err != nil {
		t.Fatal(err)
	}
	if err := task.Kill(b.Context, syscall.SIGKILL, true); err != nil {
		t.Fatal(err)
	}
	if exit, err := e.Wait(b.Context); err != nil || exit.Code != 137 {
		t.Errorf("wait for exec: %+v, %v", exit, err)
	}
	if exit, err := task.Wait(b.Context); err != nil || exit.Code != 137 {
		t.Errorf("wait: %+v, %v", exit, err)
	}
}

func testDeleteRunning(t *testing.T, b bench) {
	task, _ := b.start(t, "a", "", -1)
	if _, err := b.Tasks.Delete(b.Context, "a"); err == nil || errdefs.IsNotFound(err) {
		t.Errorf("delete of a running task: %v", err)
	}
	b.status(t, task, runtime.Running)
}

func testDeleteAbsent(t *testing.T, b bench) {
	if exit, err := b.Tasks.Delete(b.Context, "none"); err != nil || exit.Code != 0 || !exit.At.IsZero() {
		t.Errorf("delete of nothing: %+v, %v", exit, err)
	}
}

func testGetAbsent(t *testing.T, b bench) {
	if _, err := b.Tasks.Get(b.Context, "none"); !errdefs.IsNotFound(err) {
		t.Errorf("get of nothing: %v", err)
	}
}

func testCreateTwice(t *testing.T, b bench) {
	task, spec := b.start(t, "a", "", -1)
	req := runtime.CreateRequest{ID: "a", Spec: spec}
	if _, err := b.Tasks.Create(b.Context, req); err == nil {
		t.Error("created twice")
	}
	b.status(t, task, runtime.Running)
}

func testWaitCancelled(t *testing.T, b bench) {
	task, _ := b.start(t, "a", "", -1)
	ctx, cancel := context.WithCancel(b.Context)
	done := make(chan error, 1)
	go func() {
		_, err := task.Wait(ctx)
		done <- err
	}()
	cancel()
	if err := <-done; !errdefs.IsCanceled(err) {
		t.Errorf("wait: %v", err)
	}
	b.status(t, task, runtime.Running)
}

func testWaitByMany(t *testing.T, b bench) {
	task, _ := b.start(t, "a", "", -1)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if exit, err := task.Wait(b.Context); err != nil || exit.Code != 137 {
				t.Errorf("wait: %+v, %v", exit, err)
			}
		})
	}
	if err := task.Kill(b.Context, syscall.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
}

func testExec(t *testing.T, b bench) {
	task, _ := b.start(t, "a", "", -1)
	for code := range 2 {
		e, err := task.Exec(b.Context, "e", runtime.ExecRequest{Process: b.Process(code)})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Start(b.Context); err != nil {
			t.Fatal(err)
		}
		if exit, err := e.Wait(b.Context); err != nil || exit.Code != uint32(code) {
			t.Errorf("wait: %+v, %v; want %d", exit, err, code)
		}
		for range 2 {
			if err := e.Delete(b.Context); err != nil {
				t.Error(err)
			}
		}
	}
}

func testEndExec(t *testing.T, b bench) {
	task, spec := b.start(t, "a", "", -1)
	alive := b.Alive(t, "a")
	for name, process := range map[string]struct {
		code  int
		start bool
	}{"added": {-1, false}, "running": {-1, true}, "ended": {0, true}} {
		e, err := task.Exec(b.Context, name, runtime.ExecRequest{Process: b.Process(process.code), Spec: spec})
		if err == nil && process.start {
			err = e.Start(b.Context)
		}
		if err == nil && process.start && process.code >= 0 {
			_, err = e.Wait(b.Context)
		}
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := task.EndExec(b.Context, name, spec); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if s, err := e.State(b.Context); !errdefs.IsNotFound(err) {
			t.Errorf("%s: it is still known: %+v, %v", name, s, err)
		}
		if n := b.Alive(t, "a"); n != alive {
			t.Errorf("%s: %d processes are left of %d", name, n, alive)
		}
	}
	if err := task.EndExec(b.Context, "absent", spec); err != nil {
		t.Error(err)
	}
}

func testExecAfterExit(t *testing.T, b bench) {
	task, _ := b.start(t, "a", "", 0)
	if _, err := task.Wait(b.Context); err != nil {
		t.Fatal(err)
	}
	e, err := task.Exec(b.Context, "e", runtime.ExecRequest{Process: b.Process(0)})
	if err == nil {
		err = e.Start(b.Context)
	}
	if err == nil {
		t.Error("a process was started in a container that has ended")
	}
}

func testPids(t *testing.T, b bench) {
	task, _ := b.start(t, "a", "", -1)
	pids, err := task.Pids(b.Context)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := task.Pid(b.Context)
	if err != nil {
		t.Fatal(err)
	}
	if len(pids) != 1 || pids[0] != pid {
		t.Errorf("processes %v, want only %d", pids, pid)
	}
}

func testPod(t *testing.T, b bench) {
	b.start(t, "pod", "", -1)
	member, _ := b.start(t, "member", "pod", -1)
	if _, err := b.Tasks.Delete(b.Context, "pod"); err == nil {
		t.Error("deleted a running task")
	}
	if err := member.Kill(b.Context, syscall.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if _, err := member.Wait(b.Context); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Tasks.Delete(b.Context, "member"); err != nil {
		t.Fatal(err)
	}
	pod, err := b.Tasks.Get(b.Context, "pod")
	if err != nil {
		t.Fatal(err)
	}
	b.status(t, pod, runtime.Running)
}

func testRelease(t *testing.T, b bench) {
	_, created := b.create(t, "created", "", -1)
	_, running := b.start(t, "running", "", -1)
	ended, stopped := b.start(t, "stopped", "", 0)
	if _, err := ended.Wait(b.Context); err != nil {
		t.Fatal(err)
	}
	for id, spec := range map[string][]byte{"created": created, "running": running, "stopped": stopped} {
		for range 2 {
			if err := b.Tasks.Release(b.Context, id, spec); err != nil {
				t.Errorf("release of the %s one: %v", id, err)
			}
		}
		if n := b.Alive(t, id); n != 0 {
			t.Errorf("release of the %s one left %d processes", id, n)
		}
		if _, err := b.Tasks.Get(b.Context, id); !errdefs.IsNotFound(err) {
			t.Errorf("get of the %s one after release: %v", id, err)
		}
	}
}

func testReleaseAbsent(t *testing.T, b bench) {
	req := b.Request(t, "none", "", 0)
	if err := b.Tasks.Release(b.Context, "none", req.Spec); err != nil {
		t.Error(err)
	}
	if err := b.Tasks.Release(b.Context, "none", nil); err != nil {
		t.Error(err)
	}
}

func testShimKilled(t *testing.T, b bench) {
	task, spec := b.start(t, "a", "", -1)
	done := make(chan error, 1)
	go func() {
		_, err := task.Wait(b.Context)
		done <- err
	}()
	b.KillShim(t, "a")
	if err := <-done; !runtime.IsShimDied(err) {
		t.Fatalf("wait: %v", err)
	}
	exit, err := b.Tasks.Reap(b.Context, "a", spec)
	if err != nil || exit.Code != runtime.UnknownCode || exit.At.IsZero() {
		t.Errorf("reap: %+v, %v", exit, err)
	}
	if n := b.Alive(t, "a"); n != 0 {
		t.Errorf("%d processes are left", n)
	}
}

func testReleaseDead(t *testing.T, b bench) {
	_, spec := b.start(t, "a", "", -1)
	b.KillShim(t, "a")
	if err := b.Tasks.Release(b.Context, "a", spec); err != nil {
		t.Error(err)
	}
	if n := b.Alive(t, "a"); n != 0 {
		t.Errorf("%d processes are left", n)
	}
}

func testShimSilent(t *testing.T, b bench) {
	task, spec := b.start(t, "a", "", -1)
	resume := b.Silence(t, "a")
	defer resume()
	const little = 300 * time.Millisecond
	ctx, cancel := context.WithTimeout(b.Context, little)
	defer cancel()
	if _, err := task.State(ctx); !errdefs.IsDeadlineExceeded(err) {
		t.Errorf("state: %v", err)
	}
	if n := b.Alive(t, "a"); n != 1 {
		t.Errorf("%d processes live, want 1", n)
	}
	if _, err := b.Tasks.Reap(b.Context, "a", spec); err == nil || errdefs.IsNotFound(err) {
		t.Errorf("reap of a task with a silent shim: %v", err)
	}
	resume()
	b.status(t, task, runtime.Running)
}
