package stats

import (
	"encoding/json"
	"path"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestGroupPath(t *testing.T) {
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

		"":                       "",
		"/":                      "",
		"/..":                    "",
		"relative/path":          "",
		"a.slice:abc":            "",
		"a.slice:p:":             "",
		"a.slice:p:n:m":          "",
		"a:p:n":                  "",
		".slice:p:n":             "",
		"a--b.slice:p:n":         "",
		"-a.slice:p:n":           "",
		"a-.slice:p:n":           "",
		"../a.slice:p:n":         "",
		"a.slice:../../etc:n":    "",
		"a.slice:p:../../../../": "",
	} {
		got, err := groupPath(in)
		if got != want || (err != nil) != (want == "") || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestParentPath(t *testing.T) {
	for in, want := range map[string]string{
		"/kubepods/pod1": "/kubepods/pod1", "/kubepods.slice/kubepods-pod1.slice": "/kubepods.slice/kubepods-pod1.slice",
		"kubepods-pod1.slice": "/kubepods.slice/kubepods-pod1.slice", "kubepods": "/kubepods", "../x": "/x", "/": "/",
	} {
		if got := parentPath(in); got != want {
			t.Errorf("%q is %q, want %q", in, got, want)
		}
	}
}

func TestGroupOf(t *testing.T) {
	for spec, want := range map[string]string{
		`{"ociVersion":"1.2.0","linux":{"resources":{},"cgroupsPath":"/k8s.io/abc"}}`: "/k8s.io/abc",
		`{}`:                              "not found",
		``:                                "not found",
		`{"linux":{}}`:                    "not found",
		`{"linux":7}`:                     "invalid",
		`{"linux":{"cgroupsPath":"abc"}}`: "invalid",
	} {
		got, err := groupOf([]byte(spec))
		switch {
		case errdefs.IsNotFound(err):
			got = "not found"
		case errdefs.IsInvalidArgument(err):
			got = "invalid"
		}
		if got != want {
			t.Errorf("%s: %q, %v; want %q", spec, got, err, want)
		}
	}
}

func FuzzGroup(f *testing.F) {
	for _, s := range []string{"/k8s.io/abc", "a-b.slice:cri:abc", "-.slice::x", "../x", "a.slice:p:../../x", "::", "/a:b:c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		group, err := groupPath(s)
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

func FuzzSpec(f *testing.F) {
	f.Add([]byte(`{"linux":{"cgroupsPath":"/a/b"}}`))
	f.Add([]byte(`{"linux":null}`))
	f.Add([]byte(`[`))
	f.Fuzz(func(t *testing.T, b []byte) {
		group, err := groupOf(b)
		if err == nil && (group == "" || !json.Valid(b)) {
			t.Fatalf("%q of %q", group, b)
		}
		if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			t.Fatal(err)
		}
	})
}
