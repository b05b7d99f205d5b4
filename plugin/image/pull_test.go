package image

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/registry"
	"github.com/gantry-cri/gantry/plugin/operation"
)

func TestPullMakesRecordsAndUnpacks(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	img := sample(t, "app", 3)
	ref, digest := push(t, reg, "team/app:v1", img)

	id := w.pull(ref)
	if id != idOf(t, img) {
		t.Errorf("id %s, the configuration is %s", id, idOf(t, img))
	}
	want := []string{reg.Ref("team/app:v1"), reg.Ref("team/app@" + digest), id}
	slices.Sort(want)
	if got := w.records(); !slices.Equal(got, want) {
		t.Errorf("records %v, want %v", got, want)
	}
	st, info, err := w.Status(w.ctx, named(ref), true)
	must(t, err)
	if st.Id != id || !slices.Equal(st.RepoTags, want[:1]) || !slices.Equal(st.RepoDigests, []string{reg.Ref("team/app@" + digest)}) || st.Size == 0 {
		t.Errorf("status %v", st)
	}
	if !strings.Contains(info["info"], "chainID") {
		t.Errorf("verbose info %v", info)
	}
	r, err := w.Resolve(w.ctx, named(ref), "")
	must(t, err)
	if r.ID != id || r.Name != ref || r.Ref != reg.Ref("team/app@"+digest) || r.Snapshotter != "overlayfs" {
		t.Errorf("resolved %+v", r.Image)
	}
	sn, err := w.mdb.Snapshotter("overlayfs").Stat(w.ctx, r.ChainID)
	must(t, err)
	if sn.Kind != snapshots.KindCommitted {
		t.Errorf("snapshot %v", sn)
	}
	w.clean()
	must(t, w.gc())
	if _, err := w.Resolve(w.ctx, named(id), ""); err != nil {
		t.Errorf("after garbage collection: %v", err)
	}
}

func (w *world) gc() error { return w.Service.o.Collect(w.ctx) }

func TestPullByDigestKeepsTagOut(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	_, digest := push(t, reg, "app:v1", sample(t, "app", 1))
	for _, ref := range []string{reg.Ref("app@" + digest), reg.Ref("app:v9@" + digest)} {
		id := w.pull(ref)
		st, _, err := w.Status(w.ctx, named(ref), false)
		must(t, err)
		if st.GetId() != id || len(st.RepoTags) != 0 || !slices.Equal(st.RepoDigests, []string{reg.Ref("app@" + digest)}) {
			t.Errorf("%s: status %v", ref, st)
		}
	}
}

func TestPullEveryEncodingGivesTheSameLayers(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	chain := ""
	for name, change := range map[string]func(*registry.Image){
		"gzip":         func(*registry.Image) {},
		"zstd":         func(i *registry.Image) { i.Compression = registry.Zstd },
		"plain":        func(i *registry.Image) { i.Compression = registry.Plain },
		"docker":       func(i *registry.Image) { i.Docker = true },
		"docker-plain": func(i *registry.Image) { i.Docker, i.Compression = true, registry.Plain },
	} {
		w := newWorld(t, nil)
		spec := sampleSpec("same", 3)
		change(&spec)
		ref, _ := push(t, reg, "enc:"+name, build(t, spec))
		w.pull(ref)
		r, err := w.Resolve(w.ctx, named(ref), "")
		must(t, err)
		if chain == "" {
			chain = r.ChainID
		}
		if r.ChainID != chain {
			t.Errorf("%s: layers %s, want %s", name, r.ChainID, chain)
		}
	}
}

func TestPullUnpacksSideBySide(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, func(o *Options) { o.Policy.MaxUnpacks = 4 })
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 6))
	w.pull(ref)
	if _, err := w.Resolve(w.ctx, named(ref), ""); err != nil {
		t.Fatal(err)
	}
	w.clean()
}

func TestPullWithRanges(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, func(o *Options) { o.Policy.FetchBuffer, o.Policy.MaxDownloads = 64<<10, 4 })
	big := make([]byte, 1<<20)
	for i := range big {
		big[i] = byte(i * i >> 3)
	}
	ref, _ := push(t, reg, "big:v1", build(t, registry.Image{Compression: registry.Plain, Layers: []map[string][]byte{{"big": big}}}))
	w.pull(ref)
	w.clean()
}

func TestParallelPullsShareTheWork(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	hold := make(chan struct{})
	reg.Inject(registry.Fault{Match: registry.Blobs(), Hold: hold})
	w := newWorld(t, nil)
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 4))

	const n = 20
	ids := make([]string, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { ids[i], errs[i] = w.Pull(w.ctx, PullRequest{Ref: ref}) })
	}
	eventually(t, "every caller joined", func() bool {
		w.ops.mu.Lock()
		defer w.ops.mu.Unlock()
		for _, op := range w.ops.ops {
			return len(op.callers) == n
		}
		return false
	})
	close(hold)
	wg.Wait()
	for i := range n {
		if errs[i] != nil || ids[i] != ids[0] {
			t.Fatalf("caller %d: %s, %v", i, ids[i], errs[i])
		}
	}
	for d, c := range reg.BlobGets() {
		if c != 1 {
			t.Errorf("blob %s was fetched %d times", d, c)
		}
	}
	w.clean()
	if len(w.ops.ops) != 0 {
		t.Errorf("operations left: %v", w.ops.ops)
	}
}

func TestImagesThatShareLayersFetchAndUnpackThemOnce(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	var refs []string
	for _, name := range []string{"a", "b", "c", "d"} {
		spec := sampleSpec("base", 3)
		spec.Layers = append(spec.Layers, map[string][]byte{"own": []byte(name)})
		ref, _ := push(t, reg, name+":v1", build(t, spec))
		refs = append(refs, ref)
	}
	var wg sync.WaitGroup
	errs := make([]error, len(refs))
	for i, ref := range refs {
		wg.Go(func() { _, errs[i] = w.Pull(w.ctx, PullRequest{Ref: ref}) })
	}
	wg.Wait()
	must(t, errors.Join(errs...))
	for d, c := range reg.BlobGets() {
		if c != 1 {
			t.Errorf("blob %s was fetched %d times", d, c)
		}
	}
	for d, c := range w.applier.applied {
		if c != 1 {
			t.Errorf("layer %s was unpacked %d times", d, c)
		}
	}
	if len(w.applier.applied) != 3+len(refs) {
		t.Errorf("%d layers unpacked", len(w.applier.applied))
	}
}

func TestCancelledPullLeavesNothing(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	w.pulls.Linger = time.Millisecond
	img := sample(t, "app", 3)
	ref, _ := push(t, reg, "app:v1", img)
	layers, err := img.Layers()
	must(t, err)
	last, err := layers[2].Digest()
	must(t, err)
	reg.Inject(registry.Fault{Match: registry.Blobs(last.String()), StallAfter: 20})

	ctx, cancel := context.WithCancel(w.ctx)
	var table operation.Table
	ctx, op := table.Begin(ctx, operation.Info{Name: "PullImage", Object: ref})
	defer op.End()
	done := make(chan error, 1)
	go func() { _, err := w.Pull(ctx, PullRequest{Ref: ref}); done <- err }()
	eventually(t, "the stalled layer is asked for", func() bool { return reg.BlobGets()[last.String()] == 1 })
	eventually(t, "the caller's operation shows the stage", func() bool {
		e, _ := table.Find("PullImage", ref)
		return e.Stage == stageUnpack // of the layers before
	})
	cancel()
	err = <-done
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	w.pulls.Wait()
	w.empty()

	reg.Heal()
	w.pull(ref) // a retry works
	w.clean()
}

func TestRetryJoinsTheLingeringPull(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	hold := make(chan struct{})
	reg.Inject(registry.Fault{Match: registry.Blobs(), Hold: hold})
	w := newWorld(t, nil)
	w.pulls.Linger = time.Minute
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 2))
	ctx, cancel := context.WithCancelCause(w.ctx)
	done := make(chan error, 1)
	go func() { _, err := w.Pull(ctx, PullRequest{Ref: ref}); done <- err }()
	eventually(t, "a blob is asked for", func() bool { return len(reg.BlobGets()) > 0 })
	cancel(context.DeadlineExceeded)
	if err := <-done; !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), stageFetch) {
		t.Errorf("error %v", err)
	}
	go func() { _, err := w.Pull(w.ctx, PullRequest{Ref: ref}); done <- err }()
	eventually(t, "the retry joined", func() bool {
		w.ops.mu.Lock()
		defer w.ops.mu.Unlock()
		for _, op := range w.ops.ops {
			return len(op.callers) == 1
		}
		return false
	})
	close(hold)
	must(t, <-done)
	if n := reg.Count(func(r registry.Request) bool { return r.Method == http.MethodHead }); n != 1 {
		t.Errorf("%d resolutions for one pull", n)
	}
}

func TestPullErrors(t *testing.T) {
	img := sample(t, "app", 2)
	layers, err := img.Layers()
	must(t, err)
	first, err := layers[0].Digest()
	must(t, err)
	blob := registry.Blobs(first.String())
	for name, tc := range map[string]struct {
		auth  registry.Auth
		fault registry.Fault
		ref   string
		class error
		says  []string
	}{
		"401":          {auth: registry.Auth{Mode: registry.Basic}, class: errdefs.ErrUnauthenticated, says: []string{"resolve", "401"}},
		"401 bearer":   {auth: registry.Auth{Mode: registry.Bearer}, class: errdefs.ErrUnauthenticated, says: []string{"resolve", "401"}},
		"403":          {auth: registry.Auth{Forbidden: true}, class: errdefs.ErrPermissionDenied, says: []string{"resolve", "403", "denied"}},
		"404":          {ref: "nothing:here", class: errdefs.ErrNotFound, says: []string{"resolve"}},
		"429":          {fault: registry.Fault{Match: registry.Manifests(), Status: 429, Header: http.Header{"Retry-After": {"0"}}}, class: errdefs.ErrResourceExhausted, says: []string{"resolve", "429"}},
		"500":          {fault: registry.Fault{Match: registry.Manifests(), Status: 500}, class: errdefs.ErrUnavailable, says: []string{"resolve", "500"}},
		"layer 404":    {fault: registry.Fault{Match: blob, Status: 404}, class: errdefs.ErrNotFound, says: []string{"fetch"}},
		"layer 403":    {fault: registry.Fault{Match: blob, Status: 403}, class: errdefs.ErrPermissionDenied, says: []string{"fetch", "403"}},
		"layer 503":    {fault: registry.Fault{Match: blob, Status: 503}, class: errdefs.ErrUnavailable, says: []string{"fetch", "503"}},
		"wrong digest": {fault: registry.Fault{Match: blob, Corrupt: true}, class: errdefs.ErrFailedPrecondition, says: []string{"fetch", "digest"}},
		"always cut":   {fault: registry.Fault{Match: blob, Header: http.Header{"Content-Length": {"9"}}, Body: []byte("x")}, class: errdefs.ErrUnavailable, says: []string{"fetch"}},
		"html":         {fault: registry.Fault{Match: registry.Manifests(), Header: http.Header{"Content-Type": {"text/html"}}, Body: []byte("<html>")}, class: errdefs.ErrFailedPrecondition, says: []string{"resolve", "text/html"}},
	} {
		t.Run(name, func(t *testing.T) {
			reg := registry.StartT(t, registry.Options{Auth: tc.auth})
			w := newWorld(t, nil)
			ref, _ := push(t, reg, "app:v1", img)
			if tc.ref != "" {
				ref = reg.Ref(tc.ref)
			}
			if tc.fault.Match != nil {
				reg.Inject(tc.fault)
			}
			_, err := w.Pull(w.ctx, PullRequest{Ref: ref})
			if !errors.Is(err, tc.class) || errdefs.Resolve(err) != tc.class {
				t.Errorf("class %v of %v, want %v", errdefs.Resolve(err), err, tc.class)
			}
			for _, s := range append(tc.says, "pull image", ref) {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
			w.empty()
		})
	}
}

func TestPullNoConnection(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	ref := reg.Ref("app:v1")
	reg.Close()
	w := newWorld(t, nil)
	_, err := w.Pull(w.ctx, PullRequest{Ref: ref})
	if errdefs.Resolve(err) != errdefs.ErrUnavailable || !strings.Contains(err.Error(), reg.Host) {
		t.Errorf("error %v", err)
	}
}

func TestPullResumesABrokenConnection(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 1))
	reg.Inject(registry.Fault{Match: registry.Blobs(), CutAfter: 30, Times: 2})
	w.pull(ref)
	w.clean()
}

func TestPullRefusesWhatIsNoImage(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	config, err := reg.PutBlob("odd", []byte("{}"))
	must(t, err)
	for name, tc := range map[string]struct{ mediaType, body, says string }{
		"schema1":  {"application/vnd.docker.distribution.manifest.v1+prettyjws", `{"schemaVersion":1,"fsLayers":[]}`, "schema 1"},
		"artifact": {string(types.OCIManifestSchema1), `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"` + config + `","size":2},"layers":[]}`, "not a container image"},
		"config":   {string(types.OCIManifestSchema1), `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"` + config + `","size":99999999},"layers":[]}`, "larger than"},
		"digest":   {string(types.OCIManifestSchema1), `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:../../x","size":2},"layers":[]}`, "digest"},
	} {
		_, err := reg.PutManifest("odd", name, tc.mediaType, []byte(tc.body))
		must(t, err)
		_, err = w.Pull(w.ctx, PullRequest{Ref: reg.Ref("odd:" + name)})
		if err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: error %v", name, err)
		}
		if errdefs.IsNotImplemented(err) || errdefs.Resolve(err) != errdefs.ErrFailedPrecondition {
			t.Errorf("%s: class %v", name, errdefs.Resolve(err))
		}
	}
	w.empty()
}

// A digest in a manifest can name a blob that is here already and is far too
// large to be a configuration, whatever size the manifest claims.
func TestPullBoundsAConfigurationThatIsALayer(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	layer, err := registry.Layer(map[string][]byte{"big": make([]byte, maxConfig+1)}, registry.Plain, false)
	must(t, err)
	d, err := layer.Digest()
	must(t, err)
	ref, _ := push(t, reg, "big:v1", build(t, registry.Image{Compression: registry.Plain, Layers: []map[string][]byte{{"big": make([]byte, maxConfig+1)}}}))
	w.pull(ref)
	body := `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"` + d.String() + `","size":100},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"` + d.String() + `","size":100}]}`
	_, err = reg.PutManifest("big", "trick", string(types.OCIManifestSchema1), []byte(body))
	must(t, err)
	if _, err = w.Pull(w.ctx, PullRequest{Ref: reg.Ref("big:trick")}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "its descriptor says 100") {
		t.Errorf("error %v", err)
	}
	// A record that others made has been through no pull.
	size, err := layer.Size()
	must(t, err)
	if _, err = (boundedStore{w.content}).ReaderAt(w.ctx, imagespec.Descriptor{Digest: digest.Digest(d.String()), Size: size}); err == nil || !strings.Contains(err.Error(), "more than a manifest or configuration has") {
		t.Errorf("error %v", err)
	}
	w.clean()
}

// Sizes in a manifest are claims, and what is here already is not downloaded
// again: it is compared.
func TestPullRefusesSizesThatAreNotSo(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	img := sample(t, "app", 2)
	ref, _ := push(t, reg, "app:v1", img)
	id := w.pull(ref)
	st, _, err := w.Status(w.ctx, named(ref), false)
	must(t, err)
	honest, err := img.RawManifest()
	must(t, err)
	for name, lie := range map[string]func(*imagespec.Manifest){
		"small":    func(m *imagespec.Manifest) { m.Layers[1].Size = 1 },
		"huge":     func(m *imagespec.Manifest) { m.Layers[0].Size = math.MaxInt64 },
		"negative": func(m *imagespec.Manifest) { m.Layers[0].Size = -1 },
		"config":   func(m *imagespec.Manifest) { m.Config.Size-- },
	} {
		var m imagespec.Manifest
		must(t, json.Unmarshal(honest, &m))
		lie(&m)
		raw, err := json.Marshal(m)
		must(t, err)
		d, err := reg.PutManifest("app", name, string(types.DockerManifestSchema2), raw)
		must(t, err)
		if _, err = w.Pull(w.ctx, PullRequest{Ref: reg.Ref("app:" + name)}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "bytes") {
			t.Errorf("%s: error %v", name, err)
		}
		// The same image by other ways than a pull.
		target := imagespec.Descriptor{MediaType: string(types.DockerManifestSchema2), Digest: digest.Digest(d), Size: int64(len(raw))}
		must(t, content.WriteBlob(w.ctx, w.content, name, strings.NewReader(string(raw)), target))
		if p, err := w.index.reader.image(w.ctx, target, w.platforms.matchers[0]); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: read %v, %v", name, p, err)
		}
	}
	// What a record says of its target plays no part.
	rec, err := w.images.Get(w.ctx, id)
	must(t, err)
	rec.Target.Size = 1 << 50
	p, err := w.index.reader.image(w.ctx, rec.Target, w.platforms.matchers[0])
	if err != nil || p.size != int64(st.Size) {
		t.Errorf("read %v, %v; the image has %d bytes", p, err, st.Size)
	}
	w.clean()
}

// A manifest that does not end is one that is too large.
func TestPullEndlessManifest(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	reg.Inject(registry.Fault{Match: registry.Manifests(), Endless: true, Header: http.Header{"Content-Type": {string(types.OCIManifestSchema1)}}})
	w := newWorld(t, nil)
	_, err := w.Pull(w.ctx, PullRequest{Ref: reg.Ref("app:v1")})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "manifest has more than 4194304 bytes") {
		t.Errorf("error %v", err)
	}
	w.empty()
}

func TestStalledAndTricklingPullsEnd(t *testing.T) {
	for name, f := range map[string]registry.Fault{
		"stall":   {StallAfter: 20},
		"trickle": {Trickle: 30 * time.Millisecond},
		"silence": {Delay: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			reg := registry.StartT(t, registry.Options{})
			w := newWorld(t, func(o *Options) { o.Policy.ProgressTimeout = time.Second })
			ref, _ := push(t, reg, "app:v1", sample(t, "app", 1))
			layers, err := sample(t, "app", 1).Layers()
			must(t, err)
			d, err := layers[0].Digest()
			must(t, err)
			f.Match = registry.Blobs(d.String())
			reg.Inject(f)
			_, err = w.Pull(w.ctx, PullRequest{Ref: ref})
			if errdefs.Resolve(err) != context.DeadlineExceeded || !strings.Contains(err.Error(), "no progress for") || !strings.Contains(err.Error(), stageFetch) {
				t.Errorf("error %v", err)
			}
			w.empty()
		})
	}
}

func TestSlowUnpackIsNotAStall(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, func(o *Options) { o.Policy.ProgressTimeout = time.Second })
	w.applier.before = func(ctx context.Context) error { return sleep(ctx, 2500*time.Millisecond) }
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 1))
	w.pull(ref)
}

func TestFailedUnpackLeavesNothing(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	for _, parallel := range []int{0, 4} {
		w := newWorld(t, func(o *Options) { o.Policy.MaxUnpacks = parallel })
		w.applier.before = func(context.Context) error { return os.ErrPermission }
		ref, _ := push(t, reg, "app:v1", sample(t, "app", 3))
		_, err := w.Pull(w.ctx, PullRequest{Ref: ref})
		if err == nil || !strings.Contains(err.Error(), stageUnpack) {
			t.Errorf("error %v", err)
		}
		w.empty()
	}
}

func TestPullChoosesThePlatform(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	mk := func(arch, variant string) v1.Image {
		spec := sampleSpec(arch+variant, 1)
		spec.Architecture, spec.Variant = arch, variant
		return build(t, spec)
	}
	host := hostPlatform()
	best, arm, old := mk(host.Architecture, host.Variant), mk("arm64", ""), mk(host.Architecture, "")
	idx, err := registry.Index(mk("s390x", ""), arm, old, best)
	must(t, err)
	_, err = reg.PushIndex("multi", "v1", idx)
	must(t, err)
	ref := reg.Ref("multi:v1")
	if id := w.pull(ref); id != idOf(t, best) && host.Architecture == "amd64" {
		t.Errorf("id %s, want %s", id, idOf(t, best))
	}
	id, err := w.Pull(w.ctx, PullRequest{Ref: ref, Handler: "arm"})
	must(t, err)
	if id != idOf(t, arm) {
		t.Errorf("id for the arm handler %s, want %s", id, idOf(t, arm))
	}
	for handler, img := range map[string]v1.Image{"": best, "arm": arm} {
		r, err := w.Resolve(w.ctx, named(ref), handler)
		must(t, err)
		if r.ID != idOf(t, img) {
			t.Errorf("handler %q resolves to %s", handler, r.ID)
		}
	}
	only, err := registry.Index(mk("s390x", ""))
	must(t, err)
	_, err = reg.PushIndex("other", "v1", only)
	must(t, err)
	if _, err := w.Pull(w.ctx, PullRequest{Ref: reg.Ref("other:v1")}); !errdefs.IsNotFound(err) {
		t.Errorf("no image for the platform: %v", err)
	}
}

// TestPullForANamedPlatform: what a request names is what it gets, beside the
// image for everybody else, and only as long as somebody named it.
func TestPullForANamedPlatform(t *testing.T) {
	const key = "test/platform"
	reg := registry.StartT(t, registry.Options{})
	choosy := func(o *Options) { o.Handlers = map[string]Handler{"second": {}, "choosy": {PlatformAnnotation: key}} }
	w := newWorld(t, choosy)
	host := hostPlatform()
	mk := func(arch string) v1.Image {
		spec := sampleSpec(arch, 1)
		spec.Architecture = arch
		return build(t, spec)
	}
	ours, arm, z := mk(host.Architecture), mk("arm64"), mk("s390x")
	idx, err := registry.Index(arm, z, ours)
	must(t, err)
	_, err = reg.PushIndex("multi", "v1", idx)
	must(t, err)
	ref := reg.Ref("multi:v1")
	pull := func(handler, platform string) (string, error) {
		return w.Pull(w.ctx, PullRequest{Ref: ref, Handler: handler, Annotations: map[string]string{key: platform}})
	}
	ask := func(platform string) *cri.ImageSpec {
		return &cri.ImageSpec{Image: ref, RuntimeHandler: "choosy", Annotations: map[string]string{key: platform}}
	}
	id, err := pull("choosy", "linux/arm64")
	must(t, err)
	if id != idOf(t, arm) {
		t.Errorf("got %s, want the one for arm64, %s", id, idOf(t, arm))
	}
	// Who names no platform does not have it.
	if st, _, err := w.Status(w.ctx, named(ref), false); err != nil || st != nil {
		t.Errorf("without a name there is %v, %v", st, err)
	}
	for _, platform := range []string{"linux/arm64", "arm64", "linux/arm64/v8"} {
		st, _, err := w.Status(w.ctx, ask(platform), false)
		if err != nil || st.GetId() != id || len(st.GetRepoTags()) != 1 {
			t.Errorf("%s: the status is %v, %v", platform, st, err)
		}
		if r, err := w.Resolve(w.ctx, ask(platform), "choosy"); err != nil || r.ID != id {
			t.Errorf("%s: resolved to %s, %v", platform, r.ID, err)
		}
	}
	if id := w.pull(ref); id != idOf(t, ours) {
		t.Errorf("without a name %s, want %s", id, idOf(t, ours))
	}
	must(t, w.gc())
	for range 2 {
		for spec, want := range map[*cri.ImageSpec]v1.Image{named(ref): ours, ask("linux/arm64"): arm, named(idOf(t, arm)): arm} {
			if r, err := w.Resolve(w.ctx, spec, "choosy"); err != nil || r.ID != idOf(t, want) {
				t.Errorf("%v resolved to %s, %v", spec, r.ID, err)
			}
		}
		// And the same from disk.
		w.start(choosy)
	}
	for platform, says := range map[string]string{"linux/riscv64": "there are", "linux/s390x": "not on this node for platform linux/s390x", "a/b/c/d": "annotations"} {
		if r, err := w.Resolve(w.ctx, ask(platform), "choosy"); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %s, %v", platform, r.ID, err)
		}
	}
	if _, err := pull("choosy", "linux/riscv64"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "linux/s390x") {
		t.Errorf("one that there is not: %v", err)
	}
	if _, err := pull("choosy", "no platform"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), key) {
		t.Errorf("one that is none: %v", err)
	}
	// A handler that does not allow it hears nothing.
	if id, err := pull("second", "linux/s390x"); err != nil || id != idOf(t, ours) {
		t.Errorf("not allowed: %s, %v", id, err)
	}
	single, _ := push(t, reg, "single:v1", z)
	if _, err := w.Pull(w.ctx, PullRequest{Ref: single, Handler: "choosy", Annotations: map[string]string{key: "linux/arm64"}}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "only linux/s390x") {
		t.Errorf("an image without an index: %v", err)
	}
	// The tag moves: what was pulled before is no answer any more.
	newer := sampleSpec("newer", 2)
	newer.Architecture = "arm64"
	idx, err = registry.Index(build(t, newer), ours)
	must(t, err)
	_, err = reg.PushIndex("multi", "v1", idx)
	must(t, err)
	w.pull(ref)
	if st, _, err := w.Status(w.ctx, ask("linux/arm64"), false); err != nil || st != nil {
		t.Errorf("after the tag has moved: %v, %v", st, err)
	}
	must(t, w.Remove(w.ctx, idOf(t, arm)))
	must(t, w.Remove(w.ctx, ref))
}

func TestPullForAnotherSnapshotter(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 2))
	pod := &cri.PodSandboxConfig{Annotations: map[string]string{handlerAnnotation: "second"}}
	_, err := w.Pull(w.ctx, PullRequest{Ref: ref, Pod: pod})
	must(t, err)
	r, err := w.Resolve(w.ctx, named(ref), "second")
	must(t, err)
	if _, err := w.mdb.Snapshotter("second").Stat(w.ctx, r.ChainID); err != nil {
		t.Error(err)
	}
	// For the default one it is unpacked when a container needs it.
	reg.ResetLog()
	r, err = w.Resolve(w.ctx, named(ref), "")
	must(t, err)
	if _, err := w.mdb.Snapshotter("overlayfs").Stat(w.ctx, r.ChainID); err != nil {
		t.Error(err)
	}
	if n := len(reg.Requests()); n != 0 {
		t.Errorf("%d requests to the registry", n)
	}
	must(t, w.gc())
	if _, err := w.mdb.Snapshotter("overlayfs").Stat(w.ctx, r.ChainID); err != nil {
		t.Errorf("after garbage collection: %v", err)
	}
	w.clean()
}

func TestDiscardLayersKeepsTheImage(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, func(o *Options) { o.Policy.DiscardLayers = true })
	img := sample(t, "app", 2)
	ref, _ := push(t, reg, "app:v1", img)
	w.pull(ref)
	must(t, w.gc())
	layers, err := img.Layers()
	must(t, err)
	d, err := layers[0].Digest()
	must(t, err)
	must(t, w.content.Walk(w.ctx, func(i content.Info) error {
		if i.Digest.String() == d.String() {
			t.Error("the compressed layer is still there")
		}
		return nil
	}))
	if _, err := w.Resolve(w.ctx, named(ref), ""); err != nil {
		t.Error(err)
	}
	if _, err := w.Resolve(w.ctx, named(ref), "second"); !errdefs.IsNotFound(err) {
		t.Errorf("unpack without layers: %v", err)
	}
	w.clean()
}

func TestHostileLabelsStayInTheImage(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	spec := sampleSpec("hostile", 1)
	spec.Config = v1.Config{Labels: map[string]string{
		"containerd.io/restart.loguri": "binary:///bin/sh", "io.cri-containerd.pinned": "pinned", "containerd.io/gc.root": "now",
	}, User: "0:0"}
	spec.Annotations = map[string]string{"containerd.io/gc.expire": "2000-01-01T00:00:00Z", "org.example": "kept"}
	ref, _ := push(t, reg, "hostile:v1", build(t, spec))
	w.pull(ref)
	all, err := w.images.List(w.ctx)
	must(t, err)
	for _, rec := range all {
		if len(rec.Labels) != 1 || rec.Labels[labelManaged] != managed {
			t.Errorf("%s has labels %v", rec.Name, rec.Labels)
		}
	}
	must(t, w.content.Walk(w.ctx, func(i content.Info) error {
		for k := range i.Labels {
			if k == "containerd.io/gc.root" || k == "containerd.io/gc.expire" || strings.HasPrefix(k, "containerd.io/restart") {
				t.Errorf("content label %s", k)
			}
		}
		return nil
	}))
	st, _, err := w.Status(w.ctx, named(ref), false)
	must(t, err)
	if st.Pinned || st.GetUid().GetValue() != 0 || st.Uid == nil || st.Spec.Annotations["org.example"] != "kept" {
		t.Errorf("status %v", st)
	}
}

func TestLeftoverLeasesAreSwept(t *testing.T) {
	w := newWorld(t, nil)
	_, err := w.underLease(w.ctx, "test", func(ctx context.Context) (string, error) {
		w.start(nil) // the daemon starts again while the lease is there
		w.clean()
		return "", nil
	})
	must(t, err)
}

func TestStopEndsPulls(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	reg.Inject(registry.Fault{Match: registry.Blobs(), Delay: time.Hour})
	w := newWorld(t, nil)
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 1))
	done := make(chan error, 1)
	go func() { _, err := w.Pull(w.ctx, PullRequest{Ref: ref}); done <- err }()
	eventually(t, "a blob is asked for", func() bool { return len(reg.BlobGets()) > 0 })
	must(t, w.group.Stop(w.ctx))
	if err := <-done; !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "shutting down") {
		t.Errorf("error %v", err)
	}
	w.empty()
}

func TestFailedTagRestoresRecords(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	ref, _ := push(t, reg, "app:v1", sample(t, "one", 1))
	id := w.pull(ref)
	before := w.records()
	push(t, reg, "app:v1", sample(t, "two", 1))
	failing := &failingImages{Store: w.images, after: 1}
	w.Service.o.Images = failing
	if _, err := w.Pull(w.ctx, PullRequest{Ref: ref}); err == nil || !strings.Contains(err.Error(), stageTag) {
		t.Fatalf("error %v", err)
	}
	w.Service.o.Images = w.images
	if got := w.records(); !slices.Equal(got, before) {
		t.Errorf("records %v, before %v", got, before)
	}
	must(t, w.index.refresh(w.ctx, before...))
	if st, _, err := w.Status(w.ctx, named(ref), false); err != nil || st.GetId() != id {
		t.Errorf("the tag means %v, %v", st, err)
	}
	w.clean()
}

func TestImageIsTheSameFromTwoRegistries(t *testing.T) {
	a, b := registry.StartT(t, registry.Options{}), registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	img := sample(t, "app", 1)
	ra, da := push(t, a, "app:v1", img)
	rb, db := push(t, b, "copy/app:v2", img)
	if w.pull(ra) != w.pull(rb) {
		t.Error("two IDs for one image")
	}
	all, err := w.List(w.ctx, nil)
	must(t, err)
	if len(all) != 1 {
		t.Fatalf("%d images", len(all))
	}
	wantTags, wantDigests := []string{ra, rb}, []string{a.Ref("app@" + da), b.Ref("copy/app@" + db)}
	slices.Sort(wantTags)
	slices.Sort(wantDigests)
	if !slices.Equal(all[0].RepoTags, wantTags) || !slices.Equal(all[0].RepoDigests, wantDigests) {
		t.Errorf("image %v", all[0])
	}
}

func TestFSInfoFollowsTheSnapshots(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	imgs, ctrs, err := w.FSInfo(w.ctx)
	must(t, err)
	if len(imgs) != 1 || len(ctrs) != 1 || imgs[0].FsId.Mountpoint != filepath.Join(w.root, "overlayfs") {
		t.Fatalf("%v %v", imgs, ctrs)
	}
	ref, _ := push(t, reg, "app:v1", build(t, registry.Image{Layers: []map[string][]byte{{"big": make([]byte, 3<<20)}}}))
	w.pull(ref)
	eventually(t, "the image counts", func() bool {
		imgs, _, err := w.FSInfo(w.ctx)
		must(t, err)
		used := imgs[0].UsedBytes.Value
		return used > 3<<20 && used < 4<<20 && imgs[0].InodesUsed.Value > 0
	})
	r, err := w.Resolve(w.ctx, named(ref), "")
	must(t, err)
	mounts, err := w.mdb.Snapshotter("overlayfs").Prepare(w.ctx, "container", r.ChainID, snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"}))
	must(t, err)
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			must(t, os.WriteFile(filepath.Join(dir, "x"), make([]byte, 1<<20), 0o600))
		}
	}
	eventually(t, "the container's layer counts", func() bool {
		imgs, ctrs, err := w.FSInfo(w.ctx)
		must(t, err)
		return ctrs[0].UsedBytes.Value >= 1<<20 && imgs[0].UsedBytes.Value > 4<<20
	})
}
