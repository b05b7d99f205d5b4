package nri

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/runtime-tools/generate"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// generator changes a specification that fill has been over, piece by piece.
type generator struct{ s *specs.Spec }

var _ generate.UnderlyingGenerator = generator{}

// fill makes the parts that generator changes, where they are missing.
func fill(s *specs.Spec) {
	if s.Process == nil {
		s.Process = &specs.Process{}
	}
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	if s.Linux.Resources == nil {
		s.Linux.Resources = &specs.LinuxResources{}
	}
	if s.Annotations == nil {
		s.Annotations = map[string]string{}
	}
}

// Spec returns what is being changed.
func (g generator) Spec() *specs.Spec { return g.s }

// AddAnnotation sets an annotation.
func (g generator) AddAnnotation(key, value string) { g.s.Annotations[key] = value }

// RemoveAnnotation removes one.
func (g generator) RemoveAnnotation(key string) { delete(g.s.Annotations, key) }

// SetProcessArgs sets the command.
func (g generator) SetProcessArgs(args []string) { g.s.Process.Args = slices.Clone(args) }

// AddProcessEnv sets a variable of the environment.
func (g generator) AddProcessEnv(name, value string) {
	i := slices.IndexFunc(g.s.Process.Env, func(e string) bool { return strings.HasPrefix(e, name+"=") })
	if i >= 0 {
		g.s.Process.Env[i] = name + "=" + value
		return
	}
	g.s.Process.Env = append(g.s.Process.Env, name+"="+value)
}

// ClearProcessEnv empties the environment.
func (g generator) ClearProcessEnv() { g.s.Process.Env = nil }

// SetProcessOOMScoreAdj sets the OOM score.
func (g generator) SetProcessOOMScoreAdj(adj int) { g.s.Process.OOMScoreAdj = &adj }

// Mounts returns the mounts.
func (g generator) Mounts() []specs.Mount { return g.s.Mounts }

// AddMount adds a mount behind the others.
func (g generator) AddMount(m specs.Mount) { g.s.Mounts = append(g.s.Mounts, m) }

// RemoveMount removes what is mounted at a place.
func (g generator) RemoveMount(destination string) {
	g.s.Mounts = slices.DeleteFunc(g.s.Mounts, func(m specs.Mount) bool { return m.Destination == destination })
}

// ClearMounts removes all mounts.
func (g generator) ClearMounts() { g.s.Mounts = nil }

// SetLinuxRootPropagation sets the propagation of the root filesystem.
func (g generator) SetLinuxRootPropagation(p string) error {
	if !slices.Contains([]string{"", "private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable"}, p) {
		return fmt.Errorf("propagation %q is unknown: %w", p, errdefs.ErrInvalidArgument)
	}
	g.s.Linux.RootfsPropagation = p
	return nil
}

func (g generator) hooks() *specs.Hooks {
	if g.s.Hooks == nil {
		g.s.Hooks = &specs.Hooks{}
	}
	return g.s.Hooks
}

// AddPreStartHook adds a hook of the oldest stage.
func (g generator) AddPreStartHook(h specs.Hook) { g.hooks().Prestart = append(g.hooks().Prestart, h) }

// AddPostStartHook adds a hook that runs after the process has begun.
func (g generator) AddPostStartHook(h specs.Hook) {
	g.hooks().Poststart = append(g.hooks().Poststart, h)
}

// AddPostStopHook adds a hook that runs when the container is deleted.
func (g generator) AddPostStopHook(h specs.Hook) { g.hooks().Poststop = append(g.hooks().Poststop, h) }

// AddDevice adds a node in place of one with the same path.
func (g generator) AddDevice(d specs.LinuxDevice) {
	g.RemoveDevice(d.Path)
	g.s.Linux.Devices = append(g.s.Linux.Devices, d)
}

// RemoveDevice removes the node with that path.
func (g generator) RemoveDevice(path string) {
	g.s.Linux.Devices = slices.DeleteFunc(g.s.Linux.Devices, func(d specs.LinuxDevice) bool { return d.Path == path })
}

// AddLinuxResourcesDevice adds a rule of the device cgroup.
func (g generator) AddLinuxResourcesDevice(allow bool, kind string, major, minor *int64, access string) {
	g.s.Linux.Resources.Devices = append(g.s.Linux.Resources.Devices,
		specs.LinuxDeviceCgroup{Allow: allow, Type: kind, Major: major, Minor: minor, Access: access})
}

// kinds are the namespaces, by their names in messages.
var kinds = []specs.LinuxNamespaceType{
	specs.PIDNamespace, specs.NetworkNamespace, specs.MountNamespace, specs.IPCNamespace,
	specs.UTSNamespace, specs.UserNamespace, specs.CgroupNamespace, specs.TimeNamespace,
}

// AddOrReplaceLinuxNamespace sets the path of a namespace, "" for a new one.
func (g generator) AddOrReplaceLinuxNamespace(kind, path string) error {
	if err := g.RemoveLinuxNamespace(kind); err != nil {
		return err
	}
	g.s.Linux.Namespaces = append(g.s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(kind), Path: path})
	return nil
}

// RemoveLinuxNamespace takes a namespace away: the runtime's own remains.
func (g generator) RemoveLinuxNamespace(kind string) error {
	if !slices.Contains(kinds, specs.LinuxNamespaceType(kind)) {
		return fmt.Errorf("namespace %q is unknown: %w", kind, errdefs.ErrInvalidArgument)
	}
	g.s.Linux.Namespaces = slices.DeleteFunc(g.s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return string(n.Type) == kind })
	return nil
}

// AddLinuxSysctl sets a kernel parameter of the container's namespaces.
func (g generator) AddLinuxSysctl(key, value string) {
	if g.s.Linux.Sysctl == nil {
		g.s.Linux.Sysctl = map[string]string{}
	}
	g.s.Linux.Sysctl[key] = value
}

// RemoveLinuxSysctl leaves a kernel parameter as it is.
func (g generator) RemoveLinuxSysctl(key string) { delete(g.s.Linux.Sysctl, key) }

// SetLinuxCgroupsPath sets where the container's cgroup is.
func (g generator) SetLinuxCgroupsPath(path string) { g.s.Linux.CgroupsPath = path }

func (g generator) cpu() *specs.LinuxCPU {
	if g.s.Linux.Resources.CPU == nil {
		g.s.Linux.Resources.CPU = &specs.LinuxCPU{}
	}
	return g.s.Linux.Resources.CPU
}

// SetLinuxResourcesCPUCpus sets the CPUs to run on.
func (g generator) SetLinuxResourcesCPUCpus(cpus string) { g.cpu().Cpus = cpus }

// SetLinuxResourcesCPUMems sets the memory nodes to use.
func (g generator) SetLinuxResourcesCPUMems(mems string) { g.cpu().Mems = mems }

// SetLinuxResourcesCPUPeriod sets the period of the quota.
func (g generator) SetLinuxResourcesCPUPeriod(period uint64) { g.cpu().Period = &period }

// SetLinuxResourcesCPUQuota sets the CPU time per period. A negative one is none,
// as not every runtime takes -1.
func (g generator) SetLinuxResourcesCPUQuota(quota int64) {
	g.cpu().Quota = nil
	if quota >= 0 {
		g.cpu().Quota = &quota
	}
}

// SetLinuxResourcesCPURealtimePeriod sets the period of real-time scheduling.
func (g generator) SetLinuxResourcesCPURealtimePeriod(period uint64) {
	g.cpu().RealtimePeriod = &period
}

// SetLinuxResourcesCPURealtimeRuntime sets the real-time CPU time per period.
func (g generator) SetLinuxResourcesCPURealtimeRuntime(runtime int64) {
	g.cpu().RealtimeRuntime = &runtime
}

// SetLinuxResourcesCPUShares sets the weight.
func (g generator) SetLinuxResourcesCPUShares(shares uint64) { g.cpu().Shares = &shares }

func (g generator) memory() *specs.LinuxMemory {
	if g.s.Linux.Resources.Memory == nil {
		g.s.Linux.Resources.Memory = &specs.LinuxMemory{}
	}
	return g.s.Linux.Resources.Memory
}

// SetLinuxResourcesMemoryLimit sets the limit of memory.
func (g generator) SetLinuxResourcesMemoryLimit(limit int64) { g.memory().Limit = &limit }

// SetLinuxResourcesMemorySwap sets the limit of memory and swap.
func (g generator) SetLinuxResourcesMemorySwap(swap int64) { g.memory().Swap = &swap }

// AddLinuxResourcesHugepageLimit sets the limit of huge pages of one size.
func (g generator) AddLinuxResourcesHugepageLimit(size string, limit uint64) {
	r := g.s.Linux.Resources
	r.HugepageLimits = slices.DeleteFunc(r.HugepageLimits, func(l specs.LinuxHugepageLimit) bool { return l.Pagesize == size })
	r.HugepageLimits = append(r.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: size, Limit: limit})
}

// AddLinuxResourcesUnified sets a file of a version 2 cgroup.
func (g generator) AddLinuxResourcesUnified(key, value string) {
	if g.s.Linux.Resources.Unified == nil {
		g.s.Linux.Resources.Unified = map[string]string{}
	}
	g.s.Linux.Resources.Unified[key] = value
}
