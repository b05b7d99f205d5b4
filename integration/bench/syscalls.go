package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// syscalls counts what is dear about a pod's life whatever the machine does:
// waits for the disk, and programs started.
func syscalls(ctx context.Context, b *bench) (_ []table, err error) {
	nodes, err := b.launch(ctx, b.subjects)
	defer func() { err = errors.Join(err, retire(nodes)) }()
	if err != nil {
		return nil, err
	}
	sums := table{
		title: "System calls of a pod's life",
		remark: fmt.Sprintf("Of %d pods with one container on the bridge network, from RunPodSandbox to RemovePodSandbox, "+
			"counted by strace in the daemon and all that it starts; per pod.", b.traced),
	}
	where := table{title: "Where a pod's life syncs", remark: "Calls per pod by file; ID stands for any container's, pod's or snapshot's."}
	programs := table{title: "What a pod's life starts", remark: "Programs per pod, with the first arguments that are no option."}
	for _, n := range nodes {
		c, err := b.trace(ctx, n)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", n.name, err)
		}
		per := func(v int) float64 { return float64(v) / float64(b.traced) }
		sums.note(quantity{name: "disk syncs", better: 0.5, own: goals{most: 10}}, n.name, 0, per(c.sum(c.syncs)))
		sums.note(quantity{name: "programs started"}, n.name, 0, per(c.sum(c.execs)))
		sums.note(quantity{name: "mounts made or moved"}, n.name, 0, per(c.mounts))
		sums.note(quantity{name: "unmounts"}, n.name, 0, per(c.unmounts))
		for file, v := range c.syncs {
			where.note(quantity{name: "`" + file + "`"}, n.name, 0, per(v))
		}
		for program, v := range c.execs {
			programs.note(quantity{name: "`" + program + "`"}, n.name, 0, per(v))
		}
	}
	where.byWeight()
	programs.byWeight()
	return []table{sums, where, programs}, nil
}

// trace counts the system calls of pods that come and go one after the other.
func (b *bench) trace(ctx context.Context, n *node) (*counts, error) {
	path := filepath.Join(b.dir, n.name+".strace")
	if err := b.follow(ctx, n, path); err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read trace: %w", err)
	}
	defer f.Close()
	return count(f, n.Dir)
}

// follow writes down the system calls of pods.
func (b *bench) follow(ctx context.Context, n *node, path string, more ...string) error {
	t, err := attach(ctx, n.PID(), path, more...)
	if err != nil {
		return err
	}
	for i := 0; i < b.traced && err == nil; i++ {
		var p *pod
		if p, err = n.up(ctx, cri.NamespaceMode_POD, fmt.Sprint("traced-", i)); err == nil {
			err = n.down(ctx, p)
		}
	}
	return errors.Join(err, t.detach())
}
