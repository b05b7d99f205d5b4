package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/registry"
)

// failingImages fails to write after some writes.
type failingImages struct {
	images.Store
	after int
}

func (f *failingImages) Create(ctx context.Context, i images.Image) (images.Image, error) {
	if _, err := f.Get(ctx, i.Name); err == nil {
		return f.Store.Create(ctx, i)
	}
	if f.after--; f.after < 0 {
		return images.Image{}, errors.New("disk on fire")
	}
	return f.Store.Create(ctx, i)
}

func TestThreeTagsOneImage(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	img := sample(t, "app", 1)
	var want []string
	for _, tag := range []string{"3", "1", "2"} {
		ref, _ := push(t, reg, "app:"+tag, img)
		w.pull(ref)
		want = append(want, ref)
	}
	slices.Sort(want)
	all, err := w.List(w.ctx, nil)
	must(t, err)
	if len(all) != 1 || !slices.Equal(all[0].RepoTags, want) || len(all[0].RepoDigests) != 1 {
		t.Fatalf("images %v", all)
	}
	id := all[0].Id
	for _, ref := range []string{want[0], all[0].RepoDigests[0], id, id[7:], id[7:19], id[:19]} {
		st, _, err := w.Status(w.ctx, named(ref), false)
		must(t, err)
		if st.GetId() != id {
			t.Errorf("%s means %v", ref, st)
		}
		list, err := w.List(w.ctx, &cri.ImageFilter{Image: &cri.ImageSpec{Image: ref}})
		must(t, err)
		if len(list) != 1 || list[0].Id != id {
			t.Errorf("filter %s gives %v", ref, list)
		}
		r, err := w.Resolve(w.ctx, named(ref), "")
		must(t, err)
		if r.ID != id || r.Ref != all[0].RepoDigests[0] || r.Name == "" {
			t.Errorf("%s resolves to %+v", ref, r.Image)
		}
	}
	must(t, w.Remove(w.ctx, want[1]))
	if all, _ = w.List(w.ctx, nil); len(all) != 0 {
		t.Errorf("after removal by one tag: %v", all)
	}
	must(t, w.Remove(w.ctx, want[1]))
	must(t, w.Remove(w.ctx, id))
	w.empty()
}

func TestAbsentImages(t *testing.T) {
	w := newWorld(t, nil)
	for _, ref := range []string{"nothing", "nothing@sha256:" + strings.Repeat("a", 64), "sha256:" + strings.Repeat("a", 64), "abcdef", "Not A Reference!!", "../../etc"} {
		st, info, err := w.Status(w.ctx, named(ref), true)
		if st != nil || info != nil || err != nil {
			t.Errorf("status of %q: %v, %v, %v", ref, st, info, err)
		}
		if err := w.Remove(w.ctx, ref); err != nil {
			t.Errorf("remove %q: %v", ref, err)
		}
		if list, err := w.List(w.ctx, &cri.ImageFilter{Image: &cri.ImageSpec{Image: ref}}); err != nil || len(list) != 0 {
			t.Errorf("list %q: %v, %v", ref, list, err)
		}
		if _, err := w.Resolve(w.ctx, named(ref), ""); !errdefs.IsNotFound(err) {
			t.Errorf("resolve %q: %v", ref, err)
		}
	}
	for _, ref := range []string{"", "Not A Reference!!", "a b", strings.Repeat("a", 5000)} {
		if _, err := w.Pull(w.ctx, PullRequest{Ref: ref}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "image.image") {
			t.Errorf("pull %.20q: %v", ref, err)
		}
	}
	if _, _, err := w.Status(w.ctx, named(""), false); !errdefs.IsInvalidArgument(err) {
		t.Errorf("status of nothing: %v", err)
	}
	if err := w.Remove(w.ctx, ""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("removal of nothing: %v", err)
	}
}

func TestParallelRemoval(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	ref, digest := push(t, reg, "app:v1", sample(t, "app", 2))
	id := w.pull(ref)
	refs := []string{ref, id, id[:20], reg.Ref("app@" + digest)}
	errs := make([]error, 40)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = w.Remove(w.ctx, refs[i%len(refs)]) })
	}
	wg.Wait()
	must(t, errors.Join(errs...))
	if all, _ := w.List(w.ctx, nil); len(all) != 0 {
		t.Errorf("left: %v", all)
	}
	w.empty()
}

// deletesOnce deletes one record and keeps the next Delete waiting.
type deletesOnce struct {
	images.Store
	deleted atomic.Int32
	waits   chan string // gets the name of the first when it waits
	goOn    chan struct{}
	first   string
}

func (d *deletesOnce) Delete(ctx context.Context, name string, opts ...images.DeleteOpt) error {
	switch d.deleted.Add(1) {
	case 1:
		d.first = name
	case 2:
		d.waits <- d.first
		<-d.goOn
	}
	return d.Store.Delete(ctx, name, opts...)
}

// TestRemovalWaitsForRemoval: a removal that finds its name gone, as another is
// about to remove the image, does not say before that the image is gone.
func TestRemovalWaitsForRemoval(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	slow := &deletesOnce{waits: make(chan string), goOn: make(chan struct{})}
	w := newWorld(t, func(o *Options) { slow.Store, o.Images = o.Images, slow })
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 1))
	w.pull(ref)
	first := make(chan error, 1)
	go func() { first <- w.Remove(w.ctx, ref) }()
	gone := <-slow.waits
	must(t, w.index.refresh(w.ctx, gone)) // as the store's event does
	second := make(chan error, 1)
	go func() {
		err := w.Remove(w.ctx, gone)
		if all, _ := w.List(w.ctx, nil); len(all) != 0 {
			err = errors.Join(err, fmt.Errorf("%s was removed, and there is %v", gone, all))
		}
		second <- err
	}()
	select {
	case err := <-second:
		t.Errorf("it did not wait: %v", err)
		second <- nil
	case <-time.After(100 * time.Millisecond): // one that does not wait is done by now
	}
	close(slow.goOn)
	must(t, errors.Join(<-first, <-second))
	w.empty()
}

func TestMovedTagLeavesTheOldImage(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	ref, oldDigest := push(t, reg, "app:latest", sample(t, "old", 1))
	oldID := w.pull(ref)
	push(t, reg, "app:latest", sample(t, "new", 1))
	newID := w.pull(ref)
	if oldID == newID {
		t.Fatal("the tag did not move")
	}
	st, _, err := w.Status(w.ctx, named(oldID), false)
	must(t, err)
	if st == nil || len(st.RepoTags) != 0 || !slices.Equal(st.RepoDigests, []string{reg.Ref("app@" + oldDigest)}) {
		t.Errorf("the old image is %v", st)
	}
	if st, _, _ = w.Status(w.ctx, named(ref), false); st.GetId() != newID {
		t.Errorf("the tag means %v", st)
	}
}

func TestOthersChangesAreSeen(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	ref, digest := push(t, reg, "app:v1", sample(t, "app", 1))
	id := w.pull(ref)
	rec, err := w.images.Get(w.ctx, ref)
	must(t, err)

	other := images.Image{Name: "docker.io/library/by-hand:v1", Target: rec.Target}
	_, err = w.images.Create(w.ctx, other)
	must(t, err)
	status := func(ref string) *cri.Image {
		st, _, err := w.Status(w.ctx, named(ref), false)
		must(t, err)
		return st
	}
	eventually(t, "the new name is shown", func() bool { return status("by-hand:v1").GetId() == id })
	if st := status("by-hand@" + digest); st.GetId() != id {
		t.Errorf("by digest: %v", st)
	}
	other.Labels = map[string]string{labelPinned: pinned}
	_, err = w.images.Update(w.ctx, other)
	must(t, err)
	eventually(t, "the pin is shown", func() bool { return status(id).GetPinned() })
	must(t, w.images.Delete(w.ctx, other.Name))
	eventually(t, "the name is gone", func() bool { return status("by-hand:v1") == nil && !status(id).GetPinned() })

	// Another namespace is none of our business.
	must(t, w.images.Delete(w.ctx, ref))
	eventually(t, "the tag is gone", func() bool { return status(ref) == nil })
	if st := status(id); len(st.GetRepoTags()) != 0 || len(st.GetRepoDigests()) != 1 {
		t.Errorf("without its tag: %v", st)
	}
}

// breakingEvents breaks the first subscription when told to.
type breakingEvents struct {
	events.Subscriber
	broken chan error
	once   sync.Once
}

func (b *breakingEvents) Subscribe(ctx context.Context, filters ...string) (<-chan *events.Envelope, <-chan error) {
	first := false
	b.once.Do(func() { first = true })
	if first {
		return nil, b.broken
	}
	return b.Subscriber.Subscribe(ctx, filters...)
}

func TestBrokenEventsAreCaughtUpWith(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	broken := make(chan error)
	w := newWorld(t, func(o *Options) { o.Events = &breakingEvents{Subscriber: o.Events, broken: broken} })
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 1))
	id := w.pull(ref)
	must(t, w.images.Delete(w.ctx, ref)) // nobody hears of it
	if st, _, _ := w.Status(w.ctx, named(ref), false); st.GetId() != id {
		t.Fatalf("the test tests nothing: %v", st)
	}
	broken <- errors.New("stream broke")
	eventually(t, "the lost event is made up for", func() bool {
		st, _, err := w.Status(w.ctx, named(ref), false)
		must(t, err)
		return st == nil
	})
}

func TestStartReadsTheStore(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	w := newWorld(t, nil)
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 1))
	id := w.pull(ref)
	before, _, err := w.Status(w.ctx, named(ref), false)
	must(t, err)
	// Records that cannot be read stand in nobody's way.
	for name, target := range map[string]imagespec.Descriptor{
		"docker.io/library/lost:v1": {MediaType: imagespec.MediaTypeImageManifest, Digest: digest.FromString("lost"), Size: 4},
		"weird name":                {MediaType: "text/plain", Digest: digest.FromString("weird"), Size: 5},
		"docker.io/library/layer:1": {MediaType: imagespec.MediaTypeImageManifest, Digest: digest.Digest(id), Size: 7},
	} {
		_, err := w.images.Create(w.ctx, images.Image{Name: name, Target: target})
		must(t, err)
	}
	w.start(func(o *Options) {
		o.Policy.Pinned = func(name string) bool { return name == ref }
	})
	after, _, err := w.Status(w.ctx, named(ref), false)
	must(t, err)
	if after.GetId() != before.GetId() || !slices.Equal(after.RepoTags, before.RepoTags) || !slices.Equal(after.RepoDigests, before.RepoDigests) || after.Size != before.Size {
		t.Errorf("after a start %v, before %v", after, before)
	}
	if !after.Pinned {
		t.Error("not pinned")
	}
	if all, _ := w.List(w.ctx, nil); len(all) != 1 {
		t.Errorf("images %v", all)
	}
}

// The configuration pins for as long as it says so; a label of somebody else's
// for as long as it is there.
func TestPinsFollowTheConfiguration(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	keep := func(word string) func(*Options) {
		return func(o *Options) {
			o.Policy.Pinned = func(name string) bool { return strings.Contains(name, word) }
		}
	}
	w := newWorld(t, keep("keep"))
	ref, _ := push(t, reg, "keep:v1", sample(t, "keep", 1))
	w.pull(ref)
	pins := func(want bool) {
		t.Helper()
		if st, _, err := w.Status(w.ctx, named(ref), false); err != nil || st.GetPinned() != want {
			t.Errorf("status %v, %v; pinned should be %v", st, err, want)
		}
	}
	pins(true)
	w.start(keep("other"))
	pins(false)
	rec, err := w.images.Get(w.ctx, ref)
	must(t, err)
	rec.Labels[labelPinned] = pinned
	_, err = w.images.Update(w.ctx, rec)
	must(t, err)
	w.start(nil)
	pins(true)
}

// Overlapping refreshes end with what the store says last.
func TestRefreshOrder(t *testing.T) {
	x := newIndex(reader{}, nil, func(string) bool { return false })
	p := &parsed{id: "sha256:" + strings.Repeat("1", 64)}
	is := func(target string) map[string]*entry {
		return map[string]*entry{"docker.io/library/a:1": {target: imagespec.Descriptor{Digest: digest.FromString(target)}, images: []*parsed{p}}}
	}
	names := []string{"docker.io/library/a:1"}
	slow, fast := x.begin(names), x.begin(names)
	x.apply(fast, names, is("new"))
	x.apply(slow, names, is("old"))
	if got := x.records[names[0]].target.Digest; got != digest.FromString("new") {
		t.Error("an older refresh won")
	}
	gone := x.begin(names)
	x.apply(gone, names, map[string]*entry{names[0]: nil})
	if len(x.now.Load().images) != 0 || len(x.tickets) != 0 {
		t.Errorf("left: %v %v", x.now.Load().images, x.tickets)
	}
}

func TestShortIDs(t *testing.T) {
	records := map[string]entry{}
	for _, hex := range []string{"aaaaaa11", "aaaaaa22", "bbbbbb11"} {
		id := "sha256:" + hex + strings.Repeat("0", 56)
		records[id] = entry{target: imagespec.Descriptor{Digest: digest.FromString(hex)}, images: []*parsed{{id: id}}}
	}
	v := newView(records, func(string) bool { return false })
	for ref, want := range map[string]string{"aaaaaa1": "aaaaaa11", "sha256:aaaaaa22": "aaaaaa22", "bbbbbb": "bbbbbb11", "bbbbb": "", "cccccc": "", "sha256:": ""} {
		img, err := v.find(ref, row.any)
		must(t, err)
		if (img == nil) != (want == "") || img != nil && !strings.HasPrefix(img.id, "sha256:"+want) {
			t.Errorf("%s means %v", ref, img)
		}
	}
	if _, err := v.find("aaaaaa", row.any); !errdefs.IsInvalidArgument(err) {
		t.Errorf("ambiguous: %v", err)
	}
}
