package runtime

import (
	"bufio"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestDescend(t *testing.T) {
	const leader = 100
	all := map[int]stat{
		1:   {state: 'S', parent: 0, session: 1, start: 1},
		100: {state: 'S', parent: 1, session: 100, start: 50},
		101: {state: 'S', parent: 100, session: 100, start: 51},
		102: {state: 'S', parent: 101, session: 102, start: 52}, // its own session
		103: {state: 'S', parent: 102, session: 102, start: 53}, // below that
		104: {state: 'S', parent: 1, session: 100, start: 54},   // an orphan
		105: {state: 'Z', parent: 100, session: 100, start: 55},
		106: {state: 'S', parent: 1, session: 106, start: 56},  // left, and its parent is gone
		107: {state: 'S', parent: 1, session: 1, start: 57},    // the container's own
		108: {state: 'S', parent: 101, session: 108, start: 9}, // older than its parent: a number used again
	}
	for name, tc := range map[string]struct {
		session bool
		held    map[int]*member
		want    []int
	}{
		"the session is the leader's": {session: true, want: []int{100, 101, 102, 103, 104}},
		"it is somebody else's":       {},
		"a held one's children":       {held: map[int]*member{102: {start: 52}}, want: []int{103}},
		"what is held is not new":     {session: true, held: map[int]*member{100: {start: 50}, 101: {start: 51}, 104: {start: 54}}, want: []int{102, 103}},
	} {
		tr := &tree{leader: Leader{Pid: leader}, held: tc.held}
		got := tr.descend(maps.Clone(all), tc.session)
		slices.Sort(got)
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}

func TestParseStat(t *testing.T) {
	line := func(name string) string {
		return "7 (" + name + ") S 3 5 6 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 99 100"
	}
	want := stat{state: 'S', parent: 3, session: 6, start: 4711}
	for _, name := range []string{"sh", "a b", ") Z 1 1 1", "\n", ""} {
		if got, ok := parseStat([]byte(line(name))); !ok || got != want {
			t.Errorf("%q: %+v, %v", name, got, ok)
		}
	}
	for _, bad := range []string{"", "7 sh S 3 5 6", "7 (sh) S 3 5", strings.Replace(line("sh"), " 6 ", " x ", 1), strings.ReplaceAll(line("sh"), ")", "")} {
		if got, ok := parseStat([]byte(bad)); ok {
			t.Errorf("%q: %+v", bad, got)
		}
	}
	own, err := readStat(os.Getpid())
	if err != nil || own.parent != os.Getppid() || own.zombie() || own.start == 0 {
		t.Errorf("this process: %+v, %v", own, err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("7 (a) b) S 3 5 6 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 99"))
	f.Add([]byte(")"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, ok := parseStat(data); ok && s.state == 0 {
			t.Errorf("%q has no state", data)
		}
	})
}

// led is a control group with a session in it.
type led struct {
	*Hierarchies
	name   string
	leader Leader
	other  int // a process of the group that is not of the session
}

// lead runs a script as the leader of a session, beside another process, and
// waits until it has said a line. Both are in a control group of their own.
func lead(t *testing.T, script string) led {
	t.Helper()
	h, err := NewHierarchies()
	if err != nil {
		t.Fatal(err)
	}
	l := led{Hierarchies: h, name: "/gantry-tree-" + strconv.Itoa(os.Getpid()) + "-" + strings.ToLower(filepath.Base(t.Name()))}
	group(t, h, l.name)
	var pids []int
	for len(pids) < 3 { // a shell and what it starts
		if pids, err = h.Procs(l.name); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	l.other = pids[0]
	l.leader.Since = boottime()
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
	l.leader.Pid = cmd.Process.Pid
	for _, root := range h.roots {
		if strings.Contains(root, "cpuset") {
			continue // an empty set takes no process
		}
		if err := os.WriteFile(filepath.Join(root, l.name, "cgroup.procs"), []byte(strconv.Itoa(l.leader.Pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := in.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(r).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the leader said %q, %v", line, err)
	}
	return l
}

func TestKillTree(t *testing.T) {
	for name, script := range map[string]string{
		"Alone":    "echo ready; exec sleep 1000",
		"Children": "sleep 1000 & sleep 1000 & echo ready; wait",
		"Nested":   "sh -c 'sleep 1000 & sh -c \"sleep 1000 & wait\"' & sleep 0.3; echo ready; wait",
		"Setsid":   "setsid sleep 1000 & setsid sh -c 'sleep 1000 & wait' & sleep 0.3; echo ready; wait",
		"Orphans":  "(sleep 1000 &); (sleep 1000 &); echo ready; exec sleep 1000",
		"Ended":    "(sleep 1000 &); sh -c 'sleep 1000 & sleep 1000 & wait' & sleep 0.3; echo ready",
		"Deaf":     "trap '' TERM HUP INT CONT; sleep 1000 & echo ready; wait; wait; wait",
		"Forks":    "echo ready; while :; do sleep 1000 & sleep 0.002; done",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lead(t, script)
			if name == "Ended" {
				for !goneFromProc(l.leader.Pid) {
					time.Sleep(time.Millisecond)
				}
			}
			others := l.others(t)
			if err := l.KillTree(t.Context(), l.name, l.leader); err != nil {
				t.Fatal(err)
			}
			if left, err := l.Procs(l.name); err != nil || !slices.Equal(left, others) {
				t.Errorf("left: %v, want %v, %v", left, others, err)
			}
			if s, err := readStat(l.other); err != nil || s.state == 'T' {
				t.Errorf("the other process: %+v, %v", s, err)
			}
			// A second time there is nothing to do.
			if err := l.KillTree(t.Context(), l.name, l.leader); err != nil {
				t.Error(err)
			}
		})
	}
}

func goneFromProc(pid int) bool {
	_, err := os.Stat("/proc/" + strconv.Itoa(pid))
	return os.IsNotExist(err)
}

// others are the processes of the group that have nothing to do with the leader.
func (l led) others(t *testing.T) []int {
	t.Helper()
	own, err := readStat(l.other)
	if err != nil {
		t.Fatal(err)
	}
	pids, err := l.Procs(l.name)
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(pids, func(pid int) bool {
		s, err := readStat(pid)
		return err != nil || s.session != own.session
	})
}

// A number that is not that of a leader in the group is somebody else's.
func TestKillTreeRefuses(t *testing.T) {
	l := lead(t, "echo ready; exec sleep 1000")
	later := Leader{Pid: l.leader.Pid, Since: boottime() + time.Second}
	for name, leader := range map[string]Leader{
		"not in the group": {Pid: os.Getpid()},
		"leads no session": {Pid: l.other},
		"is too old":       later,
	} {
		if err := l.KillTree(t.Context(), l.name, leader); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, pid := range []int{l.other, l.leader.Pid} {
		if s, err := readStat(pid); err != nil || s.state == 'T' || s.zombie() {
			t.Errorf("process %d: %+v, %v", pid, s, err)
		}
	}
}
