package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/mount"
	v2 "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Controller is containerd's sandbox controller "shim", in which the sandboxes of
// lasting shims are the pool's: they outlive the shim as its tasks do.
type Controller struct {
	sandbox.Controller // of all others
	pool               *Pool
}

var _ sandbox.Controller = (*Controller)(nil)

// NewController returns the controller over containerd's.
func NewController(p *Pool, stock sandbox.Controller) *Controller {
	return &Controller{Controller: stock, pool: p}
}

// podState and podRoot are where the bundles of sandboxes are: not with those of
// tasks, as a pause process has its pod's name.
func (p *Pool) podState() string { return p.State + ".pods" }
func (p *Pool) podRoot() string  { return p.Root + ".pods" }

// findPods registers the sandboxes that earlier daemons left. That they cannot be
// read is an error: a pod that nobody knows would be taken for dead.
func (p *Pool) findPods(ctx context.Context) error {
	for _, dir := range []string{p.podState(), p.podRoot()} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	found, err := p.findIn(ctx, p.podState(), p.podRoot(), lastingDir)
	if err != nil {
		return err
	}
	for _, s := range found {
		s.pod = true
		p.pods[s.bundle.ID] = s
	}
	return nil
}

// pod finds a sandbox that is the pool's, nil for none.
func (c *Controller) pod(ctx context.Context, id string) *shim {
	if !c.pool.ours(ctx) {
		return nil
	}
	c.pool.mu.Lock()
	defer c.pool.mu.Unlock()
	return c.pool.pods[id]
}

// Create implements sandbox.Controller.
func (c *Controller) Create(ctx context.Context, info sandbox.Sandbox, opts ...sandbox.CreateOpt) error {
	lasts := false
	if c.pool.ours(ctx) {
		var err error
		if lasts, err = c.pool.resumes(ctx, info.Runtime.Name, info.Runtime.Options); err != nil {
			return err
		}
	}
	if !lasts {
		return c.Controller.Create(ctx, info, opts...)
	}
	if c.pod(ctx, info.ID) != nil {
		return fmt.Errorf("sandbox %s: %w", info.ID, errdefs.ErrAlreadyExists)
	}
	var o sandbox.CreateOptions
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return err
		}
	}
	return c.pool.createPod(ctx, info, o)
}

func (p *Pool) createPod(ctx context.Context, info sandbox.Sandbox, o sandbox.CreateOptions) error {
	bundle, err := v2.NewBundle(ctx, filepath.Join(p.podRoot(), lastingDir), filepath.Join(p.podState(), lastingDir), info.ID, info.Spec)
	if err != nil {
		return fmt.Errorf("make bundle: %w", err)
	}
	s := newShim(p, bundle, p.podRoot(), lookup(info.Runtime.Name))
	s.lasting, s.pod = true, true
	conn, err := s.begin(ctx, info.Runtime.Options, "")
	if err == nil {
		err = s.createSandbox(ctx, conn, o)
	}
	if err != nil {
		s.abandon(ctx, conn)
		return err
	}
	s.set(standing{phase: serving, conn: conn})
	s.register()
	p.Background.Go("keep shim of sandbox "+info.ID, func(ctx context.Context) { s.keep(ctx, conn) })
	return nil
}

func (s *shim) createSandbox(ctx context.Context, conn *connection, o sandbox.CreateOptions) error {
	service, err := sandbox.NewClient(conn.raw)
	if err != nil {
		return err
	}
	_, err = service.CreateSandbox(ctx, &sandboxapi.CreateSandboxRequest{
		SandboxID: s.bundle.ID, BundlePath: s.bundle.Path, Rootfs: mount.ToProto(o.Rootfs),
		Options: typeurl.MarshalProto(o.Options), NetnsPath: o.NetNSPath, Annotations: o.Annotations,
	})
	if err != nil {
		return fmt.Errorf("create sandbox in the shim: %w", native(err))
	}
	return nil
}

// onPod runs one request of the Sandbox API over the connection of the moment.
func onPod[R any](ctx context.Context, s *shim, fn func(sandboxapi.TTRPCSandboxService) (R, error)) (R, error) {
	var none R
	conn, err := s.serving(ctx)
	if err != nil {
		return none, err
	}
	service, err := sandbox.NewClient(conn.raw)
	if err != nil {
		return none, err
	}
	r, err := fn(service)
	if err != nil {
		return none, native(err)
	}
	return r, nil
}

// askPod is onPod for a request that may be made twice, and is when the connection
// closes before there is an answer.
func askPod[R any](ctx context.Context, s *shim, fn func(sandboxapi.TTRPCSandboxService) (R, error)) (R, error) {
	for {
		r, err := onPod(ctx, s, fn)
		if !errors.Is(err, ttrpc.ErrClosed) {
			return r, err
		}
	}
}

// Start implements sandbox.Controller.
func (c *Controller) Start(ctx context.Context, id string) (sandbox.ControllerInstance, error) {
	s := c.pod(ctx, id)
	if s == nil {
		return c.Controller.Start(ctx, id)
	}
	r, err := onPod(ctx, s, func(a sandboxapi.TTRPCSandboxService) (*sandboxapi.StartSandboxResponse, error) {
		return a.StartSandbox(ctx, &sandboxapi.StartSandboxRequest{SandboxID: id})
	})
	if err != nil {
		return sandbox.ControllerInstance{}, fmt.Errorf("start sandbox %s: %w", id, err)
	}
	conn, err := s.serving(ctx)
	if err != nil {
		return sandbox.ControllerInstance{}, err
	}
	return sandbox.ControllerInstance{
		SandboxID: id, Pid: r.GetPid(), Address: conn.address, Version: uint32(conn.version),
		CreatedAt: r.GetCreatedAt().AsTime(), Spec: r.GetSpec(),
	}, nil
}

// Platform implements sandbox.Controller.
func (c *Controller) Platform(ctx context.Context, id string) (imagespec.Platform, error) {
	s := c.pod(ctx, id)
	if s == nil {
		return c.Controller.Platform(ctx, id)
	}
	r, err := askPod(ctx, s, func(a sandboxapi.TTRPCSandboxService) (*sandboxapi.PlatformResponse, error) {
		return a.Platform(ctx, &sandboxapi.PlatformRequest{SandboxID: id})
	})
	p := r.GetPlatform()
	return imagespec.Platform{OS: p.GetOS(), Architecture: p.GetArchitecture(), Variant: p.GetVariant()}, err
}

// Stop implements sandbox.Controller.
func (c *Controller) Stop(ctx context.Context, id string, opts ...sandbox.StopOpt) error {
	s := c.pod(ctx, id)
	if s == nil {
		return c.Controller.Stop(ctx, id, opts...)
	}
	var o sandbox.StopOptions
	for _, opt := range opts {
		opt(&o)
	}
	req := &sandboxapi.StopSandboxRequest{SandboxID: id}
	if o.Timeout != nil {
		req.TimeoutSecs = uint32(o.Timeout.Seconds())
	}
	_, err := askPod(ctx, s, func(a sandboxapi.TTRPCSandboxService) (*sandboxapi.StopSandboxResponse, error) {
		return a.StopSandbox(ctx, req)
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("stop sandbox %s: %w", id, err)
	}
	return nil
}

// Wait implements sandbox.Controller.
func (c *Controller) Wait(ctx context.Context, id string) (sandbox.ExitStatus, error) {
	s := c.pod(ctx, id)
	if s == nil {
		return c.Controller.Wait(ctx, id)
	}
	r, err := askPod(ctx, s, func(a sandboxapi.TTRPCSandboxService) (*sandboxapi.WaitSandboxResponse, error) {
		return a.WaitSandbox(ctx, &sandboxapi.WaitSandboxRequest{SandboxID: id})
	})
	if err != nil {
		return sandbox.ExitStatus{}, fmt.Errorf("wait for sandbox %s: %w", id, err)
	}
	return sandbox.ExitStatus{ExitStatus: r.GetExitStatus(), ExitedAt: r.GetExitedAt().AsTime()}, nil
}

// Status implements sandbox.Controller.
func (c *Controller) Status(ctx context.Context, id string, verbose bool) (sandbox.ControllerStatus, error) {
	s := c.pod(ctx, id)
	if s == nil {
		return c.Controller.Status(ctx, id, verbose)
	}
	r, err := askPod(ctx, s, func(a sandboxapi.TTRPCSandboxService) (*sandboxapi.SandboxStatusResponse, error) {
		return a.SandboxStatus(ctx, &sandboxapi.SandboxStatusRequest{SandboxID: id, Verbose: verbose})
	})
	if errdefs.IsNotFound(err) && c.pod(ctx, id) == nil {
		// So says containerd's controller of one that is gone.
		return sandbox.ControllerStatus{SandboxID: id, ExitedAt: time.Now()}, nil
	}
	if err != nil {
		return sandbox.ControllerStatus{}, fmt.Errorf("query status of sandbox %s: %w", id, err)
	}
	conn, err := s.serving(ctx)
	if err != nil {
		return sandbox.ControllerStatus{}, err
	}
	return sandbox.ControllerStatus{
		SandboxID: id, Pid: r.GetPid(), State: r.GetState(), Info: r.GetInfo(), Extra: r.GetExtra(),
		CreatedAt: r.GetCreatedAt().AsTime(), ExitedAt: r.GetExitedAt().AsTime(),
		Address: conn.address, Version: uint32(conn.version),
	}, nil
}

// Shutdown implements sandbox.Controller.
func (c *Controller) Shutdown(ctx context.Context, id string) error {
	s := c.pod(ctx, id)
	if s == nil {
		return c.Controller.Shutdown(ctx, id)
	}
	_, err := askPod(ctx, s, func(a sandboxapi.TTRPCSandboxService) (*sandboxapi.ShutdownSandboxResponse, error) {
		return a.ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: id})
	})
	if err != nil {
		return fmt.Errorf("shut sandbox %s down: %w", id, err)
	}
	return s.leave(ctx)
}

// leave takes a sandbox away of which the shim has nothing any more.
func (s *shim) leave(ctx context.Context) error {
	conn, err := s.serving(ctx)
	if err != nil {
		return err
	}
	s.set(standing{phase: serving, conn: conn, leaving: true})
	if err := conn.close(); err != nil {
		log.G(ctx).WithError(err).WithField("sandbox", s.bundle.ID).Warn("close the connection to the shim")
	}
	if err := s.remove(ctx); err != nil {
		return s.stuck(fmt.Errorf("remove the bundle of sandbox %s: %w", s.bundle.ID, err))
	}
	s.vanish(nil)
	return nil
}

// Metrics implements sandbox.Controller.
func (c *Controller) Metrics(ctx context.Context, id string) (*types.Metric, error) {
	s := c.pod(ctx, id)
	if s == nil {
		return c.Controller.Metrics(ctx, id)
	}
	r, err := askPod(ctx, s, func(a sandboxapi.TTRPCSandboxService) (*sandboxapi.SandboxMetricsResponse, error) {
		return a.SandboxMetrics(ctx, &sandboxapi.SandboxMetricsRequest{SandboxID: id})
	})
	return r.GetMetrics(), err
}

// Update implements sandbox.Controller.
func (c *Controller) Update(ctx context.Context, id string, sb sandbox.Sandbox, fields ...string) error {
	s := c.pod(ctx, id)
	if s == nil {
		return c.Controller.Update(ctx, id, sb, fields...)
	}
	_, err := onPod(ctx, s, func(a sandboxapi.TTRPCSandboxService) (*sandboxapi.UpdateSandboxResponse, error) {
		return a.UpdateSandbox(ctx, &sandboxapi.UpdateSandboxRequest{SandboxID: id, Sandbox: sandbox.ToProto(&sb), Fields: fields})
	})
	if err != nil {
		return fmt.Errorf("update sandbox %s: %w", id, err)
	}
	return nil
}
