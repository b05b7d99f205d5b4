package lifecycle

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
	"github.com/gantry-cri/gantry/integration/registry"
)

// TestIMM_01_ReferenceNormalisation: a short name is Docker's, tagged latest.
func TestIMM_01_ReferenceNormalisation(t *testing.T) {
	d := shared(t)
	img := blobImage(t, 1000)
	r := registry.StartT(t, registry.Options{})
	if _, err := r.Push("library/shortname", "latest", img); err != nil {
		t.Fatal(err)
	}
	hosts(t, d, "docker.io", fmt.Sprintf("server = %q\n", r.URL()))
	id := mustPull(t, d, "shortname")
	if id != idOf(t, img) {
		t.Errorf("pulled %s", id)
	}
	for _, form := range []string{"shortname", "shortname:latest", "library/shortname", "docker.io/shortname", "docker.io/library/shortname:latest"} {
		if got := imageStatus(t, d, form); got.GetId() != id {
			t.Errorf("%s: %v", form, got)
		}
	}
	if got := imageStatus(t, d, id).RepoTags; !slices.Equal(got, []string{"docker.io/library/shortname:latest"}) {
		t.Errorf("tags are %q", got)
	}
	if imageStatus(t, d, "shortname:other") != nil {
		t.Error("another tag is there")
	}
	removeImage(t, d, "shortname")
}

func TestIMM_03_PullByDigest(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 1000)
	r, _ := serveImage(t, registry.Options{}, img)
	byDigest := r.Ref("app@" + digestOf(t, img))
	if got := mustPull(t, d, byDigest); got != idOf(t, img) {
		t.Errorf("pulled %s", got)
	}
	if got := mustPull(t, d, r.Ref("app:moved@"+digestOf(t, img))); got != idOf(t, img) {
		t.Errorf("by tag and digest %s was pulled", got)
	}
	s := imageStatus(t, d, byDigest)
	if len(s.RepoTags) != 0 || !slices.Equal(s.RepoDigests, []string{byDigest}) {
		t.Errorf("tags %q, digests %q", s.RepoTags, s.RepoDigests)
	}
	// A registry that gives something else under the digest is caught.
	other := blobImage(t, 1000)
	if _, err := r.Push("app", "1", other); err != nil {
		t.Fatal(err)
	}
	raw, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	r.Inject(registry.Fault{Match: func(q *http.Request) bool {
		return q.Method == http.MethodGet && registry.Manifests(digestOf(t, other))(q)
	}, Body: raw, Header: http.Header{"Content-Type": {string(types.OCIManifestSchema1)}}})
	if _, err := pull(t.Context(), d, r.Ref("app@"+digestOf(t, other)), nil); err == nil {
		t.Error("a manifest with another digest was taken")
	}
	if imageStatus(t, d, r.Ref("app@"+digestOf(t, other))) != nil {
		t.Error("the lie was recorded")
	}
}

// TestIMM_04_MultiArch: of an index the image for this machine is taken.
func TestIMM_04_MultiArch(t *testing.T) {
	t.Parallel()
	d := shared(t)
	arm := customImage(t, registry.Image{Architecture: "arm64", Variant: "v8"}, 100)
	plain := customImage(t, registry.Image{Architecture: "amd64"}, 100)
	v2 := customImage(t, registry.Image{Architecture: "amd64", Variant: "v2"}, 100)
	v9 := customImage(t, registry.Image{Architecture: "amd64", Variant: "v9"}, 100)
	windows := customImage(t, registry.Image{OS: "windows", Architecture: "amd64"}, 100)
	r := registry.StartT(t, registry.Options{})
	for tag, row := range map[string]struct {
		of   []v1.Image
		want v1.Image
	}{
		"one":     {[]v1.Image{windows, arm, plain}, plain},
		"level":   {[]v1.Image{arm, plain, v2}, v2},
		"beyond":  {[]v1.Image{v9, plain}, plain},
		"foreign": {[]v1.Image{arm, windows}, nil},
	} {
		idx, err := registry.Index(row.of...)
		if err != nil {
			t.Fatal(err)
		}
		digest, err := r.PushIndex("multi", tag, idx)
		if err != nil {
			t.Fatal(err)
		}
		id, err := pull(t.Context(), d, r.Ref("multi:"+tag), nil)
		if row.want == nil {
			wantError(t, err, codes.NotFound, "platform linux/amd64", "there are linux/arm64/v8, windows/amd64")
			continue
		}
		if err != nil || id != idOf(t, row.want) {
			t.Errorf("%s: pulled %s, %v, want %s", tag, id, err, idOf(t, row.want))
			continue
		}
		if got := imageStatus(t, d, r.Ref("multi:"+tag)).RepoDigests; !slices.Contains(got, r.Ref("multi@"+digest)) {
			t.Errorf("%s: digests %q lack the index's", tag, got)
		}
	}
	for digest := range r.BlobGets() {
		if slices.Contains(layersOf(t, arm), digest) {
			t.Error("a layer for another machine was fetched")
		}
	}
}

func TestIMM_05_ManifestFormats(t *testing.T) {
	t.Parallel()
	d := shared(t)
	r := registry.StartT(t, registry.Options{})
	for tag, docker := range map[string]bool{"oci": false, "docker": true} {
		img := customImage(t, registry.Image{Docker: docker}, 100)
		if _, err := r.Push("formats", tag, img); err != nil {
			t.Fatal(err)
		}
		if got := mustPull(t, d, r.Ref("formats:"+tag)); got != idOf(t, img) {
			t.Errorf("%s: %s", tag, got)
		}
		kind, manifest := types.OCIImageIndex, types.OCIManifestSchema1
		if docker {
			kind, manifest = types.DockerManifestList, types.DockerManifestSchema2
		}
		size, err := img.Size()
		if err != nil {
			t.Fatal(err)
		}
		list, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": kind, "manifests": []any{map[string]any{
			"mediaType": manifest, "digest": digestOf(t, img), "size": size,
			"platform": map[string]string{"os": "linux", "architecture": "amd64"},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.PutManifest("formats", tag+"-list", string(kind), list); err != nil {
			t.Fatal(err)
		}
		if got := mustPull(t, d, r.Ref("formats:"+tag+"-list")); got != idOf(t, img) {
			t.Errorf("list of %s: %s", tag, got)
		}
	}
	old := `{"schemaVersion":1,"name":"formats","tag":"old","architecture":"amd64","fsLayers":[],"history":[],"signatures":[]}`
	for _, kind := range []string{"application/vnd.docker.distribution.manifest.v1+prettyjws", "application/vnd.docker.distribution.manifest.v1+json"} {
		if _, err := r.PutManifest("formats", "old", kind, []byte(old)); err != nil {
			t.Fatal(err)
		}
		_, err := pull(t.Context(), d, r.Ref("formats:old"), nil)
		if err == nil || !strings.Contains(err.Error(), "schema 1") && !strings.Contains(err.Error(), "manifest.v1") {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

// TestIMM_06_Compression: the same files in three encodings.
func TestIMM_06_Compression(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	text := string(randomBytes(100000))
	for name, c := range map[string]registry.Compression{"gzip": registry.Gzip, "zstd": registry.Zstd, "plain": registry.Plain} {
		layer, err := registry.Layer(map[string][]byte{"data": []byte(text), name: nil}, c, false)
		if err != nil {
			t.Fatal(err)
		}
		img, err := mutate.AppendLayers(images.MustBuild(images.Spec{}), layer)
		if err != nil {
			t.Fatal(err)
		}
		id := b.run(daemon.ContainerConfig(name, pulledImage(t, b.Daemon, "compressed:"+name, img)))
		if got := b.Exec(id, "cat", "/data"); got != text {
			t.Errorf("%s: the file has %d other bytes", name, len(got))
		}
	}
	// A layer that does not hold what its configuration says is refused.
	img := blobImage(t, 1000)
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file = file.DeepCopy()
	file.RootFS.DiffIDs[0].Hex = strings.Repeat("ab", 32)
	lie, err := mutate.ConfigFile(img, file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pull(t.Context(), b.Daemon, push(t, "compressed:lie", lie), nil); err == nil {
		t.Error("a layer with another diff ID was taken")
	}
}

// TestIMM_10_Identifier: the same image from two registries is one.
func TestIMM_10_Identifier(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 1000)
	_, one := serveImage(t, registry.Options{}, img)
	_, two := serveImage(t, registry.Options{}, img)
	if a, b := mustPull(t, d, one), mustPull(t, d, two); a != b || a != idOf(t, img) {
		t.Errorf("pulled %s and %s", a, b)
	}
	all := imagesWith(t, d, idOf(t, img))
	want := []string{one, two}
	slices.Sort(want)
	if len(all) != 1 || !slices.Equal(slices.Sorted(slices.Values(all[0].RepoTags)), want) || len(all[0].RepoDigests) != 2 {
		t.Errorf("listed are %v", all)
	}
}

func TestIMM_11_TagsAndDigests(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 1000)
	r, ref := serveImage(t, registry.Options{}, img)
	mustPull(t, d, ref)
	for _, tag := range []string{"c", "a", "b"} {
		if _, err := r.Push("app", tag, img); err != nil {
			t.Fatal(err)
		}
		mustPull(t, d, r.Ref("app:"+tag))
	}
	first := imageStatus(t, d, ref)
	if got := slices.Sorted(slices.Values(first.RepoTags)); !slices.Equal(got, []string{ref, r.Ref("app:a"), r.Ref("app:b"), r.Ref("app:c")}) {
		t.Errorf("tags are %q", got)
	}
	if !slices.Equal(first.RepoDigests, []string{r.Ref("app@" + digestOf(t, img))}) {
		t.Errorf("digests are %q", first.RepoDigests)
	}
	for range 5 {
		again := imagesWith(t, d, first.Id)
		if len(again) != 1 || !slices.Equal(again[0].RepoTags, first.RepoTags) {
			t.Errorf("the order is %q and then %v", first.RepoTags, again)
		}
	}
}

// TestIMM_12_MovedTag: an image that lost its tag stays, by its digest.
func TestIMM_12_MovedTag(t *testing.T) {
	t.Parallel()
	d := shared(t)
	old, fresh := blobImage(t, 1000), blobImage(t, 1000)
	r, ref := serveImage(t, registry.Options{}, old)
	mustPull(t, d, ref)
	if _, err := r.Push("app", "1", fresh); err != nil {
		t.Fatal(err)
	}
	if got := mustPull(t, d, ref); got != idOf(t, fresh) {
		t.Fatalf("pulled %s", got)
	}
	if got := imageStatus(t, d, ref).Id; got != idOf(t, fresh) {
		t.Errorf("the tag means %s", got)
	}
	left := imagesWith(t, d, idOf(t, old))
	if len(left) != 1 || len(left[0].RepoTags) != 0 || !slices.Equal(left[0].RepoDigests, []string{r.Ref("app@" + digestOf(t, old))}) {
		t.Errorf("the old image is listed as %v", left)
	}
}

func TestIMM_13_SizeAndUser(t *testing.T) {
	t.Parallel()
	d := shared(t)
	for user, want := range map[string]struct {
		uid  *cri.Int64Value
		name string
	}{
		"":            {nil, ""},
		"alice":       {nil, "alice"},
		"1000":        {&cri.Int64Value{Value: 1000}, ""},
		"0":           {&cri.Int64Value{Value: 0}, ""},
		"2000:3000":   {&cri.Int64Value{Value: 2000}, ""},
		"bob:crew":    {nil, "bob"},
		"alice:12345": {nil, "alice"},
	} {
		ref := image(t, d, images.Spec{User: user})
		s := imageStatus(t, d, ref)
		if s.Size == 0 || (s.Uid == nil) != (want.uid == nil) || s.Uid.GetValue() != want.uid.GetValue() || s.Username != want.name {
			t.Errorf("USER %q: size %d, uid %v, username %q", user, s.Size, s.Uid, s.Username)
		}
	}
}

// TestIMM_13_SizeIsNoClaim: a manifest that lies about what is here already is
// refused, and the image that is here keeps its size.
func TestIMM_13_SizeIsNoClaim(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 5000)
	r, ref := serveImage(t, registry.Options{}, img)
	mustPull(t, d, ref)
	before := imageStatus(t, d, ref)
	honest, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for name, claim := range map[string]int64{"small": 1, "huge": 1 << 50, "negative": -1} {
		m := honest.DeepCopy()
		m.Layers[0].Size = claim
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.PutManifest("liar", name, string(m.MediaType), raw); err != nil {
			t.Fatal(err)
		}
		lie := r.Ref("liar:" + name)
		_, err = pull(t.Context(), d, lie, nil)
		wantError(t, err, codes.FailedPrecondition, lie, "bytes")
		if s := imageStatus(t, d, lie); s != nil {
			t.Errorf("%s: the image is there: %v", name, s)
		}
	}
	if s := imageStatus(t, d, ref); s.GetSize() != before.GetSize() || s.GetSize() < 5000 {
		t.Errorf("the image has %d bytes, before %d", s.GetSize(), before.GetSize())
	}
}

func TestIMM_14_Annotations(t *testing.T) {
	t.Parallel()
	d := shared(t)
	want := map[string]string{"org.opencontainers.image.title": "app", "other": "value"}
	_, ref := serveImage(t, registry.Options{}, customImage(t, registry.Image{Annotations: want}, 100))
	id := mustPull(t, d, ref)
	for k, v := range want {
		if got := imageStatus(t, d, ref).Spec.GetAnnotations()[k]; got != v {
			t.Errorf("status: annotation %s is %q", k, got)
		}
		if got := imagesWith(t, d, id)[0].Spec.GetAnnotations()[k]; got != v {
			t.Errorf("list: annotation %s is %q", k, got)
		}
	}
}

// pinnedAnd is a daemon with pinned images.
func pinnedAnd(t *testing.T, patterns map[string]string, opts ...daemon.Option) *daemon.Daemon {
	for name, p := range patterns {
		opts = append(opts, daemon.Set(p, "plugins", daemon.ImagesPlugin, "pinned_images", name))
	}
	return start(t, opts...)
}

func TestIMM_15_PinnedSandboxImage(t *testing.T) {
	d := pinnedAnd(t, map[string]string{"sandbox": daemon.PauseImage})
	r := registry.StartT(t, registry.Options{})
	if _, err := r.Push("pause", "1", images.MustBuild(images.Spec{})); err != nil {
		t.Fatal(err)
	}
	hosts(t, d, "gantry.test", fmt.Sprintf("server = %q\n", r.URL()))
	mustPull(t, d, daemon.PauseImage)
	if s := imageStatus(t, d, daemon.PauseImage); !s.GetPinned() {
		t.Errorf("the sandbox image is %v", s)
	}
	_, ref := serveImage(t, registry.Options{}, blobImage(t, 100))
	mustPull(t, d, ref)
	if s := imageStatus(t, d, ref); s.GetPinned() {
		t.Errorf("an image like any other is %v", s)
	}
	other := fmt.Sprintf("version = 3\n[plugins.%q.pinned_images]\nsandbox = \"gantry.test/another:1\"\n", daemon.ImagesPlugin)
	if err := os.WriteFile(filepath.Join(d.Dir, "conf.d", "pin.toml"), []byte(other), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Restart()
	if s := imageStatus(t, d, daemon.PauseImage); s == nil || s.Pinned {
		t.Errorf("what was the sandbox image is %v", s)
	}
}

func TestIMM_16_PinnedPatterns(t *testing.T) {
	r := registry.StartT(t, registry.Options{})
	d := pinnedAnd(t, map[string]string{"prefix": r.Host + "/infra/*", "word": "*agent*", "exact": r.Ref("exact:1")})
	for repo, want := range map[string]bool{"infra/proxy": true, "team/agent-x": true, "exact": true, "team/app": false, "exactly": false} {
		if _, err := r.Push(repo, "1", blobImage(t, 100)); err != nil {
			t.Fatal(err)
		}
		mustPull(t, d, r.Ref(repo+":1"))
		if got := imageStatus(t, d, r.Ref(repo+":1")).Pinned; got != want {
			t.Errorf("%s: pinned is %v", repo, got)
		}
	}
}

// TestIMM_17_LoadedOutsideCRI: what another client of containerd stores is an
// image of the node, without a restart.
func TestIMM_17_LoadedOutsideCRI(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 1000)
	ref := images.Load(t, d.Client(), "outside.test/app:1", img)
	eventually(t, ample, func() error {
		if s := imageStatus(t, d, ref); s.GetId() != idOf(t, img) {
			return fmt.Errorf("status is %v", s)
		}
		if l := imagesWith(t, d, idOf(t, img)); len(l) != 1 || !slices.Contains(l[0].RepoTags, ref) {
			return fmt.Errorf("listed is %v", l)
		}
		return nil
	})
	removeImage(t, d, ref)
	if imageStatus(t, d, ref) != nil {
		t.Error("it cannot be removed")
	}
}

// TestIMM_18_LoadFromArchive: a container of an image that came in an archive
// runs without any pull.
func TestIMM_18_LoadFromArchive(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	ref := images.Load(t, b.Client(), "archive.test/app:1", images.MustBuild(images.Spec{Env: []string{"FROM=archive"}}))
	eventually(t, ample, func() error {
		if imageStatus(t, b.Daemon, ref) == nil {
			return fmt.Errorf("the image is not there yet")
		}
		return nil
	})
	if got := sh(b.Daemon, b.run(daemon.ContainerConfig("app", ref)), "echo $FROM"); got != "archive" {
		t.Errorf("FROM=%q", got)
	}
}

// TestIMM_21_ProgressTimeout: a download that stands still is given up, one
// that is only slow is not.
func TestIMM_21_ProgressTimeout(t *testing.T) {
	d := start(t, daemon.Set("2s", "plugins", daemon.ImagesPlugin, "image_pull_progress_timeout"),
		daemon.Set(1, "plugins", daemon.ImagesPlugin, "max_concurrent_downloads"))
	img := blobImage(t, 100000)
	r, ref := serveImage(t, registry.Options{}, img)
	layers := registry.Blobs(layersOf(t, img)...)
	r.Inject(registry.Fault{Match: layers, StallAfter: 1000})
	begin := time.Now()
	_, err := pull(t.Context(), d, ref, nil)
	if err == nil || time.Since(begin) < 2*time.Second {
		t.Errorf("after %v: %v", time.Since(begin), err)
	}
	if err != nil && !strings.Contains(err.Error(), "progress") {
		t.Errorf("the error does not tell the reason: %v", err)
	}
	nothingPulled(t, d, r.Host)
	r.Heal()
	slow := blobImage(t, 100, 100, 100)
	if _, err := r.Push("app", "slow", slow); err != nil {
		t.Fatal(err)
	}
	r.Inject(registry.Fault{Match: registry.Blobs(layersOf(t, slow)...), Delay: 1200 * time.Millisecond})
	begin = time.Now()
	if got := mustPull(t, d, r.Ref("app:slow")); got != idOf(t, slow) || time.Since(begin) < 2*time.Second {
		t.Errorf("slowly pulled %s in %v", got, time.Since(begin))
	}
}

// TestIMM_25_Resume: a download that broke goes on where it was.
func TestIMM_25_Resume(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 2<<20)
	r, ref := serveImage(t, registry.Options{}, img)
	r.Inject(registry.Fault{Match: registry.Blobs(layersOf(t, img)...), CutAfter: 1 << 20, Times: 1})
	if got, err := pull(t.Context(), d, ref, nil); err != nil || got != idOf(t, img) {
		t.Fatalf("pulled %s, %v", got, err)
	}
	resumed := r.Count(func(q registry.Request) bool {
		from, _ := strings.CutPrefix(q.Header.Get("Range"), "bytes=")
		return q.Blob() && from != "" && !strings.HasPrefix(from, "0-")
	})
	if resumed == 0 {
		t.Error("the whole layer was fetched again")
	}
}

// TestBadRegistryAnswers: each gives an error that names stage and cause, and
// leaves nothing.
func TestBadRegistryAnswers(t *testing.T) {
	t.Parallel()
	d := shared(t)
	for name, row := range map[string]struct {
		fault func(layers []string) registry.Fault
		code  codes.Code
		words []string
	}{
		"manifest 401":  {manifestFault(401), codes.Unauthenticated, []string{"resolve", "401"}},
		"manifest 403":  {manifestFault(403), codes.PermissionDenied, []string{"resolve", "403"}},
		"manifest 404":  {manifestFault(404), codes.NotFound, []string{"resolve", "not found"}},
		"manifest 429":  {manifestFault(429), codes.ResourceExhausted, []string{"resolve", "429"}},
		"manifest 500":  {manifestFault(500), codes.Unavailable, []string{"resolve", "500"}},
		"layer 401":     {layerFault(registry.Fault{Status: 401}), codes.Unauthenticated, []string{"fetch", "401"}},
		"layer 403":     {layerFault(registry.Fault{Status: 403}), codes.PermissionDenied, []string{"fetch", "403"}},
		"layer 404":     {layerFault(registry.Fault{Status: 404}), codes.NotFound, []string{"fetch", "not found"}},
		"layer 500":     {layerFault(registry.Fault{Status: 500}), codes.Unavailable, []string{"fetch", "500"}},
		"manifest cut":  {manifestCut, codes.Unavailable, []string{"fetch"}},
		"layer corrupt": {layerFault(registry.Fault{Corrupt: true}), codes.FailedPrecondition, []string{"fetch", "digest"}},
		"layer short":   {layerFault(registry.Fault{Body: []byte("short")}), codes.Unavailable, []string{"fetch"}},
		"no JSON": {func([]string) registry.Fault {
			return registry.Fault{Match: registry.Manifests(), Body: []byte("<html>"), Header: http.Header{"Content-Type": {"text/html"}}}
		}, codes.FailedPrecondition, []string{"resolve", "text/html"}},
	} {
		t.Run(name, func(t *testing.T) {
			img := blobImage(t, 10000)
			r, ref := serveImage(t, registry.Options{}, img)
			r.Inject(row.fault(layersOf(t, img)))
			_, err := pull(t.Context(), d, ref, nil)
			wantError(t, err, row.code, append(row.words, ref)...)
			nothingPulled(t, d, r.Host)
			if imageStatus(t, d, ref) != nil || len(imagesWith(t, d, idOf(t, img))) != 0 {
				t.Error("the image is there")
			}
			r.Heal()
			if id := mustPull(t, d, ref); id != idOf(t, img) {
				t.Errorf("afterwards %s was pulled", id)
			}
		})
	}
}

func manifestFault(status int) func([]string) registry.Fault {
	return func([]string) registry.Fault { return registry.Fault{Match: registry.Manifests(), Status: status} }
}

func manifestCut([]string) registry.Fault {
	return registry.Fault{Match: func(q *http.Request) bool { return q.Method == http.MethodGet && registry.Manifests()(q) }, CutAfter: 50}
}

func layerFault(f registry.Fault) func([]string) registry.Fault {
	return func(layers []string) registry.Fault {
		f.Match = registry.Blobs(layers...)
		return f
	}
}

func TestREG_01_AuthModes(t *testing.T) {
	t.Parallel()
	d := shared(t)
	good := &cri.AuthConfig{Username: "user", Password: "secret"}
	for name, row := range map[string]struct {
		mode registry.Mode
		auth *cri.AuthConfig
	}{
		"anonymous": {registry.Anonymous, nil},
		"basic":     {registry.Basic, good},
		"bearer":    {registry.Bearer, good},
		"open":      {registry.BearerAnonymous, nil},
	} {
		img := blobImage(t, 1000)
		r, ref := serveImage(t, registry.Options{Auth: registry.Auth{Mode: row.mode}}, img)
		if id, err := pull(t.Context(), d, ref, row.auth); err != nil || id != idOf(t, img) {
			t.Errorf("%s: pulled %s, %v", name, id, err)
		}
		tokens := r.Count(func(q registry.Request) bool { return q.Path == "/token" })
		if bearer := row.mode == registry.Bearer || row.mode == registry.BearerAnonymous; bearer != (tokens > 0) {
			t.Errorf("%s: %d tokens were asked for", name, tokens)
		}
	}
	// The blobs of a private registry often live elsewhere, where its secrets
	// do not belong.
	img := blobImage(t, 1000)
	elsewhere, _ := serveImage(t, registry.Options{}, img)
	r, ref := serveImage(t, registry.Options{Auth: registry.Auth{Mode: registry.Bearer}}, img)
	layer := layersOf(t, img)[0]
	r.Inject(registry.Fault{Match: registry.Blobs(layer), Redirect: elsewhere.URL() + "/v2/app/blobs/" + layer})
	if id, err := pull(t.Context(), d, ref, good); err != nil || id != idOf(t, img) {
		t.Errorf("with a redirect: pulled %s, %v", id, err)
	}
	if got := elsewhere.Requests(); len(got) != 1 || got[0].Header.Get("Authorization") != "" {
		t.Errorf("the other host was asked %+v", got)
	}
}

// credentials wants a pull from a private registry to work with the one secret
// and to be refused with all the others.
func credentials(t *testing.T, a registry.Auth, good *cri.AuthConfig, bad ...*cri.AuthConfig) {
	t.Helper()
	d := shared(t)
	img := blobImage(t, 1000)
	_, ref := serveImage(t, registry.Options{Auth: a}, img)
	for _, wrong := range bad {
		_, err := pull(t.Context(), d, ref, wrong)
		wantError(t, err, codes.Unauthenticated)
		if err != nil && wrong.GetPassword() != "" && strings.Contains(err.Error(), wrong.Password) {
			t.Errorf("the error tells the secret: %v", err)
		}
		if imageStatus(t, d, ref) != nil {
			t.Errorf("pulled with %v", wrong)
		}
	}
	if id, err := pull(t.Context(), d, ref, good); err != nil || id != idOf(t, img) {
		t.Errorf("with %v: pulled %s, %v", good, id, err)
	}
	text, err := os.ReadFile(d.LogPath())
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"very-secret", "wrong-secret"} {
		if strings.Contains(string(text), secret) {
			t.Errorf("the daemon's log has the secret %s", secret)
		}
	}
}

func TestREG_02_UserAndPassword(t *testing.T) {
	t.Parallel()
	for _, mode := range []registry.Mode{registry.Basic, registry.Bearer} {
		credentials(t, registry.Auth{Mode: mode, User: "user", Password: "very-secret"},
			&cri.AuthConfig{Username: "user", Password: "very-secret"},
			nil, &cri.AuthConfig{Username: "user", Password: "wrong-secret"})
	}
}

func TestREG_03_AuthField(t *testing.T) {
	t.Parallel()
	credentials(t, registry.Auth{Mode: registry.Basic, User: "user", Password: "very-secret:with:colons"},
		&cri.AuthConfig{Auth: base64Of("user:very-secret:with:colons")},
		&cri.AuthConfig{Auth: base64Of("user:other")})
	_, err := pull(t.Context(), shared(t), "127.0.0.1:1/x", &cri.AuthConfig{Auth: "%%%"})
	wantError(t, err, codes.InvalidArgument, "auth")
}

func TestREG_04_IdentityToken(t *testing.T) {
	t.Parallel()
	credentials(t, registry.Auth{Mode: registry.Bearer, RefreshToken: "refresh"},
		&cri.AuthConfig{IdentityToken: "refresh"}, &cri.AuthConfig{IdentityToken: "stale"})
}

func TestREG_05_RegistryToken(t *testing.T) {
	t.Parallel()
	credentials(t, registry.Auth{Mode: registry.Bearer, Tokens: []string{"fixed"}},
		&cri.AuthConfig{RegistryToken: "fixed"}, &cri.AuthConfig{RegistryToken: "stale"})
}

// TestREG_06_ServerAddress: a secret for one host is not told to another.
func TestREG_06_ServerAddress(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 1000)
	r, ref := serveImage(t, registry.Options{Auth: registry.Auth{Mode: registry.Basic}}, img)
	auth := &cri.AuthConfig{Username: "user", Password: "secret", ServerAddress: "https://elsewhere.test"}
	_, err := pull(t.Context(), d, ref, auth)
	wantError(t, err, codes.Unauthenticated)
	if n := r.Count(func(q registry.Request) bool { return q.Header.Get("Authorization") != "" }); n != 0 {
		t.Errorf("the secret was told %d times", n)
	}
	auth.ServerAddress = r.Host
	if _, err := pull(t.Context(), d, ref, auth); err != nil {
		t.Error(err)
	}
}

// TestREG_12_Mirrors: the next host serves when the first does not.
func TestREG_12_Mirrors(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 1000)
	mirror, _ := serveImage(t, registry.Options{}, img)
	hosts(t, d, "mirrored.test", fmt.Sprintf(`server = "https://127.0.0.1:1"
[host."http://127.0.0.1:1"]
  capabilities = ["pull", "resolve"]
[host.%q]
  capabilities = ["pull", "resolve"]
`, mirror.URL()))
	if id, err := pull(t.Context(), d, "mirrored.test/app:1", nil); err != nil || id != idOf(t, img) {
		t.Errorf("pulled %s, %v", id, err)
	}
	if got := imageStatus(t, d, idOf(t, img)).RepoTags; !slices.Equal(got, []string{"mirrored.test/app:1"}) {
		t.Errorf("tags are %q", got)
	}
}

// TestREG_10_TLS: a registry with a certificate of one's own, which wants one
// of its clients too.
func TestREG_10_TLS(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 1000)
	pair, pool := selfSigned(t), x509.NewCertPool()
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	pool.AddCert(leaf)
	cert, key := pemFiles(t, pair)
	_, ref := serveImage(t, registry.Options{TLS: &tls.Config{
		Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
	}}, img)
	host, _, _ := strings.Cut(ref, "/")
	for _, row := range []struct {
		toml string
		ok   bool
	}{
		{"", false},
		{fmt.Sprintf("ca = %q\n", cert), false},
		{fmt.Sprintf("ca = %q\nclient = [[%q, %q]]\n", cert, cert, key), true},
	} {
		hosts(t, d, host, fmt.Sprintf("server = \"https://%s\"\n%s", host, row.toml))
		id, err := pull(t.Context(), d, ref, nil)
		if (err == nil) != row.ok || row.ok && id != idOf(t, img) {
			t.Errorf("hosts.toml %q: pulled %s, %v", row.toml, id, err)
		}
	}
}

func base64Of(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
