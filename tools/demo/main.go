// Command demo does a node's main job once, in front of your eyes: it starts the
// daemon in a directory of its own, serves an image from a registry inside this
// program, pulls it, runs a pod that serves a web page, reads the page, the log,
// the statistics, runs commands in it, forwards a port to it, takes everything
// down and makes sure that nothing is left on the machine.
//
//	make demo
//
// It needs root and what make build made; no network, no registry, no
// configuration. Start at steps.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// limit ends a demo that hangs.
const limit = 3 * time.Minute

func main() {
	handler := flag.String("handler", "", "runtime handler of the pod; empty is the default one")
	stock := flag.Bool("stock", false, "drive containerd's own CRI service instead (make stock), to compare")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	bounded, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := time.Now()
	err := run(bounded, *handler, *stock)
	switch {
	case err == nil:
		fmt.Printf("\nAll of it worked, and nothing is left behind (%.1f s).\n", time.Since(began).Seconds())
	case errors.Is(err, errInterrupted):
		fmt.Fprintln(os.Stderr, "\ndemo: interrupted; what it had made is removed")
		os.Exit(130)
	default:
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

// errInterrupted is all there is to say after Ctrl-C.
var errInterrupted = errors.New("interrupted")

func run(ctx context.Context, handler string, stock bool) (err error) {
	bins, err := preflight(stock)
	if err != nil {
		return err
	}
	var opts []daemon.Option
	if stock {
		opts = append(opts, daemon.Stock())
	}
	d := &demo{handler: handler, stock: stock, bins: bins, registry: images.NewRegistry()}
	defer d.registry.Close()

	fmt.Print(opening)
	if err := d.step("start the daemon", func() (string, error) {
		var err error
		if d.node, err = daemon.Launch(ctx, opts...); err != nil {
			return "", err
		}
		return fmt.Sprintf("PID %d, everything it writes is in %s", d.node.PID(), d.node.Dir), nil
	}); err != nil {
		return interrupted(ctx, err)
	}
	defer func() { err = d.end(ctx, err) }()
	if stock {
		pause := images.MustBuild(images.Spec{Entrypoint: []string{"sleep", "1000000"}})
		if err := images.Import(ctx, d.node.Client(), daemon.PauseImage, pause, ""); err != nil {
			return err
		}
	}
	for _, s := range d.steps(ctx) {
		if err := d.step(s.title, s.do); err != nil {
			return err
		}
	}
	return nil
}

const opening = `A node's main job, once: a daemon of its own, an image from a registry in this
program, a pod that serves a web page. Nothing of the machine is used but its
kernel. Each line says what was done, how long it took, and what came of it.

`

// end removes what there still is, and looks whether it succeeded.
func (d *demo) end(ctx context.Context, failure error) error {
	if failure != nil && ctx.Err() == nil && !errors.Is(failure, errNoRoom) {
		failure = fmt.Errorf("%w\nlast lines of the daemon's log:\n%s", failure, d.node.Tail(30))
	}
	scope := d.node.Scope()
	scope.Client = nil // the daemon ends
	cleaning := errors.Join(d.node.Discard(), gone(scope))
	if cleaning != nil {
		return errors.Join(failure, fmt.Errorf("clean up: %w", cleaning))
	}
	return interrupted(ctx, failure)
}

// interrupted is err, unless somebody just wanted the demo to end.
func interrupted(ctx context.Context, err error) error {
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		return errInterrupted
	}
	return err
}

// step prints what is done, how long it took and what came of it.
func (d *demo) step(title string, do func() (string, error)) error {
	fmt.Printf("%-34s", title)
	began := time.Now()
	result, err := do()
	if err != nil {
		fmt.Println("FAILED")
		return fmt.Errorf("%s: %w", title, err)
	}
	fmt.Printf("%7.0f ms   %s\n", float64(time.Since(began).Microseconds())/1000, firstLines(result, 4))
	return nil
}

// firstLines indents what does not fit beside the title.
func firstLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	if len(lines) > n {
		lines = append(lines[:n], fmt.Sprintf("… %d more lines", len(lines)-n))
	}
	return strings.Join(lines, "\n"+strings.Repeat(" ", 47))
}
