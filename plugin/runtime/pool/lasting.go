package pool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/mount"
	crt "github.com/containerd/containerd/v2/core/runtime"
	v2 "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// A task that outlives its shim is a lasting one: the shim's program, started
// again, takes the task over. The end of the connection is then no sign of its
// death. The shim is started again, and the task dead only when the shim is there
// and does not know it, or when it could not be started for reviveLimit. Such a
// shim may be everybody's: all tasks have one connection.
//
// A shim says that its tasks last by resumesKey, in the annotations of its
// information, as that must be known before it is started, and in the metadata of
// its answer to a start, by which the daemon that comes next knows.
const resumesKey = "io.containerd.gantry.resumes"

func resumes(said map[string]string) bool { return said[resumesKey] == "true" }

// sharedKey is in that metadata too, of a shim that is for all pods of the same
// options: while one is connected to it, it need not be started for another.
const sharedKey = "io.containerd.gantry.shared"

const (
	// lastingDir is in the place of a daemon's number: no TaskManager takes a
	// lasting task for its own, so they need not be kept apart.
	lastingDir = "lasting"
	// optionsFile is in a bundle: the options that the shim was started with, for
	// the next start. Where none is needed, the shim finds them here.
	optionsFile = "options"
	// infoLimit is how long a shim may take to say what it is, and a shim that
	// fails to is asked again after infoPause.
	infoLimit = 30 * time.Second
	infoPause = time.Minute
	// reviveLimit is how long a shim may fail to start before its tasks are given
	// up.
	reviveLimit = time.Minute
	// startTries is how often a shim is started that has ended again before it was
	// connected to.
	startTries = 3
)

// startKey is what the answer to a start depends on, in one daemon and namespace.
type startKey struct{ binary, options string }

// runtimeAnswer is what a runtime said of itself.
type runtimeAnswer struct {
	resumes bool
	failed  time.Time // zero if it said it
}

// resumes asks a runtime whether its tasks last. One that does not tell what it is
// has none.
func (p *Pool) resumes(ctx context.Context, runtime string, options typeurl.Any) (bool, error) {
	p.mu.Lock()
	known, asked := p.runtimes[runtime]
	p.mu.Unlock()
	if asked && (known.failed.IsZero() || time.Since(known.failed) < infoPause) {
		return known.resumes, nil
	}
	limited, cancel := context.WithTimeout(ctx, infoLimit)
	defer cancel()
	said, err := p.PluginInfo(limited, &types.RuntimeRequest{RuntimePath: runtime, Options: typeurl.MarshalProto(options)})
	if ctx.Err() != nil {
		return false, fmt.Errorf("ask runtime %s what it is: %w", runtime, context.Cause(ctx))
	}
	answer := runtimeAnswer{}
	if info, ok := said.(*types.RuntimeInfo); ok && err == nil {
		answer.resumes = resumes(info.GetAnnotations())
	} else {
		answer.failed = time.Now()
		log.G(ctx).WithError(err).WithField("runtime", runtime).Debug("a runtime does not say what it is")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.runtimes[runtime] = answer
	return answer.resumes, nil
}

// lasts reports whether a task is to be a lasting one: as its pod is, or as the
// runtime says for one that gets a shim of its own.
func (p *Pool) lasts(ctx context.Context, opts crt.CreateOpts) (bool, error) {
	if opts.SandboxID == "" {
		return p.resumes(ctx, opts.Runtime, optionsOf(opts))
	}
	pod := p.podOf(opts.SandboxID)
	return pod != nil && pod.lasting, nil
}

// podOf is what is kept of a pod: a sandbox, or the task of its pause process.
func (p *Pool) podOf(id string) *shim {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.pods[id]; s != nil {
		return s
	}
	return p.shims[id]
}

func optionsOf(opts crt.CreateOpts) typeurl.Any {
	if opts.TaskOptions == nil || opts.TaskOptions.GetValue() == nil {
		return opts.RuntimeOptions
	}
	return opts.TaskOptions
}

// createLasting is Create for a lasting task.
func (p *Pool) createLasting(ctx context.Context, id string, opts crt.CreateOpts) (crt.Task, error) {
	if opts.RestoreFromPath {
		return nil, fmt.Errorf("restore task %s: a runtime whose tasks outlive it cannot: %w", id, errdefs.ErrNotImplemented)
	}
	bundle, err := v2.NewBundle(ctx, filepath.Join(p.Root, lastingDir), filepath.Join(p.State, lastingDir), id, opts.Spec)
	if err != nil {
		return nil, fmt.Errorf("make bundle: %w", err)
	}
	s := newShim(p, bundle, p.Root, lookup(opts.Runtime))
	s.lasting = true
	conn, err := s.begin(ctx, optionsOf(opts), opts.SandboxID)
	if err == nil {
		err = s.create(ctx, conn, opts)
	}
	if err != nil {
		s.abandon(ctx, conn)
		return nil, err
	}
	s.set(standing{phase: serving, conn: conn})
	s.register()
	p.Background.Go("keep shim of "+id, func(ctx context.Context) { s.keep(ctx, conn) })
	return &task{process{shim: s}}, nil
}

// begin connects to the shim of a new bundle: that of its pod, or one that is
// started. What the next daemon must know is written before.
func (s *shim) begin(ctx context.Context, options typeurl.Any, pod string) (*connection, error) {
	if s.binary == "" {
		return nil, fmt.Errorf("the program of the runtime is not there: %w", errdefs.ErrNotFound)
	}
	if err := s.write("shim-binary-path", []byte(s.binary)); err != nil {
		return nil, err
	}
	if options != nil {
		data, err := proto.Marshal(typeurl.MarshalProto(options))
		if err != nil {
			return nil, fmt.Errorf("encode options: %w: %w", errdefs.ErrInvalidArgument, err)
		}
		if err := s.write(optionsFile, data); err != nil {
			return nil, err
		}
	}
	if pod != "" {
		return s.join(ctx, pod)
	}
	return s.launch(ctx)
}

func (s *shim) write(name string, data []byte) error {
	return os.WriteFile(filepath.Join(s.bundle.Path, name), data, 0o600)
}

// join connects to the shim of a pod.
func (s *shim) join(ctx context.Context, id string) (*connection, error) {
	pod := s.pool.podOf(id)
	if pod == nil {
		return nil, fmt.Errorf("join the shim of sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	// If it is dead it is being started again.
	if _, err := pod.serving(ctx); err != nil {
		return nil, fmt.Errorf("join the shim of sandbox %s: %w", id, err)
	}
	data, err := os.ReadFile(filepath.Join(pod.bundle.Path, bootstrapFile))
	if err != nil {
		return nil, fmt.Errorf("join the shim of sandbox %s: %w", id, err)
	}
	params, err := parseBootstrap(data)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(s.write(podFile, []byte(id)), s.write(bootstrapFile, data)); err != nil {
		return nil, err
	}
	return s.open(ctx, params)
}

// launch starts the shim and connects to it. One that serves others is found, and
// may end in between when it does not any more. While there is a connection to the
// one that was started the same way, no program has to be run to find it.
func (s *shim) launch(ctx context.Context) (conn *connection, err error) {
	for range startTries {
		params, err := s.found()
		if err == nil && params == nil {
			params, err = s.start(ctx)
		}
		if err != nil {
			return nil, fmt.Errorf("start shim: %w", err)
		}
		conn, err = s.open(ctx, params)
		if err == nil || !errors.Is(err, errNobodyListens) {
			return conn, err
		}
	}
	return nil, fmt.Errorf("connect to the shim: %w: %w", errdefs.ErrUnavailable, err)
}

// found is where the shim listens, if that is connected to; nil if a start has to
// tell.
func (s *shim) found() (*bootapi.BootstrapResult, error) {
	options, err := s.options()
	if err != nil {
		return nil, err
	}
	s.pool.mu.Lock()
	params := s.pool.started[startKey{s.binary, string(options)}]
	s.pool.mu.Unlock()
	if params == nil || !s.pool.links.has(params.GetAddress()) {
		return nil, nil
	}
	return params, s.writeBootstrap(params)
}

// options are the encoded options of the shim, nil for none.
func (s *shim) options() ([]byte, error) {
	data, err := os.ReadFile(filepath.Join(s.bundle.Path, optionsFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return data, err
}

// start runs the program's start, which finds the shim or starts it, and writes
// down where it listens.
func (s *shim) start(ctx context.Context) (*bootapi.BootstrapResult, error) {
	options, err := s.options()
	if err != nil {
		return nil, err
	}
	id, err := s.instance()
	if err != nil {
		return nil, err
	}
	request, err := s.request(id, options)
	if err != nil {
		return nil, err
	}
	stopLog := copyLog(ctx, s.bundle.Path)
	defer stopLog()
	out, err := s.call(ctx, id, request, "start")
	if err != nil {
		return nil, err
	}
	r := &bootapi.BootstrapResult{}
	if err := proto.Unmarshal(out, r); err != nil {
		return nil, fmt.Errorf("read the shim's answer: %w: %w", errdefs.ErrDataLoss, err)
	}
	if !resumes(r.GetMetadata()) {
		return nil, fmt.Errorf("the shim says no more that its tasks outlive it: %w", errdefs.ErrFailedPrecondition)
	}
	if err := s.writeBootstrap(r); err != nil {
		return nil, err
	}
	if r.GetMetadata()[sharedKey] == "true" {
		s.pool.mu.Lock()
		defer s.pool.mu.Unlock()
		s.pool.started[startKey{s.binary, string(options)}] = r
	}
	return r, nil
}

// writeBootstrap writes down where the shim listens, if that can be read back.
func (s *shim) writeBootstrap(r *bootapi.BootstrapResult) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if _, err := parseBootstrap(data); err != nil {
		return err
	}
	next := filepath.Join(s.bundle.Path, "."+bootstrapFile)
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return err
	}
	return os.Rename(next, filepath.Join(s.bundle.Path, bootstrapFile))
}

// instance is for what the shim is started: a container's is its pod's.
func (s *shim) instance() (string, error) {
	pod, err := os.ReadFile(filepath.Join(s.bundle.Path, podFile))
	if errors.Is(err, os.ErrNotExist) {
		return s.bundle.ID, nil
	}
	return string(pod), err
}

// request is what a shim is told at its start.
func (s *shim) request(id string, options []byte) ([]byte, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	d := s.pool.Daemon
	r := &bootapi.BootstrapParams{
		InstanceID: id, Namespace: s.bundle.Namespace, ContainerdVersion: version.Version, ContainerdBinary: self,
		LogLevel:              bootapi.LogLevelFromString(log.GetLevel().String()),
		ContainerdGrpcAddress: d.GRPCAddress, ContainerdTtrpcAddress: d.TTRPCAddress,
	}
	if d.SocketDir != "" {
		r.SocketDir = &d.SocketDir
	}
	if options == nil {
		return proto.Marshal(r)
	}
	var a anypb.Any
	if err := proto.Unmarshal(options, &a); err != nil {
		return nil, fmt.Errorf("read options: %w: %w", errdefs.ErrDataLoss, err)
	}
	if err := r.AddExtension(&a); err != nil {
		return nil, err
	}
	return proto.Marshal(r)
}

// create has the shim make the task.
func (s *shim) create(ctx context.Context, conn *connection, opts crt.CreateOpts) error {
	rootfs, err := s.activate(ctx, opts.Rootfs)
	if err != nil {
		return fmt.Errorf("activate mounts: %w", err)
	}
	_, err = conn.api.Create(ctx, &api.CreateTaskRequest{
		ID: s.bundle.ID, Bundle: s.bundle.Path, Rootfs: mount.ToProto(rootfs), Checkpoint: opts.Checkpoint,
		Stdin: opts.IO.Stdin, Stdout: opts.IO.Stdout, Stderr: opts.IO.Stderr, Terminal: opts.IO.Terminal,
		Options: typeurl.MarshalProto(optionsOf(opts)),
	})
	if err != nil {
		return fmt.Errorf("create task in the shim: %w", native(err))
	}
	return nil
}

// activate has the mounts made that are the manager's, and returns those that are
// left to the shim.
func (s *shim) activate(ctx context.Context, rootfs []mount.Mount) ([]mount.Mount, error) {
	if s.pool.Mounts == nil {
		return rootfs, nil
	}
	info, err := s.pool.Mounts.Activate(ctx, s.bundle.ID, rootfs,
		mount.WithLabels(map[string]string{"containerd.io/gc.bref.container": s.bundle.ID}))
	if errdefs.IsAlreadyExists(err) {
		info, err = s.pool.Mounts.Info(ctx, s.bundle.ID)
	}
	if errdefs.IsNotImplemented(err) {
		return rootfs, nil // none is
	}
	return info.System, err
}

// abandon takes away what was made of a bundle. What cannot be taken away now is
// tried again.
func (s *shim) abandon(ctx context.Context, conn *connection) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), buryLimit)
	defer cancel()
	if conn != nil {
		if err := conn.close(); err != nil {
			log.G(ctx).WithError(err).WithField("task", s.bundle.ID).Warn("close the connection to the shim")
		}
	}
	s.set(standing{phase: dead})
	if s.bury(ctx, false, false) && ctx.Err() == nil {
		return
	}
	s.register()
	s.pool.Background.Go("clean up after "+s.bundle.ID, func(ctx context.Context) { s.run(ctx) })
}

func (s *shim) register() {
	s.pool.mu.Lock()
	defer s.pool.mu.Unlock()
	if s.pod {
		s.pool.pods[s.bundle.ID] = s
	} else {
		s.pool.shims[s.bundle.ID] = s
	}
}

// reach connects. A lasting shim that is dead is started again before.
func (s *shim) reach(ctx context.Context) (*connection, error) {
	conn, err := s.connect(ctx)
	if err == nil {
		s.lost = time.Time{}
	}
	if !s.lasting || !errors.Is(err, errNobodyListens) {
		return conn, err
	}
	params, err := readBootstrap(s.bundle.Path)
	if err != nil {
		return nil, err // it was never started
	}
	if err = s.revive(ctx, params); err == nil {
		if conn, err = s.connect(ctx); errors.Is(err, errNobodyListens) {
			return nil, fmt.Errorf("the shim has ended again: %w", errBroke)
		}
		return conn, err
	}
	if s.lost.IsZero() {
		s.lost = time.Now()
	}
	if time.Since(s.lost) < reviveLimit {
		return nil, fmt.Errorf("start the shim again: %w", err)
	}
	return nil, fmt.Errorf("start the shim again: %w: %w", errNobodyListens, err)
}

// revive starts a dead shim again. Of all its tasks that wait for it the first has
// it started.
func (s *shim) revive(ctx context.Context, params *bootapi.BootstrapResult) error {
	done, err := s.pool.revivals.Take(ctx, params.GetAddress())
	if err != nil {
		return err
	}
	defer done()
	if conn, err := knock(params.GetAddress()); err == nil {
		return conn.Close()
	}
	log.G(ctx).Warn("the shim is dead; starting it again")
	limited, cancel := context.WithTimeout(ctx, reviveLimit)
	defer cancel()
	_, err = s.start(limited)
	return err
}
