// Package shimtest is containerd's task runtime without a daemon, for tests
// that need real shims: metadata, events and TaskManager in this process, the
// runc shim and runc as they are built for a node.
//
// Each Env has directories, sockets, runc state and a control group of its own
// and leaves nothing behind; a test in which something is left fails. It needs
// root. Start reading at New.
package shimtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	events "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/containers"
	coreevents "github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/events/exchange"
	"github.com/containerd/containerd/v2/core/metadata"
	v2 "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Namespace is the containerd namespace of every Env.
const Namespace = "gantry-test"

// Env is a task runtime. Its fields are for reading.
type Env struct {
	// Dir holds everything; Root and State are the runtime's.
	Dir, Root, State string
	// Cgroup is the parent of every container's control group.
	Cgroup string
	// Events carries the shims' events.
	Events     *exchange.Exchange
	DB         *metadata.DB
	Containers containers.Store
	Sandboxes  sandbox.Store
	// Handler runs tasks with the runc shim.
	Handler record.Handler

	bolt *bolt.DB
}

// New returns an Env that ends with the test.
func New(t testing.TB) *Env {
	t.Helper()
	dir := Dir(t)
	e, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

// Dir returns a directory for an Env. When the test ends, nothing may be left of
// it.
func Dir(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	// A socket's path has 107 bytes; a test's directory takes them all.
	dir, err := os.MkdirTemp("", "gantry")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { noRemains(t, dir) })
	// Traversable, as a user namespace has to get through.
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Open returns the Env in dir, as a daemon does that finds its directories.
func Open(dir string) (*Env, error) {
	shim, runc, err := Binaries()
	if err != nil {
		return nil, err
	}
	e := &Env{
		Dir: dir, Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state"),
		Cgroup: "/" + filepath.Base(dir),
		Events: exchange.NewExchange(),
	}
	opts, err := typeurl.MarshalAny(&options.Options{BinaryName: runc, Root: filepath.Join(dir, "runc")})
	if err != nil {
		return nil, err
	}
	e.Handler = record.Handler{
		Name: "runc", Runtime: shim, Sandboxer: record.SandboxerPod,
		OptionsType: opts.GetTypeUrl(), Options: opts.GetValue(),
	}
	for _, d := range []string{e.Root, e.State, e.sockets()} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return nil, err
		}
	}
	if err := e.openStores(); err != nil {
		return nil, err
	}
	return e, e.serveEvents()
}

// Close gives back the metadata, as the end of a daemon does.
func (e *Env) Close() error { return e.bolt.Close() }

func (e *Env) sockets() string { return filepath.Join(e.Dir, "s") }

// Address is where the shims send their events.
func (e *Env) Address() string { return filepath.Join(e.Dir, "ttrpc.sock") }

// GRPCAddress is what the shims are told as the daemon's; nobody listens.
func (e *Env) GRPCAddress() string { return filepath.Join(e.Dir, "grpc.sock") }

func (e *Env) openStores() error {
	content, err := local.NewStore(filepath.Join(e.Dir, "content"))
	if err != nil {
		return err
	}
	e.bolt, err = bolt.Open(filepath.Join(e.Dir, "meta.db"), 0o600, &bolt.Options{Timeout: 10 * time.Second, NoSync: true})
	if err != nil {
		return err
	}
	e.DB = metadata.NewDB(e.bolt, content, nil)
	if err := e.DB.Init(context.Background()); err != nil {
		return err
	}
	e.Containers = metadata.NewContainerStore(e.DB)
	e.Sandboxes = metadata.NewSandboxStore(e.DB)
	return nil
}

func (e *Env) serveEvents() error {
	// A daemon that was killed leaves its socket.
	if err := os.Remove(e.Address()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", e.Address())
	if err != nil {
		return err
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	events.RegisterTTRPCEventsService(server, forwarder{e.Events})
	// It ends with the process: a shim may have events to tell at any time.
	go server.Serve(context.Background(), l)
	return nil
}

type forwarder struct{ exchange *exchange.Exchange }

func (f forwarder) Forward(ctx context.Context, r *events.ForwardRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, f.exchange.Forward(ctx, &coreevents.Envelope{
		Timestamp: protobuf.FromTimestamp(r.Envelope.Timestamp),
		Namespace: r.Envelope.Namespace,
		Topic:     r.Envelope.Topic,
		Event:     r.Envelope.Event,
	})
}

// Context carries the namespace and ends with the test.
func (e *Env) Context(t testing.TB) context.Context {
	return namespaces.WithNamespace(t.Context(), Namespace)
}

// Shims returns a new manager of the shims in this Env.
func (e *Env) Shims() (*v2.ShimManager, error) {
	return v2.NewShimManager(&v2.ManagerConfig{
		Store: e.Containers, SandboxStore: e.Sandboxes, Events: e.Events,
		Address: e.GRPCAddress(), TTRPCAddress: e.Address(), SocketDir: e.sockets(),
	})
}

// TaskManager returns containerd's runtime with the shims that are there.
func (e *Env) TaskManager(ctx context.Context) (*v2.TaskManager, error) {
	shims, err := e.Shims()
	if err != nil {
		return nil, err
	}
	return v2.NewTaskManager(ctx, e.Root, e.State, shims)
}

// Record writes the container record that the runtime asks for.
func (e *Env) Record(ctx context.Context, id string) error {
	spec, err := typeurl.MarshalAny(&specs.Spec{})
	if err != nil {
		return err
	}
	_, err = e.Containers.Create(ctx, containers.Container{
		ID: id, Spec: spec, Runtime: containers.RuntimeInfo{Name: e.Handler.Runtime},
	})
	return err
}

// Spec returns a specification of args, run with busybox as its root.
func (e *Env) Spec(id, sandboxID string, args ...string) ([]byte, error) {
	rootfs, err := e.rootfs()
	if err != nil {
		return nil, err
	}
	s := specs.Spec{
		Version: specs.Version,
		Process: &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}, NoNewPrivileges: true},
		Root:    &specs.Root{Path: rootfs, Readonly: true},
		Mounts:  []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
		Linux: &specs.Linux{
			CgroupsPath: e.Cgroup + "/" + id,
			Namespaces:  []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}},
		},
	}
	if sandboxID != "" {
		s.Annotations = map[string]string{"io.kubernetes.cri.sandbox-id": sandboxID}
	}
	return json.Marshal(s)
}

func (e *Env) rootfs() (string, error) {
	const busybox = "/bin/busybox" // the static one
	dir := filepath.Join(e.Dir, "rootfs")
	if err := os.MkdirAll(filepath.Join(dir, "bin"), 0o755); err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Join(dir, "proc"), 0o755); err != nil {
		return "", err
	}
	target := filepath.Join(dir, "bin", "busybox")
	if _, err := os.Stat(target); err == nil {
		return dir, nil
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		return "", fmt.Errorf("these tests need a static busybox: %w", err)
	}
	return dir, os.WriteFile(target, data, 0o755)
}

// ShimPids lists the shim processes of this Env.
func (e *Env) ShimPids() []int { return ShimPids(e.Dir) }

// RecordSandbox writes the sandbox record with which containers join a shim.
func (e *Env) RecordSandbox(ctx context.Context, id string) error {
	_, err := e.Sandboxes.Create(ctx, sandbox.Sandbox{ID: id, Runtime: sandbox.RuntimeOpts{Name: e.Handler.Runtime}})
	return err
}

// Signal sends a signal to every shim of this Env. After SIGSTOP it waits until
// they have stopped.
func (e *Env) Signal(signal unix.Signal) error {
	pids := e.ShimPids()
	if len(pids) == 0 {
		return fmt.Errorf("no shim to signal")
	}
	for _, pid := range pids {
		if err := Signal(pid, signal); err != nil {
			return err
		}
	}
	return nil
}

// Signal sends a signal to one shim. After SIGSTOP it waits until every thread
// of it has stopped.
func Signal(pid int, signal unix.Signal) error {
	if err := unix.Kill(pid, signal); err != nil {
		return fmt.Errorf("signal shim %d: %w", pid, err)
	}
	if signal != unix.SIGSTOP {
		return nil
	}
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !stopped(pid) {
		select {
		case <-tick.C:
		case <-deadline:
			return fmt.Errorf("shim %d does not stop", pid)
		}
	}
	return nil
}

func stopped(pid int) bool {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		return false
	}
	for _, file := range files {
		status, err := os.ReadFile(file)
		if err == nil && !strings.Contains(string(status), "\nState:\tT") {
			return false
		}
	}
	return true
}
