package lifecycle

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// dualBridge is a network of both families without a plugin for host ports.
var dualBridge = daemon.Conflist(conflist("1.1.0", strings.NewReplacer(
	`[{"subnet": "SUBNET"}]`, `[{"subnet": "SUBNET"}], [{"subnet": "SUBNET6"}]`,
	`{"dst": "0.0.0.0/0"}`, `{"dst": "0.0.0.0/0"}, {"dst": "::/0"}`,
).Replace(bridged)))

// withoutPortmap leaves the daemon the two plugins that dualBridge needs.
var withoutPortmap = daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
	cni := c["plugins"].(daemon.Config)[daemon.RuntimePlugin].(daemon.Config)["cni"].(daemon.Config)
	dir := filepath.Join(in.Dir, "two")
	must(os.Mkdir(dir, 0o755))
	for _, bin := range cni["bin_dirs"].([]string) {
		for _, name := range []string{"bridge", "host-local"} {
			if _, err := os.Stat(filepath.Join(bin, name)); err == nil {
				must(os.Symlink(filepath.Join(bin, name), filepath.Join(dir, name)))
			}
		}
	}
	cni["bin_dirs"] = []string{dir}
})

func hostPorts(way string) daemon.Option {
	return daemon.Set(way, "plugins", daemon.RuntimePlugin, "cni", "host_ports")
}

// engine is a way to have host ports in the kernel, and how others take them out.
type engine struct {
	name, way string
	old       bool // with the tools for kernels without nftables
	harms     []string
}

var engines = []engine{
	{"nftables", "native", false, []string{"nft delete table inet NAME", "nft flush table inet NAME", "nft flush map inet NAME any4", closeBridge}},
	{"iptables", "iptables", false, []string{
		"iptables -t nat -D PREROUTING -m addrtype --dst-type LOCAL -j NAME-ports; ip6tables -t nat -F NAME-ports",
		"iptables -t nat -D OUTPUT -m addrtype --dst-type LOCAL -j NAME-ports; iptables -t nat -F NAME-return", closeBridge,
	}},
	{"iptables of old", "iptables", true, []string{
		"iptables-legacy -w 5 -t nat -D PREROUTING -m addrtype --dst-type LOCAL -j NAME-ports; ip6tables-legacy -w 5 -t nat -F NAME-ports",
		"iptables-legacy -w 5 -t raw -F NAME-guard; iptables-legacy -w 5 -t nat -F NAME-return", closeBridge,
	}},
}

const closeBridge = "echo 0 > /proc/sys/net/ipv4/conf/BRIDGE/route_localnet"

// daemon starts one that takes the engine.
func (e engine) daemon(t *testing.T) *daemon.Daemon {
	t.Helper()
	options := []daemon.Option{dualBridge, withoutPortmap, hostPorts(e.way)}
	if !e.old {
		return start(t, options...)
	}
	dir := t.TempDir()
	for _, tool := range []string{"iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore"} {
		if err := os.Symlink("/usr/sbin/xtables-legacy-multi", filepath.Join(dir, tool)); err != nil {
			t.Fatal(err)
		}
	}
	return start(t, append(options, daemon.PathFirst(dir))...)
}

// A daemon under this program finds a kernel without nftables: no process of its
// can open a socket for them.
const (
	oldKernelProgram = "gantry-test-old-kernel"
	oldKernelDaemon  = "GANTRY_TEST_OLD_KERNEL_DAEMON"
)

// onOldKernel has a daemon run under the program.
func onOldKernel(t *testing.T) []daemon.Option {
	t.Helper()
	return under(t, oldKernelProgram, oldKernelDaemon)
}

// under has a daemon started by this program under a name, which finds the daemon's by a
// variable.
func under(t *testing.T, name, variable string) []daemon.Option {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), name)
	if err := os.Symlink(exe, program); err != nil {
		t.Fatal(err)
	}
	dirs, err := daemon.BinDirs()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		if real := filepath.Join(dir, "containerd"); exists(real) {
			return []daemon.Option{daemon.Binary(program), daemon.Env(variable, real)}
		}
	}
	t.Fatalf("no containerd in %v", dirs)
	return nil
}

// oldKernelMain becomes the daemon, behind a filter of system calls.
func oldKernelMain() {
	runtime.LockOSThread() // the filter is the thread's, and so is what it becomes
	const load, equal, end = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	filter := []unix.SockFilter{
		{Code: load, K: 0}, {Code: equal, K: unix.SYS_SOCKET, Jf: 5},
		{Code: load, K: 16}, {Code: equal, K: unix.AF_NETLINK, Jf: 3},
		{Code: load, K: 32}, {Code: equal, K: unix.NETLINK_NETFILTER, Jf: 1},
		{Code: end, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPROTONOSUPPORT)},
		{Code: end, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	must(unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0))
	real := os.Getenv(oldKernelDaemon)
	must(unix.Exec(real, append([]string{real}, os.Args[1:]...), os.Environ()))
}

func published(ports ...*cri.PortMapping) func(*cri.PodSandboxConfig) {
	return func(c *cri.PodSandboxConfig) { c.PortMappings = ports }
}

// rulesOf is the daemon's table of host ports, empty if it has none.
func rulesOf(t *testing.T, d *daemon.Daemon) string {
	t.Helper()
	all, err := exec.Command("nft", "list", "ruleset").Output()
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(all), "table inet "+d.Scope().Table+" {")
	if !found {
		return ""
	}
	table, _, _ := strings.Cut(rest, "\n}")
	return table
}

// farHost is a network namespace that stands for another machine, behind a link
// of its own to the node.
type farHost struct {
	path         string
	node4, node6 string // the node's addresses on the link
	client4      string
}

// newFarHost makes one whose default route is the node.
func newFarHost(t *testing.T, d *daemon.Daemon) farHost {
	t.Helper()
	n := d.Scope().Subnet.Addr().As4()[2]
	o := farHost{
		node4: fmt.Sprintf("10.214.%d.1", n), client4: fmt.Sprintf("10.214.%d.2", n),
		node6: fmt.Sprintf("fd00:214:%x::1", n),
	}
	ns := newNetns(t)
	o.path = fmt.Sprintf("/proc/self/fd/%d", ns.Fd())
	name := fmt.Sprintf("gout%d", n)
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(ns.Fd()))}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netlink.LinkDel(link); err != nil {
			t.Error(err)
		}
	})
	address := func(name string, addresses ...string) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, a := range addresses {
			parsed, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			parsed.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(l, parsed); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(l)
	}
	err := errors.Join(address(name, o.node4+"/24", o.node6+"/64"), inNetns(o.path, func() error {
		if err := address("eth0", o.client4+"/24", fmt.Sprintf("fd00:214:%x::2/64", n)); err != nil {
			return err
		}
		return errors.Join(netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(o.node4)}), netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(o.node6)}))
	}))
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// newNetns makes a network namespace that lasts as long as its file is open.
func newNetns(t *testing.T) *os.File {
	t.Helper()
	type result struct {
		f   *os.File
		err error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		var f *os.File
		if err == nil {
			f, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- result{f, err}
	}()
	r := <-made
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { r.f.Close() })
	return r.f
}

// answering has the network namespace of a pod answer, on every address, with a
// name and the address of whoever asks.
func answering(t *testing.T, netns, network, name string, port int) {
	t.Helper()
	if network == "udp" {
		answerUDP(t, netns, "udp", fmt.Sprintf(":%d", port), func(_ []byte, from net.Addr) []byte {
			return []byte(name + " to " + from.String())
		})
		return
	}
	var l net.Listener
	if err := inNetns(netns, func() (err error) { l, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); return err }); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			_, _ = fmt.Fprintf(c, "%s to %s", name, c.RemoteAddr()) // the reader tells
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
}

// ask opens a connection from a network namespace, "" for the node's, and returns
// what it is told.
func ask(netns, network, host string, port int32) (answer string, err error) {
	var c net.Conn
	dial := func() (err error) {
		d := net.Dialer{Timeout: 2 * time.Second}
		c, err = d.Dial(network, address(host, port))
		return err
	}
	if netns == "" {
		err = dial()
	} else {
		err = inNetns(netns, dial)
	}
	if err != nil {
		return "", err
	}
	defer c.Close()
	return hear(c)
}

// hear asks and reads the answer.
func hear(c net.Conn) (string, error) {
	if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return "", err
	}
	if c.RemoteAddr().Network() != "udp" {
		all, err := io.ReadAll(c)
		return string(all), err
	}
	if _, err := c.Write([]byte("?")); err != nil {
		return "", err
	}
	buffer := make([]byte, 100)
	n, err := c.Read(buffer)
	return string(buffer[:n]), err
}

// answers waits until whoever asks hears the pod of that name.
func answers(t *testing.T, netns, network, host string, port int32, name string) string {
	t.Helper()
	var got string
	eventually(t, soon, func() (err error) {
		if got, err = ask(netns, network, host, port); err == nil && !strings.HasPrefix(got, name+" to ") {
			err = fmt.Errorf("%s %s answers %q, want %s", network, address(host, port), got, name)
		}
		return err
	})
	return got
}

// silent fails the test when somebody answers.
func silent(t *testing.T, netns, network, host string, port int32) {
	t.Helper()
	if got, err := ask(netns, network, host, port); err == nil {
		t.Errorf("%s %s answers %q", network, address(host, port), got)
	}
}

// addressesOf are the pod's addresses of both families.
func addressesOf(t *testing.T, d *daemon.Daemon, p pod) (v4, v6 string) {
	t.Helper()
	n := podStatus(t, d, p.id).Network
	if len(n.AdditionalIps) != 1 {
		t.Fatalf("addresses are %v", n)
	}
	v4, v6 = n.Ip, n.AdditionalIps[0].Ip
	if netip.MustParseAddr(v4).Is6() {
		v4, v6 = v6, v4
	}
	return v4, v6
}

// sctpInit is the packet that opens an association.
func sctpInit(from, to uint16) []byte {
	p := binary.BigEndian.AppendUint16(nil, from)
	p = binary.BigEndian.AppendUint16(p, to)
	p = append(p, 0, 0, 0, 0 /* tag */, 0, 0, 0, 0 /* checksum */, 1 /* INIT */, 0, 0, 20)
	for _, v := range []uint32{0x1234567 /* tag */, 65536 /* window */, 1<<16 | 1 /* streams */, 1} {
		p = binary.BigEndian.AppendUint32(p, v)
	}
	binary.LittleEndian.PutUint32(p[8:], crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)))
	return p
}

// rawSCTP is a socket that gets every SCTP packet of a network namespace: the
// kernel need not know the protocol for it.
func rawSCTP(t *testing.T, netns string) int {
	t.Helper()
	var fd int
	if err := inNetns(netns, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		t.Fatal(err)
	}
	return fd
}
