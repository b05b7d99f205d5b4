package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/vishvananda/netlink"
)

// links lists the ports of the scope's bridge. The bridge itself stays: the
// reference plugin never removes one.
func (s Scope) links(context.Context) ([]string, error) {
	ports, err := s.ports()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, p := range ports {
		found = append(found, fmt.Sprintf("link %s on %s", p.Attrs().Name, s.Bridge))
	}
	return found, nil
}

func (s Scope) ports() ([]netlink.Link, error) {
	bridge, err := s.bridge()
	if bridge == nil || err != nil {
		return nil, err
	}
	all, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var ports []netlink.Link
	for _, l := range all {
		if l.Attrs().MasterIndex == bridge.Attrs().Index {
			ports = append(ports, l)
		}
	}
	return ports, nil
}

// bridge returns nil when there is none.
func (s Scope) bridge() (netlink.Link, error) {
	l, err := netlink.LinkByName(s.Bridge)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find bridge %s: %w", s.Bridge, err)
	}
	return l, nil
}

func (s Scope) removeLinks() error {
	ports, err := s.ports()
	if err != nil {
		return err
	}
	bridge, err := s.bridge()
	if err != nil || bridge == nil {
		return err
	}
	var errs []error
	for _, l := range append(ports, bridge) {
		err := netlink.LinkDel(l)
		if _, there := netlink.LinkByIndex(l.Attrs().Index); err != nil && there == nil {
			errs = append(errs, fmt.Errorf("remove link %s: %w", l.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

// counters change by themselves.
var counters = regexp.MustCompile(`counter packets \d+ bytes \d+ ?|\[\d+:\d+\] ?| # handle \d+`)

// rules lists the firewall rules that name the scope's bridge, network, table or
// an address of its subnet, whichever tool wrote them.
func (s Scope) rules(ctx context.Context) ([]string, error) {
	var found []string
	for _, tool := range [][]string{
		{"nft", "list", "ruleset"},
		{"iptables-legacy-save"},
		{"ip6tables-legacy-save"},
	} {
		if !inUse(tool[0]) {
			continue
		}
		out, err := exec.CommandContext(ctx, tool[0], tool[1:]...).Output()
		if err != nil {
			return nil, fmt.Errorf("list rules with %s: %w", tool[0], err)
		}
		for line := range strings.Lines(string(out)) {
			if line = strings.TrimSpace(counters.ReplaceAllString(line, "")); s.named(line) {
				found = append(found, "rule "+line)
			}
		}
	}
	return found, nil
}

// chains are those that the scope's host ports may have in iptables.
func (s Scope) chains() []string {
	if s.Table == "" {
		return nil
	}
	return []string{s.Table + "-ports", s.Table + "-return", s.Table + "-guard"}
}

// removeChains removes the scope's chains of iptables if there are any.
func (s Scope) removeChains(ctx context.Context) error {
	if s.Table == "" {
		return nil
	}
	var errs []error
	for _, suffix := range []string{"-nft", "-legacy"} {
		for _, family := range []string{"iptables", "ip6tables"} {
			for _, table := range []string{"raw", "nat"} {
				errs = append(errs, s.removeChainsOf(ctx, family+suffix, table))
			}
		}
	}
	return errors.Join(errs...)
}

// removeChainsOf is removeChains for one tool and one of its tables.
func (s Scope) removeChainsOf(ctx context.Context, tool, table string) error {
	if !inUse(tool + "-save") {
		return nil
	}
	saved, err := exec.CommandContext(ctx, tool+"-save", "-t", table).Output()
	if err != nil {
		return nil // the kernel has no such table
	}
	script, ends := "*"+table+"\n", ""
	for line := range strings.Lines(string(saved)) {
		if !strings.Contains(line, s.Table+"-") {
			continue
		}
		if name, ok := strings.CutPrefix(line, ":"); ok {
			name = strings.Fields(name)[0]
			script, ends = script+"-F "+name+"\n", ends+"-X "+name+"\n"
		} else if !strings.HasPrefix(line, "-A "+s.Table) {
			script += "-D" + strings.TrimPrefix(line, "-A")
		}
	}
	if ends == "" {
		return nil
	}
	c := exec.CommandContext(ctx, tool+"-restore", "-w", "5", "--noflush")
	c.Stdin = strings.NewReader(script + ends + "COMMIT\n")
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("remove chains of %s: %w: %s", s.Table, err, out)
	}
	return nil
}

// removeTable removes the scope's table of nftables if there is one.
func (s Scope) removeTable(ctx context.Context) error {
	if s.Table == "" || !inUse("nft") || exec.CommandContext(ctx, "nft", "list", "table", "inet", s.Table).Run() != nil {
		return nil
	}
	if out, err := exec.CommandContext(ctx, "nft", "delete", "table", "inet", s.Table).CombinedOutput(); err != nil {
		return fmt.Errorf("remove table %s: %w: %s", s.Table, err, out)
	}
	return nil
}

// inUse says whether a tool can have rules to show: it is there, and for the
// old ones the kernel has tables of that kind.
func inUse(tool string) bool {
	if _, err := exec.LookPath(tool); err != nil {
		return false
	}
	names := map[string]string{
		"iptables-legacy-save":  "/proc/net/ip_tables_names",
		"ip6tables-legacy-save": "/proc/net/ip6_tables_names",
	}[tool]
	if names == "" {
		return true
	}
	tables, err := os.ReadFile(names)
	return err == nil && len(tables) > 0
}

var addressLike = regexp.MustCompile(`[0-9a-fA-F:.]*[.:][0-9a-fA-F:.]+`)

// named reports whether a rule speaks of this scope and of nothing wider.
func (s Scope) named(rule string) bool {
	for _, name := range append(s.chains(), s.Bridge, s.Network, s.Table) {
		if name != "" && regexp.MustCompile(`(^|[^\w-])`+regexp.QuoteMeta(name)+`($|[^\w-])`).MatchString(rule) {
			return true
		}
	}
	for _, a := range addressLike.FindAllString(rule, -1) {
		ip, err := netip.ParseAddr(a)
		if withPort, portErr := netip.ParseAddrPort(a); portErr == nil {
			ip, err = withPort.Addr(), nil
		}
		if err == nil && s.Subnet.IsValid() && s.Subnet.Contains(ip) {
			return true
		}
	}
	return false
}

// addresses lists the addresses that host-local has given out, and the results
// that the CNI library keeps.
func (s Scope) addresses(context.Context) ([]string, error) {
	var found []string
	err := filepath.WalkDir(s.IPAM, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, notIP := netip.ParseAddr(d.Name()); notIP == nil {
			found = append(found, "address "+path)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, f := range s.cachedResults() {
		found = append(found, "CNI result "+f)
	}
	return found, nil
}

// cachedResults are the scope's files in the CNI library's default cache.
func (s Scope) cachedResults() []string {
	if s.Network == "" {
		return nil
	}
	files, _ := filepath.Glob("/var/lib/cni/results/" + s.Network + "-*")
	return files
}
