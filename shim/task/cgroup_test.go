package task

import (
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
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
