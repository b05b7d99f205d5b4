package runtimetest_test

import (
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantry-cri/gantry/plugin/runtime"
	"github.com/gantry-cri/gantry/plugin/runtime/runtimetest"
)

func args(code int) []string {
	if code < 0 {
		return []string{"sleep"}
	}
	return []string{"exit", strconv.Itoa(code)}
}

func request(t *testing.T, id, sandbox string, code int) runtime.CreateRequest {
	t.Helper()
	spec, err := json.Marshal(specs.Spec{
		Process: &specs.Process{Args: args(code)},
		Linux:   &specs.Linux{CgroupsPath: "/test/" + id},
	})
	if err != nil {
		t.Fatal(err)
	}
	return runtime.CreateRequest{ID: id, SandboxID: sandbox, Spec: spec}
}

func TestFake(t *testing.T) {
	runtimetest.Suite(t, func(t *testing.T) runtimetest.Subject {
		fake := runtimetest.New()
		t.Cleanup(func() {
			if left := fake.Alive(); len(left) > 0 {
				t.Errorf("alive: %v", left)
			}
		})
		return runtimetest.Subject{
			Tasks: runtime.New(fake, fake), Context: t.Context(), Request: request,
			Process:  func(code int) *specs.Process { return &specs.Process{Args: args(code)} },
			KillShim: func(_ *testing.T, pod string) { fake.KillShim(pod, false) },
			Silence:  func(_ *testing.T, pod string) func() { return fake.Silence(pod) },
			Alive: func(t *testing.T, id string) int {
				pids, err := fake.Procs("/test/" + id)
				if err != nil {
					t.Fatal(err)
				}
				return len(pids)
			},
		}
	})
}

// Orphans of a dead shim are seen and killed before the task is called gone.
func TestFakeOrphans(t *testing.T) {
	fake := runtimetest.New()
	tasks := runtime.New(fake, fake)
	req := request(t, "a", "", -1)
	if _, err := tasks.Create(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	fake.KillShim("a", true)
	if want := []string{"/test/a"}; !slices.Equal(fake.Alive(), want) {
		t.Fatalf("alive %v, want %v", fake.Alive(), want)
	}
	if _, err := tasks.Reap(t.Context(), "a", req.Spec); err != nil {
		t.Fatal(err)
	}
	if len(fake.Alive()) > 0 {
		t.Errorf("alive: %v", fake.Alive())
	}
}

func TestFaults(t *testing.T) {
	boom := errors.New("boom")
	for name, c := range map[string]struct {
		fault runtimetest.Fault
		known int
	}{
		"before": {runtimetest.Fault{Op: "create", Err: boom}, 0},
		"after":  {runtimetest.Fault{Op: "create", ID: "b", After: true, Err: boom}, 2},
		"second": {runtimetest.Fault{Op: "create", Nth: 2, Err: boom}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			fake := runtimetest.New()
			tasks := runtime.New(fake, fake)
			fake.Inject(c.fault)
			var err error
			for _, id := range []string{"a", "b"} {
				_, e := tasks.Create(t.Context(), request(t, id, "", -1))
				err = errors.Join(err, e)
			}
			if !errors.Is(err, boom) || len(fake.Known()) != c.known {
				t.Errorf("%v, known %v; want boom and %d tasks", err, fake.Known(), c.known)
			}
			fake.Heal()
			for _, id := range []string{"a", "b"} {
				if err := tasks.Release(t.Context(), id, request(t, id, "", -1).Spec); err != nil {
					t.Error(err)
				}
			}
			if len(fake.Alive()) > 0 {
				t.Errorf("alive: %v", fake.Alive())
			}
		})
	}
}

// A shim that refuses to delete what it said has ended is asked again, and one
// that goes on refusing is reported.
func TestReleaseRefused(t *testing.T) {
	refused := errors.New("not stopped")
	for name, c := range map[string]struct {
		fault runtimetest.Fault
		want  error
	}{
		"once":   {runtimetest.Fault{Op: "delete", Nth: 1, Err: refused}, nil},
		"always": {runtimetest.Fault{Op: "delete", Err: refused}, refused},
	} {
		t.Run(name, func(t *testing.T) {
			fake := runtimetest.New()
			tasks := runtime.New(fake, fake)
			req := request(t, "a", "", 0)
			if _, err := tasks.Create(t.Context(), req); err != nil {
				t.Fatal(err)
			}
			fake.Inject(c.fault)
			if err := tasks.Release(t.Context(), "a", req.Spec); !errors.Is(err, c.want) {
				t.Errorf("release: %v, want %v", err, c.want)
			}
			fake.Heal()
			if err := tasks.Release(t.Context(), "a", req.Spec); err != nil || len(fake.Known()) > 0 {
				t.Errorf("release afterwards: %v, left %v", err, fake.Known())
			}
		})
	}
}
