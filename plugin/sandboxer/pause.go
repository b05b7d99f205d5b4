package sandboxer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantry-cri/gantry/plugin/pause"
	"github.com/gantry-cri/gantry/plugin/record"
)

// Tasks runs a sandbox's own process. Each method takes the specification, or
// nil, for the control group that it names.
type Tasks interface {
	Watcher
	// Launch creates and starts the task of the sandbox.
	Launch(ctx context.Context, sb record.Sandbox, spec []byte) (pid uint32, err error)
	// Terminate kills every process of the task; absent is fine.
	Terminate(ctx context.Context, id string, spec []byte) error
	// Release takes the task and its shim away, whatever there is, and succeeds
	// only when no process is left.
	Release(ctx context.Context, id string, spec []byte) error
}

// Watcher tells how the process is.
type Watcher interface {
	// Running is an error only when nobody can tell.
	Running(ctx context.Context, id string) (bool, error)
	// Await blocks until the process has ended or ctx ends.
	Await(ctx context.Context, id string, spec []byte) (record.Exit, error)
}

// SpecFunc makes the specification of a sandbox's pause process, which is
// called as args, in the network namespace netns.
type SpecFunc func(sb record.Sandbox, netns string, args []string) (*specs.Spec, error)

// Pause runs a sandbox as a pause process in a task.
type Pause struct {
	tasks Tasks
	root  string
	spec  SpecFunc
}

// rootfsDir is the root filesystem of pause processes within the directory of
// NewPause.
const rootfsDir = "rootfs"

// Program is where NewPause puts the pause program below dir: one that sleeps
// until it is killed.
func Program(dir string) string { return filepath.Join(dir, rootfsDir, pause.Program) }

// NewPause unpacks the pause program below dir.
func NewPause(tasks Tasks, dir string, spec SpecFunc) (*Pause, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("unpack pause: %w", err)
	}
	// Nobody but root lists it; a runtime in a user namespace goes through.
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("unpack pause: %w", err)
	}
	p := &Pause{tasks: tasks, root: filepath.Join(dir, rootfsDir), spec: spec}
	if err := pause.Unpack(p.root); err != nil {
		return nil, err
	}
	return p, nil
}

// Start implements Sandboxer.
func (p *Pause) Start(ctx context.Context, sb record.Sandbox) (record.Instance, error) {
	spec, err := p.make(sb)
	if err != nil {
		return record.Instance{}, err
	}
	pid, err := p.tasks.Launch(ctx, sb, spec)
	if err != nil {
		return record.Instance{}, fmt.Errorf("run pause process: %w", err)
	}
	return record.Instance{Pid: pid, StartedAt: time.Now(), Spec: spec}, nil
}

// Wait implements Sandboxer.
func (p *Pause) Wait(ctx context.Context, sb record.Sandbox) (<-chan record.Exit, error) {
	running, err := p.tasks.Running(ctx, sb.ID)
	if err != nil {
		return nil, fmt.Errorf("watch pause process: %w", err)
	}
	spec := p.known(ctx, sb)
	if !running {
		// Ended and not yet taken away is answered below; lost is not there.
		soon, cancel := context.WithTimeout(ctx, queryLimit)
		defer cancel()
		exit, err := p.tasks.Await(soon, sb.ID, spec)
		if err != nil {
			return nil, fmt.Errorf("watch pause process: %w", err)
		}
		return delivered(exit), nil
	}
	// The goroutine lives as ctx does, or as the process.
	exits := make(chan record.Exit, 1)
	go func() {
		defer close(exits)
		exit, err := p.tasks.Await(ctx, sb.ID, spec)
		if errdefs.IsNotFound(err) && ctx.Err() == nil {
			exit, err = record.Exit{Code: lostCode, At: time.Now()}, nil
		}
		if err == nil {
			exits <- exit
		}
	}()
	return exits, nil
}

// Stop implements Sandboxer.
func (p *Pause) Stop(ctx context.Context, sb record.Sandbox) error {
	if err := p.tasks.Terminate(ctx, sb.ID, p.known(ctx, sb)); err != nil {
		return fmt.Errorf("stop pause process: %w", err)
	}
	return nil
}

// Shutdown implements Sandboxer.
func (p *Pause) Shutdown(ctx context.Context, sb record.Sandbox) error {
	if err := p.tasks.Release(ctx, sb.ID, p.known(ctx, sb)); err != nil {
		return fmt.Errorf("release pause process: %w", err)
	}
	return nil
}

// Alive implements Sandboxer.
func (p *Pause) Alive(ctx context.Context, sb record.Sandbox) (bool, error) {
	return p.tasks.Running(ctx, sb.ID)
}

// Namespaces implements Sandboxer. They are those of the process.
func (p *Pause) Namespaces(_ context.Context, sb record.Sandbox) (map[string]string, error) {
	paths := map[string]string{}
	for _, kind := range kinds {
		path := fmt.Sprintf("/proc/%d/ns/%s", sb.Instance.Pid, kind)
		ns, err := os.Readlink(path)
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil // it has ended, which is told otherwise
		}
		if err != nil {
			return nil, err
		}
		if host, err := os.Readlink("/proc/self/ns/" + kind); err != nil || ns == host {
			continue
		}
		paths[kind] = path
	}
	return paths, nil
}

// make returns the specification to start with.
func (p *Pause) make(sb record.Sandbox) ([]byte, error) {
	s, err := p.spec(sb, sb.Network.NetNS, []string{pause.Program})
	if err != nil {
		return nil, err
	}
	withRoot := *s
	withRoot.Root = &specs.Root{Path: p.root, Readonly: true}
	b, err := json.Marshal(&withRoot)
	if err != nil {
		return nil, fmt.Errorf("encode sandbox specification: %w: %w", errdefs.ErrInternal, err)
	}
	return b, nil
}

// known returns the specification that the sandbox was started with: of a
// start that was not committed, the one it would have had. Where none can be
// made any more, as when its handler left the configuration, the runtime's
// word has to do.
func (p *Pause) known(ctx context.Context, sb record.Sandbox) []byte {
	if len(sb.Instance.Spec) > 0 {
		return sb.Instance.Spec
	}
	spec, err := p.make(sb)
	if err != nil {
		log.G(ctx).WithError(err).WithField("sandbox", sb.ID).Warn("the cgroup of the pause process is not known")
		return nil
	}
	return spec
}

// lostCode stands for an end that nobody saw: that of SIGKILL.
const lostCode = 137

// delivered is the subscription to an end that was.
func delivered(exit record.Exit) <-chan record.Exit {
	exits := make(chan record.Exit, 1)
	exits <- exit
	close(exits)
	return exits
}
