package lifecycle

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"reflect"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
	"github.com/gantry-cri/gantry/integration/registry"
)

// allowed lets an annotation have an effect for the handler under test, by which images
// are pulled, and for the one of pods with a pause process.
func allowed(annotation string) daemon.Option {
	return daemon.Edit(func(_ *daemon.Instance, c daemon.Config) {
		for _, handler := range []string{ownTable(), pausing} {
			c.Set([]string{annotation}, "plugins", daemon.RuntimePlugin, "containerd", "runtimes", handler, "allowed_annotations")
		}
	})
}

// saidToBeFor is an image that runs here and says that it is for another
// platform.
func saidToBeFor(t *testing.T, arch, variant string) v1.Image {
	t.Helper()
	img := images.MustBuild(images.Spec{Env: []string{"MADE_FOR=" + arch + variant}})
	file, err := img.ConfigFile()
	if err == nil {
		file = file.DeepCopy()
		file.Architecture, file.Variant = arch, variant
		img, err = mutate.ConfigFile(img, file)
	}
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestRTH_20_PlatformRuntimePaths: a container whose image is for a platform that
// has a runtime of its own is run by that one, and others are not.
func TestRTH_20_PlatformRuntimePaths(t *testing.T) {
	t.Parallel()
	const key = "io.gantry.image.platform"
	var emulator string
	d := start(t, allowed(key), daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		emulator = noting(filepath.Join(in.Dir, "noted"), "emulating-runc", inBin(t, "runc"))
		c.Set(emulator, "plugins", daemon.RuntimePlugin, "containerd", "runtimes", "runc", "platform_runtime_paths", "linux/arm64")
	}))
	idx, err := registry.Index(saidToBeFor(t, "arm64", ""), saidToBeFor(t, "amd64", ""))
	if err != nil {
		t.Fatal(err)
	}
	r := registry.StartT(t, registry.Options{})
	if _, err := r.PushIndex("multi", "1", idx); err != nil {
		t.Fatal(err)
	}
	p := runPaused(d, "platforms")
	b := &box{Daemon: d, t: t, pod: p.id, config: p.config}
	for _, arch := range []string{"amd64", "arm64"} {
		spec := &cri.ImageSpec{Image: r.Ref("multi:1"), Annotations: map[string]string{key: "linux/" + arch}}
		if _, err := d.Images().PullImage(t.Context(), &cri.PullImageRequest{Image: spec}); err != nil {
			t.Fatal(err)
		}
		c := daemon.ContainerConfig("on-"+arch, "")
		c.Image = spec
		id := b.run(c)
		if got := sh(d, id, "echo $MADE_FOR"); got != arch {
			t.Errorf("the container is %q", got)
		}
		b.stop(id, 0)
		for _, verb := range []string{"create", "start", "exec", "kill"} {
			if n := len(calls(t, emulator, verb)); (n > 0) != (arch == "arm64") {
				t.Errorf("%s: the runtime for arm64 was called %d times to %s", arch, n, verb)
			}
		}
	}
	if calls := calls(t, emulator, p.id); len(calls) != 0 {
		t.Errorf("the pause process is run by it: %q", calls)
	}
}

// TestRTH_21_InheritDefaultRuntime: a handler runs its pods with what it takes
// from the default one, and shows that.
func TestRTH_21_InheritDefaultRuntime(t *testing.T) {
	t.Parallel()
	var shim string
	d := start(t, runtimeKey("runc", "containerd", "default_runtime_name"), daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		shim = noting(filepath.Join(in.Dir, "noted"), "containerd-shim-noted-v2", "containerd-shim-runc-v2")
		c.Set(shim, "plugins", daemon.RuntimePlugin, "containerd", "runtimes", "runc", "runtime_path")
		c.Set(true, "plugins", daemon.RuntimePlugin, "containerd", "runtimes", "heir", "inherit_default_runtime")
	}))
	b := onHandler(t, d, "inherits", "heir")
	b.Exec(b.run(b.sleeper("app")), "true")
	if len(calls(t, shim, "-id "+b.pod, "start")) != 1 {
		t.Error("the pod has another shim than the default handler's")
	}
	resp, err := d.Runtime().Status(t.Context(), &cri.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct {
		Handlers map[string]struct {
			RuntimeType, RuntimePath string
			Options                  map[string]any
		}
	}
	if err := json.Unmarshal([]byte(resp.Info["config"]), &info); err != nil {
		t.Fatal(err)
	}
	if heir, def := info.Handlers["heir"], info.Handlers["runc"]; heir.RuntimePath != shim || !reflect.DeepEqual(heir, def) {
		t.Errorf("it is shown as %+v, the default one as %+v", heir, def)
	}
}

// TestCTR_05_ImagePlatform: a request names the platform whose image it wants of
// an index, and gets that one or an error that says which there are; pods that
// name none do not notice, and neither does a handler that does not allow it.
func TestCTR_05_ImagePlatform(t *testing.T) {
	t.Parallel()
	const key = "io.gantry.image.platform"
	d := start(t, allowed(key), daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		addHandler(in, c, "strict", nil)
	}))
	ours, arm, v2 := saidToBeFor(t, "amd64", ""), saidToBeFor(t, "arm64", ""), saidToBeFor(t, "amd64", "v2")
	idx, err := registry.Index(arm, ours, v2, saidToBeFor(t, "s390x", ""))
	if err != nil {
		t.Fatal(err)
	}
	r := registry.StartT(t, registry.Options{})
	if _, err := r.PushIndex("multi", "1", idx); err != nil {
		t.Fatal(err)
	}
	spec := func(platform, handler string) *cri.ImageSpec {
		return &cri.ImageSpec{Image: r.Ref("multi:1"), RuntimeHandler: handler, Annotations: map[string]string{key: platform, "other": "x"}}
	}
	pull := func(s *cri.ImageSpec) (string, error) {
		resp, err := d.Images().PullImage(context.Background(), &cri.PullImageRequest{Image: s})
		return resp.GetImageRef(), err
	}
	status := func(s *cri.ImageSpec) string {
		resp, err := d.Images().ImageStatus(context.Background(), &cri.ImageStatusRequest{Image: s})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetImage().GetId()
	}
	p := runPaused(d, "platforms")
	b := &box{Daemon: d, t: t, pod: p.id, config: p.config}
	// madeFor runs a container and says of what image it is.
	n := 0
	madeFor := func(s *cri.ImageSpec) string {
		n++
		c := daemon.ContainerConfig(fmt.Sprint("c", n), "", "sh", "-c", "printf $MADE_FOR")
		c.Image = s
		return b.output(c)
	}

	if id, err := pull(spec("linux/arm64", "")); err != nil || id != idOf(t, arm) {
		t.Fatalf("pulled %s, %v, want %s", id, err, idOf(t, arm))
	}
	if got := status(&cri.ImageSpec{Image: r.Ref("multi:1")}); got != "" {
		t.Errorf("a pod that names no platform is given %s", got)
	}
	if got := status(spec("linux/arm64", "")); got != idOf(t, arm) {
		t.Errorf("the status is %q", got)
	}
	if got := madeFor(spec("linux/arm64/v8", "")); got != "arm64" {
		t.Errorf("by its tag: %q", got)
	}
	if got := madeFor(&cri.ImageSpec{Image: idOf(t, arm)}); got != "arm64" {
		t.Errorf("by its ID: %q", got)
	}
	c := daemon.ContainerConfig("plain", r.Ref("multi:1"))
	b.refused(c, codes.NotFound, "not on this node")
	// A variant of the machine's own platform, beside the best one.
	for platform, want := range map[string]v1.Image{"": v2, "linux/amd64": ours, "linux/amd64/v2": v2} {
		s := spec(platform, "")
		if platform == "" {
			s.Annotations = nil
		}
		if id, err := pull(s); err != nil || id != idOf(t, want) {
			t.Errorf("%q: pulled %s, %v, want %s", platform, id, err, idOf(t, want))
		}
	}
	d.Restart()
	for platform, want := range map[string]string{"linux/arm64": "arm64", "linux/amd64": "amd64", "linux/amd64/v2": "amd64v2"} {
		if got := madeFor(spec(platform, "")); got != want {
			t.Errorf("after a restart %s is %q", platform, got)
		}
	}
	if got := madeFor(&cri.ImageSpec{Image: r.Ref("multi:1")}); got != "amd64v2" {
		t.Errorf("without a name it is %q", got)
	}

	offers := []string{"linux/riscv64", "there are linux/amd64, linux/amd64/v2, linux/arm64, linux/s390x"}
	_, err = pull(spec("linux/riscv64", ""))
	wantError(t, err, codes.NotFound, offers...)
	c.Image = spec("linux/riscv64", "")
	b.refused(c, codes.NotFound, offers...)
	c.Image = spec("linux/s390x", "")
	b.refused(c, codes.NotFound, "not on this node for platform linux/s390x")
	_, err = pull(spec("linux/a/b/c", ""))
	wantError(t, err, codes.InvalidArgument, "image.annotations", key, "linux/a/b/c")
	// The other handler does not allow it.
	if id, err := pull(spec("linux/s390x", "strict")); err != nil || id != idOf(t, v2) {
		t.Errorf("not allowed: pulled %s, %v", id, err)
	}
	if _, err := d.Images().RemoveImage(context.Background(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: idOf(t, arm)}}); err != nil {
		t.Error(err)
	}
	if got := status(spec("linux/arm64", "")); got != "" {
		t.Errorf("removed, and there is %q", got)
	}
}
