package lifecycle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// soon is how long something may take that takes milliseconds on an idle
// machine.
var soon = daemon.Patience(45 * time.Second)

const poll = 20 * time.Millisecond

// shared returns the package's daemon, ready to run pods. Of stock containerd each test
// has its own: a pod that it cannot stop would be in the way of all later tests.
func shared(t *testing.T) *daemon.Daemon {
	t.Helper()
	if stock {
		return start(t)
	}
	return daemon.Shared(t)
}

// start returns a daemon of the test's own, ready to run pods.
func start(t *testing.T, opts ...daemon.Option) *daemon.Daemon {
	t.Helper()
	d := daemon.Start(t, options(opts...)...)
	withPause(t, d)
	return d
}

// withPause gives stock containerd the image of its pause container.
func withPause(t *testing.T, d *daemon.Daemon) {
	t.Helper()
	if !stock {
		return
	}
	fixtures.mu.Lock()
	defer fixtures.mu.Unlock()
	if _, err := d.Client().GetImage(namespaced(t.Context()), daemon.PauseImage); err == nil {
		return
	}
	images.Load(t, d.Client(), daemon.PauseImage, images.MustBuild(images.Spec{Entrypoint: []string{"sleep", "1000000"}}))
	// Its CRI service hears of the image, and would pull it until then.
	eventually(t, soon, func() error {
		have, err := d.Images().ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: daemon.PauseImage}})
		if err == nil && have.Image == nil {
			err = errors.New("the image of the pause container is not there")
		}
		return err
	})
}

// oursAlone skips a test of what only our daemon has. Others that ask for something of ours
// fail under stock containerd; these would wait for it for long.
func oursAlone(t *testing.T, what string) {
	t.Helper()
	if stock {
		t.Skip("stock containerd has no " + what)
	}
}

func namespaced(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, daemon.Namespace)
}

// fixtures is the registry that serves every image of the package.
var fixtures struct {
	mu       sync.Mutex
	registry *images.Registry
}

// image makes an image and has the daemon pull it, unless it has it already.
// Equal specs are one image.
func image(t *testing.T, d *daemon.Daemon, spec images.Spec) string {
	t.Helper()
	img := images.MustBuild(spec)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	fixtures.mu.Lock()
	defer fixtures.mu.Unlock()
	if fixtures.registry == nil {
		fixtures.registry = images.NewRegistry() // for as long as the tests run
	}
	ref, err := fixtures.registry.Put(t.Context(), "fixture/"+digest.Hex[:16]+":1", img)
	if err != nil {
		t.Fatal(err)
	}
	want := &cri.ImageSpec{Image: ref}
	have, err := d.Images().ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: want})
	if err != nil {
		t.Fatal(err)
	}
	if have.Image == nil {
		if _, err := d.Images().PullImage(t.Context(), &cri.PullImageRequest{Image: want}); err != nil {
			t.Fatal(err)
		}
	}
	return ref
}

// plain is the image without any peculiarity: busybox that sleeps.
func plain(t *testing.T, d *daemon.Daemon) string {
	t.Helper()
	return image(t, d, images.Spec{})
}

// eventually polls until check returns nil; the test fails with its last error
// when the time is over.
func eventually(t *testing.T, within time.Duration, check func() error) {
	t.Helper()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	deadline := time.Now().Add(within)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %v", within, err)
		}
		<-tick.C
	}
}

// wantError fails the test unless err has the gRPC code and all of the words. Stock
// containerd has codes and words of its own.
func wantError(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want %s with %q", code, words)
		return
	}
	if stock {
		return
	}
	s := status.Convert(err)
	if s.Code() != code {
		t.Errorf("code %s, want %s: %s", s.Code(), code, s.Message())
	}
	for _, w := range words {
		if !strings.Contains(s.Message(), w) {
			t.Errorf("%q is not in the error %q", w, s.Message())
		}
	}
}

// pod is a running pod with the configuration it was made from.
type pod struct {
	id     string
	config *cri.PodSandboxConfig
}

// runPod runs a pod after the configuration was edited.
func runPod(d *daemon.Daemon, name string, edits ...func(*cri.PodSandboxConfig)) pod {
	return runPodWith(d, "", name, edits...)
}

// pausing is the handler whose pods have a pause process, for tests that look at it
// or at its shim.
var pausing = map[bool]string{false: "runc", true: "gantry"}[stock && defaultHandler == "gantry"]

// runPaused is runPod for a pod with a pause process.
func runPaused(d *daemon.Daemon, name string, edits ...func(*cri.PodSandboxConfig)) pod {
	return runPodWith(d, pausing, name, edits...)
}

func runPodWith(d *daemon.Daemon, handler, name string, edits ...func(*cri.PodSandboxConfig)) pod {
	config := d.PodConfig(name)
	for _, edit := range edits {
		edit(config)
	}
	u := config.Linux.SecurityContext.NamespaceOptions.GetUsernsOptions()
	if stock && defaultHandler != "runc" && (handler == "" || handler == defaultHandler) && u != nil && u.Mode == cri.NamespaceMode_POD {
		handler = bareHandler
	}
	return pod{d.RunPodWith(config, handler), config}
}

// bareHandler is the one under test without options. Stock containerd takes these for
// runc's in a pod with a user namespace, and has only those of runc's shim as such.
const bareHandler = "bare"

func withBare(_ *daemon.Instance, c daemon.Config) {
	c.Set("io.containerd.gantry.v2", "plugins", daemon.RuntimePlugin, "containerd", "runtimes", bareHandler, "runtime_type")
}

func withBarePinned(in *daemon.Instance, c daemon.Config) {
	withBare(in, c)
	c.Set("shim", "plugins", daemon.RuntimePlugin, "containerd", "runtimes", bareHandler, "sandboxer")
}

// run starts a container in the pod and returns its ID.
func (p pod) run(d *daemon.Daemon, config *cri.ContainerConfig) string {
	return d.RunContainer(p.id, p.config, config)
}

// create makes a container and does not start it.
func (p pod) create(d *daemon.Daemon, config *cri.ContainerConfig) (string, error) {
	resp, err := d.Runtime().CreateContainer(context.Background(),
		&cri.CreateContainerRequest{PodSandboxId: p.id, Config: config, SandboxConfig: p.config})
	return resp.GetContainerId(), err
}

// withNamespaces sets the pod's namespace options.
func withNamespaces(o *cri.NamespaceOption) func(*cri.PodSandboxConfig) {
	return func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions = o }
}

// hostNetwork makes the pod one in the node's network.
func hostNetwork(c *cri.PodSandboxConfig) {
	c.Hostname = ""
	c.Linux.SecurityContext.NamespaceOptions.Network = cri.NamespaceMode_NODE
}

// inNamespaces is a container's configuration with namespace options.
func inNamespaces(config *cri.ContainerConfig, o *cri.NamespaceOption) *cri.ContainerConfig {
	config.Linux.SecurityContext.NamespaceOptions = o
	return config
}

// onHost is a container of a pod in the node's network.
func onHost(config *cri.ContainerConfig) *cri.ContainerConfig {
	config.Linux.SecurityContext.NamespaceOptions.Network = cri.NamespaceMode_NODE
	return config
}

// sh runs a shell script in a container and returns its output without the last
// newline. The script must succeed.
func sh(d *daemon.Daemon, container, script string) string {
	return strings.TrimSuffix(d.Exec(container, "sh", "-c", script), "\n")
}

// tryExec runs a command in a container and returns what it printed and its
// exit code.
func tryExec(t *testing.T, d *daemon.Daemon, container string, command ...string) (output string, code int32) {
	t.Helper()
	resp, err := d.Runtime().ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: container, Cmd: command, Timeout: 60})
	if err != nil {
		t.Fatalf("exec %q: %v", command, err)
	}
	return string(resp.Stdout) + string(resp.Stderr), resp.ExitCode
}

// podStatus is the status of a pod that must exist.
func podStatus(t *testing.T, d *daemon.Daemon, id string) *cri.PodSandboxStatus {
	t.Helper()
	resp, err := d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		t.Fatal(err)
	}
	return resp.Status
}

// containerStatus is the status of a container that must exist.
func containerStatus(t *testing.T, d *daemon.Daemon, id string) *cri.ContainerStatus {
	t.Helper()
	resp, err := d.Runtime().ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	return resp.Status
}

// waitExited waits until the container has exited and returns its status.
func waitExited(t *testing.T, d *daemon.Daemon, id string) *cri.ContainerStatus {
	t.Helper()
	var s *cri.ContainerStatus
	eventually(t, soon, func() error {
		if s = containerStatus(t, d, id); s.State != cri.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("container %s is %s", id, s.State)
		}
		return nil
	})
	return s
}

// stopContainer stops a container with a grace time in seconds.
func stopContainer(d *daemon.Daemon, id string, timeout int64) error {
	_, err := d.Runtime().StopContainer(context.Background(), &cri.StopContainerRequest{ContainerId: id, Timeout: timeout})
	return err
}

// removeContainer removes a container.
func removeContainer(d *daemon.Daemon, id string) error {
	_, err := d.Runtime().RemoveContainer(context.Background(), &cri.RemoveContainerRequest{ContainerId: id})
	return err
}

// stopPod stops a pod.
func stopPod(d *daemon.Daemon, id string) error {
	_, err := d.Runtime().StopPodSandbox(context.Background(), &cri.StopPodSandboxRequest{PodSandboxId: id})
	return err
}

// removePod removes a pod.
func removePod(d *daemon.Daemon, id string) error {
	_, err := d.Runtime().RemovePodSandbox(context.Background(), &cri.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}

// pidOf finds the first process of a task by containerd's own API: the one of
// a container, or of a pod that has a pause process.
func pidOf(t *testing.T, d *daemon.Daemon, id string) int {
	t.Helper()
	return int(taskAPI(t, d, id).Pid())
}

// begun waits until a process has become its own program, where it was the
// runtime's before: it is asked to begin, and does so after that was answered.
// The kernel changes the program first, then the credentials, and the
// environment last.
func begun(t *testing.T, pid int) {
	t.Helper()
	eventually(t, ample, func() error {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if err != nil {
			return err
		}
		if base := filepath.Base(exe); base == "runc" || strings.HasPrefix(exe, "/memfd:") || exe == "/" {
			return fmt.Errorf("process %d still runs %s", pid, exe)
		}
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err == nil && len(env) == 0 {
			err = fmt.Errorf("the kernel still sets up process %d", pid)
		}
		return err
	})
}

// alive reports whether the process exists and is no zombie.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	at := bytes.LastIndexByte(stat, ')')
	return err == nil && at >= 0 && at+2 < len(stat) && stat[at+2] != 'Z'
}

// waitGone waits until the process has ended.
func waitGone(t *testing.T, pid int) {
	t.Helper()
	eventually(t, soon, func() error {
		if alive(pid) {
			return fmt.Errorf("process %d still runs", pid)
		}
		return nil
	})
}

// nsOf is the identity of a process's namespace, "net:[4026531840]".
func nsOf(t *testing.T, pid any, kind string) string {
	t.Helper()
	ns, err := os.Readlink(fmt.Sprintf("/proc/%v/ns/%s", pid, kind))
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// cgroupFile is the path of a process's cgroup file: of the version 1
// controller where there is one, else of version 2.
func cgroupFile(t *testing.T, pid int, controller, name string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	unified := ""
	for line := range strings.Lines(string(text)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if f[0] == "0" {
			unified = f[2]
			continue
		}
		for c := range strings.SplitSeq(f[1], ",") {
			if c == controller {
				return filepath.Join("/sys/fs/cgroup", controller, f[2], name)
			}
		}
	}
	return filepath.Join("/sys/fs/cgroup", unified, name)
}

// cgroupPath is the path of a process's cgroup in its hierarchy.
func cgroupPath(t *testing.T, pid int, controller string) string {
	t.Helper()
	dir := filepath.Dir(cgroupFile(t, pid, controller, "x"))
	return strings.TrimPrefix(strings.TrimPrefix(dir, "/sys/fs/cgroup"), "/"+controller)
}

// readInt reads a file that holds one number.
func readInt(t *testing.T, path string) int64 {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return n
}
