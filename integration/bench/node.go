package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// subject is a daemon and the runtime handler of its pods.
type subject struct {
	name    string // the column's title
	stock   bool
	handler string
}

// parseSubjects reads "stock:runc,gantry:runc". Columns are titled after the
// daemon, and after the handler too where a daemon comes twice.
func parseSubjects(text string) ([]subject, error) {
	var all []subject
	daemons := map[string]int{}
	for pair := range strings.SplitSeq(text, ",") {
		name, handler, ok := strings.Cut(pair, ":")
		if !ok || handler == "" || name != "stock" && name != "gantry" {
			return nil, fmt.Errorf("parse subject %q: want stock:HANDLER or gantry:HANDLER", pair)
		}
		daemons[name]++
		all = append(all, subject{name: name, stock: name == "stock", handler: handler})
	}
	for i, s := range all {
		if daemons[s.name] > 1 {
			all[i].name += " " + s.handler
		}
	}
	return all, nil
}

// conflist is a bridge like the harness's own, with addresses from the stall
// plugin, which is host-local with a gate before it.
const conflist = `{
  "cniVersion": "1.1.0",
  "name": "NETWORK",
  "plugins": [
    {"type": "bridge", "bridge": "BRIDGE", "isGateway": true, "ipMasq": false, "hairpinMode": true,
     "ipam": {"type": "stall", "dataDir": "IPAM", "ranges": [[{"subnet": "SUBNET"}]],
              "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}
  ]
}
`

// copied are the programs of which every subject has a file of its own, so that
// no memory is shared between subjects and counted by halves.
var copied = []string{"containerd-shim-runc-v2", "containerd-shim-gantry-v2"}

// bench is what all sections use.
type bench struct {
	options
	dir      string // of programs and gates
	registry *images.Registry
	image    string
	pauseImg v1.Image
	versions map[string]string // by subject
}

func newBench(ctx context.Context, o options) (*bench, error) {
	program, err := os.ReadFile(o.pause)
	if err != nil {
		return nil, fmt.Errorf("read pause program (make generated builds it): %w", err)
	}
	b := &bench{options: o, versions: map[string]string{}}
	if b.pauseImg, err = images.Build(images.Spec{
		Entrypoint: []string{"/pause"},
		Layers:     [][]images.File{{images.Executable("pause", program)}},
	}); err != nil {
		return nil, err
	}
	plain, err := images.Build(images.Spec{Cmd: []string{"sleep", "1000000"}})
	if err != nil {
		return nil, err
	}
	if b.dir, err = os.MkdirTemp("", "bench"); err != nil {
		return nil, fmt.Errorf("make directory: %w", err)
	}
	b.registry = images.NewRegistry()
	if b.image, err = b.registry.Put(ctx, "bench/busybox:1", plain); err != nil {
		return nil, errors.Join(err, b.close())
	}
	return b, nil
}

func (b *bench) close() error {
	b.registry.Close()
	return os.RemoveAll(b.dir)
}

func (b *bench) progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}

// node is one subject's daemon, ready for pods.
type node struct {
	*daemon.Instance
	subject
	image string
	gate  string // see openGate
	calls string // address of readHandled
	books *books
}

// launch starts a daemon for each of the subjects. The caller owes them retire,
// also after an error.
func (b *bench) launch(ctx context.Context, subjects []subject, opts ...daemon.Option) ([]*node, error) {
	var nodes []*node
	for _, s := range subjects {
		n, err := b.start(ctx, s, opts)
		if n != nil {
			nodes = append(nodes, n)
		}
		if err != nil {
			return nodes, fmt.Errorf("launch %s: %w", s.name, err)
		}
	}
	return nodes, nil
}

func (b *bench) start(ctx context.Context, s subject, opts []daemon.Option) (*node, error) {
	dir, err := os.MkdirTemp(b.dir, "tools")
	if err != nil {
		return nil, err
	}
	n := &node{subject: s, image: b.image, gate: filepath.Join(dir, "gate")}
	if err := n.fillTools(dir); err != nil {
		return nil, fmt.Errorf("prepare programs: %w", err)
	}
	timed, calls, err := measureCalls()
	if err != nil {
		return nil, err
	}
	n.calls = calls
	opts = append(timed, opts...)
	opts = append([]daemon.Option{daemon.PathFirst(dir), daemon.Set("info", "debug", "level"), daemon.Edit(addOurs)}, opts...)
	if s.stock {
		opts = append(opts, daemon.Stock())
	}
	if n.Instance, err = daemon.Launch(ctx, opts...); err != nil {
		return nil, err
	}
	if n.books, err = openBooks(n.CgroupParent, n.PID()); err != nil {
		return n, err
	}
	if s.stock {
		if err := images.Import(ctx, n.Client(), daemon.PauseImage, b.pauseImg, ""); err != nil {
			return n, err
		}
	}
	if _, err := n.Images().PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: n.image}}); err != nil {
		return n, fmt.Errorf("pull image: %w", err)
	}
	v, err := n.Runtime().Version(ctx, &cri.VersionRequest{})
	if err != nil {
		return n, fmt.Errorf("ask for version: %w", err)
	}
	b.versions[s.name] = fmt.Sprintf("%s %s, handler %s", v.RuntimeName, v.RuntimeVersion, s.handler)
	// The first pod loads programs and makes the bridge; nobody waits for it
	// on a real node either.
	p, err := n.up(ctx, cri.NamespaceMode_POD, "warm-up")
	if err != nil {
		return n, err
	}
	return n, n.down(ctx, p)
}

const (
	// ownHandler has pods run by our own shim.
	ownHandler = "gantry"
	// crunHandler too, with crun.
	crunHandler = "crun"
)

// addOurs adds the handlers of our own shim: pods without a pause process.
func addOurs(in *daemon.Instance, c daemon.Config) {
	for handler, options := range map[string]daemon.Config{ownHandler: nil, crunHandler: {"BinaryName": "crun"}} {
		at := []string{"plugins", daemon.RuntimePlugin, "containerd", "runtimes", handler}
		c.Set("io.containerd.gantry.v2", append(at, "runtime_type")...)
		c.Set("shim", append(at, "sandboxer")...)
		c.Set(in.RuncOptions(options), append(at, "options")...)
	}
}

// fillTools copies the shims and writes the stall plugin.
func (n *node) fillTools(dir string) error {
	bins, err := daemon.BinDirs()
	if err != nil {
		return err
	}
	hostLocal := ""
	for _, bin := range bins {
		for _, name := range copied {
			program, err := os.ReadFile(filepath.Join(bin, name))
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, name), program, 0o755); err != nil {
				return err
			}
		}
		if path := filepath.Join(bin, "cni", "host-local"); hostLocal == "" && exists(path) {
			hostLocal = path
		}
	}
	return errors.Join(
		os.Mkdir(filepath.Join(dir, "cni"), 0o755),
		makeGate(n.gate),
		os.WriteFile(filepath.Join(dir, "cni", "stall"), stallPlugin(n.gate, hostLocal), 0o755))
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// retire removes the daemons and all they have.
func retire(nodes []*node) error {
	var errs []error
	for _, n := range nodes {
		if err := n.Close(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w\n%s", n.name, err, n.Tail(20)))
		}
		errs = append(errs, n.Discard(), n.books.close())
	}
	return errors.Join(errs...)
}

// turns calls do for every node in every round, and each round begins with
// another node.
func turns(rounds int, nodes []*node, do func(round int, n *node) error) error {
	for round := range rounds {
		for i := range nodes {
			n := nodes[(i+round)%len(nodes)]
			if err := do(round, n); err != nil {
				return fmt.Errorf("%s, round %d: %w", n.name, round+1, err)
			}
		}
	}
	return nil
}
