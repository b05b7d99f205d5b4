package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	crt "github.com/containerd/containerd/v2/core/runtime"
	v2 "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/gantry-cri/gantry/plugin/record"
)

const (
	// probeLimit is how long a shim may take to answer before it counts as
	// silent. Its tasks are Unavailable from then on, and nothing else.
	probeLimit = 5 * time.Second
	retryMin   = 100 * time.Millisecond
	retryMax   = 5 * time.Second
	// buryLimit bounds the shim binary's own clean-up, which execs the OCI
	// runtime.
	buryLimit = 30 * time.Second
	// buryTries is how often that may fail before the bundle goes without. The
	// caller still ends what is left in the task's control group.
	buryTries = 5
)

// phase is where the recovery of a shim stands.
type phase int

const (
	// loading: it was not asked yet.
	loading phase = iota
	// silent: something listens on its socket, and does not answer.
	silent
	// serving: it answers.
	serving
	// dead: nobody listens on its socket; it is being cleaned up.
	dead
	// gone: nothing is left of it here.
	gone
)

func (p phase) String() string {
	return [...]string{"not reached yet", "silent", "serving", "dead and being cleaned up", "gone"}[p]
}

// shim is the connection to a shim process for one of its tasks: as it was found
// when the daemon started, or for a task of this daemon that outlives its shim.
type shim struct {
	pool   *Pool
	bundle *v2.Bundle
	// work is the working directory of the bundle, which has a link to it unless
	// its daemon ended too early.
	work string
	// pod says that it is for a sandbox and not for a task.
	pod bool
	// lasting says that the task outlives the shim: see lasting.go.
	lasting bool
	// binary is the shim's program, found before any bundle is removed: those
	// of containers point to that of their pod. "" if it is not known.
	binary string
	// creators are processes that were making the container when the pool
	// was made.
	creators []int

	woken chan struct{} // capacity 1: something has changed, do not pause
	// lost is when a lasting one could not be started again for the first time;
	// it is run's.
	lost time.Time

	mu      sync.Mutex
	now     standing
	changed chan struct{} // closed when now changes
}

// standing is immutable.
type standing struct {
	phase phase
	conn  *connection // while serving
	// leaving is set while delete takes the task away: the connection is then
	// closed by us.
	leaving bool
}

func newShim(p *Pool, bundle *v2.Bundle, root, binary string) *shim {
	dir := filepath.Dir(bundle.Path)
	return &shim{
		pool: p, bundle: bundle, binary: binary, woken: make(chan struct{}, 1), changed: make(chan struct{}),
		work: filepath.Join(root, filepath.Base(filepath.Dir(dir)), filepath.Base(dir), bundle.ID),
	}
}

// foundShim is the shim of a bundle that is there.
func foundShim(p *Pool, bundle *v2.Bundle, root string) *shim {
	s := newShim(p, bundle, root, binaryOf(p, bundle))
	if params, err := readBootstrap(bundle.Path); err == nil {
		s.lasting = resumes(params.GetMetadata())
	}
	return s
}

func (s *shim) current() standing {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

func (s *shim) set(now standing) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = now
	close(s.changed)
	s.changed = make(chan struct{})
}

// stay takes a task back that was leaving, and reports whether it could: not when
// the connection has closed, as then nobody keeps it any more.
func (s *shim) stay(conn *connection) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-conn.closed:
		return false
	default:
	}
	s.now = standing{phase: serving, conn: conn}
	close(s.changed)
	s.changed = make(chan struct{})
	return true
}

// serving returns the connection. Before the shim was asked for the first time
// it waits, as that takes no time unless the shim is silent; so it does while a
// dead one is cleaned up, after which there is no such task.
func (s *shim) serving(ctx context.Context) (*connection, error) {
	for {
		s.mu.Lock()
		now, changed := s.now, s.changed
		s.mu.Unlock()
		switch now.phase {
		case serving:
			if !s.lasting || !now.conn.broken() {
				return now.conn, nil
			}
		case silent:
			return nil, fmt.Errorf("the shim of task %s is alive and does not answer: %w", s.bundle.ID, errdefs.ErrUnavailable)
		case gone:
			return nil, fmt.Errorf("task %s: %w", s.bundle.ID, errdefs.ErrNotFound)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("the shim of task %s is %s: %w (%w)", s.bundle.ID, now.phase, errdefs.ErrUnavailable, context.Cause(ctx))
		}
	}
}

// run keeps the connection until the task is gone or ctx ends.
func (s *shim) run(ctx context.Context) {
	ctx = namespaces.WithNamespace(ctx, s.bundle.Namespace)
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("task", s.bundle.ID))
	s.endCreators(ctx)
	s.reconnect(ctx, false)
}

// keep is run for a task of this daemon, with its connection.
func (s *shim) keep(ctx context.Context, conn *connection) {
	ctx = namespaces.WithNamespace(ctx, s.bundle.Namespace)
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("task", s.bundle.ID))
	if !s.serve(ctx, conn) {
		s.reconnect(ctx, true)
	}
}

// reconnect connects and connects again; served says that the task was known to
// run.
func (s *shim) reconnect(ctx context.Context, served bool) {
	failures := 0
	for pause := retryMin; ; pause = min(2*pause, retryMax) {
		conn, err := s.reach(ctx)
		switch {
		case err == nil:
			served, pause = true, retryMin
			if s.serve(ctx, conn) {
				return
			}
			continue
		case errors.Is(err, errNobodyListens), errors.Is(err, errForgotten):
			log.G(ctx).WithError(err).Info("the shim is dead, or has lost its task; cleaning up")
			s.set(standing{phase: dead})
			if s.bury(ctx, served, failures >= buryTries) {
				return
			}
			failures++
		case errors.Is(err, errBroke):
			log.G(ctx).WithError(err).Debug("connect to the shim; trying again")
		default:
			if s.current().phase != silent {
				log.G(ctx).WithError(err).Warn("the shim is alive and does not answer; trying on")
			}
			s.set(standing{phase: silent})
		}
		if !s.rest(ctx, pause) {
			return
		}
	}
}

// rest is the pause between two attempts; a nudge ends it.
func (s *shim) rest(ctx context.Context, pause time.Duration) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.woken:
	case <-ctx.Done():
		return false
	}
	return true
}

// nudge has a shim looked at that has changed.
func (s *shim) nudge() {
	select {
	case s.woken <- struct{}{}:
	default:
	}
}

// serve offers the connection until it closes, and reports whether that is the
// end: the task was deleted, or the daemon stops.
func (s *shim) serve(ctx context.Context, conn *connection) bool {
	s.set(standing{phase: serving, conn: conn})
	select {
	case <-conn.closed:
	case <-ctx.Done():
		return true // the connection ends with the process
	}
	// The pipe of the shim's log is still open.
	if err := conn.close(); err != nil {
		log.G(ctx).WithError(err).Debug("close what is left of a connection to the shim")
	}
	if now := s.current(); now.leaving || now.phase == gone {
		return true
	}
	log.G(ctx).Info("the connection to the shim closed")
	s.set(standing{phase: loading})
	return false
}

// bury cleans up after a dead shim and reports whether nothing is left to do.
// With force the bundle goes even if the shim's own clean-up fails.
func (s *shim) bury(ctx context.Context, served, force bool) bool {
	select {
	case s.pool.slots <- struct{}{}:
		defer func() { <-s.pool.slots }()
	case <-ctx.Done():
		return true
	}
	if s.lasting {
		// Its last create may go on without it.
		creators([]*shim{s})
		s.endCreators(ctx)
	}
	exit, err := s.callDelete(ctx)
	if err != nil && !force {
		log.G(ctx).WithError(err).Warn("clean up after a dead shim; trying again")
		return false
	}
	if err != nil {
		log.G(ctx).WithError(err).Error("the clean-up after a dead shim fails; its bundle is removed all the same")
		exit = nil
	}
	if err := s.remove(ctx); err != nil {
		log.G(ctx).WithError(err).Warn("remove the bundle of a dead shim; trying again")
		return false
	}
	if served && !s.pod {
		s.publish(ctx, exit)
	}
	s.vanish(exit)
	return true
}

// publish tells of the end of a task that was known to run, as nobody else
// does.
func (s *shim) publish(ctx context.Context, exit *crt.Exit) {
	if exit == nil {
		exit = &crt.Exit{Status: unknownCode, Timestamp: time.Now()}
	}
	at := timestamppb.New(exit.Timestamp)
	for topic, event := range map[string]any{
		crt.TaskExitEventTopic: &eventstypes.TaskExit{
			ContainerID: s.bundle.ID, ID: s.bundle.ID, Pid: exit.Pid, ExitStatus: exit.Status, ExitedAt: at,
		},
		crt.TaskDeleteEventTopic: &eventstypes.TaskDelete{
			ContainerID: s.bundle.ID, Pid: exit.Pid, ExitStatus: exit.Status, ExitedAt: at,
		},
	} {
		if err := s.pool.Events.Publish(ctx, topic, event); err != nil {
			log.G(ctx).WithError(err).WithField("topic", topic).Warn("publish the end of a task")
		}
	}
}

// unknownCode stands for an end that nobody saw: that of SIGKILL.
const unknownCode = 137

// remove takes away what the daemon holds of the task.
func (s *shim) remove(ctx context.Context) error {
	if s.pool.Mounts != nil && !s.pod {
		err := s.pool.Mounts.Deactivate(ctx, s.bundle.ID)
		if err != nil && !errdefs.IsNotFound(err) {
			log.G(ctx).WithError(err).Warn("deactivate the mounts of a task")
		}
	}
	if err := s.bundle.Delete(); err != nil {
		return err
	}
	if err := os.RemoveAll(s.work); err != nil {
		return fmt.Errorf("remove working directory: %w", err)
	}
	return nil
}

func (s *shim) vanish(exit *crt.Exit) {
	var last *record.Exit
	if exit != nil {
		last = &record.Exit{Code: exit.Status, At: exit.Timestamp}
	}
	s.pool.forget(s, last)
	s.set(standing{phase: gone})
}

func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
