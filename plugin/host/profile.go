package host

import (
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxFile bounds a file of the configuration.
const maxFile = 4 << 20

// ReadProfile reads a seccomp profile of the node. Only a regular file of
// reasonable size is one.
func ReadProfile(name string) ([]byte, error) {
	b, err := readRegular(name)
	if err != nil {
		return nil, fmt.Errorf("read seccomp profile: %w", err)
	}
	return b, nil
}

func readRegular(name string) ([]byte, error) {
	// Not to wait for the other end of a pipe, should it be one.
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, classed(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, classed(err)
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file: %w", name, errdefs.ErrFailedPrecondition)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, classed(err)
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%s: longer than %d bytes: %w", name, maxFile, errdefs.ErrFailedPrecondition)
	}
	return b, nil
}
