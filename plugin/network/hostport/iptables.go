package hostport

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// The elements are rules in chains of their own, each with its pod's ID as its
// comment, which jumps in the chains of the kernel lead to.

// part is what is in one table of one family of addresses; it is changed as a whole.
type part struct {
	v4    bool
	table string
	// chains are our own, and jumps the rules of others' chains that lead there.
	chains, jumps []string
}

// parts are in the order in which they are made: loopback addresses are guarded
// before any interface routes them.
func parts(name string) []part {
	ports, back, guard := name+"-ports", name+"-return", name+"-guard"
	nat := func(v4 bool) part {
		return part{v4: v4, table: "nat", chains: []string{ports, back}, jumps: []string{
			"PREROUTING -m addrtype --dst-type LOCAL -j " + ports,
			"OUTPUT -m addrtype --dst-type LOCAL -j " + ports,
			"POSTROUTING -m conntrack --ctstate DNAT -j " + back,
		}}
	}
	return []part{
		{v4: true, table: "raw", chains: []string{guard}, jumps: []string{"PREROUTING -j " + guard}},
		nat(true), nat(false),
	}
}

// rules are what the part's chains have for a content, one line each.
func (p part) rules(c content) []string {
	if p.table == "raw" {
		return p.guard(c)
	}
	var specific, wild []string
	for e, owner := range c.owners {
		switch {
		case e.v4() != p.v4:
		case e.set == any4 || e.set == any6:
			wild = append(wild, e.rule(p, owner))
		default:
			specific = append(specific, e.rule(p, owner))
		}
	}
	if len(specific)+len(wild) == 0 {
		return nil
	}
	slices.Sort(specific)
	slices.Sort(wild)
	lines := append(specific, wild...) // an address of its own comes before all
	if !p.v4 {
		lines = slices.Insert(lines, 0, "-A "+p.chains[0]+" -d ::1/128 -j RETURN")
	}
	return lines
}

// guard are the rules that let nobody on the other side of an interface use that
// it routes loopback addresses (CVE-2020-8558). Which do is noted at the end.
func (p part) guard(c content) []string {
	if !slices.ContainsFunc(slices.Collect(maps.Keys(c.owners)), element.v4) {
		return nil
	}
	add := "-A " + p.chains[0]
	lines := []string{add + " -s 127.0.0.0/8 ! -i lo -j DROP", add + " -d 127.0.0.0/8 ! -i lo -j DROP"}
	for _, name := range c.opened {
		lines = append(lines, add+" -i "+name+" -j RETURN")
	}
	return lines
}

// rule is the element as iptables-save writes it.
func (e element) rule(p part, owner string) string {
	m := portOf(e)
	protocol := strings.ToLower(m.Protocol.String())
	comment := " -m comment --comment " + owner
	port := strconv.Itoa(int(m.HostPort))
	if e.set == return4 || e.set == return6 {
		from, pod := e.flow()
		return "-A " + p.chains[1] + " -s " + from.String() + " -d " + host(pod) + " -p " + protocol +
			" -m conntrack --ctorigdstport " + port + comment + " -j MASQUERADE"
	}
	to := ""
	if !m.wild() {
		to = " -d " + host(m.HostIP)
	}
	return "-A " + p.chains[0] + to + " -p " + protocol + " -m " + protocol + " --dport " + port + comment +
		" -j DNAT --to-destination " + e.leadsTo().String()
}

func host(a netip.Addr) string { return netip.PrefixFrom(a, a.BitLen()).String() }

// found is what there is of a part, in lines of iptables-save.
type found struct {
	chains       map[string]bool
	jumps, rules []string
}

func (f found) empty() bool { return len(f.chains)+len(f.jumps)+len(f.rules) == 0 }

// parseSaved picks what is ours, by the beginning of the names of chains.
func parseSaved(text, name string) found {
	f := found{chains: map[string]bool{}}
	ours := func(chain string) bool { return strings.HasPrefix(chain, name+"-") }
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		fields := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, ":") && ours(line[1:]):
			f.chains[fields[0][1:]] = true
		case len(fields) < 2 || fields[0] != "-A":
		case ours(fields[1]):
			f.rules = append(f.rules, line)
		case ours(arguments(fields)["-j"]):
			f.jumps = append(f.jumps, line)
		}
	}
	return f
}

// arguments are the options of a rule with what follows each; one that is negated
// is called so.
func arguments(fields []string) map[string]string {
	out := map[string]string{}
	not := ""
	for i, f := range fields {
		switch {
		case f == "!":
			not = "!"
		case strings.HasPrefix(f, "-"):
			value := ""
			if i+1 < len(fields) {
				value = strings.Trim(fields[i+1], `"`)
			}
			out[not+f] = value
			not = ""
		}
	}
	return out
}

// content adds what a part has to a content.
func (f found) content(p part, c *content) {
	for _, line := range f.rules {
		a := arguments(strings.Fields(line))
		if e, ok := p.element(a); ok {
			c.owners[e] = a["--comment"]
		}
		if p.table == "raw" && a["-j"] == "RETURN" && a["-i"] != "" {
			c.opened = append(c.opened, a["-i"])
		}
	}
}

var protocols = map[string]Protocol{"tcp": TCP, "6": TCP, "udp": UDP, "17": UDP, "sctp": SCTP, "132": SCTP}

// element is the inverse of element.rule.
func (p part) element(a map[string]string) (e element, ok bool) {
	protocol, known := protocols[a["-p"]]
	if p.table != "nat" || !known || a["--comment"] == "" {
		return element{}, false
	}
	m := Mapping{Protocol: protocol}
	to, toErr := netip.ParsePrefix(a["-d"])
	switch {
	case a["-A"] == p.chains[0] && a["-j"] == "DNAT":
		port, err := strconv.ParseUint(a["--dport"], 10, 16)
		pod, podErr := netip.ParseAddrPort(a["--to-destination"])
		if err != nil || podErr != nil || a["-d"] != "" && (toErr != nil || !to.IsSingleIP()) {
			return element{}, false
		}
		m.HostIP, m.HostPort, m.PodPort = to.Addr(), uint16(port), pod.Port()
		ok = pod.Addr().Is4() == p.v4 && pod.Addr().Zone() == "" && m.covers(pod.Addr()) && (a["-d"] == "" || !m.wild())
		return m.target(pod.Addr()), ok
	case a["-A"] == p.chains[1] && a["-j"] == "MASQUERADE":
		port, err := strconv.ParseUint(a["--ctorigdstport"], 10, 16)
		from, fromErr := netip.ParsePrefix(a["-s"])
		if err != nil || fromErr != nil || toErr != nil || !to.IsSingleIP() {
			return element{}, false
		}
		m.HostPort = uint16(port)
		ok = to.Addr().Is4() == p.v4 && from.Addr().Is4() == p.v4
		return m.back(from.Masked(), to.Addr()), ok
	}
	return element{}, false
}

// whole reports whether a part has as many rules and jumps as it should.
func (f found) whole(p part, want []string) bool {
	if len(want) == 0 {
		return f.empty()
	}
	bases := map[string]int{}
	for _, j := range f.jumps {
		bases[strings.Fields(j)[1]]++
	}
	for _, j := range p.jumps {
		bases[strings.Fields(j)[0]]--
	}
	for _, c := range p.chains {
		if !f.chains[c] {
			return false
		}
	}
	return len(f.rules) == len(want) && !slices.ContainsFunc(slices.Collect(maps.Values(bases)), func(n int) bool { return n != 0 })
}

// script is for iptables-restore. It makes the chains anew with the rules, or
// removes them when there are none.
func (f found) script(p part, rules []string) string {
	lines := []string{"*" + p.table}
	for _, j := range f.jumps {
		lines = append(lines, "-D"+strings.TrimPrefix(j, "-A"))
	}
	if len(rules) > 0 {
		for _, c := range p.chains {
			lines = append(lines, ":"+c+" - [0:0]") // makes it, or empties it
		}
		lines = append(lines, rules...)
		for _, j := range p.jumps {
			// First: what the rules of a network say of its pods' flows ends them.
			lines = append(lines, "-I "+j)
		}
	} else {
		for _, verb := range []string{"-F ", "-X "} {
			for _, c := range slices.Sorted(maps.Keys(f.chains)) {
				lines = append(lines, verb+c)
			}
		}
	}
	return strings.Join(append(lines, "COMMIT", ""), "\n")
}
