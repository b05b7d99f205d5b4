package pool

import (
	"context"
	"errors"
	"fmt"
	"time"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	crt "github.com/containerd/containerd/v2/core/runtime"
	v2 "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
)

// process is the first process of a task, or with exec a further one. Every
// call goes to the connection of the moment.
type process struct {
	shim *shim
	exec string
}

var (
	_ crt.Task        = (*task)(nil)
	_ crt.ExecProcess = (*further)(nil)
)

// query is call for a request that may be made twice: when the connection closes
// before there is an answer, and the task outlives its shim, it is made again.
func query[R any](ctx context.Context, s *shim, fn func(api v2.TaskServiceClient) (R, error)) (R, error) {
	for {
		r, err := call(ctx, s, fn)
		if !s.lasting || !errors.Is(err, ttrpc.ErrClosed) {
			return r, err
		}
	}
}

// call runs one request over the connection of the moment.
func call[R any](ctx context.Context, s *shim, fn func(api v2.TaskServiceClient) (R, error)) (R, error) {
	c, err := s.serving(ctx)
	if err != nil {
		var none R
		return none, err
	}
	r, err := fn(c.api)
	if err != nil {
		return r, native(err)
	}
	return r, nil
}

// native keeps the closed connection apart from errors that have no class.
func native(err error) error {
	if errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	return errgrpc.ToNative(err)
}

func (p process) Kill(ctx context.Context, signal uint32, all bool) error {
	send := call[any]
	if signal == uint32(unix.SIGKILL) {
		send = query[any]
	}
	_, err := send(ctx, p.shim, func(c v2.TaskServiceClient) (any, error) {
		return c.Kill(ctx, &api.KillRequest{ID: p.shim.bundle.ID, ExecID: p.exec, Signal: signal, All: all && p.exec == ""})
	})
	return err
}

// Start releases the process. Of an exec nobody can tell whether it was started
// when the connection closes before there is an answer.
func (p process) Start(ctx context.Context) error {
	for {
		_, err := call(ctx, p.shim, func(c v2.TaskServiceClient) (any, error) {
			return c.Start(ctx, &api.StartRequest{ID: p.shim.bundle.ID, ExecID: p.exec})
		})
		if !p.shim.lasting || p.exec != "" || !errors.Is(err, ttrpc.ErrClosed) {
			return err
		}
		now, err := p.State(ctx)
		if err != nil {
			return err
		}
		if now.Status != crt.CreatedStatus {
			return nil
		}
	}
}

func (p process) ResizePty(ctx context.Context, size crt.ConsoleSize) error {
	_, err := call(ctx, p.shim, func(c v2.TaskServiceClient) (any, error) {
		return c.ResizePty(ctx, &api.ResizePtyRequest{ID: p.shim.bundle.ID, ExecID: p.exec, Width: size.Width, Height: size.Height})
	})
	return err
}

func (p process) CloseIO(ctx context.Context) error {
	_, err := call(ctx, p.shim, func(c v2.TaskServiceClient) (any, error) {
		return c.CloseIO(ctx, &api.CloseIORequest{ID: p.shim.bundle.ID, ExecID: p.exec, Stdin: true})
	})
	return err
}

var statuses = map[tasktypes.Status]crt.Status{
	tasktypes.Status_CREATED: crt.CreatedStatus,
	tasktypes.Status_RUNNING: crt.RunningStatus,
	tasktypes.Status_STOPPED: crt.StoppedStatus,
	tasktypes.Status_PAUSED:  crt.PausedStatus,
	tasktypes.Status_PAUSING: crt.PausingStatus,
}

func (p process) State(ctx context.Context) (crt.State, error) {
	r, err := query(ctx, p.shim, func(c v2.TaskServiceClient) (*api.StateResponse, error) {
		return c.State(ctx, &api.StateRequest{ID: p.shim.bundle.ID, ExecID: p.exec})
	})
	if err != nil {
		return crt.State{}, err
	}
	return crt.State{
		Status: statuses[r.GetStatus()], Pid: r.GetPid(), ExitStatus: r.GetExitStatus(), ExitedAt: r.GetExitedAt().AsTime(),
		Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), Terminal: r.GetTerminal(),
	}, nil
}

func (p process) Wait(ctx context.Context) (*crt.Exit, error) {
	r, err := query(ctx, p.shim, func(c v2.TaskServiceClient) (*api.WaitResponse, error) {
		return c.Wait(ctx, &api.WaitRequest{ID: p.shim.bundle.ID, ExecID: p.exec})
	})
	if err != nil {
		return nil, err
	}
	return &crt.Exit{Status: r.GetExitStatus(), Timestamp: r.GetExitedAt().AsTime()}, nil
}

// task is a task of a shim that was found.
type task struct{ process }

func (t *task) ID() string        { return t.shim.bundle.ID }
func (t *task) Namespace() string { return t.shim.bundle.Namespace }

func (t *task) PID(ctx context.Context) (uint32, error) {
	r, err := query(ctx, t.shim, func(c v2.TaskServiceClient) (*api.ConnectResponse, error) {
		return c.Connect(ctx, &api.ConnectRequest{ID: t.ID()})
	})
	return r.GetTaskPid(), err
}

func (t *task) Pause(ctx context.Context) error {
	_, err := call(ctx, t.shim, func(c v2.TaskServiceClient) (any, error) {
		return c.Pause(ctx, &api.PauseRequest{ID: t.ID()})
	})
	return err
}

func (t *task) Resume(ctx context.Context) error {
	_, err := call(ctx, t.shim, func(c v2.TaskServiceClient) (any, error) {
		return c.Resume(ctx, &api.ResumeRequest{ID: t.ID()})
	})
	return err
}

func (t *task) Exec(ctx context.Context, id string, opts crt.ExecOpts) (crt.ExecProcess, error) {
	if err := identifiers.Validate(id); err != nil {
		return nil, fmt.Errorf("exec ID: %w", err)
	}
	_, err := call(ctx, t.shim, func(c v2.TaskServiceClient) (any, error) {
		return c.Exec(ctx, &api.ExecProcessRequest{
			ID: t.ID(), ExecID: id, Spec: opts.Spec,
			Stdin: opts.IO.Stdin, Stdout: opts.IO.Stdout, Stderr: opts.IO.Stderr, Terminal: opts.IO.Terminal,
		})
	})
	if err != nil {
		return nil, err
	}
	return &further{process{t.shim, id}}, nil
}

func (t *task) Process(ctx context.Context, id string) (crt.ExecProcess, error) {
	e := &further{process{t.shim, id}}
	if _, err := e.State(ctx); err != nil {
		return nil, err
	}
	return e, nil
}

func (t *task) Pids(ctx context.Context) ([]crt.ProcessInfo, error) {
	r, err := query(ctx, t.shim, func(c v2.TaskServiceClient) (*api.PidsResponse, error) {
		return c.Pids(ctx, &api.PidsRequest{ID: t.ID()})
	})
	if err != nil {
		return nil, err
	}
	infos := make([]crt.ProcessInfo, len(r.GetProcesses()))
	for i, p := range r.GetProcesses() {
		infos[i] = crt.ProcessInfo{Pid: p.GetPid(), Info: p.GetInfo()}
	}
	return infos, nil
}

func (t *task) Checkpoint(ctx context.Context, path string, opts *anypb.Any) error {
	_, err := call(ctx, t.shim, func(c v2.TaskServiceClient) (any, error) {
		return c.Checkpoint(ctx, &api.CheckpointTaskRequest{ID: t.ID(), Path: path, Options: opts})
	})
	return err
}

func (t *task) Update(ctx context.Context, resources *anypb.Any, annotations map[string]string) error {
	_, err := call(ctx, t.shim, func(c v2.TaskServiceClient) (any, error) {
		return c.Update(ctx, &api.UpdateTaskRequest{ID: t.ID(), Resources: resources, Annotations: annotations})
	})
	return err
}

func (t *task) Stats(ctx context.Context) (*anypb.Any, error) {
	r, err := query(ctx, t.shim, func(c v2.TaskServiceClient) (*api.StatsResponse, error) {
		return c.Stats(ctx, &api.StatsRequest{ID: t.ID()})
	})
	return r.GetStats(), err
}

// further is a further process of such a task.
type further struct{ process }

func (f *further) ID() string { return f.exec }

func (f *further) Delete(ctx context.Context) (*crt.Exit, error) {
	r, err := call(ctx, f.shim, func(c v2.TaskServiceClient) (*api.DeleteResponse, error) {
		return c.Delete(ctx, &api.DeleteRequest{ID: f.shim.bundle.ID, ExecID: f.exec})
	})
	return exitOf(r), err
}

func exitOf(r *api.DeleteResponse) *crt.Exit {
	if r == nil {
		return nil
	}
	return &crt.Exit{Pid: r.GetPid(), Status: r.GetExitStatus(), Timestamp: r.GetExitedAt().AsTime()}
}

// shutdownLimit bounds the request to end, which a shim that holds other tasks
// of its pod does not follow.
const shutdownLimit = 3 * time.Second

// delete takes the task away, and the shim if it was its last.
func (s *shim) delete(ctx context.Context) (*crt.Exit, error) {
	conn, err := s.serving(ctx)
	if err != nil {
		return nil, err
	}
	id := s.bundle.ID
	r, err := conn.api.Delete(ctx, &api.DeleteRequest{ID: id})
	if s.lasting && errors.Is(err, ttrpc.ErrClosed) {
		return s.delete(ctx) // it waits for the next one
	}
	// A shim that does not know the task has never had it, or a delete was
	// broken off here.
	if err != nil && !errdefs.IsNotFound(native(err)) {
		return nil, native(err)
	}
	taken := s.lasting && err == nil
	s.set(standing{phase: serving, conn: conn, leaving: true})
	asked, cancel := context.WithTimeout(ctx, shutdownLimit)
	defer cancel()
	if err := s.shutdown(asked, conn); err != nil && s.stay(conn) {
		return nil, fmt.Errorf("shut the shim down: %w", err)
	}
	if err := conn.close(); err != nil {
		log.G(ctx).WithError(err).WithField("task", id).Warn("close the connection to the shim")
	}
	if !taken {
		if _, err := s.callDelete(ctx); err != nil {
			log.G(ctx).WithError(err).WithField("task", id).Warn("clean up after a task")
		}
	}
	if err := s.remove(ctx); err != nil {
		return nil, s.stuck(fmt.Errorf("remove the bundle of task %s: %w", id, err))
	}
	s.vanish(nil)
	return exitOf(r), nil
}

// shutdown asks the shim to end. One that ends may close the connection before it
// answers.
func (s *shim) shutdown(ctx context.Context, conn *connection) error {
	_, err := conn.api.Shutdown(ctx, &api.ShutdownRequest{ID: s.bundle.ID})
	if err == nil || errors.Is(err, ttrpc.ErrClosed) {
		return nil
	}
	err = native(err)
	if errdefs.IsUnavailable(err) { // what a gRPC client says of it
		select {
		case <-conn.closed:
			return nil
		case <-ctx.Done():
		}
	}
	return err
}

// stuck leaves a task whose bundle could not be removed to the clean-up after
// dead shims, which tries until it can.
func (s *shim) stuck(err error) error {
	s.set(standing{phase: dead})
	s.pool.Background.Go("remove bundle of "+s.bundle.ID, s.run)
	return err
}
