package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gantry-cri/gantry/cmd/gantry/internal/daemon"
	"github.com/gantry-cri/gantry/plugin/operation"
)

// askTimeout bounds one question: the table waits for nothing.
const askTimeout = 10 * time.Second

// opsFlags are the flags of ops.
type opsFlags struct {
	state  string
	watch  bool
	every  time.Duration
	stacks bool
}

func (a *app) ops() *cobra.Command {
	var f opsFlags
	c := &cobra.Command{
		Use:   "ops",
		Short: "Show what the daemon is doing just now",
		Long: `Shows every request and every operation that is under way in the daemon: what it
works on, the stage it is in, and for how long. An operation that stays in one
stage is what a pod waits for. The daemon answers this over a socket of its own,
also when nothing else answers.

With --stacks it prints the stack of every goroutine of the daemon instead: add
that to a report about a daemon that hangs.
` + exitHelp,
		Example: `  gantry ops
  gantry ops --watch
  gantry ops --stacks > stacks.txt
  gantry ops --output json | jq '.[] | select(.stage == "attach network")'`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.runOps(c.Context(), f) },
	}
	c.Flags().StringVar(&f.state, "state", daemon.DefaultState, "the daemon's state directory (state = in its configuration)")
	c.Flags().BoolVarP(&f.watch, "watch", "w", false, "show it again and again, until Ctrl-C")
	c.Flags().DurationVar(&f.every, "every", time.Second, "how often --watch shows it")
	c.Flags().BoolVar(&f.stacks, "stacks", false, "print the stacks of all goroutines instead")
	return c
}

func (a *app) runOps(ctx context.Context, f opsFlags) error {
	ops := daemon.NewOps(daemon.Layout{State: f.state}.OpsSocket())
	if f.every <= 0 {
		return usageError{fmt.Errorf("--every %s is not more than nothing", f.every)}
	}
	if f.stacks && f.watch {
		return usageError{errors.New("--stacks and --watch do not go together: stacks are long, look at them one by one")}
	}
	if f.stacks {
		return a.showStacks(ctx, ops)
	}
	if !f.watch {
		return a.showOps(ctx, ops)
	}
	tick := time.NewTicker(f.every)
	defer tick.Stop()
	for {
		err := a.showOps(ctx, ops)
		if ctx.Err() != nil {
			return nil // Ctrl-C is how a watch ends
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if a.format == "text" {
				fmt.Fprintln(a.out)
			}
		}
	}
}

func (a *app) showStacks(ctx context.Context, ops *daemon.Ops) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	stacks, err := ops.Stacks(ctx)
	if err != nil {
		return err
	}
	return a.show(map[string]string{"stacks": stacks}, func(w io.Writer) error {
		_, err := io.WriteString(w, stacks)
		return err
	})
}

func (a *app) showOps(ctx context.Context, ops *daemon.Ops) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	entries, err := ops.List(ctx)
	if err != nil {
		return err
	}
	if a.format == "json" {
		return json.NewEncoder(a.out).Encode(entries) // one line each, for --watch
	}
	return opsTable(a.out, entries, time.Now())
}

// opsTable prints the operations as they are at a time.
func opsTable(w io.Writer, entries []operation.Entry, now time.Time) error {
	if len(entries) == 0 {
		_, err := fmt.Fprintf(w, "%s  nothing is under way\n", now.Format(time.TimeOnly))
		return err
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "OPERATION\tOBJECT\tID\tSINCE\tFOR\tSTAGE\tIN STAGE")
	for _, e := range entries {
		stage, in := "-", "-"
		if e.Stage != "" {
			stage, in = e.Stage, age(now, e.StageSince)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Name, orDash(e.Object), orDash(short(e.ID)), e.Since.Local().Format(time.TimeOnly), age(now, e.Since), stage, in)
	}
	return t.Flush()
}

func age(now, since time.Time) string {
	return max(0, now.Sub(since)).Round(time.Millisecond).String()
}

// short is an ID as people copy it; a prefix is as good everywhere.
func short(id string) string { return id[:min(len(id), 13)] }

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
