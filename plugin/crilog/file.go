package crilog

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// identity tells a file from every other one, also from one that got its inode
// number later.
type identity struct {
	dev, ino uint64
	born     int64 // nanoseconds, 0 where the filesystem does not keep it
}

// logFile is an open log file.
type logFile struct {
	*os.File
	id identity
}

// checkPath refuses what cannot be a log path before anything is touched.
func checkPath(path, root string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsRune(path, 0) {
		return fmt.Errorf("log path %q is not absolute and clean: %w", path, errdefs.ErrInvalidArgument)
	}
	if root == "" {
		return nil
	}
	rel, err := filepath.Rel(root, path)
	if err != nil || !filepath.IsLocal(rel) || rel == "." {
		return fmt.Errorf("log path %q is not below %q: %w", path, root, errdefs.ErrInvalidArgument)
	}
	return nil
}

// openParent opens the directory of the log file and makes it when missing.
// Below root it goes one component at a time and through no symlink.
func openParent(path, root string) (*os.File, error) {
	dir := filepath.Dir(path)
	if root == "" {
		root = dir
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, err
	}
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	fd, err := unix.Open(root, flags, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	rel, err := filepath.Rel(root, dir)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	if rel == "." {
		return os.NewFile(uintptr(fd), dir), nil
	}
	for name := range strings.SplitSeq(rel, "/") {
		if err := unix.Mkdirat(fd, name, 0o755); err != nil && err != unix.EEXIST {
			unix.Close(fd)
			return nil, &os.PathError{Op: "mkdir", Path: filepath.Join(root, rel), Err: err}
		}
		next, err := unix.Openat(fd, name, flags|unix.O_NOFOLLOW, 0)
		unix.Close(fd)
		if err != nil {
			return nil, refused(filepath.Join(root, rel), err)
		}
		fd = next
	}
	return os.NewFile(uintptr(fd), dir), nil
}

// openLog opens the log file at path for appending. flags is O_CREAT, O_EXCL
// or nothing on top. Anything but a regular file is refused.
func openLog(dir *os.File, name string, flags int) (*logFile, error) {
	// O_NONBLOCK: to open a FIFO that somebody put there must not wait.
	flags |= unix.O_WRONLY | unix.O_APPEND | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	path := filepath.Join(dir.Name(), name)
	fd, err := unix.Openat(int(dir.Fd()), name, flags, 0o640)
	if err != nil {
		return nil, refused(path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file: %w", path, errdefs.ErrInvalidArgument)
	}
	var id identity
	if err == nil {
		id, err = identify(fd, "", unix.AT_EMPTY_PATH)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &logFile{File: f, id: id}, nil
}

// refused gives the class to an open that met something other than a file.
func refused(path string, err error) error {
	perr := &os.PathError{Op: "open", Path: path, Err: err}
	switch err {
	case unix.ELOOP, unix.ENOTDIR:
		return fmt.Errorf("symlinks are refused: %w: %w", perr, errdefs.ErrInvalidArgument)
	case unix.ENXIO, unix.EISDIR:
		return fmt.Errorf("not a regular file: %w: %w", perr, errdefs.ErrInvalidArgument)
	}
	return perr
}

func identify(dirfd int, name string, flags int) (identity, error) {
	var st unix.Statx_t
	if err := unix.Statx(dirfd, name, flags|unix.AT_SYMLINK_NOFOLLOW, unix.STATX_INO|unix.STATX_BTIME, &st); err != nil {
		return identity{}, &os.PathError{Op: "statx", Path: name, Err: err}
	}
	id := identity{dev: unix.Mkdev(st.Dev_major, st.Dev_minor), ino: st.Ino}
	if st.Mask&unix.STATX_BTIME != 0 {
		id.born = st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
	}
	return id, nil
}

// findLog looks for the file with this identity beside the log path: rotation
// renames it within its directory. It returns nil when it is gone.
func findLog(dir *os.File, id identity) (*logFile, error) {
	if _, err := dir.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		got, err := identify(int(dir.Fd()), name, 0)
		if err != nil || got != id {
			continue
		}
		f, err := openLog(dir, name, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if f.id != id {
			f.Close()
			continue
		}
		return f, nil
	}
	return nil, nil
}

// size returns the length of the file.
func (f *logFile) size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

// cut shortens the file to size; it never makes it longer.
func (f *logFile) cut(size int64) error {
	now, err := f.size()
	if err != nil || now <= size {
		return err
	}
	return f.Truncate(size)
}
