package stats

import (
	"encoding/json"
	"testing"

	"github.com/containerd/errdefs"
)

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
