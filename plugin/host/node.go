package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

const (
	localtime = "/etc/localtime"
	zoneDir   = "/usr/share/zoneinfo"
)

// ZoneFile is the node's file of a time zone by its name, or of the node's own.
func ZoneFile(name string, local bool) (string, error) {
	path := filepath.Join(zoneDir, name)
	if local {
		path = localtime
	}
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", fmt.Errorf("timezone: %w", classed(err))
	}
	fi, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("timezone: %w", classed(err))
	}
	if !fi.Mode().IsRegular() {
		return "", fmt.Errorf("timezone: %q is not the name of a zone: %w", name, errdefs.ErrInvalidArgument)
	}
	return path, nil
}

// ReadMountsFile reads the file of default_mounts_file.
func ReadMountsFile(name string) ([]byte, error) {
	b, err := readRegular(name)
	if err != nil {
		return nil, fmt.Errorf("read default_mounts_file: %w", err)
	}
	return b, nil
}

// ResolveSource follows the links of a path on the node. found is false for one
// that does not exist.
func ResolveSource(path string) (source string, found bool, err error) {
	source, err = filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	if err != nil {
		return "", false, classed(err)
	}
	return source, true, nil
}
