package runtime

import (
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
)

// TestVacate: a process in a group that was made leaves it for where this one is.
func TestVacate(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	h, err := NewHierarchies()
	if err != nil {
		t.Fatal(err)
	}
	name := "/gantry-vacate-" + strconv.Itoa(os.Getpid()) + "/shim"
	for range 2 {
		if err := h.Make(name); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	})
	before := groupsOf(t, cmd.Process.Pid)
	if cgroups.Mode() == cgroups.Unified {
		m, err := cgroup2.Load(name)
		if err != nil {
			t.Fatal(err)
		}
		err = m.AddProc(uint64(cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
	} else {
		c, err := cgroup1.Load(cgroup1.StaticPath(name))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.AddProc(uint64(cmd.Process.Pid)); err != nil {
			t.Fatal(err)
		}
	}
	if pids, err := h.Procs(name); err != nil || len(pids) != 1 {
		t.Errorf("processes %v, %v", pids, err)
	}
	for range 2 {
		if err := h.Vacate(name); err != nil {
			t.Fatal(err)
		}
	}
	if after := groupsOf(t, cmd.Process.Pid); after != before {
		t.Errorf("it is in\n%s, was in\n%s", after, before)
	}
	for _, path := range []string{name, "/gantry-vacate-" + strconv.Itoa(os.Getpid())} {
		if err := h.Remove(path); err != nil {
			t.Error(err)
		}
	}
	if err := h.Vacate(name); err != nil {
		t.Errorf("of no group: %v", err)
	}
}

func groupsOf(t *testing.T, pid int) string {
	t.Helper()
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
