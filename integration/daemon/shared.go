package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ownerLabel marks the pods of one test on a shared daemon.
const ownerLabel = "gantry.test/owner"

// shared is the daemon of a package of tests, made when first asked for.
var shared struct {
	mu    sync.Mutex
	opts  []Option
	in    *Instance
	err   error // why there is none
	users int
}

// Main runs a package's tests, and then takes down the daemon that they shared:
//
//	func TestMain(m *testing.M) { daemon.Main(m) }
func Main(m *testing.M, opts ...Option) {
	shared.opts = opts
	code := m.Run()
	if in := shared.in; in != nil {
		err := in.Close()
		if err != nil {
			fmt.Fprintf(os.Stderr, "shared daemon: %v\n%s\n", err, in.Tail(logTail))
		}
		if err := errors.Join(err, in.Discard()); err != nil {
			fmt.Fprintf(os.Stderr, "FAIL: shared daemon: %v\n", err)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

// Shared returns the daemon that the tests of a package share, which Main takes
// down: starting one takes longer than most tests. When a test ends its pods
// (those from PodConfig of this handle) are removed; when no other test uses the
// daemon at that moment, all pods are, and the machine must be as before. A test
// may stop or kill the daemon when it is not parallel; it runs again for the
// next one.
func Shared(t testing.TB) *Daemon {
	t.Helper()
	needRoot(t)
	in, err := acquireShared()
	if err != nil {
		t.Fatalf("shared daemon: %v", err)
	}
	d := &Daemon{Instance: in, t: t, owner: fmt.Sprint("t", owners.Add(1))}
	t.Cleanup(func() {
		if err := d.releaseShared(); err != nil {
			t.Errorf("%v", err)
		}
		if t.Failed() {
			t.Logf("last lines of the daemon's log:\n%s", in.Tail(logTail))
		}
	})
	return d
}

var owners atomic.Int64

func acquireShared() (*Instance, error) {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	switch {
	case shared.err != nil:
		return nil, shared.err
	case shared.in == nil:
		shared.in, shared.err = Launch(ctx, shared.opts...)
		if shared.err != nil {
			return nil, shared.err
		}
	case shared.in.running() == nil:
		if err := shared.in.Start(ctx); err != nil {
			return nil, err
		}
	}
	shared.users++
	return shared.in, nil
}

func (d *Daemon) releaseShared() error {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	shared.users--
	ctx, cancel := context.WithTimeout(context.Background(), 2*opTimeout)
	defer cancel()
	if err := d.revive(ctx); err != nil {
		return err
	}
	if shared.users > 0 {
		return d.removeOwn(ctx)
	}
	if err := d.RemovePods(ctx); err != nil {
		return err
	}
	return d.CheckClean()
}

// removeOwn removes the pods of this test.
func (d *Daemon) removeOwn(ctx context.Context) error {
	if d.set.noCRI {
		return nil
	}
	pods, err := d.Runtime().ListPodSandbox(ctx, &cri.ListPodSandboxRequest{
		Filter: &cri.PodSandboxFilter{LabelSelector: map[string]string{ownerLabel: d.owner}},
	})
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	var errs []error
	for _, p := range pods.Items {
		errs = append(errs, d.RemovePod(ctx, p.Id))
	}
	return errors.Join(errs...)
}
