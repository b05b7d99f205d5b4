package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/cmd/gantry/internal/daemon"
	"github.com/gantry-cri/gantry/plugin/facts"
)

// asked is Versions out of a table, by the program's name.
type asked map[string]string

func (a asked) Runtime(_ context.Context, path string) (string, error) {
	says, ok := a[filepath.Base(path)]
	if !ok {
		return "", errors.New("exit status 1")
	}
	return says, nil
}

func (a asked) Plugin(_ context.Context, path string) (string, []string, error) {
	says, ok := a[filepath.Base(path)]
	if !ok {
		return "", nil, errors.New("exit status 1")
	}
	about, specs, _ := strings.Cut(says, "|")
	return about, strings.Fields(specs), nil
}

// live and dead name pods.
var (
	live = strings.Repeat("a1", 32)
	dead = strings.Repeat("d2", 32)
)

const conflist = `{"cniVersion": "1.1.0", "name": "pods", "plugins": [
	{"type": "bridge", "ipam": {"type": "host-local", "dataDir": "/books"}},
	{"type": "portmap", "capabilities": {"portMappings": true}}]}`

// machine makes a node in which everything is as it should be.
func machine(t *testing.T) Node {
	t.Helper()
	n := Node{
		Root: t.TempDir(),
		Layout: daemon.Layout{
			Root: "/root", State: "/state", Address: "/run/c.sock", NetNSDir: "/netns",
			Networks: []daemon.NetworkDir{{Path: "/cni", Max: 1}}, BinDirs: []string{"/none", "/cnibin"}, Runtimes: []string{"runc"},
			Shims: []string{"containerd-shim-gantry-v2", "containerd-shim-runc-v2"}, DefaultShim: "containerd-shim-gantry-v2",
		},
		Path: []string{"/bin"},
		Facts: func() (facts.Host, error) {
			return facts.Host{
				Kernel: facts.Kernel{Major: 6, Minor: 12}, Seccomp: true, AppArmor: true,
				Cgroup: facts.Cgroup{Mode: facts.CgroupV2, Controllers: map[string]string{"cpu": "/c", "memory": "/c", "pids": "/c"}},
			}, nil
		},
		Calls: func() Calls { return Calls{true, true, true} },
		Versions: asked{
			"runc": "runc version 1.4.3\nspec: 1.3.0", "crun": "crun version 1.21\ncommit: x",
			"bridge": "CNI bridge plugin v1.9.0|1.0.0 1.1.0", "host-local": "CNI host-local plugin v1.9.0|1.1.0", "portmap": "CNI portmap plugin v1.9.0|1.1.0",
		},
		Pods: func(context.Context, daemon.Layout) (daemon.Pods, error) {
			return daemon.Pods{IDs: map[string]bool{live: true}, Version: "containerd v2.4.2", Conditions: []*cri.RuntimeCondition{
				{Type: "RuntimeReady", Status: true}, {Type: "NetworkReady", Status: true},
			}}, nil
		},
	}
	n.put(t, "/proc/filesystems", "nodev\toverlay\n\terofs\n")
	n.put(t, "/proc/sys/kernel/seccomp/actions_avail", "kill_process user_notif allow\n")
	n.put(t, "/proc/sys/user/max_user_namespaces", "1000\n")
	n.put(t, "/proc/self/mountinfo", "")
	n.put(t, "/proc/1/cmdline", "init\x00")
	n.put(t, "/cni/10-pods.conflist", conflist)
	for _, p := range []string{"/cnibin/bridge", "/cnibin/host-local", "/cnibin/portmap", "/bin/runc", "/bin/containerd-shim-runc-v2", "/bin/containerd-shim-gantry-v2"} {
		n.put(t, p, "#!")
	}
	return n
}

func (n Node) put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(n.path(path)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.path(path), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (n Node) remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(n.path(path)); err != nil {
		t.Fatal(err)
	}
}

// bad are the findings that are not ok, as "area name: status: text".
func bad(all []Finding) []string {
	var out []string
	for _, f := range all {
		if f.Status != OK {
			out = append(out, fmt.Sprintf("%s %s: %s: %s", f.Area, f.Name, f.Status, f.Text))
		}
	}
	return out
}

func TestSound(t *testing.T) {
	all := Check(t.Context(), machine(t))
	if b := bad(all); len(b) > 0 || Worst(all) != OK {
		t.Errorf("a sound node has:\n%s", strings.Join(b, "\n"))
	}
	for _, f := range all {
		if f.Text == "" || f.Advice != "" {
			t.Errorf("odd finding %+v", f)
		}
	}
	for _, want := range []string{"overlay", "plugin portmap", "runc", "answers", "mounts"} {
		if !slices.ContainsFunc(all, func(f Finding) bool { return f.Name == want }) {
			t.Errorf("nothing about %s", want)
		}
	}
}

// Each change of a sound machine gives the one finding that names it.
func TestUnsound(t *testing.T) {
	host := func(change func(*facts.Host)) func(*testing.T, *Node) {
		return func(_ *testing.T, n *Node) {
			h, _ := n.Facts()
			change(&h)
			n.Facts = func() (facts.Host, error) { return h, nil }
		}
	}
	file := func(path, text string) func(*testing.T, *Node) {
		return func(t *testing.T, n *Node) { n.put(t, path, text) }
	}
	says := func(program, text string) func(*testing.T, *Node) {
		return func(_ *testing.T, n *Node) { n.Versions.(asked)[program] = text }
	}
	for name, tc := range map[string]struct {
		change func(*testing.T, *Node)
		want   string
	}{
		"no overlay":       {file("/proc/filesystems", "erofs\n"), "kernel overlay: failure: "},
		"no erofs":         {file("/proc/filesystems", "overlay\n"), "kernel erofs: warning: "},
		"no openat2":       {func(_ *testing.T, n *Node) { n.Calls = func() Calls { return Calls{false, true, true} } }, "kernel openat2: failure: "},
		"no pidfd":         {func(_ *testing.T, n *Node) { n.Calls = func() Calls { return Calls{true, false, true} } }, "kernel pidfd: warning: "},
		"no idmap":         {func(_ *testing.T, n *Node) { n.Calls = func() Calls { return Calls{true, true, false} } }, "kernel idmapped mounts: warning: "},
		"no seccomp":       {host(func(h *facts.Host) { h.Seccomp = false }), "kernel seccomp: failure: "},
		"no notification":  {file("/proc/sys/kernel/seccomp/actions_avail", "allow\n"), "kernel seccomp: warning: "},
		"no LSM":           {host(func(h *facts.Host) { h.AppArmor = false }), "kernel security modules: warning: "},
		"no userns":        {file("/proc/sys/user/max_user_namespaces", "0\n"), "kernel user namespaces: warning: "},
		"hybrid":           {host(func(h *facts.Host) { h.Cgroup.Mode = facts.CgroupHybrid }), "kernel cgroups: warning: version 1 holds"},
		"v1":               {host(func(h *facts.Host) { h.Cgroup.Mode = facts.CgroupV1 }), "kernel cgroups: warning: version 1"},
		"no controller":    {host(func(h *facts.Host) { h.Cgroup.Controllers = map[string]string{"cpu": "", "pids": ""} }), "kernel cgroup controllers: failure: missing: memory;"},
		"no CNI directory": {func(t *testing.T, n *Node) { n.remove(t, "/cni") }, "network /cni: failure: holds no"},
		"bad CNI file":     {file("/cni/10-pods.conflist", "{"), "network /cni/10-pods.conflist: failure: "},
		"no plugin type":   {file("/cni/00.conf", `{"cniVersion": "1.0.0", "name": "x"}`), "network /cni/00.conf: failure: "},
		"no plugin":        {func(t *testing.T, n *Node) { n.remove(t, "/cnibin/portmap") }, "network plugin portmap: failure: is configured and not found in /none, /cnibin"},
		"plugin fails":     {func(_ *testing.T, n *Node) { delete(n.Versions.(asked), "bridge") }, "network plugin bridge: failure: /cnibin/bridge does not tell"},
		"old CNI":          {says("bridge", "|0.4.0 1.0.0"), "network plugin bridge: failure: /cnibin/bridge does not know CNI 1.1.0"},
		"old portmap":      {says("portmap", "CNI portmap plugin v1.8.0|1.1.0"), "network plugin portmap: warning: /cnibin/portmap is 1.8.0; "},
		"no shim":          {func(t *testing.T, n *Node) { n.remove(t, "/bin/containerd-shim-runc-v2") }, "runtime containerd-shim-runc-v2: warning: a runtime handler needs it"},
		"no shim of ours":  {func(t *testing.T, n *Node) { n.remove(t, "/bin/containerd-shim-gantry-v2") }, "runtime containerd-shim-gantry-v2: warning: the default runtime handler needs it"},
		"no runc":          {func(t *testing.T, n *Node) { n.remove(t, "/bin/runc") }, "runtime runc: failure: "},
		"runc fails":       {func(_ *testing.T, n *Node) { delete(n.Versions.(asked), "runc") }, "runtime runc: failure: /bin/runc does not tell"},
		"odd runc":         {says("runc", "hello"), "runtime runc: warning: /bin/runc tells no version"},
		"old runc":         {says("runc", "runc version 1.4.2"), "runtime runc: warning: /bin/runc is runc 1.4.2: an image whose /dev"},
		"network not ready": {func(_ *testing.T, n *Node) {
			n.Pods = func(context.Context, daemon.Layout) (daemon.Pods, error) {
				return daemon.Pods{Conditions: []*cri.RuntimeCondition{{Type: "NetworkReady", Reason: "NoConf", Message: "none"}}}, nil
			}
		}, "daemon NetworkReady: failure: NoConf: none"},
		"deprecations": {func(_ *testing.T, n *Node) {
			n.Pods = func(context.Context, daemon.Layout) (daemon.Pods, error) {
				return daemon.Pods{Conditions: []*cri.RuntimeCondition{{Type: "ContainerdHasNoDeprecationWarnings", Reason: "R", Message: "m"}}}, nil
			}
		}, "daemon ContainerdHasNoDeprecationWarnings: warning: R: m"},
		"no operations": {func(_ *testing.T, n *Node) {
			n.Pods = func(context.Context, daemon.Layout) (daemon.Pods, error) { return daemon.Pods{Partial: "why"}, nil }
		}, "daemon operations: warning: why"},
	} {
		t.Run(name, func(t *testing.T) {
			n := machine(t)
			tc.change(t, &n)
			got := bad(Check(t.Context(), n))
			if len(got) != 1 || !strings.HasPrefix(got[0], tc.want) {
				t.Errorf("got\n%s\nwant one: %s…", strings.Join(got, "\n"), tc.want)
			}
		})
	}
}

func TestUnreadableMachine(t *testing.T) {
	n := machine(t)
	n.Facts = func() (facts.Host, error) { return facts.Host{}, errors.New("no /proc") }
	if all := n.kernel(t.Context()); len(all) != 1 || Worst(all) != Fail {
		t.Errorf("got %+v", all)
	}
	n.remove(t, "/proc")
	got := bad(n.leftovers(t.Context()))
	if len(got) != 3 || !strings.HasPrefix(got[0], "leftovers mounts: skipped: ") || !strings.HasPrefix(got[1], "leftovers shims: skipped: ") ||
		!strings.HasPrefix(got[2], "leftovers kept output: skipped: ") {
		t.Errorf("got %q", got)
	}
}

// A second file is read only where pods use it.
func TestMaxConf(t *testing.T) {
	n := machine(t)
	n.put(t, "/cni/20-broken.conf", "{")
	if b := bad(n.network(t.Context())); len(b) > 0 {
		t.Errorf("max 1: %q", b)
	}
	n.Layout.Networks[0].Max = 0
	if b := bad(n.network(t.Context())); len(b) != 1 || !strings.Contains(b[0], "20-broken.conf") {
		t.Errorf("no max: %q", b)
	}
}

// With a default network its file is used, whatever it is called, and a broken
// one is in nobody's way.
func TestDefaultNetwork(t *testing.T) {
	n := machine(t)
	n.put(t, "/cni/20-blue.conf", `{"cniVersion": "1.1.0", "name": "blue", "type": "absent"}`)
	n.put(t, "/cni/30-broken.conf", "{")
	n.Layout.Networks[0].Default = "blue"
	got := bad(n.network(t.Context()))
	if len(got) != 2 || !strings.HasPrefix(got[0], "network /cni/30-broken.conf: warning: is passed over") || !strings.HasPrefix(got[1], "network plugin absent: failure: ") {
		t.Errorf("got %q", got)
	}
	n.Layout.Networks[0].Default = "red"
	got = bad(n.network(t.Context()))
	if len(got) != 2 || !strings.HasPrefix(got[1], `network /cni: failure: has no network "red"`) {
		t.Errorf("got %q", got)
	}
}

func TestOtherRuntime(t *testing.T) {
	n := machine(t)
	n.put(t, "/opt/crun", "#!")
	n.Layout.Runtimes = []string{"/opt/crun"}
	all := n.runtimes(t.Context())
	if b := bad(all); len(b) > 0 || !strings.Contains(all[2].Text, "crun 1.21.0") {
		t.Errorf("got %+v", all)
	}
	n.Layout.Runtimes, n.Layout.Shims = nil, nil
	n.remove(t, "/bin")
	if all := n.runtimes(t.Context()); len(all) > 0 {
		t.Errorf("without runc handlers: %+v", all)
	}
}

// litter puts one of each kind on the machine for a pod.
func litter(t *testing.T, n Node, pid, pod string) {
	t.Helper()
	n.put(t, "/netns/"+n.Layout.NetNSPrefix()+pod, "")
	mounts, err := os.ReadFile(n.path("/proc/self/mountinfo"))
	if err != nil {
		t.Fatal(err)
	}
	line := fmt.Sprintf("%s 1 0:1 / %s/%s/rootfs rw - overlay overlay rw\n", pid, bundles(n), pod)
	line += fmt.Sprintf("1%s 1 0:4 user:[4026532%s] %s/userns/%s rw - nsfs nsfs rw\n", pid, pid, n.Layout.PluginState(), pod)
	n.put(t, "/proc/self/mountinfo", string(mounts)+line)
	n.put(t, "/proc/"+pid+"/cmdline", "/x/containerd-shim-runc-v2\x00-namespace\x00k8s.io\x00-id\x00"+pod+"\x00-address\x00/run/c.sock\x00")
	n.put(t, bundles(n)+"/"+pod+"/config.json", "{}")
	n.keep(t, "/proc/1"+pid, n.Layout.KeeperSocket(), pod)
	n.put(t, "/books/pods/10.0.0."+pid, pod+"\neth0")
	n.put(t, n.Layout.Attachments()+"/"+pod+".json", "{}")
}

// keep makes a process a keeper that holds output of a container.
func (n Node) keep(t *testing.T, process, socket, container string) {
	t.Helper()
	n.put(t, process+"/cmdline", "/x/gantry-keeper\x00"+socket+"\x00")
	n.put(t, process+"/fd/README", "")
	if err := os.Symlink(n.Layout.PluginState()+"/io/"+container+"/main/stdout", n.path(process+"/fd/4")); err != nil {
		t.Fatal(err)
	}
}

func TestLeftovers(t *testing.T) {
	n := machine(t)
	litter(t, n, "7", live)
	if b := bad(n.leftovers(t.Context())); len(b) > 0 {
		t.Errorf("what a pod has is taken for left over: %q", b)
	}
	litter(t, n, "8", dead)
	// What is not ours, or is no pod's.
	other := strings.Repeat("e3", 32)
	n.put(t, "/netns/cni-1234", "")
	n.put(t, "/netns/gantry-00000000-"+other, "")
	n.put(t, "/proc/9/cmdline", "/x/containerd-shim-runc-v2\x00-namespace\x00moby\x00-id\x00"+other+"\x00-address\x00/run/c.sock\x00")
	n.put(t, "/proc/10/cmdline", "/x/containerd-shim-runc-v2\x00-namespace\x00k8s.io\x00-id\x00"+other+"\x00-address\x00/run/other.sock\x00")
	n.keep(t, "/proc/11", "/run/other/keeper.sock", other)
	n.put(t, "/books/pods/last_reserved_ip.0", other)
	n.put(t, "/books/pods/10.0.0.99", "podman-container\neth0")
	n.put(t, n.Layout.Attachments()+"/notes", "")
	got := bad(n.leftovers(t.Context()))
	want := []string{
		"leftovers network namespaces: warning: /netns/" + n.Layout.NetNSPrefix() + dead,
		"leftovers mounts: warning: " + bundles(n) + "/" + dead + "/rootfs",
		"leftovers mounts: warning: " + n.Layout.PluginState() + "/userns/" + dead,
		"leftovers shims: warning: process 8: containerd-shim-runc-v2 of " + dead,
		"leftovers kept output: warning: process 18: gantry-keeper with output of " + dead,
		"leftovers addresses: warning: /books/pods/10.0.0.8 for pod " + dead,
		"leftovers network records: warning: " + n.Layout.Attachments() + "/" + dead + ".json",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// bundles is where the bundles of the daemon's third life are.
func bundles(n Node) string { return n.Layout.Tasks() + "/.gantry/3/k8s.io" }

// A shim without its bundle serves nobody, whatever the daemon lists.
func TestLostBundle(t *testing.T) {
	n := machine(t)
	litter(t, n, "7", live)
	n.remove(t, bundles(n)+"/"+live)
	got := bad(n.leftovers(t.Context()))
	if len(got) != 1 || !strings.Contains(got[0], "whose bundle") {
		t.Errorf("got %q", got)
	}
}

// Without the daemon nothing can be called left over, save what is broken.
func TestDaemonDown(t *testing.T) {
	n := machine(t)
	n.Pods = func(context.Context, daemon.Layout) (daemon.Pods, error) {
		return daemon.Pods{}, errors.New("it is down")
	}
	litter(t, n, "7", live)
	got := bad(n.leftovers(t.Context()))
	if len(got) != 7 || got[0] != "daemon answers: warning: it is down" {
		t.Fatalf("got %q", got)
	}
	for _, g := range got[1:] {
		there := 1
		if strings.Contains(g, "mounts") { // the root filesystem and the user namespace
			there = 2
		}
		if !strings.Contains(g, fmt.Sprintf("skipped: %d are there", there)) {
			t.Errorf("got %q", g)
		}
	}
}

// What goes away while it is looked at was being taken down.
func TestGoneMeanwhile(t *testing.T) {
	n := machine(t)
	litter(t, n, "8", dead)
	n.Pods = func(context.Context, daemon.Layout) (daemon.Pods, error) {
		for _, p := range []string{"/netns", "/proc/8", "/proc/18", "/books", "/root", "/state"} {
			n.remove(t, p)
		}
		n.put(t, "/proc/self/mountinfo", "")
		return daemon.Pods{IDs: map[string]bool{}}, nil
	}
	if b := bad(n.leftovers(t.Context())); len(b) > 0 {
		t.Errorf("got %q", b)
	}
}

func TestAdvisories(t *testing.T) {
	for says, want := range map[string]int{
		"runc version 1.0.3": 5, "runc version 1.1.11": 4, "runc version 1.1.12": 3, "runc version 1.1.14": 2, "runc version 1.1.99": 2,
		"runc version 1.2.0-rc.2": 3, "runc version 1.2.7": 2, "runc version 1.2.8": 1, "runc version 1.3.2": 2, "runc version 1.3.3": 1, "runc version 1.3.6": 0,
		"runc version 1.4.0-rc.2": 2, "runc version 1.4.0-rc.3": 1, "runc version 1.4.0~rc3": 1, "runc version 1.4.3": 0,
		"runc version 1.5.0-rc.2": 1, "runc version 1.5.0-rc.3": 0, "runc version 1.5.2": 0, "runc version 1.6.0": 0, "runc version 2.0.0": 0,
		"runc version 1.3.6-0ubuntu1~24.04.1": 0,
	} {
		l := &list{area: "runtime"}
		runc(l, "runc", "/bin/runc", says)
		if got := len(bad(l.all)); got != want {
			t.Errorf("%s has %d: %q, want %d", says, got, bad(l.all), want)
		}
	}
	l := &list{area: "runtime"}
	runc(l, "runc", "/bin/runc", "runc version 1.1.5+ds1-1+deb12u1")
	if Worst(l.all) != Warn {
		t.Errorf("a distribution's build: %+v", l.all)
	}
}

func TestParseShim(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want shim
		ok   bool
	}{
		{[]string{"/usr/bin/containerd-shim-runc-v2", "-namespace", "k8s.io", "-id", "x", "-address", "/a"}, shim{"containerd-shim-runc-v2", "k8s.io", "x", "/a"}, true},
		{[]string{"containerd-shim-kata-v2", "--id", "x", "-debug", "--namespace", "n"}, shim{"containerd-shim-kata-v2", "n", "x", ""}, true},
		{[]string{"containerd-shim-runc-v2", "-id", "-id"}, shim{"containerd-shim-runc-v2", "", "-id", ""}, true},
		{[]string{"containerd-shim-runc-v2", "-id"}, shim{}, false},
		{[]string{"containerd-shim-runc-v2", "-id", "../x"}, shim{}, false},
		{[]string{"containerd", "-id", "x"}, shim{}, false},
		{[]string{""}, shim{}, false},
	} {
		got, ok := parseShim([]byte(strings.Join(tc.args, "\x00") + "\x00"))
		if ok != tc.ok || ok && got != tc.want {
			t.Errorf("%q: got %+v %v", tc.args, got, ok)
		}
	}
}

func FuzzParseShim(f *testing.F) {
	f.Add([]byte("/x/containerd-shim-runc-v2\x00-namespace\x00k8s.io\x00-id\x00y\x00"))
	f.Add([]byte("\x00\x00-id"))
	f.Add([]byte("containerd-shim-\x00-id\x00/\x00"))
	f.Fuzz(func(t *testing.T, cmdline []byte) {
		if s, ok := parseShim(cmdline); ok && (s.id == "" || strings.Contains(s.id, "/") || !strings.HasPrefix(s.program, "containerd-shim-")) {
			t.Errorf("%q is %+v", cmdline, s)
		}
	})
}

// The calls are asked of the kernel that runs the test; all supported ones
// have the first two.
func TestKernelCalls(t *testing.T) {
	if c := KernelCalls(); !c.Openat2 || !c.Pidfd {
		t.Errorf("got %+v", c)
	}
}

func TestPrograms(t *testing.T) {
	dir := t.TempDir()
	script := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	says, err := Programs{}.Runtime(t.Context(), script("runc", `[ "$1" = --version ] && echo runc version 1.5.2`))
	if err != nil || says != "runc version 1.5.2" {
		t.Errorf("got %q, %v", says, err)
	}
	plugin := script("bridge", `
if [ "$CNI_COMMAND" = VERSION ]; then echo '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}'; exit; fi
echo "CNI bridge plugin v1.9.0" >&2; echo more >&2`)
	about, specs, err := Programs{}.Plugin(t.Context(), plugin)
	if err != nil || about != "CNI bridge plugin v1.9.0" || !slices.Equal(specs, []string{"1.0.0", "1.1.0"}) {
		t.Errorf("got %q %q %v", about, specs, err)
	}
	about, specs, err = Programs{}.Plugin(t.Context(), script("terse", `
[ "$CNI_COMMAND" = VERSION ] || exit 1
echo '{"cniVersion":"1.1.0","supportedVersions":["1.1.0"]}'`))
	if err != nil || about != "" || !slices.Equal(specs, []string{"1.1.0"}) {
		t.Errorf("terse: got %q %q %v", about, specs, err)
	}
	if _, _, err := (Programs{}).Plugin(t.Context(), script("odd", "echo hello")); err == nil {
		t.Error("odd: no error")
	}
	if _, err := (Programs{}).Runtime(t.Context(), script("bad", "echo because >&2; exit 3")); err == nil || !strings.Contains(err.Error(), "because") {
		t.Errorf("bad: %v", err)
	}
}
