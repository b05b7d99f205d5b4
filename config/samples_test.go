package config

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// parsed is a whole file as the plugins see it.
type parsed struct {
	images   Images
	runtime  Runtime
	server   Server
	warnings []Warning
}

// parseFile loads a file with containerd's loader, decodes it over the
// registered defaults as containerd does, and parses the result.
func parseFile(t *testing.T, path string) (parsed, error) {
	t.Helper()
	cfg, err := loadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return parseConfig(t, cfg)
}

func parseConfig(t *testing.T, cfg *srvconfig.Config) (parsed, error) {
	t.Helper()
	decode := func(plugin string, raw *Raw) Raw {
		out, err := cfg.Decode(context.Background(), plugin, raw)
		if err != nil {
			t.Fatalf("decode %s: %v", plugin, err)
		}
		return *out.(*Raw)
	}
	var p parsed
	var w []Warning
	var err error
	if p.images, p.warnings, err = ParseImages(decode(ImagesPlugin, DefaultImages())); err != nil {
		return p, err
	}
	if p.runtime, w, err = ParseRuntime(decode(RuntimePlugin, DefaultRuntime())); err != nil {
		return p, err
	}
	p.warnings = append(p.warnings, w...)
	p.server, w, err = ParseServer(decode(ServerPlugin, DefaultServer()))
	p.warnings = append(p.warnings, w...)
	return p, err
}

const (
	inImages  = "plugins.'io.containerd.cri.v1.images'."
	inRuntime = "plugins.'io.containerd.cri.v1.runtime'."
)

func TestSamples(t *testing.T) {
	certs := []string{"/etc/containerd/certs.d", "/etc/docker/certs.d"}
	for _, tc := range []struct {
		file     string
		warnings []string
		check    func(t *testing.T, p parsed)
	}{
		{
			file:     "containerd-1.7.toml",
			warnings: []string{inRuntime + "drain_exec_sync_io_timeout", inRuntime + "enable_cdi"},
			check: func(t *testing.T, p parsed) {
				equal(t, p.images.PinnedImages, map[string]string{"sandbox": "registry.k8s.io/pause:3.8"})
				equal(t, p.images.Registry.ConfigPaths, certs)
				equal(t, p.runtime.EnableUnprivilegedPorts, false)
				equal(t, p.runtime.DrainExecSyncIOTimeout, 0)
				equal(t, p.runtime.Handlers["runc"].Sandboxer, "podsandbox")
				equal(t, p.runtime.DefaultHandler, "runc")
				equal(t, len(p.runtime.Handlers), 2)
				equal(t, p.runtime.Handlers["gantry"].Implied, true)
				equal(t, p.server.StreamIdleTimeout, 4*time.Hour)
			},
		},
		{
			file:     "containerd-2.0.toml",
			warnings: []string{inRuntime + "drain_exec_sync_io_timeout"},
			check: func(t *testing.T, p parsed) {
				equal(t, p.images.PinnedImages["sandbox"], "registry.k8s.io/pause:3.10")
				equal(t, p.runtime.CNI.BinDirs, []string{"/opt/cni/bin"})
			},
		},
		{
			file:     "containerd-2.1.toml",
			warnings: []string{inRuntime + "drain_exec_sync_io_timeout"},
			check: func(t *testing.T, p parsed) {
				equal(t, p.images.PinnedImages["sandbox"], "registry.k8s.io/pause:3.10.1")
			},
		},
		{
			file:     "containerd-2.4.toml",
			warnings: []string{inRuntime + "drain_exec_sync_io_timeout"},
			check: func(t *testing.T, p parsed) {
				def, err := parseConfig(t, &srvconfig.Config{})
				if err != nil {
					t.Fatal(err)
				}
				// The defaults that are ours.
				equal(t, def.runtime.DrainExecSyncIOTimeout, 5*time.Second)
				def.runtime.DrainExecSyncIOTimeout = 0
				equal(t, def.runtime.DefaultHandler, "gantry")
				def.runtime.DefaultHandler = "runc"
				own := def.runtime.Handlers["gantry"]
				equal(t, own.Implied, false)
				own.Implied = true
				def.runtime.Handlers["gantry"] = own
				equal(t, p.images, def.images)
				equal(t, p.runtime, def.runtime)
				equal(t, p.server, def.server)
			},
		},
		{
			file: "kubeadm.toml",
			check: func(t *testing.T, p parsed) {
				equal(t, p.images.PinnedImages["sandbox"], "registry.k8s.io/pause:3.10")
				equal(t, p.runtime.Handlers["runc"].Options["SystemdCgroup"], any(true))
				equal(t, p.runtime.Handlers["runc"].Options["BinaryName"], any(""))
				equal(t, p.runtime.DrainExecSyncIOTimeout, 5*time.Second)
			},
		},
		{
			file: "k3s-v2.toml",
			warnings: []string{
				inImages + "registry.configs", inImages + "registry.mirrors",
				inImages + "registry.configs.'registry.example.com:5000'.tls.insecure_skip_verify",
			},
			check: func(t *testing.T, p parsed) {
				equal(t, p.server.StreamPort, 10010)
				equal(t, p.runtime.CNI.BinDirs, []string{"/var/lib/rancher/k3s/data/current/bin"})
				equal(t, p.runtime.Handlers["crun"].Options["BinaryName"], any("/usr/bin/crun"))
				equal(t, len(p.images.Registry.ConfigPaths), 0)
				equal(t, p.images.Registry.Credentials["registry.example.com:5000"], Credential{Username: "node", Password: "secret"})
				mirrors := p.images.Registry.Mirrors["registry.example.com:5000"]
				equal(t, len(mirrors), 2)
				equal(t, mirrors[1].String(), "http://10.0.0.9:5000/v2")
			},
		},
		{
			file: "k3s-v3.toml",
			check: func(t *testing.T, p parsed) {
				equal(t, p.runtime.EnableSELinux, true)
				equal(t, p.runtime.Handlers["nvidia"].Options["BinaryName"], any("/usr/bin/nvidia-container-runtime"))
				equal(t, p.runtime.Handlers["runhcs-wcow-process"].Options, nil)
				equal(t, p.images.Registry.ConfigPaths, []string{"/var/lib/rancher/k3s/agent/etc/containerd/certs.d"})
			},
		},
		{
			file: "eks-al2.toml",
			check: func(t *testing.T, p parsed) {
				equal(t, p.images.DiscardUnpackedLayers, true)
				equal(t, p.images.Registry.ConfigPaths, certs)
			},
		},
		{
			file: "eks-al2023.toml",
			check: func(t *testing.T, p parsed) {
				equal(t, p.images.MaxConcurrentDownloads, 10)
				equal(t, p.runtime.Handlers["runc"].BaseRuntimeSpec, "/etc/containerd/base-runtime-spec.json")
				equal(t, p.runtime.Handlers["runc"].Options["BinaryName"], any("/usr/sbin/runc"))
			},
		},
		{
			file:     "gke.toml",
			warnings: []string{inImages + "registry.mirrors"},
			check: func(t *testing.T, p parsed) {
				equal(t, p.runtime.MaxLogLine, 262144)
				equal(t, p.runtime.CNI.BinDirs, []string{"/home/kubernetes/bin"})
				equal(t, p.runtime.CNI.ConfTemplate, "/home/containerd/cni.template")
				equal(t, p.runtime.Handlers["gvisor"].PodAnnotations, []string{"dev.gvisor.*"})
				equal(t, p.runtime.Handlers["gvisor"].Options, map[string]any{
					"TypeUrl": "io.containerd.runsc.v1.options", "ConfigPath": "/run/containerd/runsc/config.toml",
				})
			},
		},
		{
			file: "kind.toml",
			check: func(t *testing.T, p parsed) {
				equal(t, p.runtime.Handlers["test-handler"].BaseRuntimeSpec, "/etc/containerd/cri-base.json")
				equal(t, p.runtime.TolerateMissingHugetlbController, true)
			},
		},
		{
			file: "nvidia/config.toml",
			check: func(t *testing.T, p parsed) {
				equal(t, p.runtime.DefaultHandler, "nvidia")
				equal(t, p.runtime.Handlers["runc"].Options["SystemdCgroup"], any(true))
				equal(t, p.runtime.Handlers["nvidia"].Options, map[string]any{
					"BinaryName": "/usr/bin/nvidia-container-runtime", "SystemdCgroup": true,
				})
			},
		},
		{
			file: "containerd-1.2.toml",
			warnings: []string{
				inImages + "registry.auths", inImages + "registry.mirrors",
				inRuntime + "systemd_cgroup", inRuntime + "containerd.no_pivot",
				inRuntime + "containerd.default_runtime", inRuntime + "containerd.default_runtime.runtime_engine",
				inRuntime + "containerd.untrusted_workload_runtime",
				inRuntime + "containerd.untrusted_workload_runtime.runtime_engine",
				inRuntime + "containerd.untrusted_workload_runtime.runtime_root",
				inRuntime + "containerd.runtimes.default.runtime_type",
				inRuntime + "containerd.runtimes.untrusted.runtime_type",
			},
			check: func(t *testing.T, p parsed) {
				equal(t, p.server.StreamAddress, "")
				equal(t, p.runtime.DefaultHandler, "default")
				equal(t, p.runtime.Handlers["untrusted"].RuntimeType, runcType)
				equal(t, p.runtime.Handlers["untrusted"].Options, map[string]any{
					"BinaryName": "/usr/local/bin/runsc", "Root": "/run/containerd/runsc", "SystemdCgroup": true, "NoPivotRoot": true,
				})
				equal(t, p.images.Registry.Credentials, map[string]Credential{"gcr.io": {Username: "node", Password: "secret"}})
			},
		},
		{file: "docker-package.toml", check: func(*testing.T, parsed) {}},
	} {
		t.Run(tc.file, func(t *testing.T) {
			p, err := parseFile(t, filepath.Join("testdata", tc.file))
			if err != nil {
				t.Fatal(err)
			}
			equal(t, keysOf(p.warnings), slices.Sorted(slices.Values(tc.warnings)))
			tc.check(t, p)

			r, err := Check(filepath.Join("testdata", tc.file))
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Errors) > 0 {
				t.Errorf("Check: %v", r.Errors)
			}
			for _, f := range r.Warnings {
				if f.File == "" || f.Line == 0 {
					t.Errorf("Check does not find %s", f.Key)
				}
			}
		})
	}
}

func keysOf(warnings []Warning) []string {
	var out []string
	for _, w := range warnings {
		out = append(out, w.Key)
	}
	slices.Sort(out)
	return out
}

func equal[T any](t *testing.T, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %#v\nwant %#v", got, want)
	}
}

// What containerd prints as its defaults is, key for key, in ours, and nothing
// else but the keys that are marked as our own.
func TestDefaultsAreContainerds(t *testing.T) {
	data, err := os.ReadFile("testdata/containerd-2.4.toml")
	if err != nil {
		t.Fatal(err)
	}
	var theirs struct{ Plugins map[string]map[string]any }
	if err := toml.Unmarshal(data, &theirs); err != nil {
		t.Fatal(err)
	}
	for plugin, ours := range map[string]*Raw{
		ImagesPlugin: DefaultImages(), RuntimePlugin: DefaultRuntime(), ServerPlugin: DefaultServer(), NRIPlugin: DefaultNRI(),
	} {
		want := theirs.Plugins[plugin]
		if plugin == RuntimePlugin {
			want["drain_exec_sync_io_timeout"] = "5s"
			want["containerd"].(map[string]any)["default_runtime_name"] = "gantry"
		}
		have := reencode(t, *ours)
		for _, k := range Keys() {
			if k.own && k.Plugin == plugin {
				remove(have, strings.Split(strings.ReplaceAll(k.Path, "*", runcHandler), "."))
			}
		}
		equal(t, have, want)
	}
}

// The printed default configuration says what the registered defaults say,
// with or without the comment signs of its examples.
func TestPrintedDefault(t *testing.T) {
	var printed struct {
		Version int
		Plugins map[string]map[string]any
	}
	if err := toml.Unmarshal(Default(), &printed); err != nil {
		t.Fatal(err)
	}
	equal(t, printed.Version, 4)
	for plugin, raw := range map[string]*Raw{
		ImagesPlugin: DefaultImages(), RuntimePlugin: DefaultRuntime(), ServerPlugin: DefaultServer(), NRIPlugin: DefaultNRI(),
	} {
		equal(t, printed.Plugins[plugin], reencode(t, *raw))
	}

	var all []string
	for line := range strings.Lines(string(Default())) {
		plain, ok := strings.CutPrefix(strings.TrimLeft(line, " "), "# ")
		if ok && (strings.HasPrefix(plain, "[plugins") || strings.Contains(plain, " = ")) {
			line = plain
		}
		all = append(all, line)
	}
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(strings.Join(all, "")), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := Check(path)
	if err != nil {
		t.Fatal(err)
	}
	// An example that is uncommented as it is says the same as the default,
	// save that a mirror without endpoint is a mirror.
	if len(r.Errors) > 0 || len(r.Warnings) > 0 {
		t.Errorf("%v\n%v", r.Errors, r.Warnings)
	}
}

// Every key is documented, or says why it is not there any more.
func TestKeysAreDocumented(t *testing.T) {
	ref := Reference()
	seen := map[string]bool{}
	for _, k := range Keys() {
		if k.State != Removed && k.Doc == "" {
			t.Errorf("%s is not documented", k.Path)
		}
		if k.State != Honoured && k.Note == "" {
			t.Errorf("%s is %s without a reason", k.Path, k.State)
		}
		if seen[k.Plugin+k.Path] {
			t.Errorf("%s is there twice", k.Path)
		}
		seen[k.Plugin+k.Path] = true
		if !bytes.Contains(ref, []byte("`"+k.Path+"`")) {
			t.Errorf("%s is not in the reference", k.Path)
		}
	}
}

func remove(table map[string]any, path []string) {
	for ; len(path) > 1; path = path[1:] {
		below, ok := table[path[0]].(map[string]any)
		if !ok {
			return // the keys of a name of choice
		}
		table = below
	}
	delete(table, path[0])
}

func reencode(t *testing.T, raw Raw) map[string]any {
	t.Helper()
	b, err := toml.Marshal(raw)
	if err != nil {
		t.Fatal(err)
	}
	var out map[string]any
	if err := toml.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestDefaultsAreCopies(t *testing.T) {
	first := *DefaultRuntime()
	set(first, "containerd.runtimes.runc.options.Root", "/elsewhere")
	first["cdi_spec_dirs"].([]string)[0] = "/elsewhere"
	if reflect.DeepEqual(first, *DefaultRuntime()) {
		t.Error("the defaults are shared")
	}
	if _, _, err := ParseRuntime(Raw{"stats_collect_period": int64(1)}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a wrong type is %v, want InvalidArgument", err)
	}
}
