// Package node looks at a machine that runs pods, or is to, and says what keeps
// it from doing so and what was left on it: the kernel, the network's
// configuration and plugins, the OCI runtimes, and what no pod owns any more.
//
// It reads, and runs plugins and runtimes only to ask for their versions; it
// never changes, removes or loads anything. What it finds are Findings, in the
// order in which a person would look; how they are shown is not its business.
// Start at Check.
package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/gantry-cri/gantry/cmd/gantry/internal/daemon"
	"github.com/gantry-cri/gantry/plugin/facts"
)

// Status is what a finding means for the node.
type Status string

const (
	// OK is as it should be.
	OK Status = "ok"
	// Warn works, with less than there could be or at a risk.
	Warn Status = "warning"
	// Fail keeps pods from running, or from running safely.
	Fail Status = "failure"
	// Skipped could not be looked at.
	Skipped Status = "skipped"
)

// Finding is one thing that was looked at.
type Finding struct {
	// Area groups findings: "kernel", "network", "runtime", "daemon", "leftovers".
	Area string `json:"area"`
	// Name is what was looked at.
	Name   string `json:"name"`
	Status Status `json:"status"`
	// Text is what was found.
	Text string `json:"text"`
	// Advice is what to do about it, "" for nothing.
	Advice string `json:"advice,omitempty"`
}

// Node is a machine to look at.
type Node struct {
	// Root is put before every path; empty but in tests.
	Root   string
	Layout daemon.Layout
	// Path are the directories where programs are looked up.
	Path []string
	// Facts are what the daemon would find out about the machine.
	Facts func() (facts.Host, error)
	// Calls are the system calls this kernel has.
	Calls func() Calls
	// Versions asks programs for their versions.
	Versions Versions
	// Pods asks the daemon for what has a right to be here.
	Pods func(context.Context, daemon.Layout) (daemon.Pods, error)
}

// Versions asks programs for their versions.
type Versions interface {
	// Runtime returns what an OCI runtime answers to --version.
	Runtime(ctx context.Context, path string) (string, error)
	// Plugin returns what a CNI plugin says about itself, and the versions of
	// the specification it knows.
	Plugin(ctx context.Context, path string) (about string, specs []string, err error)
}

// Check looks at everything.
func Check(ctx context.Context, n Node) []Finding {
	var all []Finding
	for _, look := range []func(context.Context) []Finding{n.kernel, n.network, n.runtimes, n.leftovers} {
		all = append(all, look(ctx)...)
	}
	return all
}

// Worst returns the status that matters most.
func Worst(all []Finding) Status {
	worst := OK
	rank := map[Status]int{OK: 0, Skipped: 1, Warn: 2, Fail: 3}
	for _, f := range all {
		if rank[f.Status] > rank[worst] {
			worst = f.Status
		}
	}
	return worst
}

func (n Node) path(p string) string { return filepath.Join(n.Root, p) }

func (n Node) exists(p string) bool {
	_, err := os.Lstat(n.path(p))
	return err == nil
}

// find looks a program up in directories.
func (n Node) find(name string, dirs []string) (string, bool) {
	if filepath.IsAbs(name) {
		return name, n.executable(name)
	}
	for _, d := range dirs {
		if p := filepath.Join(d, name); n.executable(p) {
			return p, true
		}
	}
	return "", false
}

func (n Node) executable(p string) bool {
	info, err := os.Stat(n.path(p))
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// list collects findings of one area.
type list struct {
	area string
	all  []Finding
}

func (l *list) add(name string, s Status, advice, format string, args ...any) { //lint:house param-count: a format and its arguments
	l.all = append(l.all, Finding{Area: l.area, Name: name, Status: s, Text: fmt.Sprintf(format, args...), Advice: advice})
}

func (l *list) ok(name, format string, args ...any) { l.add(name, OK, "", format, args...) }
