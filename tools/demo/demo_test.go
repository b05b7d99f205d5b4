package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gantry-cri/gantry/integration/host"
)

func TestFirstLines(t *testing.T) {
	for in, want := range map[string]int{"": 1, "a": 1, "a\nb\n": 2, "a\nb\nc\nd\ne\nf": 5} {
		got := strings.Split(firstLines(in, 4), "\n")
		if len(got) != want || want == 5 && !strings.Contains(got[4], "2 more") {
			t.Errorf("%q: got %q", in, got)
		}
	}
}

func TestMissing(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "there"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "directory"), 0o755); err != nil {
		t.Fatal(err)
	}
	got := missing([]string{"there", "gone", "directory"}, []string{filepath.Join(dir, "none"), dir})
	if !slices.Equal(got, []string{"gone", "directory"}) {
		t.Errorf("got %q", got)
	}
}

func TestOverlaps(t *testing.T) {
	subnet := netip.MustParsePrefix("10.213.4.0/24")
	for address, want := range map[string]bool{
		"10.213.4.7/24": true, "10.0.0.1/8": true, "10.213.4.9/32": true,
		"10.213.5.1/24": false, "127.0.0.1/8": false, "fe80::1/64": false, "odd": false,
	} {
		if got := overlaps(address, subnet); got != want {
			t.Errorf("%s: %v", address, got)
		}
	}
}

// The loopback interface serves as one that is in the way.
func TestRoom(t *testing.T) {
	lo, err := net.InterfaceByIndex(1)
	if err != nil {
		t.Skip("no interface has number 1")
	}
	if _, err := room(host.Scope{Bridge: lo.Name, Subnet: netip.MustParsePrefix("233.252.0.0/24")}); err == nil {
		t.Error("a bridge that is there: no error")
	}
	if _, err := room(host.Scope{Bridge: "gdemo-none", Subnet: netip.MustParsePrefix("127.0.0.0/24")}); err == nil {
		t.Error("addresses in use: no error")
	}
	if _, err := room(host.Scope{Bridge: "gdemo-none", Subnet: netip.MustParsePrefix("233.252.0.0/24")}); err != nil {
		t.Error(err)
	}
}

func TestVerdict(t *testing.T) {
	good := `{"findings": [{"area": "kernel", "name": "cgroups", "status": "warning", "text": "old"}, {"area": "leftovers", "name": "mounts", "status": "ok"}]}`
	if got, err := verdict([]byte(good)); err != nil || !strings.Contains(got, "warning cgroups: old") {
		t.Errorf("got %q, %v", got, err)
	}
	for _, bad := range []string{
		``, `{}`, strings.Replace(good, "ok", "warning", 1), strings.NewReplacer("kernel", "daemon", "warning", "failure").Replace(good),
	} {
		if got, err := verdict([]byte(bad)); err == nil {
			t.Errorf("%s: got %q", bad, got)
		}
	}
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	failure := errors.New("failure")
	if err := interrupted(ctx, failure); !errors.Is(err, failure) {
		t.Errorf("got %v", err)
	}
	cancel()
	if err := interrupted(ctx, failure); !errors.Is(err, errInterrupted) {
		t.Errorf("got %v", err)
	}
	if err := interrupted(ctx, nil); err != nil {
		t.Errorf("got %v", err)
	}
}
