package lifecycle

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// withPinned adds a handler whose pods our own shim runs, without a pause process.
func withPinned(in *daemon.Instance, c daemon.Config) {
	addHandler(in, c, "pinned", daemon.Config{"runtime_type": "io.containerd.gantry.v2", "sandboxer": "shim"})
}

func pinnedPod(d *daemon.Daemon, name string, edits ...func(*cri.PodSandboxConfig)) pod {
	return supervisedPod(d, "pinned", name, edits...)
}

// processesIn are the processes in a namespace.
func processesIn(t *testing.T, kind, ns string) (pids []int) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/ns/" + kind)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if got, err := os.Readlink(l); err != nil || got != ns {
			continue // it is another, or the process has ended
		}
		pid, err := strconv.Atoi(strings.Split(l, "/")[2])
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// pinnedAs is the namespace that our shim has pinned for a pod, "" for none.
func pinnedAs(t *testing.T, d *daemon.Daemon, id, kind string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(d.Dir, "s", "gantry-*.pods", id, kind))
	if err != nil || len(found) > 1 {
		t.Fatalf("pins of %s: %v, %v", id, found, err)
	}
	if len(found) == 0 {
		return ""
	}
	var s unix.Stat_t
	if err := unix.Stat(found[0], &s); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s:[%d]", kind, s.Ino)
}

// pidOfPod is the process in the verbose part of a pod's status, 0 for none.
func pidOfPod(t *testing.T, d *daemon.Daemon, id string) int {
	t.Helper()
	resp, err := d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	return pidFrom(t, resp)
}

// noSupervisor waits for the end of the supervisor, of which nothing is left.
func noSupervisor(t *testing.T, d *daemon.Daemon) {
	t.Helper()
	eventually(t, soon, func() error {
		if left := supervisors(t, d); len(left) > 0 {
			return fmt.Errorf("without pods there are supervisors %v", left)
		}
		return nil
	})
	for _, pattern := range []string{"s/gantry-*", "gantry-*.root"} {
		if left, err := filepath.Glob(filepath.Join(d.Dir, pattern)); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	}
}

// TestPOD_34_NoPauseProcess: a pod whose containers do not share their processes
// has none of its own, and everything that a pod has.
func TestPOD_34_NoPauseProcess(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(withPinned))
	before := readHost(t, "/proc/sys/kernel/hostname", "/proc/sys/kernel/shm_rmid_forced", "/proc/sys/net/core/somaxconn")
	p := pinnedPod(d, "pauseless", func(c *cri.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net/core/somaxconn": "777"}
	})
	supervisor := supervisors(t, d)[0]
	if pid := pidOfPod(t, d, p.id); pid != 0 {
		t.Errorf("the pod has process %d", pid)
	}
	if got := processesIn(t, "uts", pinnedAs(t, d, p.id, "uts")); len(got) > 0 {
		t.Errorf("before its containers there are processes %v in the pod", got)
	}
	podStats(t, d, p.id) // there is nothing to measure, which is no error
	one, two := p.run(d, daemon.ContainerConfig("one", plain(t, d))), p.run(d, daemon.ContainerConfig("two", plain(t, d)))
	for _, pid := range processesIn(t, "uts", nsOf(t, pidOf(t, d, one), "uts")) {
		if ns := nsOf(t, pid, "pid"); ns != nsOf(t, pidOf(t, d, one), "pid") && ns != nsOf(t, pidOf(t, d, two), "pid") {
			t.Errorf("process %d in the pod is no container's", pid)
		}
	}
	if got := childrenOf(t, supervisor); !slices.Equal(got, sorted(pidOf(t, d, one), pidOf(t, d, two))) {
		t.Errorf("the supervisor has children %v", got)
	}
	sh(d, one, "echo from-one > /dev/shm/f")
	ip := ipOf(t, d, p)
	for _, ctr := range []string{one, two} {
		if got := sh(d, ctr, "hostname; cat /dev/shm/f /proc/sys/kernel/shm_rmid_forced /proc/sys/net/core/somaxconn /proc/sys/net/ipv4/ip_unprivileged_port_start"); lines(got) != "pauseless\nfrom-one\n1\n777\n0" {
			t.Errorf("in %s: %q", ctr, got)
		}
		if got := sh(d, ctr, "ip -4 -o addr show eth0"); !strings.Contains(got, ip+"/") {
			t.Errorf("address %s: %q", ip, got)
		}
	}
	for _, kind := range []string{"net", "ipc", "uts"} {
		if a, b := nsOf(t, pidOf(t, d, one), kind), nsOf(t, pidOf(t, d, two), kind); a != b || a == nsOf(t, "self", kind) {
			t.Errorf("%s namespaces are %s and %s", kind, a, b)
		}
	}
	if after := readHost(t, "/proc/sys/kernel/hostname", "/proc/sys/kernel/shm_rmid_forced", "/proc/sys/net/core/somaxconn"); after != before {
		t.Errorf("the host had %q and has %q", before, after)
	}
	sh(d, one, spin)
	if s := podStats(t, d, p.id).Linux; s.Cpu.GetUsageCoreNanoSeconds().GetValue() == 0 || s.Network.GetDefaultInterface().GetName() != "eth0" {
		t.Errorf("the pod's stats are %v", s)
	}
	p.serve(t, d, 8080)
	browsed(t, address(ip, 8080))
	b := &box{Daemon: d, t: t, pod: p.id, config: p.config}
	if got, err := talk(b.forward(8080)[0], "GET / HTTP/1.0\r\n\r\n"); !strings.HasSuffix(got, "hello from the pod\n") || err != nil {
		t.Errorf("a forwarded port says %q, %v", got, err)
	}
	wholeLife(t, d, p)
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
	noSupervisor(t, d)
	nothingLeft(t, d)
}

func sorted(pids ...int) []int {
	slices.Sort(pids)
	return pids
}

func childrenOf(t *testing.T, pid int) (pids []int) {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lists {
		text, err := os.ReadFile(l)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range strings.Fields(string(text)) {
			n, err := strconv.Atoi(f)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, n)
		}
	}
	return sorted(pids...)
}

// TestPOD_34_HostNamespaces: what a pod shares with the host is not made, and its
// containers are in the host's.
func TestPOD_34_HostNamespaces(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(withPinned))
	const node = cri.NamespaceMode_NODE
	all := &cri.NamespaceOption{Network: node, Ipc: node, Pid: node}
	p := pinnedPod(d, "on-the-node", withNamespaces(all))
	pid := pidOf(t, d, p.run(d, inNamespaces(daemon.ContainerConfig("main", plain(t, d)), all)))
	for _, kind := range []string{"net", "uts", "ipc", "pid"} {
		if got := nsOf(t, pid, kind); got != nsOf(t, "self", kind) {
			t.Errorf("%s is %s", kind, got)
		}
	}
	for _, kind := range []string{"uts", "ipc", "user"} {
		if got := pinnedAs(t, d, p.id, kind); got != "" {
			t.Errorf("pinned: %s", got)
		}
	}
	// As the pod has no processes to share, nobody can share them.
	apart := pinnedPod(d, "apart")
	_, err := d.StartContainer(t.Context(), apart.id, apart.config, inNamespaces(daemon.ContainerConfig("main", plain(t, d)), &cri.NamespaceOption{}))
	wantError(t, err, codes.FailedPrecondition, "share no process namespace")
}

// TestPOD_34_SharedProcesses: a pod whose containers share a process namespace has
// one process, which reaps what loses its parent, and whose end is the pod's.
func TestPOD_34_SharedProcesses(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(withPinned))
	common := &cri.NamespaceOption{Pid: cri.NamespaceMode_POD}
	p := pinnedPod(d, "sharing", withNamespaces(common))
	one := p.run(d, inNamespaces(daemon.ContainerConfig("one", plain(t, d)), common))
	two := p.run(d, inNamespaces(daemon.ContainerConfig("two", plain(t, d)), common))
	holder := pidOfPod(t, d, p.id)
	if got := sh(d, one, "cat /proc/1/comm; hostname"); got != "pause\nsharing" {
		t.Errorf("process 1 and hostname are %q", got)
	}
	if nsOf(t, pidOf(t, d, two), "pid") != nsOf(t, holder, "pid") {
		t.Error("a container is not in the pod's process namespace")
	}
	if got := sh(d, one, "grep -E '^(CapEff|NoNewPrivs|Uid):' /proc/1/status"); lines(got) != "Uid: 65535 65535 65535 65535\nCapEff: 0000000000000000\nNoNewPrivs: 1" {
		t.Errorf("process 1 is %q", got)
	}
	if out, code := tryExec(t, d, one, "ls", "/proc/1/root/"); code == 0 && strings.Contains(out, "home") {
		t.Errorf("process 1 has the root %q", out)
	}
	// Each outer shell ends at once, so the inner one belongs to process 1.
	sh(d, one, "i=0; while [ $i -lt 20 ]; do sh -c 'sh -c \"sleep 0.1; echo x >> /done\" &' ; i=$((i+1)); done")
	eventually(t, soon, func() error {
		if got := sh(d, one, "wc -l < /done; grep -l '^State:.*zombie' /proc/[0-9]*/status 2>/dev/null | wc -l"); got != "20\n0" {
			return fmt.Errorf("orphans that ended, and zombies: %q", got)
		}
		return nil
	})
	d.Kill()
	d.Up()
	if got := sh(d, two, "cat /proc/1/comm"); got != "pause" {
		t.Errorf("after a restart process 1 is %q", got)
	}
	kill(t, holder)
	eventually(t, soon, func() error {
		if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
			return fmt.Errorf("without its process the pod is %s", s.State)
		}
		return nil
	})
	if s := waitExited(t, d, one); s.ExitCode != 137 {
		t.Errorf("code %d", s.ExitCode)
	}
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
	noSupervisor(t, d)
	nothingLeft(t, d)
}

// TestPOD_34_UserNamespace: all namespaces of the pod belong to its user namespace,
// with the pod's own network and with the node's, and no process stays.
func TestPOD_34_UserNamespace(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(withPinned))
	for name, on := range map[string]cri.NamespaceMode{"own": cri.NamespaceMode_POD, "node": cri.NamespaceMode_NODE} {
		for shares, pids := range map[string]cri.NamespaceMode{"apart": cri.NamespaceMode_CONTAINER, "together": cri.NamespaceMode_POD} {
			t.Run(name+" network "+shares, func(t *testing.T) {
				o := &cri.NamespaceOption{Network: on, Pid: pids, UsernsOptions: newRange()}
				p := pinnedPod(d, "users-"+name+"-"+shares, withNamespaces(o), func(c *cri.PodSandboxConfig) {
					c.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1"}
				})
				if holder := pidOfPod(t, d, p.id); (holder != 0) != (shares == "together") {
					t.Errorf("the pod has process %d", holder)
				}
				ctr := p.run(d, inNamespaces(daemon.ContainerConfig("main", plain(t, d)), o))
				pid := pidOf(t, d, ctr)
				user := nsOf(t, pid, "user")
				if pinned := pinnedAs(t, d, p.id, "user"); user != pinned || user == nsOf(t, "self", "user") {
					t.Errorf("the container is in %s, pinned is %s", user, pinned)
				}
				kinds := []string{"ipc", "pid", "mnt"}
				if on == cri.NamespaceMode_POD {
					kinds = append(kinds, "net", "uts")
				}
				for _, kind := range kinds {
					if owner := ownerNamespace(t, pid, kind); owner != user {
						t.Errorf("%s belongs to %s, the user namespace is %s", kind, owner, user)
					}
				}
				if got := sh(d, ctr, "cat /proc/self/uid_map /proc/sys/kernel/shm_rmid_forced"); lines(got) != fmt.Sprintf("0 %d %d\n1", hostRoot(o.UsernsOptions), rangeSize) {
					t.Errorf("in the pod: %q", got)
				}
				if err := removePod(d, p.id); err != nil {
					t.Error(err)
				}
			})
		}
	}
	noSupervisor(t, d)
	nothingLeft(t, d)
}

// TestNET_32_PinnedNamespaces: a pod's namespaces are files, without a process, in
// which the containers are; they outlive the daemon, and go with the pod.
func TestNET_32_PinnedNamespaces(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(withPinned))
	p := pinnedPod(d, "files", func(c *cri.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"kernel.msgmax": "9000", "net.ipv4.ip_local_port_range": "40000 50000"}
	})
	uts, ipc := pinnedAs(t, d, p.id, "uts"), pinnedAs(t, d, p.id, "ipc")
	for _, ns := range []string{uts, ipc} {
		kind, _, _ := strings.Cut(ns, ":")
		if ns == "" || ns == nsOf(t, "self", kind) || len(processesIn(t, kind, ns)) > 0 {
			t.Errorf("%q, host's %s, processes %v", ns, nsOf(t, "self", kind), processesIn(t, kind, ns))
		}
	}
	d.Kill()
	d.Up()
	if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_READY {
		t.Errorf("after a restart the pod is %s", s.State)
	}
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	pid := pidOf(t, d, ctr)
	if nsOf(t, pid, "uts") != uts || nsOf(t, pid, "ipc") != ipc {
		t.Errorf("the container is in %s and %s, pinned are %s and %s", nsOf(t, pid, "uts"), nsOf(t, pid, "ipc"), uts, ipc)
	}
	if got := sh(d, ctr, "hostname; cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_local_port_range"); lines(got) != "files\n9000\n40000 50000" {
		t.Errorf("in the pod: %q", got)
	}
	// It comes back to the same after its containers have gone.
	if err := errors.Join(stopContainer(d, ctr, 0), removeContainer(d, ctr)); err != nil {
		t.Error(err)
	}
	if got := nsOf(t, pidOf(t, d, p.run(d, daemon.ContainerConfig("next", plain(t, d)))), "ipc"); got != ipc {
		t.Errorf("the next container is in %s", got)
	}
	d.Kill()
	d.Up()
	if err := stopPod(d, p.id); err != nil {
		t.Error(err)
	}
	for _, kind := range []string{"uts", "ipc"} {
		if got := pinnedAs(t, d, p.id, kind); got != "" {
			t.Errorf("of a stopped pod there is %s", got)
		}
	}
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
	// A pod that cannot be made leaves nothing either, with a holder or without.
	for _, pids := range []cri.NamespaceMode{cri.NamespaceMode_CONTAINER, cri.NamespaceMode_POD} {
		config := d.PodConfig("untunable")
		config.Linux.SecurityContext.NamespaceOptions.Pid = pids
		config.Linux.Sysctls = map[string]string{"net.ipv4.no_such_setting": "1"}
		if _, err := d.StartPod(t.Context(), config, "pinned"); err == nil || !strings.Contains(err.Error(), "no_such_setting") {
			t.Errorf("a pod with a setting that is not there: %v", err)
		}
	}
	noSupervisor(t, d)
	nothingLeft(t, d)
}

// TestNET_32_NamespacesDir: the namespaces of a pod are found in the directory that the
// configuration names, with and without a process, for as long as the pod is there.
func TestNET_32_NamespacesDir(t *testing.T) {
	t.Parallel()
	var dir string
	d := start(t, daemon.Edit(withPinned), daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		dir = filepath.Join(in.Dir, "namespaces")
		c.Set(dir, "plugins", daemon.RuntimePlugin, "namespaces_dir")
	}))
	found := func(id string) (all map[string]string) {
		all = map[string]string{}
		for _, kind := range []string{"net", "ipc", "uts", "user"} {
			paths, err := filepath.Glob(filepath.Join(dir, kind+"ns", "*"+id))
			must(err)
			for _, path := range paths {
				var st unix.Stat_t
				if err := unix.Stat(path, &st); err != nil {
					t.Errorf("%s leads nowhere: %v", path, err)
				}
				all[kind] = fmt.Sprintf("%s:[%d]", kind, st.Ino)
			}
		}
		return all
	}
	for _, handler := range []string{"pinned", pausing} {
		for name, edit := range map[string]func(*cri.PodSandboxConfig){"own": func(*cri.PodSandboxConfig) {}, "host": hostNetwork, "user": withUserns(newRange())} {
			p := supervisedPod(d, handler, handler+name, edit)
			c := daemon.ContainerConfig("app", plain(t, d))
			if name == "host" {
				c = onHost(c)
			}
			if name == "user" {
				c.Linux.SecurityContext.NamespaceOptions = p.config.Linux.SecurityContext.NamespaceOptions
			}
			pid := pidOf(t, d, p.run(d, c))
			want := map[string]string{}
			for _, kind := range []string{"net", "ipc", "uts", "user"} {
				if ns := nsOf(t, pid, kind); ns != nsOf(t, "self", kind) {
					want[kind] = ns
				}
			}
			if got := found(p.id); !maps.Equal(got, want) || len(got) < 1 {
				t.Errorf("%s, %s: there are %v, the container is in %v", handler, name, got, want)
			}
			d.Restart()
			if err := stopPod(d, p.id); err != nil {
				t.Error(err)
			}
			if err := removePod(d, p.id); err != nil {
				t.Error(err)
			}
			if got := found(p.id); len(got) > 0 {
				t.Errorf("of a pod that is gone there are %v", got)
			}
		}
	}
	noSupervisor(t, d)
	nothingLeft(t, d)
}

// TestPOD_34_Crash kills the daemon at random moments of the lives of pods with a
// holder and without, while a client goes on as the kubelet does.
func TestPOD_34_Crash(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(withPinned), daemon.Set("pinned", "plugins", daemon.RuntimePlugin, "containerd", "default_runtime_name"))
	img := plain(t, d)
	n := 0
	crashes(t, d, func(cycle string) error {
		n++
		return life(d, cycle, img, func(c *cri.PodSandboxConfig) {
			if n%2 == 0 {
				c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
			}
		})
	})
	noSupervisor(t, d)
}

// TestRTH_15_StockContainerd: a containerd that knows nothing of our shim runs pods
// by its Sandbox API. Those with user namespaces need a handler without options.
func TestRTH_15_StockContainerd(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Stock(), daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		addHandler(in, c, "pinned", daemon.Config{"runtime_type": "io.containerd.gantry.v2", "sandboxer": "shim", "disable_pause_image_pull": true})
	}), daemon.Edit(withBarePinned), daemon.Set(true, "plugins", daemon.RuntimePlugin, "containerd", "runtimes", bareHandler, "disable_pause_image_pull"))
	ref := images.Serve(t).Push(t, "app:v1", images.MustBuild(images.Spec{}))
	if _, err := d.Images().PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]*cri.NamespaceOption{
		"apart": {Pid: cri.NamespaceMode_CONTAINER}, "together": {}, "on-the-node": {Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER},
		"of-users": {Pid: cri.NamespaceMode_CONTAINER, UsernsOptions: newRange()},
	} {
		t.Run(name, func(t *testing.T) {
			p := supervisedPod(d, map[bool]string{false: "pinned", true: bareHandler}[o.UsernsOptions != nil], name, withNamespaces(o))
			one, two := p.run(d, inNamespaces(daemon.ContainerConfig("one", ref), o)), p.run(d, inNamespaces(daemon.ContainerConfig("two", ref), o))
			a, b := pidOf(t, d, one), pidOf(t, d, two)
			for kind, own := range map[string]bool{"net": o.Network == 0, "uts": o.Network == 0, "ipc": true} {
				if nsOf(t, a, kind) != nsOf(t, b, kind) || (nsOf(t, a, kind) != nsOf(t, "self", kind)) != own {
					t.Errorf("%s is %s and %s, the host's %s", kind, nsOf(t, a, kind), nsOf(t, b, kind), nsOf(t, "self", kind))
				}
			}
			if got := sh(d, one, "hostname"); o.Network == 0 && got != name {
				t.Errorf("exec gave %q", got)
			}
			// What it leaves behind has its output open.
			if out, code := tryExec(t, d, one, "sh", "-c", "echo parent; sleep 1000 & exit 3"); out != "parent\n" || code != 3 {
				t.Errorf("a command with a child gave %q, %d", out, code)
			}
			if out, code := tryExec(t, d, one, "sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x; echo all >&2"); code != 0 || len(out) != 300004 {
				t.Errorf("a command that says much gave %d bytes, %d", len(out), code)
			}
			if together := nsOf(t, a, "pid") == nsOf(t, b, "pid"); together != (name == "together") {
				t.Errorf("process namespaces are %s and %s", nsOf(t, a, "pid"), nsOf(t, b, "pid"))
			}
			d.Kill()
			d.Up()
			if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_READY {
				t.Errorf("after a restart the pod is %s", s.State)
			}
			if got := sh(d, two, "echo here"); got != "here" {
				t.Errorf("exec after a restart gave %q", got)
			}
			if err := removePod(d, p.id); err != nil {
				t.Error(err)
			}
		})
	}
	noSupervisor(t, d)
}
