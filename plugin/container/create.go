package container

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/undo"
)

// createTimeout ends a creation that hangs although each of its steps has a
// bound of its own. It is far longer than a client waits, because a retry joins.
const createTimeout = 15 * time.Minute

// Request asks for a container. Config has been checked.
type Request struct {
	SandboxID string
	Config    *cri.ContainerConfig
}

// Create makes the container and returns its ID. Requests for the same name and
// attempt in a pod share one creation, as with sandbox.Run.
func (s *Service) Create(ctx context.Context, req Request) (string, error) {
	sb, err := s.Sandboxes.Resolve(req.SandboxID)
	if err != nil {
		return "", err
	}
	key := record.ContainerKey{SandboxID: sb.ID, Name: req.Config.GetMetadata().GetName(), Attempt: req.Config.GetMetadata().GetAttempt()}
	id, err := s.creates.Do(ctx, key, func(ctx context.Context) (string, error) {
		ctx, op := s.Ops.Begin(ctx, operation.Info{Name: "create", Object: objectName(key)})
		defer op.End()
		ctx, cancel := context.WithTimeout(ctx, createTimeout)
		defer cancel()
		return s.createOnce(ctx, sb, key, req)
	})
	if err != nil && ctx.Err() != nil {
		if e, ok := s.Ops.Find("create", objectName(key)); ok {
			return "", fmt.Errorf("%w; the container is still being made and a retry joins: %s", err, e)
		}
	}
	return id, err
}

// createOnce settles what an earlier creation with the same key left, and
// creates.
func (s *Service) createOnce(ctx context.Context, sb record.Sandbox, key record.ContainerKey, req Request) (string, error) {
	old, found := s.Store.ByKey(key)
	switch {
	case !found:
	case old.Phase == record.ContainerCreated && proto.Equal(old.Config, req.Config):
		return old.ID, nil // an earlier client did not hear that it is done
	case old.Phase == record.ContainerCreating, old.Phase == record.ContainerExited && old.Spec == nil,
		// It has never run. A kubelet that did not hear of it asks for another:
		// the file it mounts for the termination message has a new name each time.
		old.Phase == record.ContainerCreated:
		operation.Stage(ctx, "release what an earlier creation left")
		if err := s.Remove(ctx, old.ID); err != nil {
			return "", fmt.Errorf("release what an earlier creation left: %w", err)
		}
	default:
		return "", fmt.Errorf("%s exists already, as %s: %w", objectName(key), old.ID, errdefs.ErrAlreadyExists)
	}
	c, err := s.create(ctx, sb, req)
	return c.ID, err
}

func (s *Service) create(ctx context.Context, sb record.Sandbox, req Request) (c record.Container, err error) {
	if err := s.admits(sb.ID); err != nil {
		return c, err
	}
	operation.Stage(ctx, "resolve image")
	img, err := s.Images.Resolve(ctx, req.Config.GetImage(), sb.Handler)
	if err != nil {
		return c, fmt.Errorf("resolve image: %w", err)
	}
	if img.Artifact != "" {
		return c, fmt.Errorf("config.image: %s is an artifact of type %s, no container image; it can be mounted as a volume: %w", img.Name, img.Artifact, errdefs.ErrFailedPrecondition)
	}
	c = record.Container{
		ID: record.NewID(), SandboxID: sb.ID, Config: req.Config, Handler: img.Handler, Image: img.Image,
		Phase: record.ContainerCreating, CreatedAt: time.Now(), LogPath: logPath(sb.Config, req.Config),
		Resources: req.Config.GetLinux().GetResources(),
	}
	c.Handler.Snapshotter = img.Snapshotter
	operation.From(ctx).SetID(c.ID)
	if err := s.Store.Create(ctx, c); err != nil {
		return c, err
	}
	u := &undo.Stack{}
	defer func() { err = s.settle(ctx, u, c, err) }()
	// Once more, now that a stop of the pod would find the container.
	if err := s.admits(sb.ID); err != nil {
		return c, err
	}
	operation.Stage(ctx, "prepare root filesystem")
	rootfs, err := s.Snapshots.Prepare(ctx, img.Snapshotter, c.ID, img.Parent, sb.UserNS())
	if err != nil {
		return c, fmt.Errorf("prepare root filesystem: %w", err)
	}
	declared, err := s.Specs.Volumes(c.Config, img.Config)
	if err != nil {
		return c, err
	}
	s.push(u, releaseVolumes, c)
	volumes, err := s.makeVolumes(ctx, sb, c, declared, rootfs)
	if err != nil {
		return c, err
	}
	operation.Stage(ctx, "generate specification")
	s.push(u, releaseFiles, c)
	spec, err := s.Specs.Container(ctx, SpecRequest{Container: c, Sandbox: sb, Image: img, Rootfs: rootfs, Volumes: volumes})
	if err != nil {
		return c, fmt.Errorf("generate specification: %w", err)
	}
	return s.prepared(ctx, u, sb, c, spec)
}

// prepared asks the plugins and commits the container.
func (s *Service) prepared(ctx context.Context, u *undo.Stack, sb record.Sandbox, c record.Container, spec Spec) (record.Container, error) {
	release := s.Plugins.Hold()
	defer release()
	if err := s.adjust(ctx, u, sb, c, &spec); err != nil {
		return c, err
	}
	operation.Stage(ctx, "commit record")
	created, err := s.Store.Move(ctx, c.ID, record.Prepared, func(r *record.Container) {
		r.Spec, r.User, r.Mounts, r.StopSignal = spec.JSON, spec.User, spec.Mounts, spec.StopSignal
	})
	if err != nil {
		return c, err // with its ID, for settle
	}
	s.tell(ctx, facts.ContainerCreated, created)
	return created, nil
}

// admits refuses a pod that is not ready.
func (s *Service) admits(sandboxID string) error {
	sb, err := s.Sandboxes.Get(sandboxID)
	if err != nil {
		return err
	}
	if sb.Phase != record.Ready {
		return fmt.Errorf("sandbox %s is %s: %w", sandboxID, sb.Phase, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// settle ends a failed creation as sandbox.settle ends a failed run.
func (s *Service) settle(ctx context.Context, u *undo.Stack, c record.Container, failure error) error {
	if failure == nil {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	operation.Stage(ctx, "release after a failure")
	left := u.Unwind(ctx)
	if left == nil {
		left = s.Store.Delete(ctx, c.ID)
	}
	if left == nil {
		return failure
	}
	log.G(ctx).WithField("container", c.ID).WithError(left).Warn("a failed creation left something; it will be tried again")
	if _, err := s.Store.Move(ctx, c.ID, record.Exited, failed(failure)); err != nil {
		log.G(ctx).WithField("container", c.ID).WithError(err).Error("record of a failed creation cannot be written")
	}
	s.Background.Go("release container "+c.ID, func(ctx context.Context) {
		lifecycle.Pause(ctx, retries.First)
		lifecycle.Retry(ctx, "release container "+c.ID, retries, func() error { return s.recoverOne(ctx, c.ID) })
	})
	return fmt.Errorf("%w (and releasing it: %w; container %s is kept as exited)", failure, left, c.ID)
}

// startErrorCode is the exit code of a container that never ran, the one the
// kubelet's other runtimes give.
const startErrorCode = 128

func failed(failure error) func(*record.Container) {
	return func(r *record.Container) {
		r.FinishedAt, r.ExitCode = time.Now(), startErrorCode
		r.Reason, r.Message = record.ReasonStartError, failure.Error()
	}
}

// logPath is where the container logs, "" when the pod or the container asks
// for no log.
func logPath(pod *cri.PodSandboxConfig, c *cri.ContainerConfig) string {
	if pod.GetLogDirectory() == "" || c.GetLogPath() == "" {
		return ""
	}
	return filepath.Join(pod.GetLogDirectory(), c.GetLogPath())
}
