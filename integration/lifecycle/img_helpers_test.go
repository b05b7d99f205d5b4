package lifecycle

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/registry"
)

var seeds atomic.Uint64

// randomBytes are new each time.
func randomBytes(size int) []byte {
	var seed [32]byte
	copy(seed[:], fmt.Sprint(os.Getpid(), seeds.Add(1)))
	b := make([]byte, size)
	_, _ = rand.NewChaCha8(seed).Read(b)
	return b
}

// blobImage is an image of layers with one file each, of random content.
func blobImage(t *testing.T, sizes ...int) v1.Image {
	t.Helper()
	return customImage(t, registry.Image{}, sizes...)
}

func customImage(t *testing.T, like registry.Image, sizes ...int) v1.Image {
	t.Helper()
	for i, size := range sizes {
		like.Layers = append(like.Layers, map[string][]byte{fmt.Sprint("file", i): randomBytes(size)})
	}
	img, err := registry.Build(like)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// serveImage starts a registry with an image under app:1 and returns its
// reference.
func serveImage(t *testing.T, o registry.Options, img v1.Image) (*registry.Registry, string) {
	t.Helper()
	r := registry.StartT(t, o)
	if _, err := r.Push("app", "1", img); err != nil {
		t.Fatal(err)
	}
	return r, r.Ref("app:1")
}

// idOf is the identifier that an image must have everywhere.
func idOf(t *testing.T, img v1.Image) string {
	t.Helper()
	id, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return id.String()
}

func digestOf(t *testing.T, img v1.Image) string {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// layersOf are the digests of an image's layers as the registry has them.
func layersOf(t *testing.T, img v1.Image) []string {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range layers {
		d, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, d.String())
	}
	return out
}

func pull(ctx context.Context, d *daemon.Daemon, ref string, auth *cri.AuthConfig) (string, error) {
	resp, err := d.Images().PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: auth})
	return resp.GetImageRef(), err
}

// imageStatus is nil for an image that is not there.
func imageStatus(t *testing.T, d *daemon.Daemon, ref string) *cri.Image {
	t.Helper()
	resp, err := d.Images().ImageStatus(context.Background(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatalf("status of image %s: %v", ref, err)
	}
	return resp.Image
}

func removeImage(t *testing.T, d *daemon.Daemon, ref string) {
	t.Helper()
	if _, err := d.Images().RemoveImage(context.Background(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Fatalf("remove image %s: %v", ref, err)
	}
}

// imagesWith returns the images with this identifier.
func imagesWith(t *testing.T, d *daemon.Daemon, id string) []*cri.Image {
	t.Helper()
	resp, err := d.Images().ListImages(context.Background(), &cri.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var out []*cri.Image
	for _, i := range resp.Images {
		if i.Id == id {
			out = append(out, i)
		}
	}
	return out
}

// nothingPulled waits until no trace of pulling from a registry is left: no
// record, no download, no lease. No other pull may run.
func nothingPulled(t *testing.T, d *daemon.Daemon, host string) {
	t.Helper()
	ctx := namespaced(context.Background())
	eventually(t, ample, func() error {
		records, err := d.Client().ImageService().List(ctx)
		if err != nil {
			return err
		}
		for _, r := range records {
			if strings.HasPrefix(r.Name, host) {
				return fmt.Errorf("image record %s", r.Name)
			}
		}
		downloads, err := d.Client().ContentStore().ListStatuses(ctx)
		if err != nil || len(downloads) > 0 {
			return fmt.Errorf("downloads %v, %w", downloads, err)
		}
		leases, err := d.Client().LeasesService().List(ctx)
		if err != nil || len(leases) > 0 {
			return fmt.Errorf("leases %v, %w", leases, err)
		}
		return nil
	})
}

// hosts writes the configuration of a registry host, which is read anew for
// every pull.
func hosts(t *testing.T, d *daemon.Daemon, host, toml string) {
	t.Helper()
	dir := filepath.Join(d.Dir, "certs.d", host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(toml), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
}

// layerDiff is the diff ID of an image's first layer.
func layerDiff(t *testing.T, img v1.Image) string {
	t.Helper()
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return file.RootFS.DiffIDs[0].String()
}
