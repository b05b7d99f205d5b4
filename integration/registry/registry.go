// Package registry is an image registry on a loopback address for tests and
// the demo: a real one underneath, with access control and faults in front, a
// log of what was asked for, and helpers that put images into it.
//
// It owns its listener and the images in its memory. It never reaches out to
// another registry. Start reading at Start; faults are in fault.go, access
// control in auth.go, images in images.go.
package registry

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	backend "github.com/google/go-containerregistry/pkg/registry"
)

// T is what StartT needs of testing.TB.
type T interface {
	Helper()
	Cleanup(func())
	Fatalf(format string, args ...any)
}

// Options is how a registry behaves.
type Options struct {
	Auth Auth
	// TLS makes it an HTTPS registry.
	TLS *tls.Config
	// Address to listen on; "" for any port of 127.0.0.1.
	Address string
}

// Registry is a running registry.
type Registry struct {
	// Host is "127.0.0.1:port", the first part of its references.
	Host string

	scheme  string
	auth    Auth
	store   http.Handler
	server  *http.Server
	serving chan struct{}

	mu       sync.Mutex
	requests []Request
	faults   []*Fault
}

// Request is one request as it came in, in the order of arrival.
type Request struct {
	Method, Path, Query string
	Header              http.Header
	At                  time.Time
}

// Blob reports whether the request asks for the content of a blob.
func (r Request) Blob() bool {
	return r.Method == http.MethodGet && strings.Contains(r.Path, "/blobs/")
}

// Start starts a registry. Close ends it.
func Start(o Options) (*Registry, error) {
	addr := o.Address
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	r := &Registry{
		Host: l.Addr().String(), scheme: "http", auth: o.Auth.withDefaults(), serving: make(chan struct{}),
		store: backend.New(backend.Logger(log.New(io.Discard, "", 0)), backend.WithReferrersSupport(true)),
	}
	if o.TLS != nil {
		r.scheme = "https"
		l = tls.NewListener(l, o.TLS)
	}
	r.server = &http.Server{Handler: r, ErrorLog: log.New(io.Discard, "", 0), ReadHeaderTimeout: time.Minute}
	go func() { // ends with Close, which waits for it
		defer close(r.serving)
		_ = r.server.Serve(l)
	}()
	return r, nil
}

// StartT starts a registry that ends with the test.
func StartT(t T, o Options) *Registry {
	t.Helper()
	r, err := Start(o)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(r.Close)
	return r
}

// Close ends the registry and all its connections.
func (r *Registry) Close() {
	_ = r.server.Close()
	<-r.serving
}

// URL is the registry's address with its scheme.
func (r *Registry) URL() string { return r.scheme + "://" + r.Host }

// Ref returns the reference of "repository:tag" or "repository@digest" here.
func (r *Registry) Ref(name string) string { return r.Host + "/" + name }

// ServeHTTP implements http.Handler.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	r.requests = append(r.requests, Request{Method: req.Method, Path: req.URL.Path, Query: req.URL.RawQuery, Header: req.Header.Clone(), At: time.Now()})
	f := r.fault(req)
	r.mu.Unlock()
	if f != nil && f.BeforeAuth {
		r.misbehave(f, w, req)
		return
	}
	if req.URL.Path == tokenPath {
		r.auth.serveToken(w, req)
		return
	}
	if !r.auth.admit(r.URL(), w, req) {
		return
	}
	if f != nil {
		r.misbehave(f, w, req)
		return
	}
	r.serve(w, req)
}

// serve answers a request from the store. The store understands only ranges
// with both ends, and clients resume a download with "from here on".
func (r *Registry) serve(w http.ResponseWriter, req *http.Request) {
	if req.Method != http.MethodGet || !strings.Contains(req.URL.Path, "/blobs/sha256:") || req.Header.Get("Range") == "" {
		r.store.ServeHTTP(w, req)
		return
	}
	whole := req.Clone(req.Context())
	whole.Header.Del("Range")
	a := &answer{header: w.Header(), code: http.StatusOK}
	r.store.ServeHTTP(a, whole)
	if a.code != http.StatusOK {
		w.WriteHeader(a.code)
		_, _ = io.WriteString(w, a.body.String())
		return
	}
	w.Header().Del("Content-Length")
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, req, "", time.Time{}, strings.NewReader(a.body.String()))
}

// Requests returns what has been asked for so far.
func (r *Registry) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.requests)
}

// Count returns how many requests match.
func (r *Registry) Count(match func(Request) bool) int {
	n := 0
	for _, q := range r.Requests() {
		if match(q) {
			n++
		}
	}
	return n
}

// BlobGets returns how often each blob was asked for, by digest.
func (r *Registry) BlobGets() map[string]int {
	out := map[string]int{}
	for _, q := range r.Requests() {
		if q.Blob() {
			out[q.Path[strings.LastIndexByte(q.Path, '/')+1:]]++
		}
	}
	return out
}

// ResetLog forgets the requests so far.
func (r *Registry) ResetLog() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = nil
}

// put sends a request to the store itself, past access control and faults.
func (r *Registry) put(ctx context.Context, method, path, mediaType string, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, method, r.URL()+path, strings.NewReader(string(body)))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", mediaType)
	w := &answer{header: http.Header{}, code: http.StatusOK}
	r.store.ServeHTTP(w, req)
	if w.code >= 300 {
		return fmt.Errorf("%s %s: %d %s", method, path, w.code, w.body.String())
	}
	return nil
}

// answer keeps a response in memory.
type answer struct {
	header http.Header
	code   int
	body   strings.Builder
}

// Header implements http.ResponseWriter.
func (a *answer) Header() http.Header { return a.header }

// WriteHeader implements http.ResponseWriter.
func (a *answer) WriteHeader(code int) { a.code = code }

// Write implements http.ResponseWriter.
func (a *answer) Write(p []byte) (int, error) { return a.body.Write(p) }
