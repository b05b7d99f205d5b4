// Package logs has a supervisor write the logs of its containers while no
// containerd is connected to it, so that they need not wait for one.
//
// A log belongs to whoever holds the lock of its state (package crilog), and passes
// from one process to the other without a byte lost or repeated. That is all there
// is between the daemon and the supervisor: the daemon has the logs while it lives,
// as it serves those who are attached as well; the supervisor takes them when the
// last connection to it has ended, and lets go as soon as there is one. Containers
// whose output has no such state, as those of a stock containerd, are left alone.
//
// Start reading at Writers.Run.
package logs

import (
	"context"
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/gantry-cri/gantry/plugin/crilog"
)

// look is how often a supervisor without a connection looks for output that nobody
// takes: of a container that was just made, or whose daemon is still about to end.
const look = 100 * time.Millisecond

// Output is the FIFOs of a container; without Stderr it has a terminal.
type Output struct {
	Stdout, Stderr string
}

func (o Output) fifos() []string {
	if o.Stderr == "" {
		return []string{o.Stdout}
	}
	return []string{o.Stdout, o.Stderr}
}

// Writers are the logs that this process writes.
type Writers struct {
	// Outputs are those of the containers that run.
	Outputs func() []Output
	// Connected reports whether somebody is connected; Changed gets a value when
	// that may have changed.
	Connected func() bool
	Changed   <-chan struct{}

	open   map[string]*writer // by stdout
	failed map[string]bool    // of which that was told
}

// Run takes logs and lets go of them until ctx ends.
func (w *Writers) Run(ctx context.Context) {
	tick := time.NewTicker(look)
	defer tick.Stop()
	defer w.release(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.Changed:
		case <-tick.C:
		}
		if w.Connected() {
			w.release(ctx)
		} else {
			w.take(ctx)
		}
	}
}

// take begins to write the logs that nobody writes.
func (w *Writers) take(ctx context.Context) {
	if w.open == nil {
		w.open, w.failed = map[string]*writer{}, map[string]bool{}
	}
	for _, o := range w.Outputs() {
		if w.open[o.Stdout] != nil {
			continue
		}
		opened, err := begin(o)
		switch {
		case err == nil:
			w.open[o.Stdout] = opened
		case errdefs.IsNotFound(err), errdefs.IsFailedPrecondition(err):
			// It is none of ours, or the daemon has it.
		case !w.failed[o.Stdout]:
			w.failed[o.Stdout] = true
			log.G(ctx).WithError(err).WithField("stdout", o.Stdout).Warn("write the log of a container while no daemon does")
		}
	}
}

// release lets go of all logs, and returns when others can have them.
func (w *Writers) release(ctx context.Context) {
	var wait sync.WaitGroup
	for _, o := range slices.Collect(maps.Values(w.open)) {
		wait.Go(func() {
			if err := o.end(); err != nil {
				log.G(ctx).WithError(err).Warn("let go of the log of a container")
			}
		})
	}
	wait.Wait()
	w.open, w.failed = nil, nil
}

// writer is one log at work.
type writer struct {
	log    *crilog.Log
	fifos  []*crilog.Fifo
	cancel context.CancelFunc
	done   chan struct{} // closed when nothing is copied any more
}

// begin takes the log first: nobody else reads the FIFOs then.
func begin(o Output) (*writer, error) {
	l, err := crilog.Continue(filepath.Join(filepath.Dir(o.Stdout), crilog.DirName))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	w := &writer{log: l, cancel: cancel, done: make(chan struct{})}
	for _, path := range o.fifos() {
		f, err := crilog.OpenFifo(path)
		if err != nil {
			close(w.done)
			return nil, errors.Join(err, w.end())
		}
		w.fifos = append(w.fifos, f)
	}
	go w.copy(ctx)
	return w, nil
}

// copy ends with the output of the container, and then has all of it in the file,
// or with the FIFOs. A log that is at its end is let go of for the daemon.
func (w *writer) copy(ctx context.Context) {
	defer close(w.done)
	var copies sync.WaitGroup
	errs := make([]error, len(w.fifos))
	for i, f := range w.fifos {
		copies.Go(func() { errs[i] = w.log.Copy(crilog.Stream(i), f, nil) })
	}
	copies.Wait()
	if errors.Join(errs...) == nil && w.log.Flush(ctx) == nil {
		_ = w.log.Close() // what there was to write is written
	}
}

func (w *writer) end() error {
	w.cancel()
	for _, f := range w.fifos {
		_ = f.Close() // it may have ended
	}
	err := w.log.Close()
	<-w.done
	return err
}
