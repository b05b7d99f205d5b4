package image

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Registry is how registries are reached. Hosts files are read anew for each
// pull; everything else is fixed.
type Registry struct {
	// ConfigPath lists directories with one directory per registry, in
	// containerd's hosts.toml or docker's certs.d layout.
	ConfigPath []string
	// Mirrors are the endpoints tried before a registry itself, by registry
	// host or "*". Deprecated in containerd; not used when ConfigPath is set.
	Mirrors map[string][]string
	// Auths are credentials of the node by registry host, from "auths" and
	// "configs". Deprecated in containerd. Those of a request come first.
	Auths map[string]*cri.AuthConfig
	// Headers go with every request to a registry and to its token server,
	// and to nobody else.
	Headers http.Header
}

// access is how one pull reaches the hosts of one registry. It makes sure
// that a secret goes to the host it was given for and to no other: not to a
// mirror, not along a redirect, not to an address out of a descriptor.
type access struct {
	registry Registry
	domain   string
	request  *credentials
	node     map[string]*credentials
	traffic  *traffic

	mu    sync.Mutex
	hosts []docker.RegistryHost // set by the first call of registryHosts
	own   map[string]bool       // hosts that are the registry itself
}

// newAccess prepares a pull with the request's credentials and the node's.
func newAccess(r Registry, node map[string]*credentials, named reference.Named, auth *cri.AuthConfig) (*access, error) {
	request, err := decodeAuth(auth)
	if err != nil {
		return nil, err
	}
	a := &access{registry: r, domain: reference.Domain(named), request: request, node: node, traffic: newTraffic()}
	a.own = map[string]bool{canonicalHost(a.domain): true}
	return a, nil
}

// nodeCredentials reads the configured credentials, by host. Unusable ones are
// left out and logged: they are one registry's, and a node has others.
func nodeCredentials(ctx context.Context, auths map[string]*cri.AuthConfig) map[string]*credentials {
	out := map[string]*credentials{}
	for host, a := range auths {
		c, err := decodeAuth(a)
		if err != nil {
			logFailure(ctx, "configured credentials of "+host+" are left out", err)
			continue
		}
		if c != nil {
			out[canonicalHost(host)] = c
		}
	}
	return out
}

// credentialsFor returns the secret for a host, or nil.
func (a *access) credentialsFor(host string) *credentials {
	host = canonicalHost(host)
	a.mu.Lock()
	own := a.own[host]
	a.mu.Unlock()
	if c := a.request; c != nil {
		if c.host == host || (c.host == "" && own) {
			return c
		}
		// A secret for the registry under its usual name is one for the
		// registry wherever the operator says that it is.
		if own && c.host == canonicalHost(a.domain) {
			return c
		}
	}
	if c := a.node[host]; c != nil && (c.host == "" || c.host == host) {
		return c
	}
	return nil
}

func (a *access) userSecret(host string) (string, string, error) {
	c := a.credentialsFor(host)
	if c == nil {
		return "", "", nil
	}
	return c.user, c.secret, nil
}

// registryHosts implements docker.RegistryHosts. The hosts are made once per
// pull, so that tokens and connections serve all its requests.
func (a *access) registryHosts(ctx context.Context) docker.RegistryHosts {
	return func(host string) ([]docker.RegistryHost, error) {
		a.mu.Lock()
		hosts := a.hosts
		a.mu.Unlock()
		if hosts != nil {
			return hosts, nil
		}
		make := a.mirrorHosts
		if len(a.registry.ConfigPath) > 0 {
			make = config.ConfigureHosts(ctx, config.HostOptions{
				Credentials:    a.userSecret,
				HostDir:        a.hostDir,
				UpdateClient:   a.traffic.wrap,
				AuthorizerOpts: []docker.AuthorizerOpt{docker.WithAuthHeader(a.registry.Headers)},
			})
		}
		hosts, err := make(host)
		if err != nil {
			return nil, fmt.Errorf("configure registry %s: %w", host, err)
		}
		a.adopt(hosts)
		return hosts, nil
	}
}

// adopt binds the headers and the authorizer of each host to that host.
func (a *access) adopt(hosts []docker.RegistryHost) {
	for i := range hosts {
		h := &hosts[i]
		merged := h.Header.Clone()
		if merged == nil {
			merged = http.Header{}
		}
		for k, v := range a.registry.Headers {
			merged[k] = append(merged[k], v...)
		}
		h.Header = merged
		h.Authorizer = &boundAuthorizer{inner: h.Authorizer, access: a, headers: merged, scheme: h.Scheme, host: h.Host}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.hosts = hosts
	a.traffic.setSpare(spareHosts(hosts))
	if n := len(hosts); n > 0 && len(a.registry.ConfigPath) > 0 {
		// The last host of a hosts file is not a mirror: it is where the
		// operator says that the registry is.
		a.own[canonicalHost(hosts[n-1].Host)] = true
	}
}

func (a *access) hostDir(host string) (string, error) {
	for _, root := range a.registry.ConfigPath {
		dir, err := config.HostDirFromRoot(root)(host)
		if errdefs.IsNotFound(err) {
			continue
		}
		return dir, err
	}
	return "", errdefs.ErrNotFound
}

// mirrorHosts gives the hosts of the deprecated mirrors table, the registry
// itself last unless it is an endpoint already.
func (a *access) mirrorHosts(host string) ([]docker.RegistryHost, error) {
	endpoints, ok := a.registry.Mirrors[host]
	if !ok {
		endpoints = a.registry.Mirrors["*"]
	}
	self, err := docker.DefaultHost(host)
	if err != nil {
		return nil, err
	}
	var urls []*url.URL
	for _, e := range append(slices.Clone(endpoints), self) {
		u, err := endpointURL(e)
		if err != nil {
			return nil, err
		}
		if e == self && slices.ContainsFunc(urls, func(v *url.URL) bool { return v.Host == u.Host }) {
			continue
		}
		urls = append(urls, u)
	}
	hosts := make([]docker.RegistryHost, 0, len(urls))
	for _, u := range urls {
		tr := docker.DefaultHTTPTransport(nil)
		if docker.IsLocalhost(host) && u.Scheme == "http" {
			tr.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} // loopback only
		}
		client := &http.Client{Transport: tr}
		if err := a.traffic.wrap(client); err != nil {
			return nil, err
		}
		hosts = append(hosts, docker.RegistryHost{
			Client: client,
			Authorizer: docker.NewDockerAuthorizer(docker.WithAuthClient(client),
				docker.WithAuthCreds(a.userSecret), docker.WithAuthHeader(a.registry.Headers)),
			Host: u.Host, Scheme: u.Scheme, Path: u.Path,
			Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
		})
	}
	return hosts, nil
}

// endpointURL completes an endpoint: https, but http on loopback, and /v2.
func endpointURL(e string) (*url.URL, error) {
	if !strings.Contains(e, "://") {
		scheme := "https://"
		if host, _, _ := strings.Cut(e, "/"); docker.IsLocalhost(host) {
			scheme = "http://"
		}
		e = scheme + e
	}
	u, err := url.Parse(e)
	if err != nil || u.Host == "" {
		return nil, fmt.Errorf("mirror endpoint is not a URL: %w", errdefs.ErrInvalidArgument)
	}
	if u.Path == "" {
		u.Path = "/v2"
	}
	return u, nil
}

// boundAuthorizer adds to a host's authorizer what keeps secrets at home.
type boundAuthorizer struct {
	inner   docker.Authorizer
	access  *access
	headers http.Header
	// scheme is the configured one of the registry at host. A registry on
	// loopback that does not speak TLS is reached without: then plain is set.
	scheme, host string
	plain        atomic.Bool
}

// token marks a request for a token with how the registry was reached.
func (b *boundAuthorizer) token(ctx context.Context) context.Context {
	scheme := b.scheme
	if b.plain.Load() {
		scheme = "http"
	}
	return context.WithValue(ctx, tokenKey{}, scheme)
}

// Authorize is also called for each redirect, with the headers net/http copied
// from the request before. Those that are not for the new host are dropped
// here, because net/http keeps them for another port of the same name, for
// subdomains, and keeps configured headers for anybody.
func (b *boundAuthorizer) Authorize(ctx context.Context, req *http.Request) error {
	if req.Response != nil && req.Response.Request != nil && !sameOrigin(req.URL, req.Response.Request.URL) {
		for _, h := range []string{"Authorization", "Proxy-Authorization", "Cookie", "Cookie2"} {
			req.Header.Del(h)
		}
		for h := range b.headers {
			if http.CanonicalHeaderKey(h) != "User-Agent" {
				req.Header.Del(h)
			}
		}
	}
	if req.URL.Scheme == "http" && b.scheme == "https" && strings.EqualFold(req.URL.Host, b.host) && !docker.IsLocalhost(b.host) {
		// A registry behind a proxy that ends TLS may send its clients to
		// itself without; what is secret does not go there.
		return nil
	}
	if c := b.access.credentialsFor(req.URL.Host); c != nil && c.bearer != "" {
		req.Header.Set("Authorization", "Bearer "+c.bearer)
		return nil
	}
	return b.inner.Authorize(b.token(ctx), req)
}

// AddResponses considers a refusal. Answers that cannot change by asking again
// are errors at once: asking again locks accounts.
func (b *boundAuthorizer) AddResponses(ctx context.Context, responses []*http.Response) error {
	last := responses[len(responses)-1]
	refused := func(err error) error {
		return &statusError{host: last.Request.URL.Host, status: last.Status, code: last.StatusCode, err: err}
	}
	if last.Request.URL.Scheme == "http" && strings.EqualFold(last.Request.URL.Host, b.host) && docker.IsLocalhost(b.host) {
		b.plain.Store(true)
	}
	c := b.access.credentialsFor(last.Request.URL.Host)
	sent := last.Request.Header.Get("Authorization")
	if c != nil && c.bearer != "" || strings.HasPrefix(sent, "Basic ") {
		return refused(fmt.Errorf("credentials rejected: %w", docker.ErrInvalidAuthorization))
	}
	err := b.inner.AddResponses(b.token(ctx), responses)
	if err != nil && !errors.Is(err, errdefs.ErrNotImplemented) {
		return refused(err)
	}
	return err
}

func sameOrigin(a, b *url.URL) bool {
	return a.Scheme == b.Scheme && strings.EqualFold(a.Host, b.Host)
}
