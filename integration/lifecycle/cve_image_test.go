package lifecycle

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
	"github.com/gantry-cri/gantry/integration/registry"
)

// memory is what the daemon has in memory, and resets what it had at most.
func memory(t *testing.T, d *daemon.Daemon) (mib int) {
	t.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", d.PID()), []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
	return peak(t, d)
}

// peak is what the daemon has had in memory at most since memory was called.
func peak(t *testing.T, d *daemon.Daemon) (mib int) { return statusNumber(t, d.PID(), "VmHWM") >> 10 }

// huge is the size of what nobody can hold.
const huge = 10 << 30

// manifestFor describes an image of other sizes than it has.
func manifestFor(t *testing.T, img v1.Image, change func(*v1.Manifest)) []byte {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	m = m.DeepCopy()
	change(m)
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// TestCVE_2023_25153_WhatARegistrySendsIsBounded: a registry says gigabytes, or
// sends them whatever it says, as index, manifest, configuration, layer or token.
// Each pull ends with an error that tells it, nothing of it stays, and the daemon
// has not held it in memory.
func TestCVE_2023_25153_WhatARegistrySendsIsBounded(t *testing.T) {
	d := shared(t)
	const text = `{"schemaVersion":2,"mediaType":"`
	index := http.Header{"Content-Type": {string(types.OCIImageIndex)}}
	for name, row := range map[string]struct {
		auth   registry.Auth
		lie    func(*v1.Manifest)
		inside bool // of an index
		fault  func(img v1.Image) *registry.Fault
		code   codes.Code
		words  []string
	}{
		"index says": {fault: func(v1.Image) *registry.Fault {
			return &registry.Fault{Match: registry.Manifests("1"), Body: []byte(text), Header: http.Header{
				"Content-Type": index["Content-Type"], "Content-Length": {fmt.Sprint(huge)}, "Docker-Content-Digest": {"sha256:" + zeros()},
			}}
		}, code: codes.NotFound, words: []string{"resolve", fmt.Sprint(huge)}},
		"index sends": {fault: func(v1.Image) *registry.Fault {
			return &registry.Fault{Match: registry.Manifests("1"), Body: []byte(text), Endless: true, Header: index}
		}, code: codes.FailedPrecondition, words: []string{"resolve", "more than"}},
		"manifest sends": {inside: true, fault: func(img v1.Image) *registry.Fault {
			return &registry.Fault{Match: registry.Manifests(digestOf(t, img)), Body: []byte(text), Endless: true}
		}, code: codes.FailedPrecondition, words: []string{"fetch", "size"}},
		"configuration says": {
			lie: func(m *v1.Manifest) { m.Config.Size = huge }, code: codes.FailedPrecondition, words: []string{"fetch", fmt.Sprint(huge)}},
		"configuration sends": {fault: func(img v1.Image) *registry.Fault {
			return &registry.Fault{Match: registry.Blobs(idOf(t, img)), Body: []byte(`{"os":"a`), Endless: true}
		}, code: codes.FailedPrecondition, words: []string{"fetch", "size"}},
		"layer sends": {fault: func(img v1.Image) *registry.Fault {
			return &registry.Fault{Match: registry.Blobs(layersOf(t, img)...), Endless: true}
		}, code: codes.FailedPrecondition, words: []string{"fetch", "size"}},
		"layer that is said to be empty sends": {lie: func(m *v1.Manifest) { m.Layers[0].Size = 0 }, fault: func(img v1.Image) *registry.Fault {
			return &registry.Fault{Match: registry.Blobs(layersOf(t, img)...), Endless: true}
		}, code: codes.FailedPrecondition, words: []string{"fetch", "0 bytes"}},
		"token sends": {auth: registry.Auth{Mode: registry.Bearer}, fault: func(v1.Image) *registry.Fault {
			return &registry.Fault{BeforeAuth: true, Body: []byte(`{"token":"a`), Endless: true, Match: func(q *http.Request) bool { return strings.Contains(q.URL.Path, "token") }}
		}, code: codes.Unavailable, words: []string{"resolve", "token"}},
	} {
		t.Run(name, func(t *testing.T) {
			img := blobImage(t, 1000)
			r, ref := serveImage(t, registry.Options{Auth: row.auth}, img)
			if row.inside {
				list, err := registry.Index(img)
				if err == nil {
					_, err = r.PushIndex("app", "1", list)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if row.lie != nil {
				if _, err := r.PutManifest("app", "1", string(types.OCIManifestSchema1), manifestFor(t, img, row.lie)); err != nil {
					t.Fatal(err)
				}
			}
			if row.fault != nil {
				r.Inject(*row.fault(img))
			}
			before := memory(t, d)
			_, err := pull(t.Context(), d, ref, nil)
			wantError(t, err, row.code, row.words...)
			if grown := peak(t, d) - before; grown > 256 {
				t.Errorf("the daemon took %d MiB", grown)
			}
			nothingPulled(t, d, r.Host)
		})
	}
}

// TestCVE_2025_47290_LinkSwapsBetweenLayers: later layers replace directories of
// earlier ones by links to the host and write through them, and back, while layers
// are unpacked side by side. Nothing is written outside.
func TestCVE_2025_47290_LinkSwapsBetweenLayers(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	o := newOutside(t)
	links := map[string]string{"absolute": o.dir, "relative": o.up(), "magic": "/proc/self/root" + o.dir, "cwd": "/proc/self/cwd/" + o.up()}
	for name, target := range links {
		var layers [][]images.File
		for i := range 2 {
			mine := images.Text("etc/swap/"+fmt.Sprint("new", i), strings.Repeat("x", 1<<10))
			layers = append(layers,
				[]images.File{images.Dir("etc/swap", 0o755), images.Dir("etc/swap/deep", 0o755), mine},
				[]images.File{images.Symlink("etc/swap", target)},
				[]images.File{images.Text("etc/swap/through", "through\n"), images.Whiteout("etc/swap/secret"), images.Opaque("etc/swap")},
				[]images.File{images.Symlink("etc", target), images.Text("etc/passwd", "through\n")},
				[]images.File{images.Whiteout("etc"), images.Dir("etc", 0o755)},
			)
		}
		b.image = pulledImage(t, b.Daemon, "cve/swaps-"+name+":1", images.MustBuild(images.Spec{Layers: layers}))
		if got := sh(b.Daemon, b.run(b.sleeper(name)), "ls /etc"); strings.Contains(got, "secret") || strings.Contains(got, "through") {
			t.Errorf("%s: /etc has %q", name, got)
		}
		o.untouched()
		// A hard link has to lead to a file of the image.
		layers = append(layers, []images.File{images.Whiteout("etc")}, []images.File{images.Symlink("etc", target), images.Hardlink("etc/linked", "etc/secret")})
		if _, err := pull(t.Context(), b.Daemon, push(t, "cve/swaps-"+name+":2", images.MustBuild(images.Spec{Layers: layers})), nil); err == nil {
			t.Errorf("%s: there is a hard link to what is not in the image", name)
		}
		o.untouched()
	}
}

// TestCVE_2022_24778_CachedImageNeedsCredentials: that an image is here does not
// mean that everybody may have it. A pull by who cannot read it fails, by tag and
// by digest, so that a kubelet which makes sure of rights by pulling can rely on it.
func TestCVE_2022_24778_CachedImageNeedsCredentials(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 1000)
	r, ref := serveImage(t, registry.Options{Auth: registry.Auth{Mode: registry.Bearer}}, img)
	good := &cri.AuthConfig{Username: "user", Password: "secret"}
	byDigest := r.Ref("app@" + digestOf(t, img))
	for range 2 {
		for _, name := range []string{ref, byDigest} {
			if got, err := pull(t.Context(), d, name, good); err != nil || got != idOf(t, img) {
				t.Fatalf("%s with credentials: %q, %v", name, got, err)
			}
			for who, auth := range map[string]*cri.AuthConfig{"nobody": nil, "somebody else": {Username: "user", Password: "wrong"}} {
				got, err := pull(t.Context(), d, name, auth)
				wantError(t, err, codes.Unauthenticated)
				if got != "" {
					t.Errorf("%s pulled %s: %q", who, name, got)
				}
			}
		}
	}
}

// TestCVE_2024_8676_CVE_2026_50195_CVE_2026_53489_CheckpointsAreNotRestored: a
// container whose image is a checkpoint, as an archive on the node or as an image
// that says so, gets nothing of what the checkpoint asks for: no process, no mount,
// no image, no log.
func TestCVE_2024_8676_CVE_2026_50195_CVE_2026_53489_CheckpointsAreNotRestored(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	o := newOutside(t)
	stolen := b.image + "-stolen"
	files := []images.File{
		images.Text("config.dump", `{"id":"1","name":"app","rootfsImage":"`+stolen+`","rootfsImageRef":"`+stolen+`","rootfsImageName":"`+stolen+`","runtime":"runc"}`),
		images.Text("spec.dump", `{"ociVersion":"1.0.0","process":{"args":["sh","-c","touch /host/ran; sleep 1000"],"cwd":"/"},"root":{"path":"rootfs"},`+
			`"mounts":[{"destination":"/host","type":"bind","source":"`+o.dir+`","options":["rbind","rw"]}],`+
			`"annotations":{"io.kubernetes.cri.container-name":"app","io.kubernetes.container.name":"app","cdi.k8s.io/a":"vendor.test/card=0"}}`),
		images.Text("status", `{"state":"CONTAINER_RUNNING"}`), images.Text("network.status", "{}"), images.Dir("checkpoint", 0o700), images.Text("checkpoint/inventory.img", "x"),
		images.Symlink("container.log", o.dir+"/secret"), images.Symlink("rootfs-diff.tar", o.dir+"/secret"),
	}
	archive, err := images.Tar(files)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "checkpoint.tar")
	if err := os.WriteFile(path, archive, 0o644); err != nil {
		t.Fatal(err)
	}
	for i, ref := range []string{path, "file://" + path, strings.TrimPrefix(path, "/")} {
		c := b.sleeper(fmt.Sprint("archive-", i))
		c.Image.Image, c.Image.UserSpecifiedImage, c.Command = ref, ref, nil
		if id, err := b.create(c); err == nil {
			t.Errorf("%s made container %s", ref, id)
		} else {
			t.Log(err)
		}
	}

	marks := map[string]string{"org.criu.checkpoint.container.name": "app", "io.kubernetes.cri-o.annotations.checkpoint.name": "app", "org.criu.checkpoint.rootfsImage": stolen}
	img := mutate.Annotations(images.MustBuild(images.Spec{Labels: marks, Layers: [][]images.File{files}}), marks).(v1.Image)
	b.image = pulledImage(t, b.Daemon, "cve/checkpoint:1", img)
	id := b.run(b.sleeper("image"))
	if got := sh(b.Daemon, id, "ls -d /host 2>&1; tr '\\0' ' ' </proc/1/cmdline"); !strings.Contains(got, "No such file") || strings.Contains(got, "touch") {
		t.Errorf("inside is %q", got)
	}
	s := b.status(id)
	if s.Image.Image != b.image || s.Metadata.Name != "image" {
		t.Errorf("the container is %v", s)
	}
	if info, err := os.Lstat(s.LogPath); err != nil || !info.Mode().IsRegular() || info.Size() != 0 {
		t.Errorf("its log is %v, %v", info, err)
	}
	if imageStatus(t, b.Daemon, stolen) != nil {
		t.Error("there is an image of the name in the checkpoint")
	}
	o.untouched()
}
