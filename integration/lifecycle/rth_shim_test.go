package lifecycle

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	client "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// inBin finds a program among those that are built for the tests.
func inBin(t *testing.T, name string) string {
	t.Helper()
	dirs, err := daemon.BinDirs()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		path := filepath.Join(dir, name)
		if exists(path) {
			return path
		}
	}
	t.Fatalf("%s is not in %v: make integration builds it", name, dirs)
	return ""
}

// noting makes a script that runs the program and notes with what arguments,
// and to whom the output belongs that it was given.
func noting(dir, name, program string) (path string) {
	must(os.MkdirAll(dir, 0o755))
	path = filepath.Join(dir, name)
	must(os.WriteFile(path, fmt.Appendf(nil, "#!/bin/sh\necho \"$* output=$(stat -L -c %%u:%%g /proc/$$/fd/1)\" >>%s.calls\nexec %s \"$@\"\n", path, program), 0o755))
	return path
}

// calls are the command lines with which a noting script was run that have all
// of these words.
func calls(t *testing.T, path string, words ...string) (found []string) {
	t.Helper()
	text, err := os.ReadFile(path + ".calls")
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		have := strings.Fields(line)
		all := true
		for _, w := range words {
			all = all && strings.Contains(" "+strings.Join(have, " ")+" ", " "+w+" ")
		}
		if all {
			found = append(found, line)
		}
	}
	return found
}

// endpoint is where a pod's shim is reached, and how.
type endpoint struct {
	Version           int
	Address, Protocol string
}

// endpointOf reads what the daemon has kept of the shim's answer to its start.
func endpointOf(t *testing.T, d *daemon.Daemon, id string) (e endpoint) {
	t.Helper()
	if err := json.Unmarshal(bundleFile(t, d, id, "bootstrap.json"), &e); err != nil {
		t.Fatal(err)
	}
	return e
}

// bundleFile reads a file of a task's bundle.
func bundleFile(t *testing.T, d *daemon.Daemon, id, name string) []byte {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(d.State, "io.containerd.runtime.v2.task", map[bool]string{false: "*/*"}[stock], daemon.Namespace, id, name))
	if err != nil || len(found) != 1 {
		t.Fatalf("the bundle of %s has %v, %v", id, found, err)
	}
	text, err := os.ReadFile(found[0])
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// shimClient connects to a shim past the daemon.
func shimClient(t *testing.T, e endpoint) *ttrpc.Client {
	t.Helper()
	conn, err := client.AnonReconnectDialer(e.Address, soon)
	if err != nil {
		t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	t.Cleanup(func() { c.Close() })
	return c
}

// TestRTH_08_Bootstrap: a shim is asked about itself, started once per pod and
// called to clean up, and is spoken to in the version that it says.
func TestRTH_08_Bootstrap(t *testing.T) {
	t.Parallel()
	var shim string
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		shim = noting(filepath.Join(in.Dir, "noted"), "containerd-shim-noted-v2", "containerd-shim-runc-v2")
		addHandler(in, c, "noted", daemon.Config{"runtime_path": shim})
	}))
	eventually(t, soon, func() error {
		got, _ := handlers(t, d)
		if n := len(calls(t, shim, "-info")); n == 0 || !got["noted"].GetRecursiveReadOnlyMounts() {
			return fmt.Errorf("asked %d times: %v", n, got["noted"])
		}
		return nil
	})
	config := d.PodConfig("booted")
	hostNetwork(config)
	p := pod{d.RunPodWith(config, "noted"), config}
	ctr := p.run(d, onHost(daemon.ContainerConfig("main", plain(t, d))))
	if n := len(calls(t, shim, "start")); n != 1 || len(calls(t, shim, "-id "+p.id, "start")) != 1 {
		t.Errorf("the shim was started %d times", n)
	}
	e := endpointOf(t, d, p.id)
	if e.Version != 3 || e.Protocol != "ttrpc" || e != endpointOf(t, d, ctr) {
		t.Errorf("the shim is %+v, for the container %+v", e, endpointOf(t, d, ctr))
	}
	c := shimClient(t, e)
	resp, err := taskv3.NewTTRPCTaskClient(c).Connect(t.Context(), &taskv3.ConnectRequest{ID: ctr})
	if err != nil || int(resp.TaskPid) != pidOf(t, d, ctr) || int(resp.ShimPid) != parentOf(t, int(resp.TaskPid)) {
		t.Errorf("the shim says %v, %v", resp, err)
	}
	if _, err := taskv2.NewTTRPCTaskClient(c).Connect(t.Context(), &taskv2.ConnectRequest{ID: ctr}); status.Code(err) != codes.Unimplemented {
		t.Errorf("in version 2 it says %v", err)
	}
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	if len(calls(t, shim, "-id "+p.id, "delete")) == 0 {
		t.Error("the shim was not called to clean up")
	}
	if _, err := client.AnonReconnectDialer(e.Address, soon); err == nil {
		t.Error("somebody still listens for the pod")
	}
}

// TestRTH_08_OlderProtocol: the shim of containerd 1.7 speaks version 2 of the
// task API and answers a start with an address alone; it also serves a pod
// whose daemon was replaced.
func TestRTH_08_OlderProtocol(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		addHandler(in, c, "older", daemon.Config{"runtime_path": inBin(t, "shim1/containerd-shim-runc-v2")})
	}))
	config := d.PodConfig("older")
	p := pod{d.RunPodWith(config, "older"), config}
	one := p.run(d, daemon.ContainerConfig("one", plain(t, d)))
	e := endpointOf(t, d, p.id)
	if e.Version != 2 || e.Protocol != "ttrpc" {
		t.Errorf("the shim is %+v", e)
	}
	resp, err := taskv2.NewTTRPCTaskClient(shimClient(t, e)).Connect(t.Context(), &taskv2.ConnectRequest{ID: one})
	if err != nil || int(resp.TaskPid) != pidOf(t, d, one) {
		t.Errorf("the shim says %v, %v", resp, err)
	}
	d.Kill()
	d.Up()
	if got := sh(d, one, "echo on"); got != "on" {
		t.Errorf("exec after a restart gives %q", got)
	}
	two := p.run(d, daemon.ContainerConfig("two", plain(t, d), "sh", "-c", "echo out; exit 7"))
	if s := waitExited(t, d, two); s.ExitCode != 7 || logText(t, s.LogPath, "stdout") != "out\n" {
		t.Errorf("status %v, log %q", s, logText(t, s.LogPath, "stdout"))
	}
	if out, code := tryExec(t, d, one, "sh", "-c", "echo err >&2; exit 3"); out != "err\n" || code != 3 {
		t.Errorf("exec gives %q, code %d", out, code)
	}
	shim := parentOf(t, pidOf(t, d, one))
	if err := stopContainer(d, one, 0); err != nil {
		t.Error(err)
	}
	if s := waitExited(t, d, one); s.ExitCode != 137 {
		t.Errorf("stopped with code %d", s.ExitCode)
	}
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	waitGone(t, shim)
}

// TestRTH_19_RuntimePath: the shim of a handler is the program at the path, not
// the one that its type names.
func TestRTH_19_RuntimePath(t *testing.T) {
	t.Parallel()
	var path string
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		path = filepath.Join(in.Dir, "odd place", "some shim")
		must(os.MkdirAll(filepath.Dir(path), 0o755))
		text, err := os.ReadFile(inBin(t, "containerd-shim-runc-v2"))
		must(err)
		must(os.WriteFile(path, text, 0o755))
		addHandler(in, c, "placed", daemon.Config{"runtime_path": path})
		addHandler(in, c, "absent", daemon.Config{"runtime_path": path + "-less"})
	}))
	config := d.PodConfig("placed")
	hostNetwork(config)
	p := pod{d.RunPodWith(config, "placed"), config}
	ctr := p.run(d, onHost(daemon.ContainerConfig("main", plain(t, d))))
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", parentOf(t, pidOf(t, d, ctr))))
	if err != nil || exe != path {
		t.Errorf("the shim is %s, %v", exe, err)
	}
	d.Kill()
	d.Up()
	if got := sh(d, ctr, "echo on"); got != "on" {
		t.Errorf("exec after a restart gives %q", got)
	}
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
	_, err = d.StartPod(t.Context(), d.PodConfig("absent"), "absent")
	wantError(t, err, codes.Unknown, path+"-less")
	list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil || len(list.Items) != 0 {
		t.Errorf("left are %v, %v", list, err)
	}
}
