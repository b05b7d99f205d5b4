package stats

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/record"
)

// memoryGroup makes a cgroup with a limit in the hierarchy of memory.
func memoryGroup(t *testing.T) (mount, name string) {
	t.Helper()
	mount, name = "/sys/fs/cgroup/memory", "/gantry-oom-"+strconv.Itoa(os.Getpid())+"-"+filepath.Base(t.Name())
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := os.Stat(filepath.Join(mount, "cgroup.event_control")); err != nil {
		t.Skip("this machine has no hierarchy of version 1 for memory")
	}
	if err := os.Mkdir(mount+name, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(mount + name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(mount+name, "memory.limit_in_bytes"), []byte("16777216"), 0); err != nil {
		t.Fatal(err)
	}
	return mount, name
}

// TestFollowV1: the group goes with the last process, and what the kernel told of
// it is known all the same.
func TestFollowV1(t *testing.T) {
	for name, tc := range map[string]struct {
		script string
		code   int
		want   bool
	}{
		"child": {"(tail /dev/zero); exit 7", 7, true},
		"early": {"(tail /dev/zero); sleep 2; exit 7", 7, true},
		"own":   {"exec tail /dev/zero", -1, true},
		"fine":  {"exit 7", 7, false},
	} {
		t.Run(name, func(t *testing.T) {
			mount, group := memoryGroup(t)
			host := facts.Host{Cgroup: facts.Cgroup{Mode: facts.CgroupV1, Controllers: map[string]string{"memory": mount}}}
			s := New(host, fixed, time.Minute)
			c := newContainer(record.ContainerRunning, group)
			if err := s.Follow(c); err != nil {
				t.Fatal(err)
			}
			defer s.Forget(c.ID)
			cmd := exec.Command("sh", "-c", "echo $$ >"+mount+group+"/cgroup.procs; "+tc.script)
			err := cmd.Run()
			for errors.Is(os.Remove(mount+group), unix.EBUSY) { // until the kernel has put the process away
			}
			if got := cmd.ProcessState.ExitCode(); got != tc.code {
				t.Fatalf("the process ended with %d, %v", got, err)
			}
			eventually(t, "the end is told", func() bool {
				got, err := s.OOMKilled(c)
				return err == nil && got == tc.want
			})
			s.Forget(c.ID)
			if got, err := s.OOMKilled(c); got || err != nil {
				t.Errorf("after it was forgotten: %v, %v", got, err)
			}
		})
	}
}

// TestFollowV1Later: want of memory elsewhere in the tree that the container
// outlives is not its end.
func TestFollowV1Later(t *testing.T) {
	mount, group := memoryGroup(t)
	s := New(facts.Host{Cgroup: facts.Cgroup{Mode: facts.CgroupV1, Controllers: map[string]string{"memory": mount}}}, fixed, time.Minute)
	own := group + "/own"
	if err := os.Mkdir(mount+own, 0o755); err != nil {
		t.Fatal(err)
	}
	c := newContainer(record.ContainerRunning, own)
	if err := s.Follow(c); err != nil {
		t.Fatal(err)
	}
	defer s.Forget(c.ID)
	out, err := exec.Command("sh", "-c", "echo $$ >"+mount+group+"/cgroup.procs; exec tail /dev/zero").CombinedOutput()
	if err == nil {
		t.Fatalf("nobody was killed: %s", out)
	}
	eventually(t, "the alarm rings", func() bool { return s.alarms.killed(c.ID) })
	eventually(t, "it was meant for another", func() bool { return !s.alarms.killed(c.ID) })
	if err := os.Remove(mount + own); err != nil {
		t.Fatal(err)
	}
	if got, err := s.OOMKilled(c); got || err != nil {
		t.Errorf("%v, %v", got, err)
	}
}
