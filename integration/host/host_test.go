package host

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func testScope(t *testing.T) Scope {
	t.Helper()
	dir := t.TempDir()
	return Scope{
		Marker:       "GANTRY_HOST_TEST=" + dir,
		Dir:          dir,
		CgroupParent: "/gantry-host-test",
		Bridge:       "gthost0",
		Network:      "gantry-host-test",
		Subnet:       netip.MustParsePrefix("10.254.254.0/24"),
		IPAM:         filepath.Join(dir, "ipam"),
		Expected:     []string{"cat"},
	}
}

func TestDiff(t *testing.T) {
	got := Diff(State{"file a", "mount m"}, State{"file a", "lease l"})
	want := []string{"left behind: lease l", "gone missing: mount m"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestEveryKindIsSeen makes one leak of each kind that needs no daemon, and
// wants it named, and gone after Purge.
func TestEveryKindIsSeen(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	s := testScope(t)
	ctx := t.Context()
	t.Cleanup(func() {
		if err := s.Purge(context.Background()); err != nil {
			t.Error(err)
		}
	})
	before, err := s.Read(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(before) != 0 {
		t.Fatalf("not empty at first: %q", before)
	}
	makeLeaks(t, s)
	after, err := s.Read(ctx)
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Join(Diff(before, after), "\n")
	for _, want := range []string{
		"sleep 4242", "zombie of", "mount " + s.Dir + "/mnt", s.CgroupParent + "/pod/" + id,
		"on " + s.Bridge, "address " + s.IPAM + "/net/10.254.254.7",
		"file " + s.Dir + "/state/" + id, "10.254.254.9",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is not among:\n%s", want, all)
		}
	}
	for _, unwanted := range []string{"cat", "blobs", "last_reserved", "10.254.25.1"} {
		if strings.Contains(all, unwanted) {
			t.Errorf("%q is among:\n%s", unwanted, all)
		}
	}
	run(t, "nft", "delete", "table", "inet", "gantry_host_test")
	if err := s.Purge(ctx); err != nil {
		t.Fatal(err)
	}
	settled, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := s.Settle(settled, before); err != nil {
		t.Error(err)
	}
}

func makeLeaks(t *testing.T, s Scope) {
	t.Helper()
	start(t, s, "cat") // expected, so no leak
	// The shell becomes a sleep that will not reap the shell's child.
	start(t, s, "sh", "-c", "(exit) & exec sleep 4242")
	waitZombie(t, s)

	for _, d := range []string{"mnt", "ipam/net", "state/" + id, "content/blobs/" + id} {
		if err := os.MkdirAll(filepath.Join(s.Dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("none", s.Dir+"/mnt", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"10.254.254.7", "last_reserved_ip.0"} {
		if err := os.WriteFile(filepath.Join(s.IPAM, "net", f), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	trees, err := hierarchies()
	if err != nil || len(trees) == 0 {
		t.Fatalf("cgroup hierarchies: %v, %v", trees, err)
	}
	if err := os.MkdirAll(filepath.Join(trees[0], s.CgroupParent, "pod", id), 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "link", "add", s.Bridge, "type", "bridge")
	run(t, "ip", "link", "add", "gthost1", "type", "veth", "peer", "name", "gthost2")
	run(t, "ip", "link", "set", "gthost1", "master", s.Bridge)
	run(t, "nft", "add table inet gantry_host_test; add chain inet gantry_host_test c; "+
		"add rule inet gantry_host_test c ip daddr 10.254.254.9 counter accept; "+
		"add rule inet gantry_host_test c ip daddr 10.254.25.1 counter accept")
}

// start runs a marked process for the length of the test.
func start(t *testing.T, s Scope, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), s.Marker)
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd
}

func waitZombie(t *testing.T, s Scope) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		all, err := s.list()
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(all, func(p process) bool { return p.state == 'Z' }) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal("no zombie turned up")
		case <-tick.C:
		}
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func TestNamed(t *testing.T) {
	s := Scope{Bridge: "gt7", Network: "gantry-test-7", Subnet: netip.MustParsePrefix("10.213.7.0/24")}
	for rule, want := range map[string]bool{
		`-A POSTROUTING -s 10.213.7.4/32 -j CNI-1`:                      true,
		`dnat to 10.213.7.4:80`:                                         true,
		`ip daddr 110.213.7.4 accept`:                                   false,
		`ip daddr 10.213.70.4 accept`:                                   false,
		`iifname "gt7" accept`:                                          true,
		`iifname "gt71" accept`:                                         false,
		`-m comment --comment "name: \"gantry-test-7\" id: \"x\""`:      true,
		`-m comment --comment "name: \"gantry-test-77\" id: \"x\""`:     false,
		`-m comment --comment "name: \"gantry-test-7-more\" id: \"x\""`: false,
	} {
		if got := s.named(rule); got != want {
			t.Errorf("%s: %v, want %v", rule, got, want)
		}
	}
}
