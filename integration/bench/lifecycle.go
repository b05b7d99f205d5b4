package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// scene is a kind of pods that come and go.
type scene struct {
	title    string
	network  cri.NamespaceMode
	together int
	edits    []func(*cri.ContainerConfig)
	// up and down are the goals for our own shim.
	up, down goals
}

// filtered gives a container the runtime's default seccomp profile.
func filtered(c *cri.ContainerConfig) {
	c.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
}

// lifecycle measures how long pods take to come and go, and at what cost.
func lifecycle(ctx context.Context, b *bench) (_ []table, err error) {
	nodes, err := b.launch(ctx, b.subjects)
	defer func() { err = errors.Join(err, retire(nodes)) }()
	if err != nil {
		return nil, err
	}
	var tables []table
	for _, s := range []scene{
		{"bridge network, one at a time", cri.NamespaceMode_POD, 1, nil, goals{better: 1. / 2}, goals{}},
		{fmt.Sprintf("bridge network, %d at once", atOnce), cri.NamespaceMode_POD, atOnce, nil, goals{}, goals{}},
		{"host network, one at a time", cri.NamespaceMode_NODE, 1, nil, goals{better: 1. / 3, crun: 1. / 4}, goals{better: 1. / 4}},
		{"host network, the default seccomp profile, one at a time", cri.NamespaceMode_NODE, 1, []func(*cri.ContainerConfig){filtered}, goals{better: 1. / 2, crun: 1. / 4}, goals{}},
		{fmt.Sprintf("host network, %d at once", atOnce), cri.NamespaceMode_NODE, atOnce, nil, goals{}, goals{}},
	} {
		t := table{title: "Pods up and down: " + s.title}
		before := load()
		err := turns(b.rounds, nodes, func(round int, n *node) error {
			return b.comeAndGo(ctx, s, &t.sheet, round, n)
		})
		count := b.pods
		if s.together > 1 {
			count = b.crowd
		}
		t.remark = fmt.Sprintf("%d rounds of %d pods each. Load average %s to %s.", b.rounds, count, before, load())
		tables = append(tables, t)
		if err != nil {
			return tables, fmt.Errorf("%s: %w", s.title, err)
		}
		b.progress("pods, %s: done, load average %s", s.title, load())
	}
	return tables, nil
}

// comeAndGo is one subject's part of a round.
func (b *bench) comeAndGo(ctx context.Context, s scene, sh *sheet, round int, n *node) error { //lint:house param-count: a closure's body
	count := b.pods
	if s.together > 1 {
		count = b.crowd
	}
	var pods []*pod
	note := func(half string, goal goals, calls []string, do func() error) error {
		cpu, machine, err := n.cost(do)
		if err != nil {
			return err
		}
		sh.note(quantity{name: half, unit: "ms", high: 0.9, better: 1, own: goal}, n.name, round, millis(pods, half)...)
		sh.note(quantity{name: half + ", CPU per pod", unit: "ms", better: 1, own: goal}, n.name, round, cpu/float64(count))
		sh.note(quantity{name: half + ", CPU of the machine", unit: "ms"}, n.name, round, machine/float64(count))
		for _, c := range calls {
			if s.together == 1 {
				sh.note(quantity{name: c, unit: "ms", high: 0.9}, n.name, round, millis(pods, c)...)
			}
		}
		return nil
	}
	err := note("up", s.up, upCalls, func() (err error) {
		pods, err = n.upMany(ctx, s.network, count, s.together, s.edits...)
		return err
	})
	if err != nil {
		return err
	}
	return note("down", s.down, downCalls, func() error {
		if err := n.downMany(ctx, pods, s.together); err != nil {
			return err
		}
		select {
		case <-time.After(rest):
		case <-ctx.Done():
		}
		return ctx.Err()
	})
}

// rest is how long a subject may do what it puts off, which counts as part of the end
// of its pods, and does not meet the next one.
const rest = 1500 * time.Millisecond

// cost is what do used of the processors, in milliseconds: the daemon's own,
// and everybody's.
func (n *node) cost(do func() error) (own, machine float64, err error) {
	own0, err := n.books.cpu()
	if err != nil {
		return 0, 0, err
	}
	machine0, err := busy()
	if err != nil {
		return 0, 0, err
	}
	if err := do(); err != nil {
		return 0, 0, err
	}
	machine, err = busy()
	if err != nil {
		return 0, 0, err
	}
	own, err = n.books.cpu()
	return own - own0, machine - machine0, err
}
