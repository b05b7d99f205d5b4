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
	program, err := files.ReadFile("bin/pause")
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unpack pause: the program is not part of this build: run `make build`: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("unpack pause: %w", err)
	}
	if err := unpack(dir, program); err != nil {
		return fmt.Errorf("unpack pause: %w", err)
	}
	return nil
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
	return put(filepath.Join(dir, Program), program, 0o755)
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
