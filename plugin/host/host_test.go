package host

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

func TestProbeThisMachine(t *testing.T) {
	h, err := Probe()
	if err != nil {
		t.Fatal(err)
	}
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	if h.Hostname != name || h.MemoryTotal == 0 || h.Kernel.Major < 4 || len(h.PossibleCPUs) == 0 || h.PageSize != os.Getpagesize() {
		t.Errorf("got %+v", h)
	}
	for controller, dir := range h.Cgroup.Controllers {
		if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
			t.Errorf("controller %s: %v", controller, err)
		}
	}
	// The probe must agree with what the kernel lets us do.
	score, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 && h.OOMScoreAdj > -1000 {
		err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
		if (err == nil) != h.LowerOOMScore {
			t.Errorf("LowerOOMScore is %v, lowering gave %v", h.LowerOOMScore, err)
		}
		if err := os.WriteFile("/proc/self/oom_score_adj", score, 0); err != nil {
			t.Error(err)
		}
	}
}

const (
	statusFile = "Name:\tx\nCapInh:\t0000000000000000\nCapPrm:\t000001fffeffffff\nCapEff:\t000001fffeffffff\nCapBnd:\t000001fffeffffff\nCapAmb:\t0000000000000000\nNoNewPrivs:\t0\nSeccomp:\t0\n"

	hybridMounts = `23 27 0:22 / /sys rw,relatime - sysfs sysfs rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
90 31 0:39 / /run/pod/cgroup/hugetlb rw,relatime - cgroup cgroup rw,hugetlb
`
	hybridSelf = "5:name=systemd:/\n4:memory:/process_api/x:y\n3:cpu,cpuacct:/\n2:hugetlb:/\n0::/\nbroken\n"
	v1Mounts   = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
	v2Mounts   = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
	v2Self     = "0::/system.slice/containerd.service\n"
)

// newMachine writes a small fake machine.
func newMachine(t *testing.T, files map[string]string) prober {
	t.Helper()
	all := map[string]string{
		"proc/sys/kernel/hostname":        "node-1\n",
		"proc/sys/kernel/osrelease":       "6.18.44-fc\n",
		"sys/devices/system/cpu/possible": "0-3\n",
		"proc/self/status":                statusFile,
		"proc/self/uid_map":               "         0          0 4294967295\n",
		"proc/self/oom_score_adj":         "-500\n",
		"proc/meminfo":                    "MemTotal:       24576 kB\nMemFree: 1 kB\n",
		"proc/self/mountinfo":             hybridMounts,
		"proc/self/cgroup":                hybridSelf,
	}
	for name, content := range files {
		all[name] = content
	}
	root := t.TempDir()
	for name, content := range all {
		p := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return prober{root}
}

func TestProbeHybrid(t *testing.T) {
	h, err := newMachine(t, map[string]string{
		"sys/fs/cgroup/memory/memory.memsw.limit_in_bytes": "0",
		"sys/kernel/mm/hugepages/hugepages-1048576kB/nr":   "0",
		"sys/kernel/mm/hugepages/hugepages-2048kB/nr":      "0",
		"sys/module/apparmor/parameters/enabled":           "Y\n",
		"sys/kernel/security/apparmor/profiles":            "",
		"usr/sbin/apparmor_parser":                         "",
		"proc/sys/net/ipv4/ping_group_range":               "1 0",
	}).probe()
	if err != nil {
		t.Fatal(err)
	}
	if h.Hostname != "node-1" || h.Kernel != (facts.Kernel{Major: 6, Minor: 18}) || !slices.Equal(h.PossibleCPUs, []int{0, 1, 2, 3}) || h.MemoryTotal != 24<<20 {
		t.Errorf("machine: %+v", h)
	}
	if h.HasCapability("CAP_SYS_RESOURCE") || !h.HasCapability("CAP_SYS_ADMIN") || len(h.Capabilities) != 40 || h.LowerOOMScore || h.OOMScoreAdj != -500 {
		t.Errorf("process: %+v", h)
	}
	want := facts.Cgroup{
		Mode: facts.CgroupHybrid,
		Controllers: map[string]string{
			"cpu": "/sys/fs/cgroup/cpu,cpuacct", "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
			"memory": "/sys/fs/cgroup/memory",
		},
		Self:    map[string]string{"": "/", "name=systemd": "/", "memory": "/process_api/x:y", "cpu": "/", "cpuacct": "/", "hugetlb": "/"},
		Unified: "/sys/fs/cgroup/unified", UnifiedOptions: []string{"nsdelegate"}, Systemd: "/sys/fs/cgroup/systemd", SwapAccounting: true,
	}
	if !reflect.DeepEqual(h.Cgroup, want) {
		t.Errorf("cgroup:\n got %+v\nwant %+v", h.Cgroup, want)
	}
	if !h.Seccomp || !h.AppArmor || h.SELinux || h.UserNS || !h.UnprivilegedICMP || h.UnprivilegedPorts || !slices.Equal(h.HugepageSizes, []string{"2MB", "1GB"}) {
		t.Errorf("features: %+v", h)
	}
}

func TestProbeOtherModes(t *testing.T) {
	v1, err := newMachine(t, map[string]string{"proc/self/mountinfo": v1Mounts, "proc/self/uid_map": "0 100000 65536\n"}).probe()
	if err != nil || v1.Cgroup.Mode != facts.CgroupV1 || v1.Cgroup.SwapAccounting || !v1.UserNS {
		t.Errorf("v1: %+v, %v", v1, err)
	}
	v2files := map[string]string{
		"proc/self/mountinfo": v2Mounts, "proc/self/cgroup": v2Self,
		"sys/fs/cgroup/cgroup.controllers":                                 "cpuset cpu io memory hugetlb pids\n",
		"sys/fs/cgroup/system.slice/containerd.service/cgroup.controllers": "memory pids\n",
		"sys/fs/cgroup/system.slice/containerd.service/memory.swap.max":    "max",
		"proc/self/status": strings.ReplaceAll(statusFile, "000001fffeffffff", "000001ffffffffff"),
	}
	v2, err := newMachine(t, v2files).probe()
	if err != nil || !v2.Cgroup.V2() || !v2.Cgroup.SwapAccounting || !v2.Cgroup.Has("hugetlb") || v2.Cgroup.Has("devices") || !v2.LowerOOMScore {
		t.Errorf("v2: %+v, %v", v2, err)
	}
	if want := []string{"nsdelegate", "memory_recursiveprot"}; !slices.Equal(v2.Cgroup.UnifiedOptions, want) {
		t.Errorf("v2 options %v, want %v", v2.Cgroup.UnifiedOptions, want)
	}
	// In the root cgroup the file is only below.
	root, err := newMachine(t, map[string]string{
		"proc/self/mountinfo": v2Mounts, "proc/self/cgroup": "0::/\n",
		"sys/fs/cgroup/cgroup.controllers": "memory", "sys/fs/cgroup/init/memory.swap.max": "max",
	}).probe()
	if err != nil || !root.Cgroup.SwapAccounting {
		t.Errorf("v2 root: %+v, %v", root, err)
	}
}

func TestProbeErrors(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"no cgroups":   {"proc/self/mountinfo": "23 27 0:22 / /sys rw,relatime - sysfs sysfs rw\n"},
		"mountinfo":    {"proc/self/mountinfo": "x\n"},
		"kernel":       {"proc/sys/kernel/osrelease": "linux\n"},
		"memory":       {"proc/meminfo": "MemFree: 1 kB\n"},
		"score":        {"proc/self/oom_score_adj": "low\n"},
		"capabilities": {"proc/self/status": "CapBnd:\tzz\n"},
		"CPUs":         {"sys/devices/system/cpu/possible": "3-1\n"},
		"controllers":  {"proc/self/mountinfo": v2Mounts, "proc/self/cgroup": v2Self},
	} {
		if h, err := newMachine(t, files).probe(); err == nil {
			t.Errorf("%s: no error, %+v", name, h)
		}
	}
	if _, err := (prober{t.TempDir()}).probe(); !errdefs.IsUnavailable(err) {
		t.Errorf("empty machine: %v, want Unavailable", err)
	}
}

func TestPageSizeName(t *testing.T) {
	for kib, want := range map[uint64]string{4: "4KB", 64: "64KB", 2048: "2MB", 32768: "32MB", 1 << 20: "1GB", 16 << 20: "16GB", 3 << 30: "3072GB"} {
		if got := pageSizeName(kib); got != want {
			t.Errorf("%d: got %s, want %s", kib, got, want)
		}
	}
}

func TestResolveMounts(t *testing.T) {
	dir := t.TempDir()
	if resolved, err := filepath.EvalSymlinks(dir); err != nil || resolved != dir {
		t.Fatalf("%s: %v", resolved, err)
	}
	file := filepath.Join(dir, "file")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Symlink("file", filepath.Join(dir, "link")),
		os.Symlink("link", filepath.Join(dir, "link2")), os.Symlink("nowhere", filepath.Join(dir, "dangling"))); err != nil {
		t.Fatal(err)
	}
	got, err := ResolveMounts([]*cri.Mount{
		{HostPath: file, ContainerPath: "/f", Readonly: true, RecursiveReadOnly: true, MountOptions: []string{"nodev"}},
		{HostPath: filepath.Join(dir, "link2"), ContainerPath: "/l//x/../y"},
		{HostPath: filepath.Join(dir, "new/deep"), ContainerPath: "/n"},
		{Image: &cri.ImageSpec{Image: "x"}, ContainerPath: "/image/"},
	}, map[int]string{3: "/state/volumes/1/3"}, MountRules{})
	want := []facts.Mount{
		{Source: file, Destination: "/f", Readonly: true, RecursiveReadonly: true, Options: []string{"nodev"}},
		{Source: file, Destination: "/l/y"},
		{Source: filepath.Join(dir, "new/deep"), Destination: "/n"},
		{Source: "/state/volumes/1/3", Destination: "/image", Readonly: true, Options: []string{"nosuid", "nodev", "noexec"}},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
	if fi, err := os.Stat(filepath.Join(dir, "new/deep")); err != nil || !fi.IsDir() {
		t.Errorf("missing path: %v", err)
	}
	for name, tc := range map[string]struct {
		m    *cri.Mount
		want error
	}{
		"relative": {&cri.Mount{HostPath: "a"}, errdefs.ErrInvalidArgument},
		"empty":    {&cri.Mount{}, errdefs.ErrInvalidArgument},
		"image":    {&cri.Mount{Image: &cri.ImageSpec{Image: "x"}}, errdefs.ErrInvalidArgument}, // nobody mounted it
		"dangling": {&cri.Mount{HostPath: filepath.Join(dir, "dangling")}, errdefs.ErrFailedPrecondition},
		"in file":  {&cri.Mount{HostPath: filepath.Join(file, "x")}, errdefs.ErrFailedPrecondition},
	} {
		if got, err := ResolveMounts([]*cri.Mount{tc.m}, nil, MountRules{}); !errors.Is(err, tc.want) {
			t.Errorf("%s: got %+v, %v, want %v", name, got, err, tc.want)
		}
	}
}

// TestMountRulesPropagation: what has a part of the store in it lets unmounts
// pass.
func TestMountRulesPropagation(t *testing.T) {
	const private, slave, shared = cri.MountPropagation_PROPAGATION_PRIVATE, cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, cri.MountPropagation_PROPAGATION_BIDIRECTIONAL
	rules := MountRules{Store: []string{"/var/lib/store", "/run/store"}}
	for source, want := range map[string]cri.MountPropagation{
		"/": slave, "/var": slave, "/var/lib/store": slave, "/run/store": slave, "/run/store/task": slave,
		"/var/lib/stores": private, "/var/lib/st": private, "/etc": private, "/running": private,
	} {
		if got := rules.propagation(&cri.Mount{}, source); got != want {
			t.Errorf("%s: %s, want %s", source, got, want)
		}
		if got := rules.propagation(&cri.Mount{Propagation: shared}, source); got != shared {
			t.Errorf("%s: shared becomes %s", source, got)
		}
		if got := rules.propagation(&cri.Mount{Readonly: true, RecursiveReadOnly: true}, source); got != private {
			t.Errorf("%s: recursively read-only becomes %s", source, got)
		}
	}
}

func TestResolveMountsChecksPeerGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	const slave, shared = cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, cri.MountPropagation_PROPAGATION_BIDIRECTIONAL
	for _, step := range []struct {
		flag            uintptr
		slaveOK, bothOK bool
	}{
		{unix.MS_PRIVATE, false, false},
		{unix.MS_SHARED, true, true},
	} {
		if err := unix.Mount("", dir, "", step.flag, ""); err != nil {
			t.Fatal(err)
		}
		for p, ok := range map[cri.MountPropagation]bool{slave: step.slaveOK, shared: step.bothOK} {
			_, err := ResolveMounts([]*cri.Mount{{HostPath: filepath.Join(dir, "sub"), ContainerPath: "/x", Propagation: p}}, nil, MountRules{})
			if (err == nil) != ok || err != nil && !errdefs.IsFailedPrecondition(err) {
				t.Errorf("flag %#x, %s: %v", step.flag, p, err)
			}
		}
	}
}

func TestCheckPropagation(t *testing.T) {
	infos := []*mountinfo.Info{
		{Mountpoint: "/", Optional: "shared:1"},
		{Mountpoint: "/a", Optional: ""},
		{Mountpoint: "/a/b", Optional: "shared:2"},
		{Mountpoint: "/a/b", Optional: "master:3"},
		{Mountpoint: "/ab", Optional: "shared:4 master:5"},
	}
	const slave, shared = cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, cri.MountPropagation_PROPAGATION_BIDIRECTIONAL
	for p, want := range map[string][2]bool{"/x": {true, true}, "/a/x": {false, false}, "/a/b/c": {true, false}, "/ab": {true, true}, "/abc": {true, true}} {
		for i, mode := range []cri.MountPropagation{slave, shared} {
			if err := checkPropagation(p, mode, infos); (err == nil) != want[i] {
				t.Errorf("%s %s: %v", p, mode, err)
			}
		}
	}
	if err := checkPropagation("/x", slave, nil); !errdefs.IsInternal(err) {
		t.Errorf("no mounts: %v", err)
	}
}

// TestMountRules: what is to be rejected is not made, and below a prefix links
// stay below it.
func TestMountRules(t *testing.T) {
	root := t.TempDir()
	if err := errors.Join(os.MkdirAll(filepath.Join(root, "data"), 0o755), os.Symlink("/data", filepath.Join(root, "link")),
		os.Symlink("../../../../data/new", filepath.Join(root, "out"))); err != nil {
		t.Fatal(err)
	}
	rules := MountRules{Prefix: root, Reject: []string{"/absent", "/data"}}
	for path, want := range map[string]string{"/data": "data", "/data/": "data", "/link": "data", "/link/../data": "data", "/new/deep": "new/deep", "/out": "data/new"} {
		got, err := ResolveMounts([]*cri.Mount{{HostPath: path, ContainerPath: "/x"}}, nil, rules)
		if err != nil || got[0].Source != filepath.Join(root, want) {
			t.Errorf("%s: %+v, %v, want %s", path, got, err, want)
		}
	}
	for _, path := range []string{"/absent", "//absent/./"} {
		if _, err := ResolveMounts([]*cri.Mount{{HostPath: path, ContainerPath: "/x"}}, nil, rules); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "absent_mount_sources_to_reject") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := os.Stat(filepath.Join(root, "absent")); !os.IsNotExist(err) {
		t.Errorf("the rejected path was made: %v", err)
	}
}

func TestZoneFile(t *testing.T) {
	for name, want := range map[string]error{"No/Such": errdefs.ErrNotFound, "Europe": errdefs.ErrInvalidArgument} {
		if got, err := ZoneFile(name, false); err == nil || !errdefs.IsNotFound(err) && !errors.Is(err, want) {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
}

func TestResolveDevices(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make nodes")
	}
	dir := t.TempDir()
	if err := errors.Join(
		os.Mkdir(filepath.Join(dir, "sub"), 0o755),
		unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o640, int(unix.Mkdev(1, 3))),
		unix.Mknod(filepath.Join(dir, "sub/loop"), unix.S_IFBLK|0o600, int(unix.Mkdev(7, 9))),
		unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644),
		os.WriteFile(filepath.Join(dir, "file"), nil, 0o644),
		os.Symlink("null", filepath.Join(dir, "link")),
		os.Chmod(filepath.Join(dir, "null"), 0o640),
		os.Lchown(filepath.Join(dir, "null"), 3, 4),
	); err != nil {
		t.Fatal(err)
	}
	null := facts.Device{Path: "/dev/n", HostPath: filepath.Join(dir, "null"), Type: "c", Major: 1, Minor: 3, Mode: 0o640, UID: 3, GID: 4, Permissions: "r"}
	loop := facts.Device{Path: "/dev/all/sub/loop", HostPath: filepath.Join(dir, "sub", "loop"), Type: "b", Major: 7, Minor: 9, Mode: 0o600, Permissions: "rw"}
	got, err := ResolveDevices([]*cri.Device{
		{HostPath: filepath.Join(dir, "null"), ContainerPath: "/dev/n", Permissions: "r"},
		{HostPath: filepath.Join(dir, "link"), ContainerPath: "/dev/./n", Permissions: "r"},
		{HostPath: dir, ContainerPath: "/dev/all", Permissions: "rw"},
	})
	below := null
	below.Path, below.Permissions = "/dev/all/null", "rw"
	if want := []facts.Device{null, null, below, loop}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
	got, err = ResolveDevices([]*cri.Device{{HostPath: filepath.Join(dir, "link")}})
	if err != nil || len(got) != 1 || got[0].Path != filepath.Join(dir, "link") || got[0].Minor != 3 {
		t.Errorf("no container path: %+v, %v", got, err)
	}
	for name, want := range map[string]error{"fifo": errdefs.ErrInvalidArgument, "file": errdefs.ErrInvalidArgument, "absent": errdefs.ErrNotFound} {
		if got, err := ResolveDevices([]*cri.Device{{HostPath: filepath.Join(dir, name)}}); !errors.Is(err, want) {
			t.Errorf("%s: got %+v, %v, want %v", name, got, err, want)
		}
	}
	if _, err := ResolveDevices([]*cri.Device{{HostPath: "dev/null"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("relative: %v", err)
	}
}

func TestHostDevices(t *testing.T) {
	list, err := HostDevices()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, d := range list {
		seen[d.Path] = true
		for _, skip := range []string{"/dev/pts/", "/dev/shm/", "/dev/console", "/dev/fd", "/dev/ptmx"} {
			if strings.HasPrefix(d.Path, skip) {
				t.Errorf("%s is listed", d.Path)
			}
		}
	}
	if !seen["/dev/null"] {
		t.Errorf("/dev/null is not among %d devices", len(list))
	}
}

func TestReadProfile(t *testing.T) {
	dir := t.TempDir()
	good, big, fifo := filepath.Join(dir, "good"), filepath.Join(dir, "big"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.WriteFile(good, []byte("{}"), 0o600), os.WriteFile(big, nil, 0o600), os.Truncate(big, maxFile+1), unix.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	if b, err := ReadProfile(good); err != nil || string(b) != "{}" {
		t.Errorf("got %q, %v", b, err)
	}
	for name, want := range map[string]error{big: errdefs.ErrFailedPrecondition, fifo: errdefs.ErrFailedPrecondition, dir: errdefs.ErrFailedPrecondition, filepath.Join(dir, "absent"): errdefs.ErrNotFound} {
		if _, err := ReadProfile(name); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
}

func FuzzParseCgroup(f *testing.F) {
	f.Add([]byte(hybridMounts), []byte(hybridSelf))
	f.Add([]byte(v2Mounts), []byte(v2Self))
	f.Add([]byte(v1Mounts), []byte("::\n1:a"))
	f.Fuzz(func(t *testing.T, mounts, self []byte) {
		cg, err := parseCgroup(mounts, self)
		if err == nil && !cg.V2() && len(cg.Controllers) == 0 && cg.Unified == "" {
			t.Errorf("nothing found, no error: %+v", cg)
		}
	})
}

func FuzzParseProc(f *testing.F) {
	f.Add(statusFile, "0-3,8", "6.18.44", "MemTotal: 5 kB", "hugepages-2048kB")
	f.Add("CapBnd: zz", "3-1", "x", "MemTotal: x kB", "hugepages-kB")
	f.Add("", "0-65535,0-65535", "99999.1", "", "")
	f.Fuzz(func(t *testing.T, status, cpus, release, meminfo, pages string) {
		_, _ = parseStatus([]byte(status))
		_, _ = parseKernel(release)
		_, _ = parseMemTotal([]byte(meminfo))
		if list, err := parseCPUs(cpus); err == nil && (len(list) == 0 || len(list) > maxCPUs || !slices.IsSorted(list)) {
			t.Errorf("%q: %d CPUs", cpus, len(list))
		}
		if kib, ok := parseHugepages(pages); ok && pageSizeName(kib) == "" {
			t.Errorf("%q", pages)
		}
	})
}

// TestReadHooks: by name in lower case, the file of the last directory for each
// name.
func TestReadHooks(t *testing.T) {
	low, high := t.TempDir(), t.TempDir()
	for path, text := range map[string]string{
		filepath.Join(low, "B.json"): "b", filepath.Join(low, "a.json"): "a", filepath.Join(low, "c.json"): "low",
		filepath.Join(high, "c.json"): "high", filepath.Join(low, "d.txt"): "no hook",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	files, err := ReadHooks([]string{low, filepath.Join(low, "missing"), high})
	var got []string
	for _, f := range files {
		got = append(got, string(f.Content))
	}
	if err != nil || !slices.Equal(got, []string{"a", "b", "high"}) {
		t.Errorf("got %q, %v", got, err)
	}
	if err := unix.Mkfifo(filepath.Join(high, "e.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadHooks([]string{high}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "e.json") {
		t.Errorf("a pipe: %v", err)
	}
}
