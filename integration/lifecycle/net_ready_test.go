package lifecycle

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// cniKey sets a key of the cni table.
func cniKey(key string, value any) daemon.Option {
	return daemon.Set(value, "plugins", daemon.RuntimePlugin, "cni", key)
}

// stubbed gives the default network to the stub, with further keys.
func stubbed(t *testing.T, opts ...daemon.Option) *daemon.Daemon {
	t.Helper()
	d := start(t, append([]daemon.Option{stubNetwork}, opts...)...)
	eventually(t, soon, func() error { return networkReady(t, d) })
	return d
}

// logged waits until the daemon has written a line with all the words.
func logged(t *testing.T, d *daemon.Daemon, words ...string) {
	t.Helper()
	eventually(t, soon, func() error {
		text, err := os.ReadFile(filepath.Join(d.Dir, "containerd.log"))
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			if containsAll(line, words) {
				return nil
			}
		}
		return fmt.Errorf("no line of the log has %q", words)
	})
}

func containsAll(s string, words []string) bool {
	for _, w := range words {
		if !strings.Contains(s, w) {
			return false
		}
	}
	return true
}

func TestNET_02_Check(t *testing.T) {
	t.Parallel()
	d := stubbed(t, cniKey("check_on_start", true))
	sound, broken := runPod(d, "sound"), runPod(d, "broken")
	order(t, d, "CHECK", "broken", stubOrder{Code: 11, Msg: "the address is gone"})
	d.Restart()
	logged(t, d, broken.id, "is not as it was made", stubPlugin, "the address is gone")
	for _, p := range []pod{sound, broken} {
		name := p.config.Metadata.Name
		eventually(t, soon, func() error {
			if got := commandsOf(stubCalls(t, d, name)); got != "ADD CHECK" {
				return fmt.Errorf("pod %s: the plugin was called for %q", name, got)
			}
			return nil
		})
		// What is wrong with its network is no reason to end a pod.
		if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_READY {
			t.Errorf("pod %s is %s", name, s.State)
		}
	}
	calls := stubCalls(t, d, "broken")
	if check := calls[len(calls)-1]; !strings.Contains(string(check.Conf), "prevResult") || check.ID != broken.id || check.NetNS != calls[0].NetNS {
		t.Errorf("CHECK was called with %+v", check)
	}
}

func TestNET_04_StatusGrace(t *testing.T) {
	t.Parallel()
	d := stubbed(t, cniKey("status_grace_period", "10s"))
	undo := order(t, d, "STATUS", "", stubOrder{Code: 50, Msg: "being upgraded"})
	useConflist(t, d, stubConflist(d.Dir)+" ") // looked at at once
	asked := len(stubCalls(t, d, ""))
	eventually(t, 2*soon, func() error {
		if now := len(stubCalls(t, d, "")); now < asked+2 {
			return fmt.Errorf("the plugin was asked %d times more", now-asked)
		}
		return nil
	})
	if err := networkReady(t, d); err != nil {
		t.Errorf("within the grace period the network is not ready: %v", err)
	}
	undo()
	runPod(d, "after-the-upgrade")
	order(t, d, "STATUS", "", stubOrder{Code: 50, Msg: "gone for good"})
	useConflist(t, d, stubConflist(d.Dir)+"  ")
	eventually(t, soon, func() error {
		if err := networkReady(t, d); err == nil || !strings.Contains(fmt.Sprint(err), "gone for good") {
			return fmt.Errorf("after the grace period: %v", err)
		}
		return nil
	})
}

// TestNET_05_GC: after a crash an address that belongs to no pod is given back,
// and plugins that look for leftovers of their own are told which attachments
// are in use.
func TestNET_05_GC(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(func(in *daemon.Instance, _ daemon.Config) {
		must(in.WriteConflist(conflist("1.1.0", bridged, stubConf(in.Dir))))
	}))
	eventually(t, soon, func() error { return networkReady(t, d) })
	kept := runPod(d, "kept")
	addresses := func() int {
		files, err := filepath.Glob(ipamFile(d, "10.*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(files)
	}
	end := order(t, d, "ADD", "cut-off", stubOrder{Stall: true}) // with its address
	go func() {
		_, _ = d.StartPod(t.Context(), d.PodConfig("cut-off"), "") // ends with the daemon
	}()
	eventually(t, soon, func() error {
		if n := addresses(); n != 2 {
			return fmt.Errorf("%d addresses are given out", n)
		}
		return nil
	})
	d.Kill()
	end()
	d.Up()
	eventually(t, soon, func() error {
		if n := addresses(); n != 1 {
			return fmt.Errorf("%d addresses are given out", n)
		}
		calls := stubCalls(t, d, "") // of no pod
		if got := commandsOf(calls); strings.Count(got, "GC") < 2 {
			return fmt.Errorf("the plugin was called for %q", got)
		}
		return nil
	})
	if got := ipOf(t, d, kept); !exists(ipamFile(d, got)) {
		t.Errorf("the address %s of a pod that is there is not given out any more", got)
	}
	var last stubCall // the first was before there were pods
	for _, c := range stubCalls(t, d, "") {
		if c.Command == "GC" {
			last = c
		}
	}
	if !strings.Contains(string(last.Conf), kept.id) {
		t.Errorf("GC was told of other attachments: %s", last.Conf)
	}
}

func TestNET_07_DefaultNetworkByName(t *testing.T) {
	t.Parallel()
	d := start(t, cniKey("default_network", "second"), daemon.Edit(func(in *daemon.Instance, _ daemon.Config) {
		second := strings.Replace(stubConflist(in.Dir), `"name": "stub"`, `"name": "second"`, 1)
		must(os.WriteFile(filepath.Join(in.CNIDir, "20-second.conflist"), []byte(second), 0o644))
	}))
	eventually(t, soon, func() error { return networkReady(t, d) })
	if ip := ipOf(t, d, runPod(d, "named")); ip+"/24" != stubAddress {
		t.Errorf("address is %s, not of the network that was named", ip)
	}
	if err := os.Remove(filepath.Join(d.CNIDir, "20-second.conflist")); err != nil {
		t.Fatal(err)
	}
	// The first network is not taken in its place.
	eventually(t, soon, func() error {
		if err := networkReady(t, d); err == nil || !strings.Contains(fmt.Sprint(err), `"second"`) {
			return fmt.Errorf("without the network: %v", err)
		}
		return nil
	})
}

func TestNET_21_NetnsDirectory(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		underState bool
		dir        func(*daemon.Daemon) string
	}{
		"state":    {true, func(d *daemon.Daemon) string { return d.State }},
		"standard": {false, func(*daemon.Daemon) string { return "/run/netns" }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := start(t, daemon.Set(c.underState, "plugins", daemon.RuntimePlugin, "netns_mounts_under_state_dir"))
			p := runPod(d, "pinned")
			path := pinInfo(t, d, p.run(d, daemon.ContainerConfig("main", plain(t, d))))
			if real, err := filepath.EvalSymlinks(path); err != nil || !strings.HasPrefix(real, c.dir(d)+"/") {
				t.Errorf("the namespace is pinned at %s (%v), want it below %s", real, err, c.dir(d))
			}
			if err := removePod(d, p.id); err != nil {
				t.Fatal(err)
			}
			if exists(path) {
				t.Errorf("%s is there after the pod", path)
			}
		})
	}
}

// pinInfo is where the network of a container is pinned.
func pinInfo(t *testing.T, d *daemon.Daemon, id string) string {
	t.Helper()
	want := nsOf(t, pidOf(t, d, id), "net")
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if f[3] == want {
			return f[4]
		}
	}
	t.Fatalf("%s is pinned nowhere", want)
	return ""
}

// TestNET_25_WaitsForNetwork: a pod that comes before its network waits for it,
// is seen to wait, and starts when it is there; not for ever.
func TestNET_25_WaitsForNetwork(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Conflist(""), cniKey("ready_timeout", "2m"))
	config := d.PodConfig("early")
	type result struct {
		id  string
		err error
	}
	done := make(chan result, 1)
	go func() {
		id, err := d.StartPod(t.Context(), config, "")
		done <- result{id, err}
	}()
	shown(t, d, "run", "early", "wait for the network")
	hosted := runPod(d, "needs-none", hostNetwork) // waits for nothing
	if err := removePod(d, hosted.id); err != nil {
		t.Error(err)
	}
	select {
	case r := <-done:
		t.Fatalf("the pod did not wait: %v", r.err)
	default:
	}
	if err := d.WriteConflist(conflist("1.0.0", bridged)); err != nil {
		t.Fatal(err)
	}
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	if ip := ipOf(t, d, pod{r.id, config}); !d.Scope().Subnet.Contains(netip.MustParseAddr(ip)) {
		t.Errorf("address is %s", ip)
	}
}

func TestNET_25_NotForEver(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Conflist(""), cniKey("ready_timeout", "1s"))
	began := time.Now()
	_, err := d.StartPod(t.Context(), d.PodConfig("too-early"), "")
	wantError(t, err, codes.Unavailable, "attach network", d.CNIDir)
	if took := time.Since(began); took < time.Second {
		t.Errorf("the pod gave up after %s", took)
	}
	nothingLeft(t, d)
}

func TestNET_27_DefaultSysctls(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Set([]string{"net.ipv4.ip_local_port_range=20000 30000", "net.core.somaxconn = 321", "kernel.shm_rmid_forced=1"},
		"plugins", daemon.RuntimePlugin, "default_sysctls"))
	read := func(ctr, name string) string {
		return strings.TrimSpace(sh(d, ctr, "cat /proc/sys/"+strings.ReplaceAll(name, ".", "/")))
	}
	p := runPod(d, "with-defaults", func(c *cri.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"net.core.somaxconn": "123"}
	})
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	for name, want := range map[string]string{
		"net.ipv4.ip_local_port_range": "20000\t30000", "net.core.somaxconn": "123", "kernel.shm_rmid_forced": "1",
	} {
		if got := read(ctr, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	// In a pod with the node's namespaces they are left as the node has them.
	node := func(name string) string {
		b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	before := node("net.core.somaxconn")
	hosted := runPod(d, "on-the-node", hostNetwork)
	hostedCtr := hosted.run(d, onHost(daemon.ContainerConfig("main", plain(t, d))))
	if got := read(hostedCtr, "net.core.somaxconn"); got != before || node("net.core.somaxconn") != before {
		t.Errorf("the node's somaxconn was %s and is %s", before, got)
	}
	if got := read(hostedCtr, "kernel.shm_rmid_forced"); got != "1" { // its IPC is its own
		t.Errorf("kernel.shm_rmid_forced is %s in a pod with IPC of its own", got)
	}
}
