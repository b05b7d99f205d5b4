package network_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gantry-cri/gantry/plugin/network"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The tests that touch the kernel run in a network and a mount namespace of
// their own: TestMain builds the plugins, then runs the test binary again
// inside. The binary serves two more ends: called "stub" it is a CNI plugin
// (stub_test.go), and with crashEnv set a daemon to be killed (crash_test.go).
const (
	insideEnv = "GANTRY_NETWORK_TEST_PLUGINS"
	crashEnv  = "GANTRY_NETWORK_TEST_CRASH"
)

// pluginDir holds the reference plugins; empty if there are none.
var pluginDir = os.Getenv(insideEnv)

func TestMain(m *testing.M) {
	switch {
	case filepath.Base(os.Args[0]) == stubName:
		os.Exit(stubMain())
	case os.Getenv(crashEnv) != "":
		crashMain(os.Getenv(crashEnv))
	case os.Geteuid() != 0:
		os.Exit(m.Run())
	case pluginDir == "":
		os.Exit(runInside())
	}
	if err := enter(); err != nil {
		fmt.Fprintln(os.Stderr, "enter the test's namespaces:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// runInside builds the plugins and runs this binary in fresh namespaces.
func runInside() int {
	dir, err := plugins()
	if err != nil {
		fmt.Fprintln(os.Stderr, "build plugins:", err)
		return 1
	}
	if dir != builtPlugins() {
		defer os.RemoveAll(dir)
	}
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), insideEnv+"="+dir)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS,
	}
	if err := c.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return max(exit.ExitCode(), 1)
		}
		fmt.Fprintln(os.Stderr, "run inside:", err)
		return 1
	}
	return 0
}

// plugins returns the directory of the reference plugins, built from the
// versions that tools/cni pins unless $GANTRY_BIN has them.
func plugins() (string, error) {
	if dir := builtPlugins(); dir != "" {
		return dir, nil
	}
	dir, err := os.MkdirTemp("", "gantry-cni-")
	if err != nil {
		return "", err
	}
	c := exec.Command("go", "build", "-o", dir+"/", "tool")
	c.Dir = filepath.Join("..", "..", "tools", "cni")
	if out, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return dir, nil
}

// builtPlugins is where $GANTRY_BIN has the plugins, if it has them.
func builtPlugins() string {
	dir := filepath.Join(os.Getenv("GANTRY_BIN"), "cni")
	if _, err := os.Stat(filepath.Join(dir, "bridge")); err != nil || !filepath.IsAbs(dir) {
		return ""
	}
	return dir
}

func enter() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	// Else the race detector keeps every stub for a second.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		return err
	}
	// The iptables lock and the like stay in here.
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// host is where one test's network lives.
type host struct {
	t    *testing.T
	root string
	conf network.Config
	net  *network.Networks
	stub stub
	// noMasquerade leaves the masquerading rules of bridge out: it finds them
	// by the addresses of the interface, and so leaves them when a namespace
	// went without it.
	noMasquerade bool
}

// newHost makes directories, a bin directory with the reference plugins and
// the stub, and checks in the end that the test has left nothing.
func newHost(t *testing.T) *host {
	t.Helper()
	needRoot(t)
	root := t.TempDir()
	h := &host{t: t, root: root, stub: stub{dir: filepath.Join(root, "stub")}}
	h.conf = network.Config{
		NetNSDir: filepath.Join(root, "netns"),
		ConfDir:  filepath.Join(root, "etc", "cni", "net.d"),
		BinDirs:  []string{filepath.Join(root, "bin"), pluginDir},
		CacheDir: filepath.Join(root, "cache"), MaxConfNum: 1,
		StatusInterval: 20 * time.Millisecond,
	}
	for _, d := range []string{h.conf.ConfDir, filepath.Join(root, "bin"), h.stub.dir} {
		mustDo(t, os.MkdirAll(d, 0o755))
	}
	exe, err := os.Executable()
	mustDo(t, err)
	mustDo(t, os.Symlink(exe, filepath.Join(root, "bin", stubName)))
	links := linkNames(t)
	t.Cleanup(func() {
		if now := linkNames(t); !slices.Equal(now, links) {
			t.Errorf("interfaces %v, before the test %v", now, links)
		}
		if held := h.held(); len(held) > 0 {
			t.Errorf("left behind:\n%s", strings.Join(held, "\n"))
		}
		h.unmountAll()
	})
	return h
}

// open makes the network from h.conf and runs its watch.
func (h *host) open() *network.Networks {
	h.t.Helper()
	n, err := network.New(h.conf)
	mustDo(h.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.Run(ctx)
	}()
	h.t.Cleanup(func() {
		cancel()
		<-done
	})
	h.net = n
	return n
}

// write puts a configuration list into the configuration directory.
func (h *host) write(name string, conf map[string]any) {
	h.t.Helper()
	data, err := json.Marshal(conf)
	mustDo(h.t, err)
	mustDo(h.t, os.MkdirAll(h.conf.ConfDir, 0o755))
	mustDo(h.t, os.WriteFile(filepath.Join(h.conf.ConfDir, name), data, 0o644))
}

// stubConf is a network made by the stub alone.
func (h *host) stubConf(name, version string) map[string]any {
	return map[string]any{"cniVersion": version, "name": name, "plugins": []any{h.stub.plugin()}}
}

const bridge = "gtbr0"

// bridgeConf is the chain of the reference plugins with the stub at its end,
// and dual stack addresses. The test deletes the bridge in the end.
func (h *host) bridgeConf() map[string]any {
	h.t.Cleanup(func() {
		if br, err := netlink.LinkByName(bridge); err == nil {
			mustDo(h.t, netlink.LinkDel(br))
		}
	})
	return map[string]any{"cniVersion": "1.0.0", "name": "gantrytest", "plugins": []any{
		map[string]any{
			"type": "bridge", "bridge": bridge, "isGateway": true, "ipMasq": !h.noMasquerade, "hairpinMode": true,
			"ipam": map[string]any{
				"type": "host-local", "dataDir": h.ipam(),
				"ranges": []any{
					[]any{map[string]any{"subnet": "10.88.64.0/24"}},
					[]any{map[string]any{"subnet": "fd00:10:88::/112"}},
				},
				"routes": []any{map[string]any{"dst": "0.0.0.0/0"}, map[string]any{"dst": "::/0"}},
			},
		},
		map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}, "snat": true},
		h.stub.plugin(),
	}}
}

func (h *host) ipam() string { return filepath.Join(h.root, "ipam") }

// held lists what pods hold on the host, as seen from outside of the package:
// files, mounts, addresses in host-local's book, allocations of the stub.
func (h *host) held() []string {
	var held []string
	for _, pattern := range []string{
		"netns/*", "cache/attachments/*", "cache/results/*", "stub/held/*",
	} {
		files, err := filepath.Glob(filepath.Join(h.root, pattern))
		mustDo(h.t, err)
		held = append(held, files...)
	}
	books, err := filepath.Glob(filepath.Join(h.ipam(), "*", "*"))
	mustDo(h.t, err)
	for _, f := range books {
		name := filepath.Base(f)
		if name == "lock" || strings.HasPrefix(name, "last_reserved_ip") {
			continue
		}
		owner, _ := os.ReadFile(f)
		held = append(held, fmt.Sprintf("%s of %q", f, owner))
	}
	for _, m := range h.mounts() {
		held = append(held, "mount "+m)
	}
	held = append(held, hostPorts(h.t)...)
	for line := range strings.Lines(hostRules(h.t)) {
		if strings.Contains(line, `id: \"`) { // the plugins' mark of a pod's rule
			held = append(held, "rule "+line)
		}
	}
	return held
}

// hostPorts lists our tables, and whose elements are in them.
func hostPorts(t *testing.T) (found []string) {
	t.Helper()
	conn := &nftables.Conn{}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	mustDo(t, err)
	for _, table := range tables {
		if !strings.HasPrefix(table.Name, "gantry-") {
			continue
		}
		found = append(found, "table "+table.Name)
		sets, err := conn.GetSets(table)
		mustDo(t, err)
		for _, set := range sets {
			elements, err := conn.GetSetElements(set)
			mustDo(t, err)
			for _, e := range elements {
				found = append(found, fmt.Sprintf("element of %s in %s", e.Comment, set.Name))
			}
		}
	}
	return found
}

// mounts lists what is mounted below the test's directory.
func (h *host) mounts() []string {
	data, err := os.ReadFile("/proc/self/mountinfo")
	mustDo(h.t, err)
	var found []string
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], h.root+"/") {
			found = append(found, f[4])
		}
	}
	return found
}

func (h *host) unmountAll() {
	for _, m := range h.mounts() {
		mustDo(h.t, unix.Unmount(m, unix.MNT_DETACH))
	}
}

// linkNames lists the interfaces. A deleted namespace's go a little later, so
// veths are left out.
func linkNames(t *testing.T) []string {
	t.Helper()
	links, err := netlink.LinkList()
	mustDo(t, err)
	var names []string
	for _, l := range links {
		if l.Type() != "veth" {
			names = append(names, l.Attrs().Name)
		}
	}
	slices.Sort(names)
	return names
}

func mustDo(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// patience is for what happens soon, except on a loaded machine.
const patience = 30 * time.Second

// eventually repeats a check until it holds and returns how long that took.
func eventually(t *testing.T, what string, check func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !check() {
		if <-tick.C; time.Since(start) > patience {
			t.Fatalf("not within %s: %s", patience, what)
		}
	}
	return time.Since(start)
}
