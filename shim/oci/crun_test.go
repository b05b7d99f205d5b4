package oci

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
)

// crunStatus is what crun 1.8 writes.
const crunStatus = `{
    "pid": 28810,
    "process-start-time": 1772991,
    "cgroup-path": "/kubepods/pod1/a",
    "scope": "",
    "rootfs": "rootfs",
    "systemd-cgroup": false,
    "bundle": "/tmp/b",
    "created": "2026-11-27T02:50:49.522522Z",
    "owner": "root",
    "detached": true,
    "external_descriptors": "[\"/dev/null\",\"/dev/null\",\"/dev/null\"]"
}`

func TestParseCrun(t *testing.T) {
	if c, ok := parseCrun([]byte(crunStatus)); !ok || c.Pid != 28810 || c.StartTime != 1772991 || c.Cgroup != "/kubepods/pod1/a" {
		t.Errorf("%+v, %v", c, ok)
	}
	for was, is := range map[string]string{
		"28810": "0", "1772991": "0", `"/kubepods/pod1/a"`: `"/"`, "pod1/a": "../../a", `"/kube`: `"kube`,
		`"scope": ""`: `"scope": "a.scope"`, `"systemd-cgroup": false`: `"systemd-cgroup": true`, `"owner": "root"`: `"owner": "alice"`, "{": "[",
	} {
		if c, ok := parseCrun([]byte(strings.Replace(crunStatus, was, is, 1))); ok {
			t.Errorf("with %s it is %+v", is, c)
		}
	}
}

// TestReadCrun: the control groups are in every hierarchy; what needs more than them to
// be taken away is left to crun.
func TestReadCrun(t *testing.T) {
	bundle, root := t.TempDir(), t.TempDir()
	r := New("ns", "a", bundle, &options.Options{Root: root})
	put := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	config := filepath.Join(bundle, "config.json")
	if _, ok := r.readCrun(); ok {
		t.Error("nothing is understood")
	}
	put(filepath.Join(root, "ns", "a", "status"), crunStatus)
	if _, ok := r.readCrun(); ok {
		t.Error("it is understood without a specification")
	}
	put(config, `{"linux":{}}`)
	s, ok := r.readCrun()
	if !ok || s.ID != "a" || s.Pid != 28810 || s.StartTime != 1772991 || !s.plain() || len(s.CgroupPaths) == 0 {
		t.Errorf("%+v, %v", s, ok)
	}
	for _, p := range s.CgroupPaths {
		if !strings.HasPrefix(p, "/sys/fs/cgroup/") || !strings.HasSuffix(p, "/kubepods/pod1/a") {
			t.Errorf("a group is %s", p)
		}
	}
	put(config, `{"linux":{"intelRdt":{}}}`)
	if _, ok := r.readCrun(); ok {
		t.Error("a resource directory is not seen")
	}
}

func FuzzParseCrun(f *testing.F) {
	f.Add([]byte(crunStatus))
	f.Fuzz(func(t *testing.T, data []byte) {
		if c, ok := parseCrun(data); ok && (c.Pid <= 0 || !strings.HasPrefix(filepath.Join("/x", c.Cgroup), "/x/")) {
			t.Errorf("%s is %+v", data, c)
		}
	})
}
