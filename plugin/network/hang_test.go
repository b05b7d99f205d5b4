package network_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gantry-cri/gantry/plugin/record"
)

// TestHungAdd has the plugin of one pod hang: it is killed with its child when
// the time is over, the error tells, other pods and Ready go on meanwhile, and
// nothing is left.
func TestHungAdd(t *testing.T) {
	h := newHost(t)
	h.conf.AddTimeout = 15 * time.Second // in which the others are done on a busy machine
	h.write("10-test.conflist", h.bridgeConf())
	h.stub.behave(t, "ADD", behaviour{Hang: true, Only: "hung"})
	h.open()
	failed := h.attachInBackground(t.Context(), "hung")
	h.stub.hanging(t)
	if len(h.stub.processes(t)) != 2 {
		t.Errorf("processes %v, want the plugin and its child", h.stub.processes(t))
	}
	h.attach(pod("other"))
	mustDo(t, h.net.Ready(t.Context()))
	h.detach("other")
	select {
	case err := <-failed:
		t.Fatalf("ended before the others were done: %v", err)
	default:
	}
	err := <-failed
	if !errors.Is(err, context.DeadlineExceeded) || !strings.HasPrefix(err.Error(), "attach network: plugin stub: ADD: given up after ") {
		t.Errorf("attach: %v", err)
	}
	h.stub.dead(t)
	h.detach("hung")
}

// attachInBackground attaches a pod, and takes it back at the end of the test if
// the test has not: what it leaves on the host would be in the way of all others.
func (h *host) attachInBackground(ctx context.Context, id string) <-chan error {
	h.t.Helper()
	ns, err := h.net.CreateNS(h.t.Context(), id)
	mustDo(h.t, err)
	h.t.Cleanup(func() {
		if err := h.net.Detach(context.Background(), pod(id)); err != nil {
			h.t.Errorf("detach %s: %v", id, err)
		}
	})
	done := make(chan error, 1)
	n := h.net
	go func() {
		_, err := n.Attach(ctx, pod(id), ns)
		done <- err
	}()
	return done
}

// TestCancelledAdd ends the caller's context while a plugin runs.
func TestCancelledAdd(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.bridgeConf())
	h.stub.behave(t, "ADD", behaviour{Hang: true})
	h.open()
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("the kubelet left")
	failed := h.attachInBackground(ctx, "a1")
	h.stub.hanging(t)
	cancel(reason)
	err := <-failed
	if !errors.Is(err, reason) {
		t.Errorf("attach: %v, want %v", err, reason)
	}
	h.stub.dead(t)
	h.detach("a1")
}

// TestHungDel repeats a Detach that ran out of time, and a second caller of
// the same pod waits no longer than he wants to.
func TestHungDel(t *testing.T) {
	h := newHost(t)
	h.conf.DelTimeout = 1500 * time.Millisecond
	h.write("10-test.conflist", h.bridgeConf())
	h.open()
	h.attach(pod("a1"))
	h.stub.behave(t, "DEL", behaviour{Hang: true})
	failed := make(chan error, 1)
	go func() { failed <- h.net.Detach(context.Background(), pod("a1")) }()
	h.stub.hanging(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := h.net.Detach(ctx, pod("a1")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second detach: %v", err)
	}
	if err := <-failed; !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "detach network: plugin stub: DEL: given up") {
		t.Errorf("detach: %v", err)
	}
	h.stub.dead(t)
	h.stub.behave(t, "DEL", behaviour{})
	h.detach("a1")
}

// TestOrphanPlugin starts a daemon after one that died with a plugin running:
// that holds up neither the start nor other pods, and has ended before anything
// is done for its own.
func TestOrphanPlugin(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.bridgeConf())
	h.stub.behave(t, "ADD", behaviour{Hang: true, Only: "a1"})
	h.open()
	failed := h.attachInBackground(t.Context(), "a1")
	h.stub.hanging(t)
	orphan := h.stub.processes(t)
	h.open()
	h.attach(pod("a2"))
	h.detach("a2")
	if now := h.stub.processes(t); !slices.Equal(now, orphan) {
		t.Errorf("processes %v are left of %v although nobody asked for their pod", now, orphan)
	}
	h.detach("a1")
	for _, pid := range orphan {
		if alive(pid) {
			eventually(t, "the end of a killed process", func() bool { return len(h.stub.processes(t)) == 0 })
		}
	}
	if err := <-failed; err == nil {
		t.Error("the attach of the dead daemon succeeded")
	}
	if held := h.held(); len(held) > 0 {
		t.Errorf("left behind: %q", held)
	}
}

// TestOrphanLook: a plugin of a dead daemon that works for no pod is killed at
// once, and that it was there is no error.
func TestOrphanLook(t *testing.T) {
	h := newHost(t)
	h.conf.StatusTimeout = time.Hour
	h.write("10-test.conflist", h.stubConf("one", "1.1.0"))
	h.stub.behave(t, "STATUS", behaviour{Hang: true})
	h.open()
	h.stub.hanging(t)
	orphan := h.stub.processes(t)
	h.stub.behave(t, "STATUS", behaviour{})
	h.open()
	eventually(t, "the end of the plugin", func() bool {
		now := h.stub.processes(t)
		return !slices.ContainsFunc(orphan, func(pid int) bool { return slices.Contains(now, pid) })
	})
}

// TestStatus drives Ready by what STATUS says.
func TestStatus(t *testing.T) {
	h := newHost(t)
	h.conf.StatusTimeout = time.Second
	h.write("10-test.conflist", h.stubConf("one", "1.1.0"))
	h.open()
	ready := func() bool { return h.net.Ready(t.Context()) == nil }
	says := func(text string) func() bool {
		return func() bool {
			err := h.net.Ready(t.Context())
			return err != nil && strings.Contains(err.Error(), text)
		}
	}
	eventually(t, "ready", ready)
	for _, code := range []uint{50, 51} {
		h.stub.behave(t, "STATUS", behaviour{Code: code, Msg: "agent is away"})
		eventually(t, "not ready", says("plugin stub: STATUS: agent is away (code "))
		h.stub.behave(t, "STATUS", behaviour{})
		eventually(t, "ready again", ready)
	}
	h.stub.behave(t, "STATUS", behaviour{Hang: true})
	h.stub.hanging(t)
	if !ready() {
		t.Error("not ready while STATUS is being asked")
	}
	eventually(t, "a hanging STATUS is not ready", says("STATUS: given up after"))
	h.stub.behave(t, "STATUS", behaviour{})
	eventually(t, "ready after the hang", ready)
}

// TestStatusGrace keeps a network ready through a short failure, and not a
// new one.
func TestStatusGrace(t *testing.T) {
	h := newHost(t)
	h.conf.StatusGrace = time.Hour
	h.stub.behave(t, "STATUS", behaviour{Code: 50, Msg: "away"})
	h.write("10-test.conflist", h.stubConf("one", "1.1.0"))
	h.open()
	asked := func(more int) {
		have := len(h.stub.calls(t, "STATUS"))
		eventually(t, "STATUS calls", func() bool { return len(h.stub.calls(t, "STATUS")) >= have+more })
	}
	asked(2)
	if h.net.Ready(t.Context()) == nil {
		t.Error("ready although STATUS has never been good")
	}
	h.stub.behave(t, "STATUS", behaviour{})
	eventually(t, "ready", func() bool { return h.net.Ready(t.Context()) == nil })
	h.stub.behave(t, "STATUS", behaviour{Code: 50, Msg: "away"})
	asked(3)
	if err := h.net.Ready(t.Context()); err != nil {
		t.Errorf("not ready within the grace: %v", err)
	}
}

// TestOldVersionHasNoStatus does not ask plugins that do not know the command.
func TestOldVersionHasNoStatus(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.stubConf("one", "1.0.0"))
	h.open()
	mustDo(t, h.net.Ready(t.Context()))
	h.attach(pod("a1"))
	h.detach("a1")
	if calls := h.stub.calls(t, "STATUS"); len(calls) > 0 {
		t.Errorf("%d STATUS calls", len(calls))
	}
}

// TestSlowReader checks that the record is complete though a plugin's child
// keeps the output open.
func TestOutputHeldOpen(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.stubConf("one", "1.0.0"))
	h.stub.behave(t, "ADD", behaviour{Leave: true})
	h.open()
	var n record.Network = h.attach(pod("a1"))
	if len(n.IPs) != 1 {
		t.Errorf("addresses %v", n.IPs)
	}
	h.stub.killAll(t)
	h.detach("a1")
}
