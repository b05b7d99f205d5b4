package handler

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	apitypes "github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	_ "github.com/containerd/containerd/v2/core/runtime" // registers the type of features
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/record"
)

// runtimes is a machine with these runtimes installed: what each answers.
type runtimes struct {
	answers map[string]*apitypes.RuntimeInfo
	asked   atomic.Int32
	// hold, if not nil, is received from before an answer is given.
	hold chan struct{}

	mu      sync.Mutex
	options map[string]typeurl.Any
}

func (r *runtimes) Info(ctx context.Context, runtime string, options typeurl.Any) (*apitypes.RuntimeInfo, error) {
	r.asked.Add(1)
	if r.hold != nil {
		select {
		case <-r.hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.options == nil {
		r.options = map[string]typeurl.Any{}
	}
	r.options[runtime] = options
	info, ok := r.answers[runtime]
	if !ok {
		return nil, os.ErrNotExist
	}
	return info, nil
}

func tells(t *testing.T, f features.Features) *apitypes.RuntimeInfo {
	t.Helper()
	a, err := typeurl.MarshalAnyToProto(&f)
	if err != nil {
		t.Fatal(err)
	}
	return &apitypes.RuntimeInfo{Name: "fake", Features: a}
}

func modern(t *testing.T) *apitypes.RuntimeInfo {
	yes := true
	return tells(t, features.Features{
		OCIVersionMax: "1.2.0",
		MountOptions:  []string{"ro", "rro"},
		Linux: &features.Linux{
			Namespaces:      []string{"mount", "user"},
			MountExtensions: &features.MountExtensions{IDMap: &features.IDMap{Enabled: &yes}},
			Seccomp:         &features.Seccomp{Actions: []string{"SCMP_ACT_ERRNO", "SCMP_ACT_NOTIFY"}},
		},
	})
}

// parse returns the handlers that are configured, of which runc is the default.
func parse(t *testing.T, text map[string]any) config.Runtime {
	t.Helper()
	cfg, _, err := config.ParseRuntime(text)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.DefaultHandler == "gantry" {
		cfg.DefaultHandler = "runc"
		delete(cfg.Handlers, "gantry")
	}
	return cfg
}

func withRuntimes(h map[string]any) map[string]any {
	return map[string]any{"containerd": map[string]any{"runtimes": h}}
}

func noObstacle(string) error { return nil }

func mustBuild(t *testing.T, cfg config.Runtime, p Prober) *Handlers {
	t.Helper()
	hs, err := build(cfg, p, noObstacle, true)
	if err != nil {
		t.Fatal(err)
	}
	return hs
}

func TestLookup(t *testing.T) {
	hs := mustBuild(t, parse(t, withRuntimes(map[string]any{
		"kata": map[string]any{
			"runtime_type": "io.containerd.kata.v2", "runtime_path": "/opt/kata/shim", "sandboxer": "shim",
			"snapshotter": "devmapper", "cni_conf_dir": "/etc/cni/kata", "cni_max_conf_num": int64(2),
			"privileged_without_host_devices":                     true,
			"privileged_without_host_devices_all_devices_allowed": true,
			"cgroup_writable":                                     true,
			"pod_annotations":                                     []any{"a.*"}, "container_annotations": []any{"b"},
		},
	})), &runtimes{})
	for _, name := range []string{"", "runc"} {
		h, err := hs.Lookup(name)
		if err != nil || h.Name != "runc" || h.Runtime != "io.containerd.runc.v2" || h.Sandboxer != record.SandboxerPod {
			t.Errorf("Lookup(%q) = %+v, %v", name, h, err)
		}
	}
	want := Handler{
		Handler: record.Handler{
			Name: "kata", Runtime: "/opt/kata/shim", Sandboxer: record.SandboxerShim, Snapshotter: "devmapper",
		},
		PodAnnotations: []string{"a.*"}, ContainerAnnotations: []string{"b"},
		PrivilegedWithoutHostDevices: true, PrivilegedWithoutHostDevicesAllDevicesAllowed: true,
		CgroupWritable: true, CNIConfDir: "/etc/cni/kata", CNIMaxConfNum: 2, IOType: config.IOFIFO, SELinuxKVM: true,
	}
	got, err := hs.Resolve(context.Background(), "kata")
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v, %v\nwant %+v", got, err, want)
	}

	if got, ok := hs.Get("kata"); !ok || !reflect.DeepEqual(got, want) {
		t.Errorf("Get has %+v, %v", got, ok)
	}
	if got, ok := hs.Get(""); ok {
		t.Errorf("Get has %+v for no name", got)
	}

	_, err = hs.Lookup("gvisor")
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"gvisor" is not configured; configured: kata, runc`) {
		t.Errorf("got %v", err)
	}
	if _, err = hs.Resolve(context.Background(), "gvisor"); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}

func TestOptions(t *testing.T) {
	for name, tc := range map[string]struct {
		handler map[string]any
		want    proto.Message
		systemd bool
	}{
		"runc": {
			map[string]any{"runtime_type": "io.containerd.runc.v2", "options": map[string]any{
				"BinaryName": "crun", "systemdcgroup": true, "IoUid": int64(7), "NoPivotRoot": true, "CriuPath": "/x",
			}},
			&runcoptions.Options{BinaryName: "crun", SystemdCgroup: true, IoUid: 7, NoPivotRoot: true}, true,
		},
		"no options": {map[string]any{"runtime_type": "io.containerd.kata.v2"}, nil, false},
		"file": {
			map[string]any{"runtime_type": "io.containerd.runsc.v1", "options": map[string]any{
				"TypeUrl": "runsc.options", "configpath": "/etc/runsc.toml", "SystemdCgroup": true,
			}},
			&runtimeoptions.Options{TypeUrl: "runsc.options", ConfigPath: "/etc/runsc.toml"}, false,
		},
		"table": {
			map[string]any{"runtime_type": "io.containerd.other.v1", "options": map[string]any{"b": int64(1), "a": "x"}},
			&runtimeoptions.Options{ConfigBody: []byte("a = 'x'\nb = 1\n")}, false,
		},
		"empty table": {
			map[string]any{"runtime_type": "io.containerd.other.v1", "options": map[string]any{}},
			&runtimeoptions.Options{}, false,
		},
	} {
		t.Run(name, func(t *testing.T) {
			fake := &runtimes{}
			hs := mustBuild(t, parse(t, withRuntimes(map[string]any{"x": tc.handler})), fake)
			h, err := hs.Resolve(context.Background(), "x")
			if err != nil {
				t.Fatal(err)
			}
			if h.SystemdCgroup != tc.systemd {
				t.Errorf("SystemdCgroup = %v", h.SystemdCgroup)
			}
			asked := fake.options[tc.handler["runtime_type"].(string)]
			if tc.want == nil {
				if h.OptionsType != "" || h.Options != nil || asked != nil {
					t.Errorf("got options %q, asked with %v", h.OptionsType, asked)
				}
				return
			}
			got, err := typeurl.UnmarshalAny(&anypb.Any{TypeUrl: h.OptionsType, Value: h.Options})
			if err != nil || !proto.Equal(got.(proto.Message), tc.want) {
				t.Errorf("got  %v, %v\nwant %v", got, err, tc.want)
			}
			if asked.GetTypeUrl() != h.OptionsType || !bytes.Equal(asked.GetValue(), h.Options) {
				t.Errorf("asked with other options: %v", asked)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change func(*config.Runtime)
		class  func(error) bool
		says   string
	}{
		"no default":   {func(r *config.Runtime) { r.DefaultHandler = "gone" }, errdefs.IsNotFound, `"gone"`},
		"spec missing": {with(func(h *config.Handler) { h.BaseRuntimeSpec = dir + "/gone" }), errdefs.IsNotFound, "base_runtime_spec"},
		"spec garbage": {with(func(h *config.Handler) { h.BaseRuntimeSpec = file("a", "{") }), errdefs.IsInvalidArgument, "base_runtime_spec"},
		"spec twice":   {with(func(h *config.Handler) { h.BaseRuntimeSpec = file("b", "{} {}") }), errdefs.IsInvalidArgument, "base_runtime_spec"},
		"spec null":    {with(func(h *config.Handler) { h.BaseRuntimeSpec = file("c", "null") }), errdefs.IsInvalidArgument, "no specification"},
		"spec pipe":    {with(func(h *config.Handler) { h.BaseRuntimeSpec = pipe }), errdefs.IsInvalidArgument, "not a file"},
		"spec long": {with(func(h *config.Handler) { h.BaseRuntimeSpec = file("d", strings.Repeat(" ", maxSpec)+"{}") }),
			errdefs.IsInvalidArgument, "more than"},
		"option unknown": {with(func(h *config.Handler) { h.Options = map[string]any{"Nope": 1} }), errdefs.IsInvalidArgument, "Nope"},
		"option type":    {with(func(h *config.Handler) { h.Options = map[string]any{"Root": 1} }), errdefs.IsInvalidArgument, "options"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := parse(t, nil)
			tc.change(&cfg)
			_, err := build(cfg, &runtimes{}, noObstacle, true)
			if !tc.class(err) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v", err)
			}
		})
	}
	cfg := parse(t, nil)
	with(func(h *config.Handler) { h.CgroupWritable = true })(&cfg)
	if _, err := build(cfg, &runtimes{}, noObstacle, false); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("cgroup_writable without cgroup v2: %v", err)
	}
}

func with(change func(*config.Handler)) func(*config.Runtime) {
	return func(r *config.Runtime) {
		h := r.Handlers["runc"]
		change(&h)
		r.Handlers["runc"] = h
	}
}

func TestBaseSpecIsReadOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "spec.json")
	if err := os.WriteFile(path, []byte(`{"ociVersion":"1.1.0","hostname":"base","newer":{}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	h := map[string]any{"runtime_type": "io.containerd.runc.v2", "base_runtime_spec": path}
	hs := mustBuild(t, parse(t, withRuntimes(map[string]any{"a": h, "b": h})), &runtimes{})
	list := hs.List()
	a, b := list[1], list[2]
	if a.BaseSpec == nil || a.BaseSpec.Hostname != "base" || a.BaseSpec != b.BaseSpec {
		t.Errorf("got %v and %v", a.BaseSpec, b.BaseSpec)
	}
}

func TestFeatures(t *testing.T) {
	kata := map[string]any{"runtime_type": "kata"}
	quiet := map[string]any{"runtime_type": "quiet"}
	gone := map[string]any{"runtime_type": "gone"}
	fake := &runtimes{answers: map[string]*apitypes.RuntimeInfo{
		"io.containerd.runc.v2": modern(t),
		"kata":                  tells(t, features.Features{OCIVersionMax: "1.0.2", Annotations: map[string]string{runcVersion: "1.2.5-0ubuntu1"}}),
		"quiet":                 {Name: "quiet"},
	}}
	hs := mustBuild(t, parse(t, withRuntimes(map[string]any{"kata": kata, "quiet": quiet, "gone": gone})), fake)

	for _, h := range hs.List() {
		if h.Features != (Features{}) || hs.ProbeError(h.Name) != nil {
			t.Errorf("%q has features before anybody asked", h.Name)
		}
	}
	if fake.asked.Load() != 0 {
		t.Error("New asked a runtime")
	}
	if err := hs.Probe(context.Background()); err != nil {
		t.Fatal(err)
	}
	full := Features{Known: true, RecursiveReadOnlyMounts: kernelRRO(), UserNamespaces: true, IDMapMounts: true, SeccompNotify: true, OCIVersionMax: "1.2.0"}
	want := map[string]Features{"": full, "runc": full, "kata": {Known: true, OCIVersionMax: "1.0.2", RuncVersion: "1.2.5-0ubuntu1"}, "quiet": {}, "gone": {}}
	var names []string
	for _, h := range hs.List() {
		names = append(names, h.Name)
		if h.Features != want[h.Name] {
			t.Errorf("%q has %+v, want %+v", h.Name, h.Features, want[h.Name])
		}
	}
	if !slices.Equal(names, []string{"", "gone", "kata", "quiet", "runc"}) {
		t.Errorf("listed as %q", names)
	}
	if hs.Default().Features != full || hs.Default().Name != "runc" {
		t.Errorf("default is %+v", hs.Default())
	}
	if err := hs.ProbeError("gone"); !errors.Is(err, os.ErrNotExist) || len(hs.Problems()) != 1 {
		t.Errorf("got %v, %v", err, hs.Problems())
	}
	if hs.ProbeError("") != nil || hs.ProbeError("quiet") != nil {
		t.Error("a runtime that answered has an error")
	}
	weak := hs.Weaknesses()
	if len(weak) != 1 || len(weak["kata"]) != 2 || !strings.Contains(weak["kata"][0], "CVE-2025-31133") || !strings.Contains(weak["kata"][0], "unless the distribution") {
		t.Errorf("weaknesses are %q", weak)
	}
	for _, r := range hs.CRI() {
		f := want[r.Name]
		if r.Features.GetUserNamespaces() != f.UserNamespaces || r.Features.GetRecursiveReadOnlyMounts() != f.RecursiveReadOnlyMounts ||
			(r.Features == nil) == f.Known {
			t.Errorf("CRI has %v", r)
		}
	}

	// A failure is no error of a pod, and is asked about again by Probe alone.
	asked := fake.asked.Load()
	if _, err := hs.Resolve(context.Background(), "gone"); err != nil || fake.asked.Load() != asked {
		t.Errorf("got %v after %d questions, want nil after %d", err, fake.asked.Load(), asked)
	}
	fake.answers["gone"] = modern(t)
	if err := hs.Probe(context.Background()); err != nil || fake.asked.Load() != asked+1 {
		t.Errorf("got %v after %d questions, want nil after %d", err, fake.asked.Load(), asked+1)
	}
	if h, err := hs.Resolve(context.Background(), "gone"); err != nil || h.Features != full || len(hs.Problems()) != 0 {
		t.Errorf("got %+v, %v, %v", h, err, hs.Problems())
	}
}

// The handler that is there without being asked for is asked when a pod has it, and
// before that is no problem of the node.
func TestImpliedIsNotProbed(t *testing.T) {
	fake := &runtimes{answers: map[string]*apitypes.RuntimeInfo{"io.containerd.runc.v2": modern(t)}}
	cfg, _, err := config.ParseRuntime(map[string]any{"containerd": map[string]any{
		"default_runtime_name": "runc", "runtimes": map[string]any{"runc": map[string]any{"runtime_type": "io.containerd.runc.v2"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	hs := mustBuild(t, cfg, fake)
	if err := hs.Probe(context.Background()); err != nil || fake.asked.Load() != 1 || len(hs.Problems()) != 0 {
		t.Errorf("%v, asked %d times, problems %v", err, fake.asked.Load(), hs.Problems())
	}
	if _, err := hs.Resolve(context.Background(), "gantry"); err != nil || fake.asked.Load() != 2 {
		t.Errorf("%v, asked %d times", err, fake.asked.Load())
	}
}

// Callers share one question; one that leaves gets its own end, and the answer
// is there for the next.
func TestResolveJoins(t *testing.T) {
	fake := &runtimes{answers: map[string]*apitypes.RuntimeInfo{"io.containerd.runc.v2": modern(t)}, hold: make(chan struct{})}
	hs := mustBuild(t, parse(t, nil), fake)

	gone, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("left"))
	if _, err := hs.Resolve(gone, ""); err == nil || !strings.Contains(err.Error(), "left") {
		t.Errorf("got %v", err)
	}
	if _, err := hs.Lookup(""); err != nil {
		t.Errorf("Lookup waits for a probe: %v", err)
	}
	results := make(chan Handler)
	for range 8 {
		go func() {
			h, err := hs.Resolve(context.Background(), "runc")
			if err != nil {
				t.Error(err)
			}
			results <- h
		}()
	}
	close(fake.hold)
	for range 8 {
		if h := <-results; !h.Features.UserNamespaces {
			t.Errorf("got %+v", h.Features)
		}
	}
	hs.probes.Wait()
	if n := fake.asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// What keeps pods from having user namespaces is in the features, and said when
// a pod asks for one.
func TestAdmitUserNS(t *testing.T) {
	ctx := context.Background()
	noRemap := errors.New("the snapshotter cannot")
	cfg := parse(t, withRuntimes(map[string]any{
		"old":  map[string]any{"runtime_type": "old"},
		"gone": map[string]any{"runtime_type": "gone"},
		"copy": map[string]any{"runtime_type": "io.containerd.runc.v2", "snapshotter": "native"},
	}))
	fake := &runtimes{answers: map[string]*apitypes.RuntimeInfo{
		"io.containerd.runc.v2": modern(t),
		"old":                   tells(t, features.Features{OCIVersionMax: "1.0.2"}),
	}}
	hs, err := build(cfg, fake, func(snapshotter string) error {
		if snapshotter == "native" {
			return noRemap
		}
		return nil
	}, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := hs.AdmitUserNS(ctx, ""); err != nil {
		t.Error(err)
	}
	for name, want := range map[string]string{"old": "does not offer", "gone": os.ErrNotExist.Error(), "copy": noRemap.Error()} {
		err := hs.AdmitUserNS(ctx, name)
		class := errdefs.IsFailedPrecondition
		if name == "gone" {
			class = errdefs.IsUnavailable
		}
		if !class(err) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
		if h, _ := hs.Get(name); h.Features.UserNamespaces {
			t.Errorf("%s has the feature", name)
		}
	}
	fake.answers["gone"] = modern(t)
	if err := hs.AdmitUserNS(ctx, "gone"); err != nil {
		t.Errorf("a runtime that answers when asked again: %v", err)
	}
	if err := hs.AdmitUserNS(ctx, "bogus"); !errdefs.IsNotFound(err) {
		t.Errorf("bogus: %v", err)
	}
}

func TestWithIOOwner(t *testing.T) {
	opts, err := proto.Marshal(&runcoptions.Options{Root: "/r", SystemdCgroup: true})
	if err != nil {
		t.Fatal(err)
	}
	in := record.Handler{Name: "runc", OptionsType: "containerd.runc.v1.Options", Options: opts}
	out, err := WithIOOwner(in, 100000, 200000)
	if err != nil {
		t.Fatal(err)
	}
	var got runcoptions.Options
	if err := proto.Unmarshal(out.Options, &got); err != nil || got.IoUid != 100000 || got.IoGid != 200000 || got.Root != "/r" || !got.SystemdCgroup {
		t.Errorf("got %v, %v", &got, err)
	}
	other := record.Handler{Name: "kata", OptionsType: "other", Options: []byte("x")}
	if out, err := WithIOOwner(other, 1, 1); err != nil || !reflect.DeepEqual(out, other) {
		t.Errorf("another runtime's: %+v, %v", out, err)
	}
	in.Options = []byte{0xff}
	if _, err := WithIOOwner(in, 1, 1); !errdefs.IsInternal(err) {
		t.Errorf("damaged: %v", err)
	}
}

type panicking struct{}

func (panicking) Info(context.Context, string, typeurl.Any) (*apitypes.RuntimeInfo, error) {
	panic("broken")
}

func TestProbePanics(t *testing.T) {
	hs := mustBuild(t, parse(t, nil), panicking{})
	if _, err := hs.Resolve(context.Background(), ""); err != nil {
		t.Fatal(err)
	}
	if err := hs.ProbeError(""); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("got %v", err)
	}
}

func TestCgroupDriver(t *testing.T) {
	runc := func(systemd bool) map[string]any {
		return map[string]any{"runtime_type": "io.containerd.runc.v2", "options": map[string]any{"SystemdCgroup": systemd}}
	}
	for name, tc := range map[string]struct {
		runtimes map[string]any
		def      string
		booted   bool
		want     cri.CgroupDriver
	}{
		"default says yes":      {map[string]any{"runc": runc(true)}, "runc", false, cri.CgroupDriver_SYSTEMD},
		"default says no":       {map[string]any{"a": runc(true)}, "runc", true, cri.CgroupDriver_CGROUPFS},
		"default has no option": {map[string]any{"kata": map[string]any{"runtime_type": "k"}, "runc": runc(true)}, "kata", false, cri.CgroupDriver_SYSTEMD},
		"nobody has":            {map[string]any{"runc": map[string]any{"runtime_type": "k"}}, "runc", true, cri.CgroupDriver_SYSTEMD},
		"nobody has, no systemd": {map[string]any{"runc": map[string]any{"runtime_type": "k"}}, "runc", false,
			cri.CgroupDriver_CGROUPFS},
	} {
		t.Run(name, func(t *testing.T) {
			raw := withRuntimes(tc.runtimes)
			raw["containerd"].(map[string]any)["default_runtime_name"] = tc.def
			hs := mustBuild(t, parse(t, raw), &runtimes{})
			hs.booted = func() bool { return tc.booted }
			if got := hs.CgroupDriver(); got != tc.want {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}

func TestFeaturesURL(t *testing.T) {
	if url, err := typeurl.TypeURL(&features.Features{}); err != nil || url != featuresURL {
		t.Errorf("shims send %q, %v", url, err)
	}
}

type introspector struct{ answer any }

func (i introspector) PluginInfo(_ context.Context, request any) (any, error) {
	r := request.(*apitypes.RuntimeRequest)
	if r.RuntimePath != "/shim" || (r.Options.GetTypeUrl() != "t" && r.Options != nil) {
		return nil, errdefs.ErrInvalidArgument
	}
	return i.answer, nil
}

func TestProber(t *testing.T) {
	ctx := context.Background()
	info := &apitypes.RuntimeInfo{Name: "x"}
	for _, options := range []typeurl.Any{nil, &anypb.Any{TypeUrl: "t"}} {
		if got, err := NewProber(introspector{info}).Info(ctx, "/shim", options); err != nil || got != info {
			t.Errorf("got %v, %v", got, err)
		}
	}
	if _, err := NewProber(introspector{"text"}).Info(ctx, "/shim", nil); err == nil {
		t.Error("an answer of another type was accepted")
	}
	if _, err := NewProber(introspector{info}).Info(ctx, "/other", nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
}

// FuzzFeatures feeds the reader of a runtime's answer.
func FuzzFeatures(f *testing.F) {
	f.Add([]byte(`{"ociVersionMax":"1.2.0","mountOptions":["rro"],"linux":{"namespaces":["user"],"mountExtensions":{"idmap":{"enabled":true}}}}`))
	f.Add([]byte(`{"linux":{"mountExtensions":{"idmap":{}}}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := parseFeatures(&apitypes.RuntimeInfo{Features: &anypb.Any{TypeUrl: featuresURL, Value: data}}, false)
		if err == nil != got.Known || got.RecursiveReadOnlyMounts || got.UserNamespaces && !got.IDMapMounts {
			t.Errorf("got %+v, %v", got, err)
		}
	})
}

// FuzzSpec feeds the reader of base specifications.
func FuzzSpec(f *testing.F) {
	f.Add([]byte(`{"ociVersion":"1.1.0","process":{"args":["a"]},"linux":{"namespaces":[{"type":"pid"}]}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if spec, err := parseSpec(data); (spec == nil) != (err != nil) || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("got %v, %v", spec, err)
		}
	})
}

// TestFor: the runtime of a platform stands in for the handler's own, and nothing
// else of its options changes.
func TestFor(t *testing.T) {
	hs := &Handlers{byName: map[string]Handler{"runc": {platformPaths: map[string]string{"linux/arm64": "/arm", "linux/amd64/v3": "/v3", "linux/amd64": "/amd"}}, "other": {}}}
	a, err := typeurl.MarshalAny(&runcoptions.Options{BinaryName: "/own", Root: "/root"})
	if err != nil {
		t.Fatal(err)
	}
	h := record.Handler{Name: "runc", OptionsType: a.GetTypeUrl(), Options: a.GetValue()}
	for platform, want := range map[string]string{"linux/arm64/v8": "/arm", "linux/amd64/v3": "/v3", "linux/amd64/v2": "/amd", "linux/amd64": "/amd", "linux/s390x": "/own"} {
		got, err := hs.For(h, platforms.MustParse(platform))
		var o runcoptions.Options
		if err == nil {
			err = proto.Unmarshal(got.Options, &o)
		}
		if err != nil || o.BinaryName != want || o.Root != "/root" {
			t.Errorf("%s: %+v, %v, want %s", platform, &o, err, want)
		}
	}
	h.Name = "other"
	if got, err := hs.For(h, platforms.MustParse("linux/arm64")); err != nil || !bytes.Equal(got.Options, h.Options) {
		t.Errorf("another handler: %+v, %v", got, err)
	}
}
