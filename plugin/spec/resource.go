package spec

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

var (
	cpuList    = regexp.MustCompile(`^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$`)
	pageSize   = regexp.MustCompile(`^([1-9][0-9]*)([KMG])B$`)
	unifiedKey = regexp.MustCompile(`^[a-z][a-z0-9_]*(\.[A-Za-z0-9_]+)+$`)
)

// Resources applies a request to the resources in force and returns the
// result; base, which may be nil, is not changed. A field that is zero leaves
// the old value, so the same function serves creation and update. It either
// takes every field or fails.
func Resources(update *cri.LinuxContainerResources, base *specs.LinuxResources, cg facts.Cgroup, p Policy) (*specs.LinuxResources, error) {
	r := &specs.LinuxResources{}
	if base != nil {
		if err := deepCopy(r, base); err != nil {
			return nil, err
		}
	}
	if update == nil {
		return r, nil
	}
	for _, step := range []func() error{
		func() error { return applyCPU(r, update) },
		func() error { return applyMemory(r, update, cg, p) },
		func() error { return applyHugepages(r, update, cg, p) },
		func() error { return applyUnified(r, update, cg) },
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// Update returns a container's specification with a request applied to it:
// Resources, and the OOM score where the request has one. It does not change s.
func Update(s *specs.Spec, update *cri.LinuxContainerResources, host facts.Host, p Policy) (*specs.Spec, error) {
	if s.Linux == nil || s.Process == nil {
		return nil, fmt.Errorf("the specification is not a container's: %w", errdefs.ErrInternal)
	}
	out, linux, process := *s, *s.Linux, *s.Process
	out.Linux, out.Process = &linux, &process
	var err error
	if linux.Resources, err = Resources(update, s.Linux.Resources, host.Cgroup, p); err != nil {
		return nil, err
	}
	if want := update.GetOomScoreAdj(); want != 0 {
		score, err := OOMScoreAdj(want, host, p)
		if err != nil {
			return nil, err
		}
		process.OOMScoreAdj = &score
	}
	return &out, nil
}

func applyCPU(r *specs.LinuxResources, u *cri.LinuxContainerResources) error {
	cpu := specs.LinuxCPU{}
	if r.CPU != nil {
		cpu = *r.CPU
	}
	if u.GetCpuPeriod() < 0 {
		return badResource("cpu_period", u.GetCpuPeriod())
	}
	if u.GetCpuShares() < 0 {
		return badResource("cpu_shares", u.GetCpuShares())
	}
	if u.GetCpuQuota() < -1 {
		return badResource("cpu_quota", u.GetCpuQuota())
	}
	if v := u.GetCpuPeriod(); v != 0 {
		cpu.Period = new(uint64(v))
	}
	switch v := u.GetCpuQuota(); {
	case v > 0:
		cpu.Quota = new(v)
	case v < 0:
		// A new container has none, and not every runtime takes -1: crun tells a kernel
		// with cgroup v1 a number that is too large. Of a container that runs, the
		// change from a quota to nothing lifts it.
		cpu.Quota = nil
	}
	if v := u.GetCpuShares(); v != 0 {
		cpu.Shares = new(uint64(v))
	}
	for _, set := range []struct {
		field, value string
		dst          *string
	}{{"cpuset_cpus", u.GetCpusetCpus(), &cpu.Cpus}, {"cpuset_mems", u.GetCpusetMems(), &cpu.Mems}} {
		if set.value == "" {
			continue
		}
		if !cpuList.MatchString(set.value) {
			return badResource(set.field, set.value)
		}
		*set.dst = set.value
	}
	if r.CPU != nil || cpu != (specs.LinuxCPU{}) {
		r.CPU = &cpu
	}
	return nil
}

// applyMemory: -1 is no limit. The swap limit counts memory and swap together;
// without one of its own a container gets no swap, that is, the memory limit.
func applyMemory(r *specs.LinuxResources, u *cri.LinuxContainerResources, cg facts.Cgroup, p Policy) error {
	limit, swap := u.GetMemoryLimitInBytes(), u.GetMemorySwapLimitInBytes()
	if limit > 0 && limit < p.Defaults.MinMemory {
		return fmt.Errorf("linux.memory_limit_in_bytes: %d is less than the %d that container_min_memory demands: %w", limit, p.Defaults.MinMemory, errdefs.ErrInvalidArgument)
	}
	if limit < -1 {
		return badResource("memory_limit_in_bytes", limit)
	}
	if swap < -1 {
		return badResource("memory_swap_limit_in_bytes", swap)
	}
	if limit == 0 && swap == 0 {
		return nil
	}
	old := specs.LinuxMemory{}
	if r.Memory != nil {
		old = *r.Memory
	}
	m := old
	if limit != 0 {
		m.Limit = new(limit)
	}
	if !cg.SwapAccounting {
		m.Swap = nil
		r.Memory = &m
		return nil
	}
	switch {
	case swap != 0:
		m.Swap = new(swap)
	default:
		m.Swap = followSwap(limit, old)
	}
	if m.Limit == nil && *m.Swap > 0 {
		return fmt.Errorf("linux.memory_swap_limit_in_bytes: %d without a memory limit: %w", *m.Swap, errdefs.ErrInvalidArgument)
	}
	if *m.Swap > 0 && (*m.Limit < 0 || *m.Swap < *m.Limit) {
		return fmt.Errorf("linux.memory_swap_limit_in_bytes: %d is below the memory limit %d: %w", *m.Swap, *m.Limit, errdefs.ErrInvalidArgument)
	}
	r.Memory = &m
	return nil
}

// followSwap returns the swap limit that goes with a new memory limit when the
// request names none: a container without swap stays without, one with a
// budget keeps its total as long as that is not below the limit.
func followSwap(limit int64, old specs.LinuxMemory) *int64 {
	if old.Swap == nil || limit < 0 || old.Limit != nil && *old.Swap == *old.Limit {
		return new(limit)
	}
	if *old.Swap < 0 {
		return new(*old.Swap)
	}
	return new(max(*old.Swap, limit))
}

func applyHugepages(r *specs.LinuxResources, u *cri.LinuxContainerResources, cg facts.Cgroup, p Policy) error {
	if len(u.GetHugepageLimits()) == 0 {
		return nil
	}
	limits := map[string]uint64{}
	for _, l := range r.HugepageLimits {
		limits[l.Pagesize] = l.Limit
	}
	for i, l := range u.GetHugepageLimits() {
		if !pageSize.MatchString(l.GetPageSize()) {
			return badResource(fmt.Sprintf("hugepage_limits[%d].page_size", i), l.GetPageSize())
		}
		limits[l.GetPageSize()] = l.GetLimit()
	}
	if p.DisableHugetlb || !cg.Has("hugetlb") && p.TolerateMissingHugetlb {
		return nil
	}
	if !cg.Has("hugetlb") {
		return fmt.Errorf("linux.hugepage_limits: the host has no hugetlb cgroup controller: %w", errdefs.ErrFailedPrecondition)
	}
	r.HugepageLimits = nil
	for size, limit := range limits {
		r.HugepageLimits = append(r.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: size, Limit: limit})
	}
	slices.SortFunc(r.HugepageLimits, func(a, b specs.LinuxHugepageLimit) int {
		return cmp.Or(cmp.Compare(bytesOf(a.Pagesize), bytesOf(b.Pagesize)), cmp.Compare(a.Pagesize, b.Pagesize))
	})
	return nil
}

// bytesOf is the size in bytes of a page size such as "2MB", 0 if it is none.
func bytesOf(size string) uint64 {
	m := pageSize.FindStringSubmatch(size)
	if m == nil {
		return 0
	}
	n, err := strconv.ParseUint(m[1], 10, 32)
	if err != nil {
		return 0
	}
	return n << (10 * (1 + strings.Index("KMG", m[2])))
}

// applyUnified takes raw version 2 files. Those that move processes or hand
// controllers out (cgroup.*) are not limits.
func applyUnified(r *specs.LinuxResources, u *cri.LinuxContainerResources, cg facts.Cgroup) error {
	if len(u.GetUnified()) == 0 {
		return nil
	}
	if !cg.V2() {
		return fmt.Errorf("linux.unified: the host does not run on cgroup v2 alone: %w", errdefs.ErrFailedPrecondition)
	}
	if r.Unified == nil {
		r.Unified = map[string]string{}
	}
	for k, v := range u.GetUnified() {
		if !unifiedKey.MatchString(k) || strings.HasPrefix(k, "cgroup.") {
			return fmt.Errorf("linux.unified: %q is not a limit: %w", k, errdefs.ErrInvalidArgument)
		}
		if hasControl(v) {
			return fmt.Errorf("linux.unified[%q]: %.64q has control characters: %w", k, v, errdefs.ErrInvalidArgument)
		}
		r.Unified[k] = v
	}
	return nil
}

func badResource(field string, v any) error {
	return fmt.Errorf("linux.%s: %v is not possible: %w", field, v, errdefs.ErrInvalidArgument)
}

// OOMScoreAdj returns the score that a process gets when want is asked for:
// never below the daemon's own where the daemon may not or shall not go lower.
func OOMScoreAdj(want int64, host facts.Host, p Policy) (int, error) {
	if want < -1000 || want > 1000 {
		return 0, badResource("oom_score_adj", want)
	}
	if p.RestrictOOMScoreAdj || !host.LowerOOMScore {
		want = max(want, int64(host.OOMScoreAdj))
	}
	return int(want), nil
}

func containerOOMScore(in *ContainerInput, base *int) (*int, error) {
	r := in.Config.GetLinux().GetResources()
	if r == nil && base == nil {
		return nil, nil
	}
	want := r.GetOomScoreAdj()
	if r == nil {
		want = int64(*base)
	}
	adj, err := OOMScoreAdj(want, in.Host, in.Policy)
	return &adj, err
}
