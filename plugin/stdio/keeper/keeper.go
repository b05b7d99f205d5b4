// Package keeper runs the keeper: a small process that holds the FIFOs of
// containers open while no daemon does, so that what a container says last is
// not forgotten.
//
// The program is keeper.c, built by build.sh before the Go build. There is one
// process for a daemon with all its containers. The first container starts it;
// it outlives the daemon, which finds it again by its socket; it ends when it
// holds nothing and no daemon is connected. When it dies the daemon, which
// keeps a connection open, starts another and hands everything over again.
//
// It is a child of the daemon's as a shim is: with the daemon's OOM score, and
// in its cgroup, so a service manager must end the daemon's process alone
// (KillMode=process, as in containerd's unit).
//
// All that is known is what should be held, and one goroutine knows it: Run.
// Whatever happens to the keeper, that is brought about again. Start reading at
// Keeper and books.
package keeper

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// Program is the name of the program's file, and Socket that of the socket which
// is its argument, wherever they are. The operator's command finds keepers by
// them.
const (
	Program = "gantry-keeper"
	Socket  = "keeper.sock"
)

// Keeper is the keeper process as the daemon sees it. It works while Run does.
type Keeper struct {
	program, socket string
	pause, patience time.Duration // other ones are for tests

	calls chan func(context.Context, *books)
	ended chan struct{} // closed when Run has returned
}

// New returns a keeper whose program is put at the path program, where programs
// may run from, and which listens at socket. Nothing is done yet.
func New(program, socket string) *Keeper {
	return &Keeper{
		program: program, socket: socket, pause: 30 * time.Second, patience: 5 * time.Second,
		calls: make(chan func(context.Context, *books)), ended: make(chan struct{}),
	}
}

// Run serves the other methods until ctx ends. The keeper is left running then
// if it holds something.
func (k *Keeper) Run(ctx context.Context) {
	defer close(k.ended)
	b := &books{Keeper: k, want: map[string][]string{}, news: map[string]bool{}}
	defer b.hangUp()
	for {
		select {
		case call := <-k.calls:
			call(ctx, b)
		case <-b.lost():
			b.replace(ctx)
		case <-b.again:
			b.again = nil
			b.catchUp(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// do has Run call what. Run is never busy for long, so callers wait for it
// whether or not their clients do: what should be held is to be known.
func (k *Keeper) do(what func(context.Context, *books) error) error {
	done := make(chan error, 1)
	select {
	case k.calls <- func(ctx context.Context, b *books) { done <- what(ctx, b) }:
		return <-done
	case <-k.ended:
		return fmt.Errorf("the daemon is about to end: %w", errdefs.ErrUnavailable)
	}
}

// Keep has the FIFOs held under a name until Drop, instead of those held under
// it before. When the keeper does not answer they are held as soon as it does.
func (k *Keeper) Keep(_ context.Context, name string, fifos []string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("keep output: the name %.300q has not 1 to %d bytes: %w", name, maxName, errdefs.ErrInvalidArgument)
	}
	if len(fifos) == 0 || len(fifos) > maxFiles {
		return fmt.Errorf("keep output: %d files are not 1 to %d: %w", len(fifos), maxFiles, errdefs.ErrInvalidArgument)
	}
	if err := k.do(func(ctx context.Context, b *books) error {
		b.set(name, fifos)
		return b.settle(ctx, name)
	}); err != nil {
		return fmt.Errorf("keep output: %w", err)
	}
	return nil
}

// Drop lets go of the FIFOs of a name, when the keeper does not answer as soon
// as it does. There need be none.
func (k *Keeper) Drop(ctx context.Context, name string) {
	if err := k.do(func(ctx context.Context, b *books) error {
		b.set(name, nil)
		return b.settle(ctx, name)
	}); err != nil {
		log.G(ctx).WithError(err).WithField("name", name).Warn("drop kept output: will be tried again")
	}
}

// Sweep lets go of every name that is not known any more. It is for after a
// start, when all that is alive can be known.
func (k *Keeper) Sweep(_ context.Context, known func(name string) bool) error {
	if err := k.do(func(ctx context.Context, b *books) error { return b.sweep(ctx, known) }); err != nil {
		return fmt.Errorf("sweep kept output: %w", err)
	}
	return nil
}
