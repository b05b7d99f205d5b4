package hostport

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	nl "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nfTables is the engine of a table of nftables. It needs no program: a change is
// one transaction over netlink, of both families of addresses.
type nfTables struct{ name string }

// probe tries all that a table needs in a transaction that leaves nothing.
func (n nfTables) probe() error {
	l := newLayout(n.name + "-probe")
	conn, err := dial()
	if err != nil {
		return explain(err)
	}
	if err := l.make(conn); err != nil {
		return err
	}
	conn.DelTable(l.table)
	if err := conn.Flush(); err != nil {
		return explain(err)
	}
	return nil
}

// read asks the kernel for the content; a kernel without nftables has none.
func (n nfTables) read(context.Context) (content, error) {
	out := content{owners: map[element]string{}}
	conn := &nftables.Conn{}
	table, err := conn.ListTableOfFamily(n.name, nftables.TableFamilyINet)
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
	known := 0
	for _, set := range sets {
		if !slices.Contains(setNames, set.Name) {
			continue
		}
		known++
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
	slices.Sort(out.opened)
	ruled, err := n.ruled(conn)
	out.whole = ruled && known == len(setNames)
	return out, err
}

// ruled reports whether the chains have as many rules as they should.
func (n nfTables) ruled(conn *nftables.Conn) (bool, error) {
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("read rules: %w", err)
	}
	there := map[string]bool{}
	for _, c := range chains {
		if c.Table.Name == n.name {
			there[c.Name] = true
		}
	}
	rules, err := n.countRules()
	if err != nil {
		return false, fmt.Errorf("read rules: %w", err)
	}
	for _, c := range newLayout(n.name).chains {
		if !there[c.Name] || rules[c.Name] != len(c.rules) {
			return false, nil
		}
	}
	return true, nil
}

// countRules returns how many rules each chain of the table has. The library reads
// what they say, which is of no interest, and not all of it can be read by it.
func (n nfTables) countRules() (map[string]int, error) {
	c, err := nl.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	table, err := nl.MarshalAttributes([]nl.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: append([]byte(n.name), 0)}})
	if err != nil {
		return nil, err
	}
	answers, err := c.Execute(nl.Message{
		Header: nl.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: nl.Request | nl.Dump},
		Data:   append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, table...),
	})
	if err != nil {
		return nil, err
	}
	count := map[string]int{}
	for _, m := range answers {
		a, err := nl.NewAttributeDecoder(m.Data[min(4, len(m.Data)):])
		if err != nil {
			return nil, err
		}
		for a.Next() {
			if a.Type() == unix.NFTA_RULE_CHAIN {
				count[a.String()]++
			}
		}
		if a.Err() != nil {
			return nil, a.Err()
		}
	}
	return count, nil
}

// write makes one transaction of the difference, or of all if what is there is not
// whole.
func (n nfTables) write(_ context.Context, have, want content) error {
	l := newLayout(n.name)
	conn, err := dial()
	if err != nil {
		return explain(err)
	}
	if have.exists && !have.whole {
		conn.DelTable(l.table)
		have = content{}
	}
	if !have.exists {
		if err := l.make(conn); err != nil {
			return fmt.Errorf("write rules: %w: %w", err, errdefs.ErrInternal)
		}
	}
	d := difference(have.owners, want.owners)
	err = errors.Join(
		l.delete(conn, d.removed), l.add(conn, d.added, want.owners),
		l.close(conn, without(have.opened, want.opened)), l.open(conn, without(want.opened, have.opened)),
	)
	if err != nil {
		return fmt.Errorf("write rules: %w: %w", err, errdefs.ErrInternal)
	}
	if err := conn.Flush(); err != nil {
		return explain(err)
	}
	return nil
}

func (n nfTables) remove(context.Context) error {
	conn := &nftables.Conn{}
	conn.DelTable(&nftables.Table{Name: n.name, Family: nftables.TableFamilyINet})
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return explain(err)
	}
	return nil
}

func (n nfTables) generation() string { return generation() }

// generation is the number that the kernel counts the changes of all tables of
// nftables with, empty if it does not tell.
func generation() string {
	c, err := nl.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return ""
	}
	defer c.Close()
	answers, err := c.Execute(nl.Message{
		Header: nl.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: nl.Request},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
	})
	if err != nil || len(answers) != 1 || len(answers[0].Data) < 4 {
		return ""
	}
	attributes, err := nl.UnmarshalAttributes(answers[0].Data[4:])
	if err != nil {
		return ""
	}
	for _, a := range attributes {
		if a.Type == unix.NFTA_GEN_ID {
			return fmt.Sprintf("%x", a.Data)
		}
	}
	return ""
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
func (l layout) bySet(elements map[element]bool, owners map[element]string) map[*nftables.Set][]nftables.SetElement {
	out := map[*nftables.Set][]nftables.SetElement{}
	for e := range elements {
		s := l.sets[slices.Index(setNames, e.set)]
		n := nftables.SetElement{Key: []byte(e.key), KeyEnd: []byte(e.end), Val: []byte(e.val), Comment: owners[e]}
		out[s] = append(out[s], n)
	}
	return out
}

func (l layout) add(conn *nftables.Conn, elements map[element]bool, owners map[element]string) error {
	for s, list := range l.bySet(elements, owners) {
		for part := range slices.Chunk(list, perMessage) {
			if err := conn.SetAddElements(s, part); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l layout) delete(conn *nftables.Conn, elements map[element]bool) error {
	for s, list := range l.bySet(elements, nil) {
		for part := range slices.Chunk(list, perMessage) {
			if err := conn.SetDeleteElements(s, part); err != nil {
				return err
			}
		}
	}
	return nil
}

// open notes interfaces that route loopback addresses.
func (l layout) open(conn *nftables.Conn, names []string) error {
	if len(names) == 0 {
		return nil
	}
	return conn.SetAddElements(l.sets[slices.Index(setNames, opened)], interfaceElements(names))
}

// close drops interfaces that went with their pods.
func (l layout) close(conn *nftables.Conn, names []string) error {
	if len(names) == 0 {
		return nil
	}
	return conn.SetDeleteElements(l.sets[slices.Index(setNames, opened)], interfaceElements(names))
}

func interfaceElements(names []string) (out []nftables.SetElement) {
	for _, name := range names {
		b := make([]byte, unix.IFNAMSIZ)
		copy(b, name)
		out = append(out, nftables.SetElement{Key: b})
	}
	return out
}

// without is a without what is in b.
func without(a, b []string) (out []string) {
	for _, s := range a {
		if !slices.Contains(b, s) {
			out = append(out, s)
		}
	}
	return out
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
