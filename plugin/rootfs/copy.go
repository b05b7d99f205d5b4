package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// copyDepth bounds how deep directories are nested: each level holds
	// descriptors.
	copyDepth = 256
	// copyNames is how many names of a directory are in memory, copyChunk how
	// many bytes are copied between two looks at the context.
	copyNames = 256
	copyChunk = 8 << 20
)

// CopyTree copies what is in the directory from, and the directory's own
// attributes, into the directory to: owner, mode, extended attributes, times,
// links of both kinds, and nodes of devices, pipes and sockets. It goes from
// descriptor to descriptor and follows no link, so nothing outside of from is
// read. The directory to must be empty, and nobody else may write there yet.
func CopyTree(ctx context.Context, from, to *os.File) error {
	c := &copier{root: to, first: map[inode]string{}}
	if err := c.directory(ctx, from, to, ".", 0); err != nil {
		return fmt.Errorf("copy %s of the image: %w", from.Name(), err)
	}
	return nil
}

// inode is a file, whatever its names.
type inode struct{ device, number uint64 }

type copier struct {
	root *os.File
	// first is the path in the copy of each file that has several names.
	first map[inode]string
}

// directory copies a directory that is at name in the copy.
func (c *copier) directory(ctx context.Context, from, to *os.File, name string, depth int) error {
	if depth > copyDepth {
		return fmt.Errorf("directories are nested deeper than %d: %w", copyDepth, errdefs.ErrFailedPrecondition)
	}
	src, err := openAt(from, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer src.Close()
	for {
		names, err := src.Readdirnames(copyNames)
		for _, n := range names {
			if err := c.entry(ctx, src, to, path.Join(name, n), depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read directory %s: %w", name, classed(err))
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return classed(err)
	}
	return copyAttributes(src, to, &st)
}

// entry copies one entry of a directory, by its last name.
func (c *copier) entry(ctx context.Context, src, to *os.File, name string, depth int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	base := path.Base(name)
	ref, err := openAt(src, base, unix.O_PATH)
	if err != nil {
		return err
	}
	defer ref.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(ref.Fd()), &st); err != nil {
		return fmt.Errorf("stat %s: %w", name, classed(err))
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		id := inode{st.Dev, st.Ino}
		if first, ok := c.first[id]; ok {
			// The names on the way to it are directories that were made here.
			if err := unix.Linkat(int(c.root.Fd()), first, int(to.Fd()), base, 0); err != nil {
				return fmt.Errorf("link %s: %w", name, classed(err))
			}
			return nil
		}
		c.first[id] = name
	}
	if err := create(ctx, ref, to, base, &st); err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	copied, err := openAt(to, base, unix.O_PATH)
	if err != nil {
		return err
	}
	defer copied.Close()
	if kind == unix.S_IFDIR {
		return c.directory(ctx, ref, copied, name, depth+1)
	}
	return copyAttributes(ref, copied, &st)
}

// create makes one file or node like ref, with a regular file's content, and no
// attributes yet.
func create(ctx context.Context, ref, to *os.File, base string, st *unix.Stat_t) error {
	dir := int(to.Fd())
	switch kind := st.Mode & unix.S_IFMT; kind {
	case unix.S_IFDIR:
		return classedOrNil(unix.Mkdirat(dir, base, 0o700))
	case unix.S_IFREG:
		return copyFile(ctx, ref, to, base)
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(int(ref.Fd()), "", buf)
		if err != nil {
			return classed(err)
		}
		return classedOrNil(unix.Symlinkat(string(buf[:n]), dir, base))
	default:
		return classedOrNil(unix.Mknodat(dir, base, kind|0o600, int(st.Rdev)))
	}
}

func copyFile(ctx context.Context, ref, to *os.File, base string) error {
	// ref is a regular file: opening it does nothing else.
	in, err := os.Open(procPath(ref))
	if err != nil {
		return classed(err)
	}
	defer in.Close()
	fd, err := unix.Openat(int(to.Fd()), base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return classed(err)
	}
	out := os.NewFile(uintptr(fd), base)
	for err == nil {
		if err = ctx.Err(); err == nil {
			_, err = io.CopyN(out, in, copyChunk)
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return errors.Join(err, out.Close())
}

// copyAttributes gives to what from has: the owner first, as a change of it
// clears the set-user-ID bits and capabilities.
func copyAttributes(from, to *os.File, st *unix.Stat_t) error {
	if err := unix.Fchownat(int(to.Fd()), "", int(st.Uid), int(st.Gid), unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("set owner: %w", classed(err))
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return nil // its mode means nothing, and its times can wait
	}
	if err := unix.Chmod(procPath(to), st.Mode&0o7777); err != nil {
		return fmt.Errorf("set mode: %w", classed(err))
	}
	if err := copyXattrs(from, to); err != nil {
		return fmt.Errorf("set extended attributes: %w", classed(err))
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, procPath(to), times, 0); err != nil {
		return fmt.Errorf("set times: %w", classed(err))
	}
	return nil
}

// foreignXattrs belong to the filesystem a file is on, or to the machine's
// policy, and not to the image.
var foreignXattrs = []string{"trusted.overlay.", "user.overlay.", "security.selinux"}

func copyXattrs(from, to *os.File) error {
	names, err := listXattrs(procPath(from))
	if err != nil {
		return err
	}
	for _, name := range names {
		value, err := getXattr(procPath(from), name)
		if err == nil {
			err = unix.Setxattr(procPath(to), name, value, 0)
		}
		if err != nil && !errors.Is(err, unix.ENOTSUP) { // a filesystem without them keeps none
			return err
		}
	}
	return nil
}

func listXattrs(path string) (names []string, err error) {
	list, err := sized(func(b []byte) (int, error) { return unix.Listxattr(path, b) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	for name := range strings.SplitSeq(string(list), "\x00") {
		if name != "" && !isForeign(name) {
			names = append(names, name)
		}
	}
	return names, err
}

func isForeign(name string) bool {
	for _, prefix := range foreignXattrs {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

func getXattr(path, name string) ([]byte, error) {
	return sized(func(b []byte) (int, error) { return unix.Getxattr(path, name, b) })
}

// sized reads what get has, which tells its size for no buffer.
func sized(get func([]byte) (int, error)) ([]byte, error) {
	n, err := get(nil)
	if err != nil || n == 0 {
		return nil, err
	}
	b := make([]byte, n) // at most 64 KiB, the kernel's bound
	n, err = get(b)
	return b[:max(n, 0)], err
}

// openAt opens an entry of a directory and follows no link.
func openAt(dir *os.File, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, classed(err))
	}
	return os.NewFile(uintptr(fd), name), nil
}

// procPath is a path that means the open file itself.
func procPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

func classedOrNil(err error) error {
	if err == nil {
		return nil
	}
	return classed(err)
}
