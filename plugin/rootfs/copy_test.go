package rootfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// describeTree tells everything about a tree that a copy must have.
func describeTree(t *testing.T, dir string) (lines []string) {
	t.Helper()
	number := map[uint64]int{} // of files with several names, in order
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%s mode %o owner %d:%d", rel, st.Mode, st.Uid, st.Gid)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" content %.40q %d", content, len(content))
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " to " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" device %d", st.Rdev)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			line += fmt.Sprintf(" at %d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
			names, err := listXattrs(path)
			if err != nil {
				return err
			}
			for _, name := range names {
				value, err := getXattr(path, name)
				if err != nil {
					return err
				}
				line += fmt.Sprintf(" %s=%q", name, value)
			}
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
			if _, ok := number[st.Ino]; !ok {
				number[st.Ino] = len(number)
			}
			line += fmt.Sprintf(" file %d of %d names", number[st.Ino], st.Nlink)
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func copyTree(t *testing.T, ctx context.Context, from, to string) error {
	t.Helper()
	if err := os.MkdirAll(to, 0o755); err != nil {
		t.Fatal(err)
	}
	return CopyTree(ctx, openDir(t, from), openDir(t, to))
}

func TestCopyTree(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "copy")
	at := func(name string) string { return filepath.Join(from, name) }
	big := bytes.Repeat([]byte("0123456789abcdef"), copyChunk/16+3)
	past := time.Unix(1577836800, 123456789)
	if err := errors.Join(
		os.MkdirAll(at("d/e/f"), 0o700), os.WriteFile(at("d/e/f/file"), []byte("text"), 0o644), os.WriteFile(at("big"), big, 0o600),
		os.WriteFile(at("empty"), nil, 0o444), os.Link(at("big"), at("d/big-too")), os.Link(at("big"), at("d/e/big-three")),
		os.Symlink("/etc/shadow", at("abs")), os.Symlink("nowhere", at("d/dangling")), os.Link(at("abs"), at("abs-too")), os.Symlink("..", at("d/up")),
		unix.Mkfifo(at("pipe"), 0o640), unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), unix.Mknod(at("socket"), unix.S_IFSOCK|0o600, 0),
		os.Lchown(at("abs"), 7, 8), os.Chown(at("empty"), 1000, 3000), unix.Chmod(at("empty"), 0o6711),
		unix.Setxattr(at("empty"), "user.note", []byte("hello"), 0), unix.Setxattr(at("d"), "user.dir", []byte{0, 1, 2}, 0),
		unix.Setxattr(at("d"), "trusted.mine", []byte("kept"), 0),
		unix.Setxattr(at("empty"), "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0),
		os.Chown(at("d"), 5, 6), os.Chmod(at("d"), 0o750|fs.ModeSetgid), os.Chtimes(at("empty"), past, past), os.Chtimes(at("d"), past, past),
		os.Chmod(from, 0o711),
	); err != nil {
		t.Fatal(err)
	}
	for i := range 2 * copyNames { // more than one reading of the directory
		if err := os.WriteFile(at(fmt.Sprint("d/e/", i)), []byte(fmt.Sprint(i)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := copyTree(t, t.Context(), from, to); err != nil {
		t.Fatal(err)
	}
	want, got := describeTree(t, from), describeTree(t, to)
	if !slices.Equal(got, want) {
		for _, line := range got {
			if !slices.Contains(want, line) {
				t.Errorf("copied  %s", line)
			}
		}
		for _, line := range want {
			if !slices.Contains(got, line) {
				t.Errorf("missing %s", line)
			}
		}
	}
	if !slices.ContainsFunc(got, func(l string) bool { return strings.Contains(l, "security.capability") }) {
		t.Error("no capability of a file was copied")
	}
}

// The attributes of an overlay layer and the labels of a policy stay behind.
func TestCopyTreeForeignXattrs(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	if err := unix.Setxattr(from, "trusted.overlay.opaque", []byte("y"), 0); err != nil {
		t.Fatal(err)
	}
	if err := copyTree(t, t.Context(), from, to); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Getxattr(to, "trusted.overlay.opaque", nil); !errors.Is(err, unix.ENODATA) {
		t.Errorf("copied: %v", err)
	}
}

// A link is copied as a link: what it leads to is not read, wherever it is.
func TestCVE_2022_23648_CopyFollowsNoLink(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	from, to := t.TempDir(), t.TempDir()
	if err := errors.Join(os.Symlink(outside, filepath.Join(from, "dir")), os.Symlink(filepath.Join(outside, "secret"), filepath.Join(from, "file"))); err != nil {
		t.Fatal(err)
	}
	if err := copyTree(t, t.Context(), from, to); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"dir", "file"} {
		if fi, err := os.Lstat(filepath.Join(to, name)); err != nil || fi.Mode()&fs.ModeSymlink == 0 {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
	}
	if fi, err := os.Stat(outside); err != nil || fi.Mode().Perm() != 0o755 {
		t.Errorf("the directory outside is %v, %v", fi, err)
	}
}

func TestCopyTreeRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ref, err := ResolveIn(openDir(t, dir), "file")
	if err != nil {
		t.Fatal(err)
	}
	defer ref.Close()
	if err := CopyTree(t.Context(), ref, openDir(t, t.TempDir())); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a file: %v", err)
	}
	deep := t.TempDir()
	if err := os.MkdirAll(filepath.Join(deep, strings.Repeat("d/", copyDepth+1)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := copyTree(t, t.Context(), deep, t.TempDir()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("deep directories: %v", err)
	}
	if err := copyTree(t, t.Context(), dir, dir); !errors.Is(err, unix.EEXIST) {
		t.Errorf("onto what is there: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := copyTree(t, ctx, dir, t.TempDir()); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
