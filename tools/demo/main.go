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
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "demo: needs root, to make namespaces, mounts and cgroups")
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := time.Now()
	if err := run(ctx, *handler, *stock); err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
	fmt.Printf("\nAll of it worked, and nothing is left behind (%.1f s).\n", time.Since(began).Seconds())
}

func run(ctx context.Context, handler string, stock bool) (err error) {
	var opts []daemon.Option
	if stock {
		opts = append(opts, daemon.Stock())
	}
	d := &demo{handler: handler, registry: images.NewRegistry()}
	defer d.registry.Close()

	if err := d.step("start the daemon", func() (string, error) {
		var err error
		if d.node, err = daemon.Launch(ctx, opts...); err != nil {
			return "", err
		}
		return fmt.Sprintf("PID %d, everything it writes is in %s", d.node.PID(), d.node.Dir), nil
	}); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\nlast lines of the daemon's log:\n%s", err, d.node.Tail(30))
		}
		err = errors.Join(err, d.node.Discard())
	}()
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
