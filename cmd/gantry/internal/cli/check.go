package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/gantry-cri/gantry/cmd/gantry/internal/daemon"
	"github.com/gantry-cri/gantry/cmd/gantry/internal/node"
	"github.com/gantry-cri/gantry/plugin/host"
)

// checkTimeout bounds all of a check.
const checkTimeout = time.Minute

// checkFlags are the flags of check. What is empty is the configuration's.
type checkFlags struct{ config, root, state, address string }

func (a *app) check() *cobra.Command {
	var f checkFlags
	c := &cobra.Command{
		Use:   "check",
		Short: "Look for what keeps pods from running, and for what they left",
		Long: `Looks at this machine as the daemon will find it:

  kernel     filesystems, system calls, seccomp, user namespaces, cgroups
  network    CNI configurations, the plugins they name and their versions
  runtime    the OCI runtimes of the handlers; known weaknesses of runc
  daemon     whether it answers, and what it says of itself
  leftovers  network namespaces, mounts, shims, addresses and network records
             that belong to no pod

Nothing is changed or removed. What is left over can only be told with the
daemon's help, so that part is skipped while it is down; the rest is not.
Run it as root: others cannot see everything.

A failure keeps pods from running, or from running safely; a warning does not.

A release of runc is held against the advisories that matter to a node. The
corrections came in every release line that was kept at the time, so 1.2.8 and
1.3.3 are good where 1.3.2 is not; a line older than all of them is never good.
A distribution's own build may hold a correction under an old number, and is
warned about only.
` + exitHelp,
		Example: `  sudo gantry check
  sudo gantry check --config ./run/config.toml
  sudo gantry check --output json | jq '.findings[] | select(.status != "ok")'`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.runCheck(c.Context(), f) },
	}
	c.Flags().StringVar(&f.config, "config", daemon.DefaultConfig, "the daemon's configuration; one that does not exist stands for the defaults")
	c.Flags().StringVar(&f.root, "root", "", "the daemon's root directory, if not the configured one")
	c.Flags().StringVar(&f.state, "state", "", "the daemon's state directory, if not the configured one")
	c.Flags().StringVar(&f.address, "address", "", "the daemon's socket, if not the configured one (default "+daemon.DefaultAddress+")")
	return c
}

// examined is what check prints.
type examined struct {
	Status   node.Status    `json:"status"`
	Findings []node.Finding `json:"findings"`
}

func (a *app) runCheck(ctx context.Context, f checkFlags) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	layout, err := f.layout()
	if err != nil {
		return err
	}
	return a.showCheck(node.Check(ctx, node.Node{
		Layout: layout, Path: filepath.SplitList(os.Getenv("PATH")), Facts: host.Probe,
		Calls: node.KernelCalls, Versions: node.Programs{}, Pods: daemon.AskPods,
	}))
}

func (f checkFlags) layout() (daemon.Layout, error) {
	layout, err := daemon.Load(f.config)
	if err != nil {
		return layout, err
	}
	return layout.At(f.root, f.state, f.address), nil
}

func (a *app) showCheck(findings []node.Finding) error {
	e := examined{Status: node.Worst(findings), Findings: findings}
	if err := a.show(e, e.text); err != nil {
		return err
	}
	if e.Status == node.Fail {
		return errFound
	}
	return nil
}

// marks make what is wrong stand out without colours.
var marks = map[node.Status]string{node.OK: "ok  ", node.Warn: "WARN", node.Fail: "FAIL", node.Skipped: "skip"}

func (e examined) text(w io.Writer) error {
	area := ""
	count := map[node.Status]int{}
	for _, f := range e.Findings {
		if f.Area != area {
			area = f.Area
			fmt.Fprintln(w, area)
		}
		count[f.Status]++
		fmt.Fprintf(w, "  %s  %s: %s\n", marks[f.Status], f.Name, f.Text)
		if f.Advice != "" {
			fmt.Fprintf(w, "        → %s\n", f.Advice)
		}
	}
	_, err := fmt.Fprintf(w, "\n%d ok, %d warnings, %d failures, %d skipped\n", count[node.OK], count[node.Warn], count[node.Fail], count[node.Skipped])
	return err
}
