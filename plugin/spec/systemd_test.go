package spec

import (
	"slices"
	"testing"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

func TestMayBeSystemd(t *testing.T) {
	for command, want := range map[string]bool{
		"/sbin/init": true, "/usr/lib/systemd/systemd": true, "/init": true,
		"init": false, "/bin/sh": false, "/sbin/init.sh": false, "/usr/bin/systemd-run": false,
	} {
		if _, ok := MayBeSystemd(&cri.ContainerConfig{Command: []string{command, "--x"}}, imagespec.ImageConfig{}); ok != want {
			t.Errorf("%s: %v", command, ok)
		}
	}
	if program, ok := MayBeSystemd(&cri.ContainerConfig{}, imagespec.ImageConfig{Entrypoint: []string{"/sbin/init"}}); !ok || program != "/sbin/init" {
		t.Errorf("of the image: %q, %v", program, ok)
	}
	if _, ok := MayBeSystemd(&cri.ContainerConfig{}, imagespec.ImageConfig{}); ok {
		t.Error("no command is systemd")
	}
	for program, want := range map[string]bool{"/lib/systemd/systemd": true, "/bin/busybox": false, "": false} {
		if IsSystemd(program) != want {
			t.Errorf("%q is not %v", program, want)
		}
	}
}

func TestSystemd(t *testing.T) {
	systemd := func(in *ContainerInput) { in.Systemd = true }
	s := mustContainer(t, systemd)
	for _, dir := range []string{"/run", "/run/lock", "/tmp", "/var/log/journal"} {
		if m, ok := findMount(s, dir); !ok || m.Type != "tmpfs" || !slices.Contains(m.Options, "nosuid") {
			t.Errorf("%s: %+v", dir, m)
		}
	}
	if slices.Index(destinations(s), "/run") > slices.Index(destinations(s), "/run/lock") {
		t.Errorf("mounts are %q", destinations(s))
	}
	if v, _ := envOf(s, "container"); v != "oci" {
		t.Errorf("container is %q", v)
	}
	// A mount that was asked for stays, and takes the place of what is below.
	s = mustContainer(t, func(in *ContainerInput) {
		withMounts(bind("/host/run", "/run"))(in)
		in.Systemd = true
		in.ImageConfig.Env = []string{"container=mine"}
	})
	if m, _ := findMount(s, "/run"); m.Type != "bind" {
		t.Errorf("/run is %+v", m)
	}
	if _, ok := findMount(s, "/run/lock"); ok {
		t.Error("/run/lock is mounted into a volume")
	}
	if v, _ := envOf(s, "container"); v != "mine" {
		t.Errorf("container is %q", v)
	}
	for name, tc := range map[string]struct {
		host facts.Host
		want string
	}{"v1": {testHost(), "ro"}, "v2": {v2Host(), "rw"}} {
		s := mustContainer(t, func(in *ContainerInput) { in.Systemd, in.Host = true, tc.host })
		if m, _ := findMount(s, cgroupDir); !slices.Contains(m.Options, tc.want) {
			t.Errorf("%s: cgroups are %q", name, m.Options)
		}
	}
	testSystemdGroup(t)
	for name, tc := range map[string]struct {
		change func(*ContainerInput)
		want   string
	}{
		"systemd": {systemd, "SIGRTMIN+3"},
		"image":   {func(in *ContainerInput) { in.Systemd, in.ImageConfig.StopSignal = true, "SIGINT" }, "SIGINT"},
		"pod":     {func(in *ContainerInput) { in.Systemd, in.Config.StopSignal = true, cri.Signal_SIGNAL_SIGUSR1 }, "SIGUSR1"},
		"other":   {nil, "SIGTERM"},
	} {
		if got, err := ContainerSignal(newInput(tc.change)); err != nil || got.Name != tc.want {
			t.Errorf("%s: %+v, %v, want %s", name, got, err, tc.want)
		}
	}
	if s := mustContainer(t, nil); slices.Contains(destinations(s), "/run") {
		t.Error("everybody gets a /run")
	}
}

// testSystemdGroup: on version 1 systemd's group, and no other, is there to write, where
// it is the container's own.
func testSystemdGroup(t *testing.T) {
	t.Helper()
	for name, tc := range map[string]struct {
		change func(*ContainerInput)
		source string
	}{
		"path":            {func(*ContainerInput) {}, "/sys/fs/cgroup/systemd/kubepods/pod1/cid"},
		"slice":           {func(in *ContainerInput) { in.Handler.SystemdCgroup = true }, "/sys/fs/cgroup/systemd/kubepods.slice/kubepods-pod1.slice/cri-containerd-cid.scope"},
		"another program": {func(in *ContainerInput) { in.Systemd = false }, ""},
		"another runtime": {func(in *ContainerInput) { in.Handler.HostCgroups = false }, ""},
		"version 2":       {func(in *ContainerInput) { in.Host = v2Host() }, ""},
		"no hierarchy":    {func(in *ContainerInput) { in.Host.Cgroup.Systemd = "" }, ""},
		"privileged":      {privileged, ""},
		"all of them":     {func(in *ContainerInput) { in.Handler.CgroupWritable = true }, ""},
		"asked for":       {withMounts(bind("/host/cgroup", "/sys/fs/cgroup")), ""},
	} {
		s := mustContainer(t, func(in *ContainerInput) {
			in.Systemd, in.Handler.HostCgroups = true, true
			tc.change(in)
		})
		m, ok := findMount(s, "/sys/fs/cgroup/systemd")
		if ok != (tc.source != "") || m.Source != tc.source {
			t.Errorf("%s: %+v", name, m)
		}
		namespaced := slices.ContainsFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.CgroupNamespace })
		if namespaced != (ok || name == "version 2") {
			t.Errorf("%s: a namespace of control groups: %v", name, namespaced)
		}
		if !ok {
			continue
		}
		if all, _ := findMount(s, cgroupDir); !namespaced || !slices.Contains(all.Options, "ro") || !slices.Contains(m.Options, "rw") {
			t.Errorf("%s: namespace %v, %+v, %+v", name, namespaced, all, m)
		}
	}
}
