package spec

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

func TestResources(t *testing.T) {
	swap, noSwap, v2 := testHost().Cgroup, facts.Cgroup{Mode: facts.CgroupV1}, v2Host().Cgroup
	memory := func(limit, swap int64) *specs.LinuxMemory {
		m := &specs.LinuxMemory{Limit: new(limit)}
		if swap != 0 {
			m.Swap = new(swap)
		}
		return m
	}
	for name, tc := range map[string]struct {
		base   *specs.LinuxResources
		update *cri.LinuxContainerResources
		cg     facts.Cgroup
		want   *specs.LinuxResources
	}{
		"nothing": {nil, nil, swap, &specs.LinuxResources{}},
		"zeros":   {nil, &cri.LinuxContainerResources{}, swap, &specs.LinuxResources{}},
		"cpu": {nil, &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, CpusetCpus: "0-1,3", CpusetMems: "0"}, swap,
			&specs.LinuxResources{CPU: &specs.LinuxCPU{Period: new(uint64(100000)), Quota: new(int64(50000)), Shares: new(uint64(512)), Cpus: "0-1,3", Mems: "0"}}},
		"no quota": {nil, &cri.LinuxContainerResources{CpuQuota: -1}, swap, &specs.LinuxResources{}},
		"lift the quota": {&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: new(int64(5)), Period: new(uint64(100))}}, &cri.LinuxContainerResources{CpuQuota: -1}, swap,
			&specs.LinuxResources{CPU: &specs.LinuxCPU{Period: new(uint64(100))}}},
		"lift all there is": {&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: new(int64(5))}}, &cri.LinuxContainerResources{CpuQuota: -1}, swap, &specs.LinuxResources{CPU: &specs.LinuxCPU{}}},
		"shares alone leave the rest": {&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: new(int64(5)), Cpus: "1"}}, &cri.LinuxContainerResources{CpuShares: 3}, swap,
			&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: new(int64(5)), Cpus: "1", Shares: new(uint64(3))}}},
		"memory":                     {nil, &cri.LinuxContainerResources{MemoryLimitInBytes: 100}, swap, &specs.LinuxResources{Memory: memory(100, 100)}},
		"memory on v2":               {nil, &cri.LinuxContainerResources{MemoryLimitInBytes: 100}, v2, &specs.LinuxResources{Memory: memory(100, 100)}},
		"memory, no accounting":      {nil, &cri.LinuxContainerResources{MemoryLimitInBytes: 100}, noSwap, &specs.LinuxResources{Memory: memory(100, 0)}},
		"no limit":                   {nil, &cri.LinuxContainerResources{MemoryLimitInBytes: -1}, swap, &specs.LinuxResources{Memory: memory(-1, -1)}},
		"swap budget":                {nil, &cri.LinuxContainerResources{MemoryLimitInBytes: 100, MemorySwapLimitInBytes: 150}, swap, &specs.LinuxResources{Memory: memory(100, 150)}},
		"any swap":                   {nil, &cri.LinuxContainerResources{MemoryLimitInBytes: 100, MemorySwapLimitInBytes: -1}, swap, &specs.LinuxResources{Memory: memory(100, -1)}},
		"swap, no accounting":        {nil, &cri.LinuxContainerResources{MemoryLimitInBytes: 100, MemorySwapLimitInBytes: 150}, noSwap, &specs.LinuxResources{Memory: memory(100, 0)}},
		"grow, swap follows":         {&specs.LinuxResources{Memory: memory(100, 100)}, &cri.LinuxContainerResources{MemoryLimitInBytes: 200}, swap, &specs.LinuxResources{Memory: memory(200, 200)}},
		"shrink, swap follows":       {&specs.LinuxResources{Memory: memory(100, 100)}, &cri.LinuxContainerResources{MemoryLimitInBytes: 50}, swap, &specs.LinuxResources{Memory: memory(50, 50)}},
		"grow, budget stays":         {&specs.LinuxResources{Memory: memory(100, 300)}, &cri.LinuxContainerResources{MemoryLimitInBytes: 200}, swap, &specs.LinuxResources{Memory: memory(200, 300)}},
		"grow beyond the budget":     {&specs.LinuxResources{Memory: memory(100, 150)}, &cri.LinuxContainerResources{MemoryLimitInBytes: 200}, swap, &specs.LinuxResources{Memory: memory(200, 200)}},
		"grow, any swap stays":       {&specs.LinuxResources{Memory: memory(100, -1)}, &cri.LinuxContainerResources{MemoryLimitInBytes: 200}, swap, &specs.LinuxResources{Memory: memory(200, -1)}},
		"lift the limit":             {&specs.LinuxResources{Memory: memory(100, 150)}, &cri.LinuxContainerResources{MemoryLimitInBytes: -1}, swap, &specs.LinuxResources{Memory: memory(-1, -1)}},
		"swap alone":                 {&specs.LinuxResources{Memory: memory(100, 100)}, &cri.LinuxContainerResources{MemorySwapLimitInBytes: 120}, swap, &specs.LinuxResources{Memory: memory(100, 120)}},
		"other resources untouched":  {&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(9))}}, &cri.LinuxContainerResources{}, swap, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(9))}}},
		"unified":                    {&specs.LinuxResources{Unified: map[string]string{"memory.high": "1", "pids.max": "2"}}, &cri.LinuxContainerResources{Unified: map[string]string{"memory.high": "3", "hugetlb.2MB.max": "0"}}, v2, &specs.LinuxResources{Unified: map[string]string{"memory.high": "3", "pids.max": "2", "hugetlb.2MB.max": "0"}}},
		"huge pages, sorted by size": {&specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 1}}}, &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "1GB", Limit: 2}, {PageSize: "64KB"}, {PageSize: "2MB", Limit: 5}}}, v2, &specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "64KB"}, {Pagesize: "2MB", Limit: 5}, {Pagesize: "1GB", Limit: 2}}}},
	} {
		t.Run(name, func(t *testing.T) {
			before := &specs.LinuxResources{}
			if err := deepCopy(before, tc.base); err != nil {
				t.Fatal(err)
			}
			got, err := Resources(tc.update, tc.base, tc.cg, Policy{})
			if err != nil || !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got %+v, %v\nwant %+v", got, err, tc.want)
			}
			if tc.base != nil && !reflect.DeepEqual(tc.base, before) {
				t.Errorf("base changed to %+v", tc.base)
			}
		})
	}
}

func TestResourcesErrors(t *testing.T) {
	v2 := v2Host().Cgroup
	page := func(size string) *cri.LinuxContainerResources {
		return &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: size, Limit: 1}}}
	}
	for field, updates := range map[string][]*cri.LinuxContainerResources{
		"cpu_period":                 {{CpuPeriod: -1}},
		"cpu_shares":                 {{CpuShares: -1}},
		"cpu_quota":                  {{CpuQuota: -2}},
		"cpuset_cpus":                {{CpusetCpus: "a"}, {CpusetCpus: "0,"}, {CpusetCpus: "0\n1"}, {CpusetCpus: "-1"}},
		"cpuset_mems":                {{CpusetMems: "0 1"}},
		"memory_limit_in_bytes":      {{MemoryLimitInBytes: -2}},
		"memory_swap_limit_in_bytes": {{MemorySwapLimitInBytes: -2}, {MemorySwapLimitInBytes: 5}, {MemoryLimitInBytes: 5, MemorySwapLimitInBytes: 4}, {MemoryLimitInBytes: -1, MemorySwapLimitInBytes: 4}},
		"hugepage_limits[0]":         {page("2M"), page(""), page("0MB"), page("2MB\n"), page("2MB/../x"), {HugepageLimits: []*cri.HugepageLimit{nil}}},
		"unified":                    {{Unified: map[string]string{"memory.high": "1\n2"}}, {Unified: map[string]string{"": "1"}}, {Unified: map[string]string{"memory": "1"}}, {Unified: map[string]string{"../x.y": "1"}}, {Unified: map[string]string{"cgroup.procs": "1"}}, {Unified: map[string]string{"memory.high/x": "1"}}},
	} {
		for _, u := range updates {
			if got, err := Resources(u, nil, v2, Policy{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), field) {
				t.Errorf("%s: %+v gave %+v, %v", field, u, got, err)
			}
		}
	}
	if _, err := Resources(&cri.LinuxContainerResources{Unified: map[string]string{"memory.high": "1"}}, nil, testHost().Cgroup, Policy{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("unified on v1: %v", err)
	}
}

func TestMissingHugetlb(t *testing.T) {
	u := &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: 1}}}
	for _, tc := range []struct {
		cg     facts.Cgroup
		policy Policy
		limits int
		err    error
	}{
		{v2Host().Cgroup, Policy{}, 1, nil},
		{v2Host().Cgroup, Policy{DisableHugetlb: true}, 0, nil},
		{testHost().Cgroup, Policy{}, 0, errdefs.ErrFailedPrecondition},
		{testHost().Cgroup, Policy{TolerateMissingHugetlb: true}, 0, nil},
		{testHost().Cgroup, Policy{DisableHugetlb: true}, 0, nil},
	} {
		got, err := Resources(u, nil, tc.cg, tc.policy)
		if !errors.Is(err, tc.err) || err == nil && len(got.HugepageLimits) != tc.limits {
			t.Errorf("%+v: got %+v, %v", tc, got, err)
		}
	}
}

func TestOOMScoreAdj(t *testing.T) {
	for _, tc := range []struct {
		want     int64
		own      int
		lower    bool
		restrict bool
		got      int
	}{
		{-998, 0, true, false, -998},
		{-998, 0, false, false, 0},
		{-998, -500, false, false, -500},
		{-998, -999, true, true, -998},
		{-998, -500, true, true, -500},
		{1000, 0, false, true, 1000},
		{3, 0, false, false, 3},
	} {
		h := testHost()
		h.OOMScoreAdj, h.LowerOOMScore = tc.own, tc.lower
		if got, err := OOMScoreAdj(tc.want, h, Policy{RestrictOOMScoreAdj: tc.restrict}); err != nil || got != tc.got {
			t.Errorf("%+v: got %d, %v", tc, got, err)
		}
	}
	for _, bad := range []int64{-1001, 1001, 1 << 40} {
		wantError(t, errdefs.ErrInvalidArgument, "oom_score_adj", func(in *ContainerInput) { in.Config.Linux.Resources.OomScoreAdj = bad })
	}
	s := mustContainer(t, func(in *ContainerInput) { in.Config.Linux.Resources.OomScoreAdj = 900 })
	if s.Process.OOMScoreAdj == nil || *s.Process.OOMScoreAdj != 900 {
		t.Errorf("score %v", s.Process.OOMScoreAdj)
	}
	if s = mustContainer(t, func(in *ContainerInput) { in.Config.Linux.Resources = nil }); s.Process.OOMScoreAdj != nil {
		t.Errorf("no resources: %v", *s.Process.OOMScoreAdj)
	}
}

func TestCgroupsPath(t *testing.T) {
	s := mustContainer(t, func(in *ContainerInput) { in.Handler.SystemdCgroup = true })
	if s.Linux.CgroupsPath != "kubepods-pod1.slice:cri-containerd:cid" {
		t.Errorf("got %q", s.Linux.CgroupsPath)
	}
}
