package lifecycle

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestRES_25_Workloads: a pod that says that it is of a workload gets that one's
// CPU settings, in which it may have a say for each container, and what the
// workload allows; others do not.
func TestRES_25_Workloads(t *testing.T) {
	t.Parallel()
	at := func(key ...string) []string { return append([]string{"workloads", "management"}, key...) }
	d := start(t,
		runtimeKey("workload.test/management", at("activation_annotation")...), runtimeKey("resources.test", at("annotation_prefix")...),
		runtimeKey([]string{"umask.crio.io"}, at("allowed_annotations")...),
		runtimeKey(300, at("resources", "cpushares")...), runtimeKey("0", at("resources", "cpuset")...), runtimeKey(500, at("resources", "cpulimit")...))
	all := map[string]string{
		"workload.test/management": `{"effect": "PreferredDuringScheduling"}`, "resources.test/chosen": `{"cpushares": 400, "cpulimit": 250}`,
		"resources.test/bad": `{"cpushares": "many"}`, "umask.crio.io": "077",
	}
	pod := func(name string, annotations map[string]string) *box {
		return onHandler(t, d, name, "", func(c *cri.PodSandboxConfig) { c.Annotations = annotations })
	}
	request := &cri.LinuxContainerResources{CpuShares: 100, CpuQuota: 20000, CpuPeriod: 100000, CpusetCpus: "0-1"}
	check := func(b *box, name, shares, quota, cpus, umask string) {
		t.Helper()
		id := b.run(b.limits(name, request))
		if got := b.knob(id, "cpu", "cpu.shares", "cpu.weight"); versionOne("cpu") && got != shares {
			t.Errorf("%s: shares %s, want %s", name, got, shares)
		}
		if got := b.knob(id, "cpu", "cpu.cfs_quota_us", "cpu.max"); strings.TrimSuffix(got, " 100000") != quota {
			t.Errorf("%s: quota %s, want %s", name, got, quota)
		}
		if got := b.knob(id, "cpuset", "cpuset.cpus", "cpuset.cpus"); got != cpus {
			t.Errorf("%s: CPUs %s, want %s", name, got, cpus)
		}
		if got := sh(d, id, "umask"); got != umask {
			t.Errorf("%s: umask %s, want %s", name, got, umask)
		}
	}
	b := pod("management", all)
	check(b, "usual", "300", "50000", "0", "0077")
	check(b, "chosen", "400", "25000", "0", "0077")
	b.refused(b.limits("bad", request), codes.InvalidArgument, "resources.test/bad")
	delete(all, "workload.test/management")
	check(pod("other", all), "chosen", "100", "20000", "0-1", "0022")
}
