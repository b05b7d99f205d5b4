package spec

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestCDIDevices(t *testing.T) {
	field := func(names ...string) (list []*cri.CDIDevice) {
		for _, n := range names {
			list = append(list, &cri.CDIDevice{Name: n})
		}
		return list
	}
	for name, tc := range map[string]struct {
		field       []*cri.CDIDevice
		annotations map[string]string
		want        []string
		wrong       string
	}{
		"none":        {annotations: map[string]string{"nvidia.cdi.k8s.io/x": "not looked at"}},
		"field":       {field: field("v.com/c=b", "v.com/c=a"), want: []string{"v.com/c=b", "v.com/c=a"}},
		"annotation":  {annotations: map[string]string{"cdi.k8s.io/x": "v.com/c=a,v.com/c=b"}, want: []string{"v.com/c=a", "v.com/c=b"}},
		"both":        {field: field("v.com/c=b"), annotations: map[string]string{"cdi.k8s.io/y": "v.com/c=a", "cdi.k8s.io/x": "v.com/c=b"}, want: []string{"v.com/c=b", "v.com/c=a"}},
		"twice":       {field: field("v.com/c=a", "v.com/c=a"), want: []string{"v.com/c=a"}},
		"unqualified": {field: field("v.com/c=a", "gpu0"), wrong: "config.CDI_devices[1].name"},
		"nil":         {field: []*cri.CDIDevice{nil}, wrong: "config.CDI_devices[0].name"},
		"path":        {field: field("/dev/null"), wrong: "CDI_devices"},
		"empty":       {annotations: map[string]string{"cdi.k8s.io/x": ""}, wrong: `config.annotations["cdi.k8s.io/x"]`},
		"trailing":    {annotations: map[string]string{"cdi.k8s.io/x": "v.com/c=a,"}, wrong: `config.annotations["cdi.k8s.io/x"]`},
	} {
		got, err := CDIDevices(&cri.ContainerConfig{CDIDevices: tc.field, Annotations: tc.annotations})
		if tc.wrong != "" {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.wrong) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
}

// FuzzCDIDevices: what comes out are qualified names, each once.
func FuzzCDIDevices(f *testing.F) {
	f.Add("v.com/c=a", "cdi.k8s.io/x", "v.com/c=a,v.com/c=b")
	f.Add("", "cdi.k8s.io/", ",")
	f.Fuzz(func(t *testing.T, name, key, value string) {
		got, err := CDIDevices(&cri.ContainerConfig{CDIDevices: []*cri.CDIDevice{{Name: name}}, Annotations: map[string]string{key: value}})
		if err != nil {
			return
		}
		for i, n := range got {
			if !strings.Contains(n, "/") || !strings.Contains(n, "=") || strings.Contains(n, ",") || slices.Contains(got[:i], n) {
				t.Errorf("%q of %q", n, got)
			}
		}
	})
}
