package oci

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"golang.org/x/sys/unix"
)

// needCopies skips where a copy cannot be made.
func needCopies(t *testing.T) {
	t.Helper()
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	of, err := identify(f)
	if err != nil {
		t.Fatal(err)
	}
	c, err := seal(f, of)
	switch {
	case os.Geteuid() != 0, errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP): // before Linux 6.0
		t.Skipf("needs root and files in memory that are immutable: %v", err)
	case err != nil:
		t.Fatal(err)
	}
	c.Close()
}

// TestCopy executes a program by the name crun.
func TestCopy(t *testing.T) {
	needCopies(t)
	echo, err := exec.LookPath("echo")
	if err != nil {
		t.Fatal(err)
	}
	crun := filepath.Join(t.TempDir(), "crun")
	install := func(program string) {
		t.Helper()
		b, err := os.ReadFile(program)
		if err == nil {
			err = errors.Join(os.WriteFile(crun+".next", b, 0o755), os.Rename(crun+".next", crun))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var c Copy
	says := func(command, want string) {
		t.Helper()
		out, err := exec.Command(command, "a").CombinedOutput()
		if err != nil || string(out) != want {
			t.Errorf("%s: %q, %v", command, out, err)
		}
	}
	install(echo)
	first, firstDone := c.use(crun)
	again, done := c.use(crun)
	done()
	if first == crun || again != first {
		t.Fatalf("executed as %s, then as %s", first, again)
	}
	says(first, "a\n")
	if err := os.Chmod(first, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("change the mode of the copy: %v", err)
	}
	noLease(t, first)
	if err := os.WriteFile(first, []byte("#!/bin/sh"), 0o755); !errors.Is(err, unix.EPERM) {
		t.Errorf("write to the copy: %v", err)
	}

	// An upgrade; who has begun before goes on with what he has.
	dirname, err := exec.LookPath("dirname")
	if err != nil {
		t.Fatal(err)
	}
	install(dirname)
	second, done := c.use(crun)
	for range 10 {
		runtime.GC()
		says(first, "a\n")
	}
	says(second, ".\n")
	done()
	firstDone()
	closed := time.Now().Add(10 * time.Second)
	for _, err = os.Stat(first); err == nil && time.Now().Before(closed); _, err = os.Stat(first) {
		runtime.GC()
		time.Sleep(time.Millisecond)
	}
	if err == nil {
		t.Error("a copy that nobody uses is not closed")
	}

	for _, name := range []string{"sh", filepath.Join(t.TempDir(), "crun")} {
		if command, done := c.use(name); command != name {
			t.Errorf("%s is executed as %s", name, command)
		} else {
			done()
		}
	}
	if err := os.WriteFile(crun, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if command, _ := c.use(crun); command != crun {
		t.Errorf("a script is executed as %s", command)
	}
	if command, _ := (*Copy)(nil).use(echo); command != echo {
		t.Errorf("without a copy it is %s", command)
	}
}

// noLease wants that who can read a file, as a container can its /proc/self/exe, cannot
// take a lease, for which others would wait when they execute it.
func noLease(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("take a lease on the copy: %v", err)
	}
}

// TestErrorNamesTheRuntime for an operator to whom a number in /proc says nothing.
func TestErrorNamesTheRuntime(t *testing.T) {
	needCopies(t)
	no, err := exec.LookPath("false")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(no)
	crun := filepath.Join(t.TempDir(), "crun")
	if err := errors.Join(err, os.WriteFile(crun, b, 0o755)); err != nil {
		t.Fatal(err)
	}
	r := New("test", "a", t.TempDir(), &options.Options{BinaryName: crun, Root: t.TempDir()})
	r.Copy = new(Copy)
	_, err = r.Create(t.Context(), Process{PidFile: filepath.Join(t.TempDir(), "pid")})
	if r.Copy.file == nil || err == nil || !strings.Contains(err.Error(), crun+": ") {
		t.Error(err)
	}
}

// TestCopyOfCrun counts how often crun executes itself.
func TestCopyOfCrun(t *testing.T) {
	needCopies(t)
	crun, err := exec.LookPath("crun")
	if err != nil {
		t.Skip("there is no crun")
	}
	if n := executions(t, crun); n == 1 {
		t.Skip("this crun does not copy itself")
	}
	var c Copy
	command, done := c.use("crun")
	defer done()
	if n := executions(t, command); n != 1 {
		t.Errorf("crun was executed %d times", n)
	}
}

// executions runs a program to its end and counts what it executes, itself included.
func executions(t *testing.T, command string) (n int) {
	t.Helper()
	runtime.LockOSThread() // the tracer is a thread
	defer runtime.UnlockOSThread()
	var out strings.Builder
	cmd := exec.Command(command, "--version")
	cmd.Stderr = &out
	cmd.SysProcAttr = &unix.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for {
		var s unix.WaitStatus
		if _, err := unix.Wait4(cmd.Process.Pid, &s, 0, nil); err != nil {
			t.Fatal(err)
		}
		if s.Exited() || s.Signaled() {
			_ = cmd.Wait() // the output; the process is waited for already
			if s.ExitStatus() != 0 {
				t.Fatalf("%s --version: %v: %s", command, s, out.String())
			}
			return n
		}
		signal := int(s.StopSignal())
		if s.StopSignal() == unix.SIGTRAP {
			n, signal = n+1, 0
		}
		if err := unix.PtraceCont(cmd.Process.Pid, signal); err != nil {
			t.Fatal(err)
		}
	}
}
