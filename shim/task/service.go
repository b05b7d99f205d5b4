// Package task is containerd's Task API, version 3, for all containers of one
// containerd: one Service in one process, the supervisor.
//
// A container's record is on disk before anything is made for it, and its first
// process is pinned before it is let go, so that another process can tell how it
// ended. What ends is told in order: execs before their container, nothing
// before its start. Restoring a checkpoint is refused.
// Start reading at Service, then container.go.
package task

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/gantry-cri/gantry/plugin/cgroupmove"
	"github.com/gantry-cri/gantry/shim/logs"
	"github.com/gantry-cri/gantry/shim/oci"
	"github.com/gantry-cri/gantry/shim/process"
	"github.com/gantry-cri/gantry/shim/statedir"
)

// Options are what a Service is made of.
type Options struct {
	Namespace string
	// State is the directory of the records.
	State string
	// Address is written into bundles, for the shim's delete.
	Address string
	Reaper  *process.Reaper
	Events  *Publisher
	// Join finds the namespaces of sandboxes without a process.
	Join Join
	// Files finds the files of sandboxes; it may be nil.
	Files Files
	// Logs is told which bundles there are; it may be nil.
	Logs interface{ Add(bundle string) }
	// Relay has the output of commands end with them, for clients that wait for its
	// end, also where children of theirs have it open.
	Relay bool
}

// Service serves the Task API.
type Service struct {
	namespace, state, address string

	reaper *process.Reaper
	events *Publisher
	join   Join
	files  Files
	logs   interface{ Add(bundle string) }
	relay  bool

	filters oci.Filters
	crun    oci.Copy

	mu         sync.Mutex
	containers map[string]*container
	creating   int
}

var _ api.TTRPCTaskService = (*Service)(nil)

// New returns a Service without tasks.
func New(o Options) *Service {
	return &Service{
		namespace: o.Namespace, state: o.State, address: o.Address,
		reaper: o.Reaper, events: o.Events, join: o.Join, files: o.Files, logs: o.Logs, relay: o.Relay, containers: map[string]*container{},
	}
}

// Register offers the Service to a server. Intercept must be that server's.
func (s *Service) Register(server *ttrpc.Server) { api.RegisterTTRPCTaskService(server, s) }

// Intercept gives errors the form in which they travel.
func Intercept(ctx context.Context, u ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
	r, err := m(ctx, u)
	return r, errgrpc.ToGRPC(err)
}

// Idle reports whether there is no task.
func (s *Service) Idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.containers)+s.creating == 0
}

// Outputs are the FIFOs into which containers write that run.
func (s *Service) Outputs() (all []logs.Output) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.containers {
		o, err := parseOutput(c.Stdio.Stdout)
		if o.fifo != "" && err == nil && c.init.is() != task.Status_STOPPED {
			all = append(all, logs.Output{Stdout: c.Stdio.Stdout, Stderr: c.Stdio.Stderr})
		}
	}
	return all
}

func (s *Service) publish(ctx context.Context, event any) { s.events.Publish(ctx, event) }

func (s *Service) container(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[id]
	if c == nil {
		return nil, fmt.Errorf("container %s is not there: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

func (s *Service) find(id, exec string) (*container, *proc, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, nil, err
	}
	p, err := c.proc(exec)
	return c, p, err
}

func (s *Service) count(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.creating += n
}

// Create implements the Task API.
func (s *Service) Create(ctx context.Context, r *api.CreateTaskRequest) (*api.CreateTaskResponse, error) {
	if s.relay { // our daemon has done it
		cgroupmove.Expect()
	}
	if r.GetCheckpoint() != "" {
		return nil, fmt.Errorf("this shim cannot restore a checkpoint: %w", errdefs.ErrNotImplemented)
	}
	dir, err := statedir.DirOf(s.state, r.GetID())
	if err != nil {
		return nil, err
	}
	opts, err := oci.Options(r.GetOptions())
	if err != nil {
		return nil, err
	}
	if err := joinSandbox(r.GetBundle(), s.join, s.files); err != nil {
		return nil, err
	}
	config, err := readConfig(r.GetBundle())
	if err != nil {
		return nil, err
	}
	if err := statedir.WriteAddress(r.GetBundle(), s.address); err != nil {
		return nil, err
	}
	s.count(1)
	defer s.count(-1)
	if s.logs != nil {
		s.logs.Add(r.GetBundle())
	}
	c := s.newContainer(Record{
		ID: r.GetID(), Bundle: r.GetBundle(), Options: opts, Rootfs: len(r.GetRootfs()) > 0, Shared: config.shared(),
		Stdio: paths{Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), Terminal: r.GetTerminal()},
	}, dir)
	c.init.score = config.Process.OOMScoreAdj
	if err := c.create(ctx, mountsOf(r)); err != nil {
		return nil, err
	}
	s.manage(ctx, c)
	s.publish(ctx, &events.TaskCreate{
		ContainerID: c.ID, Bundle: c.Bundle, Rootfs: r.GetRootfs(), Pid: uint32(c.Pid),
		IO: &events.TaskIO{Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), Terminal: r.GetTerminal()},
	})
	go c.watch()
	return &api.CreateTaskResponse{Pid: uint32(c.Pid)}, nil
}

func mountsOf(r *api.CreateTaskRequest) (mounts []mount.Mount) {
	for _, m := range r.GetRootfs() {
		mounts = append(mounts, mount.Mount{Type: m.GetType(), Source: m.GetSource(), Target: m.GetTarget(), Options: m.GetOptions()})
	}
	return mounts
}

func (s *Service) manage(ctx context.Context, c *container) {
	c.enter(ctx, func() { s.publish(context.Background(), &events.TaskOOM{ContainerID: c.ID}) })
	s.mu.Lock()
	defer s.mu.Unlock()
	s.containers[c.ID] = c
}

// Start implements the Task API.
func (s *Service) Start(ctx context.Context, r *api.StartRequest) (*api.StartResponse, error) {
	c, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if p.exec != "" {
		if err := p.start(ctx); err != nil {
			return nil, err
		}
		return &api.StartResponse{Pid: uint32(p.pid())}, nil
	}
	err = c.switchTo(ctx, task.Status_CREATED, task.Status_CREATED, task.Status_RUNNING, func(ctx context.Context) error {
		if err := c.runtime.Start(ctx, c.init.process.Done()); err != nil {
			return err
		}
		c.noteStart(ctx)
		s.publish(ctx, &events.TaskStart{ContainerID: c.ID, Pid: uint32(c.Pid)})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &api.StartResponse{Pid: uint32(c.Pid)}, nil
}

// Exec implements the Task API.
func (s *Service) Exec(ctx context.Context, r *api.ExecProcessRequest) (*emptypb.Empty, error) {
	if s.relay {
		cgroupmove.ExpectCommand()
	}
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	if _, err := statedir.DirOf(s.state, r.GetExecID()); err != nil {
		return nil, fmt.Errorf("exec %w", err)
	}
	var spec specs.Process
	if err := json.Unmarshal(r.GetSpec().GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("read process specification: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	spec.Terminal = r.GetTerminal()
	p := newProc(c, r.GetExecID(), paths{
		Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), Terminal: r.GetTerminal(), relay: s.relay,
	})
	p.spec, p.score = &spec, spec.OOMScoreAdj
	if p.score == nil {
		config, err := readConfig(c.Bundle)
		if err != nil {
			return nil, err
		}
		p.score = config.Process.OOMScoreAdj
	}
	if err := c.add(p); err != nil {
		return nil, err
	}
	s.publish(ctx, &events.TaskExecAdded{ContainerID: c.ID, ExecID: p.exec})
	return &emptypb.Empty{}, nil
}

// Delete implements the Task API.
func (s *Service) Delete(ctx context.Context, r *api.DeleteRequest) (*api.DeleteResponse, error) {
	c, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if p.exec != "" {
		err = s.deleteExec(ctx, c, p)
	} else {
		err = s.deleteTask(ctx, c)
	}
	if err != nil {
		return nil, err
	}
	exit := p.ended()
	return &api.DeleteResponse{Pid: uint32(p.pid()), ExitStatus: uint32(exit.Code), ExitedAt: timestamppb.New(exit.At)}, nil
}

func (s *Service) deleteExec(ctx context.Context, c *container, p *proc) error {
	release, err := p.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	if p.is() == task.Status_RUNNING {
		return fmt.Errorf("exec %s is running: %w", p.exec, errdefs.ErrFailedPrecondition)
	}
	if st := p.held(); st != nil {
		st.Close()
	}
	c.remove(p.exec)
	return nil
}

// deleteTask takes a container away that has ended, or that was never started.
func (s *Service) deleteTask(ctx context.Context, c *container) error {
	if c.init.is() == task.Status_CREATED {
		if err := c.end(); err != nil {
			return err
		}
		if _, err := c.init.wait(ctx); err != nil {
			return err
		}
	}
	release, err := c.init.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	if st := c.init.is(); st != task.Status_STOPPED {
		return fmt.Errorf("container %s is %s: %w", c.ID, st, errdefs.ErrFailedPrecondition)
	}
	if st := c.init.held(); st != nil {
		st.Close()
	}
	if err := c.release(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	here := s.containers[c.ID] == c
	if here {
		delete(s.containers, c.ID)
	}
	s.mu.Unlock()
	if !here {
		return fmt.Errorf("container %s was deleted meanwhile: %w", c.ID, errdefs.ErrNotFound)
	}
	exit := c.init.ended()
	s.publish(ctx, &events.TaskDelete{
		ContainerID: c.ID, Pid: uint32(c.init.pid()), ExitStatus: uint32(exit.Code), ExitedAt: timestamppb.New(exit.At),
	})
	return nil
}

// State implements the Task API.
func (s *Service) State(_ context.Context, r *api.StateRequest) (*api.StateResponse, error) {
	c, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	out := &api.StateResponse{
		ID: p.name(), Bundle: c.Bundle, Pid: uint32(p.pid()), Status: c.statusOf(p),
		Stdin: p.stdio.Stdin, Stdout: p.stdio.Stdout, Stderr: p.stdio.Stderr, Terminal: p.stdio.Terminal, ExecID: r.GetExecID(),
	}
	if out.Status == task.Status_STOPPED {
		exit := p.ended()
		out.ExitStatus, out.ExitedAt = uint32(exit.Code), timestamppb.New(exit.At)
	}
	return out, nil
}

// Wait implements the Task API.
func (s *Service) Wait(ctx context.Context, r *api.WaitRequest) (*api.WaitResponse, error) {
	_, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	exit, err := p.wait(ctx)
	if err != nil {
		return nil, err
	}
	return &api.WaitResponse{ExitStatus: uint32(exit.Code), ExitedAt: timestamppb.New(exit.At)}, nil
}

// Kill implements the Task API.
func (s *Service) Kill(ctx context.Context, r *api.KillRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, c.kill(ctx, r)
}

// Pause implements the Task API.
func (s *Service) Pause(ctx context.Context, r *api.PauseRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	if err := c.switchTo(ctx, task.Status_RUNNING, task.Status_PAUSING, task.Status_PAUSED, c.runtime.Pause); err != nil {
		return nil, err
	}
	s.publish(ctx, &events.TaskPaused{ContainerID: c.ID})
	return &emptypb.Empty{}, nil
}

// Resume implements the Task API.
func (s *Service) Resume(ctx context.Context, r *api.ResumeRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	if err := c.switchTo(ctx, task.Status_PAUSED, task.Status_PAUSED, task.Status_RUNNING, c.runtime.Resume); err != nil {
		return nil, err
	}
	s.publish(ctx, &events.TaskResumed{ContainerID: c.ID})
	return &emptypb.Empty{}, nil
}

// Checkpoint implements the Task API.
func (s *Service) Checkpoint(ctx context.Context, r *api.CheckpointTaskRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	var o options.CheckpointOptions
	if r.GetOptions() != nil {
		if err := typeurl.UnmarshalTo(r.GetOptions(), &o); err != nil {
			return nil, fmt.Errorf("read options: %w: %w", errdefs.ErrInvalidArgument, err)
		}
	}
	release, err := c.init.take(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := c.runtime.Checkpoint(ctx, r.GetPath(), &o); err != nil {
		return nil, err
	}
	s.publish(ctx, &events.TaskCheckpointed{ContainerID: c.ID, Checkpoint: r.GetPath()})
	return &emptypb.Empty{}, nil
}

// Update implements the Task API.
func (s *Service) Update(ctx context.Context, r *api.UpdateTaskRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	var l specs.LinuxResources
	if err := json.Unmarshal(r.GetResources().GetValue(), &l); err != nil {
		return nil, fmt.Errorf("read resources: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	release, err := c.init.take(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return &emptypb.Empty{}, c.runtime.Update(ctx, &l)
}

// Stats implements the Task API.
func (s *Service) Stats(_ context.Context, r *api.StatsRequest) (*api.StatsResponse, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	g, err := c.cgroup()
	if err != nil {
		return nil, err
	}
	stats, err := g.stats()
	if err != nil {
		return nil, fmt.Errorf("read control group: %w", err)
	}
	a, err := typeurl.MarshalAnyToProto(stats)
	if err != nil {
		return nil, err
	}
	return &api.StatsResponse{Stats: a}, nil
}

// Pids implements the Task API.
func (s *Service) Pids(_ context.Context, r *api.PidsRequest) (*api.PidsResponse, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	g, err := c.cgroup()
	if err != nil {
		return nil, err
	}
	pids, err := g.pids()
	// The group goes with the container.
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read control group: %w", err)
	}
	execs := c.execPids()
	out := &api.PidsResponse{}
	for _, pid := range pids {
		in := &task.ProcessInfo{Pid: uint32(pid)}
		if exec := execs[pid]; exec != "" {
			if in.Info, err = typeurl.MarshalAnyToProto(&options.ProcessDetails{ExecID: exec}); err != nil {
				return nil, err
			}
		}
		out.Processes = append(out.Processes, in)
	}
	return out, nil
}

func (c *container) execPids() map[int]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := map[int]string{}
	for id, p := range c.execs {
		if p.is() == task.Status_RUNNING {
			m[p.pid()] = id
		}
	}
	return m
}

// CloseIO implements the Task API.
func (s *Service) CloseIO(_ context.Context, r *api.CloseIORequest) (*emptypb.Empty, error) {
	_, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if st := p.held(); st != nil && r.GetStdin() {
		st.closeInput()
	}
	return &emptypb.Empty{}, nil
}

// ResizePty implements the Task API.
func (s *Service) ResizePty(_ context.Context, r *api.ResizePtyRequest) (*emptypb.Empty, error) {
	_, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	st := p.held()
	if st == nil {
		return nil, fmt.Errorf("process %s does not run: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	return &emptypb.Empty{}, st.resize(r.GetWidth(), r.GetHeight())
}

// Connect implements the Task API.
func (s *Service) Connect(_ context.Context, r *api.ConnectRequest) (*api.ConnectResponse, error) {
	out := &api.ConnectResponse{ShimPid: uint32(os.Getpid())}
	if c, err := s.container(r.GetID()); err == nil {
		out.TaskPid = uint32(c.init.pid())
	}
	return out, nil
}

// Shutdown implements the Task API. It does nothing: the supervisor is everybody's
// and ends by itself when nobody needs it.
func (s *Service) Shutdown(ctx context.Context, r *api.ShutdownRequest) (*emptypb.Empty, error) {
	log.G(ctx).WithField("task", r.GetID()).Debug("a task needs no shim any more")
	return &emptypb.Empty{}, nil
}
