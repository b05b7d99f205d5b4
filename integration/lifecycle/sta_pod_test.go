package lifecycle

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// inPodGroup puts a pod's cgroups below one of the pod's own, as a kubelet does.
func inPodGroup(d *daemon.Daemon, name string) func(*cri.PodSandboxConfig) {
	return func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = d.PodParent("kubepods", name) }
}

func podStats(t *testing.T, d *daemon.Daemon, id string) *cri.PodSandboxStats {
	t.Helper()
	resp, err := d.Runtime().PodSandboxStats(t.Context(), &cri.PodSandboxStatsRequest{PodSandboxId: id})
	if err != nil {
		t.Fatal(err)
	}
	return resp.Stats
}

// spin uses CPU time for a moment.
const spin = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"

// ofContainers adds up what a pod's containers have used.
func ofContainers(s *cri.PodSandboxStats) (ids []string, cpu, memory uint64) {
	for _, c := range s.Linux.Containers {
		ids = append(ids, c.Attributes.Id)
		cpu += c.Cpu.GetUsageCoreNanoSeconds().GetValue()
		memory += c.Memory.GetUsageBytes().GetValue()
	}
	return ids, cpu, memory
}

func TestRPC_24_PodSandboxStats(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "measured", inPodGroup(d, "rpc24"))
	one, two := p.run(d, daemon.ContainerConfig("one", plain(t, d))), p.run(d, daemon.ContainerConfig("two", plain(t, d)))
	ended := p.run(d, daemon.ContainerConfig("ended", plain(t, d)))
	if err := stopContainer(d, ended, 0); err != nil {
		t.Fatal(err)
	}
	sh(d, one, spin)
	s := podStats(t, d, p.id)
	if a := s.Attributes; a.GetId() != p.id || a.GetMetadata().GetUid() != p.config.Metadata.Uid || a.GetLabels()["io.kubernetes.pod.name"] != "measured" {
		t.Errorf("attributes are %v", a)
	}
	ids, cpu, _ := ofContainers(s)
	if slices.Sort(ids); !slices.Equal(ids, slices.Sorted(slices.Values([]string{one, two}))) {
		t.Errorf("its containers are %q, want %s and %s", ids, one, two)
	}
	// The pod has what its containers have, and its sandbox's process.
	if got := s.Linux.Cpu.GetUsageCoreNanoSeconds().GetValue(); got < cpu {
		t.Errorf("the pod used %d ns of CPU, its containers %d", got, cpu)
	}
	// Between two readings the kernel may give back what it has charged ahead, some 256 KiB
	// for each processor.
	eventually(t, soon, func() error {
		s := podStats(t, d, p.id)
		_, _, memory := ofContainers(s)
		if got := s.Linux.Memory.GetUsageBytes().GetValue(); got < memory || s.Linux.Memory.GetWorkingSetBytes().GetValue() == 0 {
			return fmt.Errorf("the pod's memory is %v, its containers have %d", s.Linux.Memory, memory)
		}
		return nil
	})
	if s.Linux.Network.GetDefaultInterface().GetName() != "eth0" || s.Linux.Process.GetProcessCount().GetValue() < 3 {
		t.Errorf("network %v, processes %v", s.Linux.Network, s.Linux.Process)
	}
	if prefix := podStats(t, d, p.id[:12]); prefix.Attributes.Id != p.id {
		t.Errorf("by a prefix it is %v", prefix.Attributes)
	}
	_, err := d.Runtime().PodSandboxStats(t.Context(), &cri.PodSandboxStatsRequest{PodSandboxId: unknownID})
	wantError(t, err, codes.NotFound, unknownID)
	_, err = d.Runtime().PodSandboxStats(t.Context(), &cri.PodSandboxStatsRequest{})
	wantError(t, err, codes.InvalidArgument, "pod_sandbox_id")
}

// measuredPods are two that run and one that was stopped, with labels.
func measuredPods(t *testing.T, d *daemon.Daemon, mark string) (red, blue pod) {
	t.Helper()
	with := func(colour string) func(*cri.PodSandboxConfig) {
		return func(c *cri.PodSandboxConfig) {
			hostNetwork(c)
			c.Labels["measured"], c.Labels["colour"] = mark, colour
		}
	}
	red, blue = runPaused(d, "red", with("red")), runPaused(d, "blue", with("blue"))
	stopped := runPod(d, "stopped", with("red"))
	if err := stopPod(d, stopped.id); err != nil {
		t.Fatal(err)
	}
	eventually(t, soon, func() error { // stock containerd hears of the end a moment later
		if s := podStatus(t, d, stopped.id); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
			return fmt.Errorf("the pod that was stopped is %s", s.State)
		}
		return nil
	})
	return red, blue
}

// wantPods checks which pods were measured.
func wantPods(t *testing.T, name string, got []*cri.PodSandboxStats, want ...pod) {
	t.Helper()
	var ids, wanted []string
	for _, s := range got {
		ids = append(ids, s.GetAttributes().GetId())
		if s.GetLinux().GetMemory().GetUsageBytes().GetValue() == 0 || s.GetLinux().GetCpu().GetUsageCoreNanoSeconds() == nil {
			t.Errorf("%s: a pod without a reading: %v", name, s)
		}
	}
	for _, p := range want {
		wanted = append(wanted, p.id)
	}
	slices.Sort(ids)
	slices.Sort(wanted)
	if !slices.Equal(ids, wanted) {
		t.Errorf("%s: got %q, want %q", name, ids, wanted)
	}
}

func TestRPC_25_ListPodSandboxStats(t *testing.T) {
	t.Parallel()
	d := shared(t)
	red, blue := measuredPods(t, d, "rpc25")
	ours := func(colour string) map[string]string {
		return map[string]string{"measured": "rpc25", "colour": colour}
	}
	for name, c := range map[string]struct {
		filter *cri.PodSandboxStatsFilter
		want   []pod
	}{
		"label":            {&cri.PodSandboxStatsFilter{LabelSelector: map[string]string{"measured": "rpc25"}}, []pod{red, blue}},
		"two labels":       {&cri.PodSandboxStatsFilter{LabelSelector: ours("red")}, []pod{red}},
		"ID":               {&cri.PodSandboxStatsFilter{Id: blue.id}, []pod{blue}},
		"ID and label":     {&cri.PodSandboxStatsFilter{Id: blue.id, LabelSelector: ours("blue")}, []pod{blue}},
		"ID and not label": {&cri.PodSandboxStatsFilter{Id: blue.id, LabelSelector: ours("red")}, nil},
		"unknown ID":       {&cri.PodSandboxStatsFilter{Id: unknownID}, nil},
	} {
		resp, err := d.Runtime().ListPodSandboxStats(t.Context(), &cri.ListPodSandboxStatsRequest{Filter: c.filter})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		wantPods(t, name, resp.Stats, c.want...)
	}
	resp, err := d.Runtime().ListPodSandboxStats(t.Context(), &cri.ListPodSandboxStatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []pod{red, blue} {
		if !slices.ContainsFunc(resp.Stats, func(s *cri.PodSandboxStats) bool { return s.Attributes.Id == p.id }) {
			t.Errorf("without a filter there is no %s", p.config.Metadata.Name)
		}
	}
}

func TestRPC_26_StreamPodSandboxStats(t *testing.T) {
	t.Parallel()
	d := shared(t)
	red, blue := measuredPods(t, d, "rpc26")
	stream, err := d.Runtime().StreamPodSandboxStats(t.Context(), &cri.StreamPodSandboxStatsRequest{
		Filter: &cri.PodSandboxStatsFilter{LabelSelector: map[string]string{"measured": "rpc26"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	wantPods(t, "stream", drain(t, stream.Recv, (*cri.StreamPodSandboxStatsResponse).GetPodSandboxStats), red, blue)
}

// TestSTA_02_UsageNanoCores: a container that may use a fifth of a core and takes
// it is said to, and one that sleeps uses next to nothing.
func TestSTA_02_UsageNanoCores(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.script("busy", "while :; do :; done")
	c.Linux.Resources = &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 20000, CpuShares: 1024}
	busy, idle := b.run(c), b.run(b.sleeper("idle"))
	rate := func(id string) (uint64, bool) {
		r := b.stats(id).Cpu.GetUsageNanoCores()
		return r.GetValue(), r != nil
	}
	rate(busy)
	eventually(t, ample, func() error {
		// Less than its share, when the machine is busy; a little more, as the
		// kernel gives it in slices.
		if r, ok := rate(busy); !ok || r < 0.02e9 || r > 0.3e9 {
			return fmt.Errorf("a fifth of a core reads as %d nanocores (told: %t)", r, ok)
		}
		if r, ok := rate(idle); !ok || r > 0.02e9 {
			return fmt.Errorf("a sleeping container reads as %d nanocores (told: %t)", r, ok)
		}
		return nil
	})
	p := podStats(t, b.Daemon, b.pod).Linux
	if at := time.Unix(0, p.Cpu.GetTimestamp()); time.Since(at) > time.Minute {
		t.Errorf("the pod was measured at %v", at)
	}
}

// stalled is the total, in µs, of a line of a pressure file of a cgroup of the
// unified tree, which is mounted beside others on a hybrid machine.
func stalled(t *testing.T, group, file, line string) uint64 {
	t.Helper()
	root := "/sys/fs/cgroup"
	if versionOne("memory") {
		root += "/unified"
	}
	text, err := os.ReadFile(filepath.Join(root, group, file))
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(text)) {
		f := strings.Fields(l)
		if f[0] != line {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimPrefix(f[len(f)-1], "total="), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	t.Fatalf("%s has no line %s:\n%s", file, line, text)
	return 0
}

// unified reports whether a process is in the group of version 2 as well, which on hybrid
// machines is the runtime's choice, and which alone has pressure.
func unified(t *testing.T, pid int, group string) bool {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(text), "\n0::"+group+"\n") || strings.HasPrefix(string(text), "0::"+group+"\n")
}

// TestSTA_06_PSI: what stalls a container and its pod is told, on hybrid machines
// too; in a limit of a twentieth of a core a busy loop stalls.
func TestSTA_06_PSI(t *testing.T) {
	t.Parallel()
	if !exists("/proc/pressure/cpu") {
		t.Skip("this kernel does not account pressure")
	}
	d := shared(t)
	p := runPod(d, "pressed", inPodGroup(d, "sta06"))
	config := daemon.ContainerConfig("busy", plain(t, d), "sh", "-c", "while :; do :; done")
	config.Linux.Resources = &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 5000}
	ctr := p.run(d, config)
	pid := pidOf(t, d, ctr)
	group := cgroupPath(t, pid, "memory")
	if !unified(t, pid, group) {
		s, err := d.Runtime().ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: ctr})
		if err != nil || s.Stats.Cpu.GetPsi() != nil || s.Stats.Memory.GetPsi() != nil || s.Stats.Io.GetPsi() != nil {
			t.Errorf("where the kernel knows no pressure the statistics are %v, %v", s, err)
		}
		t.Skip("the runtime put the container into no group of the hierarchy that has pressure")
	}
	eventually(t, ample, func() error {
		if stalled(t, group, "cpu.pressure", "some") == 0 {
			return fmt.Errorf("the kernel has seen no stall in %s", group)
		}
		return nil
	})
	check := func(what, group string, read func() (cpu, memory, disk *cri.PsiStats)) {
		t.Helper()
		low := stalled(t, group, "cpu.pressure", "some")
		cpu, memory, disk := read()
		high := stalled(t, group, "cpu.pressure", "some")
		// CRI has nanoseconds, the kernel microseconds.
		if got := cpu.GetSome().GetTotal() / 1000; cpu == nil || got < low || got > high {
			t.Errorf("%s: CPU pressure is %v; the kernel says %d µs and then %d µs", what, cpu, low, high)
		}
		for resource, psi := range map[string]*cri.PsiStats{"memory": memory, "io": disk} {
			if psi.GetSome() == nil || psi.GetFull() == nil || psi.GetSome().GetTotal()/1000 > stalled(t, group, resource+".pressure", "some") {
				t.Errorf("%s: %s pressure is %v", what, resource, psi)
			}
		}
	}
	check("container", group, func() (_, _, _ *cri.PsiStats) {
		resp, err := d.Runtime().ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: ctr})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Stats.Cpu.GetPsi(), resp.Stats.Memory.GetPsi(), resp.Stats.Io.GetPsi()
	})
	check("pod", filepath.Dir(group), func() (_, _, _ *cri.PsiStats) {
		s := podStats(t, d, p.id).Linux
		return s.Cpu.GetPsi(), s.Memory.GetPsi(), s.Io.GetPsi()
	})
}

// TestSTA_09_PodIO: the pressure of reading and writing, of the pod as a whole.
func TestSTA_09_PodIO(t *testing.T) {
	t.Parallel()
	if !exists("/proc/pressure/io") {
		t.Skip("this kernel does not account pressure")
	}
	d := shared(t)
	p := runPod(d, "writes", inPodGroup(d, "sta09"))
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	pid := pidOf(t, d, ctr)
	group := filepath.Dir(cgroupPath(t, pid, "memory"))
	if !unified(t, pid, cgroupPath(t, pid, "memory")) {
		if s := podStats(t, d, p.id).Linux.Io; s.GetPsi() != nil {
			t.Errorf("where the kernel knows no pressure the statistics are %v", s)
		}
		t.Skip("the runtime put the container into no group of the hierarchy that has pressure")
	}
	eventually(t, ample, func() error {
		sh(d, ctr, "for i in 1 2 3 4 5; do dd if=/dev/zero of=/big bs=64k count=16 conv=fsync 2>/dev/null; done")
		if stalled(t, group, "io.pressure", "some") == 0 {
			return fmt.Errorf("nothing waited for the disk in %s", group)
		}
		return nil
	})
	low := stalled(t, group, "io.pressure", "some")
	usage := podStats(t, d, p.id).Linux.Io
	high := stalled(t, group, "io.pressure", "some")
	if got := usage.GetPsi().GetSome().GetTotal() / 1000; got < low || got > high || usage.GetTimestamp() == 0 {
		t.Errorf("pressure is %v; the kernel says %d µs and then %d µs", usage, low, high)
	}
}

// TestSTA_07_PodNetwork: what the pod's interfaces carried, as the kernel counts.
func TestSTA_07_PodNetwork(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "talks")
	server := p.serve(t, d, 8080)
	const size = 4 << 20
	sh(d, server, fmt.Sprintf("head -c %d /dev/zero >/www/big", size))
	address := address(ipOf(t, d, p), 8080)
	browsed(t, address)
	resp, err := browser.Get("http://" + address + "/big")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if n, err := io.Copy(io.Discard, resp.Body); err != nil || n != size {
		t.Fatalf("%d bytes came: %v", n, err)
	}
	err = inNetns(pinOf(t, d, p.id), func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "more0"}, PeerName: "more1"})
	})
	if err != nil {
		t.Fatal(err)
	}
	count := func() *netlink.LinkStatistics {
		var l netlink.Link
		err := inNetns(pinOf(t, d, p.id), func() (err error) { l, err = netlink.LinkByName("eth0"); return err })
		if err != nil {
			t.Fatal(err)
		}
		return l.Attrs().Statistics
	}
	low := count()
	n := podStats(t, d, p.id).Linux.Network
	high := count()
	e := n.GetDefaultInterface()
	if e.GetName() != "eth0" || n.GetTimestamp() == 0 {
		t.Errorf("the network is %v", n)
	}
	for what, c := range map[string]struct{ got, low, high uint64 }{
		"sent":      {e.GetTxBytes().GetValue(), max(low.TxBytes, size), high.TxBytes},
		"received":  {e.GetRxBytes().GetValue(), max(low.RxBytes, 1), high.RxBytes},
		"tx errors": {e.GetTxErrors().GetValue(), low.TxErrors, high.TxErrors},
		"rx errors": {e.GetRxErrors().GetValue(), low.RxErrors, high.RxErrors},
	} {
		if c.got < c.low || c.got > c.high {
			t.Errorf("%s: %d, want %d to %d", what, c.got, c.low, c.high)
		}
	}
	var others []string
	for _, i := range n.GetInterfaces() {
		others = append(others, i.Name)
	}
	if slices.Sort(others); !slices.Equal(others, []string{"more0", "more1"}) {
		t.Errorf("further interfaces are %q", others)
	}
	if n := podStats(t, d, runPod(d, "on-host", hostNetwork).id).Linux.Network; n != nil {
		t.Errorf("a pod on the host's network has counters of its own: %v", n)
	}
}

// TestSTA_08_ProcessCount: all processes of the pod, those in the sandbox and in
// cgroups that a container made included.
func TestSTA_08_ProcessCount(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPaused(d, "crowded", inPodGroup(d, "sta08"))
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	counted := func(want uint64) {
		t.Helper()
		eventually(t, soon, func() error {
			if got := podStats(t, d, p.id).Linux.Process.GetProcessCount().GetValue(); got != want {
				return fmt.Errorf("%d processes, want %d", got, want)
			}
			return nil
		})
	}
	// The sandbox, and the container's shell, which starts what it waits for.
	const before, sleepers = 3, 20
	counted(before)
	sh(d, ctr, fmt.Sprintf("for i in $(seq %d); do sleep 10000 >/dev/null 2>&1 </dev/null & done", sleepers))
	counted(before + sleepers)
}
