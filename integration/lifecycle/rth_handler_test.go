package lifecycle

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// Handlers of the shared daemon alone.
const (
	// annotatedHandler lets some annotations through and has some of its own.
	annotatedHandler = "annotated"
	// boundedHandler has createTime to create a container. Its shim and its
	// runtime wait as those of slowHandler do.
	boundedHandler = "bounded"
	// untrustedHandler is found by an annotation.
	untrustedHandler = "untrusted"
)

// createTime is more than a create takes on a busy machine.
var createTime = daemon.Patience(15 * time.Second)

func boundedDir(dir string) string { return filepath.Join(wrapDir(dir), boundedHandler) }

func addSharedHandlers(in *daemon.Instance, c daemon.Config) {
	if stock {
		return // it does not know all of these keys
	}
	addHandler(in, c, annotatedHandler, daemon.Config{
		"disable_pause_image_pull": true,
		"pod_annotations":          []string{"pod.test/*", "exact"},
		"container_annotations":    []string{"ctr.test/*", "exact.ctr"},
		"default_annotations":      map[string]string{"own.test/kept": "handler", "pod.test/changed": "handler", "ctr.test/changed": "handler"},
	})
	dir := boundedDir(in.Dir)
	must(os.MkdirAll(dir, 0o755))
	addHandler(in, c, boundedHandler, daemon.Config{
		"container_create_timeout": createTime.String(),
		"runtime_path":             writeWrapper(dir, "containerd-shim-bounded-v2", "containerd-shim-runc-v2", shimStart),
		"options":                  in.RuncOptions(daemon.Config{"BinaryName": writeWrapper(dir, "bounded-runc", "runc", runcCreate)}),
	})
	addHandler(in, c, untrustedHandler, nil)
}

// TestRTH_04_UserNamespacesHostNetwork: the feature is there, and true.
func TestRTH_04_UserNamespacesHostNetwork(t *testing.T) {
	t.Parallel()
	b := newUserBox(t, hostNetwork)
	if _, features := handlers(t, b.Daemon); !features.GetUserNamespacesHostNetwork() {
		t.Errorf("features are %v", features)
	}
	pid := b.begun(b.run(b.sleeper("app")))
	if nsOf(t, pid, "net") != nsOf(t, "self", "net") || nsOf(t, pid, "user") == nsOf(t, "self", "user") {
		t.Errorf("network %s, users %s", nsOf(t, pid, "net"), nsOf(t, pid, "user"))
	}
}

// TestRTH_05_MountOptions: the feature is there, and true.
func TestRTH_05_MountOptions(t *testing.T) {
	t.Parallel()
	b := newBox(t, hostNetwork)
	if _, features := handlers(t, b.Daemon); !features.GetMountOptions() {
		t.Errorf("features are %v", features)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "script"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	c := onHost(b.sleeper("app"))
	c.Mounts = []*cri.Mount{
		{HostPath: dir, ContainerPath: "/exec"},
		{HostPath: dir, ContainerPath: "/noexec", MountOptions: []string{"noexec"}},
	}
	id := b.run(c)
	for path, want := range map[string]bool{"/exec": true, "/noexec": false} {
		if out, code := tryExec(t, b.Daemon, id, "sh", "-c", path+"/script"); (code == 0) != want {
			t.Errorf("%s: code %d, %q", path, code, out)
		}
	}
}

// TestRTH_17_NoPauseImage: pods run without a pause image, whether a handler asks
// for that or not; there is none, and none is looked for.
func TestRTH_17_NoPauseImage(t *testing.T) {
	t.Parallel()
	d := shared(t)
	for _, handler := range []string{pausing, annotatedHandler} {
		config := d.PodConfig("pauses")
		hostNetwork(config)
		id := d.RunPodWith(config, handler)
		c, err := d.Client().LoadContainer(namespaced(t.Context()), id)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := c.Info(namespaced(t.Context())); err != nil || info.Image != "" || info.SnapshotKey != "" {
			t.Errorf("the pod's process is from image %q, snapshot %q, %v", info.Image, info.SnapshotKey, err)
		}
	}
	list, err := d.Images().ListImages(t.Context(), &cri.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, image := range list.Images {
		if strings.Contains(fmt.Sprint(image.RepoTags, image.RepoDigests), "pause") {
			t.Errorf("there is a pause image: %v", image)
		}
	}
	status, err := d.Runtime().Status(t.Context(), &cri.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range status.Status.Conditions {
		if strings.Contains(c.Message, "disable_pause_image_pull") {
			t.Errorf("the key is warned about: %s", c.Message)
		}
	}
	if strings.Contains(d.Tail(1<<20), "registry.k8s.io") {
		t.Error("the log has the name of the registry that has pause images")
	}
}

// TestRTH_22_CreateTimeout: a runtime that hangs in its create is ended when the
// handler's time is over, and what it began to make is taken back.
func TestRTH_22_CreateTimeout(t *testing.T) {
	t.Parallel()
	d := shared(t)
	config := d.PodConfig("bounded")
	hostNetwork(config)
	p := pod{d.RunPodWith(config, boundedHandler), config}
	hangs, err := p.create(d, onHost(daemon.ContainerConfig("hangs", plain(t, d))))
	if err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{runcCreate, shimStart} {
		if err := os.WriteFile(filepath.Join(boundedDir(d.Dir), "stall-"+verb), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	begun, pod := time.Now(), make(chan error, 1)
	hung := d.PodConfig("hangs")
	hostNetwork(hung)
	go func() {
		_, err := d.StartPod(t.Context(), hung, boundedHandler)
		pod <- err
	}()
	_, err = d.Runtime().StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: hangs})
	wantError(t, err, codes.DeadlineExceeded, "create task")
	wantError(t, <-pod, codes.DeadlineExceeded, "create task")
	if took := time.Since(begun); took < createTime || took > createTime+soon {
		t.Errorf("it took %s, the time was %s", took, createTime)
	}
	for _, verb := range []string{runcCreate, shimStart} {
		eventually(t, soon, func() error { return noneRuns(boundedDir(d.Dir), verb) })
		if err := os.Remove(filepath.Join(boundedDir(d.Dir), "stall-"+verb)); err != nil {
			t.Fatal(err)
		}
	}
	if s := containerStatus(t, d, hangs); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode == 0 || s.Message == "" {
		t.Errorf("the container whose create hung is %v", s)
	}
	pods, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range pods.Items {
		if other.Metadata.Uid == hung.Metadata.Uid {
			t.Errorf("the pod whose create hung is %v", other)
		}
	}
	if got := sh(d, p.run(d, onHost(daemon.ContainerConfig("runs", plain(t, d)))), "echo runs"); got != "runs" {
		t.Errorf("afterwards: %q", got)
	}
}

// noneRuns looks for a process of the scripts in dir with the word among its
// arguments.
func noneRuns(dir, word string) error {
	found, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, f := range found {
		line, err := os.ReadFile(f)
		if err == nil && strings.Contains(string(line), dir) && strings.Contains(string(line), "\x00"+word+"\x00") {
			return fmt.Errorf("%s still runs: %q", f, line)
		}
	}
	return nil
}

// annotationsOf are the annotations with which a runtime was asked to make a
// container or a pod's process, without those that all have.
func annotationsOf(t *testing.T, d *daemon.Daemon, id string) map[string]string {
	t.Helper()
	var spec struct{ Annotations map[string]string }
	if err := json.Unmarshal(bundleFile(t, d, id, "config.json"), &spec); err != nil {
		t.Fatal(err)
	}
	for k := range spec.Annotations {
		if strings.HasPrefix(k, "io.kubernetes.cri.") {
			delete(spec.Annotations, k)
		}
	}
	return spec.Annotations
}

// annotated runs a pod and a container that have all sorts of annotations.
func annotated(t *testing.T, d *daemon.Daemon, handler string, ofPod, ofContainer map[string]string) (p pod, container string) {
	t.Helper()
	config := d.PodConfig("annotated")
	hostNetwork(config)
	config.Annotations = ofPod
	p = pod{d.RunPodWith(config, handler), config}
	c := onHost(daemon.ContainerConfig("main", plain(t, d)))
	c.Annotations = ofContainer
	return p, p.run(d, c)
}

func wantAnnotations(t *testing.T, d *daemon.Daemon, id string, want map[string]string) {
	t.Helper()
	if got := annotationsOf(t, d, id); !maps.Equal(got, want) {
		t.Errorf("the runtime got %v, want %v", got, want)
	}
}

// TestRTH_23_AnnotationPassthrough: the annotations that a handler lists reach
// its runtime, those of pods for containers too, and no others do.
func TestRTH_23_AnnotationPassthrough(t *testing.T) {
	t.Parallel()
	d := shared(t)
	ofPod := map[string]string{"pod.test/a": "1", "pod.test/a/b": "deeper", "exact": "2", "exactly": "3", "ctr.test/x": "4", "io.kubernetes.cri.sandbox-id": "evil"}
	ofContainer := map[string]string{"ctr.test/a": "5", "exact.ctr": "6", "pod.test/x": "7", "io.kubernetes.cri.sandbox-id": "evil"}
	p, ctr := annotated(t, d, annotatedHandler, ofPod, ofContainer)
	want := map[string]string{"pod.test/a": "1", "exact": "2", "own.test/kept": "handler", "pod.test/changed": "handler", "ctr.test/changed": "handler"}
	wantAnnotations(t, d, p.id, want)
	want["ctr.test/a"], want["exact.ctr"] = "5", "6"
	wantAnnotations(t, d, ctr, want)
	if s := podStatus(t, d, p.id); !maps.Equal(s.Annotations, ofPod) {
		t.Errorf("the pod's status has %v", s.Annotations)
	}
	p, ctr = annotated(t, d, pausing, ofPod, ofContainer)
	wantAnnotations(t, d, p.id, nil)
	wantAnnotations(t, d, ctr, nil)
}

// TestRTH_24_DefaultAnnotations: a handler's own annotations reach its runtime
// unless the pod has others that it may have.
func TestRTH_24_DefaultAnnotations(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p, ctr := annotated(t, d, annotatedHandler,
		map[string]string{"pod.test/changed": "pod", "own.test/kept": "pod"}, map[string]string{"ctr.test/changed": "container"})
	wantAnnotations(t, d, p.id, map[string]string{"own.test/kept": "handler", "pod.test/changed": "pod", "ctr.test/changed": "handler"})
	wantAnnotations(t, d, ctr, map[string]string{"own.test/kept": "handler", "pod.test/changed": "pod", "ctr.test/changed": "container"})
	p, ctr = annotated(t, d, annotatedHandler, nil, nil)
	want := map[string]string{"own.test/kept": "handler", "pod.test/changed": "handler", "ctr.test/changed": "handler"}
	wantAnnotations(t, d, p.id, want)
	wantAnnotations(t, d, ctr, want)
}

// TestRTH_25_UntrustedWorkload: a pod with the annotation is run by the handler
// of that name, and by no other, and has nothing of the node.
func TestRTH_25_UntrustedWorkload(t *testing.T) {
	t.Parallel()
	d := shared(t)
	untrusted := func(edits ...func(*cri.PodSandboxConfig)) *cri.PodSandboxConfig {
		config := d.PodConfig("untrusted")
		config.Annotations = map[string]string{"io.kubernetes.cri.untrusted-workload": "true"}
		for _, edit := range edits {
			edit(config)
		}
		return config
	}
	for _, asked := range []string{"", untrustedHandler} {
		config := untrusted()
		p := pod{d.RunPodWith(config, asked), config}
		if got := podStatus(t, d, p.id).RuntimeHandler; got != untrustedHandler {
			t.Errorf("asked for %q, the pod has %q", asked, got)
		}
		if got := sh(d, p.run(d, daemon.ContainerConfig("main", plain(t, d))), "echo runs"); got != "runs" {
			t.Errorf("its container: %q", got)
		}
	}
	_, err := d.StartPod(t.Context(), untrusted(), otherHandler)
	wantError(t, err, codes.InvalidArgument, "runtime_handler", otherHandler)
	for field, o := range map[string]*cri.NamespaceOption{
		"network": {Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER},
		"pid":     {Pid: cri.NamespaceMode_NODE},
		"ipc":     {Ipc: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER},
	} {
		_, err := d.StartPod(t.Context(), untrusted(withNamespaces(o)), "")
		wantError(t, err, codes.InvalidArgument, "namespace_options."+field)
	}
	trusted := untrusted(func(c *cri.PodSandboxConfig) { c.Annotations["io.kubernetes.cri.untrusted-workload"] = "false" })
	if got := podStatus(t, d, d.RunPodWith(trusted, "")).RuntimeHandler; got != defaultHandler {
		t.Errorf("a pod that is said to be trusted has handler %q", got)
	}
}
