package bootstrap

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestUnitsOf(t *testing.T) {
	for groups, want := range map[string][2]string{
		"0::/system.slice/containerd.service\n":                                {"system.slice", "containerd.service"},
		"0::/runtime.slice/runtime-a.slice/x.service/supervisor\n":             {"runtime-a.slice", "x.service"},
		"4:memory:/user.slice\n1:name=systemd:/system.slice/a.service\n0::/\n": {"system.slice", "a.service"},
		"0::/\n1:name=systemd:/system.slice/a.service\n":                       {"system.slice", "a.service"},
		"0::/user.slice/user-0.slice/session-1.scope\n":                        {"user-0.slice", ""},
		"0::/\n":  {"", ""},
		"garbage": {"", ""},
	} {
		if slice, service := unitsOf(groups); slice != want[0] || service != want[1] {
			t.Errorf("%q: %q, %q", groups, slice, service)
		}
	}
}

// TestEarlyLines: what is said before the first bundle is kept for that, as far as it is
// not too much, and what is said after the last one is not.
func TestEarlyLines(t *testing.T) {
	l := &logs{}
	for i := range maxEarly + 5 {
		if _, err := fmt.Fprintln(l, i); err != nil {
			t.Fatal(err)
		}
	}
	bundle := t.TempDir()
	pipe := filepath.Join(bundle, "log")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(pipe, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	l.Add(bundle)
	fmt.Fprintln(l, "then")
	var want string
	for i := range maxEarly {
		want += fmt.Sprintln(i)
	}
	buf := make([]byte, 4096)
	if n, err := f.Read(buf); err != nil || string(buf[:n]) != want+"then\n" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	f.Close()
	fmt.Fprintln(l, "to nobody")
	if len(l.early) > 0 {
		t.Errorf("kept: %q", l.early)
	}
}
