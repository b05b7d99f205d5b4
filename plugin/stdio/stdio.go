// Package stdio carries the streams of containers and execs whose shim only
// copies them into FIFOs, such as the runc shim.
//
// It owns the directory of FIFOs of a container or exec, the goroutines that
// read them, the log of the container (package crilog) and the clients that
// are attached to it. A client that does not keep up misses output in the end,
// and one that reads nothing is dropped; neither ever holds up the container, the
// log or another client.
//
// It never starts or waits for a process: the caller names the FIFOs to the
// shim, says when the process has exited, and gives the callback that makes
// the shim close its end of stdin. A daemon that was killed calls Reattach and
// the log continues where it was, see package crilog.
//
// Who holds what, with the runc shim: it opens each output FIFO for writing
// and for reading when the task is created, so its writes neither fail nor get
// lost while no daemon reads, and closes both when the output of the process
// ends. What is in a FIFO at that moment is gone unless somebody else has it
// open: that is the daemon, and a Keeper (package keeper) while there is no
// daemon. A container that writes more than a FIFO holds waits for a daemon.
//
// Start reading at New and IO.Attach; Exec is the same for a process that has
// no log.
package stdio

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/gantry-cri/gantry/plugin/crilog"
)

const (
	defaultAttachBuffer = 16 << 20
	defaultAttachStall  = 15 * time.Second
	callbackTimeout     = 10 * time.Second
)

// Config says what streams a container has.
type Config struct {
	// Dir is for this container alone and belongs on tmpfs. It is made with
	// mode 0700.
	Dir string
	// Terminal means one output stream, and no stderr.
	Terminal bool
	// Stdin gives the container an input. StdinOnce ends it when the first
	// attach that brought input ends.
	Stdin, StdinOnce bool
	// LogPath is where the CRI log goes; empty means nowhere.
	LogPath string
	// Log holds the limits of the log.
	Log crilog.Options
	// CloseStdin makes the shim close its end of stdin. It may be nil when
	// StdinOnce is not set.
	CloseStdin func(context.Context) error
	// AttachBuffer is how many bytes an attached client may be behind. It takes
	// memory only as far as the client is behind. Default 16 MiB.
	AttachBuffer int
	// AttachStall is how long a client that is so far behind may take nothing
	// before it is dropped. Default 15 s.
	AttachStall time.Duration
	// Keeper holds the output FIFOs, under the name Dir, while no daemon runs. It
	// may be nil.
	Keeper Keeper
}

func (c Config) validate() error {
	switch {
	case !filepath.IsAbs(c.Dir) || filepath.Clean(c.Dir) == "/":
		return fmt.Errorf("stdio directory %q is not an absolute path: %w", c.Dir, errdefs.ErrInvalidArgument)
	case c.StdinOnce && c.Stdin && c.CloseStdin == nil:
		return fmt.Errorf("stdin once needs a way to close stdin: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// Keeper holds FIFOs open while no daemon does. A FIFO that nobody has open
// forgets what is in it, and the shim closes its side when a container ends.
type Keeper interface {
	// Keep holds the reading ends of FIFOs under a name until Drop, instead of
	// those held under that name before.
	Keep(ctx context.Context, name string, fifos []string) error
	// Drop lets go of the FIFOs of a name. It tolerates absence.
	Drop(ctx context.Context, name string)
}

// IO is the streams of one container.
type IO struct {
	cfg   Config
	log   *crilog.Log
	fifos []*crilog.Fifo
	hub   *hub
	stdin *stdin // nil without one

	drained chan struct{} // closed when every output has ended
	copyErr [2]error      // of the copies, once drained
}

// New makes the FIFOs and begins to read them. Anything left in the directory
// by an earlier attempt is removed.
func New(ctx context.Context, cfg Config) (*IO, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("create stdio: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Dir), 0o711); err != nil {
		return nil, fmt.Errorf("create stdio: %w", err)
	}
	if err := makeFifos(cfg.Dir, cfg.Stdin, cfg.Terminal); err != nil {
		return nil, fmt.Errorf("create stdio: %w", err)
	}
	o, err := open(ctx, cfg, crilog.Open)
	if err != nil {
		return nil, fmt.Errorf("create stdio: %w", errors.Join(err, Remove(cfg.Dir)))
	}
	return o, nil
}

// Reattach takes up the FIFOs and the log that New made in an earlier life of
// the daemon. When the container has exited meanwhile, call Exited, or Wait. A
// log that cannot be continued now is tried again, see crilog.Resume.
func Reattach(ctx context.Context, cfg Config) (*IO, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("reattach stdio: %w", err)
	}
	if _, err := os.Stat(cfg.Dir); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reattach stdio: %s is gone: %w", cfg.Dir, errdefs.ErrNotFound)
	}
	o, err := open(ctx, cfg, crilog.Resume)
	if err != nil {
		return nil, fmt.Errorf("reattach stdio: %w", err)
	}
	if o.stdin != nil && cfg.StdinOnce && o.stdin.wasUsed() {
		// The attach that used it ended with the daemon it was in.
		o.stdin.finish(ctx)
	}
	return o, nil
}

// Remove deletes what New made, for a container that has no IO in memory; what
// a Keeper holds of it is the caller's to drop. It tolerates absence.
func Remove(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove stdio: %w", err)
	}
	return nil
}

func open(ctx context.Context, cfg Config, openLog func(dir, path string, _ crilog.Options) (*crilog.Log, error)) (_ *IO, err error) {
	if cfg.AttachBuffer <= 0 {
		cfg.AttachBuffer = defaultAttachBuffer
	}
	if cfg.AttachStall <= 0 {
		cfg.AttachStall = defaultAttachStall
	}
	o := &IO{cfg: cfg, hub: newHub(), drained: make(chan struct{})}
	p := o.Paths()
	if o.fifos, err = openOutputs(p); err != nil {
		return nil, err
	}
	if o.log, err = openLog(filepath.Join(cfg.Dir, crilog.DirName), cfg.LogPath, cfg.Log); err != nil {
		closeFifos(o.fifos)
		return nil, err
	}
	if p.Stdin != "" {
		o.stdin = newStdin(p.Stdin, cfg.CloseStdin)
	}
	if cfg.Keeper != nil {
		if err := cfg.Keeper.Keep(ctx, cfg.Dir, outputs(p)); err != nil {
			// Only what the container says last while no daemon runs is at stake.
			log.G(ctx).WithError(err).WithField("dir", cfg.Dir).Warn("output is not kept while the daemon is away")
		}
	}
	var copies sync.WaitGroup
	for i, f := range o.fifos {
		copies.Go(func() { o.copyErr[i] = o.log.Copy(crilog.Stream(i), f, o.hub) })
	}
	go func() {
		copies.Wait()
		close(o.drained)
		o.hub.finish()
	}()
	return o, nil
}

// Paths are what the task create request gets.
func (o *IO) Paths() runtime.IO { return paths(o.cfg.Dir, o.cfg.Stdin, o.cfg.Terminal) }

// ReopenLog continues the log at path after a rotation. The caller has made
// sure that the container runs.
func (o *IO) ReopenLog(ctx context.Context, path string) error { return o.log.Reopen(ctx, path) }

// Lost tells how much output did not reach the log file.
func (o *IO) Lost() crilog.Lost { return o.log.Lost() }

// Exited says that the process is gone: an output ends as soon as the shim has
// closed it, or at once when the shim did so while no daemon ran.
func (o *IO) Exited() {
	for _, f := range o.fifos {
		f.Exited()
	}
	if o.stdin != nil {
		o.stdin.shut()
	}
}

// Wait is for after the exit of the process. It returns when all its output is
// in the log. Somebody who inherited the streams may hold them open: after
// most, in which the log kept up, the output that is there is taken and the rest
// left.
func (o *IO) Wait(ctx context.Context, most time.Duration) error {
	o.Exited()
	bound := time.NewTicker(most)
	defer bound.Stop()
	for waiting := true; waiting; {
		select {
		case <-o.drained:
			waiting = false
		case <-bound.C:
			if o.log.Behind() {
				continue // it is the log that is waited for
			}
			for _, f := range o.fifos {
				f.Stop()
			}
			waiting = false
		case <-ctx.Done():
			return fmt.Errorf("drain output: %w", context.Cause(ctx))
		}
	}
	select {
	case <-o.drained:
	case <-ctx.Done():
		return fmt.Errorf("drain output: %w", context.Cause(ctx))
	}
	return errors.Join(errors.Join(o.copyErr[:]...), o.log.Flush(ctx))
}

// Detach ends everything in this process and leaves FIFOs and log for
// Reattach, as a daemon does that shuts down.
func (o *IO) Detach() error {
	closeFifos(o.fifos)
	if o.stdin != nil {
		o.stdin.shut()
	}
	err := o.log.Close() // ends a copy that waits for room, too
	<-o.drained
	return err
}

// Close ends everything and removes FIFOs and journal; the log file stays. It
// may be called again.
func (o *IO) Close(ctx context.Context) error {
	err := o.Detach()
	if o.cfg.Keeper != nil {
		o.cfg.Keeper.Drop(ctx, o.cfg.Dir)
	}
	return errors.Join(err, Remove(o.cfg.Dir))
}

// paths names the FIFOs in dir. There is always a stdout, and a stderr unless
// there is a terminal: the runc shim insists on them.
func paths(dir string, stdin, terminal bool) runtime.IO {
	p := runtime.IO{Stdout: filepath.Join(dir, "stdout"), Terminal: terminal}
	if stdin {
		p.Stdin = filepath.Join(dir, "stdin")
	}
	if !terminal {
		p.Stderr = filepath.Join(dir, "stderr")
	}
	return p
}

func outputs(p runtime.IO) []string {
	if p.Stderr == "" {
		return []string{p.Stdout}
	}
	return []string{p.Stdout, p.Stderr}
}

func makeFifos(dir string, stdin, terminal bool) error {
	if err := Remove(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	p := paths(dir, stdin, terminal)
	names := outputs(p)
	if p.Stdin != "" {
		names = append(names, p.Stdin)
	}
	for _, name := range names {
		if err := unix.Mkfifo(name, 0o600); err != nil {
			return errors.Join(&os.PathError{Op: "mkfifo", Path: name, Err: err}, Remove(dir))
		}
	}
	return nil
}

func openOutputs(p runtime.IO) ([]*crilog.Fifo, error) {
	var fifos []*crilog.Fifo
	for _, name := range outputs(p) {
		f, err := crilog.OpenFifo(name)
		if err != nil {
			closeFifos(fifos)
			return nil, err
		}
		fifos = append(fifos, f)
	}
	return fifos, nil
}

func closeFifos(fifos []*crilog.Fifo) {
	for _, f := range fifos {
		_ = f.Close() // a second time is no news
	}
}
