package spec

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What the node gives yields to what is nearer to the container.
func TestDefaults(t *testing.T) {
	node := func(in *ContainerInput) {
		in.Policy.Defaults = Defaults{
			Capabilities: []string{"CAP_CHOWN", "CAP_KILL"},
			Env:          []string{"A=node", "B=node", "C=node", "D=node", "PATH=/node"},
			Rlimits:      []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1, Hard: 2}, {Type: "RLIMIT_CORE"}},
			PidsLimit:    100,
		}
	}
	nearer := func(in *ContainerInput) {
		node(in)
		in.Handler.BaseSpec = &specs.Spec{
			Process: &specs.Process{
				Env: []string{"B=base", "C=base", "D=base"}, Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_MKNOD"}},
				Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 7, Hard: 7}},
			},
			Linux: &specs.Linux{Resources: &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(7))}}},
		}
		in.ImageConfig.Env = []string{"C=image", "D=image"}
		in.Config.Envs = []*cri.KeyValue{{Key: "D", Value: []byte("pod")}}
	}
	for name, tc := range map[string]struct {
		change func(*ContainerInput)
		caps   []string
		env    string
		nofile uint64
		limits int
		pids   int64
	}{
		"node":   {node, []string{"CAP_CHOWN", "CAP_KILL"}, "A=node B=node C=node D=node PATH=/node", 1, 2, 100},
		"nearer": {nearer, []string{"CAP_MKNOD"}, "A=node B=base C=image D=pod PATH=/node", 7, 2, 7},
	} {
		s := mustContainer(t, tc.change)
		if got := s.Process.Capabilities.Bounding; !slices.Equal(got, tc.caps) {
			t.Errorf("%s: capabilities %q", name, got)
		}
		for _, kv := range strings.Fields(tc.env) {
			if !slices.Contains(s.Process.Env, kv) {
				t.Errorf("%s: no %s in %q", name, kv, s.Process.Env)
			}
		}
		i := slices.IndexFunc(s.Process.Rlimits, func(l specs.POSIXRlimit) bool { return l.Type == "RLIMIT_NOFILE" })
		if i < 0 || s.Process.Rlimits[i].Soft != tc.nofile || len(s.Process.Rlimits) != tc.limits {
			t.Errorf("%s: limits %+v", name, s.Process.Rlimits)
		}
		if p := s.Linux.Resources.Pids; p == nil || *p.Limit != tc.pids {
			t.Errorf("%s: processes %+v", name, p)
		}
	}
	s := mustContainer(t, func(in *ContainerInput) { in.Policy = Policy{} })
	if p := s.Process; len(p.Capabilities.Bounding) != 0 || p.Rlimits != nil || s.Linux.Resources.Pids != nil {
		t.Errorf("without any: %+v, %+v", p, s.Linux.Resources)
	}
}

func TestMinMemory(t *testing.T) {
	p := Policy{Defaults: Defaults{MinMemory: 100}}
	for limit, refused := range map[int64]bool{99: true, 1: true, 100: false, 0: false, -1: false} {
		_, err := Resources(&cri.LinuxContainerResources{MemoryLimitInBytes: limit}, nil, testHost().Cgroup, p)
		if errdefs.IsInvalidArgument(err) != refused || err != nil && !strings.Contains(err.Error(), "memory_limit_in_bytes") {
			t.Errorf("%d: %v", limit, err)
		}
	}
}
