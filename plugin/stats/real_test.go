package stats

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/record"
)

func (c *cgroup) container(s *Stats) *cri.ContainerStats {
	c.Helper()
	got, err := s.Container(c.Context(), newContainer(record.ContainerRunning, c.path))
	c.must(err)
	return got
}

// cpuTime is the CPU time by the kernel's own file.
func (c *cgroup) cpuTime() uint64 {
	c.Helper()
	b := newBooks(c.host.Cgroup)
	if !b.v2 {
		return c.number(b.cpu, "cpuacct.usage")
	}
	r, err := b.read(c.path)
	c.must(err)
	return r.cpu.n
}

func TestRealCPU(t *testing.T) {
	c := newCgroup(t)
	s := New(c.host, fixed, time.Minute)
	c.done(c.start("burn"))
	// The kernel brings a running process's time up to date now and then.
	eventually(t, "CPU time passes", func() bool { return c.container(s).Cpu.UsageCoreNanoSeconds.Value > 50e6 })
	before := c.cpuTime()
	first := c.container(s).Cpu
	after := c.cpuTime()
	if n := first.UsageCoreNanoSeconds.Value; n < before || n > after {
		t.Errorf("%d ns between %d and %d", n, before, after)
	}
	var last *cri.CpuUsage
	eventually(t, "there is a rate", func() bool {
		last = c.container(s).Cpu
		return last.UsageNanoCores != nil
	})
	// The base is one of the first readings, at most moments before first.
	got := float64(last.UsageNanoCores.Value) / 1e9
	want := float64(last.UsageCoreNanoSeconds.Value-first.UsageCoreNanoSeconds.Value) / float64(last.Timestamp-first.Timestamp)
	if got <= 0 || math.Abs(got-want) > 0.25 {
		t.Errorf("%.3f cores, want about %.3f", got, want)
	}
}

func TestRealMemory(t *testing.T) {
	c := newCgroup(t)
	const limit, size = 512 << 20, 64 << 20
	c.limitMemory(fmt.Sprint(limit))
	s := New(c.host, fixed, time.Minute)
	before := c.container(s).Memory
	c.done(c.start("allocate:64"))
	m := c.container(s).Memory
	if grown := m.RssBytes.Value - before.RssBytes.Value; grown < size || grown > size+size/2 {
		t.Errorf("rss grew by %d", grown)
	}
	if m.UsageBytes.Value < m.WorkingSetBytes.Value || m.WorkingSetBytes.Value < m.RssBytes.Value*9/10 {
		t.Errorf("usage %d, working set %d, rss %d", m.UsageBytes.Value, m.WorkingSetBytes.Value, m.RssBytes.Value)
	}
	if m.AvailableBytes.Value != limit-m.WorkingSetBytes.Value {
		t.Errorf("%d of %d are available with a working set of %d", m.AvailableBytes.Value, limit, m.WorkingSetBytes.Value)
	}
	if m.PageFaults.Value-before.PageFaults.Value < uint64(size/os.Getpagesize()) || m.MajorPageFaults == nil {
		t.Errorf("page faults: %v, before %v", m, before)
	}
	if swap := c.container(s).Swap; c.host.Cgroup.SwapAccounting && (swap.GetSwapUsageBytes() == nil || swap.GetSwapAvailableBytes().GetValue() != 0) {
		t.Errorf("swap: %v", swap)
	}
}

func TestRealPressure(t *testing.T) {
	c := newCgroup(t)
	if _, err := os.Stat(c.host.Cgroup.Unified + c.path + "/cpu.pressure"); err != nil {
		s := New(c.host, fixed, time.Minute)
		if got := c.container(s); got.Cpu.Psi != nil || got.Memory.Psi != nil || got.Io != nil {
			t.Errorf("the kernel has no such books: %v", got)
		}
		return
	}
	s := New(c.host, fixed, time.Minute)
	c.done(c.start("burn:0"))
	c.done(c.start("burn:0"))
	eventually(t, "two processes wait for one CPU", func() bool { return c.container(s).Cpu.Psi.Some.Total > 1e6 })
	if got := c.container(s); got.Memory.Psi == nil || got.Io.Psi == nil || got.Io.Timestamp <= 0 {
		t.Errorf("%v", got)
	}
}

func TestRealOOM(t *testing.T) {
	for name, what := range map[string]string{"first process": "allocate:256", "child": "parent:256"} {
		t.Run(name, func(t *testing.T) {
			c := newCgroup(t)
			c.limitMemory("67108864")
			s := New(c.host, fixed, time.Minute)
			rec := newContainer(record.ContainerRunning, c.path)
			if killed, err := s.OOMKilled(rec); killed || err != nil {
				t.Fatalf("before: %v, %v", killed, err)
			}
			p := c.start(what)
			if name == "child" {
				c.done(p)
			} else if err := p.Wait(); err == nil {
				t.Fatal("the process was not killed")
			}
			if killed, err := s.OOMKilled(rec); !killed || err != nil {
				t.Errorf("after: %v, %v", killed, err)
			}
		})
	}
}

// A process that is killed by a signal did not run out of memory, and a cgroup
// that is gone tells nothing.
func TestRealNoOOM(t *testing.T) {
	c := newCgroup(t)
	c.limitMemory("536870912")
	s := New(c.host, fixed, time.Minute)
	rec := newContainer(record.ContainerRunning, c.path)
	p := c.start("allocate:16")
	c.done(p)
	c.must(p.Process.Kill())
	p.Wait()
	if killed, err := s.OOMKilled(rec); killed || err != nil {
		t.Errorf("killed by a signal: %v, %v", killed, err)
	}
	c.remove()
	if killed, err := s.OOMKilled(rec); killed || err != nil {
		t.Errorf("cgroup gone: %v, %v", killed, err)
	}
	if got := c.container(s); got.Cpu != nil || got.Memory != nil || got.WritableLayer == nil {
		t.Errorf("cgroup gone: %v", got)
	}
}

func TestRealPod(t *testing.T) {
	pod := newCgroup(t)
	var containers []record.Container
	for i := range 3 {
		c := &cgroup{T: t, host: pod.host, path: fmt.Sprintf("%s/c%d", pod.path, i)}
		for _, dir := range c.mounts() {
			c.must(os.Mkdir(dir+c.path, 0o755))
		}
		t.Cleanup(c.remove)
		c.done(c.start("allocate:8"))
		rec := newContainer(record.ContainerRunning, c.path)
		rec.ID = fmt.Sprint("c", i)
		containers = append(containers, rec)
	}
	sb := record.Sandbox{ID: "pod", Config: &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{CgroupParent: pod.path}}}
	for name, parent := range map[string]string{"cgroup": pod.path, "sum": ""} {
		sb.Config.Linux.CgroupParent = parent
		s := New(pod.host, fixed, time.Minute)
		got, err := s.Sandbox(t.Context(), sb, containers)
		pod.must(err)
		var cpu, rss uint64
		for _, c := range got.Linux.Containers {
			cpu, rss = cpu+c.Cpu.UsageCoreNanoSeconds.Value, rss+c.Memory.RssBytes.Value
		}
		l := got.Linux
		if len(l.Containers) != 3 || l.Process.GetProcessCount().GetValue() != 3 || l.Network != nil {
			t.Errorf("%s: %v", name, got)
		}
		if l.Cpu.GetUsageCoreNanoSeconds().GetValue() < cpu || l.Memory.GetRssBytes().GetValue() < rss*9/10 || l.Memory.RssBytes.Value < 24<<20 {
			t.Errorf("%s: pod %v %v, containers %d ns, %d bytes", name, l.Cpu, l.Memory, cpu, rss)
		}
		if wantPSI := parent != "" && pod.host.Cgroup.Unified != ""; (l.Io != nil) != wantPSI {
			t.Errorf("%s: io %v", name, l.Io)
		}
	}
}

// inNetns runs f in a new network namespace that is mounted on the returned file.
func inNetns(t *testing.T, f func() error) string {
	t.Helper()
	file := t.TempDir() + "/ns"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", file, "", unix.MS_BIND, "")
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	err := <-done
	t.Cleanup(func() { unix.Unmount(file, unix.MNT_DETACH) })
	if err != nil {
		t.Fatal(err)
	}
	return file
}

func TestRealNetwork(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	const frames, size = 10, 1000
	file := inNetns(t, func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: defaultInterface}, PeerName: "net1"}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		for _, name := range []string{"lo", "net1", defaultInterface} {
			l, err := netlink.LinkByName(name)
			if err == nil {
				err = netlink.LinkSetUp(l)
			}
			if err != nil {
				return fmt.Errorf("set %s up: %w", name, err)
			}
			veth.Index = l.Attrs().Index
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for range frames {
			if err := unix.Sendto(fd, make([]byte, size), 0, &unix.SockaddrLinklayer{Ifindex: veth.Index}); err != nil {
				return fmt.Errorf("send: %w", err)
			}
		}
		return nil
	})
	s := New(facts.Host{}, fixed, time.Minute)
	sb := record.Sandbox{ID: "pod", Config: &cri.PodSandboxConfig{}, Network: record.Network{NetNS: file}}
	var n *cri.NetworkUsage
	eventually(t, "the frames are counted", func() bool {
		got, err := s.Sandbox(t.Context(), sb, nil)
		if err != nil {
			t.Fatal(err)
		}
		n = got.Linux.Network
		return n.GetDefaultInterface().GetTxBytes().GetValue() >= frames*size && n.Interfaces[0].GetRxBytes().GetValue() >= frames*size
	})
	if n.DefaultInterface.Name != defaultInterface || len(n.Interfaces) != 1 || n.Interfaces[0].Name != "net1" || n.Timestamp <= 0 {
		t.Errorf("%v", n)
	}
	// The kernel sends a little of its own.
	if tx := n.DefaultInterface.TxBytes.Value; tx > 2*frames*size || n.DefaultInterface.TxErrors.GetValue() != 0 {
		t.Errorf("sent %v", n.DefaultInterface)
	}
	if err := unix.Unmount(file, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	for _, state := range []string{"unmounted", "removed"} {
		if got, err := s.Sandbox(t.Context(), sb, nil); err != nil || got.Linux.Network != nil {
			t.Errorf("%s: %v, %v", state, got, err)
		}
		os.Remove(file)
	}
}

// BenchmarkContainerStats compares with the library that other runtimes use,
// asked for no more than it must to answer the same, the cgroup loaded once.
func BenchmarkContainerStats(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	host, name := thisHost(b), "/gantry-test-stats-bench"
	bk := newBooks(host.Cgroup)
	for _, mount := range []string{bk.cpu, bk.memory, bk.unified} {
		if mount == "" {
			continue
		}
		if err := os.MkdirAll(mount+name, 0o755); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { unix.Rmdir(mount + name) })
	}
	b.Run("stats", func(b *testing.B) {
		s := New(host, fixed, time.Minute)
		c := newContainer(record.ContainerRunning, name)
		b.ReportAllocs()
		for b.Loop() {
			if got, err := s.Container(b.Context(), c); err != nil || got.Cpu == nil {
				b.Fatal(got, err)
			}
		}
	})
	b.Run("library", func(b *testing.B) {
		stat, err := library(host, name)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportAllocs()
		for b.Loop() {
			if err := stat(); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func library(host facts.Host, name string) (func() error, error) {
	if host.Cgroup.V2() {
		m, err := cgroup2.Load(name)
		return func() error {
			_, err := m.StatFiltered(cgroup2.StatCPU | cgroup2.StatMemory | cgroup2.StatIO)
			return err
		}, err
	}
	cg, err := cgroup1.Load(cgroup1.StaticPath(name), cgroup1.WithHierarchy(func() ([]cgroup1.Subsystem, error) {
		return []cgroup1.Subsystem{cgroup1.NewCpuacct(root), cgroup1.NewMemory(root)}, nil
	}))
	return func() error {
		_, err := cg.Stat(cgroup1.IgnoreNotExist)
		return err
	}, err
}
