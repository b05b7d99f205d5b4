package cri

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestHandlerFor(t *testing.T) {
	for name, tc := range map[string]struct {
		annotation, asked string
		namespaces        *cri.NamespaceOption
		want, field       string
	}{
		"trusted":            {"", "kata", nil, "kata", ""},
		"trusted, default":   {"", "", &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}, "", ""},
		"said to be trusted": {"false", "", nil, "", ""},
		"untrusted":          {"true", "", &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}, "untrusted", ""},
		"asked for as well":  {"true", "untrusted", nil, "untrusted", ""},
		"another handler":    {"true", "runc", nil, "", "runtime_handler"},
		"node's network":     {"true", "", &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}, "", "namespace_options.network"},
		"node's processes":   {"true", "", &cri.NamespaceOption{Pid: cri.NamespaceMode_NODE}, "", "namespace_options.pid"},
		"node's IPC":         {"true", "untrusted", &cri.NamespaceOption{Ipc: cri.NamespaceMode_NODE}, "", "namespace_options.ipc"},
	} {
		c := &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: tc.namespaces}}}
		if tc.annotation != "" {
			c.Annotations = map[string]string{untrustedAnnotation: tc.annotation}
		}
		got, err := handlerFor(c, tc.asked)
		if got != tc.want || errdefs.IsInvalidArgument(err) != (tc.field != "") || (err != nil && !strings.Contains(err.Error(), tc.field)) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}
