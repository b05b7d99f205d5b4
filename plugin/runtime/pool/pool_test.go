package pool_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	crt "github.com/containerd/containerd/v2/core/runtime"
	v2 "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/runtime"
	"github.com/gantry-cri/gantry/plugin/runtime/pool"
	"github.com/gantry-cri/gantry/plugin/runtime/runtimetest"
	"github.com/gantry-cri/gantry/plugin/runtime/shimtest"
)

// daemonDir is set in the process that plays a daemon to be killed.
const daemonDir = "GANTRY_POOL_TEST_DAEMON"

func TestMain(m *testing.M) {
	if dir := os.Getenv(daemonDir); dir != "" {
		if err := daemon(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// node is a daemon's task runtime.
type node struct {
	*shimtest.Env
	pool  *pool.Pool
	tasks *runtime.Tasks
	cgs   *runtime.Hierarchies
	ctx   context.Context
}

func open(ctx context.Context, env *shimtest.Env) (node, error) {
	ctx = namespaces.WithNamespace(ctx, shimtest.Namespace)
	stock, err := env.TaskManager(ctx)
	if err != nil {
		return node{}, err
	}
	p, err := pool.New(ctx, pool.Options{
		Namespace: shimtest.Namespace, Stock: stock, Root: filepath.Join(env.Root, ".pool"), State: filepath.Join(env.State, ".pool"),
		New: func(root, state string) (crt.PlatformRuntime, error) {
			shims, err := env.Shims()
			if err != nil {
				return nil, err
			}
			return v2.NewTaskManager(ctx, root, state, shims)
		},
		Containers: env.Containers, Events: env.Events,
		Daemon:     pool.Daemon{GRPCAddress: env.GRPCAddress(), TTRPCAddress: env.Address()},
		Background: lifecycle.New(ctx),
	})
	if err != nil {
		return node{}, err
	}
	cgs, err := runtime.NewHierarchies()
	if err != nil {
		return node{}, err
	}
	return node{env, p, runtime.New(p, cgs), cgs, ctx}, nil
}

// program is what a task of a daemon runs; the first has the sandbox's name.
type program struct {
	ID, Sandbox string
	Args        []string
}

func (n node) run(p program) error {
	if err := n.Record(n.ctx, p.ID); err != nil {
		return err
	}
	spec, err := n.Spec(p.ID, p.Sandbox, p.Args...)
	if err != nil {
		return err
	}
	req := runtime.CreateRequest{ID: p.ID, Handler: n.Handler, Spec: spec}
	if p.Sandbox != p.ID {
		req.SandboxID = p.Sandbox
	} else if err := n.RecordSandbox(n.ctx, p.ID); err != nil {
		return err
	}
	task, err := n.tasks.Create(n.ctx, req)
	if err != nil {
		return err
	}
	return task.Start(n.ctx)
}

// daemon runs what it is told and then waits to be killed.
func daemon(dir string) error {
	env, err := shimtest.Open(dir)
	if err != nil {
		return err
	}
	n, err := open(context.Background(), env)
	if err != nil {
		return err
	}
	var programs []program
	if err := json.NewDecoder(os.Stdin).Decode(&programs); err != nil {
		return err
	}
	for _, p := range programs {
		if err := n.run(p); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	select {}
}

// killed runs programs under a daemon, kills it, and returns its directory.
func killed(t *testing.T, programs ...program) string {
	t.Helper()
	dir := shimtest.Dir(t)
	in, err := json.Marshal(programs)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), daemonDir+"="+dir)
	cmd.Stdin, cmd.Stderr = strings.NewReader(string(in)), os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if line != "ready\n" {
		t.Errorf("the daemon says %q, %v", line, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // killed
	return dir
}

// next is the daemon after that. Its tasks are released when the test ends.
func next(t *testing.T, dir string, programs ...program) node {
	t.Helper()
	env, err := shimtest.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { env.Close() })
	begin := time.Now()
	n, err := open(t.Context(), env)
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > time.Second {
		t.Errorf("the runtime took %s to start", took)
	}
	t.Cleanup(func() { n.release(t, programs) })
	return n
}

// release takes the tasks down, the pod's own last.
func (n node) release(t *testing.T, programs []program) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(n.ctx), time.Minute)
	defer cancel()
	for i := len(programs) - 1; i >= 0; i-- {
		if err := n.tasks.Release(ctx, programs[i].ID, n.spec(t, programs[i])); err != nil {
			t.Error(err)
		}
	}
	if err := n.pool.Close(); err != nil {
		t.Error(err)
	}
	for _, id := range programs {
		if left, err := filepath.Glob(filepath.Join(n.State, ".pool", "*", shimtest.Namespace, id.ID)); err != nil || len(left) > 0 {
			t.Errorf("bundles: %v, %v", left, err)
		}
	}
}

func (n node) spec(t *testing.T, p program) []byte {
	t.Helper()
	spec, err := n.Spec(p.ID, p.Sandbox, p.Args...)
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

func (n node) alive(t *testing.T, id string) int {
	t.Helper()
	pids, err := n.cgs.Procs(n.Cgroup + "/" + id)
	if err != nil {
		t.Fatal(err)
	}
	return len(pids)
}

func (n node) get(t *testing.T, id string) *runtime.Task {
	t.Helper()
	task, err := n.tasks.Get(n.ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	return task
}

var (
	forever = []string{"busybox", "sleep", "1000"}
	pod     = program{"pod", "pod", forever}
	member  = program{"member", "pod", forever}
	other   = program{"other", "other", forever}
)

func exits(id string, code int, after string) program {
	return program{id, "pod", []string{"busybox", "sh", "-c", "sleep " + after + "; exit " + strconv.Itoa(code)}}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
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

// New tasks are containerd's own.
func TestNew(t *testing.T) {
	runtimetest.Suite(t, func(t *testing.T) runtimetest.Subject {
		env := shimtest.New(t)
		n, err := open(t.Context(), env)
		if err != nil {
			t.Fatal(err)
		}
		args := func(code int) []string {
			if code < 0 {
				return forever
			}
			return []string{"busybox", "sh", "-c", "exit " + strconv.Itoa(code)}
		}
		signal := func(t *testing.T, s unix.Signal) {
			t.Helper()
			if err := n.Signal(s); err != nil {
				t.Fatal(err)
			}
		}
		return runtimetest.Subject{
			Tasks: n.tasks, Context: n.ctx, Alive: n.alive,
			Request: func(t *testing.T, id, sandbox string, code int) runtime.CreateRequest {
				t.Helper()
				if err := n.Record(n.ctx, id); err != nil {
					t.Fatal(err)
				}
				if sandbox != "" {
					if err := n.RecordSandbox(n.ctx, sandbox); err != nil {
						t.Fatal(err)
					}
				}
				return runtime.CreateRequest{ID: id, SandboxID: sandbox, Handler: n.Handler, Spec: n.spec(t, program{id, sandbox, args(code)})}
			},
			Process: func(code int) *specs.Process {
				return &specs.Process{Args: args(code), Cwd: "/", Env: []string{"PATH=/bin"}}
			},
			KillShim: func(t *testing.T, _ string) { signal(t, unix.SIGKILL) },
			Silence: func(t *testing.T, _ string) func() {
				signal(t, unix.SIGSTOP)
				return func() { signal(t, unix.SIGCONT) }
			},
		}
	})
}

// A task runs on while the daemon is down, and its exit is heard of after.
func TestRestart(t *testing.T) {
	short := exits("short", 7, "0.3")
	all := []program{pod, member, short}
	dir := killed(t, all...)
	n := next(t, dir, all...)
	exit, err := n.get(t, "short").Wait(n.ctx)
	if err != nil || exit.Code != 7 || time.Since(exit.At) > time.Minute {
		t.Errorf("exit while the daemon was down: %+v, %v", exit, err)
	}
	task := n.get(t, "member")
	if s, err := task.State(n.ctx); err != nil || s.Status != runtime.Running || s.Pid == 0 {
		t.Errorf("state %+v, %v", s, err)
	}
	e, err := task.Exec(n.ctx, "e", runtime.ExecRequest{Process: &specs.Process{
		Args: []string{"busybox", "sh", "-c", "exit 3"}, Cwd: "/", Env: []string{"PATH=/bin"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Start(n.ctx); err != nil {
		t.Fatal(err)
	}
	if exit, err := e.Wait(n.ctx); err != nil || exit.Code != 3 {
		t.Errorf("exec: %+v, %v", exit, err)
	}
	if err := e.Delete(n.ctx); err != nil {
		t.Error(err)
	}
	if err := n.run(program{"member", "pod", forever}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a container that runs was created again: %v", err)
	}
	list, err := n.pool.Tasks(n.ctx, true)
	if err != nil || len(list) != len(all) {
		t.Errorf("%d tasks, %v; want %d", len(list), err, len(all))
	}
}

// A container joins a pod that an earlier daemon started.
func TestJoin(t *testing.T) {
	dir := killed(t, pod)
	n := next(t, dir, pod, member)
	if err := n.run(member); err != nil {
		t.Fatal(err)
	}
	if shims := n.ShimPids(); len(shims) != 1 {
		t.Errorf("the pod has %d shims", len(shims))
	}
}

// A silent shim is not dead, whatever else is asked of it, and the pods of
// others do not notice.
func TestSilent(t *testing.T) {
	dir := killed(t, pod, member, other)
	before := stop(t, dir, "pod")
	n := next(t, dir, pod, member, other)
	if s, err := n.get(t, "other").State(n.ctx); err != nil || s.Status != runtime.Running {
		t.Errorf("the other pod: %+v, %v", s, err)
	}
	for _, id := range []string{"pod", "member"} {
		if _, err := n.tasks.Get(n.ctx, id); !errdefs.IsUnavailable(err) {
			t.Errorf("task %s of a silent shim: %v", id, err)
		}
		if _, err := n.tasks.Reap(n.ctx, id, n.spec(t, pod)); !errdefs.IsUnavailable(err) {
			t.Errorf("reap of task %s of a silent shim: %v", id, err)
		}
		if n.alive(t, id) != 1 {
			t.Errorf("%s has %d processes", id, n.alive(t, id))
		}
	}
	if err := n.run(program{"late", "pod", forever}); !errdefs.IsUnavailable(err) {
		t.Errorf("a container joined a silent shim: %v", err)
	}
	if err := unix.Kill(before, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	var task *runtime.Task
	eventually(t, "the shim that speaks again serves", func() bool {
		var err error
		task, err = n.tasks.Get(n.ctx, "member")
		return err == nil
	})
	if s, err := task.State(n.ctx); err != nil || s.Status != runtime.Running {
		t.Errorf("state %+v, %v", s, err)
	}
	if err := task.Kill(n.ctx, unix.SIGKILL, false); err != nil {
		t.Error(err)
	}
	if exit, err := task.Wait(n.ctx); err != nil || exit.Code != 137 {
		t.Errorf("wait: %+v, %v", exit, err)
	}
}

// stop stops the shim of a pod and returns its process.
func stop(t *testing.T, dir, id string) int {
	t.Helper()
	for _, pid := range shimtest.ShimPids(dir) {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && strings.Contains(string(line), "-id\x00"+id+"\x00") {
			if err := shimtest.Signal(pid, unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("no shim of %s", id)
	return 0
}

// The tasks of a shim that died while the daemon was down are NotFound once
// they are cleaned up, and what the shim had written of an exit is not lost.
func TestDead(t *testing.T) {
	ended := exits("ended", 7, "0")
	all := []program{pod, member, ended}
	dir := killed(t, all...)
	eventually(t, "the exit is written down", func() bool {
		found, err := filepath.Glob(filepath.Join(dir, "state", ".pool", "*", shimtest.Namespace, "ended", "exit.json"))
		return err == nil && len(found) == 1
	})
	for _, pid := range shimtest.ShimPids(dir) {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	n := next(t, dir, all...)
	for id, code := range map[string]uint32{"pod": runtime.UnknownCode, "member": runtime.UnknownCode, "ended": 7} {
		if _, err := n.tasks.Get(n.ctx, id); !errdefs.IsNotFound(err) {
			t.Errorf("get %s: %v", id, err)
		}
		if n.alive(t, id) != 0 {
			t.Errorf("%s is NotFound and has processes", id)
		}
		exit, err := n.tasks.Reap(n.ctx, id, n.spec(t, program{ID: id, Args: forever}))
		if err != nil || exit.Code != code || exit.At.IsZero() {
			t.Errorf("reap %s: %+v, %v; want %d", id, exit, err, code)
		}
	}
}

// So are those of a shim that dies later.
func TestDies(t *testing.T) {
	dir := killed(t, pod, member)
	n := next(t, dir, pod, member)
	task := n.get(t, "member")
	events, errs := n.Events.Subscribe(n.ctx, `topic=="/tasks/exit"`)
	done := make(chan error, 1)
	go func() {
		_, err := task.Wait(n.ctx)
		done <- err
	}()
	if err := n.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !runtime.IsShimDied(err) {
		t.Errorf("wait: %v", err)
	}
	if exit, err := n.tasks.Reap(n.ctx, "member", n.spec(t, member)); err != nil || exit.Code != runtime.UnknownCode {
		t.Errorf("reap: %+v, %v", exit, err)
	}
	select {
	case e := <-events:
		if e.Namespace != shimtest.Namespace {
			t.Errorf("event in namespace %q", e.Namespace)
		}
	case err := <-errs:
		t.Error(err)
	case <-time.After(30 * time.Second):
		t.Error("the end of the tasks was not published")
	}
}

// What a daemon left half-made, or what was damaged, is in nobody's way.
func TestDamaged(t *testing.T) {
	all := []program{pod, other}
	dir := killed(t, all...)
	ns := filepath.Join(dir, "state", ".pool", "1", shimtest.Namespace)
	for _, d := range []string{"empty", "halfway/rootfs", ".removed/rootfs"} {
		if err := os.MkdirAll(filepath.Join(ns, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"77", "not a number"} {
		if err := os.MkdirAll(filepath.Join(dir, "state", ".pool", d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(ns, "pod", "bootstrap.json"), []byte(`{"address": 7`), 0o600); err != nil {
		t.Fatal(err)
	}
	n := next(t, dir, all...)
	for _, id := range []string{"empty", "halfway", "pod"} {
		eventually(t, id+" is cleaned up", func() bool {
			_, err := n.tasks.Get(n.ctx, id)
			return errdefs.IsNotFound(err)
		})
	}
	if s, err := n.get(t, "other").State(n.ctx); err != nil || s.Status != runtime.Running {
		t.Errorf("the pod that is in order: %+v, %v", s, err)
	}
}

// A shim whose daemon died before it heard of it is not kept.
func TestStray(t *testing.T) {
	dir := killed(t, pod)
	bootstrap := filepath.Join(dir, "state", ".pool", "1", shimtest.Namespace, "pod", "bootstrap.json")
	if err := os.Remove(bootstrap); err != nil {
		t.Fatal(err)
	}
	next(t, dir, pod) // which finds a shim left behind an error
}
