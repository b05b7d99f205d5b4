// Package host answers one question after a test: what did this daemon leave on
// the machine?
//
// A Scope names what marks a machine's objects as belonging to one daemon: a
// variable in the environment of its processes, its directory, its cgroup
// parent, its bridge, its network's name. Read lists all such objects, Diff
// compares two lists, Settle waits until the second equals the first (the
// kernel takes network namespaces apart in its own time), and Purge removes
// everything by force, for the wreck of a test that died.
//
// It knows nothing about how a daemon is started (package daemon does), and it
// never touches an object that the scope does not claim. Start at Read.
package host

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
)

// Scope says which objects of the machine belong to one daemon.
type Scope struct {
	// Marker is NAME=value in the environment of the daemon, inherited by all
	// that it starts save the containers.
	Marker string
	// Dir holds everything the daemon writes.
	Dir string
	// Mounts are below Dir, and what is in them is the daemon's too.
	Mounts []string
	// CgroupParent is the cgroup above all of its pods, with a leading slash.
	CgroupParent string
	// Bridge is the host's end of its pod network, Network its CNI name,
	// Subnet the addresses of its pods.
	Bridge  string
	Network string
	Subnet  netip.Prefix
	// Table is the table of nftables, of family inet, with its host ports; the
	// names of its chains in iptables begin with it.
	Table string
	// IPAM is the data directory of host-local.
	IPAM string
	// Expected lists executables that may run without being a leak: the daemon
	// and its node-wide helpers.
	Expected []string
	// Client reads the daemon's own records; nil while it is down.
	Client *client.Client
}

// State is what a scope has on the machine: a sorted list of objects, each
// opening with its kind ("mount /tmp/…").
type State []string

// Read lists the objects of the scope.
func (s Scope) Read(ctx context.Context) (State, error) {
	var all State
	for _, read := range []func(context.Context) ([]string, error){
		s.processes, s.mounts, s.cgroups, s.links, s.rules, s.addresses, s.files, s.records,
	} {
		found, err := read(ctx)
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// Diff says in what after differs from before, a line for each object; it is
// empty when nothing does. That a process of before has ended is no difference.
func Diff(before, after State) []string {
	var lines []string
	for _, o := range after {
		if _, was := slices.BinarySearch(before, o); !was {
			lines = append(lines, "left behind: "+o)
		}
	}
	for _, o := range before {
		// Processes come and go by themselves: a program that is asked what it
		// can do may have been running at the first look.
		if strings.HasPrefix(o, "process ") {
			continue
		}
		if _, is := slices.BinarySearch(after, o); !is {
			lines = append(lines, "gone missing: "+o)
		}
	}
	return lines
}

// settlePoll is how often Settle looks again.
const settlePoll = 100 * time.Millisecond

// LeakError lists the objects by which a machine differs from what it was.
type LeakError []string

func (e LeakError) Error() string {
	return fmt.Sprintf("the host is not as before:\n\t%s", strings.Join(e, "\n\t"))
}

// Settle waits until the machine is as before, or ctx ends; then it returns a
// LeakError that says what is left.
func (s Scope) Settle(ctx context.Context, before State) error {
	tick := time.NewTicker(settlePoll)
	defer tick.Stop()
	var last error
	for {
		after, err := s.Read(ctx)
		switch {
		case err == nil:
			diff := Diff(before, after)
			if len(diff) == 0 {
				return nil
			}
			last = LeakError(diff)
			if err := s.collect(ctx, diff); err != nil {
				return errors.Join(last, err)
			}
		case last == nil:
			last = fmt.Errorf("read host: %w", err)
		}
		select {
		case <-ctx.Done():
			return last
		case <-tick.C:
		}
	}
}

// TB is what a check needs of testing.TB.
type TB interface {
	Helper()
	Errorf(format string, args ...any)
}

// Clean fails the test when the machine is not as before within the given time.
func (s Scope) Clean(t TB, before State, within time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	if err := s.Settle(ctx, before); err != nil {
		t.Errorf("%v", err)
	}
}

// Purge removes every object of the scope by force, the daemon included, and
// then its directory.
func (s Scope) Purge(ctx context.Context) error {
	return errors.Join(
		s.killAll(ctx),
		s.unmountAll(),
		s.removeCgroups(ctx),
		s.removeLinks(),
		s.removeTable(ctx),
		s.removeChains(ctx),
		s.removeFiles(),
	)
}
