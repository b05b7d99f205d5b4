package rootfs

import (
	"os"
	"path/filepath"
	"testing"
)

func TestProgram(t *testing.T) {
	dir := t.TempDir()
	for name, target := range map[string]string{
		"sbin/init": "../lib/systemd", "bin/absolute": "/lib/systemd", "bin/up": "../../../../../lib/systemd", "bin/loop": "loop", "bin/dangling": "nowhere",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "lib/systemd"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	root, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for name, want := range map[string]string{
		"/sbin/init": "/lib/systemd", "/bin/absolute": "/lib/systemd", "/bin/up": "/lib/systemd", "/lib/systemd": "/lib/systemd",
		"/bin/loop": "", "/bin/dangling": "", "/none": "", "/sbin/init/x": "", "/": "",
	} {
		if got := Program(root, name); got != want {
			t.Errorf("%s leads to %q, want %q", name, got, want)
		}
	}
}
