package hostport

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/gantry-cri/gantry/plugin/flight"
	"github.com/google/nftables"
	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Table is a table of nftables in the network namespace of the daemon. It is safe
// for concurrent use; one change is made after the other.
type Table struct {
	name string
	turn flight.Turns[struct{}]
	// pods are those that have elements, nil before the kernel was asked; in
	// the turn.
	pods map[string]bool
}

// New names a table; nothing is made before there is a port to map.
func New(name string) *Table { return &Table{name: name} }

// content is what a table has.
type content struct {
	exists bool
	owners map[element]string
	opened []string // names of interfaces
}

// change says what is to become of a pod's elements.
type change struct {
	pod  string
	want map[element]bool
	// open is the interface that has to route loopback addresses, if any.
	open string
	// anew makes the rules new also if the table is there.
	anew bool
}

// Map makes the node's ports lead to the pod, those of its list and no other. The
// pod's flows that were on another way before are forgotten.
func (t *Table) Map(ctx context.Context, p Pod) error {
	if err := Supported(p.Ports); err != nil {
		return err
	}
	want, err := p.elements()
	if err != nil {
		return err
	}
	if err := t.change(ctx, change{pod: p.ID, want: want, open: uplink(ctx, p)}); err != nil {
		return fmt.Errorf("map host ports: %w", err)
	}
	forget(ctx, want, true)
	return nil
}

// Unmap takes a pod's ports back, whatever it has.
func (t *Table) Unmap(ctx context.Context, id string) error {
	if err := t.change(ctx, change{pod: id}); err != nil {
		return fmt.Errorf("unmap host ports: %w", err)
	}
	return nil
}

// Renew makes the rules of the table anew around the ports that it has, or removes
// it when it has none: they may be those of an earlier release, or half gone.
func (t *Table) Renew(ctx context.Context) error {
	if err := t.change(ctx, change{anew: true}); err != nil {
		return fmt.Errorf("renew host ports: %w", err)
	}
	return nil
}

// Pods are the IDs of those that have ports.
func (t *Table) Pods(ctx context.Context) ([]string, error) {
	done, err := t.turn.Take(ctx, struct{}{})
	if err != nil {
		return nil, err
	}
	defer done()
	if err := t.know(); err != nil {
		return nil, fmt.Errorf("list host ports: %w", err)
	}
	return slices.Sorted(maps.Keys(t.pods)), nil
}

// know asks the kernel which pods have ports, once: nobody else changes the table.
func (t *Table) know() error {
	if t.pods != nil {
		return nil
	}
	have, err := t.read()
	if err != nil {
		return err
	}
	t.pods = map[string]bool{}
	for _, pod := range have.owners {
		t.pods[pod] = true
	}
	return nil
}

// tries is how often a change is tried: others may remove all tables meanwhile.
const tries = 3

func (t *Table) change(ctx context.Context, c change) error {
	done, err := t.turn.Take(ctx, struct{}{})
	if err != nil {
		return err
	}
	defer done()
	if err := t.know(); err != nil {
		return err
	}
	if len(c.want) == 0 && !c.anew && !t.pods[c.pod] {
		return nil
	}
	var gone map[element]bool
	for range tries {
		if gone, err = t.apply(ctx, c); err == nil || errors.As(err, new(*Conflict)) {
			break
		}
	}
	if err != nil {
		return err
	}
	delete(t.pods, c.pod)
	if len(c.want) > 0 {
		t.pods[c.pod] = true
	}
	forget(ctx, gone, false)
	return nil
}

// apply makes one transaction of the difference and returns the elements that went.
func (t *Table) apply(ctx context.Context, c change) (map[element]bool, error) {
	have, err := t.read()
	if err != nil {
		return nil, err
	}
	add, remove, err := c.difference(have)
	if err != nil {
		return nil, err
	}
	if len(have.owners)+len(add) == len(remove) {
		return remove, t.remove(ctx, have)
	}
	// Also when it is noted: an earlier daemon may have died before it did it.
	open := c.open != "" && closed(c.open)
	if len(add)+len(remove) == 0 && !c.anew && !open {
		return nil, nil
	}
	l := newLayout(t.name)
	conn, err := dial()
	if err != nil {
		return nil, explain(err)
	}
	if have.exists && c.anew {
		conn.DelTable(l.table)
	}
	if !have.exists || c.anew {
		if err := l.make(conn); err != nil {
			return nil, err
		}
	}
	if c.anew {
		err = l.restore(conn, have)
	} else {
		err = errors.Join(l.delete(conn, remove), l.add(conn, c.pod, add), l.forgetGone(conn, have.opened))
	}
	if open && !slices.Contains(have.opened, c.open) {
		err = errors.Join(err, l.addOpened(conn, c.open))
	}
	if err != nil {
		return nil, fmt.Errorf("write rules: %w: %w", err, errdefs.ErrInternal)
	}
	if err := conn.Flush(); err != nil {
		return nil, explain(err)
	}
	if open {
		route(ctx, c.open, true)
	}
	return remove, nil
}

// difference is what is to be added to and removed from what there is.
func (c change) difference(have content) (add, remove map[element]bool, err error) {
	add, remove = maps.Clone(c.want), map[element]bool{}
	keys := map[element]bool{}
	for e := range c.want {
		keys[element{set: e.set, key: e.key}] = true
	}
	for e, owner := range have.owners {
		switch {
		case owner == c.pod && c.want[e]:
			delete(add, e)
		case owner == c.pod && !c.anew:
			remove[e] = true
		case keys[element{set: e.set, key: e.key}]:
			return nil, nil, &Conflict{Want: portOf(e), Has: portOf(e), ID: owner}
		}
	}
	return add, remove, nil
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

// read asks the kernel for the content; a kernel without nftables has none.
func (t *Table) read() (content, error) {
	out := content{owners: map[element]string{}}
	conn := &nftables.Conn{}
	table, err := conn.ListTableOfFamily(t.name, nftables.TableFamilyINet)
	if errors.Is(err, unix.ENOENT) || unsupported(err) {
		return out, nil
	}
	if err != nil {
		return out, fmt.Errorf("read rules: %w", err)
	}
	out.exists = true
	sets, err := conn.GetSets(table)
	if err != nil {
		return out, fmt.Errorf("read rules: %w", err)
	}
	for _, set := range sets {
		if !slices.Contains(setNames, set.Name) {
			continue
		}
		elements, err := conn.GetSetElements(set)
		if err != nil {
			return out, fmt.Errorf("read rules: %w", err)
		}
		for _, e := range elements {
			if set.Name == opened {
				out.opened = append(out.opened, strings.TrimRight(string(e.Key), "\x00"))
				continue
			}
			out.owners[element{set: set.Name, key: string(e.Key), end: string(e.KeyEnd), val: string(e.Val)}] = e.Comment
		}
	}
	return out, nil
}

// remove ends the table, after the interfaces are as they were.
func (t *Table) remove(ctx context.Context, have content) error {
	if !have.exists {
		return nil
	}
	for _, name := range have.opened {
		route(ctx, name, false)
	}
	conn := &nftables.Conn{}
	conn.DelTable(&nftables.Table{Name: t.name, Family: nftables.TableFamilyINet})
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return explain(err)
	}
	return nil
}

func (l layout) make(conn *nftables.Conn) error {
	conn.AddTable(l.table)
	for _, s := range l.sets {
		if err := conn.AddSet(s, nil); err != nil {
			return err
		}
	}
	for _, c := range l.chains {
		conn.AddChain(c.Chain)
		for _, r := range c.rules {
			conn.AddRule(&nftables.Rule{Table: l.table, Chain: c.Chain, Exprs: r})
		}
	}
	return nil
}

const (
	// perMessage is how many elements are in one message: a list's length in
	// bytes is a number of 16 bits.
	perMessage = 100
	// buffer is for all messages of a transaction, as the kernel takes it as one.
	buffer = 8 << 20
)

// dial returns a connection for one transaction.
func dial() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(func(c *nl.Conn) error { return c.SetWriteBuffer(buffer) }))
}

// bySet sorts elements into the form of the library.
func (l layout) bySet(elements map[element]bool, owner func(element) string) map[*nftables.Set][]nftables.SetElement {
	out := map[*nftables.Set][]nftables.SetElement{}
	for e := range elements {
		s := l.sets[slices.Index(setNames, e.set)]
		n := nftables.SetElement{Key: []byte(e.key), KeyEnd: []byte(e.end), Val: []byte(e.val), Comment: owner(e)}
		out[s] = append(out[s], n)
	}
	return out
}

func (l layout) add(conn *nftables.Conn, pod string, elements map[element]bool) error {
	return l.addOwned(conn, elements, func(element) string { return pod })
}

func (l layout) addOwned(conn *nftables.Conn, elements map[element]bool, owner func(element) string) error {
	for s, list := range l.bySet(elements, owner) {
		for part := range slices.Chunk(list, perMessage) {
			if err := conn.SetAddElements(s, part); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l layout) delete(conn *nftables.Conn, elements map[element]bool) error {
	for s, list := range l.bySet(elements, func(element) string { return "" }) {
		for part := range slices.Chunk(list, perMessage) {
			if err := conn.SetDeleteElements(s, part); err != nil {
				return err
			}
		}
	}
	return nil
}

// restore puts the content into a table that was made anew.
func (l layout) restore(conn *nftables.Conn, have content) error {
	elements := map[element]bool{}
	for e := range have.owners {
		elements[e] = true
	}
	err := l.addOwned(conn, elements, func(e element) string { return have.owners[e] })
	for _, name := range have.opened {
		if there(name) {
			err = errors.Join(err, l.addOpened(conn, name))
		}
	}
	return err
}

func (l layout) addOpened(conn *nftables.Conn, name string) error {
	return conn.SetAddElements(l.sets[slices.Index(setNames, opened)], []nftables.SetElement{{Key: ifName(name)}})
}

// forgetGone drops interfaces that went with their pods.
func (l layout) forgetGone(conn *nftables.Conn, names []string) error {
	var gone []nftables.SetElement
	for _, name := range names {
		if !there(name) {
			gone = append(gone, nftables.SetElement{Key: ifName(name)})
		}
	}
	if len(gone) == 0 {
		return nil
	}
	return conn.SetDeleteElements(l.sets[slices.Index(setNames, opened)], gone)
}

func ifName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// unsupported reports whether the kernel has no nftables.
func unsupported(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

// explain gives an error of the kernel its class.
func explain(err error) error {
	if unsupported(err) || errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("the kernel does not take the rules, it may be built without nftables, its NAT or fib (cni.host_ports has other ways): %w: %w",
			err, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("write rules: %w: %w", err, errdefs.ErrInternal)
}

// conntrackDir has a file of the times of each protocol that is tracked.
const conntrackDir = "/proc/sys/net/netfilter"

// Supported reports a protocol that the kernel cannot map. It has to know the
// protocol's flows; that programs of the node have no sockets of it is no matter.
func Supported(ports []Mapping) error { return supportedBy(os.DirFS(conntrackDir), ports) }

// uplink is the interface through which the node reaches a pod that must be
// reachable from the node's loopback addresses; empty if it need not be.
func uplink(ctx context.Context, p Pod) string {
	a, ok := p.address(true)
	if !ok || !slices.ContainsFunc(p.Ports, func(m Mapping) bool { return m.covers(a.Addr()) && (m.wild() || loopback4.Contains(m.HostIP)) }) {
		return ""
	}
	name, err := routeTo(a.Addr())
	if err != nil {
		log.G(ctx).WithError(err).WithField("sandbox", p.ID).Warn("the pod's host ports are not reached by 127.0.0.1")
	}
	return name
}

func routeTo(a netip.Addr) (string, error) {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		return "", fmt.Errorf("find route to %s: %w", a, errors.Join(err, errdefs.ErrNotFound))
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", fmt.Errorf("find interface of %s: %w", a, err)
	}
	return link.Attrs().Name, nil
}

// setting is the file that says whether an interface routes loopback addresses.
func setting(name string) string {
	return filepath.Join("/proc/sys/net/ipv4/conf", name, "route_localnet")
}

func there(name string) bool {
	_, err := os.Stat(setting(name))
	return err == nil
}

func closed(name string) bool {
	value, err := os.ReadFile(setting(name))
	return err == nil && strings.TrimSpace(string(value)) == "0"
}

// route lets an interface route loopback addresses, or not. What cannot be set
// costs the way from 127.0.0.1 only.
func route(ctx context.Context, name string, on bool) {
	value := "0"
	if on {
		value = "1"
	}
	if err := os.WriteFile(setting(name), []byte(value), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
		log.G(ctx).WithError(err).WithField("interface", name).Warn("host ports: cannot change whether loopback addresses are routed")
	}
}
