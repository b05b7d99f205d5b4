package hostport

import (
	"errors"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
)

func port(ip string, host uint16, protocol Protocol, pod uint16) Mapping {
	m := Mapping{HostPort: host, Protocol: protocol, PodPort: pod}
	if ip != "" {
		m.HostIP = netip.MustParseAddr(ip)
	}
	return m
}

func TestOverlap(t *testing.T) {
	for _, c := range []struct {
		a, b Mapping
		want bool
	}{
		{port("", 80, TCP, 1), port("", 80, TCP, 2), true},
		{port("", 80, TCP, 1), port("", 81, TCP, 1), false},
		{port("", 80, TCP, 1), port("", 80, UDP, 1), false},
		{port("", 80, TCP, 1), port("10.0.0.1", 80, TCP, 1), true},
		{port("", 80, TCP, 1), port("fd00::1", 80, TCP, 1), true},
		{port("0.0.0.0", 80, TCP, 1), port("10.0.0.1", 80, TCP, 1), true},
		{port("0.0.0.0", 80, TCP, 1), port("fd00::1", 80, TCP, 1), false},
		{port("0.0.0.0", 80, TCP, 1), port("::", 80, TCP, 1), false},
		{port("::", 80, TCP, 1), port("fd00::1", 80, TCP, 1), true},
		{port("", 80, TCP, 1), port("::", 80, TCP, 1), true},
		{port("10.0.0.1", 80, TCP, 1), port("10.0.0.2", 80, TCP, 1), false},
		{port("10.0.0.1", 80, TCP, 1), port("10.0.0.1", 80, TCP, 2), true},
	} {
		if got, back := c.a.overlaps(c.b), c.b.overlaps(c.a); got != c.want || back != c.want {
			t.Errorf("%s and %s overlap: %t, %t, want %t", c.a, c.b, got, back, c.want)
		}
	}
}

func TestClaims(t *testing.T) {
	var c Claims
	web := []Mapping{port("", 80, TCP, 8080)}
	if err := c.Take("a", "ns/web", web); err != nil {
		t.Fatal(err)
	}
	if err := c.Take("a", "ns/web", web); err != nil {
		t.Errorf("taken again by the same pod: %v", err)
	}
	want := []Mapping{port("", 443, TCP, 1), port("10.0.0.1", 80, TCP, 8080)}
	for _, err := range []error{c.Check("b", want), c.Take("b", "ns/other", want)} {
		var taken *Conflict
		if !errors.As(err, &taken) || taken.ID != "a" || taken.Want != want[1] || taken.Has != web[0] || !errdefs.IsFailedPrecondition(err) {
			t.Fatalf("a port of another pod: %v", err)
		}
		for _, word := range []string{"TCP port 80 of 10.0.0.1", "ns/web", "sandbox a"} {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%q is not in %q", word, err)
			}
		}
	}
	if err := c.Check("c", want[:1]); err != nil {
		t.Errorf("a refused pod has a port: %v", err)
	}
	c.Drop("a")
	c.Drop("a")
	if err := c.Take("b", "ns/other", want); err != nil {
		t.Errorf("after the first pod went: %v", err)
	}
}

func TestElements(t *testing.T) {
	dual := []netip.Prefix{netip.MustParsePrefix("10.88.1.5/24"), netip.MustParsePrefix("fd00::5/64")}
	const (
		pod4   = "\x0a\x58\x01\x05"
		pod6   = "\xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x05"
		net6   = "\xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
		net6to = "\xfd\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff"
		tcp80  = "\x06\x00\x00\x00\x00\x50\x00\x00"
		to8080 = "\x1f\x90\x00\x00"
	)
	back4 := []element{
		{set: return4, key: "\x0a\x58\x01\x00" + pod4 + tcp80, end: "\x0a\x58\x01\xff" + pod4 + tcp80},
		{set: return4, key: "\x7f\x00\x00\x00" + pod4 + tcp80, end: "\x7f\xff\xff\xff" + pod4 + tcp80},
	}
	back6 := element{set: return6, key: net6 + pod6 + tcp80, end: net6to + pod6 + tcp80}
	for name, c := range map[string]struct {
		addresses []netip.Prefix
		ports     []Mapping
		want      []element
		refused   bool
	}{
		"none": {addresses: dual},
		"both families": {dual, []Mapping{port("", 80, TCP, 8080)}, append([]element{
			{set: any4, key: tcp80, val: pod4 + to8080}, {set: any6, key: tcp80, val: pod6 + to8080}, back6}, back4...), false},
		"all of IPv4": {dual, []Mapping{port("0.0.0.0", 80, TCP, 8080)}, append([]element{{set: any4, key: tcp80, val: pod4 + to8080}}, back4...), false},
		"one address": {dual, []Mapping{port("192.0.2.1", 80, TCP, 8080)}, append([]element{
			{set: bound4, key: "\xc0\x00\x02\x01" + tcp80, val: pod4 + to8080}}, back4...), false},
		"one of IPv6": {dual, []Mapping{port("fd00::1", 80, TCP, 8080)}, []element{
			{set: bound6, key: net6[:15] + "\x01" + tcp80, val: pod6 + to8080}, back6}, false},
		"one family":        {dual[:1], []Mapping{port("", 80, TCP, 8080)}, append([]element{{set: any4, key: tcp80, val: pod4 + to8080}}, back4...), false},
		"twice":             {dual[:1], []Mapping{port("", 80, TCP, 8080), port("", 80, TCP, 8080)}, append([]element{{set: any4, key: tcp80, val: pod4 + to8080}}, back4...), false},
		"the other family":  {dual[:1], []Mapping{port("::", 80, TCP, 8080)}, nil, true},
		"no address at all": {nil, []Mapping{port("", 80, TCP, 8080)}, nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Pod{ID: "a", Addresses: c.addresses, Ports: c.ports}.elements()
			if c.refused != errdefs.IsFailedPrecondition(err) {
				t.Fatalf("error %v, refused should be %t", err, c.refused)
			}
			want := map[element]bool{}
			for _, e := range c.want {
				want[e] = true
			}
			if !maps.Equal(got, want) && len(got)+len(want) > 0 {
				t.Errorf("got  %q\nwant %q", slices.Collect(maps.Keys(got)), slices.Collect(maps.Keys(want)))
			}
			for e := range got {
				if m := portOf(e); m.HostPort != 80 || m.Protocol != TCP {
					t.Errorf("%q is read as %s", e, m)
				}
			}
		})
	}
}

func TestDifference(t *testing.T) {
	of := func(p Mapping, id string) map[element]bool {
		got, err := Pod{ID: id, Addresses: []netip.Prefix{netip.MustParsePrefix("10.88.1.5/24")}, Ports: []Mapping{p}}.elements()
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	old, now := of(port("", 80, TCP, 8080), "a"), of(port("", 81, TCP, 8080), "a")
	for name, c := range map[string]struct {
		change      change
		lost        bool // somebody has removed what there was
		add, remove map[element]bool
		taken       bool
	}{
		"the same":        {change: change{pod: "a", want: state{elements: old}}},
		"another port":    {change: change{pod: "a", want: state{elements: now}}, add: now, remove: old},
		"none":            {change: change{pod: "a"}, remove: old},
		"another pod":     {change: change{pod: "b", want: state{elements: now}}, add: now},
		"nothing of mine": {change: change{pod: "b"}},
		"taken":           {change: change{pod: "b", want: state{elements: old}}, taken: true},
		"anew":            {change: change{anew: true}},
		"lost":            {lost: true, add: old},
		"taken and lost":  {change: change{pod: "b", want: state{elements: old}}, lost: true, taken: true},
	} {
		pods := map[string]state{"a": {elements: old}}
		have := owners(pods)
		if c.lost {
			have = nil
		}
		if err := c.change.conflict(pods); errors.As(err, new(*Conflict)) != c.taken {
			t.Errorf("%s: %v", name, err)
		}
		if c.taken {
			continue
		}
		got := difference(have, owners(c.change.next(pods)))
		if !maps.Equal(got.added, c.add) || !maps.Equal(got.removed, c.remove) {
			t.Errorf("%s: add %v, remove %v", name, got.added, got.removed)
		}
	}
}

func TestCheckPorts(t *testing.T) {
	for _, c := range []struct {
		ports []Mapping
		is    func(error) bool
	}{
		{[]Mapping{port("", 80, TCP, 1), port("", 80, UDP, 2), port("10.0.0.1", 80, TCP, 3)}, func(err error) bool { return err == nil }},
		{[]Mapping{port("", 80, TCP, 1), port("", 80, TCP, 1)}, func(err error) bool { return err == nil }},
		{[]Mapping{port("", 80, TCP, 1), port("", 80, TCP, 2)}, errdefs.IsInvalidArgument},
		{[]Mapping{port("::1", 80, TCP, 1)}, errdefs.IsFailedPrecondition},
	} {
		if err := CheckPorts(c.ports); !c.is(err) {
			t.Errorf("%v: %v", c.ports, err)
		}
	}
}

func TestSupported(t *testing.T) {
	tracked := fstest.MapFS{"nf_conntrack_tcp_timeout_established": {}}
	sctp := []Mapping{port("", 80, TCP, 1), port("", 3868, SCTP, 1)}
	if err := supportedBy(tracked, sctp); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "SCTP port 3868") {
		t.Errorf("SCTP on a kernel that does not track it: %v", err)
	}
	if err := supportedBy(tracked, sctp[:1]); err != nil {
		t.Errorf("TCP: %v", err)
	}
	if err := supportedBy(fstest.MapFS{}, sctp); err != nil {
		t.Errorf("a kernel that tracks nothing yet: %v", err)
	}
	tracked["nf_conntrack_sctp_timeout_established"] = &fstest.MapFile{}
	if err := supportedBy(tracked, sctp); err != nil {
		t.Errorf("a kernel that tracks it: %v", err)
	}
}

func TestStaleFlows(t *testing.T) {
	local := func(a netip.Addr) bool { return a == netip.MustParseAddr("192.0.2.1") }
	dns := way{port("0.0.0.0", 53, UDP, 0), netip.MustParseAddr("10.88.1.5")}
	bound := way{port("192.0.2.1", 53, UDP, 0), dns.pod}
	for _, c := range []struct {
		what        string
		way         way
		protocol    Protocol
		dst         string
		port        uint16
		server      string
		comes, goes bool
	}{
		{"to the node itself", dns, UDP, "192.0.2.1", 53, "192.0.2.1", true, false},
		{"to an earlier pod", dns, UDP, "192.0.2.1", 53, "10.88.1.4", true, false},
		{"to the pod", dns, UDP, "192.0.2.1", 53, "10.88.1.5", false, true},
		{"through the node", dns, UDP, "192.0.2.9", 53, "192.0.2.9", false, false},
		{"to another port", dns, UDP, "192.0.2.1", 54, "10.88.1.5", false, false},
		{"another protocol", dns, SCTP, "192.0.2.1", 53, "10.88.1.5", false, false},
		{"another family", dns, UDP, "fd00::1", 53, "fd00::1", false, false},
		{"to the bound address", bound, UDP, "192.0.2.1", 53, "192.0.2.1", true, false},
		{"to another than the bound address", bound, UDP, "192.0.2.2", 53, "10.88.1.5", false, false},
	} {
		f := &netlink.ConntrackFlow{
			Forward: netlink.IPTuple{DstIP: net.ParseIP(c.dst), DstPort: c.port, Protocol: uint8(c.protocol)},
			Reverse: netlink.IPTuple{SrcIP: net.ParseIP(c.server)},
		}
		if comes, goes := c.way.stale(f, local, true), c.way.stale(f, local, false); comes != c.comes || goes != c.goes {
			t.Errorf("%s: stale when the port comes %t, goes %t, want %t, %t", c.what, comes, goes, c.comes, c.goes)
		}
	}
}

func TestWays(t *testing.T) {
	elements, err := Pod{Addresses: []netip.Prefix{netip.MustParsePrefix("10.88.1.5/24"), netip.MustParsePrefix("fd00::5/64")}, Ports: []Mapping{
		port("", 53, UDP, 53), port("", 53, TCP, 53), port("192.0.2.1", 9, SCTP, 9),
	}}.elements()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, w := range ways(elements) {
		got = append(got, w.String()+" to "+w.pod.String())
	}
	slices.Sort(got)
	if want := []string{"SCTP port 9 of 192.0.2.1 to 10.88.1.5", "UDP port 53 of IPv4 to 10.88.1.5", "UDP port 53 of IPv6 to fd00::5"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
