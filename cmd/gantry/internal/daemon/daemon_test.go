package daemon_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/cmd/gantry/internal/daemon"
	"github.com/gantry-cri/gantry/plugin/network"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/stdio/keeper"
)

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoadDefaults(t *testing.T) {
	l, err := daemon.Load(filepath.Join(t.TempDir(), "none.toml"))
	if err != nil {
		t.Fatal(err)
	}
	if l.Root != daemon.DefaultRoot || l.State != daemon.DefaultState || l.Address != daemon.DefaultAddress || l.NetNSDir != "/var/run/netns" {
		t.Errorf("got %+v", l)
	}
	if len(l.Networks) != 1 || l.Networks[0] != (daemon.NetworkDir{Path: "/etc/cni/net.d", Max: 1}) || !slices.Equal(l.BinDirs, []string{"/opt/cni/bin"}) {
		t.Errorf("networks %+v in %v", l.Networks, l.BinDirs)
	}
	if !slices.Contains(l.Runtimes, "runc") {
		t.Errorf("runtimes %v", l.Runtimes)
	}
	if !slices.Equal(l.Shims, []string{"containerd-shim-gantry-v2", "containerd-shim-runc-v2"}) || l.DefaultShim != "containerd-shim-gantry-v2" {
		t.Errorf("shims %v, by default %q", l.Shims, l.DefaultShim)
	}
	if got := l.OpsSocket(); got != "/run/containerd/io.containerd.grpc.v1.cri/gantry.sock" {
		t.Errorf("operations socket %s", got)
	}
	if got := l.KeeperSocket(); got != "/run/containerd/io.containerd.grpc.v1.cri/"+keeper.Socket {
		t.Errorf("keeper's socket %s", got)
	}
}

// What an old file says counts as much as what a new one does.
func TestLoad(t *testing.T) {
	for name, text := range map[string]string{
		"version 2": `version = 2
root = "/r"
state = "/s"
[grpc]
  address = "/a.sock"
[plugins."io.containerd.grpc.v1.cri"]
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    conf_dir = "/c"
    bin_dir = "/b"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.fast]
    runtime_type = "io.containerd.runc.v2"
    cni_conf_dir = "/c2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.fast.options]
      BinaryName = "/usr/bin/crun"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]
    runtime_type = "io.containerd.kata.v2"
`,
		"version 4": `version = 4
root = "/r"
state = "/s"
[plugins.'io.containerd.server.v1.grpc']
  address = "/a.sock"
[plugins.'io.containerd.cri.v1.runtime']
  netns_mounts_under_state_dir = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    conf_dir = "/c"
    bin_dirs = ["/b"]
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.fast]
    runtime_type = "io.containerd.runc.v2"
    cni_conf_dir = "/c2"
    options.BinaryName = "/usr/bin/crun"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]
    runtime_type = "io.containerd.kata.v2"
`} {
		l, err := daemon.Load(write(t, text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if l.Root != "/r" || l.State != "/s" || l.Address != "/a.sock" || l.NetNSDir != "/s/io.containerd.grpc.v1.cri/netns" {
			t.Errorf("%s: got %+v", name, l)
		}
		if len(l.Networks) != 2 || l.Networks[0].Path != "/c" || l.Networks[1].Path != "/c2" || !slices.Equal(l.BinDirs, []string{"/b"}) {
			t.Errorf("%s: networks %+v in %v", name, l.Networks, l.BinDirs)
		}
		if !slices.Contains(l.Runtimes, "/usr/bin/crun") || slices.Contains(l.Runtimes, "") {
			t.Errorf("%s: runtimes %q", name, l.Runtimes)
		}
	}
}

// The default network is one of the node's directory, for handlers too.
func TestLoadDefaultNetwork(t *testing.T) {
	l, err := daemon.Load(write(t, `version = 4
[plugins.'io.containerd.cri.v1.runtime']
  cni = {conf_dir = "/c", default_network = "blue"}
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes]
    all = {runtime_type = "io.containerd.runc.v2", cni_conf_dir = "/c", cni_max_conf_num = 3}
    other = {runtime_type = "io.containerd.runc.v2", cni_conf_dir = "/c2", cni_max_conf_num = 3}
`))
	want := []daemon.NetworkDir{{Path: "/c", Max: 1, Default: "blue"}, {Path: "/c", Max: 3, Default: "blue"}, {Path: "/c2", Max: 3}}
	if err != nil || !slices.Equal(l.Networks, want) {
		t.Errorf("networks %+v, %v", l.Networks, err)
	}
}

func TestLoadRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"not TOML":         "version =",
		"wrong":            "version = 4\n[plugins.'io.containerd.cri.v1.runtime']\nnonsense = 1",
		"import not there": "version = 4\nimports = ['gone.toml']",
	} {
		if l, err := daemon.Load(write(t, text)); err == nil {
			t.Errorf("%s: got %+v", name, l)
		}
	}
}

func TestAt(t *testing.T) {
	l := daemon.Layout{Root: "/r", State: "/s", Address: "/a", NetNSDir: "/var/run/netns"}
	if got := l.At("", "", ""); got.Root != "/r" || got.State != "/s" || got.Address != "/a" || got.NetNSDir != l.NetNSDir {
		t.Errorf("got %+v", got)
	}
	l.NetNSDir = l.PluginState() + "/netns"
	if got := l.At("/r2", "/s2", "/a2"); got.Root != "/r2" || got.State != "/s2" || got.Address != "/a2" || got.NetNSDir != "/s2/io.containerd.grpc.v1.cri/netns" {
		t.Errorf("got %+v", got)
	}
}

// The daemon's own package names the namespaces.
func TestNetNSPrefix(t *testing.T) {
	dir := t.TempDir()
	l := daemon.Layout{Root: filepath.Join(dir, "root"), NetNSDir: filepath.Join(dir, "netns")}
	nets, err := network.New(network.Config{
		NetNSDir: l.NetNSDir, ConfDir: filepath.Join(dir, "conf"), BinDirs: []string{dir},
		CacheDir: filepath.Dir(l.Attachments()),
	})
	if err != nil {
		t.Fatal(err)
	}
	if want, got := nets.NSPath("0123"), filepath.Join(l.NetNSDir, l.NetNSPrefix()+"0123"); got != want {
		t.Errorf("got %s, the daemon says %s", got, want)
	}
	if _, err := os.Stat(l.Attachments()); err != nil {
		t.Errorf("the daemon keeps attachments elsewhere: %v", err)
	}
}

// listen serves on a socket until the test ends.
func listen(t *testing.T, path string, serve func(net.Listener) error, stop func()) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = serve(l) // ends with stop
	}()
	t.Cleanup(func() {
		stop()
		<-done
	})
}

func serveOps(t *testing.T, path string, h http.Handler) {
	t.Helper()
	s := &http.Server{Handler: h}
	listen(t, path, s.Serve, func() { s.Close() })
}

func TestOps(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "ops.sock")
	var table operation.Table
	serveOps(t, socket, table.Handler())
	ctx, op := table.Begin(t.Context(), operation.Info{Name: "run", Object: "pod a/b", ID: "0123"})
	operation.Stage(ctx, "attach network")
	ops := daemon.NewOps(socket)
	got, err := ops.List(t.Context())
	if err != nil || len(got) != 1 || got[0].ID != "0123" || got[0].Stage != "attach network" {
		t.Errorf("got %+v, %v", got, err)
	}
	op.End()
	if got, err = ops.List(t.Context()); err != nil || got == nil || len(got) != 0 {
		t.Errorf("after its end: %+v, %v", got, err)
	}
	if stacks, err := ops.Stacks(t.Context()); err != nil || !strings.Contains(stacks, "TestOps") {
		t.Errorf("stacks: %v\n%s", err, stacks)
	}
}

func TestOpsNotThere(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead.sock")
	l, err := net.Listen("unix", dead)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	_, err = daemon.NewOps(dead).List(t.Context())
	if !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), "start it") {
		t.Errorf("dead daemon: %v", err)
	}
	_, err = daemon.NewOps(filepath.Join(dir, "none.sock")).List(t.Context())
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "--state") {
		t.Errorf("no socket: %v", err)
	}
	other := filepath.Join(dir, "other.sock")
	serveOps(t, other, http.NotFoundHandler())
	if _, err := daemon.NewOps(other).List(t.Context()); err == nil {
		t.Error("another server: no error")
	}
	odd := filepath.Join(dir, "odd.sock")
	serveOps(t, odd, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("{")) }))
	if _, err := daemon.NewOps(odd).List(t.Context()); err == nil {
		t.Error("an answer that is no list: no error")
	}
}

// runtime is a CRI server with two pods and a container.
type runtime struct {
	cri.UnimplementedRuntimeServiceServer
	listPods func() error
}

func (runtime) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{RuntimeName: "containerd", RuntimeVersion: "v2.4.2"}, nil
}

func (runtime) Status(context.Context, *cri.StatusRequest) (*cri.StatusResponse, error) {
	return &cri.StatusResponse{Status: &cri.RuntimeStatus{Conditions: []*cri.RuntimeCondition{{Type: "RuntimeReady", Status: true}}}}, nil
}

func (r runtime) ListPodSandbox(context.Context, *cri.ListPodSandboxRequest) (*cri.ListPodSandboxResponse, error) {
	return &cri.ListPodSandboxResponse{Items: []*cri.PodSandbox{{Id: "pod1"}, {Id: "pod2"}}}, r.listPods()
}

func (runtime) ListContainers(context.Context, *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	return &cri.ListContainersResponse{Containers: []*cri.Container{{Id: "container1"}}}, nil
}

func TestAskPods(t *testing.T) {
	dir := t.TempDir()
	l := daemon.Layout{State: dir, Address: filepath.Join(dir, "c.sock")}
	if _, err := daemon.AskPods(t.Context(), l); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no daemon: %v", err)
	}
	var fails error
	s := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(s, runtime{listPods: func() error { return fails }})
	listen(t, l.Address, s.Serve, s.Stop)

	p, err := daemon.AskPods(t.Context(), l)
	if err != nil || p.Partial == "" {
		t.Errorf("without operations: %+v, %v", p, err)
	}
	var table operation.Table
	_, op := table.Begin(t.Context(), operation.Info{Name: "run", ID: "pod3"})
	defer op.End()
	serveOps(t, l.OpsSocket(), table.Handler())
	l.Address = "unix://" + l.Address
	if p, err = daemon.AskPods(t.Context(), l); err != nil || p.Partial != "" || p.Version != "containerd v2.4.2" || len(p.Conditions) != 1 {
		t.Errorf("got %+v, %v", p, err)
	}
	for _, id := range []string{"pod1", "pod2", "pod3", "container1"} {
		if !p.IDs[id] {
			t.Errorf("%s is missing in %v", id, p.IDs)
		}
	}
	fails = errors.New("no list")
	if _, err := daemon.AskPods(t.Context(), l); err == nil {
		t.Error("a list that fails: no error")
	}
}
