package cdi

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// describe writes a description with one device that sets V.
func describe(t *testing.T, dir, file, device, value string) string {
	t.Helper()
	path := filepath.Join(dir, file)
	text := fmt.Sprintf(`{"cdiVersion": "0.6.0", "kind": "vendor.test/class",
		"devices": [{"name": %q, "containerEdits": {"env": ["V=%s"]}}]}`, device, value)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func inject(t *testing.T, d *Devices, device string) (value string, err error) {
	t.Helper()
	s := &specs.Spec{Process: &specs.Process{}}
	if err := d.Inject(s, []string{"vendor.test/class=" + device}); err != nil {
		return "", err
	}
	i := slices.IndexFunc(s.Process.Env, func(e string) bool { return strings.HasPrefix(e, "V=") })
	if i < 0 {
		t.Fatalf("the environment is %q", s.Process.Env)
	}
	return s.Process.Env[i][2:], nil
}

// TestInject: descriptions come, change, hide each other and go, and every
// injection sees what there is.
func TestInject(t *testing.T) {
	low, high := t.TempDir(), filepath.Join(t.TempDir(), "later")
	d := New([]string{low, high})
	if _, err := inject(t, d, "a"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), low) {
		t.Errorf("without descriptions: %v", err)
	}
	want := func(device, value string) {
		t.Helper()
		if got, err := inject(t, d, device); err != nil || got != value {
			t.Errorf("%s gives %q, want %q: %v", device, got, value, err)
		}
	}
	describe(t, low, "one.json", "a", "1")
	want("a", "1")
	for i := range 50 { // faster than any clock of a file system
		describe(t, low, "one.json", "a", fmt.Sprint(i))
		want("a", fmt.Sprint(i))
	}
	if err := os.Mkdir(high, 0o700); err != nil {
		t.Fatal(err)
	}
	over := describe(t, high, "two.json", "a", "high")
	want("a", "high")
	if err := os.Remove(over); err != nil {
		t.Fatal(err)
	}
	want("a", "49")
	if err := os.Remove(filepath.Join(low, "one.json")); err != nil {
		t.Fatal(err)
	}
	if _, err := inject(t, d, "a"); !errdefs.IsNotFound(err) {
		t.Errorf("a description that is gone: %v", err)
	}
}

// TestInjectSettled: files that lie still are read once, and a change of one is
// seen all the same.
func TestInjectSettled(t *testing.T) {
	dir := t.TempDir()
	d := New([]string{dir})
	path := describe(t, dir, "one.json", "a", "1")
	settle()
	for range 2 {
		if _, err := inject(t, d, "a"); err != nil {
			t.Fatal(err)
		}
	}
	before := d.cache
	if _, err := inject(t, d, "a"); err != nil || d.cache != before {
		t.Errorf("unchanged files are read again, or %v", err)
	}
	old := time.Now().Add(-time.Hour)
	if err := errors.Join(os.WriteFile(path, []byte(strings.Replace(string(read(t, path)), "V=1", "V=2", 1)), 0o600), os.Chtimes(path, old, old)); err != nil {
		t.Fatal(err)
	}
	if got, err := inject(t, d, "a"); err != nil || got != "2" {
		t.Errorf("a changed file of the same size and an old time gives %q, %v", got, err)
	}
}

// settle waits until a change is told from a later one.
func settle() {
	for begun := time.Now(); time.Since(begun) <= settled; {
		time.Sleep(50 * time.Millisecond)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestInjectBadFile: a file that means nothing costs its own devices, and the
// error about one of them names it.
func TestInjectBadFile(t *testing.T) {
	dir := t.TempDir()
	d := New([]string{dir})
	describe(t, dir, "good.json", "a", "1")
	for name, text := range map[string]string{
		"broken.json": "{", "empty.yaml": "", "list.yaml": "- a\n", "version.json": `{"cdiVersion": "9.0.0", "kind": "vendor.test/class"}`,
		"other.txt": "{",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := inject(t, d, "a"); err != nil || got != "1" {
		t.Errorf("beside broken files: %q, %v", got, err)
	}
	_, err := inject(t, d, "b")
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "vendor.test/class=b") || !strings.Contains(err.Error(), "broken.json") {
		t.Errorf("a missing device: %v", err)
	}
	// Two descriptions with equal rights: neither counts.
	describe(t, dir, "twin.json", "a", "2")
	if _, err := inject(t, d, "a"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "twin.json") {
		t.Errorf("a device with two descriptions: %v", err)
	}
}

// TestInjectNodes: the numbers of a node are those it has now, not those it had
// when a container got it before.
func TestInjectNodes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("device nodes need root")
	}
	dir, node := t.TempDir(), filepath.Join(t.TempDir(), "node")
	text := fmt.Sprintf(`{"cdiVersion": "0.6.0", "kind": "vendor.test/class",
		"devices": [{"name": "a", "containerEdits": {"deviceNodes": [{"path": "/dev/a", "hostPath": %q}]}}]}`, node)
	if err := os.WriteFile(filepath.Join(dir, "one.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	settle()
	d := New([]string{dir})
	for _, minor := range []int64{3, 5} {
		_ = os.Remove(node)
		if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(unix.Mkdev(1, uint32(minor)))); err != nil {
			t.Fatal(err)
		}
		s := &specs.Spec{}
		if err := d.Inject(s, []string{"vendor.test/class=a"}); err != nil || s.Linux.Devices[0].Minor != minor {
			t.Errorf("node %d: %+v, %v", minor, s.Linux, err)
		}
	}
	if err := os.Remove(node); err != nil {
		t.Fatal(err)
	}
	if err := d.Inject(&specs.Spec{}, []string{"vendor.test/class=a"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a node that is gone: %v", err)
	}
}

func TestInjectNothing(t *testing.T) {
	s := &specs.Spec{}
	if err := New(nil).Inject(s, nil); err != nil {
		t.Error(err)
	}
	if err := New(nil).Inject(s, []string{"vendor.test/class=a"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without directories: %v", err)
	}
}
