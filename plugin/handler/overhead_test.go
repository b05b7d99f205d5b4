package handler

import (
	"testing"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// TestCharge: the shim that is a pod's own is counted to it where its class has memory
// for that.
func TestCharge(t *testing.T) {
	const parent, group = "/kubepods/pod1", "/kubepods/pod1/gantry-shim-a"
	memory := &cri.LinuxContainerResources{MemoryLimitInBytes: 1 << 20}
	for name, c := range map[string]struct {
		runtime, parent, configured string
		overhead                    *cri.LinuxContainerResources
		want                        string
	}{
		"runc's":           {"io.containerd.runc.v2", parent, "", memory, group},
		"ours for a pod":   {"io.containerd.gantry-pod.v2", parent, "", memory, group},
		"ours for all":     {"io.containerd.gantry.v2", parent, "", memory, ""},
		"another":          {"/opt/shim", parent, "", memory, ""},
		"no overhead":      {"io.containerd.runc.v2", parent, "", nil, ""},
		"of CPU":           {"io.containerd.runc.v2", parent, "", &cri.LinuxContainerResources{CpuShares: 100}, ""},
		"no parent":        {"io.containerd.runc.v2", "", "", memory, ""},
		"a slice's name":   {"io.containerd.runc.v2", "a-b.slice", "", memory, ""},
		"as the file says": {"io.containerd.runc.v2", parent, "/shims", memory, ""},
	} {
		options, err := proto.Marshal(&runcoptions.Options{Root: "/r", ShimCgroup: c.configured})
		if err != nil {
			t.Fatal(err)
		}
		sb := record.Sandbox{
			ID:      "a",
			Handler: record.Handler{Runtime: c.runtime, OptionsType: "containerd.runc.v1.Options", Options: options},
			Config:  &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{CgroupParent: c.parent, Overhead: c.overhead}},
		}
		if sb.Handler, err = (&Handlers{}).Charge(sb); err != nil {
			t.Fatal(err)
		}
		if got := ShimGroup(sb); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
		var o runcoptions.Options
		if err := proto.Unmarshal(sb.Handler.Options, &o); err != nil || o.Root != "/r" || o.ShimCgroup != c.configured+c.want {
			t.Errorf("%s: options %v, %v", name, &o, err)
		}
	}
}
