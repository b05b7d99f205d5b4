package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/registry"
)

func TestIMG_01_ListImages(t *testing.T) {
	t.Parallel()
	d := shared(t)
	one, other := blobImage(t, 1000), blobImage(t, 1000)
	r, ref := serveImage(t, registry.Options{}, one)
	if _, err := r.Push("other", "2", other); err != nil {
		t.Fatal(err)
	}
	mustPull(t, d, ref)
	mustPull(t, d, r.Ref("other:2"))
	for _, form := range []string{ref, r.Ref("app@" + digestOf(t, one)), idOf(t, one), r.Ref("absent:1")} {
		resp, err := d.Images().ListImages(t.Context(), &cri.ListImagesRequest{Filter: &cri.ImageFilter{Image: &cri.ImageSpec{Image: form}}})
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(form, "absent") {
			if len(resp.Images) != 0 {
				t.Errorf("filter %s: %v", form, resp.Images)
			}
			continue
		}
		if len(resp.Images) != 1 || resp.Images[0].Id != idOf(t, one) {
			t.Errorf("filter %s: %v", form, resp.Images)
		}
	}
	all := imagesWith(t, d, idOf(t, one))
	if len(all) != 1 || len(imagesWith(t, d, idOf(t, other))) != 1 {
		t.Fatalf("without a filter: %v", all)
	}
	i := all[0]
	if !slices.Equal(i.RepoTags, []string{ref}) || !slices.Equal(i.RepoDigests, []string{r.Ref("app@" + digestOf(t, one))}) || i.Size == 0 || i.Pinned {
		t.Errorf("image is %v", i)
	}
}

// TestIMG_02_StreamImages: the stream brings what the list has, however many.
func TestIMG_02_StreamImages(t *testing.T) {
	d := shared(t)
	r := registry.StartT(t, registry.Options{})
	for n := range 30 {
		if _, err := r.Push("many", fmt.Sprint(n), blobImage(t, 10)); err != nil {
			t.Fatal(err)
		}
		mustPull(t, d, r.Ref(fmt.Sprint("many:", n)))
	}
	list, err := d.Images().ListImages(t.Context(), &cri.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	stream, err := d.Images().StreamImages(t.Context(), &cri.StreamImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	text := func(images []*cri.Image) []string {
		var out []string
		for _, i := range images {
			out = append(out, i.String())
		}
		slices.Sort(out)
		return out
	}
	got := drain(t, stream.Recv, func(r *cri.StreamImagesResponse) []*cri.Image { return r.Images })
	if a, b := text(list.Images), text(got); !slices.Equal(a, b) || len(a) < 30 {
		t.Errorf("list of %d and stream of %d differ:\n%q\n%q", len(a), len(b), a, b)
	}
}

func TestIMG_03_ImageStatus(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 1000)
	r, ref := serveImage(t, registry.Options{}, img)
	id := mustPull(t, d, ref)
	hex := strings.TrimPrefix(id, "sha256:")
	for _, form := range []string{ref, r.Ref("app@" + digestOf(t, img)), r.Ref("app:1@" + digestOf(t, img)), id, hex, hex[:12]} {
		if got := imageStatus(t, d, form); got.GetId() != id {
			t.Errorf("%s: %v", form, got)
		}
	}
	for _, form := range []string{r.Ref("app:2"), r.Ref("absent"), "sha256:" + strings.Repeat("0", 64), strings.Repeat("0", 12), "absent"} {
		if got := imageStatus(t, d, form); got != nil {
			t.Errorf("%s: %v", form, got)
		}
	}
	_, err := d.Images().ImageStatus(t.Context(), &cri.ImageStatusRequest{})
	wantError(t, err, codes.InvalidArgument, "image")
	resp, err := d.Images().ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}, Verbose: true})
	if err != nil || !strings.Contains(fmt.Sprint(resp.Info), layerDiff(t, img)) {
		t.Errorf("verbose information does not tell the layers: %v, %v", resp.GetInfo(), err)
	}
}

func TestIMG_04_PullImage(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 1000, 2000)
	r, ref := serveImage(t, registry.Options{}, img)
	for range 2 {
		if got := mustPull(t, d, ref); got != idOf(t, img) {
			t.Errorf("pulled %s, want %s", got, idOf(t, img))
		}
	}
	for digest, n := range r.BlobGets() {
		if n != 1 {
			t.Errorf("blob %s was fetched %d times for two pulls", digest, n)
		}
	}
	for form, code := range map[string]codes.Code{
		"":                                  codes.InvalidArgument,
		"no.such.host.invalid/app:1":        codes.Unavailable,
		"UPPER:case":                        codes.InvalidArgument,
		"a b":                               codes.InvalidArgument,
		"x@sha256:short":                    codes.InvalidArgument,
		r.Ref("app:absent"):                 codes.NotFound,
		"127.0.0.1:1/refused:1":             codes.Unavailable,
		r.Ref("app@sha256:" + zeros()):      codes.NotFound,
		strings.Repeat("long/", 1000) + "x": codes.InvalidArgument,
	} {
		_, err := pull(t.Context(), d, form, nil)
		wantError(t, err, code)
	}
}

func zeros() string { return strings.Repeat("0", 64) }

func TestIMG_05_RemoveImage(t *testing.T) {
	t.Parallel()
	d := shared(t)
	for _, by := range []string{"tag", "digest", "id"} {
		img := blobImage(t, 1000)
		r, ref := serveImage(t, registry.Options{}, img)
		for _, tag := range []string{"2", "3"} {
			if _, err := r.Push("app", tag, img); err != nil {
				t.Fatal(err)
			}
			mustPull(t, d, r.Ref("app:"+tag))
		}
		id := mustPull(t, d, ref)
		if got := len(imageStatus(t, d, id).RepoTags); got != 3 {
			t.Fatalf("%d tags", got)
		}
		form := map[string]string{"tag": r.Ref("app:2"), "digest": r.Ref("app@" + digestOf(t, img)), "id": id}[by]
		for range 2 {
			removeImage(t, d, form)
			if left := imagesWith(t, d, id); len(left) != 0 {
				t.Errorf("removed by %s, and still there: %v", by, left)
			}
			for _, f := range []string{ref, r.Ref("app:2"), r.Ref("app:3"), id} {
				if imageStatus(t, d, f) != nil {
					t.Errorf("removed by %s, and %s is still there", by, f)
				}
			}
		}
	}
	_, err := d.Images().RemoveImage(t.Context(), &cri.RemoveImageRequest{})
	wantError(t, err, codes.InvalidArgument, "image")
}

// TestIMG_06_ImageFsInfo: the numbers follow what is on the disk.
func TestIMG_06_ImageFsInfo(t *testing.T) {
	t.Parallel()
	d := start(t)
	info := func() *cri.FilesystemUsage {
		t.Helper()
		resp, err := d.Images().ImageFsInfo(t.Context(), &cri.ImageFsInfoRequest{})
		if err != nil || len(resp.ImageFilesystems) != 1 {
			t.Fatalf("%v, %v", resp, err)
		}
		if c := resp.ContainerFilesystems; !stock && (len(c) != 1 || c[0].FsId.Mountpoint == "" || c[0].UsedBytes == nil) {
			t.Errorf("container filesystems are %v", c)
		}
		return resp.ImageFilesystems[0]
	}
	before := info()
	const size = 40 << 20
	_, ref := serveImage(t, registry.Options{}, blobImage(t, size))
	mustPull(t, d, ref)
	var after *cri.FilesystemUsage
	eventually(t, ample, func() error {
		after = info()
		grown := int64(after.UsedBytes.GetValue()) - int64(before.UsedBytes.GetValue())
		if grown < size || grown > 3*size {
			return fmt.Errorf("an image of %d bytes made it grow by %d", size, grown)
		}
		return nil
	})
	if stat, err := os.Stat(after.FsId.Mountpoint); err != nil || !stat.IsDir() || !strings.HasPrefix(after.FsId.Mountpoint, d.Root) {
		t.Errorf("mountpoint is %q: %v", after.FsId.Mountpoint, err)
	}
	used, inodes := diskUse(t, after.FsId.Mountpoint)
	if got := int64(after.UsedBytes.GetValue()); got < used*8/10 || got > used*5/2 {
		t.Errorf("%d bytes are used, the directory has %d", got, used)
	}
	if got := int64(after.InodesUsed.GetValue()); got == 0 || got > inodes {
		t.Errorf("%d inodes are used, the directory has %d", got, inodes)
	}
}

// diskUse is what du says about a directory.
func diskUse(t *testing.T, dir string) (bytes, inodes int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		var info fs.FileInfo
		if err == nil {
			info, err = e.Info()
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // the garbage collector's work meanwhile
		}
		if err != nil {
			return err
		}
		bytes += info.Sys().(*syscall.Stat_t).Blocks * 512
		inodes++
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return bytes, inodes
}

// TestIMM_19_ConcurrentPulls: many callers, one download; one that leaves does
// not spoil it for the others.
func TestIMM_19_ConcurrentPulls(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 10000, 20000, 30000)
	r, ref := serveImage(t, registry.Options{}, img)
	hold := make(chan struct{})
	r.Inject(registry.Fault{Match: registry.Blobs(layersOf(t, img)...), Hold: hold})
	var wg sync.WaitGroup
	impatient, cancel := context.WithCancel(t.Context())
	for i := range 20 {
		wg.Go(func() {
			ctx := t.Context()
			if i == 0 {
				ctx = impatient
			}
			id, err := pull(ctx, d, ref, nil)
			if i == 0 {
				wantError(t, err, codes.Canceled)
			} else if err != nil || id != idOf(t, img) {
				t.Errorf("pull %d: %s, %v", i, id, err)
			}
		})
	}
	eventually(t, ample, func() error {
		if n := r.Count(registry.Request.Blob); n < 3 {
			return fmt.Errorf("%d blobs were asked for", n)
		}
		return nil
	})
	cancel()
	close(hold)
	wg.Wait()
	for digest, n := range r.BlobGets() {
		if n != 1 {
			t.Errorf("blob %s was fetched %d times", digest, n)
		}
	}
}

// TestIMM_20_Cancellation: a pull nobody waits for ends, and leaves nothing.
func TestIMM_20_Cancellation(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 100000)
	r, ref := serveImage(t, registry.Options{}, img)
	hold := make(chan struct{})
	defer close(hold)
	r.Inject(registry.Fault{Match: registry.Blobs(layersOf(t, img)...), Hold: hold})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := pull(ctx, d, ref, nil)
		done <- err
	}()
	eventually(t, ample, func() error {
		if r.BlobGets()[layersOf(t, img)[0]] == 0 {
			return fmt.Errorf("the layer was not asked for")
		}
		return nil
	})
	cancel()
	wantError(t, <-done, codes.Canceled)
	nothingPulled(t, d, r.Host)
	if imageStatus(t, d, ref) != nil {
		t.Error("a pull that was given up left an image")
	}
	r.Heal()
	if got := mustPull(t, d, ref); got != idOf(t, img) {
		t.Errorf("afterwards %s was pulled", got)
	}
}

func TestIMM_28_SimultaneousRemoval(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := blobImage(t, 1000)
	r, ref := serveImage(t, registry.Options{}, img)
	id := mustPull(t, d, ref)
	forms := []string{ref, id, r.Ref("app@" + digestOf(t, img))}
	var wg sync.WaitGroup
	for i := range 15 {
		wg.Go(func() {
			form := forms[i%len(forms)]
			if _, err := d.Images().RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: form}}); err != nil {
				t.Errorf("remove %s: %v", form, err)
			}
			if left := imagesWith(t, d, id); len(left) != 0 {
				t.Errorf("after removing %s: %v", form, left)
			}
		})
	}
	wg.Wait()
}

// TestIMM_29_RemovalWhileInUse: a running container keeps its files.
func TestIMM_29_RemovalWhileInUse(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	img := argv(t, nil, []string{"sleep", "1000"})
	ref := pulledImage(t, b.Daemon, "used:1", img)
	id := b.run(daemon.ContainerConfig("app", ref))
	removeImage(t, b.Daemon, ref)
	if imageStatus(t, b.Daemon, ref) != nil {
		t.Error("the image is still there")
	}
	if got := b.Exec(id, "/bin/argv", "lives"); got != "[lives]" {
		t.Errorf("a command from the image says %q", got)
	}
	b.stop(id, 0)
	b.remove(id)
	mustPull(t, b.Daemon, ref)
	if got := b.Exec(b.run(daemon.ContainerConfig("again", ref)), "/bin/argv", "again"); got != "[again]" {
		t.Errorf("pulled again it says %q", got)
	}
}

// TestIMM_30_GarbageCollection: what is removed leaves the disk.
func TestIMM_30_GarbageCollection(t *testing.T) {
	t.Parallel()
	d := start(t)
	r := registry.StartT(t, registry.Options{})
	cycle := func(n int) {
		for i := range n {
			if _, err := r.Push("gc", "1", blobImage(t, 100000+i)); err != nil {
				t.Fatal(err)
			}
			mustPull(t, d, r.Ref("gc:1"))
			for _, img := range allImages(t, d) {
				if slices.Contains(img.RepoDigests, r.Ref("gc")) || strings.Contains(img.String(), r.Host) {
					removeImage(t, d, img.Id)
				}
			}
		}
	}
	cycle(1)
	base, _ := diskUse(t, filepath.Join(d.Root, "io.containerd.content.v1.content"))
	cycle(40)
	eventually(t, ample, func() error {
		now, _ := diskUse(t, filepath.Join(d.Root, "io.containerd.content.v1.content"))
		layers, _ := filepath.Glob(filepath.Join(d.Root, "io.containerd.snapshotter.v1.overlayfs", "snapshots", "*"))
		if now > base+3*100000 || len(layers) > 3 {
			return fmt.Errorf("the content has %d bytes, before %d, and there are %d snapshots", now, base, len(layers))
		}
		return nil
	})
}

func allImages(t *testing.T, d *daemon.Daemon) []*cri.Image {
	t.Helper()
	resp, err := d.Images().ListImages(t.Context(), &cri.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return resp.Images
}
