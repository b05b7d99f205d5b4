// Package oci calls an OCI runtime that has runc's verbs, as the options of a
// task say. It keeps no state: what it knows of a container is in the
// container's bundle, and in the runtime's own directory. Where the files there
// tell how, it starts, freezes and deletes a container and sets its limits itself, which
// saves a program each.
//
// Start reading at Runtime.
package oci

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// DefaultRoot is where a runtime keeps its state if the options do not say.
const DefaultRoot = "/run/containerd/runc"

// Runtime runs one container.
type Runtime struct {
	id, bundle string
	opts       *options.Options
	runc       *runc.Runc
	// Filters spares crun the compiling, nil for none.
	Filters *Filters
	// Copy spares crun to copy itself, nil for none.
	Copy *Copy
}

// New returns the runtime for the container of a bundle.
func New(namespace, id, bundle string, o *options.Options) *Runtime {
	root := o.GetRoot()
	if root == "" {
		root = DefaultRoot
	}
	return &Runtime{id: id, bundle: bundle, opts: o, runc: &runc.Runc{
		Command: o.GetBinaryName(), Root: filepath.Join(root, namespace),
		Log: filepath.Join(bundle, "log.json"), LogFormat: runc.JSON,
		SystemdCgroup: o.GetSystemdCgroup(), PdeathSignal: unix.SIGKILL,
	}}
}

// Process is what the runtime is told of a new process besides its
// specification.
type Process struct {
	// IO is nil with a terminal.
	IO runc.IO
	// Console receives the terminal.
	Console *runc.Socket
	// PidFile is written by the runtime.
	PidFile string
}

// Create makes the container and returns the number of its first process, which
// waits to be started.
func (r *Runtime) Create(ctx context.Context, p Process) (pid int, err error) {
	o := &runc.CreateOpts{PidFile: p.PidFile, IO: p.IO, NoPivot: r.opts.GetNoPivotRoot(), NoNewKeyring: r.opts.GetNoNewKeyring()}
	if p.Console != nil {
		o.ConsoleSocket = p.Console
	}
	keep := r.Filters.give(cmp.Or(r.runc.Command, runc.DefaultCommand), r.runc.Root, r.bundle)
	err = r.run(func(program *runc.Runc) error { return program.Create(ctx, r.id, r.bundle, o) })
	if err != nil {
		return 0, r.explain("create", r.runc.Log, err)
	}
	keep(r.dir())
	return readPid(p.PidFile)
}

// Exec starts a further process.
func (r *Runtime) Exec(ctx context.Context, spec *specs.Process, p Process) (pid int, err error) {
	// One file for each, so that several at a time do not get each other's errors.
	log := p.PidFile + ".log"
	defer os.Remove(log)
	defer os.Remove(p.PidFile)
	o := &runc.ExecOpts{PidFile: p.PidFile, LogFile: log, IO: p.IO, Detach: true}
	if p.Console != nil {
		o.ConsoleSocket = p.Console
	}
	err = r.run(func(program *runc.Runc) error { return program.Exec(ctx, r.id, *spec, o) })
	if err != nil {
		return 0, r.explain("exec", log, err)
	}
	return readPid(p.PidFile)
}

// Kill sends a signal to every process of the container.
func (r *Runtime) Kill(ctx context.Context, signal int) error {
	return r.explain("kill", r.runc.Log, r.runc.Kill(ctx, r.id, signal, &runc.KillOpts{All: true}))
}

// Checkpoint writes the container's processes to a directory by CRIU.
func (r *Runtime) Checkpoint(ctx context.Context, path string, o *options.CheckpointOptions) error {
	work := o.GetWorkPath()
	if work == "" {
		work = r.opts.GetCriuWorkPath()
	}
	if work == "" {
		work = filepath.Join(r.bundle, "criu-work")
	}
	var actions []runc.CheckpointAction
	if !o.GetExit() {
		actions = append(actions, runc.LeaveRunning)
	}
	return r.explain("checkpoint", r.runc.Log, r.runc.Checkpoint(ctx, r.id, &runc.CheckpointOpts{
		ImagePath: path, WorkDir: work, ParentPath: o.GetParentPath(),
		AllowOpenTCP: o.GetOpenTcp(), AllowExternalUnixSockets: o.GetExternalUnixSockets(), AllowTerminal: o.GetTerminal(),
		FileLocks: o.GetFileLocks(), EmptyNamespaces: o.GetEmptyNamespaces(), Cgroups: runc.CgroupMode(o.GetCgroupsMode()),
	}, actions...))
}

// run executes the runtime for a new process. An error names the runtime
// as the options do.
func (r *Runtime) run(execute func(*runc.Runc) error) error {
	command, done := r.Copy.use(r.runc.Command)
	defer done()
	program := *r.runc
	program.Command = command
	err := execute(&program)
	if err != nil && command != r.runc.Command {
		return fmt.Errorf("%s: %w", r.runc.Command, err)
	}
	return err
}

// dir is where the runtime keeps what it knows of the container.
func (r *Runtime) dir() string { return filepath.Join(r.runc.Root, r.id) }

// explain puts the runtime's own words into an error.
func (r *Runtime) explain(verb, log string, err error) error {
	if err == nil {
		return nil
	}
	var class error = errdefs.ErrUnknown
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		class = errdefs.ErrAborted
	}
	f, open := os.Open(log)
	if open != nil {
		return fmt.Errorf("OCI runtime %s failed: %w: %w", verb, class, err)
	}
	defer f.Close()
	if said := lastError(bufio.NewScanner(f)); said != "" {
		return fmt.Errorf("OCI runtime %s failed: %s: %w", verb, said, class)
	}
	return fmt.Errorf("OCI runtime %s failed: %w: %w", verb, class, err)
}

// lastError finds the last error in a runtime's log of JSON lines.
func lastError(lines *bufio.Scanner) (said string) {
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var l struct{ Level, Msg string }
		if json.Unmarshal(lines.Bytes(), &l) == nil && (l.Level == "error" || l.Level == "fatal") {
			said = strings.TrimSpace(l.Msg)
		}
	}
	return said
}

func readPid(path string) (int, error) {
	pid, err := runc.ReadPidFile(path)
	if err != nil {
		return 0, fmt.Errorf("read pid file of the OCI runtime: %w", err)
	}
	return pid, nil
}
