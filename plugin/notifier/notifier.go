// Package notifier hears from the kernel of system calls that the seccomp
// filters of containers deny, and answers as the filter would have.
//
// A runtime that loads a filter which tells of calls sends the descriptor by
// which it does to the socket of this package, with what the filter says of itself
// (facts.Notifier). Every process that a runtime starts brings one. A call waits
// until it is answered, and fails in any case: nothing here can allow one. When the
// daemon ends its descriptors go with it, and the kernel lets calls of the kind
// fail as if it did not have them; a process that is started after that is heard
// of again.
//
// It decides nothing about containers. Start at Run.
package notifier

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
)

const (
	// handTimeout bounds how long a runtime takes to hand a descriptor over.
	handTimeout = 10 * time.Second
	// reportTimeout bounds how long a call waits for being recorded.
	reportTimeout = 5 * time.Second
	// perSecond and atOnce bound the calls of one process and its children that
	// are answered, so that they do not keep the daemon busy.
	perSecond, atOnce = 200, 500
)

// Report takes note of a call before its process gets the answer.
type Report func(ctx context.Context, container string, call facts.DeniedCall) error

// Notifier is the socket and what came over it.
type Notifier struct {
	listener   *net.UnixListener
	report     Report
	background *lifecycle.Group
	calls      *prometheus.CounterVec
}

// Listen opens the socket, in place of an earlier daemon's.
func Listen(path string, background *lifecycle.Group, report Report) (*Notifier, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen to seccomp filters: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen to seccomp filters: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen to seccomp filters: %w", err), l.Close())
	}
	return &Notifier{listener: l, report: report, background: background, calls: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gantry_seccomp_denied_calls_total", Help: "System calls that seccomp filters of containers with a notifier denied, by name.",
	}, []string{"syscall"})}, nil
}

// Metrics are for the daemon to register.
func (n *Notifier) Metrics() prometheus.Collector { return n.calls }

// Close gives the socket up.
func (n *Notifier) Close() error {
	if err := n.listener.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Run takes descriptors until ctx ends.
func (n *Notifier) Run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { n.listener.Close() })
	defer stop()
	for {
		conn, err := n.listener.AcceptUnix()
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // too many open files, which passes
			log.G(ctx).WithError(err).Warn("seccomp filters cannot tell of calls for now")
			lifecycle.Pause(ctx, time.Second)
			continue
		}
		n.background.Go("hear of denied system calls", func(ctx context.Context) { n.take(ctx, conn) })
	}
}

// take receives one descriptor and hears it out.
func (n *Notifier) take(ctx context.Context, conn *net.UnixConn) {
	f, hello, err := receive(conn)
	conn.Close()
	if err != nil {
		log.G(ctx).WithError(err).Warn("a seccomp filter cannot tell of calls")
		return
	}
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("container", hello.container))
	if err := n.hear(ctx, f, hello); err != nil && ctx.Err() == nil {
		log.G(ctx).WithError(err).Warn("a seccomp filter does not tell of calls any more")
	}
}

// hear answers calls until no process with the filter is left.
func (n *Notifier) hear(ctx context.Context, f *os.File, from hello) error {
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	pace := rate.NewLimiter(perSecond, atOnce)
	for {
		call, err := next(raw)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := pace.Wait(ctx); err != nil {
			return err
		}
		if err := n.answer(ctx, raw, from, call); err != nil {
			return err
		}
	}
}

// answer records a call and has it fail.
func (n *Notifier) answer(ctx context.Context, raw syscall.RawConn, from hello, call notification) error {
	name := call.name()
	denied := facts.DeniedCall{Name: name, Stop: from.Stop}
	denial := from.Of(name)
	var caller *process
	if denial == facts.EndsProcess {
		var err error
		if caller, err = callerOf(raw, call); err != nil {
			return err
		}
		defer caller.close()
		denied.Ends = caller.is(from.pid)
	}
	n.calls.WithLabelValues(name).Inc()
	reporting, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	if err := n.report(reporting, from.container, denied); err != nil {
		log.G(ctx).WithField("syscall", name).WithError(err).Warn("that a system call was denied is not recorded")
	}
	if err := caller.end(); err != nil {
		return err
	}
	return reply(raw, call, denial)
}
