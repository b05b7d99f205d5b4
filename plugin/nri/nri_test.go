package nri

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/record"
)

func newPlugins(t *testing.T, cfg config.NRI) *Plugins {
	t.Helper()
	p, err := New(Options{
		Config: cfg, Version: "v1", Index: Index{Sandboxes: func() []record.Sandbox { return nil }, Containers: func() []record.Container { return nil }},
		Inject: func(s *specs.Spec, names []string) error {
			if slices.Contains(names, "v.test/c=missing") {
				return errdefs.ErrNotFound
			}
			s.Process.Env = append(s.Process.Env, "CDI="+strings.Join(names, ","))
			return nil
		},
		Check: func(s *specs.Spec) { s.Linux.Resources.HugepageLimits = nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestResources: what the CRI says comes back as it was, and a zero stays no
// value.
func TestResources(t *testing.T) {
	for _, r := range []*cri.LinuxContainerResources{
		{},
		{CpuShares: 2},
		{CpuQuota: -1, CpuPeriod: 1000, CpusetCpus: "0-1", CpusetMems: "0", MemoryLimitInBytes: 1 << 30},
		{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}, Unified: map[string]string{"memory.high": "1"}},
		{OomScoreAdj: 5, MemorySwapLimitInBytes: 7},
	} {
		if got := toCRI(fromCRI(r), r); !reflect.DeepEqual(got.String(), r.String()) {
			t.Errorf("%v came back as %v", r, got)
		}
	}
	if fromCRI(nil) != nil || fromCRI(&cri.LinuxContainerResources{}).GetCpu().GetShares() != nil {
		t.Error("no value became one")
	}
}

// TestAdjust: the pieces of a specification, and those that are not there yet.
func TestAdjust(t *testing.T) {
	p := newPlugins(t, config.NRI{Disable: true})
	adjust := func(s *specs.Spec, change func(*api.ContainerAdjustment)) (*specs.Spec, error) {
		t.Helper()
		spec, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		a := &api.ContainerAdjustment{}
		change(a)
		b, err := p.adjust(spec, a)
		if err != nil {
			return nil, err
		}
		out := &specs.Spec{}
		if err := json.Unmarshal(b, out); err != nil {
			t.Fatal(err)
		}
		return out, nil
	}
	out, err := adjust(&specs.Spec{}, func(a *api.ContainerAdjustment) {
		a.AddAnnotation("a", "1")
		a.AddEnv("E", "1")
		a.AddDevice(&api.LinuxDevice{Path: "/dev/x", Type: "c", Major: 1, Minor: 3})
		a.AddMount(&api.Mount{Destination: "/m", Type: "tmpfs", Source: "tmpfs"})
		a.AddHooks(&api.Hooks{Prestart: []*api.Hook{{Path: "/p"}}, Poststart: []*api.Hook{{Path: "/q"}}, Poststop: []*api.Hook{{Path: "/r"}}})
		a.AddOrReplaceNamespace(&api.LinuxNamespace{Type: "network", Path: "/n"})
		a.SetLinuxSysctl("net.x", "1")
		a.SetLinuxCPUQuota(5)
		a.SetLinuxCPUPeriod(6)
		a.SetLinuxMemoryLimit(7)
		a.AddLinuxHugepageLimit("2MB", 8)
		a.AddLinuxUnified("memory.high", "9")
		a.SetLinuxCgroupsPath("/c")
		a.AddCDIDevice(&api.CDIDevice{Name: "v.test/c=d"})
	})
	if err != nil {
		t.Fatal(err)
	}
	if out.Annotations["a"] != "1" || !slices.Equal(out.Process.Env, []string{"E=1", "CDI=v.test/c=d"}) || out.Linux.CgroupsPath != "/c" ||
		len(out.Mounts) != 1 || out.Hooks.Prestart[0].Path != "/p" || out.Hooks.Poststart[0].Path != "/q" || out.Hooks.Poststop[0].Path != "/r" ||
		out.Linux.Namespaces[0].Path != "/n" || out.Linux.Sysctl["net.x"] != "1" || len(out.Linux.Devices) != 1 || len(out.Linux.Resources.Devices) != 1 {
		t.Errorf("got %+v, %+v, %+v", out, out.Process, out.Linux)
	}
	r := out.Linux.Resources
	if *r.CPU.Quota != 5 || *r.CPU.Period != 6 || *r.Memory.Limit != 7 || r.HugepageLimits != nil || r.Unified["memory.high"] != "9" {
		t.Errorf("resources are %+v", r)
	}
	if out, err = adjust(out, func(a *api.ContainerAdjustment) { a.SetLinuxCPUQuota(-1) }); err != nil || out.Linux.Resources.CPU.Quota != nil || *out.Linux.Resources.CPU.Period != 6 {
		t.Errorf("without a quota: %+v, %v", out.Linux.Resources.CPU, err)
	}
	full := &specs.Spec{
		Annotations: map[string]string{"a": "1", "b": "1"}, Process: &specs.Process{Env: []string{"E=1", "F=1"}, Args: []string{"old"}},
		Mounts: []specs.Mount{{Destination: "/m"}, {Destination: "/k"}},
		Linux: &specs.Linux{Sysctl: map[string]string{"x": "1"}, Devices: []specs.LinuxDevice{{Path: "/dev/x"}, {Path: "/dev/y"}},
			Namespaces: []specs.LinuxNamespace{{Type: specs.UTSNamespace}, {Type: specs.IPCNamespace}}},
	}
	out, err = adjust(full, func(a *api.ContainerAdjustment) {
		a.RemoveAnnotation("a")
		a.RemoveEnv("E")
		a.AddEnv("F", "2")
		a.RemoveMount("/m")
		a.RemoveDevice("/dev/x")
		a.RemoveNamespace(&api.LinuxNamespace{Type: "uts"})
		a.SetArgs([]string{"new"})
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out.Annotations) != 1 || !slices.Equal(out.Process.Env, []string{"F=2"}) || out.Process.Args[0] != "new" || len(out.Mounts) != 1 ||
		out.Mounts[0].Destination != "/k" || len(out.Linux.Devices) != 1 || out.Linux.Devices[0].Path != "/dev/y" || len(out.Linux.Namespaces) != 1 {
		t.Errorf("got %+v, %+v, %+v", out, out.Process, out.Linux)
	}
	for word, change := range map[string]func(*api.ContainerAdjustment){
		"fast":      func(a *api.ContainerAdjustment) { a.SetLinuxBlockIOClass("fast") },
		"nowhere":   func(a *api.ContainerAdjustment) { a.AddOrReplaceNamespace(&api.LinuxNamespace{Type: "nowhere"}) },
		"not found": func(a *api.ContainerAdjustment) { a.AddCDIDevice(&api.CDIDevice{Name: "v.test/c=missing"}) },
	} {
		if _, err := adjust(&specs.Spec{}, change); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", word, err)
		}
	}
	if _, err := p.adjust([]byte("{"), &api.ContainerAdjustment{}); !errdefs.IsInternal(err) {
		t.Errorf("an unreadable specification: %v", err)
	}
}

// TestRequired: a plugin that failed meanwhile is missing, as one that was never
// there, unless the pod does without.
func TestRequired(t *testing.T) {
	p := newPlugins(t, config.NRI{Disable: true, Validator: config.NRIValidator{Enable: true, RequiredPlugins: []string{"a", "20-b"}, TolerateMissingAnnotation: "without"}})
	begun := time.Now()
	pod := func(annotations map[string]string) *api.PodSandbox { return &api.PodSandbox{Annotations: annotations} }
	ctr := &api.Container{Name: "c"}
	create := api.Event_CREATE_CONTAINER.PrettyName()
	p.metrics.RecordPluginInvocation("10-a", "StartContainer", os.ErrDeadlineExceeded)
	p.metrics.RecordPluginInvocation("20-b", create, nil)
	p.metrics.RecordPluginInvocation("30-c", create, os.ErrDeadlineExceeded)
	if err := p.required(pod(nil), ctr, begun); err != nil {
		t.Errorf("nothing that is required failed: %v", err)
	}
	if err := p.required(pod(map[string]string{"required-plugins.noderesource.dev": "[c]"}), ctr, begun); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("required by the pod: %v", err)
	}
	if err := p.required(pod(map[string]string{"required-plugins.noderesource.dev": "{"}), ctr, begun); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an annotation that is no list: %v", err)
	}
	p.metrics.RecordPluginInvocation("10-a", create, os.ErrDeadlineExceeded)
	if err := p.required(pod(nil), ctr, begun); err == nil || !strings.Contains(err.Error(), `"a"`) {
		t.Errorf("a required plugin failed: %v", err)
	}
	if err := p.required(pod(nil), ctr, time.Now()); err != nil {
		t.Errorf("it failed for another container: %v", err)
	}
	if err := p.required(pod(map[string]string{"without/container.c": "true"}), ctr, begun); err != nil {
		t.Errorf("a container that does without: %v", err)
	}
}

// TestNone: without NRI everything succeeds and nothing is changed.
func TestNone(t *testing.T) {
	p := newPlugins(t, config.NRI{Disable: true})
	ctx, c := context.Background(), record.Container{Spec: []byte("{")}
	if err := errors.Join(p.Start(nil), p.TellPod(ctx, facts.PodRun, record.Sandbox{}), p.TellContainer(ctx, facts.ContainerStart, record.Sandbox{}, c),
		p.UpdatePod(ctx, record.Sandbox{}, nil, nil), p.Close()); err != nil {
		t.Error(err)
	}
	p.Hold()()
	if spec, err := p.CreateContainer(ctx, record.Sandbox{}, c); err != nil || string(spec) != "{" {
		t.Errorf("the specification is %q, %v", spec, err)
	}
	asked := &cri.LinuxContainerResources{CpuShares: 3}
	if got, err := p.UpdateContainer(ctx, record.Sandbox{}, c, facts.Update{Resources: asked}); err != nil || got != asked {
		t.Errorf("resources are %v, %v", got, err)
	}
	if _, err := p.ready(); !errdefs.IsUnavailable(err) {
		t.Errorf("before the start: %v", err)
	}
}
