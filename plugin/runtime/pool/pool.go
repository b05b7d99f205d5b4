// Package pool is a task runtime for containerd in which no shim of an earlier
// daemon holds up the daemon, or any pod but its own.
//
// It stands in for containerd's plugin "io.containerd.runtime.v2.task" and is
// made of it: new tasks are run by a TaskManager over an empty directory, other
// namespaces by one over the stock directories, exactly as before. What is
// different is what happens to the shims that are there when the daemon starts.
// Each is connected to in the background, on its own. One that answers serves;
// one that is silent but alive is asked again, and its tasks are Unavailable
// meanwhile; only one whose socket nobody listens on is dead and cleaned up, and
// its tasks are NotFound only after that. A silent one is never touched, unless
// its pod is to end: EndSilent.
//
// Tasks that outlive their shim, and its sandboxes, are the pool's own from the
// beginning: lasting.go, and controller.go.
//
// It does not decide what becomes of a pod. Start reading at Pool, then
// shim.go for the life of one of those shims.
package pool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/mount"
	crt "github.com/containerd/containerd/v2/core/runtime"
	v2 "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/gantry-cri/gantry/plugin/flight"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/record"
)

// Options are what a Pool is made of.
type Options struct {
	// Namespace is the one whose tasks the pool runs; Stock has the others,
	// and those of this one that it knows from before there was a pool.
	Namespace string
	Stock     crt.PlatformRuntime
	// New makes the runtime of new tasks, with its bundles in the directories
	// root and state, which are empty.
	New func(root, state string) (crt.PlatformRuntime, error)
	// Root and State are the pool's own; State does not outlive a reboot.
	Root, State string
	// Containers tells the runtime of a bundle that does not say.
	Containers containers.Store
	// Mounts are given back with a task, if there is a manager.
	Mounts mount.Manager
	Events events.Publisher
	Daemon Daemon
	// Background runs the recovery.
	Background *lifecycle.Group
}

// Daemon is how shims reach this daemon.
type Daemon struct {
	GRPCAddress, TTRPCAddress string
	// SocketDir is where shims listen.
	SocketDir string
	// Env is what shims get besides the daemon's environment.
	Env []string
}

// cleanups is how many dead shims are cleaned up at a time. Each is an exec of
// the shim's binary and of the OCI runtime, and after a crash of everything
// there may be hundreds.
const cleanups = 4

// Pool is the task runtime.
type Pool struct {
	Options
	own      crt.PlatformRuntime
	slots    chan struct{}
	links    *links
	revivals flight.Turns[string] // by address

	mu    sync.Mutex
	shims map[string]*shim       // from earlier daemons, and lasting ones, by task
	pods  map[string]*shim       // of sandboxes of lasting shims
	exits map[string]record.Exit // of tasks whose shim was dead
	// unread are directories of earlier daemons that could not be read yet.
	// Until then nobody knows that a task is not there.
	unread []string
	// runtimes are those that were asked whether they resume.
	runtimes map[string]runtimeAnswer
	// started is what the starts of lasting shims have answered.
	started map[startKey]*bootapi.BootstrapResult
}

var _ crt.PlatformRuntime = (*Pool)(nil)

// New returns the runtime at once and recovers the shims of earlier daemons in
// the background.
func New(ctx context.Context, o Options) (*Pool, error) {
	p := &Pool{
		Options: o, slots: make(chan struct{}, cleanups), links: newLinks(),
		shims: map[string]*shim{}, pods: map[string]*shim{}, exits: map[string]record.Exit{}, runtimes: map[string]runtimeAnswer{},
		started: map[startKey]*bootapi.BootstrapResult{},
	}
	generation, err := p.find(ctx)
	if err != nil {
		return nil, fmt.Errorf("find shims: %w", err)
	}
	root, state := filepath.Join(o.Root, generation), filepath.Join(o.State, generation)
	for _, dir := range []string{root, state} {
		// Not to be listed, but gone through by who is mapped to nobody.
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("create directory: %w", err)
		}
	}
	if p.own, err = o.New(root, state); err != nil {
		return nil, err
	}
	p.recover(slices.Concat(slices.Collect(maps.Values(p.shims)), slices.Collect(maps.Values(p.pods))))
	if unread := slices.Clone(p.unread); len(unread) > 0 {
		o.Background.Go("find the shims of earlier daemons", func(ctx context.Context) {
			for _, g := range unread {
				lifecycle.Retry(ctx, "find the shims of an earlier daemon", retries, func() error { return p.findLate(ctx, g) })
			}
		})
	}
	return p, nil
}

// recover begins to connect to the shims.
func (p *Pool) recover(shims []*shim) {
	creators(shims)
	for _, s := range shims {
		p.Background.Go("recover shim of "+s.bundle.ID, s.run)
	}
}

var retries = lifecycle.Backoff{First: retryMin, Last: retryMax}

// findLate is findIn for a directory that could not be read at the start.
func (p *Pool) findLate(ctx context.Context, generation string) error {
	found, err := p.findIn(ctx, p.State, p.Root, generation)
	if err != nil {
		return err
	}
	p.mu.Lock()
	for _, s := range found {
		p.shims[s.bundle.ID] = s
	}
	p.unread = slices.DeleteFunc(p.unread, func(g string) bool { return g == generation })
	p.mu.Unlock()
	p.recover(found)
	return nil
}

// find registers the bundles that earlier daemons left and returns the name
// of the directory for this one's. Each daemon has a directory of its own, so
// that its runtime finds nothing to load. Nothing that is found is in the way
// of the start.
func (p *Pool) find(ctx context.Context) (string, error) {
	if err := os.MkdirAll(p.State, 0o711); err != nil {
		return "", err
	}
	entries, err := os.ReadDir(p.State)
	if err != nil {
		return "", err
	}
	last := 0
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil && e.Name() != lastingDir || !e.IsDir() {
			continue
		}
		last = max(last, n)
		found, err := p.findIn(ctx, p.State, p.Root, e.Name())
		if err != nil {
			log.G(ctx).WithError(err).WithField("directory", e.Name()).Error("find the shims of an earlier daemon")
			p.unread = append(p.unread, e.Name())
		}
		for _, s := range found {
			p.shims[s.bundle.ID] = s
		}
	}
	if err := p.findPods(ctx); err != nil {
		return "", err
	}
	for _, dirs := range [][2]string{{p.Root, p.State}, {p.podRoot(), p.podState()}} {
		if err := p.sweepRoot(dirs[0], dirs[1]); err != nil {
			log.G(ctx).WithError(err).Warn("remove working directories that have no task")
		}
	}
	return strconv.Itoa(last + 1), nil
}

// findIn returns the shims in the directory of one earlier daemon: all, or none
// with an error.
func (p *Pool) findIn(ctx context.Context, top, root, generation string) ([]*shim, error) {
	state := filepath.Join(top, generation)
	dir := filepath.Join(state, p.Namespace)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var found []*shim
	ctx = namespaces.WithNamespace(ctx, p.Namespace)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			// A removal that was broken off after its unmounts.
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				log.G(ctx).WithError(err).Warn("remove what is left of a bundle")
			}
			continue
		}
		bundle, err := v2.LoadBundle(ctx, state, e.Name())
		if err != nil {
			return nil, err
		}
		found = append(found, foundShim(p, bundle, root))
	}
	if len(entries) == 0 && generation != lastingDir {
		// They stay while there is something in them.
		_ = removeEmpty(dir, state)
	}
	return found, nil
}

// sweepRoot removes the working directories of bundles that are not there: a
// reboot took them, or a daemon ended between the one and the other.
func (p *Pool) sweepRoot(root, state string) error {
	works, err := filepath.Glob(filepath.Join(root, "*", p.Namespace, "*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, work := range works {
		dir := filepath.Dir(work)
		generation := filepath.Base(filepath.Dir(dir))
		if _, err := os.Stat(filepath.Join(state, generation, p.Namespace, filepath.Base(work))); errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, os.RemoveAll(work))
		}
	}
	generations, err := filepath.Glob(filepath.Join(root, "*"))
	if err != nil {
		return err
	}
	for _, g := range generations {
		// They stay while there is something in them.
		_ = removeEmpty(filepath.Join(g, p.Namespace), g)
	}
	return errors.Join(errs...)
}

func removeEmpty(dirs ...string) error {
	for _, d := range dirs {
		if err := os.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// stopLimit bounds the end of the recovery, whose execs are killed.
const stopLimit = 5 * time.Second

// Close ends the recovery; the shims live on.
func (p *Pool) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	return p.Background.Stop(ctx)
}

// ID implements PlatformRuntime.
func (p *Pool) ID() string { return p.own.ID() }

// Create implements PlatformRuntime.
func (p *Pool) Create(ctx context.Context, id string, opts crt.CreateOpts) (crt.Task, error) {
	if !p.ours(ctx) {
		return p.Stock.Create(ctx, id, opts)
	}
	if p.recovered(id) != nil {
		return nil, fmt.Errorf("task %s: %w", id, errdefs.ErrAlreadyExists)
	}
	lasts, err := p.lasts(ctx, opts)
	if err != nil {
		return nil, err
	}
	if lasts {
		return p.createLasting(ctx, id, opts)
	}
	// The runtime of new tasks does not know the pod's shim.
	if pod := p.recovered(opts.SandboxID); pod != nil && opts.Address == "" {
		c, err := pod.serving(ctx)
		if err != nil {
			return nil, fmt.Errorf("join the shim of sandbox %s: %w", opts.SandboxID, err)
		}
		opts.Address, opts.Version = c.address, uint32(c.version)
	}
	return p.own.Create(ctx, id, opts)
}

// Get implements PlatformRuntime. The task of a shim that has not answered yet
// is Unavailable: nobody knows how it is.
func (p *Pool) Get(ctx context.Context, id string) (crt.Task, error) {
	if !p.ours(ctx) {
		return p.Stock.Get(ctx, id)
	}
	if s := p.recovered(id); s != nil {
		if _, err := s.serving(ctx); err != nil {
			return nil, err
		}
		return &task{process{shim: s}}, nil
	}
	t, err := p.own.Get(ctx, id)
	if errdefs.IsNotFound(err) {
		t, err = p.Stock.Get(ctx, id)
	}
	return t, p.unlessUnread(err)
}

// unlessUnread is the error, save for NotFound while the task may be in a
// directory that could not be read yet.
func (p *Pool) unlessUnread(err error) error {
	if !errdefs.IsNotFound(err) {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.unread) > 0 {
		return fmt.Errorf("the tasks of an earlier daemon cannot be read: %w", errdefs.ErrUnavailable)
	}
	return err
}

// Tasks implements PlatformRuntime. It waits for nobody: the tasks of shims
// that have not answered yet are not among them.
func (p *Pool) Tasks(ctx context.Context, all bool) ([]crt.Task, error) {
	list, err := p.own.Tasks(ctx, all)
	if err != nil {
		return nil, err
	}
	if !all && !p.ours(ctx) {
		return list, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.shims {
		if s.current().phase == serving {
			list = append(list, &task{process{shim: s}})
		}
	}
	return list, nil
}

// Delete implements PlatformRuntime.
func (p *Pool) Delete(ctx context.Context, id string) (*crt.Exit, error) {
	if !p.ours(ctx) {
		return p.Stock.Delete(ctx, id)
	}
	if s := p.recovered(id); s != nil && s.lasting {
		return s.delete(ctx)
	}
	defer p.sweepSockets(ctx, id)
	if s := p.recovered(id); s != nil {
		return s.delete(ctx)
	}
	exit, err := p.own.Delete(ctx, id)
	if !errdefs.IsNotFound(err) {
		return exit, err
	}
	if _, gone := p.own.Get(ctx, id); !errdefs.IsNotFound(gone) {
		return exit, err
	}
	if s := p.adopt(ctx, id); s != nil {
		return s.delete(ctx)
	}
	exit, err = p.Stock.Delete(ctx, id)
	return exit, p.unlessUnread(err)
}

// adopt takes charge of a bundle whose task the runtime of new tasks has given
// up, nil for none: its clean-up after a dead shim has a short limit and is not
// repeated.
func (p *Pool) adopt(ctx context.Context, id string) *shim {
	found, err := filepath.Glob(filepath.Join(p.State, "*", p.Namespace, id))
	if err != nil || len(found) != 1 || !validName(id) {
		return nil
	}
	state := filepath.Dir(filepath.Dir(found[0]))
	bundle, err := v2.LoadBundle(ctx, state, id)
	if err != nil {
		log.G(ctx).WithError(err).WithField("task", id).Warn("load the bundle of a task that was given up")
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.shims[id]; s != nil {
		return s
	}
	s := foundShim(p, bundle, p.Root)
	p.shims[id] = s
	p.Background.Go("clean up after task "+id, s.run)
	return s
}

// LastExit tells how a task ended whose shim was found dead, as far as the shim
// had written it down.
func (p *Pool) LastExit(_ context.Context, id string) (record.Exit, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	exit, ok := p.exits[id]
	return exit, ok
}

// PluginInfo answers for the runtime that new tasks get.
func (p *Pool) PluginInfo(ctx context.Context, request any) (any, error) {
	if i, ok := p.own.(interface {
		PluginInfo(context.Context, any) (any, error)
	}); ok {
		return i.PluginInfo(ctx, request)
	}
	return nil, fmt.Errorf("the runtime gives no information: %w", errdefs.ErrNotImplemented)
}

func (p *Pool) ours(ctx context.Context) bool {
	ns, ok := namespaces.Namespace(ctx)
	return ok && ns == p.Namespace
}

func (p *Pool) recovered(id string) *shim {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.shims[id]
}

// forget is called when a shim's bundle is gone. The last of an earlier
// daemon takes the daemon's directories along.
func (p *Pool) forget(s *shim, exit *record.Exit) {
	p.mu.Lock()
	switch {
	case s.pod:
		delete(p.pods, s.bundle.ID)
	default:
		delete(p.shims, s.bundle.ID)
		if exit != nil {
			p.exits[s.bundle.ID] = *exit
		}
	}
	p.mu.Unlock()
	dir := filepath.Dir(s.bundle.Path)
	generation := filepath.Base(filepath.Dir(dir))
	if generation == lastingDir {
		return // others are being made there
	}
	// They stay while there is another in them.
	for _, top := range []string{p.State, p.Root} {
		if removeEmpty(filepath.Join(top, generation, p.Namespace)) == nil {
			_ = removeEmpty(filepath.Join(top, generation))
		}
	}
}
