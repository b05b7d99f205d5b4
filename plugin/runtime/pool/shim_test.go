package pool

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	crt "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantry-cri/gantry/plugin/lifecycle"
)

const testNamespace = "test"

// emptyRuntime has no tasks.
type emptyRuntime struct{ crt.PlatformRuntime }

func (emptyRuntime) Get(context.Context, string) (crt.Task, error) { return nil, errdefs.ErrNotFound }

func (emptyRuntime) Delete(context.Context, string) (*crt.Exit, error) {
	return nil, errdefs.ErrNotFound
}

// openPool makes a pool over dir, in which an earlier daemon's bundles may be.
func openPool(t *testing.T, dir string) (*Pool, context.Context) {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), testNamespace)
	p, err := New(ctx, Options{
		Namespace: testNamespace, Stock: emptyRuntime{}, Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state"),
		New:        func(string, string) (crt.PlatformRuntime, error) { return emptyRuntime{}, nil },
		Background: lifecycle.New(ctx),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p, ctx
}

// fakeShim is a shim whose answers a test decides.
type fakeShim struct {
	api.TTRPCTaskService
	connect error
	// shutdown is what is done when it is asked to end.
	shutdown func() error
}

func (f *fakeShim) Connect(context.Context, *api.ConnectRequest) (*api.ConnectResponse, error) {
	return &api.ConnectResponse{}, f.connect
}

func (f *fakeShim) Delete(context.Context, *api.DeleteRequest) (*api.DeleteResponse, error) {
	return &api.DeleteResponse{}, nil
}

func (f *fakeShim) Shutdown(context.Context, *api.ShutdownRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, f.shutdown()
}

// overGRPC is the fake served over gRPC.
type overGRPC struct {
	api.UnimplementedTaskServer
	*fakeShim
}

func (o overGRPC) Connect(ctx context.Context, r *api.ConnectRequest) (*api.ConnectResponse, error) {
	return o.fakeShim.Connect(ctx, r)
}

func (o overGRPC) Delete(ctx context.Context, r *api.DeleteRequest) (*api.DeleteResponse, error) {
	return o.fakeShim.Delete(ctx, r)
}

func (o overGRPC) Shutdown(ctx context.Context, r *api.ShutdownRequest) (*emptypb.Empty, error) {
	return o.fakeShim.Shutdown(ctx, r)
}

// bundle makes what an earlier daemon has of a task, and returns the socket's
// listener.
func bundle(t *testing.T, dir, id, protocol string) net.Listener {
	t.Helper()
	path := filepath.Join(dir, "state", "1", testNamespace, id)
	if err := os.MkdirAll(path, 0o711); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, id+".sock")
	l := listen(t, socket)
	text, err := json.Marshal(map[string]any{"version": 3, "address": "unix://" + socket, "protocol": protocol})
	if err == nil {
		err = os.WriteFile(filepath.Join(path, "bootstrap.json"), text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// listen listens at path, in the place of who did so far.
func listen(t *testing.T, path string) net.Listener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path + ".new", Net: "unix"})
	if err == nil {
		l.SetUnlinkOnClose(false)
		t.Cleanup(func() { l.Close() })
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func serveShim(t *testing.T, l net.Listener, f *fakeShim) *ttrpc.Server {
	t.Helper()
	s, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	api.RegisterTTRPCTaskService(s, f)
	go func() { _ = s.Serve(context.Background(), l) }()
	t.Cleanup(func() { s.Close() })
	return s
}

func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not so: %s", what)
		}
	}
}

// While the bundles of an earlier daemon cannot be read, nobody knows that a task
// is not there.
func TestUnreadableGeneration(t *testing.T) {
	dir := t.TempDir()
	serveShim(t, bundle(t, dir, "task", "ttrpc"), &fakeShim{})
	bundles, aside := filepath.Join(dir, "state", "1", testNamespace), filepath.Join(dir, "aside")
	if err := os.Rename(bundles, aside); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bundles, nil, 0o600); err != nil { // no directory
		t.Fatal(err)
	}
	p, ctx := openPool(t, dir)
	if _, err := p.Get(ctx, "task"); !errdefs.IsUnavailable(err) {
		t.Errorf("get: %v, want unavailable", err)
	}
	if _, err := p.Delete(ctx, "task"); !errdefs.IsUnavailable(err) {
		t.Errorf("delete: %v, want unavailable", err)
	}
	// At once: a directory without the bundle could be read meanwhile.
	if err := unix.Renameat2(unix.AT_FDCWD, aside, unix.AT_FDCWD, bundles, unix.RENAME_EXCHANGE); err != nil {
		t.Fatal(err)
	}
	until(t, "the task is there", func() bool { _, err := p.Get(ctx, "task"); return err == nil })
	if _, err := p.Get(ctx, "another"); !errdefs.IsNotFound(err) {
		t.Errorf("get one that is not there: %v, want not found", err)
	}
}

// A shim that answers is not silent, whatever it says.
func TestConnectRefused(t *testing.T) {
	dir := t.TempDir()
	f := &fakeShim{connect: status.Error(codes.NotFound, "container not created"), shutdown: func() error { return nil }}
	serveShim(t, bundle(t, dir, "task", "ttrpc"), f)
	p, ctx := openPool(t, dir)
	if _, err := p.Get(ctx, "task"); err != nil {
		t.Errorf("get: %v", err)
	}
	if _, err := p.Delete(ctx, "task"); err != nil {
		t.Errorf("delete: %v", err)
	}
	if _, err := p.Get(ctx, "task"); !errdefs.IsNotFound(err) {
		t.Errorf("get after delete: %v, want not found", err)
	}
}

// A shim with gRPC that ends before it answers the request to end has done what
// it was asked.
func TestShutdownOverGRPC(t *testing.T) {
	dir := t.TempDir()
	l := bundle(t, dir, "task", "grpc")
	s := grpc.NewServer()
	f := &fakeShim{shutdown: func() error { go s.Stop(); select {} }}
	api.RegisterTaskServer(s, overGRPC{fakeShim: f})
	go func() { _ = s.Serve(l) }()
	p, ctx := openPool(t, dir)
	if _, err := p.Delete(ctx, "task"); err != nil {
		t.Errorf("delete: %v", err)
	}
	if _, err := p.Get(ctx, "task"); !errdefs.IsNotFound(err) {
		t.Errorf("get after delete: %v, want not found", err)
	}
}

// A connection that closes gives everything back, the pipe of the log too.
func TestReconnectLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	s := serveShim(t, bundle(t, dir, "task", "ttrpc"), &fakeShim{})
	p, ctx := openPool(t, dir)
	log := filepath.Join(dir, "state", "1", testNamespace, "task", "log")
	if _, err := p.Get(ctx, "task"); err != nil {
		t.Fatal(err)
	}
	before := pipes(t, log)
	for range 5 {
		old := p.recovered("task").current().conn // asked before it may be replaced
		// The next one listens before the last is gone: else that is dead.
		next := listen(t, filepath.Join(dir, "task.sock"))
		s.Close()
		s = serveShim(t, next, &fakeShim{})
		until(t, "the shim serves again", func() bool {
			now := p.recovered("task").current()
			return now.phase == serving && now.conn != old
		})
	}
	until(t, fmt.Sprintf("%d pipes of the log are open", before), func() bool { return pipes(t, log) == before })
}

// pipes counts the descriptors of this process that are open on path.
func pipes(t *testing.T, path string) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasSuffix(to, path) {
			n++
		}
	}
	return n
}
