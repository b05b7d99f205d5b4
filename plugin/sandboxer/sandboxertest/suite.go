package sandboxertest

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/sandboxer"
)

// Subject is a sandboxer under test, without sandboxes.
type Subject struct {
	Sandboxer sandboxer.Sandboxer
	// Context carries the namespace and ends with the test.
	Context context.Context
	// Record returns a sandbox that may be started.
	Record func(t *testing.T, id string) record.Sandbox
	// Exit ends the sandbox's process by itself, with any code.
	Exit func(t *testing.T, sb record.Sandbox)
	// Lose kills the sandbox's shim with SIGKILL.
	Lose func(t *testing.T, sb record.Sandbox)
	// Remains fails the test for anything that is left of the sandbox.
	Remains func(t *testing.T, id string)
}

// Suite runs the contract against what open returns.
func Suite(t *testing.T, open func(t *testing.T) Subject) {
	for name, test := range map[string]func(*testing.T, bench){
		"life":           testLife,
		"exit":           testExit,
		"wait after":     testWaitAfter,
		"wait absent":    testWaitAbsent,
		"wait cancelled": testWaitCancelled,
		"never started":  testNeverStarted,
		"uncommitted":    testUncommitted,
		"start twice":    testStartTwice,
		"shim killed":    testShimKilled,
		"two":            testTwo,
	} {
		t.Run(name, func(t *testing.T) { test(t, bench{open(t)}) })
	}
}

type bench struct{ Subject }

// start starts a sandbox that is shut down with the test.
func (b bench) start(t *testing.T, id string) record.Sandbox {
	t.Helper()
	sb := b.Record(t, id)
	t.Cleanup(func() {
		if err := b.Sandboxer.Shutdown(context.WithoutCancel(b.Context), sb); err != nil {
			t.Error(err)
		}
		b.Remains(t, id)
	})
	inst, err := b.Sandboxer.Start(b.Context, sb)
	if err != nil {
		t.Fatal(err)
	}
	if inst.StartedAt.IsZero() {
		t.Error("started without a time")
	}
	sb.Instance = inst
	return sb
}

func (b bench) wait(t *testing.T, sb record.Sandbox) <-chan record.Exit {
	t.Helper()
	exits, err := b.Sandboxer.Wait(b.Context, sb)
	if err != nil {
		t.Fatal(err)
	}
	return exits
}

// exit receives the one value.
func exit(t *testing.T, exits <-chan record.Exit) record.Exit {
	t.Helper()
	select {
	case e, ok := <-exits:
		if !ok || e.At.IsZero() {
			t.Fatalf("exit %+v, %t", e, ok)
		}
		if more, ok := <-exits; ok {
			t.Errorf("a second exit: %+v", more)
		}
		return e
	case <-time.After(time.Minute):
		t.Fatal("the end was not reported")
	}
	return record.Exit{}
}

func (b bench) alive(t *testing.T, sb record.Sandbox, want bool) {
	t.Helper()
	got, err := b.Sandboxer.Alive(b.Context, sb)
	if err != nil || got != want {
		t.Errorf("alive: %t, %v; want %t", got, err, want)
	}
}

func testLife(t *testing.T, b bench) {
	sb := b.start(t, "a")
	exits := b.wait(t, sb)
	b.alive(t, sb, true)
	paths, err := b.Sandboxer.Namespaces(b.Context, sb)
	if err != nil {
		t.Error(err)
	}
	for kind, path := range paths {
		if ns, err := os.Stat(path); err != nil || ns.IsDir() {
			t.Errorf("the %s namespace is not at %s: %v", kind, path, err)
		}
	}
	for range 2 {
		if err := b.Sandboxer.Stop(b.Context, sb); err != nil {
			t.Error(err)
		}
		b.alive(t, sb, false)
	}
	exit(t, exits)
	for range 2 {
		if err := b.Sandboxer.Shutdown(b.Context, sb); err != nil {
			t.Error(err)
		}
		b.Remains(t, sb.ID)
	}
	b.alive(t, sb, false)
}

func testExit(t *testing.T, b bench) {
	sb := b.start(t, "a")
	begin := time.Now().Add(-time.Second)
	one, two := b.wait(t, sb), b.wait(t, sb)
	b.Exit(t, sb)
	if a, c := exit(t, one), exit(t, two); a.Code != c.Code || a.At.Before(begin) || a.At.After(time.Now()) {
		t.Errorf("exits %+v and %+v", a, c)
	}
	b.alive(t, sb, false)
}

// One who subscribes late gets the end that was.
func testWaitAfter(t *testing.T, b bench) {
	sb := b.start(t, "a")
	early := b.wait(t, sb)
	b.Exit(t, sb)
	want := exit(t, early)
	if got := exit(t, b.wait(t, sb)); got.Code != want.Code {
		t.Errorf("late %+v, early %+v", got, want)
	}
}

func testWaitAbsent(t *testing.T, b bench) {
	if _, err := b.Sandboxer.Wait(b.Context, b.Record(t, "none")); !errdefs.IsNotFound(err) {
		t.Errorf("wait for nothing: %v", err)
	}
}

func testWaitCancelled(t *testing.T, b bench) {
	sb := b.start(t, "a")
	ctx, cancel := context.WithCancel(b.Context)
	exits, err := b.Sandboxer.Wait(ctx, sb)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if e, ok := <-exits; ok {
		t.Errorf("exit %+v of a live sandbox", e)
	}
	b.alive(t, sb, true)
}

func testNeverStarted(t *testing.T, b bench) {
	sb := b.Record(t, "a")
	b.alive(t, sb, false)
	if err := b.Sandboxer.Stop(b.Context, sb); err != nil {
		t.Error(err)
	}
	if err := b.Sandboxer.Shutdown(b.Context, sb); err != nil {
		t.Error(err)
	}
	b.Remains(t, "a")
}

// The record of a start that was not committed has no instance.
func testUncommitted(t *testing.T, b bench) {
	sb := b.start(t, "a")
	sb.Instance = record.Instance{}
	if err := b.Sandboxer.Shutdown(b.Context, sb); err != nil {
		t.Error(err)
	}
	b.Remains(t, "a")
}

func testStartTwice(t *testing.T, b bench) {
	sb := b.start(t, "a")
	if _, err := b.Sandboxer.Start(b.Context, sb); err == nil {
		t.Error("started twice")
	}
	b.alive(t, sb, true)
}

func testShimKilled(t *testing.T, b bench) {
	sb := b.start(t, "a")
	exits := b.wait(t, sb)
	b.Lose(t, sb)
	exit(t, exits)
	b.alive(t, sb, false)
	if err := b.Sandboxer.Stop(b.Context, sb); err != nil {
		t.Error(err)
	}
	if err := b.Sandboxer.Shutdown(b.Context, sb); err != nil {
		t.Error(err)
	}
	b.Remains(t, "a")
}

func testTwo(t *testing.T, b bench) {
	one, two := b.start(t, "a"), b.start(t, "b")
	if err := b.Sandboxer.Shutdown(b.Context, one); err != nil {
		t.Error(err)
	}
	b.Remains(t, "a")
	b.alive(t, two, true)
}
