package config

import (
	"encoding/base64"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Images is the configuration of the image service.
type Images struct {
	// Snapshotter is the snapshotter of handlers that name none.
	Snapshotter                string
	DisableSnapshotAnnotations bool
	DiscardUnpackedLayers      bool
	// PinnedImages are references by name of choice. "sandbox" is always there.
	PinnedImages map[string]string
	// Pins are their patterns.
	Pins Pins
	// RuntimePlatforms are by the name of a runtime handler.
	RuntimePlatforms map[string]RuntimePlatform
	Registry         Registry
	// DecryptionKeyModel is "node", or "" for no decryption.
	DecryptionKeyModel string
	// MaxConcurrentDownloads per image, 0 for no limit.
	MaxConcurrentDownloads     int
	ConcurrentLayerFetchBuffer int
	// PullProgressTimeout is 0 for none.
	PullProgressTimeout time.Duration
	PullWithSyncFS      bool
	StatsCollectPeriod  time.Duration
}

// RuntimePlatform is the platform and snapshotter of a runtime handler's
// images.
type RuntimePlatform struct {
	Platform ocispec.Platform
	// Snapshotter is "" for Images.Snapshotter.
	Snapshotter string
}

// Registry is how registries are reached.
type Registry struct {
	// ConfigPaths are the roots of the hosts.toml directories, in the order
	// they are searched. Empty only when Mirrors is not.
	ConfigPaths []string
	// Mirrors are the URLs to try in place of a registry, by its host.
	Mirrors map[string][]*url.URL
	// Credentials are by host, for pulls that bring none.
	Credentials map[string]Credential
	// Headers are added to every request.
	Headers http.Header
}

// Credential is what a registry knows the node by: a user name and password,
// or a token if IdentityToken is not empty.
type Credential struct {
	Username, Password string
	IdentityToken      string
}

// String keeps the secrets out of logs.
func (c Credential) String() string { return "credential of " + c.Username }

// GoString keeps the secrets out of logs.
func (c Credential) GoString() string { return c.String() }

// ParseImages checks the images table and returns its meaning. The error
// joins a KeyError for everything that is wrong.
func ParseImages(raw Raw) (Images, []Warning, error) {
	w, v := load(ImagesPlugin, raw)
	out := Images{
		Snapshotter:                v.str("snapshotter"),
		DisableSnapshotAnnotations: v.bool("disable_snapshot_annotations"),
		DiscardUnpackedLayers:      v.bool("discard_unpacked_layers"),
		PinnedImages:               map[string]string{},
		RuntimePlatforms:           w.platforms(v.table("runtime_platforms")),
		Registry:                   w.registry(v.table("registry")),
		DecryptionKeyModel:         v.str("image_decryption.key_model"),
		MaxConcurrentDownloads:     max(0, v.int("max_concurrent_downloads")),
		ConcurrentLayerFetchBuffer: v.int("concurrent_layer_fetch_buffer"),
		PullProgressTimeout:        v.duration("image_pull_progress_timeout", 5*time.Minute),
		PullWithSyncFS:             v.bool("image_pull_with_sync_fs"),
		StatsCollectPeriod:         time.Duration(v.int("stats_collect_period")) * time.Second,
	}
	for name, ref := range v.table("pinned_images") {
		out.PinnedImages[name], _ = ref.(string)
		if err := out.Pins.add(out.PinnedImages[name]); err != nil {
			w.fail([]string{"pinned_images", name}, "%q: %v", out.PinnedImages[name], err)
		}
	}
	if out.Snapshotter == "" {
		w.fail([]string{"snapshotter"}, "is empty")
	}
	w.notNegative(out.ConcurrentLayerFetchBuffer, "concurrent_layer_fetch_buffer")
	w.notNegative(v.int("stats_collect_period"), "stats_collect_period")
	warnings, err := w.result()
	if err != nil {
		return Images{}, warnings, err
	}
	return out, warnings, nil
}

func (w *walker) platforms(v values) map[string]RuntimePlatform {
	out := map[string]RuntimePlatform{}
	for _, name := range v.names() {
		e := v.entry(name)
		p := RuntimePlatform{Platform: platforms.DefaultSpec(), Snapshotter: e.str("snapshotter")}
		if s := e.str("platform"); s != "" {
			var err error
			if p.Platform, err = platforms.Parse(s); err != nil {
				w.fail([]string{"runtime_platforms", name, "platform"}, "%q is not a platform, write one as \"linux/amd64\"", s)
			}
		}
		out[name] = p
	}
	return out
}

func (w *walker) registry(v values) Registry {
	out := Registry{
		Mirrors:     map[string][]*url.URL{},
		Credentials: w.credentials(v),
		Headers:     http.Header{},
	}
	for name, lines := range v.table("headers") {
		out.Headers[http.CanonicalHeaderKey(name)], _ = lines.([]string)
	}
	for _, host := range v.table("mirrors").names() {
		out.Mirrors[host] = w.endpoints(host, v.table("mirrors").entry(host).list("endpoint"))
	}
	path := v.str("config_path")
	if path == "" && len(out.Mirrors) == 0 {
		path = defaultCertsDirs
	}
	if path != "" && len(out.Mirrors) > 0 {
		w.fail([]string{"registry", "mirrors"}, "cannot be used together with config_path; put the mirrors into the hosts.toml of their registry")
	}
	out.ConfigPaths = slices.DeleteFunc(filepath.SplitList(path), func(p string) bool { return p == "" })
	for _, p := range out.ConfigPaths {
		w.absolute(p, "registry", "config_path")
	}
	return out
}

func (w *walker) endpoints(host string, list []string) []*url.URL {
	out := make([]*url.URL, 0, len(list))
	for _, s := range list {
		u, err := url.Parse(s)
		if err != nil || u.Host == "" {
			w.fail([]string{"registry", "mirrors", host, "endpoint"}, "%q is not a URL with a host, write one as \"https://host:port\"", s)
			continue
		}
		out = append(out, u)
	}
	return out
}

// credentials joins configs, by host, and auths, by URL or host, which win.
func (w *walker) credentials(v values) map[string]Credential {
	out := map[string]Credential{}
	configs := v.table("configs")
	for _, host := range configs.names() {
		if auth := configs.entry(host).table("auth"); auth != nil {
			out[host] = w.credential(auth, "registry", "configs", host, "auth")
		}
	}
	auths := v.table("auths")
	for _, endpoint := range auths.names() {
		host := endpoint
		if strings.Contains(endpoint, "://") {
			u, err := url.Parse(endpoint)
			if err != nil || u.Host == "" {
				w.fail([]string{"registry", "auths", endpoint}, "is not a URL with a host")
				continue
			}
			host = u.Host
		}
		out[host] = w.credential(auths.entry(endpoint), "registry", "auths", endpoint)
	}
	return out
}

func (w *walker) credential(v values, at ...string) Credential {
	c := Credential{Username: v.str("username"), Password: v.str("password"), IdentityToken: v.str("identitytoken")}
	if c.Username != "" {
		c.IdentityToken = ""
		return c
	}
	if c.IdentityToken != "" || v.str("auth") == "" {
		return c
	}
	plain, err := base64.StdEncoding.DecodeString(v.str("auth"))
	user, password, ok := strings.Cut(string(plain), ":")
	if err != nil || !ok {
		w.fail(append(slices.Clone(at), "auth"), "is not \"user:password\" in base64")
		return c
	}
	c.Username, c.Password = user, strings.Trim(password, "\x00")
	return c
}
