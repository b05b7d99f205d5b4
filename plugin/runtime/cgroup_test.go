package runtime

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func FuzzOwnCgroup(f *testing.F) {
	for _, s := range []string{`{"linux":{"cgroupsPath":"/a/id"}}`, `{}`, ``, `{"linux":{"cgroupsPath":7}}`, `{"linux":null}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, spec []byte) {
		path, err := ownCgroup("id", spec)
		if err == nil && path != "" && !strings.Contains(filepath.Base(path), "id") {
			t.Errorf("took %q for the group of id", path)
		}
	})
}

func TestOwnCgroupRefusesOthers(t *testing.T) {
	if _, err := ownCgroup("abc", []byte(`{"linux":{"cgroupsPath":"/kubepods/pod1"}}`)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the pod's group was taken: %v", err)
	}
}

// group makes a control group in every hierarchy with a process in it that
// has a child in a group beneath it.
func group(t *testing.T, h *Hierarchies, name string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	cmd := exec.Command("sh", "-c", `read go; sleep 1000 & sleep 1000 & wait`)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	reaped := make(chan struct{})
	go func() {
		defer close(reaped)
		_ = cmd.Wait() // killed
	}()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if _, err := h.Kill(ctx, name); err != nil {
			t.Error(err)
		}
		if err := h.Remove(name); err != nil {
			t.Error(err)
		}
		select {
		case <-reaped:
		case <-ctx.Done():
			t.Error("the process was not killed")
		}
	})
	pid := []byte(strconv.Itoa(cmd.Process.Pid))
	for _, root := range h.roots {
		dir := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Join(dir, "beneath"), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(root, "cpuset") {
			continue // an empty set takes no process
		}
		if err := os.WriteFile(filepath.Join(dir, "beneath", "cgroup.procs"), pid, 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := stdin.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
}

func TestKill(t *testing.T) {
	h, err := NewHierarchies()
	if err != nil {
		t.Fatal(err)
	}
	name := "/gantry-kill-" + strconv.Itoa(os.Getpid())
	group(t, h, name)
	pids, err := h.Procs(name)
	if err != nil || len(pids) == 0 {
		t.Fatalf("processes %v, %v", pids, err)
	}
	if err := h.Remove(name); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("remove of a group in use: %v", err)
	}
	if n, err := h.Kill(t.Context(), name); err != nil || n < 1 {
		t.Errorf("kill: %d, %v", n, err)
	}
	if pids, err := h.Procs(name); err != nil || len(pids) > 0 {
		t.Errorf("left: %v, %v", pids, err)
	}
	for range 2 {
		if err := h.Remove(name); err != nil {
			t.Error(err)
		}
	}
	if n, err := h.Kill(t.Context(), name); n != 0 || err != nil {
		t.Errorf("kill of nothing: %d, %v", n, err)
	}
}

// A frozen v1 group dies as well.
func TestKillFrozen(t *testing.T) {
	h, err := NewHierarchies()
	if err != nil {
		t.Fatal(err)
	}
	name := "/gantry-frozen-" + strconv.Itoa(os.Getpid())
	group(t, h, name)
	i := slices.IndexFunc(h.roots, func(r string) bool { return filepath.Base(r) == "freezer" })
	if i < 0 {
		t.Skip("the v1 freezer is not mounted")
	}
	if err := os.WriteFile(filepath.Join(h.roots[i], name, "beneath", "freezer.state"), []byte("FROZEN"), 0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := h.Kill(ctx, name); err != nil {
		t.Error(err)
	}
}

// A group that holds this process is nobody's to kill.
func TestKillRefusesOwn(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	name := "/gantry-own-" + strconv.Itoa(os.Getpid())
	root := t.TempDir()
	h := &Hierarchies{roots: []string{root}}
	if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
		t.Fatal(err)
	}
	procs := filepath.Join(root, name, "cgroup.procs")
	if err := os.WriteFile(procs, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Kill(t.Context(), name); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("kill: %v", err)
	}
}
