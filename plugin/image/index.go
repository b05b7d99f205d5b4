package image

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Labels of containerd's image records, as other CRI clients know them. An
// image is also pinned by hand, with the second one; it is never written here,
// for it would outlive the configuration that asked for it.
const (
	labelManaged = "io.cri-containerd.image"
	managed      = "managed"
	labelPinned  = "io.cri-containerd.pinned"
	pinned       = "pinned"
)

// index is the projection of the image store that reads are served from. It
// is written by load, refresh and nothing else.
type index struct {
	reader reader
	images images.Store
	pinned func(string) bool
	now    atomic.Pointer[view]

	mu      sync.Mutex
	records map[string]entry
	seq     uint64
	tickets map[string]*ticket
}

// entry is one image record with what its target turned out to be.
type entry struct {
	target  imagespec.Descriptor
	pinned  bool
	choices []choice  // platforms that it was pulled for besides ours
	images  []*parsed // by platform, ours first, nil where there is none
}

// contentKey is what the images of an entry depend on.
type contentKey struct {
	target  digest.Digest
	choices string
}

func (e *entry) key() contentKey {
	k := contentKey{target: e.target.Digest}
	for _, c := range e.choices {
		k.choices += c.name + separatorPlatforms
	}
	return k
}

// ticket orders the refreshes of one name that overlap: what was begun later
// has read the store later or is followed by one that did.
type ticket struct {
	open    int
	applied uint64
}

func newIndex(r reader, store images.Store, pinned func(string) bool) *index {
	x := &index{reader: r, images: store, pinned: pinned, records: map[string]entry{}, tickets: map[string]*ticket{}}
	x.now.Store(newView(nil, pinned))
	return x
}

// load makes the index anew from the whole store. A record that cannot be
// read is left out and logged; it does not stand in the way of others.
func (x *index) load(ctx context.Context) error {
	all, err := x.images.List(ctx)
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	names := make([]string, 0, len(all))
	for _, i := range all {
		seen[i.Name] = true
		names = append(names, i.Name)
	}
	x.mu.Lock()
	for name := range x.records {
		if !seen[name] {
			names = append(names, name)
		}
	}
	x.mu.Unlock()
	return x.refresh(ctx, names...)
}

// refresh brings the names up to date with the store, all at once.
func (x *index) refresh(ctx context.Context, names ...string) error {
	seq := x.begin(names)
	read := make(map[string]*entry, len(names))
	parsed := map[contentKey][]*parsed{}
	var failed error
	for _, name := range names {
		e, err := x.read(ctx, name, parsed)
		if err != nil {
			failed = err
			continue
		}
		read[name] = e
	}
	x.apply(seq, names, read)
	return failed
}

func (x *index) begin(names []string) uint64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.seq++
	for _, n := range names {
		t := x.tickets[n]
		if t == nil {
			t = &ticket{}
			x.tickets[n] = t
		}
		t.open++
	}
	return x.seq
}

// read returns the entry of a name, nil when there is no such record.
func (x *index) read(ctx context.Context, name string, cache map[contentKey][]*parsed) (*entry, error) {
	img, err := x.images.Get(ctx, name)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	e := &entry{target: img.Target, pinned: img.Labels[labelPinned] == pinned, choices: choicesOf(img.Labels)}
	if e.images = cache[e.key()]; e.images != nil {
		return e, nil
	}
	if e.images = x.known(e.key()); e.images == nil {
		if e.images, err = x.reader.all(ctx, img.Target, e.choices); err != nil {
			log.G(ctx).WithError(err).WithField("image", name).Warn("image cannot be read and is left out")
		}
	}
	cache[e.key()] = e.images
	return e, nil
}

// known returns what is known about a target, if that is everything: content
// does not change, but what was missing may have come.
func (x *index) known(k contentKey) []*parsed {
	if all := x.now.Load().targets[k]; !slices.Contains(all, nil) {
		return all
	}
	return nil
}

func (x *index) apply(seq uint64, names []string, read map[string]*entry) {
	x.mu.Lock()
	defer x.mu.Unlock()
	changed := false
	for _, n := range names {
		t := x.tickets[n]
		e, ok := read[n]
		if ok && seq > t.applied {
			t.applied = seq
			changed = x.set(n, e) || changed
		}
		if t.open--; t.open == 0 {
			delete(x.tickets, n)
		}
	}
	if changed {
		x.now.Store(newView(x.records, x.pinned))
	}
}

// set reports whether it changed anything. The caller holds x.mu.
func (x *index) set(name string, e *entry) bool {
	old, had := x.records[name]
	if e == nil {
		delete(x.records, name)
		return had
	}
	if had && old.key() == e.key() && old.pinned == e.pinned && slices.Equal(old.images, e.images) {
		return false
	}
	x.records[name] = *e
	return true
}

// view is the index at one moment. Immutable, with everything in it.
type view struct {
	images  []*image // by ID
	byID    map[string]*image
	byName  map[string]row
	targets map[contentKey][]*parsed
}

// row is what a record's name stands for.
type row struct {
	images  []*image // by platform, ours first, nil where there is none
	choices []choice // of the last ones
}

// on returns the image for our platform of that number, else the one there is.
func (r row) on(platform int) *image {
	ours := r.images[:max(0, len(r.images)-len(r.choices))]
	if platform < len(ours) && ours[platform] != nil {
		return ours[platform]
	}
	return first(ours)
}

// chosen returns the image that was pulled for a platform by its name.
func (r row) chosen(name string) *image {
	for i, c := range r.choices {
		if at := len(r.images) - len(r.choices) + i; c.name == name && at >= 0 {
			return r.images[at]
		}
	}
	return nil
}

// any returns one of the images, ours first.
func (r row) any() *image { return first(r.images) }

func first(list []*image) *image {
	for _, img := range list {
		if img != nil {
			return img
		}
	}
	return nil
}

// image is an image with all its names.
type image struct {
	*parsed
	records []string // names of image records
	tags    []string
	digests []string
	cri     *cri.Image
}

func newView(records map[string]entry, isPinned func(string) bool) *view {
	v := &view{byID: map[string]*image{}, byName: map[string]row{}, targets: map[contentKey][]*parsed{}}
	pins := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(records)) {
		e := records[name]
		v.targets[e.key()] = e.images
		kind, repo := classify(name)
		r := row{images: make([]*image, len(e.images)), choices: e.choices}
		for i, p := range e.images {
			// A record named by an ID stands for that image alone, also when
			// its target is an index with several.
			if p == nil || (kind == kindID && name != p.id) {
				continue
			}
			img := v.add(p)
			r.images[i] = img
			img.name(name, kind, repo, e.target.Digest)
			pins[p.id] = pins[p.id] || e.pinned || isPinned(name)
		}
		v.byName[name] = r
		if alias := repo + "@" + e.target.Digest.String(); kind == kindTag && v.byName[alias].images == nil {
			v.byName[alias] = r
		}
	}
	for id, img := range v.byID {
		img.finish(pins[id])
		v.images = append(v.images, img)
	}
	slices.SortFunc(v.images, func(a, b *image) int { return strings.Compare(a.id, b.id) })
	return v
}

func (v *view) add(p *parsed) *image {
	img, ok := v.byID[p.id]
	if !ok {
		img = &image{parsed: p}
		v.byID[p.id] = img
	}
	return img
}

// name adds a record's name.
func (i *image) name(name string, kind kind, repo string, target digest.Digest) {
	i.records = append(i.records, name)
	switch kind {
	case kindTag:
		i.tags = append(i.tags, name)
		i.digests = append(i.digests, repo+"@"+target.String())
	case kindDigest:
		i.digests = append(i.digests, repo+"@"+target.String())
	}
}

// finish sorts the names and makes the reply that every list shares.
func (i *image) finish(isPinned bool) {
	for _, list := range []*[]string{&i.records, &i.tags, &i.digests} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}
	uid, name := splitUser(i.config.Config.User)
	i.cri = &cri.Image{
		Id: i.id, RepoTags: i.tags, RepoDigests: i.digests, Size: uint64(i.size), Username: name, Pinned: isPinned,
		Spec: &cri.ImageSpec{Image: i.id, Annotations: i.annotations},
	}
	if uid != nil {
		i.cri.Uid = &cri.Int64Value{Value: *uid}
	}
}

// find returns the image that ref means, of those of a name the one that pick
// takes, nil for none. A name comes before an ID that begins like it.
func (v *view) find(ref string, pick func(row) *image) (*image, error) {
	if img, ok := v.byID[ref]; ok {
		return img, nil
	}
	for _, name := range spellings(ref) {
		if img := pick(v.byName[name]); img != nil {
			return img, nil
		}
	}
	prefix, ok := shortID(ref)
	if !ok {
		return nil, nil
	}
	at, _ := slices.BinarySearchFunc(v.images, prefix, func(i *image, p string) int { return strings.Compare(i.id, p) })
	matches := func(n int) bool { return n < len(v.images) && strings.HasPrefix(v.images[n].id, prefix) }
	if matches(at) && matches(at+1) {
		return nil, ambiguous(ref)
	}
	if matches(at) {
		return v.images[at], nil
	}
	return nil, nil
}

// spellings are the names that a record for ref may have.
func spellings(ref string) []string {
	names := []string{ref}
	if n, err := normalise(ref); err == nil && n.String() != ref {
		names = append(names, n.String())
	}
	return names
}
