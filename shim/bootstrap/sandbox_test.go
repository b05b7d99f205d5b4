package bootstrap

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/anypb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/shim/oci"
)

func (b bench) sandboxes(address string) sandboxapi.TTRPCSandboxService {
	b.t.Helper()
	return sandboxapi.NewTTRPCSandboxClient(b.dial(address))
}

// sandbox runs a sandbox with the host's network, in which processes are shared or
// not.
func (b bench) sandbox(address, id string, pids cri.NamespaceMode) *sandboxapi.StartSandboxResponse {
	b.t.Helper()
	config, err := anypb.New(&cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{
		CgroupParent: "/" + filepath.Base(b.Dir), Sysctls: map[string]string{"kernel.msgmax": "9000"},
		SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: pids}},
	}})
	b.must(err)
	o, err := anypb.New(&options.Options{BinaryName: b.runc, Root: filepath.Join(b.Dir, "runc")})
	b.must(err)
	for _, a := range []*anypb.Any{config, o} {
		a.TypeUrl = strings.TrimPrefix(a.TypeUrl, "type.googleapis.com/")
	}
	b.must(oci.SaveOptions(b.bundle(id), o))
	c := b.sandboxes(address)
	_, err = c.CreateSandbox(b.ctx, &sandboxapi.CreateSandboxRequest{SandboxID: id, BundlePath: b.bundle(id), Options: config})
	b.must(err)
	r, err := c.StartSandbox(b.ctx, &sandboxapi.StartSandboxRequest{SandboxID: id})
	b.must(err)
	return r
}

func (b bench) state(address, id string) *sandboxapi.SandboxStatusResponse {
	b.t.Helper()
	r, err := b.sandboxes(address).SandboxStatus(b.ctx, &sandboxapi.SandboxStatusRequest{SandboxID: id, Verbose: true})
	b.must(err)
	return r
}

// TestRTH_12_SandboxAdopted: the supervisor that comes after one that was killed
// takes over sandboxes, of which nothing changes, and containers join them.
func TestRTH_12_SandboxAdopted(t *testing.T) { inBothWays(t, sandboxAdopted) }

func sandboxAdopted(b bench) {
	t := b.t
	address := b.start("apart", "busybox", "true")
	b.start("together", "busybox", "true")
	b.start("over", "busybox", "true")
	b.sandbox(address, "apart", cri.NamespaceMode_CONTAINER)
	holder := b.sandbox(address, "together", cri.NamespaceMode_POD).GetPid()
	b.sandbox(address, "over", cri.NamespaceMode_CONTAINER)
	_, err := b.sandboxes(address).StopSandbox(b.ctx, &sandboxapi.StopSandboxRequest{SandboxID: "over"})
	b.must(err)
	before := map[string]*sandboxapi.SandboxStatusResponse{}
	for _, id := range []string{"apart", "together", "over"} {
		before[id] = b.state(address, id)
	}
	b.killSupervisor(address)
	b.start("c", "busybox", "sh", "-c", "busybox cat /proc/sys/kernel/msgmax > /proc/1/cwd/out; exec busybox sleep 1000")
	for id, was := range before {
		now := b.state(address, id)
		if now.GetState() != was.GetState() || now.GetPid() != was.GetPid() || !now.GetCreatedAt().AsTime().Equal(was.GetCreatedAt().AsTime()) ||
			!now.GetExitedAt().AsTime().Equal(was.GetExitedAt().AsTime()) {
			t.Errorf("%s was %v and is %v", id, was, now)
		}
	}
	if before["together"].GetPid() != holder || holder == 0 || before["apart"].GetPid() != 0 || before["over"].GetState() != cri.PodSandboxState_SANDBOX_NOTREADY.String() {
		t.Errorf("holder %d, before %v", holder, before)
	}
	// A container of the pod without a process.
	b.must(os.WriteFile(filepath.Join(b.bundle("c"), "sandbox"), []byte("apart"), 0o600))
	spec, err := os.ReadFile(filepath.Join(b.bundle("c"), "config.json"))
	b.must(err)
	joined := strings.Replace(string(spec), `"namespaces":[`, `"namespaces":[{"type":"ipc","path":"/proc/0/ns/ipc"},{"type":"uts","path":"/proc/0/ns/uts"},`, 1)
	b.must(os.WriteFile(filepath.Join(b.bundle("c"), "config.json"), []byte(joined), 0o600))
	pid := b.run(address, "c")
	if in, want := link(t, fmt.Sprintf("/proc/%d/ns/ipc", pid)), before["apart"].GetInfo()["namespace.ipc"]; !samePlace(t, fmt.Sprintf("/proc/%d/ns/ipc", pid), want) || in == link(t, "/proc/self/ns/ipc") {
		t.Errorf("the container is in %s, pinned at %s", in, want)
	}
	if in := link(t, fmt.Sprintf("/proc/%d/ns/uts", pid)); in != link(t, "/proc/self/ns/uts") {
		t.Errorf("the container of a pod with the host's name is in %s", in)
	}
	// The end of an adopted holder is that of its sandbox.
	c := b.sandboxes(address)
	_, err = b.connect(address).Kill(b.ctx, &api.KillRequest{ID: "together-holder", Signal: 9})
	b.must(err)
	if r, err := c.WaitSandbox(b.ctx, &sandboxapi.WaitSandboxRequest{SandboxID: "together"}); err != nil || r.GetExitStatus() != 137 {
		t.Errorf("wait: %v, %v", r, err)
	}
	b.delete("c")
	for id := range before {
		_, err := c.ShutdownSandbox(b.ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: id})
		b.must(err)
		if _, err := c.WaitSandbox(b.ctx, &sandboxapi.WaitSandboxRequest{SandboxID: id}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
			t.Errorf("after its shutdown %s: %v", id, err)
		}
		b.delete(id)
	}
	b.empty()
}

// TestRTH_11_SandboxDeleted: after the death of the supervisor the shim's delete
// takes sandboxes away, with their holders.
func TestRTH_11_SandboxDeleted(t *testing.T) { inBothWays(t, sandboxDeleted) }

func sandboxDeleted(b bench) {
	t := b.t
	address := b.start("apart", "busybox", "true")
	b.start("together", "busybox", "true")
	b.sandbox(address, "apart", cri.NamespaceMode_CONTAINER)
	holder := b.sandbox(address, "together", cri.NamespaceMode_POD).GetPid()
	b.killSupervisor(address)
	for _, id := range []string{"apart", "together"} {
		b.delete(id)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/exe", holder)); err == nil {
		t.Errorf("holder %d is there", holder)
	}
	b.empty()
}

// empty lets the supervisor end and looks for what it left.
func (b bench) empty() {
	b.t.Helper()
	for _, c := range *b.conns {
		c.Close()
	}
	var left []string
	for b.ctx.Err() == nil {
		left = nil
		for _, pattern := range []string{"s/*", "gantry-*.root"} {
			found, err := filepath.Glob(filepath.Join(b.Dir, pattern))
			b.must(err)
			left = append(left, found...)
		}
		if len(left) == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	b.t.Errorf("left: %v", left)
}

func link(t *testing.T, path string) string {
	t.Helper()
	l, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func samePlace(t *testing.T, a, b string) bool {
	t.Helper()
	one, err := os.Stat(a)
	if err != nil {
		t.Fatal(err)
	}
	two, err := os.Stat(b)
	if err != nil {
		t.Fatal(err)
	}
	return os.SameFile(one, two)
}
