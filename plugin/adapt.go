package plugin

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/container"
	gcri "github.com/gantry-cri/gantry/plugin/cri"
	"github.com/gantry-cri/gantry/plugin/events"
	"github.com/gantry-cri/gantry/plugin/handler"
	"github.com/gantry-cri/gantry/plugin/host"
	"github.com/gantry-cri/gantry/plugin/image"
	"github.com/gantry-cri/gantry/plugin/network"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/runtime"
	"github.com/gantry-cri/gantry/plugin/selinux"
	"github.com/gantry-cri/gantry/plugin/spec"
	"github.com/gantry-cri/gantry/plugin/store"
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

func (n networks) Await(ctx context.Context, sb record.Sandbox) error {
	return n.Networks.Await(ctx, n.attachment(sb))
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
type imageSource struct {
	*image.Service
	handlers *handler.Handlers
}

func (i imageSource) Resolve(ctx context.Context, spec *cri.ImageSpec, h record.Handler) (container.Image, error) {
	r, err := i.Service.Resolve(ctx, spec, h.Name)
	if err != nil {
		return container.Image{}, err
	}
	if h, err = i.handlers.For(h, r.Config.Platform); err != nil {
		return container.Image{}, err
	}
	return container.Image{Image: r.Image, Artifact: r.Artifact, Config: r.Config.Config, Parent: r.ChainID, Snapshotter: r.Snapshotter, Handler: h}, nil
}

// tasks is container.Tasks.
type tasks struct{ *runtime.Tasks }

func (t tasks) Create(ctx context.Context, req container.TaskRequest) (container.Task, error) {
	h, err := withIOOwner(req)
	if err != nil {
		return nil, err
	}
	rootfs, err := labelled(req.Rootfs, req.Container.Spec)
	if err != nil {
		return nil, err
	}
	created, err := t.Tasks.Create(ctx, runtime.CreateRequest{
		ID: req.Container.ID, SandboxID: req.Sandbox.ID, Handler: h, Spec: req.Container.Spec,
		Rootfs: rootfs, IO: runtime.IO(req.IO),
		Address: req.Sandbox.Instance.Address, Version: req.Sandbox.Instance.Version,
	})
	if err != nil {
		return nil, err
	}
	return task{created}, nil
}

// withIOOwner gives the pipes of a container in a user namespace to its first
// process.
func withIOOwner(req container.TaskRequest) (record.Handler, error) {
	if req.Sandbox.UserNS() == nil {
		return req.Container.Handler, nil
	}
	u := req.Container.User.GetLinux()
	uid, gid := req.Sandbox.HostID(uint32(u.GetUid()), uint32(u.GetGid()))
	return handler.WithIOOwner(req.Container.Handler, uid, gid)
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

func (t tasks) EndProcesses(ctx context.Context, c record.Container) error {
	return t.Tasks.EndProcesses(ctx, c.ID, c.Spec)
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

func (t task) Change(ctx context.Context, c container.Change) error {
	return t.Task.Change(ctx, runtime.Change(c))
}

func (t task) Exec(ctx context.Context, req container.ExecRequest) (container.Exec, error) {
	e, err := t.Task.Exec(ctx, req.ID, runtime.ExecRequest{Process: req.Process, IO: runtime.IO(req.IO), Score: req.Score, Spec: req.Spec})
	if err != nil {
		return nil, err // not a nil *Exec
	}
	return e, nil
}

// validate is cri.Validate.
type validate struct{ policy spec.Policy }

func (v validate) Pod(c *cri.PodSandboxConfig) (*cri.PodSandboxConfig, error) {
	c = spec.InNodeUserns(c, v.policy)
	if err := spec.ValidatePod(c); err != nil {
		return nil, err
	}
	return c, spec.CheckMappings(c, v.policy)
}

func (validate) Container(c *cri.ContainerConfig, pod, asked *cri.PodSandboxConfig) (*cri.ContainerConfig, error) {
	c = spec.InPodUserns(c, pod, asked)
	return c, spec.ValidateContainer(c, pod)
}

// withMounted mounts a root filesystem read-only for as long as fn runs. It
// sees nothing of the container's own mounts, and the owners of files as the
// image has them, also where the container is in a user namespace.
func withMounted(ctx context.Context, rootfs []mount.Mount, fn func(root string) error) error {
	plain := slices.Clone(rootfs)
	for i, m := range plain {
		plain[i].Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool {
			return strings.HasPrefix(o, "uidmap=") || strings.HasPrefix(o, "gidmap=")
		})
	}
	return mount.WithReadonlyTempMount(ctx, plain, fn)
}

// shims is sandbox.Shims.
type shims struct{ *runtime.Tasks }

func (s shims) EndSilent(ctx context.Context, sb record.Sandbox) error {
	// The processes first: they end also if the shim cannot be ended.
	if err := s.EndProcesses(ctx, sb.ID, sb.Instance.Spec); err != nil {
		return err
	}
	return s.Tasks.EndSilent(ctx, sb.ID)
}

// records is events.Records.
type records struct{ *store.Store }

func (r records) Sandbox(id string) (record.Sandbox, error) { return r.Sandboxes.Get(id) }

func (r records) ContainersOf(sandboxID string) []record.Container { return r.Containers.Of(sandboxID) }

// happenings is cri.Events.
type happenings struct{ *events.Hub }

func (h happenings) Follow(ctx context.Context, begun func() error, tell func(gcri.Event) error) error {
	s := h.Subscribe()
	defer s.Close()
	if err := begun(); err != nil {
		return err
	}
	for {
		e, err := s.Next(ctx)
		if err != nil {
			return err
		}
		if err := tell(gcri.Event(e)); err != nil {
			return err
		}
	}
}
