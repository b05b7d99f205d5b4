// Package cli is the command line of gantry: its commands, their help, what
// they print and the exit codes. What a command finds out comes from packages
// config, daemon and node; nothing here looks at the machine itself.
//
// Start at Run, then one file per command.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// The exit codes, told in every help.
const (
	exitOK = iota
	// exitFound: the command did its work and what it looked at is not sound.
	exitFound
	// exitUsage: the command line cannot be understood.
	exitUsage
	// exitFailed: the command could not do its work.
	exitFailed
)

const exitHelp = `
Exit codes:
  0  all is well
  1  it is not: the errors or failures are listed
  2  the command line is not understood
  3  the command could not do its work (no such file, the daemon does not answer)
`

// errFound ends a command that has printed what is wrong.
var errFound = errors.New("not sound")

// usageError is a mistake on the command line.
type usageError struct{ error }

// app is what all commands share.
type app struct {
	out    io.Writer
	format string
}

// Run runs one command line and returns the exit code.
func Run(ctx context.Context, args []string, out, errs io.Writer) int {
	a := &app{out: out}
	root := a.root()
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errs)
	err := root.ExecuteContext(ctx)
	_, usage := errors.AsType[usageError](err)
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errFound):
		return exitFound
	case usage:
		fmt.Fprintf(errs, "gantry: %v\n", err)
		return exitUsage
	}
	fmt.Fprintf(errs, "gantry: %v\n", err)
	return exitFailed
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "gantry",
		Short: "Look after a node whose pods are run by gantry",
		Long: `gantry looks after a node whose pods are run by containerd with gantry's CRI
service. It only looks, but for one command: supervisor upgrade.

New here? Begin with

  gantry check                                   is this machine fit to run pods?
  gantry config check /etc/containerd/config.toml
  gantry ops                                     what is the daemon doing just now?
` + exitHelp,
		Args:          noArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.PersistentFlags().StringVarP(&a.format, "output", "o", "text", "what to print: text for people, json for programs")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if a.format != "text" && a.format != "json" {
			return usageError{fmt.Errorf("--output %s is neither text nor json", a.format)}
		}
		return nil
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w (%s --help tells which flags there are)", err, c.CommandPath())}
	})
	root.AddCommand(a.version(), a.config(), a.ops(), a.check(), a.supervisor())
	return root
}

// noArgs refuses what would be ignored.
func noArgs(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return usageError{fmt.Errorf("%q is not expected (%s --help tells what is)", args[0], c.CommandPath())}
}

// oneArg wants exactly one, and says what.
func oneArg(what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) == 1 {
			return nil
		}
		return usageError{fmt.Errorf("want one %s, have %d arguments: %s", what, len(args), c.UseLine())}
	}
}

// show prints v as JSON, or as text with the given function.
func (a *app) show(v any, text func(io.Writer) error) error {
	if a.format != "json" {
		return text(a.out)
	}
	e := json.NewEncoder(a.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
