package network_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/gantry-cri/gantry/plugin/network"
	"github.com/gantry-cri/gantry/plugin/network/networktest"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestSuite runs the promises against the reference plugins.
func TestSuite(t *testing.T) {
	networktest.Suite(t, func(t *testing.T) networktest.World {
		h := newHost(t)
		h.conf.HostPorts = network.HostPortsNative
		conf := h.bridgeConf()
		h.write("10-test.conflist", conf)
		return networktest.World{
			Network: h.open(),
			Held:    h.held,
			Reopen:  func() networktest.Network { return h.open() },
			Break: func(f networktest.Fault) {
				h.stub.behave(t, "ADD", behaviour{})
				h.stub.behave(t, "DEL", behaviour{})
				h.write("10-test.conflist", conf)
				switch f {
				case networktest.NoFault:
				case networktest.AddFails:
					h.stub.behave(t, "ADD", behaviour{Code: 100, Msg: "no luck"})
				case networktest.DelFails:
					h.stub.behave(t, "DEL", behaviour{Code: 100, Msg: "no luck"})
				case networktest.NoConf:
					mustDo(t, os.RemoveAll(h.conf.ConfDir))
				}
			},
		}
	})
}

func pod(id string) network.Attachment { return networktest.Pod(id) }

func (h *host) attach(a network.Attachment) record.Network {
	h.t.Helper()
	ns, err := h.net.CreateNS(h.t.Context(), a.ID)
	mustDo(h.t, err)
	n, err := h.net.Attach(h.t.Context(), a, ns)
	mustDo(h.t, err)
	return n
}

func (h *host) detach(ids ...string) {
	h.t.Helper()
	for _, id := range ids {
		mustDo(h.t, h.net.Detach(h.t.Context(), pod(id)))
	}
}

// TestBridgeTraffic looks at what a pod of the reference chain has: loopback
// up, both families, and a host port that works and goes with the pod.
func TestBridgeTraffic(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.bridgeConf())
	h.open()
	a := pod("web")
	a.Pod.PortMappings = []*cri.PortMapping{
		{ContainerPort: 8080, HostPort: 18080, Protocol: cri.Protocol_TCP},
		{ContainerPort: 9090, Protocol: cri.Protocol_UDP},
	}
	n := h.attach(a)
	if len(n.IPs) != 2 || !netip.MustParseAddr(n.IPs[0]).Is4() || !netip.MustParseAddr(n.IPs[1]).Is6() {
		t.Fatalf("addresses %v, want an IPv4 and an IPv6 one", n.IPs)
	}
	var l, lo6 net.Listener
	mustDo(t, network.Do(n.NetNS, func() (err error) {
		if l, err = net.Listen("tcp", "0.0.0.0:8080"); err != nil {
			return err
		}
		if lo6, err = net.Listen("tcp", "[::1]:8081"); err != nil {
			return err
		}
		c, err := net.Dial("tcp", "[::1]:8081")
		if err != nil {
			return fmt.Errorf("loopback: %w", err)
		}
		return c.Close()
	}))
	defer lo6.Close()
	go serve(l)
	defer l.Close()
	for _, addr := range []string{net.JoinHostPort(n.IPs[0], "8080"), "10.88.64.1:18080"} {
		if got, err := fetch(addr); err != nil || got != "pod" {
			t.Errorf("%s: %q, %v", addr, got, err)
		}
	}
	if rules := hostRules(t); !strings.Contains(rules, "18080") {
		t.Errorf("no rule for the host port:\n%s", rules)
	}
	mustDo(t, h.net.Check(t.Context(), "web"))
	h.detach("web")
	if rules := hostRules(t); strings.Contains(rules, "18080") || strings.Contains(rules, n.IPs[0]) {
		t.Errorf("rules of the pod are left:\n%s", rules)
	}
	if err := h.net.Check(t.Context(), "web"); !errdefs.IsNotFound(err) {
		t.Errorf("check: %v, want not found", err)
	}
}

func serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, "pod") // the reader tells
		_ = c.Close()
	}
}

func fetch(addr string) (string, error) {
	c, err := net.DialTimeout("tcp", addr, 2*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	data, err := io.ReadAll(c)
	return string(data), err
}

// hostRules returns the packet filter rules of both families.
func hostRules(t *testing.T) string {
	t.Helper()
	var rules string
	for _, save := range []string{"iptables-save", "ip6tables-save"} {
		out, err := exec.Command(save).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", save, err, out)
		}
		rules += string(out)
	}
	return rules
}

// TestBandwidth limits a pod by its annotations through the real plugin.
func TestBandwidth(t *testing.T) {
	h := newHost(t)
	conf := h.bridgeConf()
	conf["plugins"] = append(conf["plugins"].([]any), map[string]any{
		"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true},
	})
	h.write("10-test.conflist", conf)
	h.open()
	a := pod("slow")
	a.Pod.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "8M"}
	h.attach(a)
	defer h.detach("slow")
	links, err := netlink.LinkList()
	mustDo(t, err)
	var rates []uint64
	for _, l := range links {
		qdiscs, err := netlink.QdiscList(l)
		mustDo(t, err)
		for _, q := range qdiscs {
			if tbf, ok := q.(*netlink.Tbf); ok {
				rates = append(rates, tbf.Rate)
			}
		}
	}
	if want := []uint64{1_000_000}; !reflect.DeepEqual(rates, want) {
		t.Errorf("limits %v bytes/s, want %v", rates, want)
	}
}

// TestArguments compares what a plugin gets with what the pod says.
func TestArguments(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.stubConf("one", "1.0.0"))
	h.open()
	a := pod("args")
	a.CgroupParent = "/kubepods/pod1"
	a.Pod.Annotations = map[string]string{"kubernetes.io/egress-bandwidth": "1M", "team": "blue"}
	a.Pod.DnsConfig = &cri.DNSConfig{Servers: []string{"10.0.0.10"}, Searches: []string{"cluster.local"}, Options: []string{"ndots:5"}}
	a.Pod.PortMappings = []*cri.PortMapping{
		{ContainerPort: 53, HostPort: 5353, Protocol: cri.Protocol_UDP, HostIp: "127.0.0.1"},
		{ContainerPort: 80},
	}
	n := h.attach(a)
	h.detach("args")
	add := h.stub.calls(t, "ADD")[0]
	if add.ID != "args" || add.NetNS != n.NetNS || add.IfName != "eth0" {
		t.Errorf("called for %q %q %q", add.ID, add.NetNS, add.IfName)
	}
	wantArgs := "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod-args;K8S_POD_INFRA_CONTAINER_ID=args;K8S_POD_UID=uid-args"
	if add.Args != wantArgs {
		t.Errorf("CNI_ARGS\n%s, want\n%s", add.Args, wantArgs)
	}
	var want map[string]any
	mustDo(t, json.Unmarshal([]byte(`{
		"portMappings": [{"hostPort":5353,"containerPort":53,"protocol":"udp","hostIP":"127.0.0.1"}],
		"bandwidth": {"egressRate":1000000,"egressBurst":4294967295},
		"dns": {"servers":["10.0.0.10"],"searches":["cluster.local"],"options":["ndots:5"]},
		"cgroupPath": "/kubepods/pod1",
		"io.kubernetes.cri.pod-annotations": {"kubernetes.io/egress-bandwidth":"1M","team":"blue"}
	}`), &want))
	del := h.stub.calls(t, "DEL")[0]
	for _, c := range []call{add, del} {
		if !reflect.DeepEqual(c.Conf["runtimeConfig"], any(want)) {
			t.Errorf("%s: capabilities\n%v, want\n%v", c.Command, c.Conf["runtimeConfig"], want)
		}
	}
	if del.Conf["prevResult"] == nil || del.Args != wantArgs || del.NetNS != n.NetNS {
		t.Errorf("DEL differs from ADD: %+v", del)
	}
}

// TestSeveralNetworks attaches a pod to three networks and orders its
// addresses by the default one.
func TestSeveralNetworks(t *testing.T) {
	for _, c := range []struct {
		name        string
		max         int
		defaultName string
		want        []string // network names by interface
	}{
		{"first file", 1, "", []string{"one"}},
		{"two files", 2, "", []string{"one", "two"}},
		{"all files", 0, "", []string{"one", "two", "three"}},
		{"by name", 1, "two", []string{"two"}},
		{"by name and others", 2, "three", []string{"three", "one"}},
	} {
		for _, serially := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s serially %t", c.name, serially), func(t *testing.T) {
				h := newHost(t)
				h.conf.MaxConfNum, h.conf.DefaultNetwork, h.conf.SetupSerially = c.max, c.defaultName, serially
				for i, name := range []string{"one", "two", "three"} {
					h.write(fmt.Sprintf("%d0-%s.conflist", i, name), h.stubConf(name, "1.0.0"))
				}
				h.open()
				h.attach(pod("multi"))
				h.detach("multi")
				got := map[string]any{}
				for _, add := range h.stub.calls(t, "ADD") {
					got[add.IfName] = add.Conf["name"]
				}
				want := map[string]any{}
				for i, name := range c.want {
					want[fmt.Sprintf("eth%d", i)] = name
				}
				if !reflect.DeepEqual(got, want) {
					t.Errorf("networks %v, want %v", got, want)
				}
				if dels := h.stub.calls(t, "DEL"); len(dels) != len(want) {
					t.Errorf("%d DELs, want %d", len(dels), len(want))
				}
			})
		}
	}
}

func TestHandlerConfDir(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.stubConf("default", "1.0.0"))
	other := filepath.Join(h.root, "vm.d")
	main := h.conf.ConfDir
	h.conf.ConfDir = other
	h.write("10-vm.conflist", h.stubConf("vm", "1.0.0"))
	h.write("20-vm.conf", map[string]any{"type": stubName, "name": "old", "cniVersion": "0.3.1", "dir": h.stub.dir})
	h.conf.ConfDir = main
	h.open()
	a := pod("vm1")
	a.ConfDir, a.MaxConfNum = other, 2
	h.attach(a)
	mustDo(t, h.net.Detach(t.Context(), network.Attachment{ID: "vm1"}))
	var names []string
	for _, del := range h.stub.calls(t, "DEL") {
		names = append(names, del.Conf["name"].(string))
	}
	if want := []string{"old", "vm"}; !reflect.DeepEqual(names, want) {
		t.Errorf("detached from %v, want %v", names, want)
	}
}

func TestAddressOrder(t *testing.T) {
	for _, c := range []struct {
		pref network.IPPref
		id   string
		want []string
	}{
		{"", "a-6-4-4", []string{"10.88.65.2", "fd00:10:89::1", "10.88.65.3"}},
		{network.PreferIPv4, "b-4-6", []string{"10.88.65.1", "fd00:10:89::2"}},
		{network.PreferIPv6, "c-4-4-6", []string{"fd00:10:89::3", "10.88.65.1", "10.88.65.2"}},
		{network.PreferIPv6, "d-4", []string{"10.88.65.1"}},
		{network.PreferIPv4, "e-6", []string{"fd00:10:89::1"}},
		{network.PreferCNI, "f-6-4", []string{"fd00:10:89::1", "10.88.65.2"}},
	} {
		t.Run(c.id, func(t *testing.T) {
			h := newHost(t)
			h.conf.IPPref = c.pref
			h.write("10-test.conflist", h.stubConf("one", "1.0.0"))
			h.open()
			if got := h.attach(pod(c.id)).IPs; !reflect.DeepEqual(got, c.want) {
				t.Errorf("addresses %v, want %v", got, c.want)
			}
			h.detach(c.id)
		})
	}
}

// TestFailedAdd has the last plugin of the reference chain fail: host-local
// has given addresses by then, which Detach must free.
func TestFailedAdd(t *testing.T) {
	for _, c := range []struct {
		name  string
		b     behaviour
		want  string
		class func(error) bool
	}{
		{"code", behaviour{Code: 100, Msg: "no luck"}, "attach network: plugin stub: ADD: no luck (code 100)", errdefs.IsInternal},
		{"try again", behaviour{Code: 11, Msg: "later"}, "attach network: plugin stub: ADD: later (code 11)", errdefs.IsUnavailable},
		{"bad conf", behaviour{Code: 7, Msg: "what"}, "attach network: plugin stub: ADD: what (code 7)", errdefs.IsFailedPrecondition},
		{"garbage", behaviour{Garbage: "Segfault\n"}, `attach network: plugin stub: ADD: exit status 3: "Segfault"`, errdefs.IsInternal},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.write("10-test.conflist", h.bridgeConf())
			h.stub.behave(t, "ADD", c.b)
			h.open()
			ns, err := h.net.CreateNS(t.Context(), "a1")
			mustDo(t, err)
			_, err = h.net.Attach(t.Context(), pod("a1"), ns)
			if err == nil || err.Error() != c.want || !c.class(err) {
				t.Errorf("attach: %v, want %s", err, c.want)
			}
			var p *network.PluginError
			if !errors.As(err, &p) || p.Plugin != stubName || p.Command != "ADD" || p.Code != c.b.Code {
				t.Errorf("plugin error %+v", p)
			}
			if held := strings.Join(h.held(), "\n"); !strings.Contains(held, "10.88.64.") {
				t.Errorf("host-local holds nothing, the test proves nothing:\n%s", held)
			}
			h.detach("a1")
		})
	}
}

func TestMissingPlugin(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", map[string]any{"cniVersion": "1.0.0", "name": "x", "plugins": []any{
		h.stub.plugin(), map[string]any{"type": "absent"},
	}})
	h.open()
	ns, err := h.net.CreateNS(t.Context(), "a1")
	mustDo(t, err)
	_, err = h.net.Attach(t.Context(), pod("a1"), ns)
	if err == nil || !strings.Contains(err.Error(), "plugin absent: not found in") || errdefs.IsNotFound(err) {
		t.Errorf("attach: %v", err)
	}
	if err := h.net.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "plugin absent") {
		t.Errorf("ready: %v", err)
	}
	if calls := h.stub.calls(t, "ADD"); len(calls) > 0 {
		t.Errorf("%d plugins ran", len(calls))
	}
	h.detach("a1")
}

// TestPluginGone removes a plugin under an attached pod: Detach fails until it
// is back.
func TestPluginGone(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.stubConf("one", "1.0.0"))
	h.open()
	h.attach(pod("a1"))
	bin := filepath.Join(h.root, "bin", stubName)
	mustDo(t, os.Rename(bin, bin+".away"))
	err := h.net.Detach(t.Context(), pod("a1"))
	if err == nil || errdefs.IsNotFound(err) {
		t.Errorf("detach: %v, want an error that is not about the pod", err)
	}
	mustDo(t, os.Rename(bin+".away", bin))
	h.detach("a1")
}

// TestNamespaceGone takes the namespace away in several ways; the addresses
// must be freed all the same, by a DEL without a namespace.
func TestNamespaceGone(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(path string) error
	}{
		{"unmounted", func(p string) error { return unix.Unmount(p, unix.MNT_DETACH) }},
		{"deleted", func(p string) error { return errors.Join(unix.Unmount(p, unix.MNT_DETACH), os.Remove(p)) }},
		{"directory gone", func(p string) error {
			return errors.Join(unix.Unmount(p, unix.MNT_DETACH), os.RemoveAll(filepath.Dir(p)))
		}},
		{"mounted twice", func(p string) error { return unix.Mount(p, p, "", unix.MS_BIND, "") }},
		{"not a network namespace", func(p string) error {
			return errors.Join(unix.Unmount(p, unix.MNT_DETACH), unix.Mount("/proc/self/ns/uts", p, "", unix.MS_BIND, ""))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.noMasquerade = true
			h.write("10-test.conflist", h.bridgeConf())
			h.open()
			a := pod("a1")
			a.Pod.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: 18081}}
			n := h.attach(a)
			mustDo(t, c.spoil(n.NetNS))
			mustDo(t, h.net.Detach(t.Context(), a))
			if rules := hostRules(t); strings.Contains(rules, "18081") {
				t.Errorf("rules are left:\n%s", rules)
			}
			dels := h.stub.calls(t, "DEL")
			if c.name != "mounted twice" && dels[0].NetNS != "" {
				t.Errorf("DEL with namespace %s", dels[0].NetNS)
			}
		})
	}
}

// TestConfChanged detaches pods whose configuration was replaced or removed,
// by a daemon that never saw the old one.
func TestConfChanged(t *testing.T) {
	for _, c := range []struct {
		name string
		wipe func(*host) error
	}{
		{"replaced", func(h *host) error { h.write("10-test.conflist", h.stubConf("new", "1.0.0")); return nil }},
		{"removed", func(h *host) error { return os.RemoveAll(h.conf.ConfDir) }},
		{"removed, and only the cached result is left", func(h *host) error {
			return errors.Join(os.RemoveAll(h.conf.ConfDir), os.RemoveAll(filepath.Join(h.conf.CacheDir, "attachments")))
		}},
		{"removed, and what was saved is broken", func(h *host) error {
			return errors.Join(os.RemoveAll(h.conf.ConfDir),
				os.WriteFile(filepath.Join(h.conf.CacheDir, "attachments", "a1.json"), []byte(`{"id":"a1"`), 0o600))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.write("10-test.conflist", h.stubConf("old", "1.0.0"))
			h.open()
			h.attach(pod("a1"))
			mustDo(t, c.wipe(h))
			h.open()
			h.detach("a1")
			if del := h.stub.calls(t, "DEL"); len(del) != 1 || del[0].Conf["name"] != "old" || del[0].Conf["prevResult"] == nil {
				t.Errorf("DEL calls %+v, want one of the old network with its result", del)
			}
		})
	}
}

// TestCacheLost frees by the current configuration what was attached before
// the cache went.
func TestCacheLost(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.bridgeConf())
	h.open()
	h.attach(pod("a1"))
	mustDo(t, os.RemoveAll(h.conf.CacheDir))
	h.open()
	h.detach("a1")
}

// TestDetachOnce checks that repeating Detach runs no plugin, and that an
// attached pod's DEL is not left out after it.
func TestDetachOnce(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.stubConf("one", "1.0.0"))
	h.open()
	for i := range 2 {
		h.attach(pod("a1"))
		h.detach("a1", "a1", "a1")
		if got := len(h.stub.calls(t, "DEL")); got != i+1 {
			t.Errorf("%d DELs, want %d", got, i+1)
		}
	}
}

// TestDetachAfterRestart checks that a pod that was detached, or never attached,
// costs no plugin in the next daemon either.
func TestDetachAfterRestart(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.stubConf("one", "1.0.0"))
	h.open()
	h.attach(pod("a1"))
	h.detach("a1")
	h.open()
	h.detach("a1", "never")
	if got := h.stub.calls(t, "DEL"); len(got) != 1 {
		t.Errorf("%d DELs, want one: %+v", len(got), got)
	}
}

// TestGCPlugins has the plugins of specification 1.1 collect, and tells them
// what is valid.
func TestGCPlugins(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.stubConf("one", "1.1.0"))
	h.open()
	h.attach(pod("live"))
	h.attach(pod("orphan"))
	mustDo(t, h.net.GC(t.Context(), func(context.Context) ([]string, error) {
		return []string{"live", "elsewhere"}, nil
	}))
	gc := h.stub.calls(t, "GC")
	if len(gc) != 1 {
		t.Fatalf("%d GC calls", len(gc))
	}
	want := []any{
		map[string]any{"containerID": "elsewhere", "ifname": "eth0"},
		map[string]any{"containerID": "live", "ifname": "eth0"},
	}
	if got := gc[0].Conf["cni.dev/valid-attachments"]; !reflect.DeepEqual(got, any(want)) {
		t.Errorf("valid %v, want %v", got, want)
	}
	if del := h.stub.calls(t, "DEL"); len(del) != 1 || del[0].ID != "orphan" {
		t.Errorf("DEL calls %+v", del)
	}
	h.stub.behave(t, "GC", behaviour{Code: 100, Msg: "dusty"})
	err := h.net.GC(t.Context(), func(context.Context) ([]string, error) { return []string{"live"}, nil })
	if err == nil || err.Error() != "collect network leftovers: plugin stub: GC: dusty (code 100)" {
		t.Errorf("gc: %v", err)
	}
	h.detach("live")
}

// TestGCHangs lets a pod through while a GC hangs, by ending the GC.
func TestGCHangs(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.stubConf("one", "1.1.0"))
	h.stub.behave(t, "GC", behaviour{Hang: true})
	h.open()
	done := make(chan error, 1)
	go func() {
		done <- h.net.GC(context.Background(), func(context.Context) ([]string, error) { return nil, nil })
	}()
	h.stub.hanging(t)
	h.attach(pod("a1"))
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("gc: %v, want canceled", err)
	}
	h.stub.dead(t)
	h.detach("a1")
}

func TestNewRefuses(t *testing.T) {
	good := network.Config{NetNSDir: "/n", ConfDir: "/c", BinDirs: []string{"/b"}, CacheDir: "/d"}
	for name, spoil := range map[string]func(*network.Config){
		"relative netns dir": func(c *network.Config) { c.NetNSDir = "n" },
		"no conf dir":        func(c *network.Config) { c.ConfDir = "" },
		"no cache dir":       func(c *network.Config) { c.CacheDir = "" },
		"no bin dir":         func(c *network.Config) { c.BinDirs = nil },
		"preference":         func(c *network.Config) { c.IPPref = "ipv5" },
		"negative number":    func(c *network.Config) { c.MaxConfNum = -1 },
	} {
		c := good
		spoil(&c)
		if _, err := network.New(c); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want invalid argument", name, err)
		}
	}
}
