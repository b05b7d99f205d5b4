package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// filling is how many pods are made or removed together to fill a node.
const filling = 4

// density measures nodes that are full: memory, commands, restart.
func density(ctx context.Context, b *bench) (_ []table, err error) {
	nodes, err := b.launch(ctx, b.subjects, daemon.Conflist(conflist))
	pods := map[*node][]*pod{}
	defer func() {
		for n, all := range pods {
			err = errors.Join(err, n.downMany(context.WithoutCancel(ctx), all, filling))
		}
		err = errors.Join(err, retire(nodes))
	}()
	if err != nil {
		return nil, err
	}
	memory := table{title: fmt.Sprintf("A node with %d pods", b.density)}
	if err := weigh(&memory.sheet, "no pods", nodes, 0); err != nil {
		return nil, err
	}
	for _, n := range nodes {
		pods[n], err = n.upMany(ctx, cri.NamespaceMode_POD, b.density, filling)
		if err != nil {
			return nil, fmt.Errorf("fill %s: %w", n.name, err)
		}
	}
	b.progress("density: %d pods on each node, load average %s", b.density, load())
	err = errors.Join(
		weigh(&memory.sheet, fmt.Sprint(b.density, " pods"), nodes, b.density),
		b.execs(ctx, &memory.sheet, nodes, pods),
		b.restarts(ctx, &memory.sheet, nodes))
	memory.remark = fmt.Sprintf("ExecSync runs `true`, %d times in each of %d rounds; the daemon is killed and started %d times. Load average %s.",
		b.options.execs, b.rounds, b.options.restarts, load())
	return []table{memory}, err
}

// What our own shim may take, in MiB: the supervisor, and more for each pod.
const (
	ownBase = 15
	ownPod  = 0.2
)

// weigh notes the memory of every node.
func weigh(sh *sheet, when string, nodes []*node, pods int) error {
	for _, n := range nodes {
		f, err := n.footprint()
		if err != nil {
			return err
		}
		sh.note(quantity{name: "daemon's RSS, " + when, unit: "MiB"}, n.name, 0, f.daemonRSS/1024)
		sh.note(quantity{name: "daemon's PSS, " + when, unit: "MiB"}, n.name, 0, f.daemonPSS/1024)
		if pods > 0 {
			sh.note(quantity{name: "shim and pause process, PSS per pod", unit: "MiB", better: 1, own: goals{most: ownPod + ownBase/float64(pods)}}, n.name, 0, f.podPSS/1024/float64(pods))
		}
	}
	return nil
}

// execs measures a command in a container.
func (b *bench) execs(ctx context.Context, sh *sheet, nodes []*node, pods map[*node][]*pod) error {
	return turns(b.rounds, nodes, func(round int, n *node) error {
		var took []float64
		cpu, _, err := n.cost(func() error {
			for i := range b.options.execs {
				p := pods[n][i%len(pods[n])]
				t := time.Now()
				r, err := n.Runtime().ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: p.container, Cmd: []string{"true"}, Timeout: 30})
				if err != nil || r.ExitCode != 0 {
					return fmt.Errorf("run true: %w", errors.Join(err, fmt.Errorf("exit code %d", r.GetExitCode())))
				}
				took = append(took, time.Since(t).Seconds()*1000)
			}
			return nil
		})
		if err != nil {
			return err
		}
		sh.note(quantity{name: "ExecSync", unit: "ms", high: 0.9, better: 1, own: goals{better: 3. / 4, crun: 1. / 3}}, n.name, round, took...)
		sh.note(quantity{name: "ExecSync, CPU", unit: "ms", better: 1, own: goals{better: 3. / 4, crun: 1. / 3}}, n.name, round, cpu/float64(b.options.execs))
		return nil
	})
}

// restarts measures how long a daemon that was killed takes to answer, and
// until the answer is true.
func (b *bench) restarts(ctx context.Context, sh *sheet, nodes []*node) error {
	return turns(b.options.restarts, nodes, func(round int, n *node) error {
		if err := n.Kill(ctx); err != nil {
			return err
		}
		began := time.Now()
		started := make(chan error, 1)
		go func() { started <- n.Start(ctx) }()
		first, truth, err := n.answers(ctx, b.density)
		if err := errors.Join(<-started, err); err != nil {
			return err
		}
		sh.note(quantity{name: "restart to first answer", unit: "ms", better: 1, own: goals{most: 1000}}, n.name, round, first.Sub(began).Seconds()*1000)
		sh.note(quantity{name: "restart to the whole truth", unit: "ms", better: 1, own: goals{most: 3000}}, n.name, round, truth.Sub(began).Seconds()*1000)
		return n.books.enter(n.PID())
	})
}

// askAgain is the pause between two questions to a daemon that starts.
const askAgain = 2 * time.Millisecond

// answers asks until the daemon lists its pods at all, and then until all of
// them are ready and their containers run.
func (n *node) answers(ctx context.Context, pods int) (first, truth time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for truth.IsZero() {
		ready, running, err := n.ask(ctx)
		if err == nil && first.IsZero() {
			first = time.Now()
		}
		if err == nil && ready == pods && running == pods {
			truth = time.Now()
		}
		select {
		case <-ctx.Done():
			return first, truth, fmt.Errorf("wait for %d pods after a restart: %d ready, %d containers running, last error %w: %w", pods, ready, running, err, context.Cause(ctx))
		case <-time.After(askAgain):
		}
	}
	return first, truth, nil
}

// ask counts ready pods and running containers over a connection of its own:
// the harness's would wait before it connects again.
func (n *node) ask(ctx context.Context) (ready, running int, err error) {
	probe, err := net.Dial("unix", n.Socket)
	if err != nil {
		return 0, 0, err // nobody listens yet
	}
	probe.Close()
	conn, err := grpc.NewClient(n.Endpoint(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	rt := cri.NewRuntimeServiceClient(conn)
	ps, err := rt.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return 0, 0, err
	}
	cs, err := rt.ListContainers(ctx, &cri.ListContainersRequest{})
	for _, p := range ps.GetItems() {
		if p.State == cri.PodSandboxState_SANDBOX_READY {
			ready++
		}
	}
	for _, c := range cs.GetContainers() {
		if c.State == cri.ContainerState_CONTAINER_RUNNING {
			running++
		}
	}
	return ready, running, err
}

// deviceOf is MAJOR:MINOR of the disk below a path; partitions are throttled
// with their disk.
func deviceOf(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", fmt.Errorf("find disk of %s: %w", path, err)
	}
	device := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	text, err := os.ReadFile("/sys/dev/block/" + device + "/../dev")
	if err == nil {
		device = string(text[:len(text)-1])
	}
	return device, nil
}
