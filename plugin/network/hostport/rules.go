package hostport

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The sets of a table. What a mapping says is in elements of sets, and the rules
// are the same however many there are: the kernel finds an element at once.
const (
	// Where a port leads to, by address, protocol and port, or by the latter
	// two for every address.
	bound4, bound6 = "bound4", "bound6"
	any4, any6     = "any4", "any6"
	// Which flows must come back by way of the node, by the range of their
	// source, the pod, the protocol and the node's port.
	return4, return6 = "return4", "return6"
	// opened are the interfaces that were let route loopback addresses, which
	// is to be taken back.
	opened = "opened"
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

// layout is what a table has besides elements.
type layout struct {
	table  *nftables.Table
	sets   []*nftables.Set
	chains []chain
}

type chain struct {
	*nftables.Chain
	rules [][]expr.Any
}

// setNames are the sets of a table in the order of the layout.
var setNames = []string{bound4, bound6, any4, any6, return4, return6, opened}

func newLayout(name string) layout {
	t := &nftables.Table{Name: name, Family: nftables.TableFamilyINet}
	v4, v6, proto, port := nftables.TypeIPAddr, nftables.TypeIP6Addr, nftables.TypeInetProto, nftables.TypeInetService
	set := func(name string, key ...nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: t, Name: name, KeyType: nftables.MustConcatSetType(key...), Concatenation: true}
	}
	ports := func(s *nftables.Set, addr nftables.SetDatatype) *nftables.Set {
		s.IsMap, s.DataType = true, nftables.MustConcatSetType(addr, port)
		return s
	}
	ranges := func(s *nftables.Set) *nftables.Set {
		s.Interval = true
		return s
	}
	return layout{
		table: t,
		sets: []*nftables.Set{
			ports(set(bound4, v4, proto, port), v4), ports(set(bound6, v6, proto, port), v6),
			ports(set(any4, proto, port), v4), ports(set(any6, proto, port), v6),
			ranges(set(return4, v4, v4, proto, port)), ranges(set(return6, v6, v6, proto, port)),
			{Table: t, Name: opened, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian},
		},
		chains: chains(t),
	}
}

const ports = "ports"

func chains(t *nftables.Table) []chain {
	base := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority, rules ...[]expr.Any) chain {
		return chain{&nftables.Chain{Table: t, Name: name, Type: kind, Hooknum: hook, Priority: priority}, rules}
	}
	return []chain{
		{&nftables.Chain{Table: t, Name: ports}, [][]expr.Any{
			take(true, bound4), take(true, any4),
			rule(isFamily(false), daddr(false, 8), equal(8, loopback6.AsSlice()), verdict(expr.VerdictReturn, "")),
			take(false, bound6), take(false, any6),
		}},
		base("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, toNode()),
		base("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest, toNode()),
		base("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource,
			comeBack(true), comeBack(false)),
		// Routing loopback addresses of one interface lets them in there, too,
		// which nobody on the other side may use (CVE-2020-8558).
		base("guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw,
			fromOutside(12), fromOutside(16)),
	}
}

// Registers are numbered by words of four bytes, from 8; 1 is the one at 8 that is
// as long as needed.
const longRegister = 1

func rule(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

// toNode sends what is for an address of the node itself, and for no other, to the
// ports (CVE-2025-67499).
func toNode() []expr.Any {
	return rule(
		[]expr.Any{&expr.Fib{Register: longRegister, FlagDADDR: true, ResultADDRTYPE: true}},
		equal(longRegister, native(unix.RTN_LOCAL)), verdict(expr.VerdictJump, ports))
}

// take leads what a set has to the pod.
func take(v4 bool, set string) []expr.Any {
	next := uint32(8)
	family, words := unix.NFPROTO_IPV6, uint32(4)
	if v4 {
		family, words = unix.NFPROTO_IPV4, 1
	}
	load := rule(isFamily(v4))
	if set == bound4 || set == bound6 {
		load = rule(load, daddr(v4, next))
		next += words
	}
	return rule(load, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: next},
		&expr.Payload{DestRegister: next + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: longRegister, DestRegister: longRegister, IsDestRegSet: true, SetName: set},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(family), RegAddrMin: longRegister, RegProtoMin: 8 + words, Specified: true},
	})
}

// comeBack gives flows that were led to a pod, and would not come back otherwise,
// an address of the node.
func comeBack(v4 bool) []expr.Any {
	set, words := return6, uint32(4)
	if v4 {
		set, words = return4, 1
	}
	const dstNAT = 1 << 5 // IPS_DST_NAT
	return rule(isFamily(v4), []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: longRegister},
		&expr.Bitwise{SourceRegister: longRegister, DestRegister: longRegister, Len: 4, Mask: native(dstNAT), Xor: native(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: longRegister, Data: native(0)},
	}, saddr(v4, 8), daddr(v4, 8+words), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 8 + 2*words},
		&expr.Ct{Key: expr.CtKeyPROTODST, Register: 9 + 2*words}, // of the original direction, 0
		&expr.Lookup{SourceRegister: longRegister, SetName: set},
		&expr.Masq{},
	})
}

// fromOutside drops what has a loopback address at that place of its header and
// does not come from the loopback interface.
func fromOutside(offset uint32) []expr.Any {
	lo := make([]byte, unix.IFNAMSIZ)
	copy(lo, "lo")
	return rule(isFamily(true), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: longRegister},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: longRegister, Data: lo},
		&expr.Payload{DestRegister: longRegister, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 1},
	}, equal(longRegister, []byte{127}), verdict(expr.VerdictDrop, ""))
}

func isFamily(v4 bool) []expr.Any {
	f := byte(unix.NFPROTO_IPV6)
	if v4 {
		f = unix.NFPROTO_IPV4
	}
	return rule([]expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: longRegister}}, equal(longRegister, []byte{f}))
}

func saddr(v4 bool, register uint32) []expr.Any {
	p := &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 16}
	if v4 {
		p.Offset, p.Len = 12, 4
	}
	return []expr.Any{p}
}

func daddr(v4 bool, register uint32) []expr.Any {
	p := &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 16}
	if v4 {
		p.Offset, p.Len = 16, 4
	}
	return []expr.Any{p}
}

func equal(register uint32, data []byte) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: data}}
}

func verdict(kind expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}
}

func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
