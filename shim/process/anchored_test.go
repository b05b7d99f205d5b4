package process

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/shim/anchor"
)

// both are the tests that pass in either way.
var both = []string{
	"TestExitCodes", "TestSignal", "TestMany", "TestSweep", "TestPinned", "TestOpenPinnedNothing",
}

// TestAnchored is the suite below an anchor, which ends when that has.
func TestAnchored(t *testing.T) {
	out, ended := below(t, "^("+strings.Join(both, "|")+")$")
	for _, name := range both {
		if !strings.Contains(out, "--- PASS: "+name+" ") {
			t.Errorf("%s does not pass", name)
		}
	}
	if ended != nil {
		t.Errorf("the anchor ended: %v", ended)
	}
	if t.Failed() {
		t.Log(out)
	}
}

// below runs tests of this binary below an anchor, and returns what they say and how
// the anchor ended.
func below(t *testing.T, tests string) (out string, ended error) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir, err := os.MkdirTemp("", "anchor") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "a")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	c := exec.Command(os.Args[0], "-test.run="+tests, "-test.v", "-test.count=1", "-test.timeout=5m")
	c.Env = append(os.Environ(), anchorEnv+"="+socket)
	c.Stdout, c.Stderr, c.ExtraFiles = w, w, []*os.File{w}
	gate, err := anchor.Wrap(c, socket)
	if err != nil {
		t.Fatal(err)
	}
	defer gate.Close()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := gate.Open(); err != nil {
		t.Error(err)
	}
	said, err := io.ReadAll(r) // to the end of all who have it
	if err != nil {
		t.Error(err)
	}
	ended = c.Wait()
	if _, err := os.Lstat(socket); ended == nil && !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its socket: %v", err)
	}
	return string(said), ended
}

// TestAnchorLost: without the anchor nothing blocks. What it had kept runs on, and
// how that ends is not known; how later ones end is.
func TestAnchorLost(t *testing.T) {
	if os.Getenv(anchorEnv) == "" {
		if out, ended := below(t, "^TestAnchorLost$"); !strings.Contains(out, "--- PASS: TestAnchorLost ") || ended == nil {
			t.Errorf("the anchor ended: %v; %s", ended, out)
		}
		return
	}
	before, pinned := orphan(t, "exec sleep 1000"), orphan(t, "exec sleep 1000")
	path := filepath.Join(t.TempDir(), "pin")
	if err := pinned.Pin(path); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(os.Getppid(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		late := orphan(t, fmt.Sprintf("sleep 0.1; exit %d", i))
		if exit, err := late.Wait(within(t)); err != nil || exit.Code != i {
			t.Errorf("one that comes later: %+v, %v; want %d", exit, err, i)
		}
	}
	TestSweep(t)
	again, err := OpenPinned(path, pinned.Pid())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	for _, p := range []*Process{before, again} {
		if p.Ended() {
			t.Error("one that runs is told to have ended")
		}
		if err := p.Signal(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// Whoever is the parent now may be slow to reap.
		if exit, err := p.Wait(within(t)); err == nil && exit.Code != 137 || err != nil && !errdefs.IsNotFound(err) {
			t.Errorf("%+v, %v", exit, err)
		}
	}
	if err := Unpin(path); err != nil {
		t.Error(err)
	}
	if _, err := OpenPinned(path, pinned.Pid()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after unpin: %v", err)
	}
}

func TestParsePin(t *testing.T) {
	whole := pinned{Pid: 7, Start: 9, Anchor: "/run/a", ID: 3}
	path := filepath.Join(t.TempDir(), "pin")
	if err := whole.write(path); err != nil {
		t.Fatal(err)
	}
	if p, ok := readPin(path); !ok || p != whole {
		t.Errorf("%+v, %t", p, ok)
	}
	for _, text := range []string{"", "{", "{}", `{"Pid":-1}`, `{"Pid":"x"}`} {
		if p, ok := parsePin([]byte(text)); ok {
			t.Errorf("%q: %+v", text, p)
		}
	}
}

// TestOtherNumber: a number that has become another's is not the process that was
// pinned.
func TestOtherNumber(t *testing.T) {
	own := named(os.Getpid())
	if p, err := own.open(); err != nil {
		t.Error(err)
	} else {
		p.Close()
	}
	own.Start++
	if p, err := own.open(); !errdefs.IsNotFound(err) {
		t.Errorf("%+v, %v", p, err)
	}
}

func FuzzParsePin(f *testing.F) {
	f.Add([]byte(`{"Pid":7,"Start":9}`))
	f.Fuzz(func(_ *testing.T, text []byte) { parsePin(text) })
}
