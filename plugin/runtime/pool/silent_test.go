package pool_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/runtime/shimtest"
)

// A shim is ended only while it does not answer, and its tasks are gone then;
// nobody else's is touched.
func TestEndSilent(t *testing.T) {
	for name, before := range map[string]bool{"since before the daemon": true, "later": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			all := []program{pod, member, other}
			dir := killed(t, all...)
			if before {
				stop(t, dir, "pod")
			}
			n := next(t, dir, all...)
			for _, id := range []string{"other", "unknown", "member", "*"} {
				if err := n.pool.EndSilent(n.ctx, id); !errdefs.IsFailedPrecondition(err) {
					t.Errorf("end the shim of %s: %v", id, err)
				}
			}
			if !before {
				if err := n.pool.EndSilent(n.ctx, "pod"); !errdefs.IsFailedPrecondition(err) {
					t.Errorf("end a shim that answers: %v", err)
				}
				stop(t, dir, "pod")
			}
			if err := n.pool.EndSilent(n.ctx, "pod"); err != nil {
				t.Fatal(err)
			}
			for _, id := range []string{"pod", "member"} {
				if _, err := n.tasks.Get(n.ctx, id); !errdefs.IsNotFound(err) {
					t.Errorf("get %s: %v", id, err)
				}
				if alive := n.alive(t, id); alive != 0 {
					t.Errorf("%s has %d processes", id, alive)
				}
			}
			if pids := shimtest.ShimPids(dir); len(pids) != 1 {
				t.Errorf("shims %v are left", pids)
			}
			if s, err := n.get(t, "other").State(n.ctx); err != nil || s.Pid == 0 {
				t.Errorf("another pod: %+v, %v", s, err)
			}
		})
	}
}

// Which process a shim is must be certain: not so when its socket is also that
// of another bundle.
func TestEndSilentShared(t *testing.T) {
	all := []program{pod, other}
	dir := killed(t, all...)
	n := next(t, dir, all...)
	n.get(t, "other")
	share(t, dir, "pod", "other")
	pid := stop(t, dir, "pod")
	err := n.pool.EndSilent(n.ctx, "pod")
	if err2 := unix.Kill(pid, unix.SIGCONT); err2 != nil {
		t.Errorf("the shim: %v", err2)
	}
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("end a shim of two pods: %v", err)
	}
}

// share lets the bundle of one task say for the duration of the test that it is
// served where another one is.
func share(t *testing.T, dir, from, to string) {
	t.Helper()
	file := func(id string) string {
		found, err := filepath.Glob(filepath.Join(dir, "state", ".pool", "*", shimtest.Namespace, id, "bootstrap.json"))
		if err != nil || len(found) != 1 {
			t.Fatalf("bundles of %s: %v, %v", id, found, err)
		}
		return found[0]
	}
	was, err := os.ReadFile(file(to))
	if err != nil {
		t.Fatal(err)
	}
	is, err := os.ReadFile(file(from))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file(to), is, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(file(to), was, 0o600); err != nil {
			t.Error(err)
		}
	})
}
