package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// What the test binary is told by its environment.
const (
	// anchorEnv is the socket of the anchor below which it runs.
	anchorEnv = "GANTRY_TEST_ANCHOR"
	// pinEnv makes it a process that has a script run by another, and pins it.
	pinEnv    = "GANTRY_TEST_PIN"
	scriptEnv = "GANTRY_TEST_SCRIPT"
)

// reaper is that of the test's process; it reaps until the end.
var reaper = sync.OnceValues(func() (*Reaper, error) { return NewReaper(os.Getenv(anchorEnv)) })

func TestMain(m *testing.M) {
	if path := os.Getenv(pinEnv); path != "" {
		supervise(path)
		return
	}
	os.Exit(m.Run())
}

// supervise starts a shell, pins it, says its number and waits to be killed.
func supervise(path string) {
	r, err := reaper()
	if err != nil {
		panic(err)
	}
	p, err := orphaned(r, os.Getenv(scriptEnv))
	if err != nil {
		panic(err)
	}
	if err := p.Pin(path); err != nil {
		panic(err)
	}
	fmt.Println(p.Pid())
	select {}
}

// orphaned has a shell started by another, and opens it.
func orphaned(r *Reaper, script string) (*Process, error) {
	defer r.Hold()()
	pid, err := printed(r, exec.Command("sh", "-c", `sh -c "$0" >/dev/null 2>&1 & exec echo $!`, script))
	if err != nil {
		return nil, err
	}
	return r.Open(pid)
}

// printed runs a command that prints a number and returns it.
func printed(r *Reaper, c *exec.Cmd) (n int, err error) {
	var out bytes.Buffer
	c.Stdout = &out
	exited, err := r.Start(c)
	if err != nil {
		return 0, err
	}
	if status, err := r.Wait(c, exited); err != nil || status != 0 {
		return 0, fmt.Errorf("status %d, %w", status, err)
	}
	_, err = fmt.Fscan(&out, &n)
	return n, err
}

// orphan is orphaned for a test.
func orphan(t *testing.T, script string) *Process {
	t.Helper()
	r, err := reaper()
	if err != nil {
		t.Fatal(err)
	}
	p, err := orphaned(r, script)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestSupported(t *testing.T) {
	if err := Supported(); err != nil {
		t.Fatal(err)
	}
}

func TestExitCodes(t *testing.T) {
	for script, want := range map[string]int{
		"exit 0": 0, "exit 7": 7, "exit 255": 255, "kill -9 $$": 137, "kill -TERM $$": 143, "sleep 0.1; exit 3": 3,
	} {
		p := orphan(t, script)
		exit, err := p.Wait(within(t))
		if err != nil || exit.Code != want || exit.At.IsZero() {
			t.Errorf("%s: %+v, %v; want code %d", script, exit, err, want)
		}
	}
}

func TestSignal(t *testing.T) {
	p := orphan(t, "exec sleep 1000")
	if p.Ended() {
		t.Error("it has ended")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("wait: %v", err)
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(within(t)); err != nil || exit.Code != 137 {
		t.Errorf("%+v, %v", exit, err)
	}
	if err := p.Signal(unix.SIGKILL); !errdefs.IsNotFound(err) {
		t.Errorf("signal after the end: %v", err)
	}
}

// Many processes end at once, while the reaper and commands are at work: no code
// is lost, none is another's, and no thread waits for each.
func TestMany(t *testing.T) {
	const n = 50
	var all []*Process
	for i := range n {
		all = append(all, orphan(t, fmt.Sprintf("sleep 0.%d; exit %d", i%3, i)))
	}
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil || len(threads) > n {
		t.Errorf("%d threads, %v", len(threads), err)
	}
	for i, p := range all {
		if exit, err := p.Wait(within(t)); err != nil || exit.Code != i {
			t.Errorf("%d: %+v, %v", i, exit, err)
		}
	}
}

// What nobody waits for is reaped.
func TestSweep(t *testing.T) {
	r, err := reaper()
	if err != nil {
		t.Fatal(err)
	}
	pid, err := printed(r, exec.Command("sh", "-c", `(sleep 0.1) >/dev/null 2>&1 & echo $!`))
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat("/proc/" + strconv.Itoa(pid)); errors.Is(err, os.ErrNotExist) {
			return
		}
		if time.Now().After(end) {
			t.Fatal("a process is left unreaped")
		}
	}
}

// pinnedBy starts a script in a process that pins it, and kills that.
func pinnedBy(t *testing.T, script string) (path string, pid int) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := reaper(); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "pin")
	t.Cleanup(func() {
		if err := Unpin(path); err != nil {
			t.Error(err)
		}
	})
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), pinEnv+"="+path, scriptEnv+"="+script)
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	defer w.Close()
	c.Stdout = w
	r, _ := reaper()
	exited, err := r.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Wait(c, exited); err != nil {
		t.Fatal(err)
	}
	return path, pid
}

// A pinned process is found after the death of the one who watched it, while it
// runs and after it was reaped by another.
func TestPinned(t *testing.T) {
	path, pid := pinnedBy(t, "sleep 0.3; exit 9")
	if exit, err := PinnedExit(path); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("while it runs: %+v, %v", exit, err)
	}
	p, err := OpenPinned(path, pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if exit, err := p.Wait(within(t)); err != nil || exit.Code != 9 {
		t.Errorf("%+v, %v", exit, err)
	}
	for range 2 { // as often as anybody asks
		late, err := OpenPinned(path, pid)
		if err != nil {
			t.Fatal(err)
		}
		if exit, err := late.Wait(within(t)); err != nil || exit.Code != 9 {
			t.Errorf("after it was reaped: %+v, %v", exit, err)
		}
		late.Close()
	}
	if exit, err := PinnedExit(path); err != nil || exit.Code != 9 || exit.At.IsZero() {
		t.Errorf("%+v, %v", exit, err)
	}
	for range 2 {
		if err := Unpin(path); err != nil {
			t.Error(err)
		}
	}
}

func TestOpenPinnedNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if _, err := OpenPinned(path, 1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenPinned(path, 1); !errdefs.IsNotFound(err) {
		t.Errorf("a plain file: %v", err)
	}
}

func TestParseStat(t *testing.T) {
	line := func(name, state, code string) string {
		return "12 (" + name + ") " + state + " 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 5 0 0 18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 " + code + "\n"
	}
	for in, want := range map[string]int{
		line("sh", "Z", "1792"): 7, line("a) Z (b", "Z", "9"): 137, line("sh", "S", "0"): -1, "": -1, "12 (sh) Z": -1, line("sh", "Z", "x"): -1,
	} {
		got := -1
		if s, ok := parseStat(in); ok && s.zombie() {
			got = codeOf(s.status)
		}
		if got != want {
			t.Errorf("%q: %d, want %d", in, got, want)
		}
	}
	if s, ok := parseStat(line("a) b", "S", "0")); !ok || s.start != 5 {
		t.Errorf("%+v, %t", s, ok)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add("1 (sh) Z 1")
	f.Fuzz(func(_ *testing.T, s string) { parseStat(s) })
}
