package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Registry is a registry on this machine's loopback, over plain HTTP.
type Registry struct {
	// Host is its address, the first part of a reference.
	Host string

	server *httptest.Server
}

// NewRegistry serves until Close.
func NewRegistry() *Registry {
	quiet := registry.Logger(log.New(io.Discard, "", 0))
	s := httptest.NewServer(registry.New(quiet, registry.WithReferrersSupport(true)))
	return &Registry{Host: strings.TrimPrefix(s.URL, "http://"), server: s}
}

// Close ends the registry and its connections.
func (r *Registry) Close() { r.server.Close() }

// Serve starts a registry that lasts as long as the test.
func Serve(t testing.TB) *Registry {
	t.Helper()
	r := NewRegistry()
	t.Cleanup(r.Close)
	return r
}

// Put stores an image under name:tag and returns its whole reference.
func (r *Registry) Put(ctx context.Context, nameTag string, img v1.Image) (string, error) {
	ref, err := name.NewTag(r.Host+"/"+nameTag, name.Insecure, name.StrictValidation)
	if err != nil {
		return "", fmt.Errorf("push image: %w", err)
	}
	if err := remote.Write(ref, img, remote.WithContext(ctx)); err != nil {
		return "", fmt.Errorf("push image: %w", err)
	}
	return ref.String(), nil
}

// Push is Put for a test.
func (r *Registry) Push(t testing.TB, nameTag string, img v1.Image) string {
	t.Helper()
	ref, err := r.Put(t.Context(), nameTag, img)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// namespace is where CRI keeps its images.
const namespace = "k8s.io"

// Import stores an image under ref in a daemon, as ctr images import would, and
// unpacks it for the named snapshotter unless that is empty.
func Import(ctx context.Context, c *client.Client, ref string, img v1.Image, snapshotter string) error {
	tag, err := name.NewTag(ref, name.StrictValidation)
	if err != nil {
		return fmt.Errorf("import image: %w", err)
	}
	r, w := io.Pipe()
	written := make(chan error, 1)
	go func() {
		err := tarball.Write(tag, img, w)
		w.CloseWithError(err)
		written <- err
	}()
	ctx = namespaces.WithNamespace(ctx, namespace)
	imported, err := c.Import(ctx, r)
	r.CloseWithError(err) // so that the writer ends where the reader gave up
	if err := errors.Join(err, <-written); err != nil {
		return fmt.Errorf("import image: %w", err)
	}
	if snapshotter == "" {
		return nil
	}
	for _, i := range imported {
		if err := client.NewImage(c, i).Unpack(ctx, snapshotter); err != nil {
			return fmt.Errorf("unpack image: %w", err)
		}
	}
	return nil
}

// Load is Import for a test, left packed.
func Load(t testing.TB, c *client.Client, ref string, img v1.Image) string {
	t.Helper()
	if err := Import(t.Context(), c, ref, img, ""); err != nil {
		t.Fatal(err)
	}
	return ref
}
