package cgrouptree

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// nest makes a directory in another, and so on, too deep for a path, with a file in each.
func nest(t *testing.T, dir string, depth int) {
	t.Helper()
	fd, err := open(unix.AT_FDCWD, dir)
	if err != nil {
		t.Fatal(err)
	}
	name := strings.Repeat("x", 250)
	for range depth {
		if err := unix.Mkdirat(fd, name, 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := open(fd, name)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		fd = next
	}
	unix.Close(fd)
}

func TestDeep(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "group")
	for _, d := range []string{"", "a", "a/b", "a/c", "d"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	nest(t, filepath.Join(dir, "a", "b"), 100)
	seen := 0
	if err := Walk(dir, func(int) error { seen++; return nil }); err != nil || seen != 105 {
		t.Errorf("%d groups, %v", seen, err)
	}
	if err := Walk(dir, func(int) error { return unix.EIO }); !errors.Is(err, unix.EIO) {
		t.Errorf("an error of visit is %v", err)
	}
	if err := Prune(dir); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
	nest(t, dir, 30)
	if err := Remove(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the group itself: %v", err)
	}
	if err := errors.Join(Remove(dir), Prune(filepath.Join(dir, "absent")), Walk(filepath.Join(dir, "absent"), nil)); err != nil {
		t.Error(err)
	}
}

// TestOutside: what is beside the group, or linked in it, is left alone, and what cannot
// be removed is told of.
func TestOutside(t *testing.T) {
	top := t.TempDir()
	dir, other := filepath.Join(top, "group"), filepath.Join(top, "other", "kept")
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "a"), 0o755), os.MkdirAll(other, 0o755), os.Symlink(filepath.Dir(other), filepath.Join(dir, "a", "link"))); err != nil {
		t.Fatal(err)
	}
	var err error
	if err = Prune(dir); !errors.Is(err, unix.ENOTEMPTY) || !strings.Contains(err.Error(), "rmdir a") {
		t.Errorf("a directory with a link in it: %v", err)
	}
	if err := Remove(dir); !errors.Is(err, unix.ENOTEMPTY) {
		t.Errorf("with what cannot be removed in it: %v", err)
	}
	if _, err := os.Stat(other); err != nil {
		t.Error(err)
	}
	var inodes []uint64
	err = Walk(dir, func(fd int) error {
		var st unix.Stat_t
		defer func() { inodes = append(inodes, st.Ino) }()
		return unix.Fstat(fd, &st)
	})
	if err != nil || len(inodes) != 2 || slices.Contains(inodes, 0) {
		t.Errorf("%v, %v", inodes, err)
	}
}
