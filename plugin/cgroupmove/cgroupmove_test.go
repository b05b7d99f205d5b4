package cgroupmove

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/moby/sys/mountinfo"
)

func TestStay(t *testing.T) {
	for name, c := range map[string]struct{ groups, file string }{
		"version 2":           {"0::/a/b\n", "unified/a/b"},
		"version 1":           {"9:name=systemd:/x\n3:cpu,cpuacct:/a/b\n", "cpu,cpuacct/a/b"},
		"named":               {"9:name=systemd:/x\n", "systemd/x"},
		"beside version 1":    {"garbage\n0::/a\n3:memory:/m\n", "unified/a"},
		"a name with a colon": {"0::/a:b\n", "unified/a:b"},
		"outside":             {"4:memory:/../x\n", ""},
		"another top":         {"5:pids:/x\n", ""},
		"not mounted":         {"6:rdma:/x\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			at := func(dir, kind, top, options string) *mountinfo.Info {
				return &mountinfo.Info{Mountpoint: filepath.Join(root, dir), FSType: kind, Root: top, VFSOptions: options}
			}
			mounts := []*mountinfo.Info{
				at("unified", "cgroup2", "/", "rw,nsdelegate"), at("cpu,cpuacct", "cgroup", "/", "rw,cpu,cpuacct"),
				at("systemd", "cgroup", "/", "rw,xattr,name=systemd"), at("memory", "cgroup", "/", "rw,memory"), at("pids", "cgroup", "/..", "rw,pids"),
			}
			if stay(c.groups, mounts) {
				t.Error("something was found where there is nothing")
			}
			for _, dir := range []string{c.file, "x", "pids/x", "memory/x"} {
				if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(root, dir, "cgroup.procs"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if found := stay(c.groups, mounts); found != (c.file != "") {
				t.Errorf("found: %v", found)
			}
			if c.file == "" {
				return
			}
			if text, err := os.ReadFile(filepath.Join(root, c.file, "cgroup.procs")); err != nil || string(text) != strconv.Itoa(os.Getpid()) {
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
	const self = "/proc/self/cgroup"
	before, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if !stay(string(before), mounted()) {
		t.Errorf("no control group of %q is mounted: %v", before, mounted())
	}
	Expect()
	ExpectCommand()
	if after, err := os.ReadFile(self); err != nil || string(after) != string(before) {
		t.Errorf("before %q, after %q: %v", before, after, err)
	}
}
