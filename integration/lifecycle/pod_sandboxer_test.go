package lifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/pkg/sys/reaper"
	"github.com/containerd/containerd/v2/plugins"
	runc "github.com/containerd/go-runc"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// The runc shim has no Sandbox API. This is it with one: its sandboxes are a
// process that holds the pod's namespaces. It is this test binary under another
// name, and then under its own with roleEnv.
const (
	sandboxShim    = "containerd-shim-sandboxed-v2"
	roleEnv        = "GANTRY_TEST_SHIM"
	sandboxHandler = "sandboxed"
)

func addSandboxHandler(in *daemon.Instance, c daemon.Config) {
	exe, err := os.Executable()
	must(err)
	must(os.MkdirAll(wrapDir(in.Dir), 0o755))
	path := filepath.Join(wrapDir(in.Dir), sandboxShim)
	must(os.Symlink(exe, path))
	addHandler(in, c, sandboxHandler, daemon.Config{"runtime_path": path, "sandboxer": "shim"})
}

// isSandboxShim tells whether this process is to be the shim.
func isSandboxShim() bool {
	return filepath.Base(os.Args[0]) == sandboxShim || os.Getenv(roleEnv) != ""
}

func sandboxShimMain() {
	must(os.Setenv(roleEnv, "yes"))
	registry.Register(&plugin.Registration{
		Type: plugins.TTRPCPlugin, ID: "sandbox",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			publisher, err := ic.GetByID(plugins.EventPlugin, "publisher")
			if err != nil {
				return nil, err
			}
			sd, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			s := &sandboxService{shutdown: sd.(shutdown.Service), ended: make(chan struct{})}
			s.tasks.TTRPCTaskService, err = task.NewTaskService(ic.Context, publisher.(shim.Publisher), s.shutdown)
			return s, err
		},
	})
	shim.RunShim(context.Background(), sandboxManager{manager.NewShimManager("io.containerd.runc.v2")})
}

// sandboxManager starts the shim for a bundle without a specification.
type sandboxManager struct{ shim.Shim }

func (m sandboxManager) Start(ctx context.Context, p *bootapi.BootstrapParams) (*bootapi.BootstrapResult, error) {
	if _, err := os.Stat("config.json"); os.IsNotExist(err) {
		must(os.WriteFile("config.json", []byte("{}"), 0o600))
	}
	return m.Shim.Start(ctx, p)
}

// tasks are the containers. The shim lives as its sandbox does, not as its last
// container.
type tasks struct{ taskapi.TTRPCTaskService }

func (tasks) Shutdown(context.Context, *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// sandboxService is one sandbox.
type sandboxService struct {
	tasks    tasks
	shutdown shutdown.Service

	mu        sync.Mutex
	id, netns string
	hostname  string
	pid       int
	createdAt time.Time
	exitedAt  time.Time
	ended     chan struct{}
}

func (s *sandboxService) RegisterTTRPC(server *ttrpc.Server) error {
	sandboxapi.RegisterTTRPCSandboxService(server, s)
	taskapi.RegisterTTRPCTaskService(server, s.tasks)
	return nil
}

func (s *sandboxService) CreateSandbox(_ context.Context, r *sandboxapi.CreateSandboxRequest) (*sandboxapi.CreateSandboxResponse, error) {
	var config cri.PodSandboxConfig
	if err := r.Options.UnmarshalTo(&config); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.id, s.netns, s.hostname = r.SandboxID, r.NetnsPath, config.Hostname
	return &sandboxapi.CreateSandboxResponse{}, nil
}

func (s *sandboxService) StartSandbox(context.Context, *sandboxapi.StartSandboxRequest) (*sandboxapi.StartSandboxResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	holder := exec.Command("/bin/busybox", "sh", "-c", `/bin/busybox hostname "$0" && exec /bin/busybox sleep 1000000`, s.hostname)
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWPID}
	exit, err := startIn(s.netns, holder)
	if err != nil {
		return nil, err
	}
	s.pid, s.createdAt = holder.Process.Pid, time.Now()
	go func() {
		_, _ = reaper.Default.Wait(holder, exit) // how it ended does not matter
		s.mu.Lock()
		defer s.mu.Unlock()
		s.exitedAt = time.Now()
		close(s.ended)
	}()
	return &sandboxapi.StartSandboxResponse{Pid: uint32(s.pid), CreatedAt: timestamppb.New(s.createdAt)}, nil
}

// startIn starts a command in a network namespace, and lets the shim's reaper
// wait for it.
func startIn(netns string, c *exec.Cmd) (exit chan runc.Exit, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err = func() error {
			ns, err := os.Open(netns)
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			exit, err = reaper.Default.Start(c)
			return err
		}()
	}()
	<-done
	return exit, err
}

func (s *sandboxService) Platform(context.Context, *sandboxapi.PlatformRequest) (*sandboxapi.PlatformResponse, error) {
	return &sandboxapi.PlatformResponse{Platform: &types.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}}, nil
}

func (s *sandboxService) StopSandbox(context.Context, *sandboxapi.StopSandboxRequest) (*sandboxapi.StopSandboxResponse, error) {
	s.mu.Lock()
	pid := s.pid
	s.mu.Unlock()
	if pid != 0 {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return nil, err
		}
		<-s.ended
	}
	return &sandboxapi.StopSandboxResponse{}, nil
}

func (s *sandboxService) WaitSandbox(ctx context.Context, _ *sandboxapi.WaitSandboxRequest) (*sandboxapi.WaitSandboxResponse, error) {
	select {
	case <-s.ended:
		s.mu.Lock()
		defer s.mu.Unlock()
		return &sandboxapi.WaitSandboxResponse{ExitStatus: 137, ExitedAt: timestamppb.New(s.exitedAt)}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *sandboxService) SandboxStatus(context.Context, *sandboxapi.SandboxStatusRequest) (*sandboxapi.SandboxStatusResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	state := cri.PodSandboxState_SANDBOX_READY
	if !s.exitedAt.IsZero() {
		state = cri.PodSandboxState_SANDBOX_NOTREADY
	}
	return &sandboxapi.SandboxStatusResponse{
		SandboxID: s.id, Pid: uint32(s.pid), State: state.String(),
		CreatedAt: timestamppb.New(s.createdAt), ExitedAt: timestamppb.New(s.exitedAt),
	}, nil
}

func (s *sandboxService) PingSandbox(context.Context, *sandboxapi.PingRequest) (*sandboxapi.PingResponse, error) {
	return &sandboxapi.PingResponse{}, nil
}

func (s *sandboxService) ShutdownSandbox(ctx context.Context, _ *sandboxapi.ShutdownSandboxRequest) (*sandboxapi.ShutdownSandboxResponse, error) {
	if _, err := s.StopSandbox(ctx, nil); err != nil {
		return nil, err
	}
	s.shutdown.Shutdown()
	return &sandboxapi.ShutdownSandboxResponse{}, nil
}

func (s *sandboxService) SandboxMetrics(context.Context, *sandboxapi.SandboxMetricsRequest) (*sandboxapi.SandboxMetricsResponse, error) {
	return &sandboxapi.SandboxMetricsResponse{Metrics: &types.Metric{}}, nil
}

func (s *sandboxService) UpdateSandbox(context.Context, *sandboxapi.UpdateSandboxRequest) (*sandboxapi.UpdateSandboxResponse, error) {
	return &sandboxapi.UpdateSandboxResponse{}, nil
}

// TestRTH_15_SandboxModes runs the same pod's life with a pause process and
// through the Sandbox API.
func TestRTH_15_SandboxModes(t *testing.T) {
	oursAlone(t, "pause program of its own")
	t.Parallel()
	d := start(t)
	for _, handler := range []string{pausing, sandboxHandler} {
		t.Run("handler "+handler, func(t *testing.T) {
			config := d.PodConfig("moded")
			config.Hostname = "moded-host"
			p := pod{d.RunPodWith(config, handler), config}
			one, two := p.run(d, daemon.ContainerConfig("one", plain(t, d))), p.run(d, daemon.ContainerConfig("two", plain(t, d)))
			ip := ipOf(t, d, p)
			if got := sh(d, one, "hostname; ip -4 -o addr show eth0 | grep -c "+ip+"/"); got != "moded-host\n1" {
				t.Errorf("hostname and address %s: %q", ip, got)
			}
			for _, kind := range []string{"net", "ipc", "uts"} {
				link := "readlink /proc/self/ns/" + kind
				if sh(d, one, link) != sh(d, two, link) || sh(d, one, link) == nsOf(t, "self", kind) {
					t.Errorf("%s namespaces are %s and %s", kind, sh(d, one, link), sh(d, two, link))
				}
			}
			if err := stopContainer(d, two, 0); err != nil {
				t.Error(err)
			}
			if err := removeContainer(d, two); err != nil {
				t.Error(err)
			}
			d.Kill()
			d.Up()
			if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_READY || s.Network.Ip != ip {
				t.Errorf("after a restart the pod is %v", s)
			}
			if got := sh(d, one, "echo here"); got != "here" {
				t.Errorf("exec after a restart gives %q", got)
			}
			p.run(d, daemon.ContainerConfig("three", plain(t, d)))
			endsWithItsProcess(t, d, p, one)
		})
	}
}

// endsWithItsProcess kills what holds the pod's namespaces, and removes the pod.
func endsWithItsProcess(t *testing.T, d *daemon.Daemon, p pod, ctr string) {
	t.Helper()
	resp, err := d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	holder := pidInfo(t, resp)
	program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", holder))
	if err != nil {
		t.Fatal(err)
	}
	if ours := filepath.Base(program) == "busybox"; ours != (resp.Status.RuntimeHandler == sandboxHandler) {
		t.Errorf("with handler %s the pod is held by %s", resp.Status.RuntimeHandler, program)
	}
	kill(t, holder)
	eventually(t, soon, func() error {
		if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
			return fmt.Errorf("without its process the pod is %s", s.State)
		}
		return nil
	})
	pid := pidOf(t, d, ctr)
	if err := stopPod(d, p.id); err != nil {
		t.Fatal(err)
	}
	waitGone(t, pid)
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, d)
}

// pidInfo is the process in the verbose part of a pod's status.
func pidInfo(t *testing.T, resp *cri.PodSandboxStatusResponse) int {
	t.Helper()
	pid := pidFrom(t, resp)
	if pid <= 1 {
		t.Fatalf("no process in %.500v", resp.Info)
	}
	return pid
}

// pidFrom is pidInfo of a pod that may have no process, 0 then.
func pidFrom(t *testing.T, resp *cri.PodSandboxStatusResponse) int {
	t.Helper()
	var info struct{ Pid *int }
	if err := json.Unmarshal([]byte(resp.Info["info"]), &info); err != nil || info.Pid == nil {
		t.Fatalf("no process in %.500v: %v", resp.Info, err)
	}
	return *info.Pid
}
