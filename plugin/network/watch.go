package network

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/fsnotify/fsnotify"
)

// settleTime is waited after an event, so that a burst is one look.
const settleTime = 50 * time.Millisecond

// errStatusPending is the verdict on a configuration that no plugin has been
// asked about yet.
var errStatusPending = fmt.Errorf("the plugins have not told their status yet: %w", errdefs.ErrUnavailable)

// verdict is what Ready answers; it is replaced as a whole.
type verdict struct {
	err  error
	conf digest     // of the configuration that was looked at
	nets []attached // to be asked for STATUS; nil if none has it
}

type digest [sha256.Size]byte

// Ready returns nil if pods can be attached, else why not. It answers from
// what Run saw last and never waits.
func (n *Networks) Ready(context.Context) error {
	if err := n.ready.Load().err; err != nil {
		return fmt.Errorf("network is not ready: %w", err)
	}
	return nil
}

// look reads the configuration and judges it without asking a plugin. What
// STATUS said last is kept as long as old was ready or has the same
// configuration.
func (n *Networks) look(old *verdict) *verdict {
	nets, err := n.load(n.source(Attachment{}))
	if err == nil {
		err = n.findPlugins(nets)
	}
	if err != nil {
		return &verdict{err: err}
	}
	v := &verdict{conf: digestOf(nets)}
	v.nets = slices.DeleteFunc(nets, func(net attached) bool { return !since(net.conf, "1.1.0") })
	switch {
	case len(v.nets) == 0:
		v.nets = nil
	case old == nil:
		v.err = errStatusPending
	case old.conf == v.conf:
		v.err = old.err
	case old.err != nil:
		v.err = errStatusPending
	}
	return v
}

func digestOf(nets []attached) digest {
	h := sha256.New()
	for _, net := range nets {
		_, _ = fmt.Fprintf(h, "%s %d\n", net.ifName, len(net.conf.Bytes)) // a hash takes everything
		_, _ = h.Write(net.conf.Bytes)
		for _, p := range net.conf.Plugins {
			_, _ = h.Write(p.Bytes)
		}
	}
	return digest(h.Sum(nil))
}

// Run keeps Ready up to date until ctx ends. It notices every change of the
// configuration directory, its removal and return, a rename of it or of a
// parent, and a swapped symbolic link: events tell at once, and a look every
// second makes sure. STATUS runs beside it, so a plugin that hangs does not
// keep it from looking.
func (n *Networks) Run(ctx context.Context) {
	w := newWatch(ctx, n.conf.ConfDir)
	defer w.close()
	p := &prober{n: n}
	defer p.wg.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(fmt.Errorf("the watch ends: %w", context.Canceled))
	for {
		w.sync(ctx) // before reading: what changes meanwhile is an event
		n.publish(ctx, n.look(n.ready.Load()))
		p.ask(ctx, n.ready.Load())
		select {
		case <-ctx.Done():
			return
		case <-time.After(p.pause(n.ready.Load())):
		case err := <-p.answer:
			n.publish(ctx, p.judge(n.ready.Load(), err))
		case <-w.wake:
			w.settle(ctx)
		case <-n.kick:
		}
	}
}

func (n *Networks) publish(ctx context.Context, v *verdict) {
	old := n.ready.Swap(v)
	if (old.err == nil) == (v.err == nil) {
		return
	}
	if v.err != nil {
		log.G(ctx).WithError(v.err).Warn("network is not ready")
	} else {
		log.G(ctx).Info("network is ready")
	}
}

// prober asks the plugins for their STATUS, one round after the other. It is
// Run's and not safe for concurrent use.
type prober struct {
	n      *Networks
	wg     sync.WaitGroup
	conf   digest             // what the running or the last round is about
	answer chan error         // of the running round, else nil
	cancel context.CancelFunc // of the running round
	next   time.Time          // of the next round
	lastOK time.Time
}

// ask starts a round if one is due. A round about a configuration that is no
// longer there is ended, and its answer is not waited for.
func (p *prober) ask(ctx context.Context, v *verdict) {
	if p.answer != nil && p.conf != v.conf {
		p.cancel()
		p.answer = nil
	}
	due := p.conf != v.conf || errors.Is(v.err, errStatusPending) || !time.Now().Before(p.next)
	if v.nets == nil || p.answer != nil || !due {
		return
	}
	ctx, cancel := within(ctx, p.n.conf.StatusTimeout)
	answer := make(chan error, 1)
	p.conf, p.answer, p.cancel = v.conf, answer, cancel
	p.wg.Go(func() {
		defer cancel()
		answer <- p.n.status(ctx, v.nets)
	})
}

// pause is how long Run may sleep if nothing happens.
func (p *prober) pause(v *verdict) time.Duration {
	if v.nets == nil || p.answer != nil {
		return retryInterval
	}
	return min(retryInterval, time.Until(p.next))
}

// judge returns the verdict that follows from the answer of the round.
func (p *prober) judge(v *verdict, err error) *verdict {
	p.answer = nil
	if v.conf != p.conf {
		return v
	}
	now := time.Now()
	judged := *v
	switch {
	case err == nil:
		p.lastOK = now
		judged.err = nil
	case v.err == nil && now.Sub(p.lastOK) < p.n.conf.StatusGrace:
	default:
		judged.err = err
	}
	p.next = now.Add(p.n.conf.StatusInterval)
	if err != nil {
		p.next = now.Add(min(retryInterval, p.n.conf.StatusInterval))
	}
	return &judged
}

// status returns the first plugin's complaint.
func (n *Networks) status(ctx context.Context, nets []attached) error {
	for _, net := range nets {
		if err := n.cni.GetStatusNetworkList(ctx, net.conf); err != nil {
			return pluginCause(err)
		}
	}
	return nil
}

// watch turns what happens to a directory, or to one on the way to it, into
// one signal.
type watch struct {
	dir   string
	wake  chan struct{}
	fs    *fsnotify.Watcher // nil if the kernel has none to give
	wg    sync.WaitGroup
	known map[string]os.FileInfo // what is watched, by path; Run's alone
	path  atomic.Pointer[route]
}

// route is how the directory is reached.
type route struct {
	dirs []string // it and its parents, as written and resolved
	ends []string // it, as written and resolved
}

// matters leaves out the neighbours of the directories on the way.
func (r *route) matters(path string) bool {
	return slices.Contains(r.dirs, path) || slices.Contains(r.ends, filepath.Dir(path))
}

func routeTo(dir string) *route {
	r := &route{dirs: onTheWay(dir), ends: []string{dir}}
	if real, err := filepath.EvalSymlinks(dir); err == nil && real != dir {
		r.dirs = append(r.dirs, onTheWay(real)...)
		r.ends = append(r.ends, real)
	}
	return r
}

func newWatch(ctx context.Context, dir string) *watch {
	w := &watch{dir: filepath.Clean(dir), wake: make(chan struct{}, 1), known: map[string]os.FileInfo{}}
	w.path.Store(routeTo(w.dir))
	fs, err := fsnotify.NewWatcher()
	if err != nil {
		log.G(ctx).WithError(err).Warn("no notice of changes to the network configuration, looking every second")
		return w
	}
	w.fs = fs
	w.wg.Go(w.forward)
	return w
}

func (w *watch) close() {
	if w.fs == nil {
		return
	}
	_ = w.fs.Close() // returns nil always
	w.wg.Wait()
}

// forward signals the events that matter until the watcher is closed.
func (w *watch) forward() {
	for {
		select {
		case e, ok := <-w.fs.Events:
			if !ok {
				return
			}
			if !w.path.Load().matters(e.Name) {
				continue
			}
		case _, ok := <-w.fs.Errors:
			if !ok {
				return
			}
			// Events were lost: look.
		}
		select {
		case w.wake <- struct{}{}:
		default: // one is waiting already
		}
	}
}

// settle lets a burst of events end.
func (w *watch) settle(ctx context.Context) {
	t := time.NewTimer(settleTime)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	select {
	case <-w.wake:
	default:
	}
}

// sync watches the directories that are there now. One that was replaced by
// another of the same name is watched anew.
func (w *watch) sync(ctx context.Context) {
	if w.fs == nil {
		return
	}
	found := map[string]os.FileInfo{}
	r := routeTo(w.dir)
	w.path.Store(r)
	for _, p := range r.dirs {
		if info, err := os.Stat(p); err == nil && info.IsDir() {
			found[p] = info
		}
	}
	for p, was := range w.known {
		if is, ok := found[p]; !ok || !os.SameFile(was, is) {
			_ = w.fs.Remove(p) // gone with the directory, usually
			delete(w.known, p)
		}
	}
	for p, info := range found {
		if _, ok := w.known[p]; ok {
			continue
		}
		if err := w.fs.Add(p); err != nil {
			log.G(ctx).WithError(err).WithField("path", p).Debug("cannot watch, looking every second")
			continue
		}
		w.known[p] = info
	}
}

// onTheWay returns dir and its parents without the root.
func onTheWay(dir string) []string {
	var paths []string
	for p := dir; p != filepath.Dir(p); p = filepath.Dir(p) {
		paths = append(paths, p)
	}
	return paths
}
