package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// plainTree trusts what it goes through.
func plainTree() Tree {
	return Tree{
		Resolve: func(root *os.File, name string) (*os.File, error) {
			f, err := os.OpenFile(filepath.Join(root.Name(), name), unix.O_PATH, 0)
			if errors.Is(err, os.ErrNotExist) {
				err = errors.Join(err, errdefs.ErrNotFound)
			}
			return f, err
		},
		Copy: func(_ context.Context, from, to *os.File) error {
			return os.CopyFS(to.Name(), os.DirFS(from.Name()))
		},
	}
}

func newVolumes(t *testing.T) *Volumes {
	t.Helper()
	v, err := New(t.TempDir(), t.TempDir(), plainTree())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// tree is a directory to mount, and the mount of it.
func tree(t *testing.T) []mount.Mount {
	t.Helper()
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "d"), 0o755), os.WriteFile(filepath.Join(dir, "d/file"), []byte("text"), 0o755),
		unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600)); err != nil {
		t.Fatal(err)
	}
	return []mount.Mount{{Type: "bind", Source: dir, Options: []string{"rbind", "ro"}}}
}

func mountsBelow(t *testing.T, dir string) (n int) {
	t.Helper()
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(text), " "+dir+"/")
}

func TestMount(t *testing.T) {
	v, source := newVolumes(t), tree(t)
	for i, c := range []struct{ sub, file string }{{"", "d/file"}, {"d", "file"}, {"d/file", ""}} {
		path, err := v.Mount(t.Context(), "id", i, source, c.sub)
		if err != nil {
			t.Fatalf("%q: %v", c.sub, err)
		}
		if text, err := os.ReadFile(filepath.Join(path, c.file)); err != nil || string(text) != "text" {
			t.Errorf("%q: %q, %v", c.sub, text, err)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != nil {
			t.Fatal(err)
		}
		const want = unix.ST_RDONLY | unix.ST_NOEXEC | unix.ST_NOSUID | unix.ST_NODEV
		if st.Flags&want != want {
			t.Errorf("%q: flags %x", c.sub, st.Flags)
		}
	}
	if n := mountsBelow(t, v.mounts); n != 3 {
		t.Errorf("%d mounts", n)
	}
	if _, err := v.Mount(t.Context(), "id", 3, source, "absent"); !errdefs.IsNotFound(err) {
		t.Errorf("absent: %v", err)
	}
	if _, err := v.Mount(t.Context(), "id", 4, source, "pipe"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("pipe: %v", err)
	}
	for range 2 {
		if err := v.Remove(t.Context(), "id"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(v.mounts, "id")); !os.IsNotExist(err) || mountsBelow(t, v.mounts) != 0 {
		t.Errorf("left: %v", err)
	}
	if _, err := os.Stat(filepath.Join(source[0].Source, "d/file")); err != nil {
		t.Errorf("the source: %v", err)
	}
}

func TestCopy(t *testing.T) {
	v, source := newVolumes(t), tree(t)
	made, err := v.Copy(t.Context(), "id", source, []string{"/d", "/none"})
	if err != nil || len(made) != 2 || made[0].Destination != "/d" || made[1].Destination != "/none" || made[0].Readonly {
		t.Fatalf("made %+v, %v", made, err)
	}
	if text, err := os.ReadFile(filepath.Join(made[0].Source, "file")); err != nil || string(text) != "text" {
		t.Errorf("%q, %v", text, err)
	}
	if fi, err := os.Stat(made[1].Source); err != nil || fi.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", fi, err)
	}
	if fi, err := os.Stat(v.copies); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("others get into %v, %v", fi, err)
	}
	if err := v.Remove(t.Context(), "id"); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(v.copies); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}
