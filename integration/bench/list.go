package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

const (
	// listGoal is what the 99th percentile of a listing must stay under.
	listGoal = 5
	// slowWrites is how many writes per second the slow disk takes: a commit to
	// the metadata is two syncs, of one write at the least.
	slowWrites = 100
)

// condition is what else goes on while pods are listed. Its begin returns what
// ends it, and may note what there is to know besides.
type condition struct {
	name  string
	begin func(context.Context, *node, noter) (end func() error, err error)
}

// noter notes values of this subject in this round.
type noter func(q quantity, values ...float64)

// listing measures listings under every condition. The nodes are filled one
// after the other: hundreds of pods of another one would be in the way.
func listing(ctx context.Context, b *bench) ([]table, error) {
	t := table{title: fmt.Sprintf("Listing %d pods", b.lists)}
	slow := fmt.Sprintf("The slow disk takes %d writes per second from the daemon (blkio throttle) while pods come and go.", slowWrites)
	var failed []error
	for _, s := range b.subjects {
		slowed, err := b.listOne(ctx, s, &t)
		if err != nil {
			failed = append(failed, fmt.Errorf("list on %s: %w", s.name, err))
		} else if !slowed {
			slow = "There is no blkio controller to slow the disk with, so that was not measured."
		}
	}
	t.remark = fmt.Sprintf("%d rounds of %d calls of each kind, on one node after the other. Version, asked in between, has nothing to look up: what it takes is the machine's doing. Calls over %d ms in the daemon are those by its own histogram, without the client and the way there. %s Load average %s.", b.rounds, b.options.listings, listGoal, slow, load())
	return []table{t}, errors.Join(failed...)
}

// listOne measures one subject's listings. It says whether there was something
// to slow the disk with.
func (b *bench) listOne(ctx context.Context, s subject, t *table) (slowed bool, err error) {
	nodes, err := b.launch(ctx, []subject{s}, daemon.Conflist(conflist))
	var pods []*pod
	defer func() {
		for _, n := range nodes {
			err = errors.Join(err, n.downMany(context.WithoutCancel(ctx), pods, filling))
		}
		err = errors.Join(err, retire(nodes))
	}()
	if err != nil {
		return false, err
	}
	n := nodes[0]
	if pods, err = n.upMany(ctx, cri.NamespaceMode_NODE, b.lists, filling); err != nil {
		return false, fmt.Errorf("fill: %w", err)
	}
	if err := n.settle(ctx); err != nil {
		return false, err
	}
	b.progress("listing: %d pods on %s, load average %s", b.lists, n.name, load())
	conditions := []condition{{"idle", idle}, {"a pod stalls in CNI ADD", stall}}
	slowed = n.books.blkio != ""
	if slowed {
		conditions = append(conditions, condition{"the disk is slow", slowDisk})
	}
	for _, c := range conditions {
		for round := range b.rounds {
			note := func(q quantity, values ...float64) { t.note(q, n.name, round, values...) }
			end, err := c.begin(ctx, n, note)
			if err == nil {
				err = errors.Join(b.listings(ctx, n, c.name, note), end())
			}
			if err != nil {
				return slowed, fmt.Errorf("while %s, round %d: %w", c.name, round+1, err)
			}
		}
	}
	return slowed, nil
}

const (
	// calmCPU is what a node that was filled uses in a second when it has come to
	// rest, in ms.
	calmCPU     = 50
	settleLimit = 30 // seconds
)

// settle waits until a node has come to rest, for as long as that may take.
func (n *node) settle(ctx context.Context) error {
	for range settleLimit {
		cpu, _, err := n.cost(func() error {
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
			return ctx.Err()
		})
		if err != nil || cpu < calmCPU {
			return err
		}
	}
	return nil
}

// listings lists again and again. The client collects no garbage meanwhile: its
// pauses are not the daemon's.
func (b *bench) listings(ctx context.Context, n *node, condition string, note noter) error {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	rt := n.Runtime()
	for _, c := range []struct {
		name string
		list func() (int, error)
	}{
		{"ListPodSandbox", func() (int, error) {
			r, err := rt.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
			return len(r.GetItems()), err
		}},
		{"ListContainers", func() (int, error) {
			r, err := rt.ListContainers(ctx, &cri.ListContainersRequest{})
			return len(r.GetContainers()), err
		}},
	} {
		q := quantity{name: c.name + ", " + condition, unit: "ms", high: 0.99, below: listGoal}
		yardstick := quantity{name: "Version, " + condition, unit: "ms", high: 0.99}
		runtime.GC()
		before, err := readHandled(ctx, n.calls, c.name)
		if err != nil {
			return err
		}
		for range b.options.listings {
			began := time.Now()
			if _, err := rt.Version(ctx, &cri.VersionRequest{}); err != nil {
				return fmt.Errorf("ask for version: %w", err)
			}
			note(yardstick, time.Since(began).Seconds()*1000)
			began = time.Now()
			found, err := c.list()
			took := time.Since(began)
			if err != nil || found < b.lists {
				return fmt.Errorf("%s: %w", c.name, errors.Join(err, fmt.Errorf("%d found", found)))
			}
			note(q, took.Seconds()*1000)
		}
		after, err := readHandled(ctx, n.calls, c.name)
		if err != nil {
			return err
		}
		note(quantity{name: fmt.Sprintf("%s, %s: over %d ms in the daemon", c.name, condition, listGoal), unit: "% of calls", most: 1}, after.over(before))
	}
	return nil
}

func idle(context.Context, *node, noter) (func() error, error) {
	return func() error { return nil }, nil
}

// stall runs a pod whose network does not come until the end.
func stall(ctx context.Context, n *node, _ noter) (func() error, error) {
	var p *pod
	made := make(chan error, 1)
	go func() {
		var err error
		p, err = n.up(ctx, cri.NamespaceMode_POD, stalledPod)
		made <- err
	}()
	// To open the gate would tell whether somebody waits, and let it pass.
	if err := n.waitForStall(ctx); err != nil {
		return nil, err
	}
	return func() error {
		if passed, err := openGate(n.gate); err != nil || !passed {
			return fmt.Errorf("end the stall: %w", errors.Join(err, errors.New("nobody waited at the gate")))
		}
		if err := <-made; err != nil {
			return err
		}
		return n.down(ctx, p)
	}, nil
}

// waitForStall waits until one of the daemon's processes reads the gate.
func (n *node) waitForStall(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		pids, err := n.books.pids()
		if err != nil {
			return err
		}
		for _, pid := range pids {
			if line, err := readCommand(pid); err == nil && len(line) == 2 && filepath.Base(line[0]) == "cat" && line[1] == n.gate {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the stalled pod: %w", context.Cause(ctx))
		case <-time.After(askAgain):
		}
	}
}

// slowDisk slows the daemon's writes and keeps it writing. How long the pods
// take that make it write tells that the disk is slow.
func slowDisk(ctx context.Context, n *node, note noter) (func() error, error) {
	device, err := deviceOf(n.Dir)
	if err != nil {
		return nil, err
	}
	if err := n.books.throttle(device, slowWrites); err != nil {
		return nil, err
	}
	stop, done := make(chan struct{}), make(chan error, 1)
	var pods []*pod
	go func() {
		done <- n.churn(ctx, cri.NamespaceMode_NODE, stop, func(p *pod) { pods = append(pods, p) })
	}()
	return func() error {
		close(stop)
		err := errors.Join(<-done, n.books.throttle(device, 0))
		for _, half := range []string{"up", "down"} {
			note(quantity{name: "pod " + half + " meanwhile, the disk is slow", unit: "ms"}, millis(pods, half)...)
		}
		return err
	}, nil
}

// churn lets pods come and go until told to stop, one at the least.
func (n *node) churn(ctx context.Context, network cri.NamespaceMode, stop <-chan struct{}, gone func(*pod)) error {
	for i := 0; ; i++ {
		p, err := n.up(ctx, network, fmt.Sprint("churn-", i))
		if err != nil {
			return err
		}
		if err := n.down(ctx, p); err != nil {
			return err
		}
		gone(p)
		select {
		case <-stop:
			return nil
		default:
		}
	}
}
