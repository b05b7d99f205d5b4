package lifecycle

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// bridged is the plugin that connects pods to the daemon's bridge, with what
// stands for TYPE in its place.
const bridged = `{"type": "bridge", "bridge": "BRIDGE", "isGateway": true, "hairpinMode": true,
	"ipam": {"type": "host-local", "dataDir": "IPAM", "ranges": [[{"subnet": "SUBNET"}]], "routes": [{"dst": "0.0.0.0/0"}]}}`

// conflist is a network of the given plugins.
func conflist(version string, plugins ...string) string {
	return fmt.Sprintf(`{"cniVersion": %q, "name": "NETWORK", "plugins": [%s]}`, version, strings.Join(plugins, ", "))
}

// useConflist changes the default network until the test ends. The test must
// not be parallel on the shared daemon.
func useConflist(t *testing.T, d *daemon.Daemon, json string) {
	t.Helper()
	old, err := os.ReadFile(d.Conflist())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.WriteConflist(json); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.WriteConflist(string(old)); err != nil {
			t.Error(err)
		}
	})
}

// serve runs a web server with the page of every image in the pod.
func (p pod) serve(t *testing.T, d *daemon.Daemon, port int) string {
	t.Helper()
	return p.run(d, daemon.ContainerConfig("server", plain(t, d), "httpd", "-f", "-p", fmt.Sprint(port), "-h", "/www"))
}

// browser keeps no connection, as each may take another way.
var browser = &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// browse gets the page from this process's network.
func browse(address string) error {
	resp, err := browser.Get("http://" + address + "/")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err == nil && string(page) != "hello from the pod\n" {
		err = fmt.Errorf("the page is %q", page)
	}
	return err
}

// browsed waits until browse succeeds.
func browsed(t *testing.T, address string) {
	t.Helper()
	eventually(t, soon, func() error { return browse(address) })
}

func ipOf(t *testing.T, d *daemon.Daemon, p pod) string {
	t.Helper()
	return podStatus(t, d, p.id).Network.GetIp()
}

// TestNET_01_AddAndDel: lists of plugins in every version of the specification.
func TestNET_01_AddAndDel(t *testing.T) {
	t.Parallel()
	d := start(t)
	tuning := `{"type": "tuning", "mtu": 1400}`
	portmap := `{"type": "portmap", "capabilities": {"portMappings": true}}`
	ptp := `{"type": "ptp", "mtu": 1400, "ipam": {"type": "host-local", "dataDir": "IPAM", "ranges": [[{"subnet": "SUBNET"}]], "routes": [{"dst": "0.0.0.0/0"}]}}`
	for name, list := range map[string]string{
		"0.3.1": conflist("0.3.1", bridged, tuning, portmap),
		"0.4.0": conflist("0.4.0", bridged, tuning, portmap),
		"1.0.0": conflist("1.0.0", bridged, tuning, portmap),
		"1.1.0": conflist("1.1.0", bridged, tuning, portmap),
		"ptp":   conflist("1.0.0", ptp, portmap),
	} {
		t.Run(name, func(t *testing.T) {
			useConflist(t, d, list)
			p := runPod(d, "net-01")
			ctr := p.serve(t, d, 8080)
			ip := ipOf(t, d, p)
			browsed(t, net.JoinHostPort(ip, "8080"))
			if got := sh(d, ctr, "cat /sys/class/net/eth0/mtu; ip -4 -o addr show eth0 | grep -c "+ip+"/"); got != "1400\n1" {
				t.Errorf("MTU and address %s: %q", ip, got)
			}
			if err := removePod(d, p.id); err != nil {
				t.Fatal(err)
			}
			if exists(ipamFile(d, ip)) || browse(net.JoinHostPort(ip, "8080")) == nil {
				t.Errorf("after DEL address %s is in use", ip)
			}
			nothingLeft(t, d)
		})
	}
}

func TestNET_03_Status(t *testing.T) {
	t.Parallel()
	d := start(t, stubNetwork)
	eventually(t, soon, func() error { return networkReady(t, d) })
	for _, code := range []int{50, 51} {
		undo := order(t, d, "STATUS", "", stubOrder{Code: code, Msg: fmt.Sprintf("no link %d", code)})
		if code == 50 { // a new configuration is looked at at once, an old one now and then
			useConflist(t, d, stubConflist(d.Dir)+" ")
		}
		eventually(t, soon, func() error {
			reason := networkReady(t, d)
			if reason == nil {
				return errors.New("the network is ready though its plugin says it is not")
			}
			for _, want := range []string{"NetworkPluginNotReady", stubPlugin, fmt.Sprintf("no link %d", code)} {
				if !strings.Contains(fmt.Sprint(reason), want) {
					t.Errorf("%q is not in the reason %v", want, reason)
				}
			}
			return nil
		})
		undo()
		eventually(t, soon, func() error { return networkReady(t, d) })
	}
}

// stubNetwork makes the stub the default network too.
var stubNetwork = daemon.Edit(func(in *daemon.Instance, _ daemon.Config) {
	must(os.WriteFile(in.Conflist(), []byte(stubConflist(in.Dir)), 0o644))
})

func TestNET_06_ConfDir(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Conflist(""), daemon.Set("0s", "plugins", daemon.RuntimePlugin, "cni", "ready_timeout"))
	write := func(name, address string) {
		t.Helper()
		text := strings.Replace(stubConflist(d.Dir), `"control"`, fmt.Sprintf(`"addresses": [%q], "control"`, address), 1)
		tmp := filepath.Join(d.Dir, "conf.new")
		if err := errors.Join(os.WriteFile(tmp, []byte(text), 0o644), os.Rename(tmp, filepath.Join(d.CNIDir, name))); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(path string) {
		t.Helper()
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}
	notReady := func(why string) {
		t.Helper()
		eventually(t, soon, func() error {
			if err := networkReady(t, d); err == nil || !strings.Contains(fmt.Sprint(err), why) {
				return fmt.Errorf("want not ready because of %s, got %v", why, err)
			}
			return nil
		})
	}
	// A pod gets its network from what is there now.
	gets := func(address string) {
		t.Helper()
		eventually(t, soon, func() error { return networkReady(t, d) })
		eventually(t, soon, func() error {
			p := runPod(d, "reader")
			got := ipOf(t, d, p)
			if err := removePod(d, p.id); err != nil {
				t.Fatal(err)
			}
			if got+"/24" != address {
				return fmt.Errorf("address is %s, want %s", got, address)
			}
			return nil
		})
	}

	notReady(d.CNIDir)
	_, err := d.StartPod(t.Context(), d.PodConfig("too-early"), "")
	wantError(t, err, codes.Unavailable, "attach network", d.CNIDir)
	write("20-b.conflist", "10.99.2.2/24")
	gets("10.99.2.2/24")
	write("10-a.conflist", "10.99.1.1/24")
	gets("10.99.1.1/24")
	write("10-a.conflist", "10.99.3.3/24")
	gets("10.99.3.3/24")
	remove(filepath.Join(d.CNIDir, "10-a.conflist"))
	gets("10.99.2.2/24")
	if err := os.WriteFile(filepath.Join(d.CNIDir, "05-broken.conflist"), []byte(`{"cniVersion": `), 0o644); err != nil {
		t.Fatal(err)
	}
	notReady("05-broken.conflist")
	remove(filepath.Join(d.CNIDir, "05-broken.conflist"))
	gets("10.99.2.2/24")
	remove(d.CNIDir)
	notReady(d.CNIDir)
	if err := os.Mkdir(d.CNIDir, 0o755); err != nil {
		t.Fatal(err)
	}
	write("10-c.conflist", "10.99.4.4/24")
	gets("10.99.4.4/24")
}

func TestNET_09_ConfDirOfHandler(t *testing.T) {
	t.Parallel()
	d := shared(t)
	one, other := d.RunPod(d.PodConfig("default-network")), d.RunPodWith(d.PodConfig("handlers-network"), stubHandler)
	if ip := podStatus(t, d, one).Network.Ip; !d.Scope().Subnet.Contains(netip.MustParseAddr(ip)) {
		t.Errorf("with the default handler the address is %s", ip)
	}
	if ip := podStatus(t, d, other).Network.Ip; ip+"/24" != stubAddress {
		t.Errorf("with the other handler the address is %s", ip)
	}
	if err := errors.Join(removePod(d, one), removePod(d, other)); err != nil {
		t.Error(err)
	}
	if got := commandsOf(stubCalls(t, d, "handlers-network")); got != "ADD DEL" {
		t.Errorf("its network was called for %q", got)
	}
	if got := stubCalls(t, d, "default-network"); len(got) != 0 {
		t.Errorf("the other pod's too: %v", got)
	}
}

func TestNET_10_ConfTemplate(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Conflist(""), daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		s := in.Scope()
		text := strings.NewReplacer("BRIDGE", s.Bridge, "IPAM", s.IPAM, "NETWORK", s.Network, "SUBNET", "{{.PodCIDR}}",
			`[{"dst": "0.0.0.0/0"}]`, `[{{range $i, $r := .Routes}}{{if $i}}, {{end}}{"dst": "{{$r}}"}{{end}}]`).
			Replace(conflist("1.0.0", bridged))
		path := filepath.Join(in.Dir, "template")
		must(os.WriteFile(path, []byte(text), 0o644))
		c.Set(path, "plugins", daemon.RuntimePlugin, "cni", "conf_template")
	}))
	subnet := d.Scope().Subnet
	rt, _ := d.CRI()
	cidr := &cri.RuntimeConfig{NetworkConfig: &cri.NetworkConfig{PodCidr: subnet.String()}}
	if err := rt.UpdateRuntimeConfig(t.Context(), cidr); err != nil {
		t.Fatal(err)
	}
	eventually(t, soon, func() error { return networkReady(t, d) })
	p := runPod(d, "from-template")
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	if ip := ipOf(t, d, p); !subnet.Contains(netip.MustParseAddr(ip)) {
		t.Errorf("address is %s, the range %s", ip, subnet)
	}
	if got := sh(d, ctr, "ip route | grep -c ^default"); got != "1" {
		t.Errorf("%s default routes", got)
	}
	// A configuration that is there is nobody's to overwrite.
	files, err := filepath.Glob(filepath.Join(d.CNIDir, "*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("files %q, %v", files, err)
	}
	before, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	cidr.NetworkConfig.PodCidr = "10.1.0.0/16"
	if err := rt.UpdateRuntimeConfig(t.Context(), cidr); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(files[0]); err != nil || string(after) != string(before) {
		t.Errorf("the configuration became %s, %v", after, err)
	}
}

func TestNET_11_ArgsAndCapabilities(t *testing.T) {
	t.Parallel()
	d := shared(t)
	config := d.PodConfig("described")
	config.PortMappings = []*cri.PortMapping{
		{Protocol: cri.Protocol_UDP, ContainerPort: 53, HostPort: 5353, HostIp: "10.1.2.3"}, {ContainerPort: 80},
	}
	config.DnsConfig = &cri.DNSConfig{Servers: []string{"10.10.10.10"}, Searches: []string{"a.local"}, Options: []string{"ndots:5"}}
	config.Annotations = map[string]string{
		"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "20M", "some.example/note": "told",
	}
	id := d.RunPodWith(config, stubHandler)
	if err := removePod(d, id); err != nil {
		t.Fatal(err)
	}
	calls := stubCalls(t, d, "described")
	if commandsOf(calls) != "ADD DEL" {
		t.Fatalf("calls are %q", commandsOf(calls))
	}
	for _, c := range calls {
		for k, want := range map[string]string{
			"K8S_POD_NAME": "described", "K8S_POD_NAMESPACE": "test", "K8S_POD_UID": config.Metadata.Uid,
			"K8S_POD_INFRA_CONTAINER_ID": id, "IgnoreUnknown": "1",
		} {
			if c.Args[k] != want {
				t.Errorf("%s: %s is %q, want %q", c.Command, k, c.Args[k], want)
			}
		}
		if c.ID != id || c.IfName != "eth0" || !strings.HasPrefix(c.NetNS, d.State) {
			t.Errorf("%s: called for %s, %s in %s", c.Command, c.ID, c.IfName, c.NetNS)
		}
		told(t, c, config)
	}
}

// told checks the capability arguments of a call.
func told(t *testing.T, c stubCall, config *cri.PodSandboxConfig) {
	t.Helper()
	var conf struct{ RuntimeConfig map[string]json.RawMessage }
	if err := json.Unmarshal(c.Conf, &conf); err != nil {
		t.Fatal(err)
	}
	cgroup, err := json.Marshal(config.Linux.CgroupParent)
	if err != nil {
		t.Fatal(err)
	}
	for name, words := range map[string][]string{
		"portMappings":                      {`"hostPort":5353`, `"containerPort":53`, `"protocol":"udp"`, `"hostIP":"10.1.2.3"`},
		"bandwidth":                         {`"ingressRate":10000000`, `"egressRate":20000000`},
		"dns":                               {"10.10.10.10", "a.local", "ndots:5"},
		"cgroupPath":                        {string(cgroup)},
		"io.kubernetes.cri.pod-annotations": {`"some.example/note":"told"`},
	} {
		for _, w := range words {
			if !strings.Contains(string(conf.RuntimeConfig[name]), w) {
				t.Errorf("%s: capability %s is %s, without %s", c.Command, name, conf.RuntimeConfig[name], w)
			}
		}
	}
	if strings.Contains(string(conf.RuntimeConfig["portMappings"]), `"containerPort":80`) {
		t.Errorf("%s: a port without a host port is passed on: %s", c.Command, conf.RuntimeConfig["portMappings"])
	}
}

func TestNET_12_Loopback(t *testing.T) {
	t.Parallel()
	d := shared(t)
	config := d.PodConfig("looped")
	p := pod{d.RunPodWith(config, stubHandler), config} // its plugin does nothing at all
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	for _, to := range []string{"127.0.0.1", "::1"} {
		if out, code := tryExec(t, d, ctr, "ping", "-c", "1", "-W", "2", to); code != 0 {
			t.Errorf("ping %s: %s", to, out)
		}
	}
}

func TestNET_13_InternalLoopback(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		cni := c["plugins"].(daemon.Config)[daemon.RuntimePlugin].(daemon.Config)["cni"].(daemon.Config)
		dir := filepath.Join(in.Dir, "few")
		must(os.Mkdir(dir, 0o755))
		for _, bin := range cni["bin_dirs"].([]string) {
			for _, name := range []string{"bridge", "host-local", "portmap"} {
				if _, err := os.Stat(filepath.Join(bin, name)); err == nil {
					must(os.Symlink(filepath.Join(bin, name), filepath.Join(dir, name)))
				}
			}
		}
		cni["bin_dirs"], cni["use_internal_loopback"] = []string{dir}, true
	}))
	p := runPod(d, "looped")
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	if out, code := tryExec(t, d, ctr, "ping", "-c", "1", "-W", "2", "127.0.0.1"); code != 0 {
		t.Errorf("ping: %s", out)
	}
}

func TestNET_14_DualStack(t *testing.T) {
	t.Parallel()
	dual := strings.Replace(bridged, `[{"subnet": "SUBNET"}]`, `[{"subnet": "fd00:213::/64"}], [{"subnet": "SUBNET"}]`, 1)
	for pref, first := range map[string]string{"": "4", "ipv4": "4", "ipv6": "6", "cni": "6"} {
		t.Run("prefer "+pref, func(t *testing.T) {
			t.Parallel()
			d := start(t, daemon.Conflist(conflist("1.0.0", dual)), daemon.Set(pref, "plugins", daemon.RuntimePlugin, "cni", "ip_pref"))
			p := runPod(d, "dual")
			n := podStatus(t, d, p.id).Network
			if len(n.AdditionalIps) != 1 {
				t.Fatalf("addresses are %v", n)
			}
			family := map[bool]string{true: "4", false: "6"}
			if got := family[netip.MustParseAddr(n.Ip).Is4()] + family[netip.MustParseAddr(n.AdditionalIps[0].Ip).Is4()]; got != first+map[string]string{"4": "6", "6": "4"}[first] {
				t.Errorf("addresses in order: %s, %v", n.Ip, n.AdditionalIps)
			}
			ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
			for _, ip := range []string{n.Ip, n.AdditionalIps[0].Ip} {
				if got := sh(d, ctr, "ip -o addr show eth0 | grep -c ' "+ip+"/'"); got != "1" {
					t.Errorf("%s is not on eth0", ip)
				}
			}
		})
	}
}

// freePort is a port of the host that nobody uses at the moment.
func freePort(t *testing.T) int32 {
	t.Helper()
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return int32(l.Addr().(*net.TCPAddr).Port)
}

// gateway is the host's address on the daemon's bridge.
func gateway(d *daemon.Daemon) string { return d.Scope().Subnet.Addr().Next().String() }

func address(host string, port int32) string { return net.JoinHostPort(host, fmt.Sprint(port)) }

func TestPOD_06_PortMappings(t *testing.T) {
	t.Parallel()
	d := shared(t)
	tcp, bound, udp := freePort(t), freePort(t), freePort(t)
	p := runPod(d, "mapped", func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{
			{ContainerPort: 8080, HostPort: tcp},
			{ContainerPort: 8080, HostPort: bound, HostIp: "127.0.0.1"},
			{Protocol: cri.Protocol_UDP, ContainerPort: 8053, HostPort: udp},
			{ContainerPort: 8080},
		}
	})
	p.serve(t, d, 8080)
	echoUDP(t, pinOf(t, d, p.id), "0.0.0.0:8053")
	browsed(t, address(gateway(d), tcp))
	browsed(t, address("127.0.0.1", bound))
	if err := browse(address(gateway(d), bound)); err == nil {
		t.Error("a port of 127.0.0.1 answers on another address")
	}
	if err := browse(address(gateway(d), 8080)); err == nil {
		t.Error("a port without a host port is mapped")
	}
	conn, err := net.Dial("udp", address(gateway(d), udp))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, soon, func() error {
		if _, err := conn.Write([]byte("echo")); err != nil {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			return err
		}
		answer := make([]byte, 10)
		n, err := conn.Read(answer)
		if err == nil && string(answer[:n]) != "echo" {
			err = fmt.Errorf("answer is %q", answer[:n])
		}
		return err
	})
}

// echoUDP answers every datagram to an address in a network namespace with the
// same until the test ends.
func echoUDP(t *testing.T, netns, address string) {
	t.Helper()
	answerUDP(t, netns, "udp4", address, func(got []byte, _ net.Addr) []byte { return got })
}

// answerUDP answers every datagram to an address in a network namespace until the
// test ends.
func answerUDP(t *testing.T, netns, network, address string, answer func(got []byte, from net.Addr) []byte) {
	t.Helper()
	var conn net.PacketConn
	if err := inNetns(netns, func() (err error) {
		conn, err = net.ListenPacket(network, address)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buffer := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buffer)
			if err != nil {
				return // closed
			}
			_, _ = conn.WriteTo(answer(buffer[:n], from), from) // one that is lost is asked for again
		}
	}()
	t.Cleanup(func() { conn.Close(); <-done })
}

func TestNET_15_HostPorts(t *testing.T) {
	d := shared(t)
	port := freePort(t)
	p := runPod(d, "published", func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{{ContainerPort: 8080, HostPort: port}}
	})
	server := p.serve(t, d, 8080)
	host := address(gateway(d), port)
	browsed(t, host)
	browsed(t, address("127.0.0.1", port))
	neighbour := runPod(d, "neighbour")
	client := neighbour.run(d, daemon.ContainerConfig("main", plain(t, d)))
	fetched(t, d, client, gateway(d), int(port))
	fetched(t, d, server, gateway(d), int(port)) // the pod itself, around the corner
	d.Restart()
	browsed(t, host)
	for _, id := range []string{p.id, neighbour.id} {
		if err := removePod(d, id); err != nil {
			t.Fatal(err)
		}
	}
	if browse(host) == nil {
		t.Error("the port answers after the pod")
	}
	nothingLeft(t, d) // no rule of any firewall tool among it
}

func TestNET_19_Bandwidth(t *testing.T) {
	d := shared(t)
	useConflist(t, d, conflist("1.0.0", bridged, `{"type": "bandwidth", "capabilities": {"bandwidth": true}}`))
	limit := func(in, out string) func(*cri.PodSandboxConfig) {
		return func(c *cri.PodSandboxConfig) {
			c.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": in, "kubernetes.io/egress-bandwidth": out}
		}
	}
	before := shapers(t)
	p := runPod(d, "limited", limit("10M", "30M"))
	var rates []uint64
	for handle, rate := range shapers(t) {
		if _, old := before[handle]; !old {
			rates = append(rates, rate*8)
		}
	}
	slices.Sort(rates)
	if !slices.Equal(rates, []uint64{10e6, 30e6}) {
		t.Errorf("limits in bit/s are %v", rates)
	}
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	eventually(t, soon, func() error {
		if left := shapers(t); len(left) != len(before) {
			return fmt.Errorf("limits left: %v, before %v", left, before)
		}
		return nil
	})
	for _, bad := range []string{"much", "1", "2P", "-1M"} {
		config := d.PodConfig("badly-limited")
		limit(bad, "10M")(config)
		_, err := d.StartPod(t.Context(), config, "")
		wantError(t, err, codes.InvalidArgument, "kubernetes.io/ingress-bandwidth", bad)
	}
}

// shapers are the token bucket filters of the host's interfaces, in bytes per
// second, by interface.
func shapers(t *testing.T) map[string]uint64 {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]uint64{}
	for _, l := range links {
		disciplines, err := netlink.QdiscList(l)
		if err != nil {
			continue // the interface is gone
		}
		for _, q := range disciplines {
			if tbf, ok := q.(*netlink.Tbf); ok {
				found[l.Attrs().Name] = tbf.Rate
			}
		}
	}
	return found
}

// pinOf is the path at which the pod's network namespace is pinned.
func pinOf(t *testing.T, d *daemon.Daemon, id string) string {
	t.Helper()
	for _, path := range netnsMounts(t, d) {
		if strings.HasSuffix(path, "-"+id) {
			return path // a pod's, which need not have a process
		}
	}
	process := id
	if stock { // its names are others, and a pod need not have a process there either
		list, err := d.Runtime().ListContainers(t.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: id}})
		if err == nil && len(list.Containers) > 0 {
			process = list.Containers[0].Id
		}
	}
	ns := nsOf(t, pidOf(t, d, process), "net")
	for _, path := range netnsMounts(t, d) {
		info, err := os.Stat(path)
		if err == nil && ns == fmt.Sprintf("net:[%d]", inode(info)) {
			return path
		}
	}
	t.Fatalf("%s of pod %s is nowhere in %q", ns, id, netnsMounts(t, d))
	return ""
}

func TestNET_20_Netns(t *testing.T) {
	d := shared(t)
	p := runPod(d, "pinned")
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	path := pinOf(t, d, p.id)
	if pinOf(t, d, ctr) != path {
		t.Error("the container is in another namespace")
	}
	d.Kill()
	if !slices.Contains(netnsMounts(t, d), path) {
		t.Error("the namespace went with the daemon")
	}
	d.Up()
	if pinOf(t, d, ctr) != path {
		t.Error("after a restart it is another namespace")
	}
	if err := stopPod(d, p.id); err != nil {
		t.Fatal(err)
	}
	if exists(path) || len(netnsMounts(t, d)) != 0 {
		t.Errorf("after the stop there are %q", netnsMounts(t, d))
	}
}

func TestNET_23_NetnsGone(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "unpinned")
	ip := ipOf(t, d, p)
	if err := unix.Unmount(pinOf(t, d, p.id), unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(stopPod(d, p.id), removePod(d, p.id)); err != nil {
		t.Fatal(err)
	}
	if exists(ipamFile(d, ip)) {
		t.Errorf("address %s is still given out", ip)
	}

	config := d.PodConfig("unpinned-stub")
	id := d.RunPodWith(config, stubHandler)
	path := pinOf(t, d, id)
	if err := errors.Join(unix.Unmount(path, unix.MNT_DETACH), os.Remove(path)); err != nil {
		t.Fatal(err)
	}
	if err := removePod(d, id); err != nil {
		t.Fatal(err)
	}
	calls := stubCalls(t, d, "unpinned-stub")
	if commandsOf(calls) != "ADD DEL" || calls[len(calls)-1].NetNS != "" {
		t.Errorf("calls are %+v", calls)
	}
}

// TestNET_24_FailingDel: a DEL that fails is an error that says so, keeps what
// it needs to be repeated, and is repeated until it succeeds, by the kubelet or
// without it.
func TestNET_24_FailingDel(t *testing.T) {
	t.Parallel()
	d := shared(t)
	config := d.PodConfig("sticky")
	p := pod{d.RunPodWith(config, stubHandler), config}
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	pid := pidOf(t, d, ctr)
	mend := order(t, d, "DEL", "sticky", stubOrder{Code: 11, Msg: "the address server is away"})
	for range 3 {
		wantError(t, stopPod(d, p.id), codes.Unavailable, "detach network", stubPlugin, "the address server is away")
	}
	waitGone(t, pid)
	if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("pod is %s", s.State)
	}
	if calls := stubCalls(t, d, "sticky"); !strings.HasPrefix(commandsOf(calls), "ADD DEL DEL DEL") {
		t.Errorf("calls are %q", commandsOf(calls))
	}
	pinned := func() bool {
		return slices.ContainsFunc(netnsMounts(t, d), func(m string) bool { return strings.Contains(m, p.id) })
	}
	if !pinned() {
		t.Error("the namespace is gone before DEL succeeded")
	}
	mend()
	eventually(t, soon, func() error { // nobody asks for it
		if pinned() {
			return errors.New("the namespace is still pinned")
		}
		return nil
	})
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
}

// TestNET_05_CollectedLater: what could not be collected at the start is collected
// later.
func TestNET_05_CollectedLater(t *testing.T) {
	t.Parallel()
	d := start(t, stubNetwork)
	collections := func(more int) func() error {
		have := strings.Count(commandsOf(stubCalls(t, d, "")), "GC")
		return func() error {
			if now := strings.Count(commandsOf(stubCalls(t, d, "")), "GC"); now < have+more {
				return fmt.Errorf("%d collections, there were %d", now, have)
			}
			return nil
		}
	}
	d.Stop()
	mend := order(t, d, "GC", "", stubOrder{Code: 11, Msg: "not now"})
	failed := collections(2)
	d.Up()
	eventually(t, 3*soon, failed)
	succeeded := collections(1)
	mend()
	eventually(t, 3*soon, succeeded)
}

// TestNET_24_DelOnce: a restart runs no plugin for pods that are stopped and not
// yet removed, nor does their removal.
func TestNET_24_DelOnce(t *testing.T) {
	d := shared(t)
	config := d.PodConfig("given-back")
	id := d.RunPodWith(config, stubHandler)
	if err := stopPod(d, id); err != nil {
		t.Fatal(err)
	}
	looked := func() int { return strings.Count(d.Tail(100000), "every pod and container has been looked at") }
	before := looked()
	d.Kill()
	d.Up()
	eventually(t, soon, func() error {
		if looked() == before {
			return errors.New("the recovery is not over")
		}
		return nil
	})
	if err := removePod(d, id); err != nil {
		t.Fatal(err)
	}
	if calls := stubCalls(t, d, "given-back"); commandsOf(calls) != "ADD DEL" {
		t.Errorf("calls are %q", commandsOf(calls))
	}
}

func TestNET_26_Unprivileged(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "unprivileged")
	config := daemon.ContainerConfig("main", plain(t, d), "httpd", "-f", "-p", "80", "-h", "/www")
	config.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: images.AliceUID}
	config.Linux.SecurityContext.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}}
	ctr := p.run(d, config)
	browsed(t, ipOf(t, d, p)+":80")
	if got := sh(d, ctr, "id -u; grep CapEff /proc/self/status"); got != "1000\nCapEff:\t0000000000000000" {
		t.Errorf("the server is %q", got)
	}
	if err := pingAs(images.AliceUID, pinOf(t, d, p.id), gateway(d)); err != nil {
		t.Errorf("ping as user %d: %v", images.AliceUID, err)
	}
}

// pingAs sends an echo request as an unprivileged user from a network
// namespace and waits for the reply.
func pingAs(user int, netns, to string) error {
	return inNetns(netns, func() error {
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} { // of this thread alone
			if _, _, e := unix.RawSyscall(call, uintptr(user), uintptr(user), uintptr(user)); e != 0 {
				return e
			}
		}
		return echo(netip.MustParseAddr(to))
	})
}

// The main thread stays with the main goroutine: it cannot end, so it must never
// be one that changes its namespaces.
func init() { runtime.LockOSThread() }

// inNetns runs f on a thread in a network namespace, which ends afterwards.
func inNetns(path string, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		done <- func() error {
			ns, err := os.Open(path)
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			return f()
		}()
	}()
	return <-done
}

// echo needs no privilege where the kernel lets groups ping.
func echo(to netip.Addr) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(s)
	if err := unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return err
	}
	const request, reply = 8, 0
	if err := unix.Sendto(s, []byte{request, 0, 0, 0, 0, 0, 0, 1}, 0, &unix.SockaddrInet4{Addr: to.As4()}); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	answer := make([]byte, 64)
	n, _, err := unix.Recvfrom(s, answer, 0)
	if err == nil && (n < 8 || answer[0] != reply) {
		err = fmt.Errorf("answer is %x", answer[:n])
	}
	return err
}

func TestNET_28_AddressesSurvive(t *testing.T) {
	d := shared(t)
	order(t, d, "ADD", "two-addresses", stubOrder{Addresses: []string{"10.99.0.9/24", "fd00:99::9/64"}})
	pods := []string{d.RunPod(d.PodConfig("one-address")), d.RunPodWith(d.PodConfig("two-addresses"), stubHandler)}
	before := map[string]string{}
	for _, id := range pods {
		before[id] = fmt.Sprint(podStatus(t, d, id).Network)
	}
	for _, end := range []func(){d.Stop, d.Kill} {
		end()
		d.Up()
		for _, id := range pods {
			if got := fmt.Sprint(podStatus(t, d, id).Network); got != before[id] || got == "" {
				t.Errorf("addresses were %s and are %s", before[id], got)
			}
		}
	}
	if got := commandsOf(stubCalls(t, d, "two-addresses")); got != "ADD" {
		t.Errorf("the plugin was called for %q", got)
	}
}

func TestNET_29_HostNetwork(t *testing.T) {
	t.Parallel()
	d := shared(t)
	config := d.PodConfig("node-net")
	hostNetwork(config)
	p := pod{d.RunPodWith(config, stubHandler), config}
	ctr := p.run(d, onHost(daemon.ContainerConfig("main", plain(t, d))))
	if n := podStatus(t, d, p.id).Network; n.GetIp() != "" || len(n.GetAdditionalIps()) != 0 {
		t.Errorf("addresses are %v", n)
	}
	for _, file := range []string{"/etc/hosts", "/etc/resolv.conf"} {
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got := d.Exec(ctr, "cat", file); got != string(want) {
			t.Errorf("%s is\n%s\nwant\n%s", file, got, want)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if out, code := tryExec(t, d, ctr, "nc", "-w", "2", "127.0.0.1", fmt.Sprint(l.Addr().(*net.TCPAddr).Port), "-e", "true"); code != 0 {
		t.Errorf("this process cannot be reached: %s", out)
	}
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	if calls := stubCalls(t, d, "node-net"); len(calls) != 0 {
		t.Errorf("the plugin was called for %q", commandsOf(calls))
	}
}

// TestNET_30_SlowPlugin: a plugin that hangs holds up its own pod and nobody
// else, on the same network or another.
func TestNET_30_SlowPlugin(t *testing.T) {
	t.Parallel()
	d := shared(t)
	end := order(t, d, "ADD", "hangs", stubOrder{Stall: true})
	config := d.PodConfig("hangs")
	done := make(chan error, 1)
	go func() {
		_, err := d.StartPod(t.Context(), config, stubHandler)
		done <- err
	}()
	eventually(t, soon, func() error {
		if len(stubCalls(t, d, "hangs")) == 0 {
			return errors.New("the plugin does not hang yet")
		}
		return nil
	})
	for i, handler := range []string{stubHandler, "", stubHandler, ""} {
		begin := time.Now()
		id := d.RunPodWith(d.PodConfig(fmt.Sprint("passes", i)), handler)
		if err := removePod(d, id); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("another pod took %s", took)
		}
	}
	select {
	case err := <-done:
		t.Errorf("the pod did not wait: %v", err)
	default:
	}
	end()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
