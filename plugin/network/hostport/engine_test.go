package hostport

import (
	"errors"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// world is a network namespace with a bridge for pods.
type world struct {
	*testing.T
	options Options
}

func (w world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// run runs a script of the shell, which is to succeed.
func (w world) run(script string) {
	w.Helper()
	if out, err := exec.Command("sh", "-ec", strings.ReplaceAll(script, "NAME", w.options.Name)).CombinedOutput(); err != nil {
		w.Fatalf("%s: %v: %s", script, err, out)
	}
}

const uplinkName = "br0"

// newWorld puts the test into a network namespace of its own.
func newWorld(t *testing.T, e Engine) world {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	w := world{t, Options{Name: "gantry-0123abcd", Engine: e, Note: filepath.Join(t.TempDir(), "note")}}
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	w.must(unix.Unshare(unix.CLONE_NEWNET))
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: uplinkName}}
	w.must(netlink.LinkAdd(bridge))
	address, err := netlink.ParseAddr("10.88.1.1/24")
	w.must(err)
	w.must(netlink.AddrAdd(bridge, address))
	w.must(netlink.LinkSetUp(bridge))
	return w
}

// oldTools makes the tools for kernels without nftables those of the node.
func oldTools(t *testing.T) {
	dir := t.TempDir()
	for _, tool := range []string{"iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore"} {
		if err := os.Symlink("/usr/sbin/xtables-legacy-multi", filepath.Join(dir, tool)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// TestEngines holds every engine to the same: what it keeps, what a later daemon
// finds, that what others remove comes back, and that nothing is left.
func TestEngines(t *testing.T) {
	for _, c := range []struct {
		name   string
		engine Engine
		old    bool
		harms  map[string]string
	}{
		{"nftables", NFTables, false, map[string]string{
			"all of it":       "nft flush ruleset",
			"the rules":       "nft flush table inet NAME",
			"one chain's":     "nft flush chain inet NAME output",
			"a chain":         "nft flush chain inet NAME output; nft delete chain inet NAME output",
			"elements":        "nft flush map inet NAME any4",
			"the interface's": "echo 0 > /proc/sys/net/ipv4/conf/br0/route_localnet",
		}},
		{"iptables", IPTables, false, map[string]string{
			"all of it":         "nft flush ruleset",
			"jumps":             "iptables -t nat -F PREROUTING; ip6tables -t nat -F OUTPUT",
			"chains":            "iptables -t nat -F; iptables -t nat -X; iptables -t raw -F; iptables -t raw -X",
			"what comes back":   "iptables -t nat -F NAME-return",
			"IPv6":              "ip6tables -t nat -F; ip6tables -t nat -X",
			"a jump is doubled": "iptables -t nat -A PREROUTING -j NAME-ports",
			"the interface's":   "echo 0 > /proc/sys/net/ipv4/conf/br0/route_localnet",
		}},
		{"iptables, old tools", IPTables, true, map[string]string{
			"jumps":   "iptables-legacy -t nat -F PREROUTING; ip6tables-legacy -t nat -F OUTPUT",
			"chains":  "iptables-legacy -t nat -F; iptables-legacy -t nat -X",
			"a guard": "iptables-legacy -t raw -F",
			"a rule":  "iptables-legacy -t nat -D NAME-ports 1",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.old {
				oldTools(t)
			}
			w := newWorld(t, c.engine)
			w.suite(c.harms)
		})
	}
}

var web = Pod{
	ID:        strings.Repeat("0123456789abcdef", 4),
	Addresses: []netip.Prefix{netip.MustParsePrefix("10.88.1.5/24"), netip.MustParsePrefix("fd00::5/64")},
	Ports:     []Mapping{port("", 80, TCP, 8080), port("", 53, UDP, 53), port("10.0.0.1", 80, TCP, 8081)},
}

var mail = Pod{ID: "mail", Addresses: web.Addresses[:1], Ports: []Mapping{port("0.0.0.0", 25, TCP, 25), port("127.0.0.1", 26, TCP, 25)}}

// wants compares what the kernel has with what the pods should have.
func (w world) wants(table *Table, pods ...Pod) {
	w.Helper()
	want := map[element]string{}
	for _, p := range pods {
		elements, err := p.elements()
		w.must(err)
		for e := range elements {
			want[e] = p.ID
		}
	}
	have, err := table.engine.read(w.Context())
	w.must(err)
	if !maps.Equal(have.owners, want) || !have.whole || !slices.Equal(have.opened, []string{uplinkName}) {
		w.Errorf("the kernel has %q, want %q; whole %t, open %v", have.owners, want, have.whole, have.opened)
	}
	if value, err := os.ReadFile(setting(uplinkName)); err != nil || string(value) != "1\n" {
		w.Errorf("loopback addresses are not routed: %q, %v", value, err)
	}
}

func (w world) suite(harms map[string]string) {
	ctx := w.Context()
	table := New(w.options)
	for _, p := range []Pod{web, mail, web} {
		w.must(table.Map(ctx, p))
	}
	w.wants(table, web, mail)

	next := New(w.options) // the next daemon
	if ids, err := next.Pods(ctx); err != nil || !slices.Equal(ids, []string{web.ID, mail.ID}) {
		w.Errorf("the next daemon finds %v, %v", ids, err)
	}
	w.must(next.Renew(ctx))
	w.wants(next, web, mail)
	if err := next.Map(ctx, Pod{ID: "third", Addresses: web.Addresses, Ports: web.Ports[1:2]}); !errors.As(err, new(*Conflict)) {
		w.Errorf("a port of another pod: %v", err)
	}
	w.must(next.Unmap(ctx, "third"))
	for _, p := range []Pod{web, mail} {
		w.must(next.Map(ctx, p))
	}

	for what, script := range harms {
		for _, mended := range []bool{true, false, false} {
			if mended {
				w.run(script)
			}
			if got, err := next.Mend(ctx); err != nil || got != mended {
				w.Errorf("%s: put back %t, want %t, %v", what, got, mended, err)
			}
		}
		w.wants(next, web, mail)
	}
	for what, script := range harms { // and nobody has put it back yet
		w.run(script)
		moved := mail
		moved.Ports = mail.Ports[:1]
		w.must(next.Map(ctx, moved))
		w.wants(next, web, moved)
		w.must(next.Map(ctx, mail))
		if w.Failed() {
			w.Fatal(what)
		}
	}
	w.must(next.Unmap(ctx, web.ID))
	w.wants(next, mail)
	w.must(next.Unmap(ctx, mail.ID))
	w.nothing(next.engine)
	if mended, err := next.Mend(ctx); mended || err != nil {
		w.Errorf("without pods: %t, %v", mended, err)
	}
}

func (w world) nothing(e engine) {
	w.Helper()
	have, err := e.read(w.Context())
	w.must(err)
	if have.exists || len(have.owners) > 0 {
		w.Errorf("left: %+v", have)
	}
	if value, err := os.ReadFile(setting(uplinkName)); err != nil || string(value) != "0\n" {
		w.Errorf("loopback addresses are still routed: %q, %v", value, err)
	}
	if _, err := os.Stat(w.options.Note); !errors.Is(err, os.ErrNotExist) {
		w.Errorf("the note is left: %v", err)
	}
}

// TestEngineChanges has the ports of one engine taken back by a daemon that is told
// to take the other one.
func TestEngineChanges(t *testing.T) {
	for _, c := range []struct{ from, to Engine }{{NFTables, IPTables}, {IPTables, NFTables}, {IPTables, ""}} {
		t.Run(string(c.from)+" to "+string(c.to), func(t *testing.T) {
			w := newWorld(t, c.from)
			before := New(w.options)
			w.must(before.Map(t.Context(), web))
			w.options.Engine = c.to
			after := New(w.options)
			if ids, err := after.Pods(t.Context()); err != nil || len(ids) > 0 {
				t.Errorf("pods are %v, %v", ids, err)
			}
			w.nothing(before.engine)
			w.must(after.Map(t.Context(), web))
			w.wants(after, web)
			w.must(after.Unmap(t.Context(), web.ID))
			w.nothing(after.engine)
		})
	}
}

// TestNoEngine refuses ports where nothing can map them, and nothing else.
func TestNoEngine(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	w := newWorld(t, IPTables)
	table := New(w.options)
	if ids, err := table.Pods(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("pods: %v, %v", ids, err)
	}
	w.must(table.Renew(t.Context()))
	if err := table.Map(t.Context(), web); !errors.Is(err, errNoEngine) {
		t.Errorf("map: %v", err)
	}
	w.must(table.Unmap(t.Context(), web.ID))
}

// FuzzSaved reads what iptables-save may write: what is understood is written as
// the same again.
func FuzzSaved(f *testing.F) {
	for _, seed := range []string{
		"-A x-ports -d 10.0.0.1/32 -p tcp -m tcp --dport 80 -m comment --comment abc -j DNAT --to-destination 10.88.0.5:8080",
		"-A x-ports -p sctp -m sctp --dport 80 -m comment --comment \"a.b\" -j DNAT --to-destination [fd00::5]:8080",
		"-A x-return -s 10.88.0.0/16 -d 10.88.0.5/32 -p 17 -m conntrack --ctorigdstport 80 -m comment --comment a -j MASQUERADE",
		"-A x-guard -i br0 -j RETURN", ":x-ports - [0:0]", "-A PREROUTING -j x-ports", "-A x-ports ! -p tcp", "! -d - -A", "-A x-ports -d",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, p := range parts("x") {
			c := content{owners: map[element]string{}}
			parseSaved(text, "x").content(p, &c)
			for e, owner := range c.owners {
				again := content{owners: map[element]string{}}
				parseSaved(e.rule(p, owner), "x").content(p, &again)
				if !maps.Equal(again.owners, map[element]string{e: owner}) {
					t.Errorf("%q of %q is written as %q and read as %q", e, owner, e.rule(p, owner), again.owners)
				}
			}
		}
	})
}
