package cgroupspath

import (
	"path"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestGroup(t *testing.T) {
	for in, want := range map[string]string{
		"/k8s.io/abc":                      "/k8s.io/abc",
		"/kubepods/besteffort/pod1/../abc": "/kubepods/besteffort/abc",
		"/../../etc":                       "/etc",
		"kubepods-burstable-pod1_2.slice:cri-containerd:abc": "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-abc.scope",
		"system.slice:cri-containerd:abc":                    "/system.slice/cri-containerd-abc.scope",
		":cri-containerd:abc":                                "/system.slice/cri-containerd-abc.scope",
		"-.slice:cri-containerd:abc":                         "/cri-containerd-abc.scope",
		"a.slice::abc":                                       "/a.slice/abc.scope",
		"a.slice:x:a-b.slice":                                "/a.slice/a-b.slice",

		"":               "",
		"/":              "",
		"/..":            "",
		"relative/path":  "",
		"a.slice:abc":    "",
		"a.slice:p:":     "",
		"a.slice:p:n:m":  "",
		"a:p:n":          "",
		".slice:p:n":     "",
		"a--b.slice:p:n": "",
		"-a.slice:p:n":   "",
		"a-.slice:p:n":   "",
		"../a.slice:p:n": "",
		"kubepods-pod1.slice:cri-containerd:../abc": "",
		"a.slice:../../etc:n":                       "",
		"a.slice:p:../../../../":                    "",
	} {
		got, err := Group(in)
		if got != want || (err != nil) != (want == "") || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestParent(t *testing.T) {
	for in, want := range map[string]string{
		"/kubepods/pod1": "/kubepods/pod1", "/kubepods.slice/kubepods-pod1.slice": "/kubepods.slice/kubepods-pod1.slice",
		"kubepods-pod1.slice": "/kubepods.slice/kubepods-pod1.slice", "kubepods": "/kubepods", "../x": "/x", "/": "/",
	} {
		if got := Parent(in); got != want {
			t.Errorf("%q is %q, want %q", in, got, want)
		}
	}
}

// Whatever the path, it stays below the mount and is not the mount.
func FuzzGroup(f *testing.F) {
	for _, s := range []string{"/k8s.io/abc", "a-b.slice:cri:abc", "-.slice::x", "../x", "a.slice:p:../../x", "::", "/a:b:c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		group, err := Group(s)
		if err != nil {
			if group != "" || !errdefs.IsInvalidArgument(err) {
				t.Fatalf("%q, %v", group, err)
			}
			return
		}
		if !strings.HasPrefix(group, "/") || group == "/" || path.Clean(group) != group {
			t.Fatalf("%q becomes %q", s, group)
		}
	})
}

func TestOf(t *testing.T) {
	for _, tc := range []struct {
		parent  string
		systemd bool
		want    string
	}{
		{"/kubepods/burstable/pod1", false, "/kubepods/burstable/pod1/id"},
		{"kubepods//pod1/", false, "/kubepods/pod1/id"},
		{"", false, "/k8s.io/id"},
		{"/", false, "/id"},
		{"/a/b.slice", false, "/a/b.slice/id"},
		{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice", true, "kubepods-burstable-pod1.slice:cri-containerd:id"},
		{"kubepods.slice", true, "kubepods.slice:cri-containerd:id"},
		{"/kubepods/burstable/pod-1", true, "kubepods-burstable-pod_1.slice:cri-containerd:id"},
		{"", true, "system.slice:cri-containerd:id"},
		{"/", true, "system.slice:cri-containerd:id"},
	} {
		if got := Of(tc.parent, "id", tc.systemd); got != tc.want {
			t.Errorf("%q, systemd %v: got %q, want %q", tc.parent, tc.systemd, got, tc.want)
		}
	}
}
