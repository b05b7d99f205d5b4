package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/gantry-cri/gantry/cmd/gantry/internal/daemon"
	"github.com/gantry-cri/gantry/cmd/gantry/internal/supervisor"
)

// supervisorFlags are the flags of supervisor upgrade.
type supervisorFlags struct {
	address string
	force   bool
}

func (a *app) supervisor() *cobra.Command {
	c := &cobra.Command{
		Use:   "supervisor",
		Short: "Look after the processes that hold the pods of gantry's shim",
		Long: `A supervisor is the process of gantry's shim, one for all pods of the node whose
handler has runtime_type "io.containerd.gantry.v2".
` + exitHelp,
		Example: "  gantry supervisor upgrade",
		Args:    noArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.upgrade())
	return c
}

func (a *app) upgrade() *cobra.Command {
	var f supervisorFlags
	c := &cobra.Command{
		Use:   "upgrade",
		Short: "Have the installed shim take over from the one that runs",
		Long: `Ends the supervisors of gantry's shim whose program has been replaced, and waits
until the new one has taken over. Pods and containers run on. What is executed in
a container at that moment (kubectl exec) is cut off, and so are the terminals of
containers that have one.

Install the new program first, in the place of the old one: by a rename, as every
package does. The daemon has to run, as it starts the next supervisor.
` + exitHelp,
		Example: `  gantry supervisor upgrade
  gantry supervisor upgrade --force    # also one whose program is the same`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.runUpgrade(c.Context(), f) },
	}
	c.Flags().StringVar(&f.address, "address", daemon.DefaultAddress, "the daemon's socket, as its configuration has it")
	c.Flags().BoolVar(&f.force, "force", false, "also where the program is the same")
	return c
}

// upgraded is what was done about a supervisor.
type upgraded struct {
	Before supervisor.Supervisor  `json:"before"`
	After  *supervisor.Supervisor `json:"after,omitempty"`
}

func (a *app) runUpgrade(ctx context.Context, f supervisorFlags) error {
	found, err := supervisor.Find(f.address)
	if err != nil {
		return err
	}
	done := []upgraded{}
	for _, s := range found {
		u := upgraded{Before: s}
		if s.Old || f.force {
			next, err := supervisor.Upgrade(ctx, f.address, s)
			if err != nil {
				return fmt.Errorf("upgrade the supervisor of namespace %s: %w", s.Namespace, err)
			}
			u.After = &next
		}
		done = append(done, u)
	}
	return a.show(done, func(w io.Writer) error { return tellUpgrades(w, done) })
}

func tellUpgrades(w io.Writer, done []upgraded) error {
	if len(done) == 0 {
		_, err := fmt.Fprintln(w, "no supervisor runs for this daemon: no pod has gantry's shim")
		return err
	}
	for _, u := range done {
		text := fmt.Sprintf("namespace %s: process %d runs %s as it is installed; nothing to do", u.Before.Namespace, u.Before.Pid, u.Before.Program)
		if u.After != nil {
			text = fmt.Sprintf("namespace %s: process %d has taken over from process %d and runs %s", u.Before.Namespace, u.After.Pid, u.Before.Pid, u.After.Program)
		}
		if _, err := fmt.Fprintln(w, text); err != nil {
			return err
		}
	}
	return nil
}
