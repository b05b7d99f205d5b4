package sandboxer_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/sandboxer"
	"github.com/gantry-cri/gantry/plugin/sandboxer/sandboxertest"
)

// TestPublished: links are there while the sandbox is, also where one was left, and no
// link of another goes with them.
func TestPublished(t *testing.T) {
	dir := t.TempDir()
	fake := sandboxertest.New()
	p := sandboxer.Published{Sandboxer: fake, Dir: dir}
	link := filepath.Join(dir, "utsns", "a")
	other := filepath.Join(dir, "utsns", "b")
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{link, other} {
		if err := os.Symlink("/gone", path); err != nil {
			t.Fatal(err)
		}
	}
	sb := record.Sandbox{ID: "a"}
	if _, err := p.Start(t.Context(), sb); err != nil {
		t.Fatal(err)
	}
	if to, err := os.Readlink(link); err != nil || to != "/proc/self/ns/uts" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	for range 2 {
		if err := p.Shutdown(t.Context(), sb); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(link); !os.IsNotExist(err) {
		t.Errorf("the link is left: %v", err)
	}
	if _, err := os.Lstat(other); err != nil {
		t.Errorf("the other's link: %v", err)
	}
	// One whose shim cannot tell has none.
	fake.Inject(sandboxertest.Fault{Op: "namespaces", Err: errdefs.ErrNotImplemented, Nth: 1})
	if _, err := p.Start(t.Context(), sb); err != nil {
		t.Errorf("a shim that cannot tell: %v", err)
	}
	if _, err := os.Lstat(link); !os.IsNotExist(err) {
		t.Errorf("there is a link: %v", err)
	}
	if err := p.Shutdown(t.Context(), sb); err != nil {
		t.Error(err)
	}
	// A sandbox whose namespaces cannot be found has not started.
	fake.Inject(sandboxertest.Fault{Op: "namespaces", Err: errors.New("broken")})
	if _, err := p.Start(t.Context(), sb); err == nil {
		t.Error("started without links")
	}
}
