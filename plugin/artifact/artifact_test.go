package artifact

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// store is a content store with the texts as blobs, and its directory.
func store(t *testing.T, texts ...string) (content.Store, string) {
	t.Helper()
	root := t.TempDir()
	s, err := local.NewStore(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range texts {
		d := imagespec.Descriptor{Digest: digest.FromString(text), Size: int64(len(text))}
		if err := content.WriteBlob(t.Context(), s, d.Digest.String(), strings.NewReader(text), d); err != nil {
			t.Fatal(err)
		}
	}
	return s, root
}

func file(name, text string) facts.File {
	return facts.File{Name: name, Digest: digest.FromString(text), Size: int64(len(text))}
}

func bind(dir string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: dir, Options: []string{"rw", "rbind"}}}
}

// check reads the files back, and tells whether they are the blobs themselves.
func check(t *testing.T, dir, blobs string, want map[string]string) (linked int) {
	t.Helper()
	found := 0
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		name, _ := filepath.Rel(dir, p)
		fi, err := e.Info()
		if err != nil {
			return err
		}
		if e.IsDir() {
			if fi.Mode().Perm() != dirMode {
				t.Errorf("%s has mode %s", name, fi.Mode())
			}
			return nil
		}
		found++
		text, err := os.ReadFile(p)
		if err != nil || string(text) != want[name] || fi.Mode() != fileMode {
			t.Errorf("%s says %q with mode %s, %v", name, text, fi.Mode(), err)
		}
		blob, err := os.Stat(filepath.Join(blobs, "blobs/sha256", digest.FromBytes(text).Encoded()))
		if err == nil && os.SameFile(fi, blob) {
			linked++
		}
		return nil
	})
	if err != nil || found != len(want) {
		t.Errorf("%d files, want %d, %v", found, len(want), err)
	}
	return linked
}

func TestWrite(t *testing.T) {
	s, root := store(t, "one", "two")
	files := []facts.File{file("a", "one"), file("dir/sub/b", "two"), file("dir/again", "one"), file("empty", "")}
	want := map[string]string{"a": "one", "dir/sub/b": "two", "dir/again": "one", "empty": ""}
	defer syscall.Umask(syscall.Umask(0o077))
	for name, c := range map[string]struct {
		o      Options
		linked int
	}{
		"links":       {Options{Content: s, BlobRoot: root, Sync: true}, 3},
		"copies":      {Options{Content: s, BlobRoot: root, Copy: true}, 0},
		"other store": {Options{Content: s}, 0},
		"elsewhere":   {Options{Content: s, BlobRoot: "/nowhere"}, 0},
	} {
		dir, told := t.TempDir(), int64(0)
		err := New(c.o).Write(t.Context(), bind(dir), files, func(n int64) {
			if n < told {
				t.Errorf("%s: from %d to %d", name, told, n)
			}
			told = n
		})
		if err != nil || told != 9 {
			t.Errorf("%s: %v, told of %d bytes", name, err, told)
		}
		if n := check(t, dir, root, want); n != c.linked {
			t.Errorf("%s: %d files are links", name, n)
		}
	}
}

// TestWriteAcross: on another filesystem, which is mounted for it, files are
// copied.
func TestWriteAcross(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts: needs root")
	}
	s, root := store(t, "one")
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	w := New(Options{Content: s, BlobRoot: root})
	if err := w.Write(t.Context(), bind(dir), []facts.File{file("a", "one")}, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	if n := check(t, dir, root, map[string]string{"a": "one"}); n != 0 {
		t.Error("it is a link")
	}
	// One that must be mounted to be written to.
	err := w.Write(t.Context(), []mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"size=1m"}}}, []facts.File{file("a", "one")}, func(int64) {})
	if err != nil {
		t.Error(err)
	}
}

func TestWriteFails(t *testing.T) {
	s, root := store(t, "one")
	none := func(int64) {}
	for name, o := range map[string]Options{"links": {Content: s, BlobRoot: root}, "copies": {Content: s, Copy: true}} {
		if err := New(o).Write(t.Context(), bind(t.TempDir()), []facts.File{file("a", "absent")}, none); !errdefs.IsNotFound(err) {
			t.Errorf("%s: absent: %v", name, err)
		}
		if err := New(o).Write(t.Context(), bind(t.TempDir()), []facts.File{file("a", "one"), file("a", "one")}, none); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s: twice: %v", name, err)
		}
	}
	// A blob that is not as large as it is said to be.
	longer := file("a", "one")
	longer.Size = 5
	if err := New(Options{Content: s, BlobRoot: root}).Write(t.Context(), bind(t.TempDir()), []facts.File{longer}, none); err == nil {
		t.Error("a short blob was written")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := New(Options{Content: s}).Write(ctx, bind(t.TempDir()), []facts.File{file("a", "one")}, none); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
