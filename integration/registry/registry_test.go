package registry

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestFaults(t *testing.T) {
	const body = "0123456789"
	for name, tc := range map[string]struct {
		fault  Fault
		header http.Header
		status int
		body   string
		broken bool
	}{
		"none":     {Fault{Match: Manifests()}, nil, 200, body, false},
		"range":    {Fault{Match: Manifests()}, http.Header{"Range": {"bytes=4-"}}, 206, body[4:], false},
		"status":   {Fault{Status: 503}, nil, 503, "FAULT", false},
		"cut":      {Fault{CutAfter: 3}, nil, 200, body[:3], true},
		"corrupt":  {Fault{Corrupt: true}, nil, 200, string([]byte{'0' ^ 0xff}) + body[1:], false},
		"trickle":  {Fault{Trickle: time.Millisecond}, nil, 200, body, false},
		"replaced": {Fault{Body: []byte("other")}, nil, 200, "other", false},
		"delay":    {Fault{Delay: time.Millisecond}, nil, 200, body, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := StartT(t, Options{})
			d, err := r.PutBlob("repo", []byte(body))
			if err != nil {
				t.Fatal(err)
			}
			r.Inject(tc.fault)
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.URL()+"/v2/repo/blobs/"+d, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header = tc.header
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			if tc.broken != (err != nil) || resp.StatusCode != tc.status || !strings.Contains(string(got), tc.body) {
				t.Errorf("%d %q %v", resp.StatusCode, got, err)
			}
			if r.BlobGets()[d] != 1 {
				t.Errorf("log %v", r.Requests())
			}
		})
	}
}

func TestFaultTimesAndHeal(t *testing.T) {
	r := StartT(t, Options{})
	get := func() int {
		resp, err := http.Get(r.URL() + "/v2/")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return resp.StatusCode
	}
	r.Inject(Fault{Status: 500, Times: 2})
	r.Inject(Fault{Status: 429})
	for i, want := range []int{500, 500, 429, 429} {
		if got := get(); got != want {
			t.Errorf("request %d: %d, want %d", i, got, want)
		}
	}
	r.Heal()
	if got := get(); got != 200 {
		t.Errorf("healed: %d", got)
	}
}

func TestAccess(t *testing.T) {
	for name, tc := range map[string]struct {
		auth   Auth
		header string
		status int
	}{
		"anonymous":    {Auth{}, "", 200},
		"basic, none":  {Auth{Mode: Basic}, "", 401},
		"basic":        {Auth{Mode: Basic}, "Basic dXNlcjpzZWNyZXQ=", 200},
		"bearer, none": {Auth{Mode: Bearer}, "", 401},
		"bearer":       {Auth{Mode: Bearer, Tokens: []string{"t"}}, "Bearer t", 200},
		"bearer wrong": {Auth{Mode: Bearer, Tokens: []string{"t"}}, "Bearer u", 401},
		"forbidden":    {Auth{Forbidden: true}, "", 403},
	} {
		r := StartT(t, Options{Auth: tc.auth})
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.URL()+"/v2/", nil)
		if err != nil {
			t.Fatal(err)
		}
		if tc.header != "" {
			req.Header.Set("Authorization", tc.header)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != tc.status {
			t.Errorf("%s: %d", name, resp.StatusCode)
		}
		if (tc.status == 401) != (resp.Header.Get("WWW-Authenticate") != "") {
			t.Errorf("%s: challenge %q", name, resp.Header.Get("WWW-Authenticate"))
		}
	}
}

func TestPushedImageIsServed(t *testing.T) {
	r := StartT(t, Options{})
	img, err := Build(Image{Layers: []map[string][]byte{{"a": []byte("b")}}, Compression: Zstd})
	if err != nil {
		t.Fatal(err)
	}
	idx, err := Index(img)
	if err != nil {
		t.Fatal(err)
	}
	d, err := r.PushIndex("team/app", "v1", idx)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"v1", d} {
		resp, err := http.Get(r.URL() + "/v2/team/app/manifests/" + name)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 200 || resp.Header.Get("Docker-Content-Digest") != d {
			t.Errorf("%s: %d %v", name, resp.StatusCode, resp.Header)
		}
	}
}
