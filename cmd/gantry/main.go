// Command gantry is for the people who run a node: it checks a configuration,
// shows what the daemon is doing, and looks for what keeps pods from running.
// It changes nothing, but for the command that has a new shim take over.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/gantry-cri/gantry/cmd/gantry/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := cli.Run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
