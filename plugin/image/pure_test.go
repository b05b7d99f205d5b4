package image

import (
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }
func (endless) Close() error               { return nil }

func contextWithToken(t *testing.T, scheme string) context.Context {
	return context.WithValue(t.Context(), tokenKey{}, scheme)
}

func TestNormalise(t *testing.T) {
	sum := strings.Repeat("a", 64)
	for in, want := range map[string]string{
		"busybox":                          "docker.io/library/busybox:latest",
		"busybox:1":                        "docker.io/library/busybox:1",
		"team/app":                         "docker.io/team/app:latest",
		"index.docker.io/team/app":         "docker.io/team/app:latest",
		"localhost/app":                    "localhost/app:latest",
		"localhost:5000/app:v1":            "localhost:5000/app:v1",
		"host.example/a/b/c@sha256:" + sum: "host.example/a/b/c@sha256:" + sum,
		"app:v1@sha256:" + sum:             "docker.io/library/app@sha256:" + sum,
		"":                                 "",
		"UPPER":                            "",
		sum:                                "",
		"a:b:c":                            "",
		"app@sha256:short":                 "",
		" app":                             "",
		"app\n":                            "",
	} {
		got, err := normalise(in)
		if want == "" {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: %v, %v", in, got, err)
			}
			continue
		}
		if err != nil || got.String() != want {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
}

func TestNames(t *testing.T) {
	target := digest.FromString("x")
	for ref, want := range map[string]int{"app:v1": 3, "app@" + target.String(): 2} {
		named, err := normalise(ref)
		must(t, err)
		got := names(named, target, "sha256:id")
		if len(got) != want || got[len(got)-1] != "sha256:id" || got[len(got)-2] != "docker.io/library/app@"+target.String() {
			t.Errorf("%s: %v", ref, got)
		}
	}
}

func TestSplitUser(t *testing.T) {
	for in, want := range map[string]struct {
		uid  int64
		name string
	}{
		"":                        {-1, ""},
		":0":                      {-1, ""},
		"0":                       {0, ""},
		"00":                      {0, ""},
		"1000:1000":               {1000, ""},
		"1000:wheel":              {1000, ""},
		"www-data:33":             {-1, "www-data"},
		"4294967296":              {4294967296, ""},
		"99999999999999999999999": {-1, "99999999999999999999999"},
		"+5":                      {-1, "+5"},
		"-1":                      {-1, "-1"},
		"1e3":                     {-1, "1e3"},
	} {
		uid, name := splitUser(in)
		if name != want.name || (uid == nil) != (want.uid < 0) || uid != nil && *uid != want.uid {
			t.Errorf("%q: %v %q", in, uid, name)
		}
	}
}

func TestDecodeAuthRefuses(t *testing.T) {
	for name, a := range map[string]*cri.AuthConfig{
		"auth":           {Auth: "not base64!"},
		"auth ":          {Auth: base64.StdEncoding.EncodeToString([]byte("nocolon"))},
		"auth  ":         {Auth: base64.StdEncoding.EncodeToString([]byte(":nouser"))},
		"auth   ":        {Auth: strings.Repeat("A", maxSecret+4)},
		"server_address": {Username: "u", ServerAddress: "http://%zz"},
		"registry_token": {RegistryToken: "a\r\nX-Injected: 1"},
	} {
		_, err := decodeAuth(a)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "auth."+strings.TrimSpace(name)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestJudge(t *testing.T) {
	start := time.Unix(1000, 0)
	at := func(s int) time.Time { return start.Add(time.Duration(s) * time.Second) }
	j := judge{timeout: 10 * time.Second, since: start}
	for i, step := range []struct {
		at      int
		r       reading
		stalled bool
	}{
		{5, reading{downloaded: 100}, false},
		{9, reading{downloaded: 20000}, false},            // fast enough
		{18, reading{downloaded: 20100}, false},           // trickles since 9
		{19, reading{downloaded: 20100, steps: 1}, false}, // something ended
		{28, reading{downloaded: 20200, steps: 1}, false}, // trickles since 19
		{29, reading{downloaded: 20200, steps: 1, excused: true}, false},
		{39, reading{downloaded: 20300, steps: 1}, false},
		{40, reading{downloaded: 20300, steps: 1}, true}, // nothing since 29
	} {
		if got := j.stalled(at(step.at), step.r) > 0; got != step.stalled {
			t.Errorf("step %d: stalled %t", i, got)
		}
	}
}

func TestProgressExcusesWhatCannotBeSeen(t *testing.T) {
	var p progress
	read, end := p.beginApply(100)
	if !p.look().excused {
		t.Error("an applier that reports nothing is not excused")
	}
	read(50)
	if p.look().excused {
		t.Error("an applier that reports is excused")
	}
	read(100)
	if !p.look().excused {
		t.Error("an applier that syncs is not excused")
	}
	end()
	p.wait(1)
	if !p.look().excused {
		t.Error("waiting for another pull is not excused")
	}
	p.wait(-1)
	if p.look().excused {
		t.Error("still excused")
	}
}

func TestKeyedLock(t *testing.T) {
	var l keyedLock
	must(t, l.lock(t.Context(), "a"))
	must(t, l.lock(t.Context(), "b"))
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("reason")
	cancel(reason)
	if err := l.lock(ctx, "a"); !errors.Is(err, reason) {
		t.Errorf("error %v", err)
	}
	got := make(chan error)
	go func() { got <- l.lock(t.Context(), "a") }()
	eventually(t, "the second one waits", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.slots["a"].refs == 2
	})
	l.unlock("a")
	must(t, <-got)
	l.unlock("a")
	l.unlock("b")
	if len(l.slots) != 0 {
		t.Errorf("left: %v", l.slots)
	}
}

func TestHostPlatformTakesLowerLevels(t *testing.T) {
	m := platforms.Only(imagespec.Platform{OS: "linux", Architecture: "amd64", Variant: "v3"})
	for variant, want := range map[string]bool{"": true, "v1": true, "v2": true, "v3": true, "v4": false} {
		if m.Match(imagespec.Platform{OS: "linux", Architecture: "amd64", Variant: variant}) != want {
			t.Errorf("amd64/%s: match %t", variant, !want)
		}
	}
}

func FuzzNormalise(f *testing.F) {
	for _, s := range []string{"busybox", "a/b:c@sha256:" + strings.Repeat("0", 64), "localhost:5000/x", "@", ":", "A", "a//b", "[::1]:5000/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := normalise(s)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("class of %v", err)
			}
			return
		}
		again, err := normalise(n.String())
		if err != nil || again.String() != n.String() {
			t.Fatalf("%q gives %q, which gives %v, %v", s, n, again, err)
		}
		if k, repo := classify(n.String()); k != kindTag && k != kindDigest || repo != n.Name() {
			t.Fatalf("%q is classified as %d of %q", n, k, repo)
		}
	})
}

func FuzzDecodeAuth(f *testing.F) {
	f.Add("", "", "dXNlcjpzZWNyZXQ=", "", "", "")
	f.Add("u", "p", "", "https://index.docker.io/v1/", "", "")
	f.Add("", "", "dTpw\n", "h:5000/x", "identity", "")
	f.Add("", "", "", "http://u:p@h", "", "token")
	f.Fuzz(func(t *testing.T, user, pass, auth, server, identity, token string) {
		c, err := decodeAuth(&cri.AuthConfig{Username: user, Password: pass, Auth: auth, ServerAddress: server, IdentityToken: identity, RegistryToken: token})
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("class of %v", err)
			}
			if auth != "" && len(auth) > 8 && strings.Contains(err.Error(), auth) {
				t.Fatalf("%v quotes the secret", err)
			}
			return
		}
		if c == nil {
			return
		}
		if strings.ContainsAny(c.bearer, "\r\n") {
			t.Fatalf("token %q would split a header", c.bearer)
		}
		if server != "" && c.host == "" {
			t.Fatalf("server address %q was lost", server)
		}
	})
}

// A registry that sends its clients to itself without TLS gets no secret there.
func TestNoSecretInTheClear(t *testing.T) {
	a := &access{request: &credentials{host: "registry.test", bearer: "secret"}, own: map[string]bool{"registry.test": true}}
	b := &boundAuthorizer{access: a, scheme: "https", host: "registry.test"}
	for url, want := range map[string]string{
		"https://registry.test/v2/": "Bearer secret",
		"http://registry.test/v2/":  "",
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Authorize(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		if got := req.Header.Get("Authorization"); got != want {
			t.Errorf("%s: Authorization is %q, want %q", url, got, want)
		}
	}
}

// What nobody asks for is not kept, however much of it there is.
func TestDecodeConfigWithoutHistory(t *testing.T) {
	got, err := decodeConfig([]byte(`{"os": "linux", "config": {"User": "7"}, "history": [{}, {"comment": "x"}, 3]}`))
	if err != nil || got.OS != "linux" || got.Config.User != "7" || got.History != nil {
		t.Errorf("%+v, %v", got, err)
	}
}
