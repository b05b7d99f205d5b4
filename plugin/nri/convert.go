package nri

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// podOf is a pod as plugins see it.
func podOf(sb record.Sandbox) *api.PodSandbox {
	m, linux := sb.Config.GetMetadata(), sb.Config.GetLinux()
	pod := &api.PodSandbox{
		Id: sb.ID, Name: m.GetName(), Uid: m.GetUid(), Namespace: m.GetNamespace(),
		Labels: maps.Clone(sb.Config.GetLabels()), Annotations: maps.Clone(sb.Config.GetAnnotations()),
		RuntimeHandler: sb.Handler.Name, Pid: sb.Instance.Pid, Ips: sb.Network.IPs,
		Linux: &api.LinuxPodSandbox{
			PodOverhead: fromCRI(either(sb.Overhead, linux.GetOverhead())), PodResources: fromCRI(either(sb.Resources, linux.GetResources())),
			CgroupParent: linux.GetCgroupParent(),
		},
	}
	if sb.Network.NetNS != "" {
		pod.Linux.Namespaces = []*api.LinuxNamespace{{Type: string(specs.NetworkNamespace), Path: sb.Network.NetNS}}
	}
	// A sandbox that its shim runs has no specification.
	var s specs.Spec
	if len(sb.Instance.Spec) == 0 || json.Unmarshal(sb.Instance.Spec, &s) != nil || s.Linux == nil {
		return pod
	}
	if pod.Annotations == nil {
		pod.Annotations = map[string]string{}
	}
	maps.Copy(pod.Annotations, s.Annotations)
	pod.Linux.CgroupsPath = s.Linux.CgroupsPath
	pod.Linux.Namespaces = api.FromOCILinuxNamespaces(s.Linux.Namespaces)
	pod.Linux.Resources = api.FromOCILinuxResources(s.Linux.Resources, nil)
	return pod
}

// either returns the newer value if there is one.
func either(newer, older *cri.LinuxContainerResources) *cri.LinuxContainerResources {
	if newer != nil {
		return newer
	}
	return older
}

func pair(sb record.Sandbox, c record.Container) (*api.PodSandbox, *api.Container, error) {
	ctr, err := containerOf(c)
	return podOf(sb), ctr, err
}

var states = map[record.ContainerPhase]api.ContainerState{
	record.ContainerCreating: api.ContainerState_CONTAINER_CREATED,
	record.ContainerCreated:  api.ContainerState_CONTAINER_CREATED,
	record.ContainerRunning:  api.ContainerState_CONTAINER_RUNNING,
	record.ContainerExited:   api.ContainerState_CONTAINER_STOPPED,
}

// containerOf is a container as plugins see it: its record, and what its
// specification says, which it may have none of yet.
func containerOf(c record.Container) (*api.Container, error) {
	_, digest, _ := strings.Cut(c.Image.Ref, "@")
	ctr := &api.Container{
		Id: c.ID, PodSandboxId: c.SandboxID, Name: c.Config.GetMetadata().GetName(), State: states[c.Phase],
		Labels: maps.Clone(c.Config.GetLabels()), Annotations: maps.Clone(c.Config.GetAnnotations()), Pid: c.Pid,
		CreatedAt: nanos(c.CreatedAt), StartedAt: nanos(c.StartedAt), FinishedAt: nanos(c.FinishedAt),
		ExitCode: c.ExitCode, StatusReason: c.Reason, StatusMessage: c.Message,
		Image: &api.Image{Name: c.Image.Name, Digest: digest, ConfigDigest: c.Image.ID}, Linux: &api.LinuxContainer{},
	}
	for _, d := range c.Config.GetCDIDevices() {
		ctr.CDIDevices = append(ctr.CDIDevices, &api.CDIDevice{Name: d.GetName()})
	}
	if profile := c.Config.GetLinux().GetSecurityContext().GetSeccomp(); profile != nil {
		ctr.Linux.SeccompProfile = &api.SecurityProfile{
			ProfileType: api.SecurityProfile_ProfileType(profile.GetProfileType()), LocalhostRef: profile.GetLocalhostRef(),
		}
	}
	if len(c.Spec) == 0 {
		return ctr, nil
	}
	var s specs.Spec
	if err := json.Unmarshal(c.Spec, &s); err != nil {
		return nil, fmt.Errorf("read specification of container %s: %w (%w)", c.ID, err, errdefs.ErrInternal)
	}
	if ctr.Annotations == nil {
		ctr.Annotations = map[string]string{}
	}
	maps.Copy(ctr.Annotations, s.Annotations)
	ctr.Mounts, ctr.Hooks = api.FromOCIMounts(s.Mounts), api.FromOCIHooks(s.Hooks)
	if s.Process != nil {
		ofProcess(ctr, s.Process)
	}
	if s.Linux != nil {
		ofLinux(ctr.Linux, s.Linux)
	}
	return ctr, nil
}

func ofProcess(ctr *api.Container, p *specs.Process) {
	ctr.Args, ctr.Env = p.Args, p.Env
	ctr.User = &api.User{Uid: p.User.UID, Gid: p.User.GID, AdditionalGids: p.User.AdditionalGids}
	for _, l := range p.Rlimits {
		ctr.Rlimits = append(ctr.Rlimits, &api.POSIXRlimit{Type: l.Type, Hard: l.Hard, Soft: l.Soft})
	}
	if p.OOMScoreAdj != nil {
		ctr.Linux.OomScoreAdj = api.Int(*p.OOMScoreAdj)
	}
	ctr.Linux.IoPriority = api.FromOCILinuxIOPriority(p.IOPriority)
	if p.Scheduler != nil {
		ctr.Linux.Scheduler = api.FromOCILinuxScheduler(p.Scheduler)
	}
}

func ofLinux(out *api.LinuxContainer, l *specs.Linux) {
	out.Namespaces, out.Devices = api.FromOCILinuxNamespaces(l.Namespaces), api.FromOCILinuxDevices(l.Devices)
	out.Resources = api.FromOCILinuxResources(l.Resources, nil)
	out.CgroupsPath, out.Sysctl = l.CgroupsPath, l.Sysctl
	out.NetDevices = api.FromOCILinuxNetDevices(l.NetDevices)
	if l.Seccomp != nil {
		out.SeccompPolicy = api.FromOCILinuxSeccomp(l.Seccomp)
	}
	if rdt := l.IntelRdt; rdt != nil {
		out.Rdt = &api.LinuxRdt{
			ClosId: api.String(rdt.ClosID), Schemata: api.RepeatedString(rdt.Schemata), EnableMonitoring: api.Bool(rdt.EnableMonitoring),
		}
	}
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// fromCRI converts resources; a zero in the CRI is no value.
func fromCRI(r *cri.LinuxContainerResources) *api.LinuxResources {
	if r == nil {
		return nil
	}
	out := &api.LinuxResources{
		Cpu:    &api.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()},
		Memory: &api.LinuxMemory{}, Unified: maps.Clone(r.GetUnified()),
	}
	if v := r.GetCpuShares(); v != 0 {
		out.Cpu.Shares = api.UInt64(uint64(v))
	}
	if v := r.GetCpuQuota(); v != 0 {
		out.Cpu.Quota = api.Int64(v)
	}
	if v := r.GetCpuPeriod(); v != 0 {
		out.Cpu.Period = api.UInt64(uint64(v))
	}
	if v := r.GetMemoryLimitInBytes(); v != 0 {
		out.Memory.Limit = api.Int64(v)
	}
	for _, l := range r.GetHugepageLimits() {
		out.HugepageLimits = append(out.HugepageLimits, &api.HugepageLimit{PageSize: l.GetPageSize(), Limit: l.GetLimit()})
	}
	return out
}

// toCRI converts resources back. What NRI has no word for is taken from asked,
// if there is such a request.
func toCRI(r *api.LinuxResources, asked *cri.LinuxContainerResources) *cri.LinuxContainerResources {
	out := &cri.LinuxContainerResources{
		CpuShares: int64(r.GetCpu().GetShares().GetValue()), CpuPeriod: int64(r.GetCpu().GetPeriod().GetValue()),
		CpuQuota: r.GetCpu().GetQuota().GetValue(), CpusetCpus: r.GetCpu().GetCpus(), CpusetMems: r.GetCpu().GetMems(),
		MemoryLimitInBytes: r.GetMemory().GetLimit().GetValue(), Unified: maps.Clone(r.GetUnified()),
		OomScoreAdj: asked.GetOomScoreAdj(), MemorySwapLimitInBytes: asked.GetMemorySwapLimitInBytes(),
	}
	for _, l := range r.GetHugepageLimits() {
		out.HugepageLimits = append(out.HugepageLimits, &cri.HugepageLimit{PageSize: l.GetPageSize(), Limit: l.GetLimit()})
	}
	return out
}
