package hostport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// conntrackDir has a file of the times of each protocol that is tracked.
const conntrackDir = "/proc/sys/net/netfilter"

// Supported reports a protocol that the kernel cannot map. It has to know the
// protocol's flows; that programs of the node have no sockets of it is no matter.
func Supported(ports []Mapping) error { return supportedBy(os.DirFS(conntrackDir), ports) }

// supportedBy is Supported for a directory of the kernel's settings. Without the
// file of TCP the kernel does not track anything yet and cannot be asked.
func supportedBy(settings fs.FS, ports []Mapping) error {
	for _, m := range ports {
		if m.Protocol != SCTP {
			continue
		}
		_, sctp := fs.Stat(settings, "nf_conntrack_sctp_timeout_established")
		_, tcp := fs.Stat(settings, "nf_conntrack_tcp_timeout_established")
		if tcp == nil && errors.Is(sctp, fs.ErrNotExist) {
			return fmt.Errorf("host port: %s: the kernel does not track SCTP (CONFIG_NF_CT_PROTO_SCTP): %w", m, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// way is where a port of the node leads to.
type way struct {
	Mapping
	pod netip.Addr
}

// ways are those of elements whose protocol has no connections: a client that goes
// on sending would keep a flow on its old way, or in the pod that is gone.
func ways(elements map[element]bool) (out []way) {
	for e := range elements {
		if e.set == return4 || e.set == return6 {
			continue
		}
		m := portOf(e)
		pod, ok := netip.AddrFromSlice([]byte(e.val[:len(e.val)-4]))
		if ok && m.Protocol != TCP {
			out = append(out, way{m, pod})
		}
	}
	return out
}

// stale reports whether a flow is not as the way, which comes, will have it, or
// is as the way, which goes, had it.
func (w way) stale(f *netlink.ConntrackFlow, local func(netip.Addr) bool, comes bool) bool {
	dst, ok1 := netip.AddrFromSlice(f.Forward.DstIP)
	server, ok2 := netip.AddrFromSlice(f.Reverse.SrcIP)
	if !ok1 || !ok2 || f.Forward.Protocol != uint8(w.Protocol) || f.Forward.DstPort != w.HostPort {
		return false
	}
	dst, server = dst.Unmap(), server.Unmap()
	if dst.Is4() != w.pod.Is4() || !w.wild() && dst != w.HostIP {
		return false
	}
	if comes {
		return server != w.pod && local(dst)
	}
	return server == w.pod
}

// forget ends the flows that are not as they should be. It does not fail: what is
// left ends by itself when its client is silent for a while.
func forget(ctx context.Context, elements map[element]bool, comes bool) {
	all := ways(elements)
	if len(all) == 0 {
		return
	}
	local := localAddresses()
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		var filters []netlink.CustomConntrackFilter
		for _, w := range all {
			if w.pod.Is4() == (family == unix.AF_INET) {
				filters = append(filters, filter(func(f *netlink.ConntrackFlow) bool { return w.stale(f, local, comes) }))
			}
		}
		if len(filters) == 0 {
			continue
		}
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, filters...); err != nil {
			log.G(ctx).WithError(err).Warn("host ports: flows may stay on their old way until they end")
		}
	}
}

type filter func(*netlink.ConntrackFlow) bool

// MatchConntrackFlow is what the library calls.
func (f filter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool { return f(flow) }

// localAddresses tells the node's own addresses.
func localAddresses() func(netip.Addr) bool {
	known := map[netip.Addr]bool{}
	addresses, _ := net.InterfaceAddrs() // without any, no flow is ended
	for _, a := range addresses {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			known[p.Addr()] = true
		}
	}
	return func(a netip.Addr) bool { return known[a] || a.IsLoopback() }
}
