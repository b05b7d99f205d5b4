// Package networktest proves what package network promises, against the real
// thing and against Fake, the in-memory network that the tests of other
// packages use. Start reading at Suite for the promises and at Fake for how to
// inject faults.
package networktest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/gantry-cri/gantry/plugin/network"
	"github.com/gantry-cri/gantry/plugin/network/hostport"
	"github.com/gantry-cri/gantry/plugin/record"
	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Network is what the suite drives.
type Network interface {
	CreateNS(ctx context.Context, id string) (string, error)
	Attach(ctx context.Context, a network.Attachment, netns string) (record.Network, error)
	Detach(ctx context.Context, a network.Attachment) error
	GC(ctx context.Context, live network.Live) error
	List() ([]string, error)
	Ready(ctx context.Context) error
}

var (
	_ Network = (*network.Networks)(nil)
	_ Network = (*Fake)(nil)
)

// Fault is something that a World can be made to do wrong.
type Fault int

// The faults a World can have.
const (
	NoFault Fault = iota
	// AddFails: ADD fails after it has allocated.
	AddFails
	// DelFails: DEL fails and frees nothing.
	DelFails
	// NoConf: there is no network configuration.
	NoConf
)

// World is a host with a network.
type World struct {
	Network Network
	// Held lists what is allocated for pods, one line for each thing.
	Held func() []string
	// Break puts the fault in force and ends the one before.
	Break func(Fault)
	// Reopen returns the network as a daemon sees it that starts after the
	// one that Network belongs to was killed.
	Reopen func() Network
}

// Pod returns the attachment of a pod with that ID.
func Pod(id string) network.Attachment {
	return network.Attachment{ID: id, Pod: &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: "pod-" + id, Namespace: "default", Uid: "uid-" + id},
	}}
}

// Suite runs every promise in a world of its own.
func Suite(t *testing.T, factory func(*testing.T) World) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, World)
	}{
		{"namespace is made once", namespaceIsMadeOnce},
		{"attach gives addresses", attachGivesAddresses},
		{"detach gives all back", detachGivesAllBack},
		{"detach of what never was", detachUnknown},
		{"failed add leaves nothing after detach", failedAdd},
		{"failed del is repeated", failedDel},
		{"attach again after a failure", attachAgain},
		{"cancelled attach leaves nothing after detach", cancelledAttach},
		{"a crash is survived", crash},
		{"gc takes orphans only", gcTakesOrphans},
		{"gc keeps what it cannot release", gcKeepsFailed},
		{"no configuration", noConfiguration},
		{"pods side by side", sideBySide},
		{"host network", hostNetwork},
		{"host ports are one pod's", hostPortsAreOnePods},
		{"host ports go with a failed pod", hostPortsOfFailed},
		{"bad input", badInput},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := factory(t)
			c.run(t, w)
			if held := w.Held(); len(held) > 0 {
				t.Errorf("left behind:\n%s", strings.Join(held, "\n"))
			}
		})
	}
}

func namespaceIsMadeOnce(t *testing.T, w World) {
	ctx := t.Context()
	first := create(t, w.Network, "a1")
	if again := create(t, w.Network, "a1"); again != first {
		t.Errorf("created again: %s, want %s", again, first)
	}
	if other := create(t, w.Network, "a2"); other == first {
		t.Errorf("two pods share %s", other)
	}
	wantList(t, w.Network, "a1", "a2")
	must(t, w.Network.Detach(ctx, Pod("a1")))
	wantList(t, w.Network, "a2")
	must(t, w.Network.Detach(ctx, Pod("a2")))
	wantList(t, w.Network)
}

func attachGivesAddresses(t *testing.T, w World) {
	a, b := attach(t, w.Network, "a1"), attach(t, w.Network, "a2")
	for _, n := range []record.Network{a, b} {
		if len(n.IPs) == 0 || n.NetNS == "" || len(n.Result) == 0 {
			t.Errorf("incomplete: %+v", n)
		}
	}
	if a.IPs[0] == b.IPs[0] {
		t.Errorf("both pods have %s", a.IPs[0])
	}
	detach(t, w.Network, "a1", "a2")
}

func detachGivesAllBack(t *testing.T, w World) {
	attach(t, w.Network, "a1")
	if len(w.Held()) == 0 {
		t.Error("nothing is held by an attached pod")
	}
	detach(t, w.Network, "a1")
	if held := w.Held(); len(held) > 0 {
		t.Errorf("held after detach: %v", held)
	}
	detach(t, w.Network, "a1", "a1")
	attach(t, w.Network, "a1") // the ID is free again
	detach(t, w.Network, "a1")
}

func detachUnknown(t *testing.T, w World) {
	detach(t, w.Network, "never")
	create(t, w.Network, "bare")
	detach(t, w.Network, "bare")
}

func failedAdd(t *testing.T, w World) {
	w.Break(AddFails)
	ns := create(t, w.Network, "a1")
	if _, err := w.Network.Attach(t.Context(), Pod("a1"), ns); err == nil {
		t.Error("attach: no error")
	} else if !strings.HasPrefix(err.Error(), "attach network: ") {
		t.Errorf("attach: %v does not begin with the stage", err)
	}
	detach(t, w.Network, "a1")
}

func failedDel(t *testing.T, w World) {
	attach(t, w.Network, "a1")
	w.Break(DelFails)
	for range 3 {
		if err := w.Network.Detach(t.Context(), Pod("a1")); err == nil {
			t.Error("detach: no error")
		}
		wantList(t, w.Network, "a1")
	}
	w.Break(NoFault)
	detach(t, w.Network, "a1")
}

func attachAgain(t *testing.T, w World) {
	w.Break(AddFails)
	ns := create(t, w.Network, "a1")
	if _, err := w.Network.Attach(t.Context(), Pod("a1"), ns); err == nil {
		t.Error("attach: no error")
	}
	w.Break(NoFault)
	if _, err := w.Network.Attach(t.Context(), Pod("a1"), ns); err != nil {
		t.Errorf("attach again: %v", err)
	}
	detach(t, w.Network, "a1")
}

func cancelledAttach(t *testing.T, w World) {
	ns := create(t, w.Network, "a1")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.Network.Attach(ctx, Pod("a1"), ns); !errors.Is(err, context.Canceled) {
		t.Errorf("attach: %v, want %v", err, context.Canceled)
	}
	detach(t, w.Network, "a1")
}

func crash(t *testing.T, w World) {
	attach(t, w.Network, "a1")
	create(t, w.Network, "a2")
	n := w.Reopen()
	wantList(t, n, "a1", "a2")
	detach(t, n, "a1", "a2")
}

func gcTakesOrphans(t *testing.T, w World) {
	attach(t, w.Network, "kept")
	attach(t, w.Network, "gone")
	create(t, w.Network, "bare")
	n := w.Reopen()
	must(t, n.GC(t.Context(), live("kept")))
	wantList(t, n, "kept")
	if held := strings.Join(w.Held(), "\n"); strings.Contains(held, "gone") || !strings.Contains(held, "kept") {
		t.Errorf("held after gc:\n%s", held)
	}
	failing := func(context.Context) ([]string, error) { return nil, errors.New("store is away") }
	if err := n.GC(t.Context(), failing); err == nil {
		t.Error("gc without knowing the live pods: no error")
	}
	wantList(t, n, "kept")
	detach(t, n, "kept")
}

func gcKeepsFailed(t *testing.T, w World) {
	attach(t, w.Network, "a1")
	w.Break(DelFails)
	if err := w.Network.GC(t.Context(), live()); err == nil {
		t.Error("gc: no error")
	}
	wantList(t, w.Network, "a1")
	w.Break(NoFault)
	must(t, w.Network.GC(t.Context(), live()))
	wantList(t, w.Network)
}

func noConfiguration(t *testing.T, w World) {
	attach(t, w.Network, "a1")
	w.Break(NoConf)
	eventually(t, func() error {
		if w.Network.Ready(t.Context()) == nil {
			return errors.New("still ready")
		}
		return nil
	})
	ns := create(t, w.Network, "a2")
	if _, err := w.Network.Attach(t.Context(), Pod("a2"), ns); !errdefs.IsUnavailable(err) {
		t.Errorf("attach: %v, want unavailable", err)
	}
	detach(t, w.Network, "a1", "a2") // needs no configuration
	if held := w.Held(); len(held) > 0 {
		t.Errorf("held: %v", held)
	}
	w.Break(NoFault)
	eventually(t, func() error { return w.Network.Ready(t.Context()) })
	attach(t, w.Network, "a2")
	detach(t, w.Network, "a2")
}

func sideBySide(t *testing.T, w World) {
	const pods = 6
	addresses := make([]string, pods)
	var g errgroup.Group
	for i := range pods {
		g.Go(func() error {
			id := fmt.Sprintf("p%d", i)
			ns, err := w.Network.CreateNS(t.Context(), id)
			if err != nil {
				return err
			}
			n, err := w.Network.Attach(t.Context(), Pod(id), ns)
			if err != nil {
				return err
			}
			addresses[i] = n.IPs[0]
			return nil
		})
	}
	must(t, g.Wait())
	slices.Sort(addresses)
	if unique := slices.Compact(slices.Clone(addresses)); len(unique) != pods {
		t.Errorf("addresses are not unique: %v", addresses)
	}
	for i := range pods {
		g.Go(func() error { return w.Network.Detach(t.Context(), Pod(fmt.Sprintf("p%d", i))) })
	}
	must(t, g.Wait())
}

func hostNetwork(t *testing.T, w World) {
	a := Pod("h1")
	a.Pod.Linux = &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
		NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE},
	}}
	w.Break(NoConf)
	n, err := w.Network.Attach(t.Context(), a, "")
	must(t, err)
	if n.NetNS != "" || len(n.IPs) > 0 {
		t.Errorf("attach: %+v, want nothing", n)
	}
	must(t, w.Network.Detach(t.Context(), a))
}

// published is a pod with a port of the node.
func published(id string, port int32) network.Attachment {
	a := Pod(id)
	a.Pod.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: port}}
	return a
}

func hostPortsAreOnePods(t *testing.T, w World) {
	ctx := t.Context()
	attachAs := func(n Network, a network.Attachment) error {
		_, err := n.Attach(ctx, a, create(t, n, a.ID))
		return err
	}
	must(t, attachAs(w.Network, published("a1", 18080)))
	must(t, attachAs(w.Network, published("a2", 18081)))
	n := w.Reopen() // the next daemon knows whose they are
	err := attachAs(n, published("a3", 18080))
	var taken *hostport.Conflict
	if !errors.As(err, &taken) || taken.ID != "a1" || !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "pod-a1") || !strings.Contains(err.Error(), "18080") {
		t.Errorf("attach with a port of another: %v", err)
	}
	detach(t, n, "a1")
	must(t, attachAs(n, published("a3", 18080)))
	detach(t, n, "a3", "a2")
}

func hostPortsOfFailed(t *testing.T, w World) {
	w.Break(AddFails)
	a := published("a1", 18080)
	ns := create(t, w.Network, a.ID)
	if _, err := w.Network.Attach(t.Context(), a, ns); err == nil {
		t.Error("attach: no error")
	}
	w.Break(NoFault)
	detach(t, w.Network, "a1")
	b := published("b1", 18080)
	_, err := w.Network.Attach(t.Context(), b, create(t, w.Network, b.ID))
	must(t, err)
	must(t, w.Reopen().GC(t.Context(), live()))
}

func badInput(t *testing.T, w World) {
	if _, err := w.Network.CreateNS(t.Context(), "../x"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("create: %v, want invalid argument", err)
	}
	if err := w.Network.Detach(t.Context(), Pod("../x")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("detach: %v, want invalid argument", err)
	}
	a := Pod("a1")
	a.Pod.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "much"}
	ns := create(t, w.Network, "a1")
	_, err := w.Network.Attach(t.Context(), a, ns)
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(fmt.Sprint(err), "ingress-bandwidth") {
		t.Errorf("attach: %v, want invalid argument naming the annotation", err)
	}
	must(t, w.Network.Detach(t.Context(), a))
}

func live(ids ...string) network.Live {
	return func(context.Context) ([]string, error) { return ids, nil }
}

func create(t *testing.T, n Network, id string) string {
	t.Helper()
	path, err := n.CreateNS(t.Context(), id)
	must(t, err)
	return path
}

func attach(t *testing.T, n Network, id string) record.Network {
	t.Helper()
	got, err := n.Attach(t.Context(), Pod(id), create(t, n, id))
	must(t, err)
	return got
}

func detach(t *testing.T, n Network, ids ...string) {
	t.Helper()
	for _, id := range ids {
		must(t, n.Detach(t.Context(), Pod(id)))
	}
}

func wantList(t *testing.T, n Network, want ...string) {
	t.Helper()
	got, err := n.List()
	must(t, err)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("namespaces of %v, want %v", got, want)
	}
}

// eventually repeats a check until it holds, with time for a loaded machine.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	const patience = 30 * time.Second
	start := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		if <-tick.C; time.Since(start) > patience {
			t.Fatalf("not within %s: %v", patience, err)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
