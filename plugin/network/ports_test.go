package network_test

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gantry-cri/gantry/plugin/network/hostport"
	"github.com/vishvananda/netlink"
)

// TestManyHostPorts has more ports than fit into one message, or into what the
// kernel takes at a time by default.
func TestManyHostPorts(t *testing.T) {
	needRoot(t)
	const pods, each = 30, 20
	lo, err := netlink.LinkByName("lo")
	mustDo(t, err)
	route := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: &net.IPNet{IP: net.IP{10, 88, 1, 0}, Mask: net.CIDRMask(24, 32)}}
	mustDo(t, netlink.RouteAdd(route))
	defer func() { mustDo(t, netlink.RouteDel(route)) }()
	options := hostport.Options{Name: "gantry-many", Engine: hostport.NFTables, Note: filepath.Join(t.TempDir(), "note")}
	table := hostport.New(options)
	var slowest time.Duration
	for i := range pods {
		p := hostport.Pod{ID: fmt.Sprintf("%064d", i), Addresses: []netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 88, 1, byte(i)}), 16), netip.MustParsePrefix(fmt.Sprintf("fd00::%x/64", i+1)),
		}}
		for j := range each {
			p.Ports = append(p.Ports, hostport.Mapping{HostPort: uint16(1000 + i*each + j), Protocol: hostport.TCP, PodPort: 80})
		}
		begin := time.Now()
		mustDo(t, table.Map(t.Context(), p))
		slowest = max(slowest, time.Since(begin))
	}
	begin := time.Now()
	next := hostport.New(options) // of the next daemon
	mustDo(t, next.Renew(t.Context()))
	t.Logf("slowest pod %s, all anew %s", slowest, time.Since(begin))
	ids, err := next.Pods(t.Context())
	mustDo(t, err)
	if len(ids) != pods {
		t.Errorf("%d pods have ports, want %d", len(ids), pods)
	}
	rules, err := exec.Command("nft", "list", "table", "inet", "gantry-many").CombinedOutput()
	mustDo(t, err)
	// For each port where it leads in both families, and from where it comes back.
	if n := strings.Count(string(rules), "comment"); n != pods*each*5 {
		t.Errorf("%d elements, want %d", n, pods*each*5)
	}
	for _, id := range ids {
		mustDo(t, next.Unmap(t.Context(), id))
	}
	if left := hostPorts(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
