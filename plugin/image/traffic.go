package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
)

const (
	// maxToken bounds what a token server may answer.
	maxToken = 1 << 20
	// firstPause is the pause after a first "too many requests" that names
	// none itself; it doubles with each further one.
	firstPause = 250 * time.Millisecond
	// maxPause bounds the pause a registry may ask for. The client tries five
	// times, and somebody waits.
	maxPause = 10 * time.Second
)

// tokenKey marks the context of a request to a token server; its value is the
// scheme of the registry that sent us there.
type tokenKey struct{}

// traffic is what one pull's HTTP clients have in common: pauses that busy
// registries ask for and which mirrors did not answer.
type traffic struct {
	mu      sync.Mutex
	spare   map[string]bool  // hosts that another one stands in for
	dead    map[string]error // those of them that could not be connected to
	pauses  map[string]time.Duration
	clients []*http.Client
}

func newTraffic() *traffic {
	return &traffic{dead: map[string]error{}, pauses: map[string]time.Duration{}}
}

// setSpare names the hosts that can be done without.
func (t *traffic) setSpare(hosts map[string]bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.spare = hosts
}

// spareHosts returns the hosts of a list that need not answer, because a later
// one can do all that they can.
func spareHosts(hosts []docker.RegistryHost) map[string]bool {
	spare := map[string]bool{}
	for i, h := range hosts {
		spare[h.Host] = slices.ContainsFunc(hosts[i+1:], func(later docker.RegistryHost) bool {
			return later.Host != h.Host && later.Capabilities.Has(h.Capabilities)
		})
	}
	return spare
}

// wrap makes client part of the traffic. It fits config.HostOptions.
func (t *traffic) wrap(client *http.Client) error {
	if _, ok := client.Transport.(*transport); !ok {
		client.Transport = &transport{base: client.Transport, t: t}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.clients = append(t.clients, client)
	return nil
}

// close drops idle connections.
func (t *traffic) close() {
	t.mu.Lock()
	clients := t.clients
	t.clients = nil
	t.mu.Unlock()
	for _, c := range clients {
		c.CloseIdleConnections()
	}
}

// failed returns why host need not be tried: it could not be connected to
// before in this pull, and another will be asked. Only without this would each
// of an image's blobs wait for a mirror that is down.
func (t *traffic) failed(host string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.dead[host]
}

// markDead remembers that host could not be connected to, if it is spare. The
// registry itself, token servers and the stores that blobs are redirected to
// have nobody to stand in for them: they are tried as often as the client
// wants.
func (t *traffic) markDead(host string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.spare[host] {
		t.dead[host] = err
	}
}

// pause returns how long to wait before the next request to a host that said
// it gets too many.
func (t *traffic) pause(host, retryAfter string) time.Duration {
	if s, err := strconv.Atoi(retryAfter); err == nil && s >= 0 {
		return min(time.Duration(s)*time.Second, maxPause)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	d := max(firstPause, 2*t.pauses[host])
	d = min(d, maxPause)
	t.pauses[host] = d
	return d
}

// transport is an HTTP transport with the manners of traffic.
type transport struct {
	base http.RoundTripper
	t    *traffic
}

// CloseIdleConnections passes the call on.
func (r *transport) CloseIdleConnections() {
	if c, ok := r.base.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// RoundTrip implements http.RoundTripper.
func (r *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	scheme, token := req.Context().Value(tokenKey{}).(string)
	if token && scheme == "https" && req.URL.Scheme == "http" && (req.Header.Get("Authorization") != "" || req.Body != nil) {
		return nil, fmt.Errorf("send credentials to token server %s: it is not encrypted and the registry is: %w", req.URL.Host, errdefs.ErrPermissionDenied)
	}
	if err := r.t.failed(req.URL.Host); err != nil {
		return nil, err
	}
	resp, err := r.base.RoundTrip(req)
	if err != nil {
		if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" && req.Context().Err() == nil {
			r.t.markDead(req.URL.Host, err)
		}
		return nil, err
	}
	switch {
	case token:
		resp.Body = &limitedBody{Reader: io.LimitReader(resp.Body, maxToken), Closer: resp.Body}
	case strings.Contains(req.URL.Path, "/manifests/"):
		// Resolving reads one to its end whose size nobody told.
		resp.Body = &limitedBody{Reader: &limitedReader{from: resp.Body, left: maxManifest}, Closer: resp.Body}
	}
	if resp.StatusCode == http.StatusTooManyRequests {
		if err := sleep(req.Context(), r.t.pause(req.URL.Host, resp.Header.Get("Retry-After"))); err != nil {
			resp.Body.Close()
			return nil, err
		}
	}
	return resp, nil
}

type limitedBody struct {
	io.Reader
	io.Closer
}

// limitedReader fails where there is more than may be.
type limitedReader struct {
	from io.Reader
	left int64
}

// Read implements io.Reader.
func (r *limitedReader) Read(p []byte) (int, error) {
	if int64(len(p)) > r.left+1 {
		p = p[:r.left+1]
	}
	n, err := r.from.Read(p)
	if r.left -= int64(n); r.left < 0 {
		return 0, fmt.Errorf("manifest has more than %d bytes: %w", maxManifest, errdefs.ErrFailedPrecondition)
	}
	return n, err
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
