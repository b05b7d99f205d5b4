package sandbox

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/undo"
)

// Request asks for a sandbox. Config has been checked.
type Request struct {
	Config  *cri.PodSandboxConfig
	Handler string
}

// Run makes the sandbox and returns its ID once it is ready. Requests for the
// same pod attempt share one run, also with a client that comes back after it
// gave up; the run itself goes on without clients.
func (s *Service) Run(ctx context.Context, req Request) (string, error) {
	key := record.KeyOf(req.Config.GetMetadata())
	id, err := s.runs.Do(ctx, key, func(ctx context.Context) (string, error) {
		ctx, op := s.Ops.Begin(ctx, operation.Info{Name: "run", Object: objectName(key)})
		defer op.End()
		ctx, cancel := context.WithTimeout(ctx, runTimeout)
		defer cancel()
		return s.runOnce(ctx, key, req)
	})
	if err != nil && ctx.Err() != nil {
		if e, ok := s.Ops.Find("run", objectName(key)); ok {
			return "", fmt.Errorf("%w; the pod is still being made and a retry joins: %s", err, e)
		}
	}
	return id, err
}

// runOnce settles what an earlier run with the same key left, and runs.
func (s *Service) runOnce(ctx context.Context, key record.Key, req Request) (string, error) {
	old, found := s.Store.ByKey(key)
	switch {
	case !found:
	case old.Phase == record.Ready && proto.Equal(old.Config, req.Config):
		return old.ID, nil // an earlier client did not hear that it is done
	case old.Phase == record.Creating, old.Instance.StartedAt.IsZero():
		// A start that failed and could not release everything then.
		operation.Stage(ctx, "release what an earlier start left")
		if err := s.Remove(ctx, old.ID); err != nil {
			return "", fmt.Errorf("release what an earlier start left: %w", err)
		}
	default:
		return "", fmt.Errorf("%s exists already, as %s: %w", objectName(key), old.ID, errdefs.ErrAlreadyExists)
	}
	sb, err := s.run(ctx, req)
	return sb.ID, err
}

func (s *Service) run(ctx context.Context, req Request) (sb record.Sandbox, err error) {
	h, err := s.Handlers.Lookup(req.Handler)
	if err != nil {
		return sb, err
	}
	linux := req.Config.GetLinux()
	sb = record.Sandbox{
		ID: record.NewID(), Config: req.Config, Handler: h, Phase: record.Creating, CreatedAt: time.Now(),
		Overhead: linux.GetOverhead(), Resources: linux.GetResources(),
	}
	if sb.Handler, err = s.Handlers.Charge(sb); err != nil {
		return sb, err
	}
	operation.From(ctx).SetID(sb.ID)
	if sb.UserNS() != nil {
		operation.Stage(ctx, "ask the runtime for user namespaces")
		if err := s.Handlers.AdmitUserNS(ctx, h.Name); err != nil {
			return sb, err
		}
	}
	if !sb.HostNetwork() {
		// With the intent: what a start makes depends on it, and so does what
		// a recovery has to look for.
		sb.Network.NetNS = s.Network.NSPath(sb.ID)
		operation.Stage(ctx, "wait for the network")
		if err := s.Network.Await(ctx, sb); err != nil {
			return sb, err
		}
	}
	if err := s.record(ctx, &sb); err != nil {
		return sb, err
	}
	u := &undo.Stack{}
	defer func() { err = s.settle(ctx, u, sb, err) }()

	operation.Stage(ctx, "prepare files")
	s.push(u, releaseFiles, sb)
	if err := s.Files.Create(ctx, sb); err != nil {
		return sb, fmt.Errorf("prepare files: %w", err)
	}
	s.push(u, releaseUserNS, sb)
	s.push(u, releaseNetwork, sb)
	if err := s.makeNamespaces(ctx, sb); err != nil {
		return sb, err
	}
	s.push(u, releaseInstance, sb)
	if sb, err = s.connectAndStart(ctx, sb); err != nil {
		return sb, err
	}
	exit, err := s.Instances.Wait(s.Background.Context(), sb) // subscribed before the pod can be seen
	if err != nil {
		return sb, fmt.Errorf("watch sandbox: %w", err)
	}
	ready, err := s.commit(ctx, u, sb)
	if err != nil {
		return sb, err
	}
	s.watch(ready, exit)
	return ready, nil
}

// makeNamespaces pins the namespaces that are there before a process of the
// pod's is, at the paths that follow from its ID.
func (s *Service) makeNamespaces(ctx context.Context, sb record.Sandbox) error {
	if sb.UserNS() == nil {
		if sb.HostNetwork() {
			return nil
		}
		operation.Stage(ctx, "create network namespace")
		if _, err := s.Network.CreateNS(ctx, sb.ID); err != nil {
			return fmt.Errorf("create network namespace: %w", err)
		}
		return nil
	}
	operation.Stage(ctx, "create user namespace")
	var adopt func(netns string) error
	if !sb.HostNetwork() {
		adopt = func(netns string) error {
			_, err := s.Network.PinNS(ctx, sb.ID, netns)
			return err
		}
	}
	if err := s.UserNS.Create(ctx, sb, adopt); err != nil {
		return fmt.Errorf("create user namespace: %w", err)
	}
	return nil
}

// record gives the sandbox its labels, which no other pod has on record, and
// commits the intent.
func (s *Service) record(ctx context.Context, sb *record.Sandbox) (err error) {
	defer s.Labels.Settled(sb.ID)
	if sb.Labels, err = s.Labels.Allocate(*sb); err != nil {
		return err
	}
	return s.Store.Create(ctx, *sb)
}

// connectAndStart attaches the network and starts the instance side by side:
// both need the namespace and neither needs the other.
func (s *Service) connectAndStart(ctx context.Context, sb record.Sandbox) (record.Sandbox, error) {
	operation.Stage(ctx, "attach network, start sandbox")
	var net record.Network
	var inst record.Instance
	// A network that hangs must not outlive an instance that failed, while
	// an instance, which starts in milliseconds, is let finish.
	g, either := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		if sb.HostNetwork() {
			return nil
		}
		if net, err = s.Network.Attach(either, sb); err != nil {
			return fmt.Errorf("attach network: %w", err)
		}
		return nil
	})
	g.Go(func() (err error) {
		if inst, err = s.Instances.Start(ctx, sb); err != nil {
			return fmt.Errorf("start sandbox: %w", err)
		}
		operation.Stage(ctx, "attach network") // what is left, if anything
		return nil
	})
	if err := g.Wait(); err != nil {
		return sb, err
	}
	sb.Network, sb.Instance = net, inst
	return sb, nil
}

// settle ends a failed run: all released, the record goes too; something left,
// the record stays as NotReady for the client, and us, to finish.
func (s *Service) settle(ctx context.Context, u *undo.Stack, sb record.Sandbox, failure error) error {
	if failure == nil {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	operation.Stage(ctx, "release after a failure")
	left := u.Unwind(ctx)
	if left == nil {
		left = s.Store.Delete(ctx, sb.ID)
	}
	if left == nil {
		return failure
	}
	log.G(ctx).WithField("sandbox", sb.ID).WithError(left).Warn("a failed start left something; stopping the pod retries")
	if _, err := s.Store.Move(ctx, sb.ID, record.Stopped, func(r *record.Sandbox) { r.Reason = failure.Error() }); err != nil {
		log.G(ctx).WithField("sandbox", sb.ID).WithError(err).Error("record of a failed start cannot be written")
	}
	s.later(sb.ID)
	return fmt.Errorf("%w (and releasing it: %w; sandbox %s is kept as not ready)", failure, left, sb.ID)
}
