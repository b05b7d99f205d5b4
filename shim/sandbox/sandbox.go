// Package sandbox is containerd's Sandbox API for all pods of one containerd: one
// Service in the same process as their tasks, the supervisor.
//
// A sandbox is namespaces that are pinned as files, and no process. Only where the
// containers share a process namespace its first process stays, the holder, which
// is an ordinary task. Who makes a container's specification knows a sandbox by its
// process; of one that has none the paths are below /proc/0, and the task service
// puts in the true ones, which Join finds. The network namespace is others'.
//
// A sandbox's record is on disk before anything is made for it, so another
// supervisor can take it over, and the shim's delete take it away. Start reading at
// Service, then make.go and holder.go.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/timestamppb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/flight"
	"github.com/gantry-cri/gantry/shim/oci"
	"github.com/gantry-cri/gantry/shim/process"
	"github.com/gantry-cri/gantry/shim/statedir"
)

// Options are what a Service is made of.
type Options struct {
	Namespace string
	// Address is where the shim listens.
	Address string
	// State is the directory of the records and pins.
	State string
	// Root gets the root filesystem of holders. Every user must be able to go
	// through its parents.
	Root string
	// Tasks runs holders; it is nil in a process that only cleans up. TaskState
	// is the directory of its records.
	Tasks     task.TTRPCTaskService
	TaskState string
	// Files says that sandboxes have files for their containers, which our daemon makes
	// itself.
	Files bool
}

// Service serves the Sandbox API.
type Service struct {
	namespace, address, state, root, taskState string
	files                                      bool

	tasks     task.TTRPCTaskService
	turns     flight.Turns[string]
	unpacking flight.Turns[struct{}]

	mu   sync.Mutex
	pods map[string]*pod
}

var _ api.TTRPCSandboxService = (*Service)(nil)

// New returns a Service without sandboxes.
func New(o Options) *Service {
	return &Service{
		namespace: o.Namespace, address: o.Address, state: o.State, root: o.Root, taskState: o.TaskState, tasks: o.Tasks, files: o.Files, pods: map[string]*pod{},
	}
}

// Register offers the Service to a server.
func (s *Service) Register(server *ttrpc.Server) { api.RegisterTTRPCSandboxService(server, s) }

// Idle reports whether there is no sandbox.
func (s *Service) Idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.pods) == 0
}

// pod is a sandbox. Its record is changed in the turn of its ID.
type pod struct {
	dir   string
	ended chan struct{} // closed when the record has an exit

	mu     sync.Mutex
	record Record
}

func newPod(dir string, r Record) *pod {
	p := &pod{dir: dir, ended: make(chan struct{}), record: r}
	if r.Exit != nil {
		close(p.ended)
	}
	return p
}

func (p *pod) now() Record {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.record
}

func (p *pod) set(r Record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.record = r
}

// end notes how the sandbox has ended, unless that is known.
func (p *pod) end(ctx context.Context, exit process.Exit) {
	r := p.now()
	if r.Exit != nil {
		return
	}
	r.Exit = &exit
	if err := statedir.Write(p.dir, r); err != nil {
		log.G(ctx).WithError(err).WithField("sandbox", r.ID).Warn("write down the end of a sandbox")
	}
	p.set(r)
	close(p.ended)
}

func (s *Service) add(p *pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pods[p.record.ID] = p
}

func (s *Service) find(id string) (*pod, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pods[id]
	if p == nil {
		return nil, fmt.Errorf("sandbox %s is not there: %w", id, errdefs.ErrNotFound)
	}
	return p, nil
}

// take finds a sandbox and waits for its turn, which done ends.
func (s *Service) take(ctx context.Context, id string) (p *pod, done func(), err error) {
	if done, err = s.turns.Take(ctx, id); err != nil {
		return nil, nil, err
	}
	if p, err = s.find(id); err != nil {
		done()
		return nil, nil, err
	}
	return p, done, nil
}

// CreateSandbox implements the Sandbox API: it writes down what is to be made.
func (s *Service) CreateSandbox(_ context.Context, r *api.CreateSandboxRequest) (*api.CreateSandboxResponse, error) {
	dir, err := statedir.DirOf(s.state, r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	o, err := oci.SavedOptions(r.GetBundlePath())
	if err != nil {
		return nil, err
	}
	record, err := newRecord(r, o)
	if err != nil {
		return nil, err
	}
	record.Files = s.files
	if err := statedir.WriteAddress(r.GetBundlePath(), s.address); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("sandbox %s: %w", record.ID, errdefs.ErrAlreadyExists)
		}
		return nil, fmt.Errorf("make directory of sandbox: %w", err)
	}
	if err := statedir.Write(dir, record); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	s.add(newPod(dir, record))
	return &api.CreateSandboxResponse{}, nil
}

// StartSandbox implements the Sandbox API.
func (s *Service) StartSandbox(ctx context.Context, r *api.StartSandboxRequest) (*api.StartSandboxResponse, error) {
	p, done, err := s.take(ctx, r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	defer done()
	record := p.now()
	if !record.StartedAt.IsZero() || record.Exit != nil {
		return nil, fmt.Errorf("sandbox %s was started before: %w", record.ID, errdefs.ErrFailedPrecondition)
	}
	if err := s.start(ctx, p, &record); err != nil {
		return nil, errors.Join(err, s.undo(ctx, p))
	}
	if record.Holder != 0 {
		go s.watch(context.WithoutCancel(ctx), p)
	}
	return &api.StartSandboxResponse{Pid: uint32(record.Holder), CreatedAt: timestamppb.New(record.StartedAt)}, nil
}

func (s *Service) start(ctx context.Context, p *pod, r *Record) (err error) {
	if r.byHolder() {
		err = s.makeByHolder(ctx, p.dir, r)
	} else {
		err = r.makeHere(p.dir)
	}
	if err == nil {
		err = r.makeFiles(p.dir)
	}
	if err != nil {
		return err
	}
	r.StartedAt = time.Now()
	if err := statedir.Write(p.dir, r); err != nil {
		return err
	}
	p.set(*r)
	return nil
}

// releaseLimit bounds what is given back after a failure.
const releaseLimit = time.Minute

// undo gives back what a start has made that failed.
func (s *Service) undo(ctx context.Context, p *pod) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseLimit)
	defer cancel()
	_, err := s.release(ctx, p.dir, p.now())
	return err
}

// watch waits for the end of the holder, which is that of the sandbox.
func (s *Service) watch(ctx context.Context, p *pod) {
	id := p.now().ID
	exit := process.Exit{Code: unknownCode, At: time.Now()}
	got, err := s.tasks.Wait(ctx, &task.WaitRequest{ID: holderID(id)})
	if err == nil {
		exit = process.Exit{Code: int(got.GetExitStatus()), At: got.GetExitedAt().AsTime()}
	}
	// Who stops the sandbox has the turn, and notes the end itself.
	done, err := s.turns.Take(ctx, id)
	if err != nil {
		return
	}
	defer done()
	p.end(ctx, exit)
}

// unknownCode stands for an end that nobody saw: that of SIGKILL.
const unknownCode = 137

// StopSandbox implements the Sandbox API. One that is not there is stopped.
func (s *Service) StopSandbox(ctx context.Context, r *api.StopSandboxRequest) (*api.StopSandboxResponse, error) {
	p, done, err := s.take(ctx, r.GetSandboxID())
	if errdefs.IsNotFound(err) {
		return &api.StopSandboxResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer done()
	return &api.StopSandboxResponse{}, s.stop(ctx, p)
}

func (s *Service) stop(ctx context.Context, p *pod) error {
	exit, err := s.release(ctx, p.dir, p.now())
	if err != nil {
		return fmt.Errorf("stop sandbox: %w", err)
	}
	p.end(ctx, exit)
	return nil
}

// ShutdownSandbox implements the Sandbox API: nothing of the sandbox is left. One
// that is not there is no error.
func (s *Service) ShutdownSandbox(ctx context.Context, r *api.ShutdownSandboxRequest) (*api.ShutdownSandboxResponse, error) {
	p, done, err := s.take(ctx, r.GetSandboxID())
	if errdefs.IsNotFound(err) {
		return &api.ShutdownSandboxResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer done()
	if err := s.stop(ctx, p); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(p.dir); err != nil {
		return nil, fmt.Errorf("remove directory of sandbox: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pods, r.GetSandboxID())
	return &api.ShutdownSandboxResponse{}, nil
}

// WaitSandbox implements the Sandbox API.
func (s *Service) WaitSandbox(ctx context.Context, r *api.WaitSandboxRequest) (*api.WaitSandboxResponse, error) {
	p, err := s.find(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	select {
	case <-p.ended:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for sandbox %s: %w", r.GetSandboxID(), ctx.Err())
	}
	exit := p.now().Exit
	return &api.WaitSandboxResponse{ExitStatus: uint32(exit.Code), ExitedAt: timestamppb.New(exit.At)}, nil
}

// SandboxStatus implements the Sandbox API.
func (s *Service) SandboxStatus(_ context.Context, r *api.SandboxStatusRequest) (*api.SandboxStatusResponse, error) {
	p, err := s.find(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	now := p.now()
	out := &api.SandboxStatusResponse{
		SandboxID: now.ID, Pid: uint32(now.Holder), State: cri.PodSandboxState_SANDBOX_READY.String(), CreatedAt: timestamppb.New(now.CreatedAt),
	}
	if now.live() != nil {
		out.State = cri.PodSandboxState_SANDBOX_NOTREADY.String()
	}
	if now.Exit != nil {
		out.ExitedAt = timestamppb.New(now.Exit.At)
	}
	if r.GetVerbose() {
		out.Info = map[string]string{}
		for _, kind := range kinds {
			if now.has(kind) {
				out.Info["namespace."+string(kind)] = filepath.Join(p.dir, string(kind))
			}
		}
	}
	return out, nil
}

// PingSandbox implements the Sandbox API.
func (s *Service) PingSandbox(_ context.Context, r *api.PingRequest) (*api.PingResponse, error) {
	_, err := s.find(r.GetSandboxID())
	return &api.PingResponse{}, err
}

// Platform implements the Sandbox API.
func (s *Service) Platform(context.Context, *api.PlatformRequest) (*api.PlatformResponse, error) {
	return &api.PlatformResponse{Platform: &types.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}}, nil
}

// SandboxMetrics implements the Sandbox API. They are those of all that is in the pod's
// control group, as containerd's CRI service has them for its own sandboxes.
func (s *Service) SandboxMetrics(_ context.Context, r *api.SandboxMetricsRequest) (*api.SandboxMetricsResponse, error) {
	p, err := s.find(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	stats, err := groupStats(p.now().CgroupParent)
	if err != nil {
		return nil, err
	}
	data, err := typeurl.MarshalAnyToProto(stats)
	if err != nil {
		return nil, fmt.Errorf("encode metrics: %w", err)
	}
	return &api.SandboxMetricsResponse{Metrics: &types.Metric{ID: r.GetSandboxID(), Timestamp: timestamppb.Now(), Data: data}}, nil
}

// UpdateSandbox implements the Sandbox API, in which it is optional.
func (s *Service) UpdateSandbox(context.Context, *api.UpdateSandboxRequest) (*api.UpdateSandboxResponse, error) {
	return nil, fmt.Errorf("a sandbox cannot be changed: %w", errdefs.ErrNotImplemented)
}
