package cgroupmove

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

func TestStay(t *testing.T) {
	for name, c := range map[string]struct{ groups, file string }{
		"version 2":           {"0::/a/b\n", "a/b"},
		"version 1":           {"9:name=systemd:/x\n3:cpu,cpuacct:/a/b\n", "cpu,cpuacct/a/b"},
		"named":               {"9:name=systemd:/x\n", "systemd/x"},
		"beside version 1":    {"garbage\n0::/a\n3:memory:/m\n", "unified/a"},
		"a name with a colon": {"0::/a:b\n", "a:b"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			groups, dir := filepath.Join(root, "groups"), filepath.Join(root, c.file)
			procs := filepath.Join(dir, "cgroup.procs")
			if err := os.WriteFile(groups, []byte(c.groups), 0o600); err != nil {
				t.Fatal(err)
			}
			if stay(groups, root) {
				t.Error("something was found where there is nothing")
			}
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(procs, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if !stay(groups, root) {
				t.Error("nothing was found")
			}
			if text, err := os.ReadFile(procs); err != nil || string(text) != strconv.Itoa(os.Getpid()) {
				t.Errorf("written is %q: %v", text, err)
			}
		})
	}
}

// On this machine nothing changes.
func TestStayHere(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	before, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if !stay(self, root) {
		t.Errorf("no control group of %q is mounted below %s", before, root)
	}
	Expect()
	Expect()
	if after, err := os.ReadFile(self); err != nil || string(after) != string(before) {
		t.Errorf("before %q, after %q: %v", before, after, err)
	}
}
