package lifecycle

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// TestNET_16_NativeHostPorts: every way to a pod's ports, in both families, where
// no plugin maps any, by every engine.
func TestNET_16_NativeHostPorts(t *testing.T) {
	t.Parallel()
	for _, e := range engines {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			nativeHostPorts(t, e.daemon(t))
		})
	}
}

func nativeHostPorts(t *testing.T, d *daemon.Daemon) {
	far := newFarHost(t, d)
	tcp, udp, bound, local := freePort(t), freePort(t), freePort(t), freePort(t)
	p := runPod(d, "web", published(
		&cri.PortMapping{ContainerPort: 8080, HostPort: tcp},
		&cri.PortMapping{ContainerPort: 8053, HostPort: udp, Protocol: cri.Protocol_UDP},
		&cri.PortMapping{ContainerPort: 8080, HostPort: bound, HostIp: far.node4},
		&cri.PortMapping{ContainerPort: 8080, HostPort: local, HostIp: "127.0.0.1"},
		&cri.PortMapping{ContainerPort: 9090},
	))
	pin := pinOf(t, d, p.id)
	answering(t, pin, "tcp", "web", 8080)
	answering(t, pin, "udp", "web", 8053)
	neighbour := runPod(d, "neighbour")
	next := pinOf(t, d, neighbour.id)
	_, next6 := addressesOf(t, d, neighbour)
	gateway6 := strings.TrimSuffix(next6, "::3") + "::1"

	for _, c := range []struct {
		what, from, host string
	}{
		{"outside", far.path, far.node4}, {"outside, IPv6", far.path, far.node6},
		{"outside, by another address", far.path, gateway(d)},
		{"the node", "", far.node4}, {"the node, by loopback", "", "127.0.0.1"}, {"the node, by another loopback address", "", "127.1.2.3"},
		{"the node, IPv6", "", far.node6},
		{"the pod itself", pin, gateway(d)}, {"the pod itself, IPv6", pin, gateway6},
		{"the pod itself, by another address", pin, far.node4},
		{"a neighbour", next, gateway(d)}, {"a neighbour, IPv6", next, gateway6},
	} {
		t.Run(c.what, func(t *testing.T) {
			answers(t, c.from, "tcp", c.host, tcp, "web")
			answers(t, c.from, "udp", c.host, udp, "web")
		})
	}
	if got := answers(t, far.path, "tcp", far.node4, tcp, "web"); !strings.Contains(got, " to "+far.client4+":") && !strings.Contains(got, "ffff:"+far.client4+"]") {
		t.Errorf("a client from outside is not seen by its own address: %q", got)
	}
	answers(t, far.path, "tcp", far.node4, bound, "web")
	silent(t, far.path, "tcp", gateway(d), bound)
	answers(t, "", "tcp", "127.0.0.1", local, "web")
	silent(t, far.path, "tcp", far.node4, local)
	silent(t, "", "tcp", "::1", tcp)

	d.Restart()
	answers(t, far.path, "tcp", far.node4, tcp, "web")
	for _, id := range []string{p.id, neighbour.id} {
		if err := removePod(d, id); err != nil {
			t.Fatal(err)
		}
	}
	silent(t, far.path, "tcp", far.node4, tcp)
	if value, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + d.Scope().Bridge + "/route_localnet"); err != nil || string(value) != "0\n" {
		t.Errorf("loopback addresses are routed by the bridge: %q, %v", value, err)
	}
	nothingLeft(t, d)
}

// TestCVE_2025_67499_OnlyWhatIsForTheNode: a host port takes what is for addresses
// of the node. What goes through the node to somebody else's port of that number
// arrives there, from outside, from a pod and in both families.
func TestCVE_2025_67499_OnlyWhatIsForTheNode(t *testing.T) {
	t.Parallel()
	d := start(t, dualBridge, withoutPortmap)
	far := newFarHost(t, d)
	port := freePort(t)
	p := runPod(d, "web", published(&cri.PortMapping{ContainerPort: 8080, HostPort: port}, &cri.PortMapping{ContainerPort: 8080, HostPort: port, Protocol: cri.Protocol_UDP}))
	neighbour := runPod(d, "neighbour")
	next4, next6 := addressesOf(t, d, neighbour)
	for _, network := range []string{"tcp", "udp"} {
		answering(t, pinOf(t, d, p.id), network, "web", 8080)
		answering(t, pinOf(t, d, neighbour.id), network, "neighbour", int(port))
		answering(t, far.path, network, "far", int(port))
		for _, host := range []string{far.node4, far.node6} {
			answers(t, far.path, network, host, port, "web")
		}
		for _, host := range []string{next4, next6} {
			answers(t, far.path, network, host, port, "neighbour")
			answers(t, "", network, host, port, "neighbour")
		}
		for _, netns := range []string{"", pinOf(t, d, p.id), pinOf(t, d, neighbour.id)} {
			answers(t, netns, network, far.client4, port, "far")
		}
	}
}

// TestNET_16_LoopbackGuard: that 127.0.0.1 of the node leads to pods does not open
// it to them (CVE-2020-8558).
func TestNET_16_LoopbackGuard(t *testing.T) {
	t.Parallel()
	d := start(t, dualBridge, withoutPortmap)
	p := runPod(d, "web", published(&cri.PortMapping{ContainerPort: 8080, HostPort: freePort(t)}))
	pin := pinOf(t, d, p.id)
	bridge := d.Scope().Bridge
	if value, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + bridge + "/route_localnet"); err != nil || string(value) != "1\n" {
		t.Fatalf("loopback addresses are not routed by the bridge: %q, %v", value, err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := int32(l.Addr().(*net.TCPAddr).Port)
	if err := inNetns(pin, func() error {
		// A pod with the right to may send a loopback address out by its route.
		for _, command := range [][]string{
			{"ip", "addr", "del", "127.0.0.1/8", "dev", "lo"}, {"ip", "route", "del", "local", "127.0.0.0/8", "dev", "lo", "table", "local"},
			{"ip", "route", "add", "127.0.0.0/8", "via", gateway(d), "dev", "eth0"},
		} {
			if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil && command[2] != "del" {
				return fmt.Errorf("%v: %w: %s", command, err, out)
			}
		}
		return os.WriteFile("/proc/sys/net/ipv4/conf/eth0/route_localnet", []byte("1"), 0)
	}); err != nil {
		t.Fatal(err)
	}
	silent(t, pin, "tcp", "127.0.0.1", port)
	// Only for the guard, which the daemon would put back.
	d.Kill()
	if out, err := exec.Command("nft", "flush", "chain", "inet", d.Scope().Table, "guard").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	go func() {
		if c, err := l.Accept(); err == nil {
			fmt.Fprint(c, "node to pod")
			c.Close()
		}
	}()
	answers(t, pin, "tcp", "127.0.0.1", port, "node")
	d.Up()
	eventually(t, soon, func() error {
		if rules := rulesOf(t, d); strings.Count(rules, " drop") != 2 {
			return fmt.Errorf("the guard is not put back: %s", rules)
		}
		return nil
	})
}

func TestNET_16_Conflict(t *testing.T) {
	t.Parallel()
	d := start(t, dualBridge, withoutPortmap)
	port := freePort(t)
	mapping := func(ip string, protocol cri.Protocol) *cri.PortMapping {
		return &cri.PortMapping{ContainerPort: 80, HostPort: port, HostIp: ip, Protocol: protocol}
	}
	has := runPod(d, "has", published(mapping("10.1.2.3", cri.Protocol_TCP)))
	try := func(name string, m *cri.PortMapping) error {
		config := d.PodConfig(name)
		published(m)(config)
		_, err := d.StartPod(t.Context(), config, "")
		return err
	}
	for _, ip := range []string{"10.1.2.3", "", "0.0.0.0"} {
		wantError(t, try("wants", mapping(ip, cri.Protocol_TCP)), codes.FailedPrecondition, fmt.Sprintf("TCP port %d", port), has.config.Metadata.Namespace+"/has", has.id)
	}
	list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil || len(list.Items) != 1 {
		t.Errorf("pods after the refusals: %v, %v", list, err)
	}
	d.Kill()
	d.Up()
	wantError(t, try("wants", mapping("", cri.Protocol_TCP)), codes.FailedPrecondition, "has")
	for name, m := range map[string]*cri.PortMapping{
		"other-protocol": mapping("", cri.Protocol_UDP), "other-address": mapping("10.1.2.4", cri.Protocol_TCP), "other-family": mapping("::", cri.Protocol_TCP),
	} {
		if err := try(name, m); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := removePod(d, has.id); err != nil {
		t.Fatal(err)
	}
	if err := try("wants", mapping("10.1.2.3", cri.Protocol_TCP)); err != nil {
		t.Errorf("after the pod that had the port: %v", err)
	}
	wantError(t, try("loopback6", mapping("::1", cri.Protocol_UDP)), codes.FailedPrecondition, "loopback")
}

// TestNET_16_Flows: a client that goes on sending datagrams from one port follows
// its port of the node from nobody to a pod, and to the next one.
func TestNET_16_Flows(t *testing.T) {
	t.Parallel()
	d := start(t, dualBridge, withoutPortmap)
	far := newFarHost(t, d)
	port := freePort(t)
	for _, to := range []string{far.node4, far.node6} {
		var c net.Conn
		if err := inNetns(far.path, func() (err error) { c, err = net.Dial("udp", address(to, port)); return err }); err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if got, err := hear(c); err == nil {
			t.Fatalf("nobody answers %q", got)
		}
		for _, name := range []string{"first", "second"} {
			p := runPod(d, name, published(&cri.PortMapping{ContainerPort: 53, HostPort: port, Protocol: cri.Protocol_UDP}))
			answering(t, pinOf(t, d, p.id), "udp", name, 53)
			eventually(t, soon, func() error {
				got, err := hear(c)
				if err == nil && !strings.HasPrefix(got, name+" to ") {
					err = fmt.Errorf("the answer is %q", got)
				}
				return err
			})
			if err := removePod(d, p.id); err != nil {
				t.Fatal(err)
			}
			if got, err := hear(c); err == nil {
				t.Fatalf("after %s answers %q", name, got)
			}
		}
	}
}

// TestNET_16_Recovery: after a daemon was killed, what is in the kernel is put
// right: what somebody removed comes back, what is no pod's goes.
func TestNET_16_Recovery(t *testing.T) {
	t.Parallel()
	d := start(t, dualBridge, withoutPortmap)
	far := newFarHost(t, d)
	port := freePort(t)
	p := runPod(d, "web", published(&cri.PortMapping{ContainerPort: 8080, HostPort: port}))
	answering(t, pinOf(t, d, p.id), "tcp", "web", 8080)
	nft := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("nft", args...).CombinedOutput(); err != nil {
			t.Fatalf("nft %v: %v: %s", args, err, out)
		}
	}
	table := d.Scope().Table
	gone := strings.Repeat("0123456789abcdef", 4)
	for what, harm := range map[string]func(){
		"the table is gone": func() { nft("delete", "table", "inet", table) },
		"the daemon died before loopback addresses were routed": func() {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+d.Scope().Bridge+"/route_localnet", []byte("0"), 0); err != nil {
				t.Fatal(err)
			}
		},
		"the rules are gone": func() { nft("flush", "table", "inet", table) },
		"a pod that is none has a port": func() {
			nft("add", "element", "inet", table, "any4", `{ tcp . 1 comment "`+gone+`" : 10.1.2.3 . 80 }`)
		},
	} {
		t.Run(what, func(t *testing.T) {
			d.Kill()
			answers(t, far.path, "tcp", far.node4, port, "web") // without a daemon
			harm()
			d.Up()
			answers(t, far.path, "tcp", far.node4, port, "web")
			answers(t, "", "tcp", "127.0.0.1", port, "web")
			eventually(t, soon, func() error {
				if rules := rulesOf(t, d); strings.Contains(rules, gone) || !strings.Contains(rules, p.id) {
					return fmt.Errorf("rules are %s", rules)
				}
				return nil
			})
		})
	}
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, d)
}

// TestNET_16_RulesPutBack: what somebody removes comes back, while the daemon runs
// and when it was killed meanwhile.
func TestNET_16_RulesPutBack(t *testing.T) {
	t.Parallel()
	for _, e := range engines {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			d := e.daemon(t)
			far := newFarHost(t, d)
			port := freePort(t)
			p := runPod(d, "web", published(&cri.PortMapping{ContainerPort: 8080, HostPort: port}))
			answering(t, pinOf(t, d, p.id), "tcp", "web", 8080)
			reached := func() {
				t.Helper()
				answers(t, far.path, "tcp", far.node4, port, "web")
				answers(t, far.path, "tcp", far.node6, port, "web")
				answers(t, "", "tcp", "127.0.0.1", port, "web")
			}
			reached()
			for _, killed := range []bool{false, true} {
				for _, script := range e.harms {
					if killed {
						d.Kill()
					}
					script = strings.NewReplacer("NAME", d.Scope().Table, "BRIDGE", d.Scope().Bridge).Replace(script)
					if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
						t.Fatalf("%s: %v: %s", script, err, out)
					}
					if killed {
						d.Up()
					}
					reached()
				}
			}
			if err := removePod(d, p.id); err != nil {
				t.Fatal(err)
			}
			nothingLeft(t, d)
		})
	}
}

// TestNET_16_KernelWithoutNFTables: where there is no nftables, neither for the
// daemon nor for the tools that it finds first, ports are mapped without being told
// how.
func TestNET_16_KernelWithoutNFTables(t *testing.T) {
	t.Parallel()
	nativeHostPorts(t, start(t, append(onOldKernel(t), dualBridge, withoutPortmap)...))
}

// TestNET_16_EngineChanges: pods keep their ports when the daemon is told to map
// them with the other engine.
func TestNET_16_EngineChanges(t *testing.T) {
	t.Parallel()
	d := start(t, dualBridge, withoutPortmap, hostPorts("nftables"))
	file := filepath.Join(d.Dir, "config.toml")
	port := freePort(t)
	p := runPod(d, "web", published(&cri.PortMapping{ContainerPort: 8080, HostPort: port}))
	answering(t, pinOf(t, d, p.id), "tcp", "web", 8080)
	answers(t, "", "tcp", gateway(d), port, "web")
	for _, change := range [][2]string{{"nftables", "iptables"}, {"iptables", "nftables"}} {
		before, way := change[0], change[1]
		config, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(strings.Replace(string(config), before, way, 1)), 0); err != nil {
			t.Fatal(err)
		}
		d.Restart()
		eventually(t, soon, func() error {
			if mapped := strings.Contains(rulesOf(t, d), p.id); mapped != (way == "nftables") {
				return fmt.Errorf("mapped by nftables: %t, with %s", mapped, way)
			}
			return nil
		})
		answers(t, "", "tcp", gateway(d), port, "web")
		answers(t, "", "tcp", "127.0.0.1", port, "web")
	}
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, d)
}

// TestNET_16_Crash kills the daemon at random moments of the lives of pods that
// have a port of the node.
func TestNET_16_Crash(t *testing.T) {
	t.Parallel()
	for _, e := range engines[:2] {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			d := e.daemon(t)
			img := plain(t, d)
			port := freePort(t)
			crashes(t, d, func(cycle string) error {
				return life(d, cycle, img, published(&cri.PortMapping{ContainerPort: 80, HostPort: port}))
			})
		})
	}
}

// TestNET_17_HostPortMappingOff: nobody maps a port when it is switched off, and
// gantry does not where it is left to plugins.
func TestNET_17_HostPortMappingOff(t *testing.T) {
	t.Parallel()
	portmap := `{"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}`
	for _, c := range []struct {
		way, list string
		mapped    bool // by the plugin
	}{
		{"off", conflist("1.1.0", bridged, portmap), false},
		{"off", conflist("1.1.0", bridged), false},
		{"cni", conflist("1.1.0", bridged), false},
		{"cni", conflist("1.1.0", bridged, portmap), true},
		{"auto", conflist("1.1.0", bridged, portmap), true},
	} {
		t.Run(fmt.Sprintf("%s, portmap %t", c.way, strings.Contains(c.list, portmap)), func(t *testing.T) {
			t.Parallel()
			d := start(t, daemon.Conflist(c.list), hostPorts(c.way))
			port := freePort(t)
			p := runPod(d, "web", published(&cri.PortMapping{ContainerPort: 8080, HostPort: port}))
			answering(t, pinOf(t, d, p.id), "tcp", "web", 8080)
			answers(t, "", "tcp", ipOf(t, d, p), 8080, "web")
			if rules := rulesOf(t, d); rules != "" {
				t.Errorf("there are rules: %s", rules)
			}
			if c.mapped {
				answers(t, "", "tcp", gateway(d), port, "web")
			} else {
				silent(t, "", "tcp", gateway(d), port)
			}
		})
	}
	t.Run("native, portmap true", func(t *testing.T) {
		t.Parallel()
		d := start(t, daemon.Conflist(conflist("1.1.0", bridged, portmap)), hostPorts("native"))
		port := freePort(t)
		p := runPod(d, "web", published(&cri.PortMapping{ContainerPort: 8080, HostPort: port}))
		answering(t, pinOf(t, d, p.id), "tcp", "web", 8080)
		answers(t, "", "tcp", gateway(d), port, "web")
		all, err := exec.Command("nft", "list", "ruleset").Output()
		if err != nil {
			t.Fatal(err)
		}
		others := strings.Replace(string(all), rulesOf(t, d), "", 1)
		if strings.Contains(others, p.id) {
			t.Errorf("the plugin mapped the port, too: %s", others)
		}
	})
}

// TestNET_18_SCTPHostPort sends the first packet of an association to the node. The
// packets are made and read by the test, as kernels that lead SCTP to pods need not
// have sockets of it.
func TestNET_18_SCTPHostPort(t *testing.T) {
	t.Parallel()
	d := start(t, dualBridge, withoutPortmap)
	far := newFarHost(t, d)
	port := freePort(t)
	p := runPod(d, "signals", published(&cri.PortMapping{ContainerPort: 3868, HostPort: port, Protocol: cri.Protocol_SCTP}))
	v4, v6 := addressesOf(t, d, p)
	for _, to := range []string{v4, v6} {
		if rules := rulesOf(t, d); !strings.Contains(rules, fmt.Sprintf(`sctp . %d comment "%s" : %s . 3868`, port, p.id, to)) {
			t.Errorf("no rule that leads to %s: %s", to, rules)
		}
	}
	pod, client := rawSCTP(t, pinOf(t, d, p.id)), rawSCTP(t, far.path)
	to := &unix.SockaddrInet4{Addr: [4]byte(net.ParseIP(far.node4).To4())}
	eventually(t, soon, func() error {
		if err := unix.Sendto(client, sctpInit(4444, uint16(port)), 0, to); err != nil {
			return err
		}
		packet := make([]byte, 1500)
		n, err := unix.Read(pod, packet)
		if err != nil {
			return err
		}
		header := int(packet[0]&0xf) * 4
		if n < header+4 {
			return fmt.Errorf("%d bytes", n)
		}
		from, got := binary.BigEndian.Uint16(packet[header:]), binary.BigEndian.Uint16(packet[header+2:])
		if from != 4444 || got != 3868 || net.IP(packet[12:16]).String() != far.client4 {
			return fmt.Errorf("a packet from %s port %d to port %d", net.IP(packet[12:16]), from, got)
		}
		return nil
	})
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, d)
}
