package image

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	specsgo "github.com/opencontainers/image-spec/specs-go"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantry-cri/gantry/integration/registry"
	"github.com/gantry-cri/gantry/plugin/facts"
)

func blob(text, title string) imagespec.Descriptor {
	d := imagespec.Descriptor{MediaType: "application/x-file", Digest: digest.FromString(text), Size: int64(len(text))}
	if title != "" {
		d.Annotations = map[string]string{imagespec.AnnotationTitle: title}
	}
	return d
}

func TestFilesOf(t *testing.T) {
	byDigest := "sha256-" + digest.FromString("x").Encoded()
	for name, c := range map[string]struct {
		layers []imagespec.Descriptor
		want   []string // nil for an error
	}{
		"titles":       {[]imagespec.Descriptor{blob("a", "a"), blob("b", "dir/b"), blob("c", "dir/sub/c c.bin"), blob("d", "./d"), blob("e", "e//f/")}, []string{"a", "dir/b", "dir/sub/c c.bin", "d", "e/f"}},
		"same blob":    {[]imagespec.Descriptor{blob("x", "a"), blob("x", "b")}, []string{"a", "b"}},
		"dots":         {[]imagespec.Descriptor{blob("x", "..."), blob("x", "..a"), blob("x", ".hidden")}, []string{"...", "..a", ".hidden"}},
		"no title":     {[]imagespec.Descriptor{blob("x", ""), blob("x", ""), blob("y", "y")}, []string{byDigest, "y"}},
		"empty blob":   {[]imagespec.Descriptor{imagespec.DescriptorEmptyJSON, blob("y", "y")}, []string{"y"}},
		"longest":      {[]imagespec.Descriptor{blob("x", strings.Repeat("n", maxName))}, []string{strings.Repeat("n", maxName)}},
		"nothing":      {nil, nil},
		"only empty":   {[]imagespec.Descriptor{imagespec.DescriptorEmptyJSON}, nil},
		"up":           {[]imagespec.Descriptor{blob("x", "../x")}, nil},
		"up inside":    {[]imagespec.Descriptor{blob("x", "a/../b")}, nil},
		"only up":      {[]imagespec.Descriptor{blob("x", "..")}, nil},
		"absolute":     {[]imagespec.Descriptor{blob("x", "/etc/passwd")}, nil},
		"itself":       {[]imagespec.Descriptor{blob("x", ".")}, nil},
		"nul":          {[]imagespec.Descriptor{blob("x", "a\x00b")}, nil},
		"newline":      {[]imagespec.Descriptor{blob("x", "a\nb")}, nil},
		"no text":      {[]imagespec.Descriptor{blob("x", "a\xff")}, nil},
		"long name":    {[]imagespec.Descriptor{blob("x", strings.Repeat("n", maxName+1))}, nil},
		"long path":    {[]imagespec.Descriptor{blob("x", strings.Repeat("nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn/", 25)+"x")}, nil},
		"deep":         {[]imagespec.Descriptor{blob("x", strings.Repeat("d/", maxParts)+"x")}, nil},
		"twice":        {[]imagespec.Descriptor{blob("x", "a"), blob("y", "./a")}, nil},
		"file and dir": {[]imagespec.Descriptor{blob("x", "a/b/c"), blob("y", "a")}, nil},
		"digest":       {[]imagespec.Descriptor{{Digest: "sha256:../../x", Size: 1}}, nil},
		"too many":     {slices.Repeat([]imagespec.Descriptor{blob("x", "")}, maxFiles+1), nil},
		"taken":        {[]imagespec.Descriptor{blob("x", ""), blob("y", byDigest)}, nil},
	} {
		files, err := filesOf(c.layers)
		if c.want == nil {
			if !errdefs.IsFailedPrecondition(err) {
				t.Errorf("%s: %v, %v", name, files, err)
			}
			continue
		}
		var got []string
		for _, f := range files {
			got = append(got, f.Name)
		}
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// FuzzFilesOf: whatever a manifest says, its files are below the volume, and no
// two of them are in each other's way.
func FuzzFilesOf(f *testing.F) {
	for _, m := range []string{`{}`, `{"layers":[{"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","annotations":{"org.opencontainers.image.title":"a/b"}}]}`} {
		f.Add([]byte(m), "../x", "x/y")
	}
	f.Fuzz(func(t *testing.T, raw []byte, one, two string) {
		var m imagespec.Manifest
		_ = json.Unmarshal(raw, &m) // what could be read counts
		files, err := filesOf(append(m.Layers, blob("1", one), blob("2", two)))
		if err != nil {
			if !errdefs.IsFailedPrecondition(err) {
				t.Errorf("class of %v", err)
			}
			return
		}
		dirs := map[string]bool{}
		for _, f := range files {
			if !filepath.IsLocal(f.Name) || path.Clean(f.Name) != f.Name || f.Name == "." {
				t.Errorf("file %q", f.Name)
			}
			for d := path.Dir(f.Name); d != "."; d = path.Dir(d) {
				dirs[d] = true
			}
		}
		seen := map[string]bool{}
		for _, f := range files {
			if seen[f.Name] || dirs[f.Name] {
				t.Errorf("file %q is in the way", f.Name)
			}
			seen[f.Name] = true
		}
	})
}

// plainFiles writes files through a mount, without links.
type plainFiles struct {
	content content.Provider
	before  func() error
}

func (p plainFiles) Write(ctx context.Context, root []mount.Mount, files []facts.File, done func(int64)) error {
	return mount.WithTempMount(ctx, root, func(dir string) error {
		for i, f := range files {
			if i > 0 && p.before != nil {
				if err := p.before(); err != nil {
					return err
				}
			}
			var b []byte
			if f.Size > 0 {
				var err error
				if b, err = content.ReadBlob(ctx, p.content, imagespec.Descriptor{Digest: f.Digest, Size: f.Size}); err != nil {
					return err
				}
			}
			name := filepath.Join(dir, f.Name)
			if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, b, 0o444)); err != nil {
				return err
			}
			done(f.Size)
		}
		return nil
	})
}

// artifactOf is the manifest of files, whose contents are pushed.
func artifactOf(t *testing.T, r *registry.Registry, repo string, layers map[string]string) imagespec.Manifest {
	t.Helper()
	m := imagespec.Manifest{Versioned: specsgo.Versioned{SchemaVersion: 2}, MediaType: imagespec.MediaTypeImageManifest, ArtifactType: "application/x-model", Config: imagespec.DescriptorEmptyJSON}
	m.Config.Data = nil
	_, err := r.PutBlob(repo, []byte("{}"))
	must(t, err)
	for _, title := range slices.Sorted(maps.Keys(layers)) {
		_, err := r.PutBlob(repo, []byte(layers[title]))
		must(t, err)
		d := blob(layers[title], title)
		d.MediaType = imagespec.MediaTypeImageLayer // the one that tools take for any file
		m.Layers = append(m.Layers, d)
	}
	return m
}

func putManifest(t *testing.T, r *registry.Registry, repo, tag, mediaType string, m any) (ref string, d imagespec.Descriptor) {
	t.Helper()
	raw, err := json.Marshal(m)
	must(t, err)
	_, err = r.PutManifest(repo, tag, mediaType, raw)
	must(t, err)
	return r.Ref(repo + ":" + tag), imagespec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
}

func TestPullArtifact(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	m := artifactOf(t, reg, "model", map[string]string{"a": "one", "dir/b": "two", "empty": ""})
	ref, target := putManifest(t, reg, "model", "v1", m.MediaType, m)
	id := w.pull(ref)
	if id != target.Digest.String() {
		t.Errorf("ID is %s, the manifest's digest %s", id, target.Digest)
	}
	r, err := w.Resolve(w.ctx, named(id), "")
	must(t, err)
	if r.Artifact != "application/x-model" || r.Ref != reg.Ref("model@"+id) || r.Size != target.Size+2+6 {
		t.Errorf("resolved %+v", r)
	}
	read := func(snapshotter string) string {
		t.Helper()
		mounts, err := w.mdb.Snapshotter(snapshotter).View(w.ctx, "look-"+snapshotter, r.ChainID)
		must(t, err)
		defer func() { must(t, w.mdb.Snapshotter(snapshotter).Remove(w.ctx, "look-"+snapshotter)) }()
		text := ""
		must(t, mount.WithReadonlyTempMount(w.ctx, mounts, func(dir string) error {
			for _, l := range m.Layers {
				b, err := os.ReadFile(filepath.Join(dir, l.Annotations[imagespec.AnnotationTitle]))
				if err != nil {
					return err
				}
				text += string(b)
			}
			return nil
		}))
		return text
	}
	if got := read("overlayfs"); got != "onetwo" {
		t.Errorf("files say %q", got)
	}
	// In another snapshotter, from what is here.
	reg.Close()
	if _, err := w.Resolve(w.ctx, named(ref), "second"); err != nil || read("second") != "onetwo" {
		t.Errorf("in the other snapshotter: %v", err)
	}
	_, err = w.mdb.GarbageCollect(w.ctx)
	must(t, err)
	if got := read("overlayfs") + read("second"); got != "onetwoonetwo" {
		t.Errorf("after garbage collection files say %q", got)
	}
	must(t, w.Remove(w.ctx, id))
	w.empty()
}

// Two artifacts have the same configuration as a rule, and may have the same
// blobs.
func TestPullArtifactsAlike(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	var ids []string
	for title, tag := range map[string]string{"a": "v1", "b": "v2"} {
		m := artifactOf(t, reg, "model", map[string]string{title: "same"})
		ref, _ := putManifest(t, reg, "model", tag, m.MediaType, m)
		ids = append(ids, w.pull(ref))
	}
	must(t, w.Remove(w.ctx, ids[0]))
	_, err := w.mdb.GarbageCollect(w.ctx)
	must(t, err)
	if r, err := w.Resolve(w.ctx, named(ids[1]), ""); err != nil || w.checkUnpacked(w.ctx, &parsed{chainID: r.ChainID}, "overlayfs") != nil {
		t.Errorf("the other one: %v", err)
	}
	must(t, w.Remove(w.ctx, ids[1]))
	w.empty()
}

// Of an index the artifact for the platform is taken, and one that names none.
func TestPullArtifactOfIndex(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	host := hostPlatform()
	host.Variant = ""
	for tag, p := range map[string]*imagespec.Platform{"platform": &host, "none": nil} {
		m := artifactOf(t, reg, "model", map[string]string{"a": tag})
		_, inner := putManifest(t, reg, "model", "inner-"+tag, m.MediaType, m)
		inner.Platform = p
		other := artifactOf(t, reg, "model", map[string]string{"a": "other"})
		_, wrong := putManifest(t, reg, "model", "other", m.MediaType, other)
		wrong.Platform = &imagespec.Platform{OS: "plan9", Architecture: "mips"}
		idx := imagespec.Index{Versioned: m.Versioned, MediaType: imagespec.MediaTypeImageIndex, Manifests: []imagespec.Descriptor{wrong, inner}}
		ref, _ := putManifest(t, reg, "model", tag, idx.MediaType, idx)
		if id := w.pull(ref); id != inner.Digest.String() {
			t.Errorf("%s: ID is %s, want %s", tag, id, inner.Digest)
		}
		must(t, w.Remove(w.ctx, ref))
	}
	w.empty()
}

func TestPullArtifactRefuses(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	for name, change := range map[string]func(*imagespec.Manifest){
		"leads out": func(m *imagespec.Manifest) { m.Layers[0].Annotations[imagespec.AnnotationTitle] = "../../etc/passwd" },
		"two files": func(m *imagespec.Manifest) { m.Layers = append(m.Layers, blob("other", "a")) },
		"digest":    func(m *imagespec.Manifest) { m.Layers[0].Digest = "sha256:../x" },
	} {
		m := artifactOf(t, reg, "model", map[string]string{"a": "one"})
		change(&m)
		ref, _ := putManifest(t, reg, "model", "bad", m.MediaType, m)
		reg.ResetLog()
		_, err := w.Pull(w.ctx, PullRequest{Ref: ref})
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
		if n := len(reg.BlobGets()); n > 0 {
			t.Errorf("%s: %d blobs were fetched before the refusal", name, n)
		}
		w.empty()
	}
}

// Sizes are claims here too, also of a blob that is here already.
func TestPullArtifactComparesSizes(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	m := artifactOf(t, reg, "model", map[string]string{"a": "one"})
	ref, _ := putManifest(t, reg, "model", "v1", m.MediaType, m)
	w.pull(ref)
	m.Layers[0].Size = 2
	lie, _ := putManifest(t, reg, "model", "lie", m.MediaType, m)
	if _, err := w.Pull(w.ctx, PullRequest{Ref: lie}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "its descriptor says 2") {
		t.Errorf("error %v", err)
	}
	must(t, w.Remove(w.ctx, ref))
	w.empty()
}

// A record that others made of something that cannot be laid out is left out.
func TestIndexLeavesOutBadArtifact(t *testing.T) {
	w := newWorld(t, nil)
	put := func(mediaType string, b []byte) imagespec.Descriptor {
		d := imagespec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		must(t, content.WriteBlob(w.ctx, w.content, d.Digest.String(), strings.NewReader(string(b)), d, content.WithLabels(map[string]string{"containerd.io/gc.root": "x"})))
		return d
	}
	raw, err := json.Marshal(imagespec.Manifest{MediaType: imagespec.MediaTypeImageManifest, Config: imagespec.DescriptorEmptyJSON, Layers: []imagespec.Descriptor{blob("x", "../x")}})
	must(t, err)
	_, err = w.images.Create(w.ctx, images.Image{Name: "example.org/bad:1", Target: put(imagespec.MediaTypeImageManifest, raw)})
	must(t, err)
	must(t, w.index.load(w.ctx))
	if list, err := w.List(w.ctx, nil); err != nil || len(list) > 0 {
		t.Errorf("list %v, %v", list, err)
	}
}

// A failure while the files are written leaves nothing, and the next pull
// succeeds.
func TestPullArtifactFailsAtItsFiles(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	full := true
	w := newWorld(t, nil)
	w.Service.o.Files = plainFiles{w.content, func() error {
		if full {
			return syscall.ENOSPC
		}
		return nil
	}}
	m := artifactOf(t, reg, "model", map[string]string{"a": "one", "b": "two"})
	ref, _ := putManifest(t, reg, "model", "v1", m.MediaType, m)
	_, err := w.Pull(w.ctx, PullRequest{Ref: ref})
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "unpack: write files") {
		t.Errorf("error %v", err)
	}
	w.empty()
	full = false
	w.pull(ref)
	w.clean()
	n := 0
	must(t, w.mdb.Snapshotter("overlayfs").Walk(w.ctx, func(context.Context, snapshots.Info) error { n++; return nil }))
	if n != 1 {
		t.Errorf("%d snapshots", n)
	}
}
