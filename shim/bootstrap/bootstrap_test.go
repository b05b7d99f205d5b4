package bootstrap

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantry-cri/gantry/plugin/runtime/shimtest"
)

// bench calls the shim as containerd does, with no containerd there.
type bench struct {
	*shimtest.Env
	t    *testing.T
	env  []string
	ctx  context.Context
	shim string
	runc string
	// conns are those to supervisors, which stay for them.
	conns *[]*ttrpc.Client
}

func newBench(t *testing.T) bench {
	t.Helper()
	env := shimtest.New(t)
	shim, err := shimtest.BuildGantry(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	_, runc, err := shimtest.Binaries()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return bench{env, t, nil, ctx, shim, runc, &[]*ttrpc.Client{}}
}

// inBothWays runs a test with a supervisor as this kernel has it, and with an anchor.
func inBothWays(t *testing.T, test func(bench)) {
	t.Run("kernel", func(t *testing.T) { test(newBench(t)) })
	t.Run("anchor", func(t *testing.T) {
		b := newBench(t)
		b.env = []string{anchorEnv + "=1"}
		test(b)
	})
}

func (b bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b bench) bundle(id string) string {
	return filepath.Join(b.State, shimtest.Namespace, id)
}

// call runs the shim in a bundle.
func (b bench) call(id, action string, in []byte) []byte {
	b.t.Helper()
	cmd := exec.CommandContext(b.ctx, b.shim, "-namespace", shimtest.Namespace, "-address", b.GRPCAddress(), "-id", id, action)
	cmd.Dir, cmd.Stdin, cmd.Env = b.bundle(id), bytes.NewReader(in), append(os.Environ(), b.env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		b.t.Fatalf("%s: %v: %s", action, err, stderr.Bytes())
	}
	return out
}

// start makes a bundle and returns where its supervisor is.
func (b bench) start(id string, args ...string) string {
	b.t.Helper()
	spec, err := b.Spec(id, "", args...)
	b.must(err)
	b.must(os.MkdirAll(b.bundle(id), 0o711))
	b.must(os.WriteFile(filepath.Join(b.bundle(id), "config.json"), spec, 0o600))
	dir := filepath.Join(b.Dir, "s")
	in, err := proto.Marshal(&bootapi.BootstrapParams{
		InstanceID: id, Namespace: shimtest.Namespace, ContainerdGrpcAddress: b.GRPCAddress(), ContainerdTtrpcAddress: b.Address(), SocketDir: &dir,
	})
	b.must(err)
	var r bootapi.BootstrapResult
	b.must(proto.Unmarshal(b.call(id, "start", in), &r))
	if r.GetVersion() != 3 || r.GetProtocol() != "ttrpc" {
		b.t.Errorf("started as %v", &r)
	}
	return r.GetAddress()
}

func (b bench) connect(address string) api.TTRPCTaskService {
	b.t.Helper()
	return api.NewTTRPCTaskClient(b.dial(address))
}

func (b bench) dial(address string) *ttrpc.Client {
	b.t.Helper()
	s := supervisor{socket: strings.TrimPrefix(address, "unix://")}
	conn, err := s.dial()
	b.must(err)
	c := ttrpc.NewClient(conn)
	b.t.Cleanup(func() { c.Close() })
	*b.conns = append(*b.conns, c)
	return c
}

// run starts a container by the supervisor at an address.
func (b bench) run(address, id string) (pid uint32) {
	b.t.Helper()
	return b.runWith(address, &api.CreateTaskRequest{ID: id})
}

// runWith starts one that is created as asked.
func (b bench) runWith(address string, r *api.CreateTaskRequest) (pid uint32) {
	b.t.Helper()
	r.Bundle, r.Options = b.bundle(r.ID), b.options()
	c := b.connect(address)
	made, err := c.Create(b.ctx, r)
	b.must(err)
	_, err = c.Start(b.ctx, &api.StartRequest{ID: r.ID})
	b.must(err)
	return made.GetPid()
}

func (b bench) options() *anypb.Any {
	b.t.Helper()
	o, err := anypb.New(&options.Options{BinaryName: b.runc, Root: filepath.Join(b.Dir, "runc")})
	b.must(err)
	o.TypeUrl = strings.TrimPrefix(o.TypeUrl, "type.googleapis.com/")
	return o
}

func (b bench) delete(id string) *taskv2.DeleteResponse {
	b.t.Helper()
	var r taskv2.DeleteResponse
	b.must(proto.Unmarshal(b.call(id, "delete", nil), &r))
	b.must(os.RemoveAll(b.bundle(id)))
	return &r
}

// killSupervisor returns when it is dead.
func (b bench) killSupervisor(address string) {
	b.t.Helper()
	b.must(b.Signal(9))
	s := supervisor{socket: strings.TrimPrefix(address, "unix://")}
	for s.listens() && b.ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
}

// TestRTH_12_Adopted: the supervisor that comes after one that was killed takes
// over what runs: it goes on, and its end is told truly.
func TestRTH_12_Adopted(t *testing.T) { inBothWays(t, adopted) }

func adopted(b bench) {
	t := b.t
	address := b.start("a", "busybox", "sh", "-c", "trap 'exit 9' TERM; while :; do busybox sleep 0.05; done")
	pid := b.run(address, "a")
	b.start("gone", "busybox", "sh", "-c", "busybox sleep 0.5; exit 6")
	b.run(address, "gone")
	b.killSupervisor(address)
	if again := b.start("b", "busybox", "true"); again != address {
		t.Errorf("the next supervisor is at %s, the first at %s", again, address)
	}
	c := b.connect(address)
	s, err := c.State(b.ctx, &api.StateRequest{ID: "a"})
	if err != nil || s.GetStatus() != task.Status_RUNNING || s.GetPid() != pid {
		t.Fatalf("adopted: %v, %v; it was process %d", s, err, pid)
	}
	if _, err := c.Stats(b.ctx, &api.StatsRequest{ID: "a"}); err != nil {
		t.Errorf("stats: %v", err)
	}
	_, err = c.Kill(b.ctx, &api.KillRequest{ID: "a", Signal: 15})
	b.must(err)
	for id, code := range map[string]uint32{"a": 9, "gone": 6} {
		if r, err := c.Wait(b.ctx, &api.WaitRequest{ID: id}); err != nil || r.GetExitStatus() != code {
			t.Errorf("wait for %s: %v, %v; want %d", id, r, err, code)
		}
		if r, err := c.Delete(b.ctx, &api.DeleteRequest{ID: id}); err != nil || r.GetExitStatus() != code {
			t.Errorf("delete %s: %v, %v; want %d", id, r, err, code)
		}
	}
	for _, id := range []string{"a", "gone", "b"} {
		b.delete(id)
	}
}

// TestRTH_11_Deleted: after the death of the supervisor the shim's delete ends what
// runs, and tells how each ended that had: before it, and while nobody looked.
func TestRTH_11_Deleted(t *testing.T) { inBothWays(t, deleted) }

func deleted(b bench) {
	t := b.t
	address := b.start("runs", "busybox", "sleep", "1000")
	b.run(address, "runs")
	b.start("late", "busybox", "sh", "-c", "until busybox [ -e /proc/1/root/never ]; do busybox sleep 0.7; exit 5; done")
	pid := b.run(address, "late")
	b.start("early", "busybox", "sh", "-c", "exit 4")
	b.run(address, "early")
	_, err := b.connect(address).Wait(b.ctx, &api.WaitRequest{ID: "early"})
	b.must(err)
	b.killSupervisor(address)
	for b.ctx.Err() == nil {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid)); errors.Is(err, os.ErrNotExist) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for id, want := range map[string]uint32{"runs": 137, "late": 5, "early": 4} {
		if r := b.delete(id); r.GetExitStatus() != want || r.GetExitedAt() == nil {
			t.Errorf("delete of %s: %v, want code %d", id, r, want)
		}
	}
	if left, err := filepath.Glob(filepath.Join(b.Dir, "s", "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestRTH_11_DeletedMeanwhile: a supervisor that is killed may still take a connection
// while its other ones are closed. Whoever made that does what a dead one leaves to do.
func TestRTH_11_DeletedMeanwhile(t *testing.T) {
	b := newBench(t)
	address := b.start("runs", "busybox", "sleep", "1000")
	b.run(address, "runs")
	b.killSupervisor(address)
	socket := strings.TrimPrefix(address, "unix://")
	b.must(os.Remove(socket))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	b.must(err)
	l.SetUnlinkOnClose(false)
	go func() {
		if conn, err := l.Accept(); err == nil {
			l.Close()
			conn.Close()
		}
	}()
	if r := b.delete("runs"); r.GetExitStatus() != 137 || r.GetExitedAt() == nil {
		t.Errorf("delete: %v", r)
	}
	if left, err := filepath.Glob(filepath.Join(b.Dir, "s", "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestRTH_08_Refused: what this shim does not do it says, and leaves nothing.
func TestRTH_08_Refused(t *testing.T) {
	b := newBench(t)
	address := b.start("a", "busybox", "true")
	c := b.connect(address)
	for name, r := range map[string]*api.CreateTaskRequest{
		"restore": {ID: "a", Bundle: b.bundle("a"), Checkpoint: "/somewhere"},
		"scheme":  {ID: "a", Bundle: b.bundle("a"), Stdout: "npipe:///logger"},
	} {
		if _, err := c.Create(b.ctx, r); !errdefs.IsNotImplemented(errgrpc.ToNative(err)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, r := range map[string]*api.CreateTaskRequest{
		"id":      {ID: "../a", Bundle: b.bundle("a")},
		"options": {ID: "a", Bundle: b.bundle("a"), Options: &anypb.Any{TypeUrl: "no.such.Options"}},
	} {
		if _, err := c.Create(b.ctx, r); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(b.Dir, "s", "*.d", "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	b.delete("a")
}

// TestRTH_08_Info: the shim says what its OCI runtime can do.
func TestRTH_08_Info(t *testing.T) {
	_, runc, err := shimtest.Binaries()
	if err != nil {
		t.Fatal(err)
	}
	o, err := anypb.New(&options.Options{BinaryName: runc})
	if err != nil {
		t.Fatal(err)
	}
	o.TypeUrl = strings.TrimPrefix(o.TypeUrl, "type.googleapis.com/")
	in, err := proto.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	info, err := manager{}.Info(t.Context(), bytes.NewReader(in))
	if err != nil || info.GetName() != Name {
		t.Fatalf("%v, %v", info, err)
	}
	var f struct{ OCIVersionMin string }
	if err := json.Unmarshal(info.GetFeatures().GetValue(), &f); err != nil || f.OCIVersionMin == "" {
		t.Errorf("features: %v, %v", info.GetFeatures(), err)
	}
}
