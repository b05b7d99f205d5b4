package statedir

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

func TestDirOf(t *testing.T) {
	if got, err := DirOf("/parent", "pod"); err != nil || got != "/parent/pod" {
		t.Errorf("%q, %v", got, err)
	}
	for _, id := range []string{"", ".", "..", ".hidden", "a/b", "/a", "../a"} {
		if got, err := DirOf("/parent", id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %q, %v", id, got, err)
		}
	}
}

func TestRecord(t *testing.T) {
	type record struct{ N int }
	dir := t.TempDir()
	if _, err := Read[record](dir); !errdefs.IsNotFound(err) {
		t.Errorf("without one: %v", err)
	}
	for n := range 2 {
		if err := Write(dir, record{n}); err != nil {
			t.Fatal(err)
		}
		if got, err := Read[record](dir); err != nil || got.N != n {
			t.Errorf("%+v, %v, want %d", got, err, n)
		}
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 1 {
		t.Errorf("the directory has %v, %v", names, err)
	}
	if err := os.WriteFile(filepath.Join(dir, recordFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Read[record](dir); !errdefs.IsDataLoss(err) {
		t.Errorf("half of one: %v", err)
	}
}
