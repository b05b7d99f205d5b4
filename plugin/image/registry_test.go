package image

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/v1/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/registry"
)

func TestEveryFormOfCredentials(t *testing.T) {
	combined := base64.StdEncoding.EncodeToString([]byte("user:secret"))
	for name, tc := range map[string]struct {
		auth registry.Auth
		cred *cri.AuthConfig
		ok   bool
	}{
		"anonymous":              {registry.Auth{}, nil, true},
		"anonymous token":        {registry.Auth{Mode: registry.BearerAnonymous}, nil, true},
		"basic":                  {registry.Auth{Mode: registry.Basic}, &cri.AuthConfig{Username: "user", Password: "secret"}, true},
		"basic combined":         {registry.Auth{Mode: registry.Basic}, &cri.AuthConfig{Auth: combined}, true},
		"basic wrong":            {registry.Auth{Mode: registry.Basic}, &cri.AuthConfig{Username: "user", Password: "wrong"}, false},
		"basic none":             {registry.Auth{Mode: registry.Basic}, nil, false},
		"bearer":                 {registry.Auth{Mode: registry.Bearer}, &cri.AuthConfig{Username: "user", Password: "secret"}, true},
		"bearer without POST":    {registry.Auth{Mode: registry.Bearer, NoPost: true}, &cri.AuthConfig{Username: "user", Password: "secret"}, true},
		"bearer combined":        {registry.Auth{Mode: registry.Bearer}, &cri.AuthConfig{Auth: combined}, true},
		"bearer wrong":           {registry.Auth{Mode: registry.Bearer}, &cri.AuthConfig{Username: "user", Password: "wrong"}, false},
		"identity token":         {registry.Auth{Mode: registry.Bearer, RefreshToken: "refresh"}, &cri.AuthConfig{IdentityToken: "refresh"}, true},
		"wrong identity token":   {registry.Auth{Mode: registry.Bearer, RefreshToken: "refresh"}, &cri.AuthConfig{IdentityToken: "stale"}, false},
		"registry token":         {registry.Auth{Mode: registry.Bearer, Tokens: []string{"ready"}}, &cri.AuthConfig{RegistryToken: "ready"}, true},
		"wrong registry token":   {registry.Auth{Mode: registry.Bearer, Tokens: []string{"ready"}}, &cri.AuthConfig{RegistryToken: "stale"}, false},
		"for another server":     {registry.Auth{Mode: registry.Basic}, &cri.AuthConfig{Username: "user", Password: "secret", ServerAddress: "https://elsewhere.example/v1/"}, false},
		"empty means anonymous":  {registry.Auth{}, &cri.AuthConfig{}, true},
		"unwanted are not asked": {registry.Auth{}, &cri.AuthConfig{Username: "user", Password: "secret"}, true},
	} {
		for config, paths := range map[string][]string{"": nil, ", hosts directory": {t.TempDir()}} {
			t.Run(name+config, func(t *testing.T) {
				reg := registry.StartT(t, registry.Options{Auth: tc.auth})
				w := newWorld(t, func(o *Options) { o.Registry.ConfigPath = paths })
				ref, _ := push(t, reg, "private/app:v1", sample(t, "app", 1))
				_, err := w.Pull(w.ctx, PullRequest{Ref: ref, Auth: tc.cred})
				checkCredentials(t, reg, tc.cred, tc.ok, err)
			})
		}
	}
}

// checkCredentials judges the outcome of a pull.
func checkCredentials(t *testing.T, reg *registry.Registry, cred *cri.AuthConfig, ok bool, err error) {
	t.Helper()
	if ok != (err == nil) {
		t.Fatalf("error %v", err)
	}
	if err != nil && !errdefs.IsUnauthorized(err) {
		t.Errorf("class %v of %v", errdefs.Resolve(err), err)
	}
	if err != nil && cred.GetPassword() == "wrong" && strings.Contains(err.Error(), `"wrong"`) {
		t.Errorf("the error quotes the password: %v", err)
	}
	if n := reg.Count(func(registry.Request) bool { return true }); !ok && n > 4 {
		t.Errorf("%d requests with credentials that are refused", n)
	}
}

func TestServerAddressOfTheRegistryItself(t *testing.T) {
	reg := registry.StartT(t, registry.Options{Auth: registry.Auth{Mode: registry.Basic}})
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 1))
	for _, addr := range []string{reg.Host, "http://" + reg.Host, "https://" + reg.Host + "/v1/"} {
		w := newWorld(t, nil)
		if _, err := w.Pull(w.ctx, PullRequest{Ref: ref, Auth: &cri.AuthConfig{Username: "user", Password: "secret", ServerAddress: addr}}); err != nil {
			t.Errorf("%s: %v", addr, err)
		}
	}
}

// authorised returns the requests that carried a secret.
func authorised(r *registry.Registry) (out []string) {
	for _, q := range r.Requests() {
		for _, h := range []string{"Authorization", "Cookie", "X-Secret"} {
			if q.Header.Get(h) != "" {
				out = append(out, q.Method+" "+q.Path+" "+h)
			}
		}
	}
	return out
}

// A second server on the same address but another port: the case where
// net/http would keep the headers.
func TestSecretsDoNotFollowARedirect(t *testing.T) {
	for name, auth := range map[string]registry.Auth{"basic": {Mode: registry.Basic}, "bearer": {Mode: registry.Bearer}} {
		t.Run(name, func(t *testing.T) {
			reg := registry.StartT(t, registry.Options{Auth: auth})
			store := registry.StartT(t, registry.Options{})
			w := newWorld(t, func(o *Options) { o.Registry.Headers = http.Header{"X-Secret": {"configured"}} })
			img := sample(t, "app", 1)
			ref, _ := push(t, reg, "app:v1", img)
			push(t, store, "app:v1", img)
			layers, err := img.Layers()
			must(t, err)
			d, err := layers[0].Digest()
			must(t, err)
			reg.Inject(registry.Fault{Match: registry.Blobs(d.String()), Redirect: store.URL() + "/v2/app/blobs/" + d.String() + "?signature=hidden"})
			_, err = w.Pull(w.ctx, PullRequest{Ref: ref, Auth: &cri.AuthConfig{Username: "user", Password: "secret"}})
			must(t, err)
			if len(store.Requests()) == 0 || len(authorised(store)) > 0 {
				t.Errorf("requests %d, with secrets: %v", len(store.Requests()), authorised(store))
			}
			if len(authorised(reg)) == 0 {
				t.Error("the registry got no credentials")
			}
		})
	}
}

func TestARedirectTargetThatAsksForCredentialsGetsNone(t *testing.T) {
	reg := registry.StartT(t, registry.Options{Auth: registry.Auth{Mode: registry.Basic}})
	thief := registry.StartT(t, registry.Options{Auth: registry.Auth{Mode: registry.Basic}})
	w := newWorld(t, nil)
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 1))
	reg.Inject(registry.Fault{Match: registry.Blobs(), Redirect: thief.URL() + "/v2/app/blobs/x?signature=hidden"})
	_, err := w.Pull(w.ctx, PullRequest{Ref: ref, Auth: &cri.AuthConfig{Username: "user", Password: "secret"}})
	if !errdefs.IsUnauthorized(err) {
		t.Errorf("error %v", err)
	}
	if err != nil && strings.Contains(err.Error(), "hidden") {
		t.Errorf("the error shows a signature: %v", err)
	}
	if got := authorised(thief); len(got) > 0 {
		t.Errorf("secrets went out: %v", got)
	}
}

func TestSecretsDoNotGoToDescriptorURLs(t *testing.T) {
	reg := registry.StartT(t, registry.Options{Auth: registry.Auth{Mode: registry.Basic}})
	foreign := registry.StartT(t, registry.Options{})
	w := newWorld(t, func(o *Options) { o.Registry.Headers = http.Header{"X-Secret": {"configured"}, "Authorization": nil} })
	img := sample(t, "app", 1)
	push(t, reg, "app:v1", img)
	push(t, foreign, "app:v1", img)
	m, err := img.Manifest()
	must(t, err)
	l := m.Layers[0]
	body := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[{"mediaType":%q,"digest":%q,"size":%d,"urls":[%q]}]}`,
		types.OCIManifestSchema1, m.Config.MediaType, m.Config.Digest, m.Config.Size, l.MediaType, l.Digest, l.Size, foreign.URL()+"/v2/app/blobs/"+l.Digest.String())
	_, err = reg.PutManifest("app", "foreign", string(types.OCIManifestSchema1), []byte(body))
	must(t, err)
	_, err = w.Pull(w.ctx, PullRequest{Ref: reg.Ref("app:foreign"), Auth: &cri.AuthConfig{Username: "user", Password: "secret"}})
	must(t, err)
	if len(foreign.Requests()) == 0 || len(authorised(foreign)) > 0 {
		t.Errorf("requests %d, with secrets: %v", len(foreign.Requests()), authorised(foreign))
	}
}

// hostsDir writes a hosts.toml for a registry.
func hostsDir(t *testing.T, host, text string) string {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, strings.Replace(host, ":", "_", 1)+"_")
	if !strings.Contains(host, ":") {
		dir = filepath.Join(root, host)
	}
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o600))
	return root
}

func TestMirrorGetsNoSecretOfTheRegistry(t *testing.T) {
	reg := registry.StartT(t, registry.Options{Auth: registry.Auth{Mode: registry.Basic}})
	mirror := registry.StartT(t, registry.Options{Auth: registry.Auth{Mode: registry.Basic}})
	img := sample(t, "app", 1)
	ref, _ := push(t, reg, "app:v1", img)
	push(t, mirror, "app:v1", img)
	for name, r := range map[string]Registry{
		"hosts.toml": {ConfigPath: []string{hostsDir(t, reg.Host, fmt.Sprintf("server = %q\n[host.%q]\n  [host.%q.header]\n    X-Secret = \"of the mirror\"\n", reg.URL(), mirror.URL(), mirror.URL()))}},
		"mirrors":    {Mirrors: map[string][]string{reg.Host: {mirror.URL()}}},
	} {
		t.Run(name, func(t *testing.T) {
			reg.ResetLog()
			mirror.ResetLog()
			w := newWorld(t, func(o *Options) { o.Registry = r })
			_, err := w.Pull(w.ctx, PullRequest{Ref: ref, Auth: &cri.AuthConfig{Username: "user", Password: "secret"}})
			must(t, err)
			if len(mirror.Requests()) == 0 {
				t.Error("the mirror was not asked")
			}
			for _, q := range mirror.Requests() {
				if q.Header.Get("Authorization") != "" {
					t.Errorf("the mirror got credentials with %s %s", q.Method, q.Path)
				}
			}
			if len(authorised(reg)) == 0 {
				t.Error("the registry got no credentials")
			}
			for _, q := range reg.Requests() {
				if q.Header.Get("X-Secret") != "" {
					t.Error("the registry got the mirror's header")
				}
			}
		})
	}
}

func TestMirrorServesAndNodeCredentialsAreItsOwn(t *testing.T) {
	mirror := registry.StartT(t, registry.Options{Auth: registry.Auth{Mode: registry.Basic, User: "m", Password: "m"}})
	img := sample(t, "app", 1)
	push(t, mirror, "library/app:v1", img)
	for name, r := range map[string]Registry{
		"hosts.toml": {ConfigPath: []string{"/nonexistent", hostsDir(t, "registry.invalid", fmt.Sprintf("[host.%q]\n", mirror.URL()))}},
		"mirrors":    {Mirrors: map[string][]string{"registry.invalid": {mirror.URL()}}},
		"wildcard":   {Mirrors: map[string][]string{"*": {mirror.Host}}},
	} {
		r.Auths = map[string]*cri.AuthConfig{mirror.Host: {Username: "m", Password: "m"}}
		w := newWorld(t, func(o *Options) { o.Registry = r })
		if _, err := w.Pull(w.ctx, PullRequest{Ref: "registry.invalid/library/app:v1"}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if st, _, _ := w.Status(w.ctx, named("registry.invalid/library/app:v1"), false); st == nil {
			t.Errorf("%s: the image is not there", name)
		}
	}
}

func TestADeadMirrorIsPassedOver(t *testing.T) {
	reg := registry.StartT(t, registry.Options{})
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	addr := dead.Addr().String()
	must(t, dead.Close())
	w := newWorld(t, func(o *Options) { o.Registry.Mirrors = map[string][]string{reg.Host: {"http://" + addr}} })
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 4))
	w.pull(ref)
}

// A mirror that is down is connected to once in a pull. Who has nobody to stand in
// for it is asked whenever the client tries again: the registry, a token server,
// the store that a blob is redirected to.
func TestOnlyASpareHostIsGivenUp(t *testing.T) {
	const resolve, pull = docker.HostCapabilityResolve, docker.HostCapabilityPull
	tr := newTraffic()
	tr.setSpare(spareHosts([]docker.RegistryHost{
		{Host: "only.example", Capabilities: resolve | pull},
		{Host: "mirror.example", Capabilities: pull},
		{Host: "self.example", Path: "/mirror", Capabilities: pull},
		{Host: "self.example", Capabilities: pull},
	}))
	for host, want := range map[string]int{
		"mirror.example": 1, "only.example": 2, "self.example": 2, "blobs.example": 2, "token.example": 2,
	} {
		asked := 0
		rt := &transport{t: tr, base: roundTrip(func(*http.Request) (*http.Response, error) {
			asked++
			return nil, &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}
		})}
		for range 2 {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+host+"/x", nil)
			must(t, err)
			if _, err := rt.RoundTrip(req); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: %v", host, err)
			}
		}
		if asked != want {
			t.Errorf("%s was connected to %d times, want %d", host, asked, want)
		}
	}
}

func TestHostsFileIsReadForEachPull(t *testing.T) {
	a, b := registry.StartT(t, registry.Options{}), registry.StartT(t, registry.Options{})
	pushTo := func(r *registry.Registry, name string) { push(t, r, "app:v1", sample(t, name, 1)) }
	pushTo(a, "a")
	pushTo(b, "b")
	root := hostsDir(t, "registry.invalid", fmt.Sprintf("server = %q\n", a.URL()))
	w := newWorld(t, func(o *Options) { o.Registry.ConfigPath = []string{root} })
	first := w.pull("registry.invalid/app:v1")
	must(t, os.WriteFile(filepath.Join(root, "registry.invalid", "hosts.toml"), []byte(fmt.Sprintf("server = %q\n", b.URL())), 0o600))
	if w.pull("registry.invalid/app:v1") == first {
		t.Error("the edited file was not read")
	}
}

func TestServerOfAHostsFileGetsTheCredentials(t *testing.T) {
	reg := registry.StartT(t, registry.Options{Auth: registry.Auth{Mode: registry.Bearer}})
	push(t, reg, "app:v1", sample(t, "app", 1))
	root := hostsDir(t, "registry.invalid", fmt.Sprintf("server = %q\n", reg.URL()))
	w := newWorld(t, func(o *Options) { o.Registry.ConfigPath = []string{root} })
	_, err := w.Pull(w.ctx, PullRequest{Ref: "registry.invalid/app:v1", Auth: &cri.AuthConfig{Username: "user", Password: "secret", ServerAddress: "registry.invalid"}})
	must(t, err)
}

func TestMutualTLS(t *testing.T) {
	ca, caKey := certificate(t, nil, nil)
	server, serverKey := certificate(t, ca, caKey)
	client, clientKey := certificate(t, ca, caKey)
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	reg := registry.StartT(t, registry.Options{TLS: &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{server.Raw}, PrivateKey: serverKey}},
		ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: pool,
	}})
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 1))
	files := t.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(files, name)
		must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		return path
	}
	keyDER, err := x509.MarshalECPrivateKey(clientKey)
	must(t, err)
	caFile, crt, key := write("ca.pem", "CERTIFICATE", ca.Raw), write("c.pem", "CERTIFICATE", client.Raw), write("c.key", "EC PRIVATE KEY", keyDER)
	for name, tc := range map[string]struct {
		text string
		ok   bool
	}{
		"with both":      {fmt.Sprintf("server = %q\nca = %q\nclient = [[%q, %q]]\n", reg.URL(), caFile, crt, key), true},
		"without client": {fmt.Sprintf("server = %q\nca = %q\n", reg.URL(), caFile), false},
		"unknown ca":     {fmt.Sprintf("server = %q\nskip_verify = false\nclient = [[%q, %q]]\n", reg.URL(), crt, key), false},
	} {
		w := newWorld(t, func(o *Options) { o.Registry.ConfigPath = []string{hostsDir(t, reg.Host, tc.text)} })
		_, err := w.Pull(w.ctx, PullRequest{Ref: ref})
		if tc.ok != (err == nil) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func certificate(t *testing.T, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, BasicConstraintsValid: true, IsCA: parent == nil,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if parent == nil {
		parent, parentKey = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, parentKey)
	must(t, err)
	out, err := x509.ParseCertificate(der)
	must(t, err)
	return out, key
}

func TestTokenRequestsAreGuarded(t *testing.T) {
	var got []*http.Request
	tr := &transport{t: newTraffic(), base: roundTrip(func(r *http.Request) (*http.Response, error) {
		got = append(got, r)
		return &http.Response{StatusCode: 200, Body: endless{}, Request: r}, nil
	})}
	request := func(url, scheme string) (*http.Response, error) {
		req, err := http.NewRequestWithContext(contextWithToken(t, scheme), http.MethodGet, url, nil)
		must(t, err)
		req.SetBasicAuth("user", "secret")
		return tr.RoundTrip(req)
	}
	if _, err := request("http://auth.example/token", "https"); !errdefs.IsPermissionDenied(err) || len(got) > 0 {
		t.Errorf("clear-text token server: %v, %d requests", err, len(got))
	}
	resp, err := request("https://auth.example/token", "https")
	must(t, err)
	n := 0
	for buf := make([]byte, 64<<10); ; {
		m, err := resp.Body.Read(buf)
		n += m
		if err != nil {
			break
		}
	}
	if n != maxToken {
		t.Errorf("%d bytes of a token answer were read", n)
	}
}

func TestBusyRegistryIsGivenTime(t *testing.T) {
	tr := newTraffic()
	for i, want := range []time.Duration{firstPause, 2 * firstPause, 4 * firstPause} {
		if got := tr.pause("h", ""); got != want {
			t.Errorf("pause %d is %s, want %s", i, got, want)
		}
	}
	for header, want := range map[string]time.Duration{"0": 0, "3": 3 * time.Second, "99999": maxPause} {
		if got := tr.pause("h", header); got != want {
			t.Errorf("pause for %q is %s", header, got)
		}
	}
	reg := registry.StartT(t, registry.Options{})
	reg.Inject(registry.Fault{Match: registry.Manifests(), Status: 429, Times: 2, Header: http.Header{"Retry-After": {"0"}}})
	w := newWorld(t, nil)
	ref, _ := push(t, reg, "app:v1", sample(t, "app", 1))
	w.pull(ref)
}
