package node

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/gantry-cri/gantry/cmd/gantry/internal/daemon"
	"github.com/gantry-cri/gantry/plugin/stdio/keeper"
)

// id is how pods and containers are named; part finds one in a path.
var (
	id   = regexp.MustCompile(`^[0-9a-f]{64}$`)
	part = regexp.MustCompile(`(?:^|/)([0-9a-f]{64})(?:/|$)`)
)

// trace is something on the machine that was made for a pod or container.
type trace struct {
	id   string
	text string
	// lost means that it should not be there even if the pod is.
	lost bool
	// there looks again whether it is there.
	there func() bool
}

// kinds are the traces that are looked for.
func (n Node) kinds() []kind {
	return []kind{
		{"network namespaces", n.namespaces, "the daemon releases these when it starts; for one of another daemon: ip netns delete NAME"},
		{"mounts", n.mounts, "the daemon takes down what its records name when it starts; else: umount -l PATH"},
		{"shims", n.shims, "the pod of such a shim is gone from the daemon: look what runs below it (pstree -p PID), then end it"},
		{"kept output", n.keepers, "the daemon has it dropped when it starts; a keeper that stays holds nothing that is needed: end it"},
		{"addresses", n.addresses, "the daemon gives back what it knows of when it starts; else, if no other runtime on this machine uses this network, remove the file: that frees the address"},
		{"network records", n.records, "the daemon works them off when it starts; one that stays has a plugin that fails: look into its log"},
	}
}

type kind struct {
	name   string
	find   func() ([]trace, error)
	advice string
}

// leftovers first looks at the machine and then asks for what has a right to
// be there, so that what is made meanwhile is not mistaken; what is gone by
// then was being taken down.
func (n Node) leftovers(ctx context.Context) []Finding {
	l := &list{area: "daemon"}
	found := map[string][]trace{}
	errs := map[string]error{}
	for _, k := range n.kinds() {
		found[k.name], errs[k.name] = k.find()
	}
	pods, err := n.Pods(ctx, n.Layout)
	n.daemon(l, pods, err)
	l.area = "leftovers"
	for _, k := range n.kinds() {
		if errs[k.name] != nil {
			l.add(k.name, Skipped, "run as root", "%v", errs[k.name])
			continue
		}
		unowned(l, k, found[k.name], ownersOf(pods, err))
	}
	return l.all
}

// ownersOf is nil when nobody can tell who is alive.
func ownersOf(pods daemon.Pods, err error) map[string]bool {
	if err != nil {
		return nil
	}
	return pods.IDs
}

func (n Node) daemon(l *list, pods daemon.Pods, err error) {
	if err != nil {
		l.add("answers", Warn, "start it, or name its socket with --address", "%v", err)
		return
	}
	l.ok("answers", "%s at %s", pods.Version, n.Layout.Address)
	for _, c := range pods.Conditions {
		if c.Status {
			l.ok(c.Type, "yes")
			continue
		}
		status := Fail
		if c.Type != "RuntimeReady" && c.Type != "NetworkReady" {
			status = Warn
		}
		l.add(c.Type, status, "", "%s: %s", c.Reason, c.Message)
	}
	if pods.Partial != "" {
		l.add("operations", Warn, "what is reported below may be a pod that is just being made", "%s", pods.Partial)
	}
}

// unowned reports the traces of a kind that belong to nobody.
func unowned(l *list, k kind, traces []trace, owners map[string]bool) {
	before := len(l.all)
	held := 0
	for _, t := range traces {
		switch {
		case t.lost, owners != nil && !owners[t.id]:
			if t.there() {
				l.add(k.name, Warn, k.advice, "%s", t.text)
			}
		default:
			held++
		}
	}
	switch {
	case owners == nil && held > 0:
		l.add(k.name, Skipped, "start the daemon and look again", "%d are there; without the daemon nobody can tell whether their pods are", held)
	case len(l.all) == before:
		l.ok(k.name, "none without an owner (%d in use)", held)
	}
}

// namespaces finds pinned network namespaces of this daemon, or of another
// that is like it.
func (n Node) namespaces() ([]trace, error) {
	entries, err := os.ReadDir(n.path(n.Layout.NetNSDir))
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	var out []trace
	for _, e := range entries {
		// One of another prefix is another daemon's to judge.
		pod, ours := strings.CutPrefix(e.Name(), n.Layout.NetNSPrefix())
		if !ours || !id.MatchString(pod) {
			continue
		}
		path := filepath.Join(n.Layout.NetNSDir, e.Name())
		out = append(out, trace{id: pod, text: path, there: func() bool { return n.exists(path) }})
	}
	return out, nil
}

// mounts finds what is mounted below the directories of pods and containers.
func (n Node) mounts() ([]trace, error) {
	points, err := n.mountpoints()
	if err != nil {
		return nil, err
	}
	var out []trace
	for _, p := range points {
		m := part.FindStringSubmatch(p)
		if m == nil || !within(p, n.Layout.PluginState()) && !within(p, n.Layout.Tasks()) {
			continue
		}
		out = append(out, trace{id: m[1], text: p, there: func() bool {
			now, err := n.mountpoints()
			return err == nil && slices.Contains(now, p)
		}})
	}
	return out, nil
}

func (n Node) mountpoints() ([]string, error) {
	f, err := os.Open(n.path("/proc/self/mountinfo"))
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	infos, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	points := make([]string, len(infos))
	for i, m := range infos {
		points[i] = m.Mountpoint
	}
	return points, nil
}

func within(path, dir string) bool { return strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/") }

// shims finds the shims that serve this daemon.
func (n Node) shims() ([]trace, error) {
	dirs, err := filepath.Glob(n.path("/proc/[0-9]*"))
	if err != nil || len(dirs) == 0 {
		return nil, fmt.Errorf("list processes: nothing in %s", n.path("/proc"))
	}
	var out []trace
	for _, dir := range dirs {
		sh, ok := readShim(dir)
		if !ok || sh.address != strings.TrimPrefix(n.Layout.Address, "unix://") || sh.namespace != daemon.Namespace {
			continue
		}
		t := trace{id: sh.id, text: fmt.Sprintf("process %s: %s of %s", filepath.Base(dir), sh.program, sh.id)}
		if !n.hasBundle(sh.id) {
			t.lost, t.text = true, t.text+", whose bundle below "+n.Layout.Tasks()+" is gone"
		}
		t.there = func() bool {
			now, ok := readShim(dir)
			return ok && now == sh && (!t.lost || !n.hasBundle(sh.id))
		}
		out = append(out, t)
	}
	return out, nil
}

// hasBundle reports whether there is a bundle of that ID; a pattern of our own
// making is always a good one.
func (n Node) hasBundle(id string) bool {
	found, _ := filepath.Glob(n.path(n.Layout.Bundle(id)))
	return len(found) > 0
}

// shim is what a shim's command line says.
type shim struct{ program, namespace, id, address string }

// maxCommand bounds what is read of a command line.
const maxCommand = 64 << 10

// readCommand reads a process's command line.
func readCommand(dir string) ([]byte, bool) {
	if _, err := strconv.Atoi(filepath.Base(dir)); err != nil {
		return nil, false
	}
	b, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	return b, err == nil && len(b) <= maxCommand
}

// readShim reads a process's command line, if it is a shim's.
func readShim(dir string) (shim, bool) {
	b, ok := readCommand(dir)
	if !ok {
		return shim{}, false
	}
	return parseShim(b)
}

func arguments(cmdline []byte) []string {
	return strings.Split(string(bytes.TrimRight(cmdline, "\x00")), "\x00")
}

// parseShim understands the flags that containerd gives every shim.
func parseShim(cmdline []byte) (shim, bool) {
	args := arguments(cmdline)
	s := shim{program: filepath.Base(args[0])}
	if !strings.HasPrefix(s.program, "containerd-shim-") {
		return shim{}, false
	}
	for i := 1; i+1 < len(args); i++ {
		switch strings.TrimLeft(args[i], "-") {
		case "namespace":
			s.namespace = args[i+1]
		case "id":
			s.id = args[i+1]
		case "address":
			s.address = args[i+1]
		default:
			continue
		}
		i++
	}
	return s, s.id != "" && !strings.Contains(s.id, "/")
}

// keepers finds whose output this daemon's keepers hold. One that holds nothing
// ends by itself.
func (n Node) keepers() ([]trace, error) {
	dirs, err := filepath.Glob(n.path("/proc/[0-9]*"))
	if err != nil || len(dirs) == 0 {
		return nil, fmt.Errorf("list processes: nothing in %s", n.path("/proc"))
	}
	var out []trace
	for _, dir := range dirs {
		for _, owner := range n.kept(dir) {
			out = append(out, trace{
				id:    owner,
				text:  fmt.Sprintf("process %s: %s with output of %s", filepath.Base(dir), keeper.Program, owner),
				there: func() bool { return slices.Contains(n.kept(dir), owner) },
			})
		}
	}
	return out, nil
}

// kept lists the containers whose FIFOs a process holds, if it is a keeper.
func (n Node) kept(dir string) []string {
	b, ok := readCommand(dir)
	if args := arguments(b); !ok || filepath.Base(args[0]) != keeper.Program || !slices.Contains(args[1:], n.Layout.KeeperSocket()) {
		return nil
	}
	files, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return nil // ended
	}
	var owners []string
	for _, f := range files {
		path, err := os.Readlink(filepath.Join(dir, "fd", f.Name()))
		m := part.FindStringSubmatch(path)
		if err == nil && m != nil && within(path, n.Layout.PluginState()) && !slices.Contains(owners, m[1]) {
			owners = append(owners, m[1])
		}
	}
	return owners
}

// addresses finds what host-local gave out to pods of a daemon like this one.
func (n Node) addresses() ([]trace, error) {
	var out []trace
	for _, dir := range n.books() {
		entries, err := os.ReadDir(n.path(dir))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list addresses: %w", err)
		}
		for _, e := range entries {
			if _, err := netip.ParseAddr(strings.ReplaceAll(e.Name(), "_", ":")); err != nil {
				continue // its lock and its notes
			}
			file := filepath.Join(dir, e.Name())
			holder := n.holder(file)
			if !id.MatchString(holder) {
				continue // not ours
			}
			out = append(out, trace{id: holder, text: file + " for pod " + holder, there: func() bool { return n.holder(file) == holder }})
		}
	}
	return out, nil
}

// records finds what is kept of the networks of pods until it is given back.
func (n Node) records() ([]trace, error) {
	entries, err := os.ReadDir(n.path(n.Layout.Attachments()))
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list network records: %w", err)
	}
	var out []trace
	for _, e := range entries {
		pod := strings.TrimSuffix(strings.TrimSuffix(e.Name(), ".new"), ".json")
		if !id.MatchString(pod) {
			continue
		}
		path := filepath.Join(n.Layout.Attachments(), e.Name())
		out = append(out, trace{id: pod, text: path, there: func() bool { return n.exists(path) }})
	}
	return out, nil
}
