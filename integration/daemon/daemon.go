// Package daemon runs a real containerd for a test: its own directory, sockets,
// configuration, cgroup parent, bridge and subnet, none shared with another
// daemon on the machine.
//
//	d := daemon.Start(t)                       // or daemon.Shared(t), see Main
//	id := d.RunPod(d.PodConfig("web"))
//	d.Kill()                                   // SIGKILL, then
//	d.Up()
//	status, err := d.Runtime().PodSandboxStatus(t.Context(), ...)
//
// When the test ends every pod is removed through CRI, and then the machine must
// be as it was before (package host says what that means), the daemon must end
// on SIGTERM, and no data race or panic may stand in its log; each of these
// fails the test. A test that died without cleaning is cleaned after by the next
// one (slot.go).
//
// Start at Instance, which does the work and returns errors; Daemon is the same
// with a test attached. The package speaks to the daemon over its sockets and
// imports nothing of it.
package daemon

import (
	"context"
	"os"
	"testing"
	"time"

	criapi "k8s.io/cri-api/pkg/apis"
	criclient "k8s.io/cri-client/pkg"
)

// Daemon is an Instance whose failures fail a test.
type Daemon struct {
	*Instance
	t     testing.TB
	owner string // marks this test's pods on a shared daemon
}

// opTimeout bounds one step of a daemon's life: start, stop, cleaning.
var opTimeout = Patience(time.Minute)

// logTail is how many lines of log a failed test shows.
const logTail = 60

// Start starts a daemon that serves until the test ends. It skips the test
// without root, and fails it when a binary is missing.
func Start(t testing.TB, opts ...Option) *Daemon {
	t.Helper()
	needRoot(t)
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	in, err := Launch(ctx, opts...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	d := &Daemon{Instance: in, t: t}
	t.Cleanup(func() {
		if err := in.Close(); err != nil {
			t.Errorf("%v", err)
		}
		if t.Failed() {
			t.Logf("last lines of the daemon's log:\n%s", in.Tail(logTail))
		}
		if err := in.Discard(); err != nil {
			t.Errorf("%v", err)
		}
	})
	return d
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// do runs one step of the daemon's life.
func (d *Daemon) do(step func(context.Context) error) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	if err := step(ctx); err != nil {
		d.t.Fatalf("%v\n%s", err, d.Tail(logTail))
	}
}

// Up starts the daemon again, after Stop or Kill, and waits until it serves.
func (d *Daemon) Up() { d.t.Helper(); d.do(d.Instance.Start) }

// Stop ends the daemon with SIGTERM. Pods run on.
func (d *Daemon) Stop() { d.t.Helper(); d.do(d.Instance.Stop) }

// Kill ends the daemon with SIGKILL. Pods run on.
func (d *Daemon) Kill() { d.t.Helper(); d.do(d.Instance.Kill) }

// Restart is Stop and Up.
func (d *Daemon) Restart() { d.t.Helper(); d.Stop(); d.Up() }

// CRI connects to the daemon the way the kubelet does. A connection survives a
// restart of the daemon, but may take seconds to notice: ask again after one.
func (d *Daemon) CRI() (criapi.RuntimeService, criapi.ImageManagerService) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	rt, err := criclient.NewRemoteRuntimeServiceBuilder().WithEndpoint(d.Endpoint()).WithConnectionTimeout(callTimeout).Build(ctx)
	if err != nil {
		d.t.Fatalf("connect to CRI runtime service: %v", err)
	}
	d.t.Cleanup(func() { rt.Close(context.Background()) })
	im, err := criclient.NewRemoteImageServiceBuilder().WithEndpoint(d.Endpoint()).WithConnectionTimeout(callTimeout).Build(ctx)
	if err != nil {
		d.t.Fatalf("connect to CRI image service: %v", err)
	}
	d.t.Cleanup(func() { im.Close(context.Background()) })
	return rt, im
}
