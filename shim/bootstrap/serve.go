package bootstrap

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/go-runc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	logwriters "github.com/gantry-cri/gantry/shim/logs"
	"github.com/gantry-cri/gantry/shim/process"
	"github.com/gantry-cri/gantry/shim/sandbox"
	"github.com/gantry-cri/gantry/shim/task"
)

const (
	serveCommand = "serve"
	// idleLimit is how long a supervisor stays that has no task and no
	// connection: containerd connects a moment after it was told the address.
	idleLimit = 2 * time.Second
	idlePoll  = 250 * time.Millisecond
	// wordFD is where whoever started the supervisor waits for its word.
	wordFD = 3
	// gcPercent is low: what there is lives long.
	gcPercent = 40
)

// serveMain is the supervisor.
func serveMain(ctx context.Context, args []string) int {
	var s supervisor
	f := flag.NewFlagSet(serveCommand, flag.ContinueOnError)
	f.StringVar(&s.namespace, "namespace", "", "containerd's namespace")
	f.StringVar(&s.address, "address", "", "containerd's address, which names this process")
	f.StringVar(&s.ttrpc, "ttrpc-address", "", "where containerd takes events")
	f.StringVar(&s.socket, "socket", "", "where to listen")
	f.StringVar(&s.anchor, "anchor", "", "where the anchor listens, on kernels that need one")
	f.BoolVar(&s.relay, "relay", false, "copy the output of commands, so that it ends with them")
	f.BoolVar(&s.scoped, "scope", false, "be a unit of its own where systemd runs")
	f.BoolVar(&s.debug, "debug", false, "log more")
	if err := f.Parse(args); err != nil {
		return 2
	}
	word := os.NewFile(wordFD, "word")
	unix.CloseOnExec(wordFD)
	if err := s.serve(ctx, word); err != nil {
		// It is closed if that was after the beginning.
		_, _ = fmt.Fprint(word, err)
		log.G(ctx).WithError(err).Error("the supervisor ends")
		return 1
	}
	return 0
}

// serve takes over what a dead supervisor left, listens, and returns when nobody
// needs it any more.
func (s supervisor) serve(ctx context.Context, word *os.File) error {
	debug.SetGCPercent(gcPercent)
	logs := newLogs(s.debug)
	// For the OCI runtime: it does one thing after the other, and threads that could
	// do more cost more than they help. Of this process it changes nothing any more.
	if err := os.Setenv("GOMAXPROCS", "1"); err != nil {
		return err
	}
	// Everybody's supervisor does not end by what one terminal or client sends.
	// They are taken and not ignored, which containers would inherit.
	signal.Notify(make(chan os.Signal, 1), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	if s.anchor == "" {
		if err := process.Supported(); err != nil {
			return err
		}
	}
	reaper, err := process.NewReaper(s.anchor)
	if err != nil {
		return fmt.Errorf("become the reaper, or reach it: %w", err)
	}
	runc.Monitor = reaper
	if s.scoped {
		if err := s.enterScope(ctx); err != nil {
			log.G(ctx).WithError(err).Warn("the supervisor stays in containerd's control group")
		}
	}
	tasks, pods, err := s.services(ctx, reaper, logs)
	if err != nil {
		return err
	}
	requests := newGate()
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(requests.intercept))
	if err != nil {
		return err
	}
	tasks.Register(server)
	pods.Register(server)
	l, err := listen(s.socket)
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(ctx, l) }()
	handOver := make(chan os.Signal, 1)
	signal.Notify(handOver, unix.SIGUSR1)
	word.Close()
	running, cancel := context.WithCancel(ctx)
	writers := &logwriters.Writers{Outputs: tasks.Outputs, Connected: func() bool { return l.open.Load() > 0 }, Changed: l.changed}
	var writing sync.WaitGroup
	writing.Go(func() { writers.Run(running) })
	defer writing.Wait()
	defer cancel()
	idle := func() bool { return tasks.Idle() && pods.Idle() && l.open.Load() == 0 }
	return s.linger(ctx, l, idle, ending{failed, handOver, func() { requests.close(ctx) }})
}

// services are what the supervisor offers, with what a dead one left.
func (s supervisor) services(ctx context.Context, reaper *process.Reaper, logs *logs) (*task.Service, *sandbox.Service, error) {
	for _, dir := range []string{stateDir(s.socket), podsDir(s.socket)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, nil, err
		}
	}
	events, err := task.NewPublisher(s.ttrpc, s.namespace)
	if err != nil {
		return nil, nil, err
	}
	go events.Run(ctx)
	tasks := task.New(task.Options{
		Namespace: s.namespace, State: stateDir(s.socket), Address: s.url(), Reaper: reaper, Events: events, Logs: logs,
		Join: sandbox.Join(podsDir(s.socket)), Files: sandbox.Files(podsDir(s.socket)), Relay: s.relay,
	})
	if err := tasks.Adopt(ctx); err != nil {
		return nil, nil, fmt.Errorf("take over containers: %w", err)
	}
	pods := sandbox.New(sandbox.Options{
		Namespace: s.namespace, Address: s.url(), State: podsDir(s.socket), Root: rootDir(s.socket), Tasks: tasks, TaskState: stateDir(s.socket), Files: s.relay,
	})
	if err := pods.Adopt(ctx); err != nil {
		return nil, nil, fmt.Errorf("take over sandboxes: %w", err)
	}
	return tasks, pods, nil
}

// ending is what ends a supervisor that is not idle.
type ending struct {
	failed <-chan error
	// handOver asks for the place, which the next one takes as after a crash, once
	// settle has returned.
	handOver <-chan os.Signal
	settle   func()
}

// linger returns when the supervisor was idle for a while, or is to hand over. The
// end of one that is idle is under the lock of those who look for one.
func (s supervisor) linger(ctx context.Context, l *listener, idle func() bool, e ending) error {
	tick := time.NewTicker(idlePoll)
	defer tick.Stop()
	last, accepted := time.Now(), l.accepted.Load()
	for {
		select {
		case err := <-e.failed:
			return fmt.Errorf("serve: %w", err)
		case <-e.handOver:
			e.settle()
			return nil
		case <-tick.C:
		}
		if now := l.accepted.Load(); !idle() || now != accepted {
			last, accepted = time.Now(), now
			continue
		}
		if time.Since(last) < idleLimit {
			continue
		}
		ended, err := s.end(l, func() bool { return idle() && l.accepted.Load() == accepted })
		if err != nil {
			log.G(ctx).WithError(err).Warn("end the supervisor that nobody needs")
		}
		if ended {
			return nil
		}
	}
}

func (s supervisor) end(l *listener, still func() bool) (bool, error) {
	unlock, err := lock(s.socket + ".lock")
	if err != nil {
		return false, err
	}
	defer unlock()
	if !still() {
		return false, nil
	}
	// It removes the socket. Records that are left are for the shim's delete.
	if err := l.Close(); err != nil {
		return false, err
	}
	if err := removeState(s.socket); err != nil {
		return true, fmt.Errorf("something is left of containers: %w", err)
	}
	return true, removeFiles(s.socket + ".lock")
}

// listener counts its connections.
type listener struct {
	net.Listener
	open     atomic.Int64
	accepted atomic.Int64
	changed  chan struct{} // capacity 1: open is another
}

func (l *listener) count(n int64) {
	l.open.Add(n)
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

func listen(socket string) (*listener, error) {
	// The lock is held, and nobody answers on what is there.
	if err := removeFiles(socket); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return &listener{Listener: l, changed: make(chan struct{}, 1)}, nil
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.accepted.Add(1)
	l.count(1)
	return &connection{Conn: c, listener: l}, nil
}

type connection struct {
	net.Conn
	listener *listener
	closed   atomic.Bool
}

func (c *connection) Close() error {
	if c.closed.CompareAndSwap(false, true) {
		c.listener.count(-1)
	}
	return c.Conn.Close()
}
