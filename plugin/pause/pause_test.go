package pause

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestUnpack(t *testing.T) {
	// What a daemon is started with has no say.
	defer unix.Umask(unix.Umask(0o077))
	dir := filepath.Join(t.TempDir(), "rootfs")
	for _, harm := range []func() error{
		func() error { return nil },
		func() error { return os.WriteFile(filepath.Join(dir, Program), []byte("truncat"), 0o600) },
		func() error { return os.RemoveAll(filepath.Join(dir, "etc")) },
		func() error { return os.Chmod(dir, 0o700) },
	} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := harm(); err != nil {
			t.Fatal(err)
		}
		if err := Unpack(dir); err != nil {
			t.Fatal(err)
		}
		for path, mode := range map[string]os.FileMode{"": 0o755, "proc": 0o755, "etc/hosts": 0o644, Program: 0o755} {
			fi, err := os.Stat(filepath.Join(dir, path))
			if err != nil || fi.Mode().Perm() != mode {
				t.Errorf("%s: %v, %v; want %o", path, fi, err, mode)
			}
		}
		if leftover, _ := filepath.Glob(filepath.Join(dir, "*.new")); len(leftover) > 0 {
			t.Errorf("left: %v", leftover)
		}
	}
}

// A program that runs can be replaced.
// Where programs may not be executed, as in /run on many nodes, the pause
// program may, and a bind of its directory, which is what a runtime makes.
func TestUnpackNoExec(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	run := t.TempDir()
	mount := func(source, target, kind string, flags uintptr) {
		t.Helper()
		if err := unix.Mount(source, target, kind, flags, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) }) // the lower may have taken it along
	}
	mount("tmpfs", run, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV)
	dir, bound := filepath.Join(run, "rootfs"), filepath.Join(run, "bound")
	for range 2 { // the second finds what the first did
		if err := Unpack(dir); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := os.Mkdir(bound, 0o755); err != nil {
		t.Fatal(err)
	}
	mount(dir, bound, "", unix.MS_BIND)
	for _, d := range []string{dir, bound} {
		c := exec.Command(filepath.Join(d, Program))
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if err := c.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = c.Wait() // killed
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
	if err := unix.Unmount(dir, 0); err != unix.EINVAL {
		t.Errorf("mounted twice: %v", err)
	}
}

func TestUnpackBusy(t *testing.T) {
	dir := t.TempDir()
	if err := unpack(dir, mustRead(t, "/bin/sleep")); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(dir, Program), "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait() // killed
	}()
	if err := Unpack(dir); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The program ends with status 0 when it is asked to, outside a pod too.
func TestSignals(t *testing.T) {
	dir := t.TempDir()
	if err := Unpack(dir); err != nil {
		t.Fatal(err)
	}
	for _, sig := range []os.Signal{syscall.SIGTERM, syscall.SIGINT} {
		cmd := exec.Command(filepath.Join(dir, Program))
		stderr, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Its warning says that it blocks the signals by now.
		if n, err := stderr.Read(make([]byte, 100)); n == 0 {
			t.Errorf("no warning outside a pod: %v", err)
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", sig, err)
		}
	}
}

func TestSize(t *testing.T) {
	b, err := files.ReadFile("bin/pause")
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > 16<<10 {
		t.Errorf("the program has %d bytes: it is linked with a library", len(b))
	}
}
