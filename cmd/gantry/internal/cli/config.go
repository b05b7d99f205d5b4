package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/spf13/cobra"

	"github.com/gantry-cri/gantry/config"
)

func (a *app) config() *cobra.Command {
	c := &cobra.Command{
		Use:   "config",
		Short: "Check a configuration, or print the default one",
		Long:  "Checks a containerd configuration, or prints the default one of the CRI plugins.\n" + exitHelp,
		Args:  noArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.configCheck(), a.configDefault())
	return c
}

func (a *app) configCheck() *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE",
		Short: "Check a config.toml without starting anything",
		Long: `Puts a configuration together as the daemon does when it starts, with its
imports and from older versions of the format, and says what the daemon would
refuse (errors) or not act upon (warnings), with file and line where it is
written. It looks at files only, so a configuration can be checked on another
machine.
` + exitHelp,
		Example: `  gantry config check /etc/containerd/config.toml
  gantry config check new.toml && mv new.toml /etc/containerd/config.toml`,
		Args: oneArg("FILE"),
		RunE: func(_ *cobra.Command, args []string) error { return a.runConfigCheck(args[0]) },
	}
}

// finding is config.Finding for programs.
type finding struct {
	Key  string `json:"key,omitempty"`
	Text string `json:"text"`
	File string `json:"file,omitempty"`
	Line int    `json:"line,omitempty"`
}

// checked is what config check prints.
type checked struct {
	Files    []string  `json:"files"`
	Errors   []finding `json:"errors"`
	Warnings []finding `json:"warnings"`
}

func (a *app) runConfigCheck(path string) error {
	report, err := config.Check(path)
	c := checked{Files: []string{}, Errors: []finding{}, Warnings: []finding{}}
	switch _, file := errors.AsType[*fs.PathError](err); {
	case file:
		return fmt.Errorf("%w: name the file the daemon is started with (usually /etc/containerd/config.toml)", err)
	case err != nil:
		// The daemon would not get as far as the tables.
		c.Files = append(c.Files, path)
		c.Errors = append(c.Errors, finding{Text: err.Error(), File: path})
	default:
		c.Files = append(c.Files, report.Files...)
		c.Errors, c.Warnings = findings(report.Errors), findings(report.Warnings)
	}
	if err := a.show(c, c.text); err != nil {
		return err
	}
	if len(c.Errors) > 0 {
		return errFound
	}
	return nil
}

func findings(all []config.Finding) []finding {
	out := make([]finding, len(all))
	for i, f := range all {
		out[i] = finding{f.Key, f.Text, f.File, f.Line}
	}
	return out
}

func (f finding) String() string {
	text := f.Text
	if f.Key != "" {
		text = f.Key + ": " + text
	}
	switch {
	case f.Line > 0:
		return fmt.Sprintf("%s:%d: %s", f.File, f.Line, text)
	case f.File != "":
		return f.File + ": " + text
	}
	return text
}

func (c checked) text(w io.Writer) error {
	for _, e := range c.Errors {
		fmt.Fprintf(w, "error:   %s\n", e)
	}
	for _, f := range c.Warnings {
		fmt.Fprintf(w, "warning: %s\n", f)
	}
	_, err := fmt.Fprintf(w, "%d errors, %d warnings in %d files\n", len(c.Errors), len(c.Warnings), len(c.Files))
	return err
}

func (a *app) configDefault() *cobra.Command {
	return &cobra.Command{
		Use:   "default",
		Short: "Print the default configuration of the CRI plugins",
		Long: `Prints the tables of the CRI plugins with every key, what it means and its
default. A configuration needs none of them: write only what is to be different.
` + exitHelp,
		Example: `  gantry config default > config.toml
  gantry config default --output json`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			tables := map[string]any{"version": 4, "plugins": map[string]any{
				config.ImagesPlugin: config.DefaultImages(), config.RuntimePlugin: config.DefaultRuntime(), config.ServerPlugin: config.DefaultServer(),
				config.NRIPlugin: config.DefaultNRI(),
			}}
			return a.show(tables, func(w io.Writer) error {
				_, err := w.Write(config.Default())
				return err
			})
		},
	}
}
