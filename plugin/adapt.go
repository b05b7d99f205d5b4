package plugin

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/container"
	"github.com/gantry-cri/gantry/plugin/handler"
	"github.com/gantry-cri/gantry/plugin/host"
	"github.com/gantry-cri/gantry/plugin/image"
	"github.com/gantry-cri/gantry/plugin/network"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/runtime"
	"github.com/gantry-cri/gantry/plugin/selinux"
	"github.com/gantry-cri/gantry/plugin/spec"
)

// networks is sandbox.Network and cri.Network.
type networks struct {
	*network.Networks
	handlers *handler.Handlers
	cfg      network.Config
}

func (n networks) attachment(sb record.Sandbox) network.Attachment {
	a := network.Attachment{ID: sb.ID, Pod: sb.Config}
	// A handler that left the configuration had its settings saved with the
	// attachment.
	if h, ok := n.handlers.Get(sb.Handler.Name); ok {
		a.ConfDir, a.MaxConfNum = h.CNIConfDir, h.CNIMaxConfNum
	}
	return a
}

func (n networks) Attach(ctx context.Context, sb record.Sandbox) (record.Network, error) {
	return n.Networks.Attach(ctx, n.attachment(sb), sb.Network.NetNS)
}

func (n networks) Detach(ctx context.Context, sb record.Sandbox) error {
	return n.Networks.Detach(ctx, n.attachment(sb))
}

func (n networks) Describe() map[string]string {
	return map[string]string{"confDir": n.cfg.ConfDir, "netnsDir": n.cfg.NetNSDir}
}

// labels is sandbox.Labels.
type labels struct {
	*selinux.Labels
	handlers *handler.Handlers
}

func (l labels) Allocate(sb record.Sandbox) (record.Labels, error) {
	h, _ := l.handlers.Get(sb.Handler.Name) // a run has just found it
	return l.Labels.Allocate(sb.ID, sb.Config.GetLinux().GetSecurityContext().GetSelinuxOptions(), h.SELinuxKVM)
}

// imageSource is container.Images.
type imageSource struct{ *image.Service }

func (i imageSource) Resolve(ctx context.Context, ref string, h record.Handler) (container.Image, error) {
	r, err := i.Service.Resolve(ctx, ref, h.Name)
	if err != nil {
		return container.Image{}, err
	}
	return container.Image{Image: r.Image, Config: r.Config.Config, Parent: r.ChainID, Snapshotter: r.Snapshotter}, nil
}

// tasks is container.Tasks.
type tasks struct{ *runtime.Tasks }

func (t tasks) Create(ctx context.Context, req container.TaskRequest) (container.Task, error) {
	rootfs, err := labelled(req.Rootfs, req.Container.Spec)
	if err != nil {
		return nil, err
	}
	created, err := t.Tasks.Create(ctx, runtime.CreateRequest{
		ID: req.Container.ID, SandboxID: req.Sandbox.ID, Handler: req.Container.Handler, Spec: req.Container.Spec,
		Rootfs: rootfs, IO: runtime.IO(req.IO),
		Address: req.Sandbox.Instance.Address, Version: req.Sandbox.Instance.Version,
	})
	if err != nil {
		return nil, err
	}
	return task{created}, nil
}

// labelled are the mounts of a root filesystem with the label that the
// specification has for files.
func labelled(rootfs []mount.Mount, specification []byte) ([]mount.Mount, error) {
	var s struct {
		Linux struct {
			MountLabel string `json:"mountLabel"`
		} `json:"linux"`
	}
	if err := json.Unmarshal(specification, &s); err != nil {
		return nil, fmt.Errorf("read specification: %w (%w)", err, errdefs.ErrInternal)
	}
	if s.Linux.MountLabel == "" {
		return rootfs, nil
	}
	out := slices.Clone(rootfs)
	for i, m := range out {
		out[i].Options = append(slices.Clone(m.Options), selinux.MountOption(s.Linux.MountLabel))
	}
	return out, nil
}

func (t tasks) Get(ctx context.Context, id string) (container.Task, error) {
	got, err := t.Tasks.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	return task{got}, nil
}

func (t tasks) Reap(ctx context.Context, c record.Container) (record.Exit, error) {
	return t.Tasks.Reap(ctx, c.ID, c.Spec)
}

func (t tasks) Release(ctx context.Context, c record.Container) error {
	return t.Tasks.Release(ctx, c.ID, c.Spec)
}

// task is container.Task.
type task struct{ *runtime.Task }

func (t task) State(ctx context.Context) (container.TaskState, error) {
	s, err := t.Task.State(ctx)
	state := container.TaskState{Pid: s.Pid, Exit: s.Exit}
	switch s.Status {
	case runtime.Created:
		state.Status = container.TaskCreated
	case runtime.Stopped:
		state.Status = container.TaskStopped
	default: // a paused container, and one whose state has no name, is no dead one
		state.Status = container.TaskRunning
		state.StartedAt = host.ProcessStart(s.Pid)
	}
	return state, err
}

func (t task) Exec(ctx context.Context, id string, p *specs.Process, io container.Endpoints) (container.Exec, error) {
	e, err := t.Task.Exec(ctx, id, runtime.ExecRequest{Process: p, IO: runtime.IO(io)})
	if err != nil {
		return nil, err
	}
	return exec{e}, nil
}

// exec is container.Exec.
type exec struct{ *runtime.Exec }

func (e exec) Kill(ctx context.Context, sig syscall.Signal, _ bool) error {
	return e.Exec.Kill(ctx, sig)
}

// validate is cri.Validate.
type validate struct{}

func (validate) Pod(c *cri.PodSandboxConfig) error { return spec.ValidatePod(c) }

func (validate) Container(c *cri.ContainerConfig, pod *cri.PodSandboxConfig) error {
	return spec.ValidateContainer(c, pod)
}

// withMounted mounts a root filesystem read-only for as long as fn runs. It
// sees nothing of the container's own mounts.
func withMounted(ctx context.Context, rootfs []mount.Mount, fn func(root string) error) error {
	return mount.WithReadonlyTempMount(ctx, rootfs, fn)
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// pauseTasks is sandboxer.Tasks.
type pauseTasks struct{ *runtime.Tasks }

func (p pauseTasks) Launch(ctx context.Context, sb record.Sandbox, spec []byte) (uint32, error) {
	t, err := p.Create(ctx, runtime.CreateRequest{ID: sb.ID, Handler: sb.Handler, Spec: spec})
	if err != nil {
		return 0, err
	}
	if err := t.Start(ctx); err != nil {
		return 0, err
	}
	return t.Pid(ctx)
}

func (p pauseTasks) Running(ctx context.Context, id string) (bool, error) {
	t, err := p.Get(ctx, id)
	if err != nil {
		return false, ignoreNotFound(err)
	}
	s, err := t.State(ctx)
	if errdefs.IsNotFound(err) {
		// The runtime knows the task and its shim does not: it is dying.
		return false, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	return s.Status != runtime.Stopped, err
}

func (p pauseTasks) Await(ctx context.Context, id string, spec []byte) (record.Exit, error) {
	t, err := p.Get(ctx, id)
	if err == nil {
		var exit record.Exit
		if exit, err = t.Wait(ctx); err == nil {
			return exit, nil
		}
	}
	if !errdefs.IsNotFound(err) {
		return record.Exit{}, err
	}
	return p.Reap(ctx, id, spec)
}

// terminateLimit is how long the process of a sandbox may take to end.
const terminateLimit = 10 * time.Second

func (p pauseTasks) Terminate(ctx context.Context, id string, spec []byte) error {
	t, err := p.Get(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	if err := t.Kill(ctx, syscall.SIGKILL, true); err != nil {
		return ignoreNotFound(err)
	}
	ctx, cancel := context.WithTimeout(ctx, terminateLimit)
	defer cancel()
	_, err = p.Await(ctx, id, spec)
	return err
}
