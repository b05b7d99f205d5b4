package runtime

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestMark(t *testing.T) {
	plain := &specs.Process{Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1, Hard: 2}}}
	one, m := mark(plain, false)
	two, n := mark(plain, false)
	if m == 0 || n == 0 || m == n || MarkOf(one) != m || MarkOf(two) != n || len(plain.Rlimits) != 1 {
		t.Errorf("marks %d and %d: %+v, %+v, %+v", m, n, one, two, plain)
	}
	own := &specs.Process{Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_RTTIME", Soft: 1000, Hard: 1000}}}
	if p, m := mark(own, false); m != 0 || p != own || MarkOf(own) != 0 {
		t.Errorf("the container's own limit became %+v, mark %d", p, m)
	}
}

// TestMarkUserns: a mark that the runtime may not set would fail the command.
func TestMarkUserns(t *testing.T) {
	plain := &specs.Process{}
	p, m := mark(plain, true)
	if may := setsLimits(); may != (m != 0) || MarkOf(p) != m {
		t.Errorf("limits of others may be set: %v; the mark is %d", may, m)
	}
}

func TestParseMark(t *testing.T) {
	line := func(hard string) string {
		return "Limit                     Soft Limit           Hard Limit           Units     \n" +
			"Max realtime priority     0                    0                    \n" +
			"Max realtime timeout      1                    " + hard + " us        \n"
	}
	if m := parseMark([]byte(line("5000000000000000000"))); m != 5000000000000000000 {
		t.Errorf("%d", m)
	}
	for _, bad := range []string{"", "Max realtime timeout ", line("unlimited"), line("1000"), line("18446744073709551616")} {
		if m := parseMark([]byte(bad)); m != 0 {
			t.Errorf("%q: %d", bad, m)
		}
	}
	limits, err := os.ReadFile("/proc/self/limits")
	if err != nil {
		t.Fatal(err)
	}
	if m := parseMark(limits); m != 0 {
		t.Errorf("this process has mark %d", m)
	}
}

func FuzzParseMark(f *testing.F) {
	f.Add([]byte("Max realtime timeout      1                    5000000000000000000 us\n"))
	f.Add([]byte("Max realtime timeout \n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if m := parseMark(data); m != 0 && m < markFrom {
			t.Errorf("%q: %d is no mark", data, m)
		}
	})
}

// marked is a control group with a process in it that has a mark.
type marked struct {
	*Hierarchies
	name string
	pid  int
	mark Mark
}

// newMarked runs a script with a mark, beside other processes, and waits until
// it has said a line. All are in a control group of their own.
func newMarked(t *testing.T, script string) marked {
	t.Helper()
	h, err := NewHierarchies()
	if err != nil {
		t.Fatal(err)
	}
	l := marked{Hierarchies: h, name: "/gantry-mark-" + strconv.Itoa(os.Getpid()) + "-" + strings.ToLower(filepath.Base(t.Name()))}
	group(t, h, l.name)
	for len(l.procs(t)) < 3 { // a shell and what it starts
		time.Sleep(time.Millisecond)
	}
	cmd := exec.Command("sh", "-c", "read go; "+script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe() // which Wait does not wait for
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	go func() { _ = cmd.Wait() }() // killed, or not, by the test
	l.pid = cmd.Process.Pid
	_, l.mark = mark(&specs.Process{}, false)
	limit := unix.Rlimit{Cur: uint64(l.mark), Max: uint64(l.mark)}
	if err := unix.Prlimit(l.pid, unix.RLIMIT_RTTIME, &limit, nil); err != nil {
		t.Fatal(err)
	}
	for _, root := range h.roots {
		if strings.Contains(root, "cpuset") {
			continue // an empty set takes no process
		}
		if err := os.WriteFile(filepath.Join(root, l.name, "cgroup.procs"), []byte(strconv.Itoa(l.pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := in.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(r).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the process said %q, %v", line, err)
	}
	return l
}

func (l marked) procs(t *testing.T) []int {
	t.Helper()
	pids, err := l.Procs(l.name)
	if err != nil {
		t.Fatal(err)
	}
	return pids
}

// others are the processes of the group without the mark.
func (l marked) others(t *testing.T) []int {
	t.Helper()
	return slices.DeleteFunc(l.procs(t), func(pid int) bool {
		m, err := markOn(pid)
		return err != nil || m != 0
	})
}

func TestKillMarked(t *testing.T) {
	for name, script := range map[string]string{
		"Alone":    "echo ready; exec sleep 1000",
		"Children": "sleep 1000 & sleep 1000 & echo ready; wait",
		"Nested":   "sh -c 'sleep 1000 & sh -c \"sleep 1000 & wait\"' & sleep 0.3; echo ready; wait",
		"Setsid":   "setsid sleep 1000 & setsid sh -c 'sleep 1000 & wait' & sleep 0.3; echo ready; wait",
		"Orphans":  "(sleep 1000 &); (sleep 1000 &); echo ready; exec sleep 1000",
		"Daemon":   "setsid sh -c 'setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo ready'; exec sleep 1000",
		"Ended":    "(sleep 1000 &); setsid sh -c 'sleep 1000 & sleep 1000 & wait' & sleep 0.3; echo ready",
		"Deaf":     "trap '' TERM HUP INT CONT; sleep 1000 & echo ready; wait; wait; wait",
		"Forks":    "echo ready; while :; do sleep 1000 & sleep 0.002; done",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newMarked(t, script)
			for name == "Ended" && !goneFromProc(l.pid) {
				time.Sleep(time.Millisecond)
			}
			others := l.others(t)
			if len(others) != 3 {
				t.Fatalf("the others are %v", others)
			}
			if err := l.KillMarked(t.Context(), l.name, l.mark+1); err != nil {
				t.Fatal(err)
			}
			if n := len(l.procs(t)); n <= len(others) {
				t.Errorf("another mark left %d processes", n)
			}
			for range 2 { // a second time there is nothing to do
				if err := l.KillMarked(t.Context(), l.name, l.mark); err != nil {
					t.Fatal(err)
				}
				if left := l.procs(t); !slices.Equal(left, others) {
					t.Errorf("left: %v, want %v", left, others)
				}
			}
		})
	}
}

func goneFromProc(pid int) bool {
	_, err := os.Stat("/proc/" + strconv.Itoa(pid))
	return os.IsNotExist(err)
}
