package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/network/networktest"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/sandbox"
)

var errStruck = errors.New("struck by the test")

// Every single effect of running a pod is struck in turn: it fails, it happens
// and fails, the client leaves at it, or the daemon dies before or after it.
// Whatever happens, the pod runs, or nothing is left, or a record is visible
// with which a removal cleans up; and a retry in the end gives a pod.
func TestRunEveryFault(t *testing.T) {
	for kind, request := range podKinds {
		effects := effectsOfRun(t, request)
		for n, name := range effects {
			for _, fault := range []string{"fails", "happens and fails", "client leaves", "crash before", "crash after"} {
				t.Run(fmt.Sprintf("%s %d %s %s", kind, n, name, fault), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { strikeRun(t, request, n, fault) })
				})
			}
		}
	}
}

// podKinds are pods with different effects.
var podKinds = map[string]func() sandbox.Request{
	"pod":    func() sandbox.Request { return pod("a") },
	"userns": func() sandbox.Request { return withUserNS(pod("a")) },
	"port":   func() sandbox.Request { return withHostPort(pod("a")) },
}

func effectsOfRun(t *testing.T, request func() sandbox.Request) (names []string) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		if _, err := w.start().Run(context.Background(), request()); err != nil {
			t.Fatal(err)
		}
		names = w.names
	})
	if len(names) < 7 {
		t.Fatalf("a run has effects %v", names)
	}
	return names
}

func strikeRun(t *testing.T, request func() sandbox.Request, at int, fault string) {
	w := newWorld(t)
	d := w.start()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	w.strike = func(n int, _ string) (before, after error) {
		if n != at {
			return nil, nil
		}
		switch fault {
		case "fails":
			return errStruck, nil
		case "happens and fails":
			return nil, errStruck
		case "client leaves":
			cancel()
			synctest.Wait()
		case "crash before":
			w.crash()
			return errDead, nil
		case "crash after":
			w.crash()
			return nil, errDead
		}
		return nil, nil
	}
	id, err := d.Run(ctx, request())
	if err == nil && strings.HasPrefix(fault, "crash") {
		t.Fatal("a dead daemon reported success")
	}
	if strings.HasSuffix(fault, "fails") && !errors.Is(err, errStruck) {
		t.Fatalf("got %s %v, want the fault", id, err)
	}
	if !strings.HasPrefix(fault, "crash") {
		time.Sleep(time.Hour) // of the bubble: all that goes on in the background is done
	}
	if strings.HasPrefix(fault, "crash") {
		d.bg.Stop(context.Background())
		d = w.start()
		<-d.Recover()
		time.Sleep(time.Hour)
	}
	if fault != "client leaves" && len(d.List()) == 0 {
		d.clean()
	}
	// Whoever retries gets the pod, the one that was finished meanwhile or a
	// new one.
	id, err = d.Run(context.Background(), request())
	if err != nil {
		t.Fatalf("retry: %v", err)
	}
	list := d.List()
	if len(list) != 1 || list[0].ID != id || list[0].Phase != record.Ready || len(list[0].Network.IPs) == 0 {
		t.Fatalf("after the retry: %+v", list)
	}
	if err := d.Remove(context.Background(), id); err != nil {
		t.Fatalf("remove: %v", err)
	}
	d.clean()
}

// The same inside of the network, whose parts a run sees as one: the namespace,
// the record of what is asked, the plugins, the ports of the node.
func TestRunEveryNetworkFault(t *testing.T) {
	effects := networkEffects(t)
	if !slices.Contains(effects, networktest.EffectMap) || !slices.Contains(effects, networktest.EffectUnmap) {
		t.Fatalf("a pod with a port of the node has effects %v", effects)
	}
	for i, name := range effects {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d %s after %t", i, name, after), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { strikeNetwork(t, i+1, after) })
			})
		}
	}
}

// networkEffects are those of a life of a pod with a port of the node.
func networkEffects(t *testing.T) (names []string) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.net.Hook(func(_ context.Context, effect, _ string) error {
			names = append(names, effect)
			return nil
		})
		d := w.start()
		id, err := d.Run(context.Background(), withHostPort(pod("a")))
		if err == nil {
			err = d.Remove(context.Background(), id)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	return names
}

func strikeNetwork(t *testing.T, at int, after bool) {
	w := newWorld(t)
	d := w.start()
	if after {
		w.net.FailAfter(at, errStruck)
	} else {
		w.net.FailAt(at, errStruck)
	}
	id, err := d.Run(context.Background(), withHostPort(pod("a")))
	if err == nil {
		err = d.Remove(context.Background(), id)
	}
	if !errors.Is(err, errStruck) {
		t.Fatalf("got %s %v, want the fault", id, err)
	}
	time.Sleep(time.Hour) // of the bubble: all that goes on in the background is done
	if err := d.Remove(context.Background(), id); err != nil {
		t.Fatalf("remove: %v", err)
	}
	d.clean()
	// The port is free for another pod.
	if id, err = d.Run(context.Background(), withHostPort(pod("b"))); err != nil {
		t.Fatalf("the next pod: %v", err)
	}
	if err := d.Remove(context.Background(), id); err != nil {
		t.Fatalf("remove: %v", err)
	}
	d.clean()
}

// The same for stopping and removing: in the end nothing is left, by a retry of
// the client or by the next daemon's recovery and the client's retry.
func TestRemoveEveryFault(t *testing.T) {
	for kind, request := range podKinds {
		for i, name := range effectsOfRemove(t, request) {
			for _, fault := range []string{"fails", "happens and fails", "crash before", "crash after"} {
				t.Run(fmt.Sprintf("%s %d %s %s", kind, i, name, fault), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { strikeRemove(t, request, i, fault) })
				})
			}
		}
	}
}

func effectsOfRemove(t *testing.T, request func() sandbox.Request) (effects []string) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		id, err := d.Run(context.Background(), request())
		if err != nil {
			t.Fatal(err)
		}
		before := len(w.names)
		if err := d.Remove(context.Background(), id); err != nil {
			t.Fatal(err)
		}
		effects = w.names[before:]
		d.clean()
	})
	return effects
}

func strikeRemove(t *testing.T, request func() sandbox.Request, at int, fault string) {
	w := newWorld(t)
	d := w.start()
	ctx := context.Background()
	id, err := d.Run(ctx, request())
	if err != nil {
		t.Fatal(err)
	}
	first := len(w.names)
	w.strike = func(n int, _ string) (before, after error) {
		if n != first+at {
			return nil, nil
		}
		switch fault {
		case "fails":
			return errStruck, nil
		case "happens and fails":
			return nil, errStruck
		case "crash before":
			w.crash()
			return errDead, nil
		}
		w.crash()
		return nil, errDead
	}
	err = d.Remove(ctx, id)
	if strings.HasSuffix(fault, "fails") && !errors.Is(err, errStruck) {
		t.Fatalf("got %v, want the fault", err)
	}
	if strings.HasPrefix(fault, "crash") {
		d.bg.Stop(context.Background())
		d = w.start()
		<-d.Recover()
	}
	if err := d.Remove(ctx, id); err != nil {
		t.Fatalf("remove again: %v", err)
	}
	time.Sleep(time.Hour)
	d.clean()
}

// What a run acquires is what a removal releases, in the opposite order.
func TestRunAndRemoveMirror(t *testing.T) {
	w := newWorld(t)
	d := w.start()
	id, err := d.Run(context.Background(), withUserNS(pod("a")))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(context.Background(), id); err != nil {
		t.Fatal(err)
	}
	// The stop releases what a stopped pod does not need, side by side; the
	// removal then repeats it, as it does not know.
	var releases []string
	for _, n := range w.names {
		if n == "shut instance down" || n == "detach network" || n == "remove user namespace" || n == "remove files" {
			releases = append(releases, n)
		}
	}
	if len(releases) < 2 {
		t.Fatalf("releases: %v", releases)
	}
	slices.Sort(releases[:2])
	if got := strings.Join(releases, ", "); got != "detach network, shut instance down, shut instance down, detach network, remove user namespace, remove files" {
		t.Errorf("releases: %s", got)
	}
}

// A network that hangs holds up one pod, is named in the error of a client that
// gave up and in the table, and the retry gets the pod when it ends.
func TestRetryJoinsAStalledRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		release := make(chan struct{})
		var stalled atomic.Int32
		w.strike = func(_ int, name string) (before, after error) {
			if name == "attach network" {
				if stalled.Add(1) == 1 {
					<-release
				}
			}
			return nil, nil
		}
		for range 3 {
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
			_, err := d.Run(ctx, pod("a"))
			cancel()
			if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "attach network") {
				t.Fatalf("a client that gave up got %v", err)
			}
		}
		if ops := d.ops.List(); len(ops) != 1 || ops[0].Name != "run" || ops[0].Stage != "attach network" {
			t.Errorf("operations %+v", ops)
		}
		if l := d.List(); len(l) != 0 {
			t.Errorf("a pod that is being made is listed: %+v", l)
		}
		if _, err := d.Run(context.Background(), pod("b")); err != nil {
			t.Errorf("another pod: %v", err)
		}
		close(release)
		a, err := d.Run(context.Background(), pod("a"))
		if err != nil {
			t.Fatal(err)
		}
		if n := stalled.Load(); n != 2 { // one for each pod
			t.Errorf("%d attachments of two pods", n)
		}
		again, err := d.Run(context.Background(), pod("a"))
		if err != nil || again != a {
			t.Errorf("a client that did not hear: %s %v, want %s", again, err, a)
		}
		d.bg.Stop(context.Background())
	})
}

func TestRunRefuses(t *testing.T) {
	w := newWorld(t)
	d := w.start()
	ctx := context.Background()
	bogus := pod("a")
	bogus.Handler = "bogus"
	if _, err := d.Run(ctx, bogus); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "bogus") {
		t.Errorf("unknown handler: %v", err)
	}
	old := withUserNS(pod("a"))
	old.Handler = noUserNS
	if _, err := d.Run(ctx, old); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a handler without user namespaces: %v", err)
	}
	d.clean()
	id, err := d.Run(ctx, pod("a"))
	if err != nil {
		t.Fatal(err)
	}
	other := pod("a")
	other.Config.Hostname = "other"
	if _, err := d.Run(ctx, other); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), id) {
		t.Errorf("same attempt, other configuration: %v", err)
	}
	if err := d.Stop(ctx, id); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Run(ctx, pod("a")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("an attempt that was stopped: %v", err)
	}
	for range 2 {
		if err := d.Stop(ctx, id); err != nil {
			t.Errorf("stop again: %v", err)
		}
		if err := d.Remove(ctx, id); err != nil {
			t.Errorf("remove: %v", err)
		}
	}
	d.clean()
}

// A sandbox that dies is seen, by the daemon that runs and by the next one.
func TestDeathIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		ctx := context.Background()
		a, err := d.Run(ctx, pod("a"))
		if err != nil {
			t.Fatal(err)
		}
		b, err := d.Run(ctx, pod("b"))
		if err != nil {
			t.Fatal(err)
		}
		w.end(a, 9)
		synctest.Wait()
		if sb, err := d.Get(a); err != nil || sb.Phase != record.NotReady || !strings.Contains(sb.Reason, "code 9") {
			t.Errorf("died: %+v %v", sb, err)
		}
		w.crash()
		d.bg.Stop(ctx)
		w.end(b, 9)
		d = w.start()
		<-d.Recover()
		synctest.Wait()
		for _, id := range []string{a, b} {
			if sb, err := d.Get(id); err != nil || sb.Phase != record.NotReady {
				t.Errorf("died while the daemon was down: %+v %v", sb, err)
			}
			if err := d.Remove(ctx, id); err != nil {
				t.Error(err)
			}
		}
		d.clean()
		d.bg.Stop(ctx)
	})
}
