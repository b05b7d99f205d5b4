package hostport

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
)

// The sets of elements. What a mapping says is in elements of sets, whichever way
// they are kept in the kernel.
const (
	// Where a port leads to, by address, protocol and port, or by the latter
	// two for every address.
	bound4, bound6 = "bound4", "bound6"
	any4, any6     = "any4", "any6"
	// Which flows must come back by way of the node, by the range of their
	// source, the pod, the protocol and the node's port.
	return4, return6 = "return4", "return6"
)

// element is one element of a set, in bytes as the kernel has them.
type element struct {
	set           string
	key, end, val string
}

// Pod is a pod with ports of the node.
type Pod struct {
	ID string
	// Addresses are the pod's, with the network each is in.
	Addresses []netip.Prefix
	Ports     []Mapping
}

// address is the pod's first address of a family.
func (p Pod) address(v4 bool) (netip.Prefix, bool) {
	for _, a := range p.Addresses {
		if a.Addr().Is4() == v4 {
			return a, true
		}
	}
	return netip.Prefix{}, false
}

var (
	loopback4 = netip.MustParsePrefix("127.0.0.0/8")
	loopback6 = netip.IPv6Loopback()
)

// CheckPorts reports which of the ports can be mapped for no pod, or not side by
// side.
func CheckPorts(ports []Mapping) error {
	for i, m := range ports {
		if m.HostIP == loopback6 {
			return fmt.Errorf("host port: %s: the kernel sends nothing to a pod that comes from the IPv6 loopback address: %w", m, errdefs.ErrFailedPrecondition)
		}
		for _, o := range ports[:i] {
			twice := m
			twice.PodPort = o.PodPort
			if twice == o && m != o {
				return fmt.Errorf("host port: %s leads to port %d and to port %d: %w", m, o.PodPort, m.PodPort, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

// elements are what the sets have for a pod.
func (p Pod) elements() (map[element]bool, error) {
	out := map[element]bool{}
	for _, m := range p.Ports {
		mapped := false
		for _, v4 := range []bool{true, false} {
			a, has := p.address(v4)
			if !has || !m.covers(a.Addr()) {
				continue
			}
			mapped = true
			out[m.target(a.Addr())] = true
			out[m.back(a.Masked(), a.Addr())] = true
			if v4 {
				out[m.back(loopback4, a.Addr())] = true
			}
		}
		if !mapped {
			return nil, fmt.Errorf("host port: %s: the pod has no address of that family, only %v: %w", m, p.Addresses, errdefs.ErrFailedPrecondition)
		}
	}
	return out, nil
}

// target is the element that leads from the node's port to the pod's.
func (m Mapping) target(pod netip.Addr) element {
	e := element{set: any6, val: string(pod.AsSlice()) + word(m.PodPort)}
	key := string([]byte{byte(m.Protocol), 0, 0, 0}) + word(m.HostPort)
	if pod.Is4() {
		e.set = any4
	}
	if !m.wild() {
		e.set = bound6
		if pod.Is4() {
			e.set = bound4
		}
		key = string(m.HostIP.AsSlice()) + key
	}
	e.key = key
	return e
}

// back is the element by which a flow from a network to the pod comes back through
// the node: to the loopback addresses nothing else would lead, and a neighbour, or
// the pod itself, would answer past the node, from an address that nobody asked.
func (m Mapping) back(from netip.Prefix, pod netip.Addr) element {
	rest := string(pod.AsSlice()) + string([]byte{byte(m.Protocol), 0, 0, 0}) + word(m.HostPort)
	e := element{set: return6, key: string(from.Addr().AsSlice()) + rest, end: string(last(from).AsSlice()) + rest}
	if pod.Is4() {
		e.set = return4
	}
	return e
}

// last is the last address of a network.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b) // of the length it had
	return a
}

// word is a port as a field of a key: such fields are four bytes long.
func word(port uint16) string {
	return string(binary.BigEndian.AppendUint16(nil, port)) + "\x00\x00"
}

// portOf is the port of the node that an element is for.
func portOf(e element) Mapping {
	n := len(e.key)
	m := Mapping{Protocol: Protocol(e.key[n-8]), HostPort: uint16(e.key[n-4])<<8 | uint16(e.key[n-3])}
	switch e.set {
	case bound4, bound6:
		m.HostIP, _ = netip.AddrFromSlice([]byte(e.key[:n-8]))
	case any4:
		m.HostIP = netip.IPv4Unspecified()
	case any6:
		m.HostIP = netip.IPv6Unspecified()
	}
	return m
}

// v4 reports whether an element is of IPv4.
func (e element) v4() bool { return e.set == bound4 || e.set == any4 || e.set == return4 }

// leadsTo is where an element sends a port.
func (e element) leadsTo() netip.AddrPort {
	n := len(e.val) - 4
	a, _ := netip.AddrFromSlice([]byte(e.val[:n])) // of the length it had
	return netip.AddrPortFrom(a, uint16(e.val[n])<<8|uint16(e.val[n+1]))
}

// flow is from where to which pod the flows are that an element has come back.
func (e element) flow() (from netip.Prefix, pod netip.Addr) {
	n := (len(e.key) - 8) / 2
	first, _ := netip.AddrFromSlice([]byte(e.key[:n])) // of the length it had
	pod, _ = netip.AddrFromSlice([]byte(e.key[n : 2*n]))
	bits := first.BitLen()
	for bits > 0 && string(last(netip.PrefixFrom(first, bits)).AsSlice()) != e.end[:n] {
		bits--
	}
	return netip.PrefixFrom(first, bits), pod
}
