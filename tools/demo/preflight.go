package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/host"
)

// parts are what make build makes and the demo runs.
var parts = []string{
	"containerd", "containerd-shim-gantry-v2", "containerd-shim-runc-v2", "runc", "gantry", "cni/bridge", "cni/host-local", "cni/portmap", "cni/loopback",
}

// busybox is what the image is made of.
const busybox = "/bin/busybox"

// preflight says in words what is missing before anything is begun. It returns
// the directories of programs.
func preflight(stock bool) ([]string, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("needs root, to make namespaces, mounts and cgroups: sudo make demo")
	}
	bins, err := daemon.BinDirs()
	if err != nil {
		return nil, err
	}
	want := parts
	if stock {
		want = append([]string{"stock/containerd"}, parts...)
	}
	if gone := missing(want, bins); len(gone) > 0 {
		return nil, fmt.Errorf("%s not in %s: run make build first (make stock for stock/)", strings.Join(gone, ", "), strings.Join(bins, ", "))
	}
	if _, err := os.Stat(busybox); err != nil {
		return nil, fmt.Errorf("%s is not there: apt-get install busybox-static, or make deps (%w)", busybox, err)
	}
	return bins, nil
}

// missing lists the programs that are in none of the directories.
func missing(programs, dirs []string) []string {
	var gone []string
	for _, p := range programs {
		if _, err := find(p, dirs); err != nil {
			gone = append(gone, p)
		}
	}
	return gone
}

func find(program string, dirs []string) (string, error) {
	for _, d := range dirs {
		path := filepath.Join(d, program)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", fmt.Errorf("find %s in %s: %w", program, strings.Join(dirs, ", "), os.ErrNotExist)
}

// errNoRoom is the machine's state, and none of the daemon's doing.
var errNoRoom = errors.New("no room")

// room makes sure that the bridge and the addresses which this demo was given
// are nobody's yet.
func room(s host.Scope) (string, error) {
	links, err := net.Interfaces()
	if err != nil {
		return "", fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		if l.Name == s.Bridge {
			// The name is the test harness's own, so it goes with the rest.
			return "", fmt.Errorf("%w: a bridge %s was left by a test or demo that was killed; it is removed now, so run the demo again", errNoRoom, l.Name)
		}
		addrs, err := l.Addrs()
		if err != nil {
			return "", fmt.Errorf("list addresses of %s: %w", l.Name, err)
		}
		for _, a := range addrs {
			if overlaps(a.String(), s.Subnet) {
				return "", fmt.Errorf("%w: the demo's addresses %s are in use, %s has %s; remove that address, or run the demo on another machine", errNoRoom, s.Subnet, l.Name, a)
			}
		}
	}
	return fmt.Sprintf("bridge %s and %s are free", s.Bridge, s.Subnet), nil
}

// overlaps reports whether an interface's address, with its length, reaches
// into a subnet.
func overlaps(address string, subnet netip.Prefix) bool {
	p, err := netip.ParsePrefix(address)
	return err == nil && p.Overlaps(subnet)
}

// gone makes sure that nothing of a daemon is left after it was discarded.
func gone(s host.Scope) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := s.Settle(ctx, nil); err != nil {
		return err
	}
	if _, err := os.Lstat(s.Dir); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s is left (%v)", s.Dir, err)
	}
	if _, err := net.InterfaceByName(s.Bridge); err == nil {
		return fmt.Errorf("bridge %s is left", s.Bridge)
	}
	return nil
}
