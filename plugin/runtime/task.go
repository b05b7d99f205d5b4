package runtime

import (
	"context"
	"encoding/json"
	"fmt"
	"syscall"

	crt "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Status is what a process does.
type Status string

// The states of a process; Unknown is a state that the runtime did not name.
const (
	Unknown Status = "unknown"
	Created Status = "created"
	Running Status = "running"
	Stopped Status = "stopped"
	Paused  Status = "paused"
)

var statuses = map[crt.Status]Status{
	crt.CreatedStatus: Created,
	crt.RunningStatus: Running,
	crt.StoppedStatus: Stopped,
	crt.DeletedStatus: Stopped,
	crt.PausedStatus:  Paused,
	crt.PausingStatus: Paused,
}

// State is a process as the runtime sees it.
type State struct {
	Status Status
	Pid    uint32
	// Exit is set once Stopped.
	Exit record.Exit
}

// Task is one task of the runtime. It is a handle: it holds nothing and stays
// usable when the task ends.
type Task struct {
	tasks *Tasks
	rt    crt.Task
}

// ID names the task; it is the container's.
func (t *Task) ID() string { return t.rt.ID() }

// Pid is the first process as the host sees it.
func (t *Task) Pid(ctx context.Context) (pid uint32, err error) {
	err = bounded(ctx, "get pid of task", t.ID(), queryLimit, func(ctx context.Context) error {
		pid, err = t.rt.PID(ctx)
		return err
	})
	return pid, err
}

// Start releases the first process.
func (t *Task) Start(ctx context.Context) error {
	return bounded(ctx, "start task", t.ID(), startLimit, t.rt.Start)
}

// Kill sends a signal to the first process, or to every process of the
// container. NotFound means that there is none any more.
func (t *Task) Kill(ctx context.Context, signal syscall.Signal, all bool) error {
	return bounded(ctx, "kill task", t.ID(), signalLimit, func(ctx context.Context) error {
		return t.rt.Kill(ctx, uint32(signal), all)
	})
}

// State asks the shim. NotFound means that the shim has no such task or that
// its connection is closed; only Wait and Tasks.Reap find out which.
func (t *Task) State(ctx context.Context) (s State, err error) {
	err = bounded(ctx, "get state of task", t.ID(), queryLimit, func(ctx context.Context) error {
		s, err = stateOf(ctx, t.rt)
		return err
	})
	return s, err
}

// Resize sets the size of the terminal.
func (t *Task) Resize(ctx context.Context, width, height uint32) error {
	return resize(ctx, t.rt, t.ID(), width, height)
}

// CloseIO closes the process's standard input.
func (t *Task) CloseIO(ctx context.Context) error {
	return bounded(ctx, "close stdin of task", t.ID(), queryLimit, t.rt.CloseIO)
}

// Pause freezes every process of the container.
func (t *Task) Pause(ctx context.Context) error {
	return bounded(ctx, "pause task", t.ID(), signalLimit, t.rt.Pause)
}

// Resume undoes Pause.
func (t *Task) Resume(ctx context.Context) error {
	return bounded(ctx, "resume task", t.ID(), signalLimit, t.rt.Resume)
}

// Update sets resources of the running container.
func (t *Task) Update(ctx context.Context, resources *specs.LinuxResources, annotations map[string]string) error {
	value, err := json.Marshal(resources)
	if err != nil {
		return fmt.Errorf("update task %s: encode resources: %w: %w", t.ID(), errdefs.ErrInvalidArgument, err)
	}
	request := &anypb.Any{TypeUrl: mustTypeURL(resources), Value: value}
	return bounded(ctx, "update task", t.ID(), signalLimit, func(ctx context.Context) error {
		return t.rt.Update(ctx, request, annotations)
	})
}

// Pids lists the container's processes as the host sees them.
func (t *Task) Pids(ctx context.Context) (pids []uint32, err error) {
	err = bounded(ctx, "list processes of task", t.ID(), signalLimit, func(ctx context.Context) error {
		infos, err := t.rt.Pids(ctx)
		for _, p := range infos {
			pids = append(pids, p.Pid)
		}
		return err
	})
	return pids, err
}

// Stats returns the runtime's own measurements.
func (t *Task) Stats(ctx context.Context) (stats *anypb.Any, err error) {
	err = bounded(ctx, "get stats of task", t.ID(), queryLimit, func(ctx context.Context) error {
		stats, err = t.rt.Stats(ctx)
		return err
	})
	return stats, err
}

// Checkpoint dumps the container into the directory path, with the options of
// the runtime or nil.
func (t *Task) Checkpoint(ctx context.Context, path string, options *anypb.Any) error {
	return bounded(ctx, "checkpoint task", t.ID(), checkpointLimit, func(ctx context.Context) error {
		return t.rt.Checkpoint(ctx, path, options)
	})
}

func resize(ctx context.Context, p crt.Process, id string, width, height uint32) error {
	return bounded(ctx, "resize terminal of", id, queryLimit, func(ctx context.Context) error {
		return p.ResizePty(ctx, crt.ConsoleSize{Width: width, Height: height})
	})
}

func stateOf(ctx context.Context, p crt.Process) (State, error) {
	got, err := p.State(ctx)
	if err != nil {
		return State{}, err
	}
	s := State{Status: Unknown, Pid: got.Pid}
	if known, ok := statuses[got.Status]; ok {
		s.Status = known
	}
	if s.Status == Stopped {
		s.Exit = record.Exit{Code: got.ExitStatus, At: got.ExitedAt}
	}
	return s, nil
}
