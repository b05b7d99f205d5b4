package spec

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
)

var managed = []config.Workload{
	{ActivationAnnotation: "none/uses", Resources: config.WorkloadResources{CPUShares: 1}},
	{
		ActivationAnnotation: "is/management", AnnotationPrefix: "res", AllowedAnnotations: []string{config.AnnotationUmask},
		Resources: config.WorkloadResources{CPUShares: 20, CPUSet: "0"},
	},
	{ActivationAnnotation: "is/limited", Resources: config.WorkloadResources{CPULimit: 250}},
}

func TestWorkloadResources(t *testing.T) {
	for name, tc := range map[string]struct {
		annotations map[string]string
		shares      uint64
		cpus        string
		quota       int64
	}{
		"none":              {nil, 1024, "0-1", 50000},
		"activated":         {map[string]string{"is/management": "{}"}, 20, "0", 50000},
		"changed":           {map[string]string{"is/management": "", "res/web": `{"cpushares": 7, "cpuquota": 1000}`}, 7, "0", 1000},
		"another container": {map[string]string{"is/management": "", "res/other": `{"cpushares": 7}`}, 20, "0", 50000},
		"not activated":     {map[string]string{"res/web": `{"cpushares": 7}`}, 1024, "0-1", 50000},
		"limited":           {map[string]string{"is/limited": ""}, 1024, "0-1", 25000},
		"no prefix":         {map[string]string{"is/limited": "", "/web": `{"cpushares": 7}`}, 1024, "0-1", 25000},
		"a limit":           {map[string]string{"is/management": "", "res/web": `{"cpulimit": 1500}`}, 20, "0", 150000},
	} {
		s := mustContainer(t, func(in *ContainerInput) {
			in.Handler.Workloads, in.Pod.Annotations = managed, tc.annotations
			in.Config.Linux.Resources = &cri.LinuxContainerResources{CpuShares: 1024, CpusetCpus: "0-1", CpuQuota: 50000, CpuPeriod: 100000}
		})
		if c := s.Linux.Resources.CPU; *c.Shares != tc.shares || c.Cpus != tc.cpus || *c.Quota != tc.quota || *c.Period != 100000 {
			t.Errorf("%s: shares %d, cpus %s, quota %d of %d", name, *c.Shares, c.Cpus, *c.Quota, *c.Period)
		}
	}
	for _, value := range []string{"", "7", "{", `{"cpushares": "7"}`, `{"cpushares": -1}`, `{"cpushares": 2147483649}`, `{"shares": 1}`, `{} {}`, `{"cpuset": "all"}`} {
		wantError(t, errdefs.ErrInvalidArgument, "", func(in *ContainerInput) {
			in.Handler.Workloads, in.Pod.Annotations = managed, map[string]string{"is/management": "", "res/web": value}
		})
	}
	// What the workload allows, beside the handler.
	s := mustContainer(t, func(in *ContainerInput) {
		in.Handler.Workloads, in.Pod.Annotations = managed, map[string]string{"is/management": "", config.AnnotationUmask: "077"}
	})
	if s.Process.User.Umask == nil {
		t.Error("an annotation that the workload allows has no effect")
	}
}

func FuzzWorkload(f *testing.F) {
	f.Add(`{"cpushares": 7, "cpuset": "0", "cpulimit": 100}`)
	f.Add(`{}{}`)
	f.Fuzz(func(t *testing.T, value string) {
		in := newInput(func(in *ContainerInput) {
			in.Handler.Workloads, in.Pod.Annotations = managed, map[string]string{"is/management": "", "res/web": value}
		})
		r, err := workloadResources(&in)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "res/web") {
				t.Errorf("%q: %v", value, err)
			}
			return
		}
		if r.CpuShares < 0 || r.CpuQuota < 0 || r.CpuPeriod < 0 {
			t.Errorf("%q: %v", value, r)
		}
	})
}
