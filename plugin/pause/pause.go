// Package pause carries the program that holds a pod's namespaces open, and
// the root filesystem it runs in.
//
// The program is pause.c, built by build.sh before the Go build. All pods
// share one directory, which has nothing but the program and the places where
// a runtime mounts; no image, snapshot or mount is needed. Start reading at
// Unpack.
package pause

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

//go:generate sh build.sh

// files holds bin/pause, if it was built.
//
//go:embed all:bin
var files embed.FS

// Program is the path of the program within the root filesystem.
const Program = "/pause"

var (
	// dirs are where a runtime mounts; it could not make them in a root that
	// is read-only.
	dirs = []string{"dev", "etc", "proc", "run", "sys", "tmp"}
	// empty are the files that a pod's own are mounted over.
	empty = []string{"etc/hostname", "etc/hosts", "etc/resolv.conf"}
)

// Unpack makes the root filesystem in dir or repairs the one that is there,
// beneath running pods. Anybody may read it: the program runs as any user.
func Unpack(dir string) error {
	program, err := Binary()
	if err == nil {
		err = unpack(dir, program)
	}
	if err != nil {
		return fmt.Errorf("unpack pause: %w", err)
	}
	return nil
}

// Binary is the program. FailedPrecondition says that it was not built.
func Binary() ([]byte, error) {
	program, err := files.ReadFile("bin/pause")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the program is not part of this build: run `make build`: %w", errdefs.ErrFailedPrecondition)
	}
	return program, err
}

func unpack(dir string, program []byte) error {
	for _, d := range append([]string{""}, dirs...) {
		if err := makeDir(filepath.Join(dir, d)); err != nil {
			return err
		}
	}
	for _, f := range empty {
		if err := put(filepath.Join(dir, f), nil, 0o644); err != nil {
			return err
		}
	}
	if err := put(filepath.Join(dir, Program), program, 0o755); err != nil {
		return err
	}
	return allowExec(dir)
}

// allowExec lets programs below dir be executed where the mount it is on does
// not, as that of /run on many nodes. The directory mounted on itself has
// options of its own, which a runtime's bind of it takes over.
func allowExec(dir string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("read options of the mount of %s: %w", dir, err)
	}
	if fs.Flags&unix.ST_NOEXEC == 0 {
		return nil // also after an earlier start
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s on itself: %w", dir, err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("allow programs in %s: %w", dir, err)
	}
	return nil
}

// makeDir makes a directory of mode 755 whatever the umask.
func makeDir(path string) error {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	return os.Chmod(path, 0o755)
}

// put writes a file if it is not the same already. It replaces the file: the
// program may be running.
func put(path string, content []byte, mode fs.FileMode) error {
	have, err := os.ReadFile(path)
	if err == nil && bytes.Equal(have, content) {
		return os.Chmod(path, mode)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	temp := path + ".new"
	if err := os.WriteFile(temp, content, mode); err != nil {
		return err
	}
	if err := os.Chmod(temp, mode); err != nil {
		return err
	}
	return os.Rename(temp, path)
}
