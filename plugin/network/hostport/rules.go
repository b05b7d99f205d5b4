package hostport

import (
	"encoding/binary"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The elements are in sets of a table, and its rules are the same however many
// there are: the kernel finds an element at once.

// opened is the set of the interfaces that were let route loopback addresses,
// which is to be taken back.
const opened = "opened"

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
