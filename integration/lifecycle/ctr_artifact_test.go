package lifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
	"github.com/gantry-cri/gantry/integration/registry"
)

// artifactFile is a blob of an artifact; no title is none.
type artifactFile struct{ title, text string }

// pushArtifact pushes an artifact as tools do: with an empty configuration, and
// blobs that are said to be layers. It returns its reference and its manifest.
func pushArtifact(t *testing.T, r *registry.Registry, name string, files ...artifactFile) (ref string, manifest imagespec.Descriptor) {
	t.Helper()
	repo, tag, _ := strings.Cut(name, ":")
	put := func(text string) imagespec.Descriptor {
		d, err := r.PutBlob(repo, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return imagespec.Descriptor{Digest: digest.Digest(d), Size: int64(len(text))}
	}
	m := imagespec.Manifest{MediaType: imagespec.MediaTypeImageManifest, ArtifactType: "application/vnd.example.model", Config: put("{}")}
	m.SchemaVersion, m.Config.MediaType = 2, imagespec.MediaTypeEmptyJSON
	for i, f := range files {
		d := put(f.text)
		d.MediaType = []string{imagespec.MediaTypeImageLayer, imagespec.MediaTypeImageLayerGzip, "application/vnd.example.weights"}[i%3]
		if f.title != "" {
			d.Annotations = map[string]string{imagespec.AnnotationTitle: f.title}
		}
		m.Layers = append(m.Layers, d)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.PutManifest(repo, tag, m.MediaType, raw); err != nil {
		t.Fatal(err)
	}
	return r.Ref(name), imagespec.Descriptor{Digest: digest.FromBytes(raw), Size: int64(len(raw))}
}

// blobFile is where a daemon keeps a blob.
func blobFile(d *daemon.Daemon, text string) string {
	return filepath.Join(d.Root, "io.containerd.content.v1.content", "blobs", "sha256", digest.FromString(text).Encoded())
}

// TestMNT_14_ArtifactVolumes: the blobs of an artifact are files of a read-only
// volume, which are not copied, and which stay while they are in use although the
// artifact was removed.
func TestMNT_14_ArtifactVolumes(t *testing.T) {
	t.Parallel()
	d := start(t)
	b := newBoxOn(t, d)
	r := registry.StartT(t, registry.Options{})
	weights := strings.Repeat("0123456789abcdef", 1<<16)
	ref, _ := pushArtifact(t, r, "model:1", artifactFile{"config.json", "{}\n"}, artifactFile{"weights/part 1.bin", weights},
		artifactFile{"weights/part 2.bin", "two\n"}, artifactFile{"", "untitled\n"})
	model := mustPull(t, d, ref)
	byDigest := "sha256-" + digest.FromString("untitled\n").Encoded()
	asked := []*cri.Mount{
		fromImage(model, "", "/model"), fromImage(model, "weights", "/weights"), fromImage(ref, "weights/part 2.bin", "/file"),
	}
	id := b.run(b.withMounts("app", asked...))
	check := func(id string) {
		t.Helper()
		b.wantText(id, "/model/config.json", "{}\n")
		b.wantText(id, "/model/"+byDigest, "untitled\n")
		b.wantText(id, "/weights/part 2.bin", "two\n")
		b.wantText(id, "/file", "two\n")
		b.wantText(id, "/weights/part 1.bin", weights)
		if got := sh(d, id, "cd /model; find . | sort; stat -c '%a %u:%g' . weights config.json"); got != ".\n./config.json\n./"+byDigest+"\n./weights\n./weights/part 1.bin\n./weights/part 2.bin\n755 0:0\n755 0:0\n444 0:0" {
			t.Errorf("the volume has %q", got)
		}
		for _, path := range []string{"/model/new", "/model/config.json", "/weights/new", "/file"} {
			b.denied(id, "Read-only", "sh", "-c", "echo >>"+path)
		}
	}
	check(id)
	in, err := os.Stat(fmt.Sprintf("/proc/%d/root/model/weights/part 1.bin", b.pid(id)))
	if err != nil {
		t.Fatal(err)
	}
	if blob, err := os.Stat(blobFile(d, weights)); err != nil || !os.SameFile(in, blob) {
		t.Errorf("the blob was copied, or is not there: %v", err)
	}
	for sub, code := range map[string]codes.Code{"absent": codes.NotFound, "config.json/x": codes.FailedPrecondition, "weights/part 3.bin": codes.NotFound} {
		b.refused(b.withMounts("bad", fromImage(model, sub, "/v")), code, "config.mounts[0]")
	}
	created := b.mustCreate(b.withMounts("later", asked...))
	removeImage(t, d, model)
	collectGarbage(t, d)
	if _, err := os.Stat(blobFile(d, weights)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the content store has the blob of an artifact that was removed: %v", err)
	}
	check(id)
	b.refused(b.withMounts("gone", fromImage(model, "", "/v")), codes.NotFound, "config.mounts[0]", model)
	d.Kill()
	d.Up()
	check(id)
	if err := b.start(created); err != nil {
		t.Fatal(err)
	}
	check(created)
	b.remove(created)
	b.remove(id)
	if left := volumesOf(t, d); len(left) > 0 {
		t.Errorf("left are %q", left)
	}
	collectGarbage(t, d)
	if left := layerFiles(t, d, "part 1.bin"); len(left) > 0 {
		t.Errorf("left are %q", left)
	}
}

// TestMNT_14_NoContainer: a container cannot be made from an artifact.
func TestMNT_14_NoContainer(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	r := registry.StartT(t, registry.Options{})
	ref, _ := pushArtifact(t, r, "model:1", artifactFile{"a", "no container\n"})
	mustPull(t, b.Daemon, ref)
	c := b.sleeper("app")
	c.Image = &cri.ImageSpec{Image: ref}
	b.refused(c, codes.FailedPrecondition, "config.image", "application/vnd.example.model", "no container image")
	removeImage(t, b.Daemon, ref)
}

// TestMNT_14_BadTitles: an artifact whose titles lead out of the volume, or into
// each other's way, is refused before its blobs are fetched.
func TestMNT_14_BadTitles(t *testing.T) {
	t.Parallel()
	d := shared(t)
	r := registry.StartT(t, registry.Options{})
	for name, c := range map[string]struct {
		says   string
		titles []string
	}{
		"up": {"leads out", []string{"../../../../tmp/x"}}, "hidden-up": {"leads out", []string{"a/../../x"}}, "absolute": {"leads out", []string{"/etc/x"}},
		"twice": {"two files", []string{"a", "a"}}, "below": {"below it", []string{"a", "a/b"}}, "self": {"names no file", []string{"./"}},
		"long": {"too long", []string{strings.Repeat("n", 256)}}, "control": {"characters", []string{"a\x1b[2J"}}, "none": {"no blobs", nil},
		"many": {"more than 1024", slices.Repeat([]string{""}, 1025)},
	} {
		var files []artifactFile
		for i, title := range c.titles {
			files = append(files, artifactFile{title, fmt.Sprint(name, " ", min(i, 1))})
		}
		ref, _ := pushArtifact(t, r, name+":1", files...)
		r.ResetLog()
		_, err := pull(t.Context(), d, ref, nil)
		wantError(t, err, codes.FailedPrecondition, "not a container image", c.says)
		if n := len(r.BlobGets()); n > 0 {
			t.Errorf("%s: %d blobs were fetched", name, n)
		}
		if imageStatus(t, d, ref) != nil {
			t.Errorf("%s: it is here", name)
		}
	}
}

// TestMNT_14_Userns: in a pod with a user namespace the files are root's, the
// pod's own, and the blobs keep their owner.
func TestMNT_14_Userns(t *testing.T) {
	t.Parallel()
	b := newUserBox(t)
	r := registry.StartT(t, registry.Options{})
	ref, _ := pushArtifact(t, r, "userns:1", artifactFile{"d/a", "for user namespaces\n"})
	mustPull(t, b.Daemon, ref)
	c := b.sleeper("app")
	c.Mounts = []*cri.Mount{fromImage(ref, "", "/all"), fromImage(ref, "d/a", "/file")}
	id := b.run(c)
	if got := sh(b.Daemon, id, "stat -c %u:%g /all /all/d /all/d/a /file; cat /file"); got != "0:0\n0:0\n0:0\n0:0\nfor user namespaces" {
		t.Errorf("got %q", got)
	}
	wantOwner(t, blobFile(b.Daemon, "for user namespaces\n"), 0)
	b.remove(stopped(b, id))
	removeImage(t, b.Daemon, ref)
}

// TestMNT_14_CutOff: a daemon that dies while an artifact is fetched, or mounted,
// leaves nothing that the next one does not take away.
func TestMNT_14_CutOff(t *testing.T) {
	oursAlone(t, "artifact volumes")
	t.Parallel()
	d := start(t)
	b := newBoxOn(t, d)
	r := registry.StartT(t, registry.Options{})
	ref, _ := pushArtifact(t, r, "model:1", artifactFile{"a", "one\n"}, artifactFile{"b", strings.Repeat("two\n", 1000)})
	release := make(chan struct{})
	r.Inject(registry.Fault{Match: registry.Blobs(), Hold: release})
	pulled := make(chan error, 1)
	go func() { // ends with the daemon
		_, err := pull(context.Background(), d, ref, nil)
		pulled <- err
	}()
	eventually(t, ample, func() error {
		if len(r.BlobGets()) == 0 {
			return errors.New("no blob was asked for")
		}
		return nil
	})
	d.Kill()
	if err := <-pulled; err == nil {
		t.Error("the pull succeeded")
	}
	close(release)
	d.Up()
	nothingPulled(t, d, r.Host)
	model := mustPull(t, d, ref)
	var mounts []*cri.Mount
	for i := range 30 {
		mounts = append(mounts, fromImage(model, "", fmt.Sprint("/v", i)))
	}
	for i := range 2 {
		cutOff(t, b, fmt.Sprint("cut-off-", i), func() error {
			if len(volumesOf(t, d)) == 0 {
				return errors.New("nothing is mounted yet")
			}
			return nil
		}, mounts...)
	}
	b.wantText(b.run(b.withMounts("whole", mounts[0])), "/v0/a", "one\n")
}

// TestIMM_31_Artifacts: an artifact is pulled, listed, looked at and removed like
// an image. What identifies it is its manifest.
func TestIMM_31_Artifacts(t *testing.T) {
	t.Parallel()
	d := shared(t)
	r := registry.StartT(t, registry.Options{})
	ref, manifest := pushArtifact(t, r, "chart:1", artifactFile{"", "a chart\n"})
	other, _ := pushArtifact(t, r, "chart:2", artifactFile{"b", "another chart\n"})
	id := mustPull(t, d, ref)
	if id != manifest.Digest.String() {
		t.Errorf("the ID is %s, the manifest's digest %s", id, manifest.Digest)
	}
	otherID := mustPull(t, d, other)
	want := &cri.Image{
		Id: id, RepoTags: []string{ref}, RepoDigests: []string{r.Ref("chart@" + id)}, Size: uint64(manifest.Size) + uint64(len("{}")+len("a chart\n")),
		Spec: &cri.ImageSpec{Image: id},
	}
	for _, name := range []string{ref, id, strings.TrimPrefix(id, "sha256:")[:12], r.Ref("chart@" + id)} {
		if got := imageStatus(t, d, name); !proto.Equal(got, want) {
			t.Errorf("status of %s is %v, want %v", name, got, want)
		}
	}
	if list := imagesWith(t, d, id); len(list) != 1 || !proto.Equal(list[0], want) {
		t.Errorf("listed are %v", list)
	}
	resp, err := d.Images().ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: id}, Verbose: true})
	if err != nil || !strings.Contains(resp.Info["info"], `"artifactType":"application/vnd.example.model"`) {
		t.Errorf("verbosely: %v, %v", resp, err)
	}
	removeImage(t, d, id)
	if imageStatus(t, d, ref) != nil || len(imagesWith(t, d, id)) != 0 {
		t.Error("it is here after its removal")
	}
	if imageStatus(t, d, other) == nil {
		t.Error("the other one, with the same configuration, went with it")
	}
	removeImage(t, d, otherID)
}

// TestCTR_06_ImageVolumeDigest: a status says which image a volume is, as it does
// of the container's own.
func TestCTR_06_ImageVolumeDigest(t *testing.T) {
	t.Parallel()
	d := start(t)
	b := newBoxOn(t, d)
	r := registry.StartT(t, registry.Options{})
	ref, manifest := pushArtifact(t, r, "digest/model:1", artifactFile{"a", "a\n"})
	model := mustPull(t, d, ref)
	img := images.MustBuild(images.Spec{Env: []string{"VOLUME=digest"}})
	b.image = pulledImage(t, d, "digest/own:1", img)
	asked := []*cri.Mount{
		fromImage(model, "", "/model"), {HostPath: t.TempDir(), ContainerPath: "/host"}, fromImage(idOf(t, img), "bin", "/by-id"), fromImage(b.image, "", "/by-tag"),
	}
	id := b.run(b.withMounts("app", asked...))
	own := b.image[:strings.LastIndexByte(b.image, ':')] + "@" + digestOf(t, img)
	check := func() {
		t.Helper()
		s := b.status(id)
		if s.ImageRef != own {
			t.Errorf("the container's image is %s, want %s", s.ImageRef, own)
		}
		for i, want := range []string{r.Ref("digest/model@" + manifest.Digest.String()), "", own, own} {
			m := proto.Clone(asked[i]).(*cri.Mount)
			if want != "" {
				m.Image.ImageRef = want
			}
			if !proto.Equal(s.Mounts[i], m) {
				t.Errorf("status has mount %v, want %v", s.Mounts[i], m)
			}
		}
	}
	check()
	// It stays what it was, whatever becomes of the image.
	removeImage(t, d, model)
	d.Kill()
	d.Up()
	check()
	// A kubelet that repeats its request means the same container.
	created := b.withMounts("again", asked[1:]...)
	first := b.mustCreate(created)
	if second := b.mustCreate(created); second != first {
		t.Errorf("created %s, and then %s", first, second)
	}
	b.remove(first)
	b.remove(id)
}
