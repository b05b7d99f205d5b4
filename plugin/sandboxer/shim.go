package sandboxer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Each call to a controller has a limit of its own, as its shim may be silent.
const (
	// startLimit holds the boot of a virtual machine; a handler may say otherwise.
	startLimit = 2 * time.Minute
	queryLimit = 10 * time.Second
	// stopLimit holds what a runtime does to end a machine.
	stopLimit = time.Minute
	// settleLimit is how long the controller may know a sandbox whose shim is
	// dead: containerd runs the shim's clean-up, for 5 s by default.
	settleLimit = 20 * time.Second
	settlePoll  = 50 * time.Millisecond
	retryMax    = 5 * time.Second
)

// Controller is the part of containerd's sandbox.Controller that is used.
type Controller interface {
	Create(ctx context.Context, sb sandbox.Sandbox, opts ...sandbox.CreateOpt) error
	Start(ctx context.Context, id string) (sandbox.ControllerInstance, error)
	Ender
}

// Ender is the end of a sandbox, and what comes before.
type Ender interface {
	Wait(ctx context.Context, id string) (sandbox.ExitStatus, error)
	Stop(ctx context.Context, id string, opts ...sandbox.StopOpt) error
	Shutdown(ctx context.Context, id string) error
	Status(ctx context.Context, id string, verbose bool) (sandbox.ControllerStatus, error)
}

// Shim leaves sandboxes to a controller of containerd, as its "shim", which
// speaks the Sandbox API with the pod's shim.
type Shim struct {
	controller Controller
	limit      func(record.Handler) time.Duration
	sysctls    func(*cri.PodSandboxConfig) (map[string]string, error)
}

// NewShim returns the sandboxer over a controller, with the limit and the kernel
// settings of the Options.
func NewShim(c Controller, o Options) *Shim {
	s := &Shim{c, o.StartLimit, o.Sysctls}
	if s.limit == nil {
		s.limit = func(record.Handler) time.Duration { return 0 }
	}
	if s.sysctls == nil {
		s.sysctls = func(c *cri.PodSandboxConfig) (map[string]string, error) { return c.GetLinux().GetSysctls(), nil }
	}
	return s
}

// Start implements Sandboxer.
func (s *Shim) Start(ctx context.Context, sb record.Sandbox) (record.Instance, error) {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(s.limit(sb.Handler), startLimit))
	defer cancel()
	info := sandbox.Sandbox{
		ID:         sb.ID,
		Runtime:    sandbox.RuntimeOpts{Name: sb.Handler.Runtime},
		Sandboxer:  sb.Handler.Sandboxer,
		CreatedAt:  sb.CreatedAt,
		Extensions: map[string]typeurl.Any{},
	}
	if sb.Handler.OptionsType != "" {
		info.Runtime.Options = &anypb.Any{TypeUrl: sb.Handler.OptionsType, Value: sb.Handler.Options}
	}
	config, err := s.told(sb.Config)
	if err != nil {
		return record.Instance{}, err
	}
	err = s.controller.Create(ctx, info,
		sandbox.WithOptions(config), sandbox.WithNetNSPath(sb.Network.NetNS), sandbox.WithAnnotations(sb.Config.GetAnnotations()))
	if err != nil {
		return record.Instance{}, fmt.Errorf("create sandbox: %w", classed(ctx, err))
	}
	got, err := s.controller.Start(ctx, sb.ID)
	if err != nil {
		return record.Instance{}, fmt.Errorf("start sandbox: %w", classed(ctx, err))
	}
	inst := record.Instance{Pid: got.Pid, Address: got.Address, Version: got.Version, StartedAt: got.CreatedAt}
	if inst.StartedAt.Unix() <= 0 { // not told: the zero time, or that of an empty message
		inst.StartedAt = time.Now()
	}
	if got.Spec != nil && typeurl.Is(got.Spec, &specs.Spec{}) {
		inst.Spec = got.Spec.GetValue()
	}
	return inst, nil
}

// told is the configuration as the shim gets it: with all settings that the pod is
// to have, as nobody else writes them.
func (s *Shim) told(c *cri.PodSandboxConfig) (*cri.PodSandboxConfig, error) {
	all, err := s.sysctls(c)
	if err != nil || len(all) == 0 {
		return c, err
	}
	c = proto.Clone(c).(*cri.PodSandboxConfig)
	if c.Linux == nil {
		c.Linux = &cri.LinuxPodSandboxConfig{}
	}
	c.Linux.Sysctls = all
	return c, nil
}

// Wait implements Sandboxer.
func (s *Shim) Wait(ctx context.Context, sb record.Sandbox) (<-chan record.Exit, error) {
	st, err := s.status(ctx, sb.ID)
	if err != nil {
		return nil, fmt.Errorf("watch sandbox: %w", err)
	}
	if !st.known {
		return nil, fmt.Errorf("watch sandbox %s: its controller does not know it: %w", sb.ID, errdefs.ErrNotFound)
	}
	// The goroutine lives as ctx does, or as the sandbox.
	exits := make(chan record.Exit, 1)
	go func() {
		defer close(exits)
		if exit, err := s.await(ctx, sb.ID); err == nil {
			exits <- exit
		}
	}()
	return exits, nil
}

// await blocks until the sandbox has ended; the error is that of ctx.
func (s *Shim) await(ctx context.Context, id string) (record.Exit, error) {
	for pause := settlePoll; ; pause = min(2*pause, retryMax) {
		got, err := s.controller.Wait(ctx, id)
		if err == nil {
			return record.Exit{Code: got.ExitStatus, At: got.ExitedAt}, nil
		}
		if ctx.Err() != nil {
			return record.Exit{}, context.Cause(ctx)
		}
		// A wait that broke off says nothing of the sandbox.
		if st, err := s.status(ctx, id); err == nil && !st.alive {
			return record.Exit{Code: lostCode, At: st.exitedAt}, nil
		}
		if err := sleep(ctx, pause); err != nil {
			return record.Exit{}, err
		}
	}
}

// Stop implements Sandboxer.
func (s *Shim) Stop(ctx context.Context, sb record.Sandbox) error {
	stop := func(ctx context.Context) error { return s.controller.Stop(ctx, sb.ID) }
	if err := s.end(ctx, sb.ID, stop); err != nil {
		return fmt.Errorf("stop sandbox: %w", err)
	}
	return nil
}

// Shutdown implements Sandboxer.
func (s *Shim) Shutdown(ctx context.Context, sb record.Sandbox) error {
	shutdown := func(ctx context.Context) error { return s.controller.Shutdown(ctx, sb.ID) }
	if err := s.end(ctx, sb.ID, shutdown); err != nil {
		return fmt.Errorf("shut sandbox down: %w", err)
	}
	return nil
}

// end calls stop or shutdown. Its failure does not count when the controller
// gives the sandbox up because its shim is dead.
func (s *Shim) end(ctx context.Context, id string, call func(context.Context) error) error {
	bounded, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	err := call(bounded)
	if err == nil || errdefs.IsNotFound(err) {
		return nil
	}
	if bounded.Err() != nil {
		return classed(bounded, err)
	}
	st, lost := s.status(ctx, id)
	if lost != nil {
		return errors.Join(err, lost)
	}
	if st.known {
		return err
	}
	return nil
}

// Alive implements Sandboxer.
func (s *Shim) Alive(ctx context.Context, sb record.Sandbox) (bool, error) {
	st, err := s.status(ctx, sb.ID)
	if err != nil {
		return false, fmt.Errorf("ask for the sandbox's status: %w", err)
	}
	return st.alive, nil
}

// namespaceKey begins what our own shim says of a sandbox's namespaces.
const namespaceKey = "namespace."

// Namespaces implements Sandboxer. They are what the shim says.
func (s *Shim) Namespaces(ctx context.Context, sb record.Sandbox) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, queryLimit)
	defer cancel()
	got, err := s.controller.Status(ctx, sb.ID, true)
	if err != nil {
		return nil, classed(ctx, err)
	}
	paths := map[string]string{}
	for _, kind := range kinds {
		if path := got.Info[namespaceKey+kind]; filepath.IsAbs(path) {
			paths[kind] = path
		}
	}
	return paths, nil
}

// status is what a controller says of a sandbox, in so many words.
type status struct {
	known, alive bool
	exitedAt     time.Time
}

// status asks the controller. While the connection to the shim is closed and
// the controller has not given it up, it asks again.
func (s *Shim) status(ctx context.Context, id string) (status, error) {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for {
		asked, done := context.WithTimeout(ctx, queryLimit)
		got, err := s.controller.Status(asked, id, false)
		err = classed(asked, err)
		done()
		switch {
		case err == nil:
			return read(got), nil
		case errdefs.IsNotFound(err), errdefs.IsNotFound(errgrpc.ToNative(err)): // the shim's own words come as they travelled
			return status{exitedAt: time.Now()}, nil
		case !errors.Is(err, ttrpc.ErrClosed):
			return status{}, err
		}
		if stopped := sleep(ctx, settlePoll); stopped != nil {
			return status{}, errors.Join(err, stopped)
		}
	}
}

// read understands a controller's status. The stock one describes a sandbox it
// does not know by a status without a state.
func read(got sandbox.ControllerStatus) status {
	s := status{
		known:    got.State != "",
		alive:    got.State == cri.PodSandboxState_SANDBOX_READY.String(),
		exitedAt: got.ExitedAt,
	}
	if s.exitedAt.Unix() <= 0 { // not told: the zero time, or that of an empty message
		s.exitedAt = time.Now()
	}
	return s
}

// classed gives an error the class of the context's end, which the client of a
// shim loses.
func classed(ctx context.Context, err error) error {
	if ended := ctx.Err(); err != nil && ended != nil && errdefs.Resolve(err) == errdefs.ErrUnknown {
		return fmt.Errorf("no answer in time: %w (%w)", ended, err)
	}
	return err
}
