package shimtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// BuildGantry builds our own shim into dir, as it is now.
func BuildGantry(dir string) (shim string, err error) {
	top, err := repository()
	if err != nil {
		return "", err
	}
	shim = filepath.Join(dir, "containerd-shim-gantry-v2")
	return shim, build(top, shim, "CGO_ENABLED=0", "./cmd/containerd-shim-gantry-v2")
}

// Binaries returns the runc shim and runc of this repository, building those
// that bin/ lacks.
func Binaries() (shim, runc string, err error) {
	p, err := built()
	return p[0], p[1], err
}

var built = sync.OnceValues(func() ([2]string, error) {
	top, err := repository()
	if err != nil {
		return [2]string{}, err
	}
	bin := filepath.Join(top, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return [2]string{}, err
	}
	unlock, err := lock(filepath.Join(bin, ".shimtest.lock"))
	if err != nil {
		return [2]string{}, err
	}
	defer unlock()
	shim := filepath.Join(bin, "containerd-shim-runc-v2")
	if err := build(top, shim, "CGO_ENABLED=0", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"); err != nil {
		return [2]string{}, err
	}
	runc := filepath.Join(bin, "runc")
	if err := build(filepath.Join(top, "tools", "runc"), runc, "CGO_ENABLED=1", "-tags=seccomp", "github.com/opencontainers/runc"); err != nil {
		return [2]string{}, err
	}
	return [2]string{shim, runc}, nil
})

func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("no go.mod above the test")
}

func build(dir, out, env string, args ...string) error {
	if _, err := os.Stat(out); err == nil {
		return nil
	}
	cmd := exec.Command("go", append([]string{"build", "-trimpath", "-o", out}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env)
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", filepath.Base(out), err, msg)
	}
	return nil
}

// lock keeps two test binaries from building the same file.
func lock(path string) (func(), error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}
