package lifecycle

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// TestNET_08_SeveralNetworks attaches pods to two bridges: both are made and given
// back whatever happens, and the API tells the addresses of the first.
func TestNET_08_SeveralNetworks(t *testing.T) {
	t.Parallel()
	for _, serially := range []bool{false, true} {
		t.Run(fmt.Sprintf("serially %t", serially), func(t *testing.T) {
			t.Parallel()
			d := start(t, daemon.Edit(func(_ *daemon.Instance, c daemon.Config) {
				c.Set(2, "plugins", daemon.RuntimePlugin, "cni", "max_conf_num")
				c.Set(serially, "plugins", daemon.RuntimePlugin, "cni", "setup_serially")
			}))
			second := twoBridges(t, d)
			order(t, d, "ADD", "several", stubOrder{Stall: true})
			p := runStalled(t, d, "several", func() { bothBegin(t, d, "several", serially) })
			bothNetworks(t, d, p, serially)

			d.Kill()
			d.Up()
			if now := podStatus(t, d, p.id).Network; now.Ip == "" || !d.Scope().Subnet.Contains(netip.MustParseAddr(now.Ip)) || len(now.AdditionalIps) > 0 {
				t.Errorf("after a restart the addresses are %v", now)
			}
			// What a pod has does not depend on what the next ones get.
			if err := os.Remove(second); err != nil {
				t.Fatal(err)
			}
			if err := removePod(d, p.id); err != nil {
				t.Fatal(err)
			}
			var order []string
			for _, c := range stubCalls(t, d, "several") {
				if c.Command == "DEL" {
					order = append(order, c.IfName)
				}
			}
			if got := strings.Join(order, " "); got != "eth1 eth0" {
				t.Errorf("networks are given back in the order %s", got)
			}
			nothingLeft(t, d)
		})
	}
}

// TestNET_08_Failures: a pod that gets but one of its networks gets none, and one
// whose daemon dies while it is attached leaves nothing.
func TestNET_08_Failures(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Set(2, "plugins", daemon.RuntimePlugin, "cni", "max_conf_num"))
	second := twoBridges(t, d)
	text, err := os.ReadFile(second)
	if err != nil {
		t.Fatal(err)
	}
	// The stub of the second network alone fails.
	other := filepath.Join(d.Dir, "other")
	must(os.MkdirAll(other, 0o755))
	must(os.WriteFile(filepath.Join(other, "ADD"), []byte(`{"Code": 11, "Msg": "not now"}`), 0o644))
	must(os.WriteFile(second, []byte(strings.Replace(string(text), stubControl(d.Dir), other, 1)), 0o644))
	if _, err := d.StartPod(t.Context(), d.PodConfig("half"), ""); err == nil || !strings.Contains(err.Error(), "not now") {
		t.Errorf("a pod without its second network: %v", err)
	}
	nothingLeft(t, d)

	must(os.WriteFile(second, text, 0o644))
	undo := order(t, d, "ADD", "crash", stubOrder{Stall: true})
	ended := make(chan error)
	go func() {
		_, err := d.StartPod(t.Context(), d.PodConfig("crash"), "")
		ended <- err
	}()
	bothBegin(t, d, "crash", false)
	d.Kill()
	if err := <-ended; err == nil {
		t.Error("a pod is told to run by a daemon that was killed")
	}
	undo()
	d.Up()
	// No list shows a pod that is not made yet.
	eventually(t, ample, d.CheckClean)
	nothingLeft(t, d)
}

// twoBridges gives the daemon's pods a second network, each with the stub at its
// end, and returns the file of the second.
func twoBridges(t *testing.T, d *daemon.Daemon) string {
	t.Helper()
	s := d.Scope()
	list := conflist("1.1.0", bridged, stubConf(d.Dir))
	if err := d.WriteConflist(list); err != nil {
		t.Fatal(err)
	}
	bridge := s.Bridge + "b"
	t.Cleanup(func() {
		if link, err := netlink.LinkByName(bridge); err == nil {
			if err := netlink.LinkDel(link); err != nil {
				t.Error(err)
			}
		}
	})
	text := strings.NewReplacer("BRIDGE", bridge, "IPAM", s.IPAM, "NETWORK", s.Network+"b", "SUBNET", secondSubnet(d).String(),
		`, "routes": [{"dst": "0.0.0.0/0"}]`, "").Replace(list)
	path := filepath.Join(d.CNIDir, "20-second.conflist")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func secondSubnet(d *daemon.Daemon) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 215, d.Scope().Subnet.Addr().As4()[2], 0}), 24)
}

// runStalled runs a pod whose ADD is stalled until the function returns.
func runStalled(t *testing.T, d *daemon.Daemon, name string, meanwhile func()) pod {
	t.Helper()
	config := d.PodConfig(name)
	type result struct {
		id  string
		err error
	}
	ended := make(chan result)
	go func() {
		id, err := d.StartPod(t.Context(), config, "")
		ended <- result{id, err}
	}()
	meanwhile()
	if err := os.Remove(filepath.Join(stubControl(d.Dir), "ADD."+name)); err != nil {
		t.Fatal(err)
	}
	r := <-ended
	if r.err != nil {
		t.Fatal(r.err)
	}
	return pod{id: r.id, config: config}
}

// bothBegin waits until as many networks are being made as may be at a time.
func bothBegin(t *testing.T, d *daemon.Daemon, pod string, serially bool) {
	t.Helper()
	want := 2
	if serially {
		want = 1
	}
	eventually(t, soon, func() error {
		if calls := stubCalls(t, d, pod); len(calls) != want {
			return fmt.Errorf("%d calls have begun, want %d", len(calls), want)
		}
		return nil
	})
}

// bothNetworks looks at a pod's two interfaces.
func bothNetworks(t *testing.T, d *daemon.Daemon, p pod, serially bool) {
	t.Helper()
	calls := stubCalls(t, d, "several")
	if got := commandsOf(calls); got != "ADD ADD" {
		t.Fatalf("the plugin was called for %q", got)
	}
	setup := d.Scope().Subnet
	n := podStatus(t, d, p.id).Network
	if !setup.Contains(netip.MustParseAddr(n.Ip)) || len(n.AdditionalIps) > 0 {
		t.Errorf("addresses are %v, want one of %s", n, setup)
	}
	if serially && (calls[0].IfName != "eth0" || calls[1].IfName != "eth1") {
		t.Errorf("%s is made before %s", calls[0].IfName, calls[1].IfName)
	}
	if got := !calls[1].Begin.Before(calls[0].End); got != serially {
		t.Errorf("one after the other: %t, want %t", got, serially)
	}
	pin := pinOf(t, d, p.id)
	var other string
	if err := inNetns(pin, func() error {
		link, err := netlink.LinkByName("eth1")
		if err != nil {
			return err
		}
		list, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err == nil && len(list) != 1 {
			err = fmt.Errorf("eth1 has the addresses %v", list)
		}
		if err == nil {
			other = list[0].IP.String()
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if !secondSubnet(d).Contains(netip.MustParseAddr(other)) {
		t.Errorf("the second address is %s", other)
	}
	answering(t, pin, "tcp", "several", 8080)
	answers(t, "", "tcp", n.Ip, 8080, "several")
	answers(t, "", "tcp", other, 8080, "several")
}
