// Package rootfs reads a container's root filesystem, whose content comes from
// an image and is hostile until proven otherwise.
//
// Every path is opened below a file descriptor of the root with openat2, so no
// symbolic link, no ".." and no magic link leads outside; nothing but regular
// files is read, with a bound on size and line length. It never runs anything
// from the image and never writes there. Start at LookupUser and at CopyTree.
package rootfs

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// resolveTries bounds the retries of an openat2 that lost a race against a
// rename somewhere on the machine.
const resolveTries = 64

// Open opens the directory a root filesystem is mounted on.
func Open(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open root filesystem %s: %w", dir, classed(err))
	}
	return os.NewFile(uintptr(fd), dir), nil
}

// ResolveIn opens name inside root, following links as a process chrooted
// there would. The file is opened for reference only (O_PATH): nothing
// happens to a device or a pipe.
func ResolveIn(root *os.File, name string) (*os.File, error) {
	return resolve(root, name, unix.O_PATH)
}

// Program is the path inside root of the file that name leads to, over all its
// links, "" for none.
func Program(root *os.File, name string) string {
	f, err := ResolveIn(root, name)
	if err != nil {
		return ""
	}
	defer f.Close()
	dir, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", root.Fd()))
	if err != nil {
		return ""
	}
	file, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return ""
	}
	below, ok := strings.CutPrefix(file, strings.TrimSuffix(dir, "/")+"/")
	if !ok {
		return ""
	}
	return "/" + below
}

func resolve(root *os.File, name string, flags uint64) (*os.File, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return nil, fmt.Errorf("resolve %q: has a NUL byte: %w", name, errdefs.ErrInvalidArgument)
	}
	rel := strings.TrimLeft(name, "/")
	if rel == "" {
		rel = "."
	}
	how := &unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for try := 0; ; try++ {
		fd, err := unix.Openat2(int(root.Fd()), rel, how)
		if err == nil {
			return os.NewFile(uintptr(fd), name), nil
		}
		if (err == unix.EAGAIN || err == unix.EINTR) && try < resolveTries {
			continue
		}
		return nil, fmt.Errorf("resolve %s: %w", name, classed(err))
	}
}

// openRegular opens a regular file for reading. The kind is checked before
// the file is really opened: opening a pipe blocks, opening a device acts.
func openRegular(root *os.File, name string) (*os.File, error) {
	ref, err := ResolveIn(root, name)
	if err != nil {
		return nil, err
	}
	defer ref.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(ref.Fd()), &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", name, classed(err))
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("open %s of the image: not a regular file: %w", name, errdefs.ErrFailedPrecondition)
	}
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", ref.Fd()))
	if err != nil {
		return nil, fmt.Errorf("open %s of the image: %w", name, classed(err))
	}
	return f, nil
}

// classed gives an errno the errdefs class a caller can act on; the errno
// stays in the chain.
func classed(err error) error {
	var class error = errdefs.ErrInternal
	switch {
	case errors.Is(err, unix.ENOENT):
		class = errdefs.ErrNotFound
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.EEXIST), errors.Is(err, unix.EROFS):
		class = errdefs.ErrFailedPrecondition
	case errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.EINVAL):
		class = errdefs.ErrInvalidArgument
	}
	return fmt.Errorf("%w (%w)", err, class)
}
