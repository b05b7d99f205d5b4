package stats

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/cgroupspath"
	"github.com/gantry-cri/gantry/plugin/record"
)

// defaultInterface is the pod's interface on its default network.
const defaultInterface = "eth0"

// Sandbox measures a pod. containers are all of the pod's; those that ended are
// counted in the pod's own numbers only as far as the kernel does.
//
// The numbers are those of the pod's cgroup, if the kubelet gave it one: the
// parent of its containers' cgroups, which is there before they are. Else they are the sums over its cgroups,
// without pressure, which cannot be summed.
func (s *Stats) Sandbox(ctx context.Context, sb record.Sandbox, containers []record.Container) (*cri.PodSandboxStats, error) {
	linux := &cri.LinuxPodSandboxStats{}
	out := &cri.PodSandboxStats{Linux: linux, Attributes: &cri.PodSandboxAttributes{
		Id: sb.ID, Metadata: sb.Config.GetMetadata(), Labels: sb.Config.GetLabels(), Annotations: sb.Config.GetAnnotations(),
	}}
	for _, c := range containers {
		if c.Phase == record.ContainerExited {
			continue
		}
		stats, err := s.Container(ctx, c)
		switch {
		case err == nil:
			linux.Containers = append(linux.Containers, stats)
		case !errdefs.IsNotFound(err):
			return nil, fmt.Errorf("measure sandbox: %w", err)
		}
	}
	groups, err := s.podGroups(sb, containers)
	if err != nil {
		return nil, fmt.Errorf("measure sandbox: %w", err)
	}
	if err := s.pod(sb.ID, groups, linux); err != nil {
		return nil, fmt.Errorf("measure sandbox: %w", err)
	}
	if sb.Network.NetNS != "" {
		if linux.Network, err = network(sb.Network.NetNS, s.now()); err != nil {
			return nil, fmt.Errorf("measure sandbox: %w", err)
		}
	}
	return out, nil
}

// podGroups returns the one cgroup that is the pod's, or else all those of its
// sandbox process and containers.
func (s *Stats) podGroups(sb record.Sandbox, containers []record.Container) ([]string, error) {
	var groups []string
	add := func(id string, spec []byte) error {
		g, err := s.group(id, spec)
		if err == nil {
			groups = append(groups, g)
		}
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	}
	if err := add(sb.ID, sb.Instance.Spec); err != nil {
		return nil, err
	}
	for _, c := range containers {
		if err := add(c.ID, c.Spec); err != nil {
			return nil, err
		}
	}
	parent := sb.Config.GetLinux().GetCgroupParent()
	if parent == "" {
		return groups, nil
	}
	if parent = cgroupspath.Parent(parent); len(groups) > 0 {
		parent = path.Dir(groups[0])
	}
	if parent == "/" {
		return groups, nil
	}
	return []string{parent}, nil
}

// pod sets the numbers of the pod as a whole.
func (s *Stats) pod(id string, groups []string, out *cri.LinuxPodSandboxStats) error {
	var sum reading
	var processes count
	for _, g := range groups {
		r, err := s.books.read(g)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		n, err := s.books.processes(g)
		if err != nil {
			return err
		}
		sum, processes = sum.plus(r), processes.plus(n)
	}
	if len(groups) > 1 {
		sum.cpuPressure, sum.memoryPressure, sum.ioPressure = nil, nil, nil
		sum.memoryLimit, sum.swapLimit = count{}, count{}
	}
	now := s.now()
	// A pod's cgroup can be older than its sandbox, so there is no moment at
	// which its CPU time is known to be zero.
	out.Cpu, out.Memory, out.Io = sum.cpuUsage(now, s.rate(id, now, sum.cpu, time.Time{})), sum.memoryUsage(now), sum.ioUsage(now)
	if processes.ok {
		out.Process = &cri.ProcessUsage{Timestamp: now.UnixNano(), ProcessCount: processes.message()}
	}
	return nil
}

// plus adds up two readings; limits and pressure are those of r2.
func (r reading) plus(r2 reading) reading {
	r2.cpu, r2.usage, r2.inactive = r.cpu.plus(r2.cpu), r.usage.plus(r2.usage), r.inactive.plus(r2.inactive)
	r2.rss, r2.faults, r2.majors = r.rss.plus(r2.rss), r.faults.plus(r2.faults), r.majors.plus(r2.majors)
	r2.swap = r.swap.plus(r2.swap)
	return r2
}

// network reads the counters of the interfaces in a network namespace, nil when
// that is gone. The namespace is entered by its file, which is named after the
// pod: a process number could have become somebody else's.
func network(file string, at time.Time) (*cri.NetworkUsage, error) {
	ns, err := netns.GetFromPath(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", file, err)
	}
	defer ns.Close()
	var fsys unix.Statfs_t
	if err := unix.Fstatfs(int(ns), &fsys); err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", file, err)
	}
	if fsys.Type != unix.NSFS_MAGIC {
		return nil, nil // none is mounted on the file any more: the pod is being taken down
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("enter network namespace %s: %w", file, err)
	}
	defer h.Close()
	links, err := h.LinkList()
	// Interfaces came or went meanwhile: what was listed is right for each.
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list interfaces in %s: %w", file, err)
	}
	return networkUsage(links, at), nil
}

// networkUsage converts the counters of all interfaces but loopback.
func networkUsage(links []netlink.Link, at time.Time) *cri.NetworkUsage {
	out := &cri.NetworkUsage{Timestamp: at.UnixNano()}
	for _, l := range links {
		a := l.Attrs()
		if a.RawFlags&unix.IFF_LOOPBACK != 0 || a.Statistics == nil {
			continue
		}
		u := &cri.NetworkInterfaceUsage{
			Name:    a.Name,
			RxBytes: known(a.Statistics.RxBytes).message(), RxErrors: known(a.Statistics.RxErrors).message(),
			TxBytes: known(a.Statistics.TxBytes).message(), TxErrors: known(a.Statistics.TxErrors).message(),
		}
		if a.Name == defaultInterface {
			out.DefaultInterface = u
		} else {
			out.Interfaces = append(out.Interfaces, u)
		}
	}
	return out
}
