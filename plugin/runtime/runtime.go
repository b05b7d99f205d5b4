// Package runtime runs container tasks through containerd's task runtime and
// hides its warts: every call is bounded and names its stage when it fails, a
// dead shim is told from an exit, and a task is only called gone when no
// process is left in its control group.
//
// It owns no state: the truth is the runtime's and the kernel's. It never
// decides what to do about a task and never writes records; TaskManager's
// Delete reads a container record with the task's ID, which the caller has to
// have written before. The namespace is the one in ctx.
//
// Start reading at Tasks, then wait.go for what an exit is and release.go for
// how a task is taken down.
package runtime

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	crt "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantry-cri/gantry/plugin/cgroupmove"
	"github.com/gantry-cri/gantry/plugin/record"
)

// Each call to a shim has a limit of its own: a shim that is stopped or stuck
// answers nothing, and the caller's deadline is the whole request's.
const (
	// createLimit holds the start of a shim, the mounts of the root
	// filesystem and the runtime's create with its hooks. On a node that
	// starts a hundred pods at once these take tens of seconds.
	createLimit = 2 * time.Minute
	// startLimit holds the poststart hooks, which a vendor writes.
	startLimit = time.Minute
	// queryLimit is for calls that read the shim's memory, yet a shim may be
	// kept from running by the load of the node. Nobody may take a passed
	// limit as the death of a task.
	queryLimit = 10 * time.Second
	// signalLimit is for a kill, which is an exec of the runtime.
	signalLimit = 20 * time.Second
	// execLimit holds the runtime's exec up to the start of the process.
	execLimit = time.Minute
	// deleteLimit holds the runtime's delete, the unmounts, the shutdown of
	// the shim and the shim binary's own clean-up.
	deleteLimit = time.Minute
	// checkpointLimit holds a dump of all memory to disk.
	checkpointLimit = 10 * time.Minute
)

// Platform is the part of containerd's runtime.PlatformRuntime that is used.
type Platform interface {
	Create(ctx context.Context, taskID string, opts crt.CreateOpts) (crt.Task, error)
	Get(ctx context.Context, taskID string) (crt.Task, error)
	Delete(ctx context.Context, taskID string) (*crt.Exit, error)
}

// Recorder is what a Platform may offer besides: how a task ended whose shim
// is gone, from what the shim left on disk.
type Recorder interface {
	LastExit(ctx context.Context, taskID string) (record.Exit, bool)
}

// Cgroups finds the processes of a container by its OCI cgroups path.
type Cgroups interface {
	// Procs lists the processes in the control group and beneath it.
	Procs(path string) ([]int, error)
	// Kill ends them all and returns when none is left, with their number.
	Kill(ctx context.Context, path string) (int, error)
	// KillMarked ends the processes with the mark in the control group and
	// beneath it, and returns when none is left.
	KillMarked(ctx context.Context, path string, m Mark) error
	// Set writes a file of the control group where it has it, on whichever
	// hierarchy, and reports whether it has it anywhere.
	Set(path, file, value string) (done bool, err error)
	// Prune removes the groups beneath the control group.
	Prune(path string) error
	// Remove takes the empty control group away.
	Remove(path string) error
}

// Tasks runs container tasks. It is safe for concurrent use.
type Tasks struct {
	rt  Platform
	cgs Cgroups
	// limit bounds a create, 0 for createLimit; nil for that in any case.
	limit func(record.Handler) time.Duration
}

// New returns the tasks of rt, which in a daemon is the plugin
// "io.containerd.runtime.v2.task".
func New(rt Platform, cgs Cgroups) *Tasks { return &Tasks{rt: rt, cgs: cgs} }

// Limited returns the same tasks, made within a time that depends on their
// handler, 0 being the usual one.
func (t *Tasks) Limited(limit func(record.Handler) time.Duration) *Tasks {
	return &Tasks{rt: t.rt, cgs: t.cgs, limit: limit}
}

func (t *Tasks) createLimit(h record.Handler) time.Duration {
	if t.limit == nil {
		return createLimit
	}
	return cmp.Or(t.limit(h), createLimit)
}

// IO names the FIFOs, files or log URIs of a process.
type IO struct {
	Stdin, Stdout, Stderr string
	Terminal              bool
}

// CreateRequest describes a task.
type CreateRequest struct {
	ID string
	// SandboxID puts the task into the pod's shim; "" starts a shim.
	SandboxID string
	Handler   record.Handler
	// Spec is the OCI specification, JSON.
	Spec   []byte
	Rootfs []mount.Mount
	IO     IO
	// Address and Version are the task API endpoint of a pod that a sandbox
	// controller runs, from its record.Instance.
	Address string
	Version uint32
	// Checkpoint is the directory of an image to restore from, "" for none.
	Checkpoint string
}

// Create makes a task that Start releases. When it fails nothing is left of
// it, unless the error is a passed deadline: Release it then.
func (t *Tasks) Create(ctx context.Context, req CreateRequest) (*Task, error) {
	cgroupmove.Expect()
	pages, err := takeHugepages(&req)
	if err != nil {
		return nil, fmt.Errorf("create task %s: %w", req.ID, err)
	}
	opts := crt.CreateOpts{
		Spec:            specAny(req.Spec),
		Rootfs:          req.Rootfs,
		IO:              crt.IO(req.IO),
		Runtime:         req.Handler.Runtime,
		RuntimeOptions:  options(req.Handler),
		SandboxID:       req.SandboxID,
		Address:         req.Address,
		Version:         req.Version,
		Checkpoint:      req.Checkpoint,
		RestoreFromPath: req.Checkpoint != "",
	}
	var rt crt.Task
	err = bounded(ctx, "create task", req.ID, t.createLimit(req.Handler), func(ctx context.Context) (err error) {
		rt, err = t.rt.Create(ctx, req.ID, opts)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := t.setHugepages(pages.path, nil, pages.limits); err != nil {
		err = fmt.Errorf("create task %s: %w", req.ID, err)
		return nil, errors.Join(err, t.Release(context.WithoutCancel(ctx), req.ID, req.Spec))
	}
	return &Task{tasks: t, rt: rt}, nil
}

// Get returns the task, or NotFound when the runtime knows none. Unavailable
// says that its shim has not answered yet since the daemon started.
func (t *Tasks) Get(ctx context.Context, id string) (*Task, error) {
	var rt crt.Task
	err := bounded(ctx, "get task", id, queryLimit, func(ctx context.Context) (err error) {
		rt, err = t.rt.Get(ctx, id)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &Task{tasks: t, rt: rt}, nil
}

// options returns h's options for the shim. It is an untyped nil for none, as
// the runtime asks.
func options(h record.Handler) typeurl.Any {
	if h.OptionsType == "" {
		return nil
	}
	return &anypb.Any{TypeUrl: h.OptionsType, Value: h.Options}
}

func specAny(spec []byte) typeurl.Any {
	return &anypb.Any{TypeUrl: mustTypeURL(&specs.Spec{}), Value: spec}
}

// mustTypeURL is for the types that core/runtime registers at its import.
func mustTypeURL(v any) string {
	u, err := typeurl.TypeURL(v)
	if err != nil {
		panic(err)
	}
	return u
}

// bounded calls fn with a limit and makes its error say the stage and the
// task. The runtime flattens a deadline that passed into an unknown error, so
// the class is put back from the context.
func bounded(ctx context.Context, stage, id string, limit time.Duration, fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := fn(ctx)
	if err == nil {
		return nil
	}
	if ended := ctx.Err(); ended != nil && unclassified(err) {
		return fmt.Errorf("%s %s: no answer in time: %w (%w)", stage, id, ended, err)
	}
	return fmt.Errorf("%s %s: %w", stage, id, err)
}

func unclassified(err error) bool {
	return errdefs.Resolve(err) == errdefs.ErrUnknown
}
