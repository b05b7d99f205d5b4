package anchor

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// anchored is an anchor with a shell below it.
type anchored struct {
	t      *testing.T
	socket string
	cmd    *exec.Cmd
	gate   *Gate
	said   *os.File // what the shell says
	told   *os.File // what it is told
}

// run starts a shell below an anchor. What it says is read from said; it has a pipe
// as its input.
func run(t *testing.T, program string, args ...string) anchored {
	t.Helper()
	dir, err := os.MkdirTemp("", "anchor") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a := anchored{t: t, socket: filepath.Join(dir, "a")}
	said, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r, told, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	a.said, a.told = said, told
	t.Cleanup(func() { said.Close(); told.Close() })
	a.cmd = exec.Command(program, args...)
	a.cmd.Stdin, a.cmd.Stdout, a.cmd.Stderr, a.cmd.ExtraFiles = r, w, w, []*os.File{w}
	if a.gate, err = Wrap(a.cmd, a.socket); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.gate.Close)
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.Close()
	w.Close()
	return a
}

func (a anchored) open() {
	a.t.Helper()
	if err := a.gate.Open(); err != nil {
		a.t.Fatal(err)
	}
	a.gate.Close()
}

func (a anchored) dial() *Session {
	a.t.Helper()
	s, err := Dial(a.socket)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { s.Close() })
	return s
}

// pid reads a number that the shell says.
func (a anchored) pid() (pid int) {
	a.t.Helper()
	if err := a.said.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		a.t.Fatal(err)
	}
	if _, err := fmt.Fscanln(a.said, &pid); err != nil {
		a.t.Fatal(err)
	}
	return pid
}

// over waits for the end of the anchor.
func (a anchored) over() {
	a.t.Helper()
	a.told.Close()
	if err := a.cmd.Wait(); err != nil {
		a.t.Error(err)
	}
	if _, err := os.Lstat(a.socket); !errors.Is(err, os.ErrNotExist) {
		a.t.Errorf("its socket: %v", err)
	}
	if _, err := Dial(a.socket); !errdefs.IsNotFound(err) {
		a.t.Errorf("it is reached: %v", err)
	}
}

// until waits for the end of a process that is kept.
func (a anchored) until(s *Session, id ID) (end End) {
	a.t.Helper()
	for limit := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		end, err := s.Status(id)
		if err == nil {
			return end
		}
		if !errdefs.IsFailedPrecondition(err) || time.Now().After(limit) {
			a.t.Fatal(err)
		}
	}
}

// orphans is a shell that has a process started for each line, which is an orphan when
// its number is said. It exits with the line when there is a file of that name.
const orphans = `cd $(dirname $0); while read n; do echo $(sh -c '(while [ ! -e $0 ]; do sleep 0.02; done; exit $0) >/dev/null 2>&1 3>&1 <&1 & echo $!' $n); done`

func runOrphans(t *testing.T) anchored {
	t.Helper()
	return run(t, "sh", "-c", orphans, filepath.Join(t.TempDir(), "x"))
}

func (a anchored) orphan(code int) (pid int) {
	a.t.Helper()
	if _, err := fmt.Fprintln(a.told, code); err != nil {
		a.t.Fatal(err)
	}
	return a.pid()
}

// end has the orphan with a code exit.
func (a anchored) end(code int) {
	a.t.Helper()
	a.must(os.WriteFile(filepath.Join(filepath.Dir(a.cmd.Args[5]), fmt.Sprint(code)), nil, 0o600))
}

func (a anchored) must(err error) {
	a.t.Helper()
	if err != nil {
		a.t.Fatal(err)
	}
}

func unreaped(pid int) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	return err == nil
}

// ended waits until a process has ended and lies unreaped.
func (a anchored) ended(pid int) {
	a.t.Helper()
	for limit := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		a.must(err)
		if bytes.Contains(stat, []byte(") Z ")) {
			return
		}
		if time.Now().After(limit) {
			a.t.Fatalf("process %d does not end", pid)
		}
	}
}

// reaped waits until a process is gone.
func (a anchored) reaped(pid int) {
	a.t.Helper()
	for limit := time.Now().Add(time.Minute); unreaped(pid); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(limit) {
			a.t.Fatalf("process %d is not reaped", pid)
		}
	}
}

// The anchor reaps what nobody wants to know of, and tells of the rest, for as long
// as was said; then it ends.
func TestKeep(t *testing.T) {
	a := runOrphans(t)
	a.open()
	s, other := a.dial(), a.dial()
	unwanted, brief, long := a.orphan(1), a.orphan(4), a.orphan(5)
	kept := map[int]ID{}
	for _, pid := range []int{brief, long} {
		id, err := s.Keep(pid)
		a.must(err)
		if again, err := other.Keep(pid); err != nil || again != id {
			t.Errorf("kept again: %d, %v, first %d", again, err, id)
		}
		kept[pid] = id
	}
	a.must(s.Pin(kept[long]))
	if _, err := other.Status(kept[brief]); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("of one that runs: %v", err)
	}
	for code, pid := range map[int]int{1: unwanted, 4: brief, 5: long} {
		a.end(code)
		a.reaped(pid)
	}
	for pid, code := range map[int]int{brief: 4, long: 5} {
		if end := a.until(other, kept[pid]); end.Status.ExitStatus() != code || time.Since(end.At).Abs() > time.Minute {
			t.Errorf("%+v, want code %d", end, code)
		}
	}
	s.Close()
	for limit := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if _, err := other.Status(kept[brief]); errdefs.IsNotFound(err) {
			break
		}
		if time.Now().After(limit) {
			t.Fatal("what was kept for a session stays after it")
		}
	}
	if end, err := other.Status(kept[long]); err != nil || end.Status.ExitStatus() != 5 {
		t.Errorf("what was pinned: %+v, %v", end, err)
	}
	other.Close()
	a.told.Close() // the shell ends
	late := a.dial()
	for range 2 {
		a.must(late.Drop(kept[long]))
	}
	if err := late.Pin(kept[long]); !errdefs.IsNotFound(err) {
		t.Errorf("pin of what was dropped: %v", err)
	}
	late.Close()
	a.over()
}

// While anybody holds nothing is reaped, but one that is asked for.
func TestHold(t *testing.T) {
	a := runOrphans(t)
	a.open()
	s, other := a.dial(), a.dial()
	a.must(s.Hold())
	a.must(s.Hold())
	a.must(other.Hold())
	first, second := a.orphan(1), a.orphan(2)
	id, err := s.Keep(first)
	a.must(err)
	a.end(1)
	a.end(2)
	if end := a.until(s, id); end.Status.ExitStatus() != 1 {
		t.Errorf("%+v", end)
	}
	a.reaped(first)
	a.must(s.Release())
	a.must(s.Release())
	if err := s.Release(); !errdefs.IsInvalidArgument(err) {
		t.Errorf("released once more than held: %v", err)
	}
	a.ended(second) // and there, although somebody else has released
	if id, err := s.Keep(second); err != nil {
		t.Errorf("of one that has ended: %v", err)
	} else if end := a.until(other, id); end.Status.ExitStatus() != 2 {
		t.Errorf("%+v", end)
	}
	third := a.orphan(3)
	a.end(3)
	other.Close() // and with it its hold
	a.reaped(third)
	s.Close()
	a.over()
}

func TestRefused(t *testing.T) {
	a := runOrphans(t)
	a.open()
	s := a.dial()
	for _, pid := range []int{0, -1, 1, os.Getpid(), 1 << 40} {
		if _, err := s.Keep(pid); !errdefs.IsNotFound(err) {
			t.Errorf("keep %d: %v", pid, err)
		}
	}
	if _, err := s.Status(12345); !errdefs.IsNotFound(err) {
		t.Errorf("of nobody: %v", err)
	}
	if _, err := s.call('x', 0); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an unknown operation: %v", err)
	}
	for _, size := range []int{1, 15, 17, 32, 100} {
		if _, err := s.conn.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, answerSize+1)
		if n, err := s.conn.Read(answer); n != answerSize || err != nil || answer[0] != 1 {
			t.Errorf("a packet of %d bytes: %d bytes, %v, %v", size, n, err, answer)
		}
	}
	var all sync.WaitGroup
	for range 400 { // more than it serves at a time, and than may wait
		all.Go(func() {
			m, err := Dial(a.socket)
			if err != nil {
				t.Error(err)
				return
			}
			defer m.Close()
			if _, err := m.Status(1); !errdefs.IsNotFound(err) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	a.must(s.Drop(1))
	s.Close()
	a.over()
}

// The program has its files, arguments, session and signals, and what was done to the
// anchor before.
func TestProgram(t *testing.T) {
	a := run(t, "sh", "-c", `trap 'echo $PPID $1 $(cat /proc/self/oom_score_adj); exit' TERM; echo $$; while :; do sleep 0.02; done`, "name", "word")
	a.must(os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", a.cmd.Process.Pid), []byte("700\n"), 0))
	a.open()
	pid := a.pid()
	for fd, there := range []bool{true, true, true, true, false, false, false} {
		if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); (err == nil) != there {
			t.Errorf("its file %d: %v", fd, err)
		}
	}
	a.must(unix.Kill(a.cmd.Process.Pid, unix.SIGTERM)) // which is nothing to the anchor
	a.must(unix.Kill(pid, unix.SIGTERM))
	out, err := io.ReadAll(a.said)
	a.must(err)
	want := fmt.Sprintf("%d word 700", a.cmd.Process.Pid)
	if got := strings.TrimSpace(string(out)); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	a.over()
}

// A program that cannot be executed is told of by its own file.
func TestNoProgram(t *testing.T) {
	a := run(t, "/no/such/program")
	a.open()
	if out, err := io.ReadAll(a.said); err != nil || !strings.Contains(string(out), "cannot be executed") {
		t.Errorf("%q, %v", out, err)
	}
	a.over()
}

// An anchor whose program is never let go ends.
func TestNeverOpened(t *testing.T) {
	a := run(t, "sh", "-c", "echo begun")
	a.gate.Close()
	if out, err := io.ReadAll(a.said); err != nil || len(out) > 0 {
		t.Errorf("%q, %v", out, err)
	}
	var exit *exec.ExitError
	if err := a.cmd.Wait(); !errors.As(err, &exit) {
		t.Errorf("%v", err)
	}
}

// After its death a session is over, at once.
func TestKilled(t *testing.T) {
	a := run(t, "sh", "-c", "echo $$; read line")
	a.open()
	a.pid() // a program that is not executed yet has the listener still
	s := a.dial()
	a.must(s.Hold())
	a.must(a.cmd.Process.Kill())
	for range 2 {
		if err := s.Hold(); !errdefs.IsUnavailable(err) {
			t.Errorf("%v", err)
		}
	}
	_ = a.cmd.Wait() // it was killed; its files need not have been closed in any order
	if _, err := Dial(a.socket); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
}
