package task

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// listed is a group of processes that are known by what a test says.
type listed struct {
	lists [][]int // one after the other, the last one for ever
	fails error
	kills int
}

func (g *listed) stats() (any, error)             { return nil, errdefs.ErrNotImplemented }
func (g *listed) thaw() error                     { return nil }
func (g *listed) frozen() bool                    { return false }
func (g *listed) watchOOM(func()) (func(), error) { return nil, errdefs.ErrNotImplemented }
func (g *listed) kill() error                     { g.kills++; return nil }

func (g *listed) pids() ([]int, error) {
	now := g.lists[0]
	if len(g.lists) > 1 {
		g.lists = g.lists[1:]
	}
	return now, g.fails
}

func TestKillGroup(t *testing.T) {
	for name, c := range map[string]struct {
		group listed
		kills int
		class func(error) bool
	}{
		"empty":           {listed{lists: [][]int{nil}}, 0, nil},
		"gone":            {listed{lists: [][]int{nil}, fails: os.ErrNotExist}, 0, nil},
		"forks meanwhile": {listed{lists: [][]int{{1}, {2}, nil}}, 2, nil},
		"unreadable":      {listed{lists: [][]int{nil}, fails: errdefs.ErrPermissionDenied}, 0, errdefs.IsPermissionDenied},
	} {
		err := killGroup(t.Context(), &c.group)
		if c.group.kills != c.kills || c.class == nil && err != nil || c.class != nil && !c.class(err) {
			t.Errorf("%s: %d kills, %v", name, c.group.kills, err)
		}
	}
	stays := &listed{lists: [][]int{{1}}}
	if err := killGroup(t.Context(), stays); !errdefs.IsAborted(err) || stays.kills == 0 {
		t.Errorf("one that stays: %d kills, %v", stays.kills, err)
	}
}

// TestKillListed: a process dies that is in the list, and one does not whose number
// is not there any more.
func TestKillListed(t *testing.T) {
	in, out := exec.Command("sleep", "1000000"), exec.Command("sleep", "1000000")
	for _, c := range []*exec.Cmd{in, out} {
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
	}
	pids := []int{in.Process.Pid, out.Process.Pid}
	if err := killListed(pids, func() ([]int, error) { return pids[:1], nil }); err != nil {
		t.Error(err)
	}
	// The first signal that kills a process is the one it is known by.
	if err := out.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for c, want := range map[*exec.Cmd]unix.Signal{in: unix.SIGKILL, out: unix.SIGTERM} {
		// The error is that it was killed.
		_ = c.Wait()
		if s, ok := c.ProcessState.Sys().(syscall.WaitStatus); !ok || unix.Signal(s.Signal()) != want {
			t.Errorf("process %d: %v, want %v", c.Process.Pid, c.ProcessState, want)
		}
	}
}

// TestHierarchies: below a group that is mounted in place of the first one, as in a
// container, the groups of processes have their names from there.
func TestHierarchies(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"memory", "cpu,cpuacct", "systemd", "pids"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("cpu,cpuacct", filepath.Join(dir, "cpu")); err != nil {
		t.Fatal(err)
	}
	roots, err := rootsOf([]cgroup1.Subsystem{cgroup1.NewMemory(dir), cgroup1.NewCpu(dir), cgroup1.NewNamed(dir, "systemd"), cgroup1.NewPids(dir)}, []*mountinfo.Info{
		{Mountpoint: dir + "/memory", Root: "/outer"}, {Mountpoint: dir + "/cpu,cpuacct", Root: "/"}, {Mountpoint: dir + "/systemd", Root: "/outer"},
		{Mountpoint: "/elsewhere", Root: "/outer/a", VFSOptions: "rw,memory"},
	})
	if err != nil {
		t.Fatal(err)
	}
	h := &hierarchies{roots: roots}
	path := h.path(map[string]string{"memory": "/outer/a", "cpu": "/outer/a", "name=systemd": "/outer", "pids": "/b"})
	for controller, want := range map[cgroup1.Name]string{"memory": "/a", "cpu": "/outer/a", "systemd": "/", "pids": "/b"} {
		if got, err := path(controller); err != nil || got != want {
			t.Errorf("%s: %s, %v", controller, got, err)
		}
	}
	if got, err := path("rdma"); !errors.Is(err, cgroup1.ErrControllerNotActive) {
		t.Errorf("a controller that is not there: %s, %v", got, err)
	}
}

// TestHierarchiesHere: the same groups as the library finds.
func TestHierarchiesHere(t *testing.T) {
	want, err := cgroup1.Load(cgroup1.PidPath(os.Getpid()))
	if err != nil {
		t.Skipf("no control groups of version 1: %v", err)
	}
	got, err := new(hierarchies).load(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	names := func(c cgroup1.Cgroup) (all []cgroup1.Name) {
		for _, s := range c.Subsystems() {
			all = append(all, s.Name())
		}
		return all
	}
	if !slices.Equal(names(got), names(want)) {
		t.Fatalf("%v, the library: %v", names(got), names(want))
	}
	for _, name := range names(want) {
		// The library gives a group's processes by where it is mounted.
		mine, err := got.Processes(name, false)
		theirs, errOfTheirs := want.Processes(name, false)
		if err != nil || errOfTheirs != nil || len(mine) == 0 || mine[0].Path != theirs[0].Path {
			t.Errorf("%s: %.3v and %.3v: %v, %v", name, mine, theirs, err, errOfTheirs)
		}
	}
}
