package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/host"
	"github.com/gantry-cri/gantry/integration/images"
)

const testID = "feedfacefeedfacefeedfacefeedfacefeedfacefeedfacefeedfacefeedface"

// TestStartStopKill: the daemon serves after each way of ending it, with what
// it had before.
func TestStartStopKill(t *testing.T) {
	d := Start(t, NoCRI(), Env("GANTRY_HARNESS_TEST", "yes"))
	ctx := namespaces.WithNamespace(t.Context(), "harness")
	if err := d.Client().NamespaceService().Create(ctx, "harness", nil); err != nil {
		t.Fatal(err)
	}
	for name, end := range map[string]func(){"stop": d.Stop, "kill": d.Kill} {
		pid := d.PID()
		end()
		if d.PID() != 0 {
			t.Errorf("after %s the PID is %d", name, d.PID())
		}
		if _, err := d.Client().Version(t.Context()); err == nil {
			t.Errorf("it answers after %s", name)
		}
		d.Up()
		if d.PID() == pid {
			t.Errorf("the same process after %s", name)
		}
		if _, err := d.Client().NamespaceService().Labels(ctx, "harness"); err != nil {
			t.Errorf("after %s: %v", name, err)
		}
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", d.PID()))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(env), "GANTRY_HARNESS_TEST=yes") {
		t.Error("the daemon does not have the variable given to it")
	}
}

// TestBadConfig: a daemon that ends at once is told with its own words.
func TestBadConfig(t *testing.T) {
	needRoot(t)
	_, err := Launch(t.Context(), NoCRI(), Set("nonsense", "version"))
	if err == nil || !strings.Contains(err.Error(), "it ended") || !strings.Contains(err.Error(), "containerd:") {
		t.Errorf("got %v", err)
	}
}

// TestLeakIsReported: Close names what a daemon left.
func TestLeakIsReported(t *testing.T) {
	needRoot(t)
	in, err := Launch(t.Context(), NoCRI())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := in.Discard(); err != nil {
			t.Error(err)
		}
	})
	if err := os.MkdirAll(filepath.Join(in.State, "tasks", testID), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx := namespaces.WithNamespace(t.Context(), Namespace)
	if _, err := in.Client().LeasesService().Create(ctx, leases.WithID("forgotten")); err != nil {
		t.Fatal(err)
	}
	before, err := in.Scope().Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	leaks := strings.Join(host.Diff(in.before, before), "\n")
	for _, want := range []string{"file " + in.State + "/tasks/" + testID, "lease k8s.io/forgotten"} {
		if !strings.Contains(leaks, want) {
			t.Errorf("%q is not reported in %q", want, leaks)
		}
	}
	if err := os.WriteFile(in.path(raceLog+".1"), []byte("WARNING: DATA RACE"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := in.health(); err == nil || !strings.Contains(err.Error(), "DATA RACE") {
		t.Errorf("data race: %v", err)
	}
	if err := errors.Join(in.Kill(t.Context()), in.revive(t.Context())); err != nil {
		t.Errorf("a test may kill the daemon: %v", err)
	}
	if err := in.running().cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-in.running().ended
	if err := in.revive(t.Context()); err == nil || !strings.Contains(err.Error(), "ended by itself") {
		t.Errorf("a daemon that died: %v", err)
	}
}

// TestSweep: what a dead test leaves, the next daemon removes.
func TestSweep(t *testing.T) {
	needRoot(t)
	in, err := Launch(t.Context(), NoCRI())
	if err != nil {
		t.Fatal(err)
	}
	pid := in.PID()
	if err := in.slot.release(); err != nil { // as the kernel does when a test dies
		t.Fatal(err)
	}
	Start(t, NoCRI())
	if _, err := os.Stat(in.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its directory: %v", err)
	}
	<-in.running().ended
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its process: %v", err)
	}
}

// TestStockPod drives containerd's own CRI service through everything the
// harness offers, so that a failure of gantry's tests is gantry's.
func TestStockPod(t *testing.T) {
	d := Start(t, Stock())
	pause := images.MustBuild(images.Spec{Entrypoint: []string{"sleep", "1000000"}})
	images.Load(t, d.Client(), PauseImage, pause)
	ref := images.Serve(t).Push(t, "app:v1", images.MustBuild(images.Spec{Env: []string{"COLOUR=green"}}))
	if _, err := d.Images().PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Fatal(err)
	}

	config := d.PodConfig("web")
	pod := d.RunPod(config)
	ctr := d.RunContainer(pod, config, ContainerConfig("main", ref))
	if got := d.Exec(ctr, "sh", "-c", "echo $COLOUR; hostname"); got != "green\nweb\n" {
		t.Errorf("exec gave %q", got)
	}
	d.Kill()
	d.Up()
	rt, im := d.CRI()
	status, err := rt.PodSandboxStatus(t.Context(), pod, false)
	if err != nil {
		t.Fatal(err)
	}
	if ip := status.GetStatus().GetNetwork().GetIp(); !strings.HasPrefix(ip, "10.213.") {
		t.Errorf("pod address is %q", ip)
	}
	if _, err := im.ImageFsInfo(t.Context()); err != nil {
		t.Error(err)
	}
	state, err := d.Scope().Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Join(host.Diff(d.before, state), "\n")
	for _, want := range []string{"process ", "mount ", "cgroup ", "link ", "address ", "file ", "container k8s.io/" + pod, "snapshot overlayfs k8s.io/" + ctr} {
		if !strings.Contains(all, "left behind: "+want) {
			t.Errorf("of a running pod no %q is seen:\n%s", want, all)
		}
	}
}

// TestImport: an image goes in without a registry, unpacked.
func TestImport(t *testing.T) {
	d := Start(t, NoCRI())
	ref := "gantry.test/plain:1"
	if err := images.Import(t.Context(), d.Client(), ref, images.MustBuild(images.Spec{}), "overlayfs"); err != nil {
		t.Fatal(err)
	}
	ctx := namespaces.WithNamespace(context.Background(), Namespace)
	img, err := d.Client().GetImage(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := img.IsUnpacked(ctx, "overlayfs"); err != nil || !ok {
		t.Errorf("unpacked: %v, %v", ok, err)
	}
	if err := d.Client().ImageService().Delete(ctx, ref); err != nil {
		t.Fatal(err)
	}
}
