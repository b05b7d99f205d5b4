package spec

import (
	"errors"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	modePod       = cri.NamespaceMode_POD
	modeContainer = cri.NamespaceMode_CONTAINER
	modeNode      = cri.NamespaceMode_NODE
	modeTarget    = cri.NamespaceMode_TARGET
)

func newPause(change func(*PauseInput)) PauseInput {
	c := newInput(nil)
	in := PauseInput{ID: "sid", Config: c.Pod, Args: []string{"/pause"}, Host: c.Host, NetNS: "/run/netns/sid", Files: c.Files}
	in.Config.LogDirectory = "/var/log/pods/x"
	if change != nil {
		change(&in)
	}
	return in
}

func mustPause(t *testing.T, change func(*PauseInput)) *specs.Spec {
	t.Helper()
	s, err := Pause(newPause(change))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestContainerNamespaces(t *testing.T) {
	host, fresh := "host", ""
	for name, tc := range map[string]struct {
		pod, own           *cri.NamespaceOption
		net, uts, ipc, pid string
	}{
		"ordinary":              {pod: &cri.NamespaceOption{Pid: modeContainer}, own: &cri.NamespaceOption{Pid: modeContainer}, net: "/run/netns/sid", uts: "/proc/7/ns/uts", ipc: "/proc/7/ns/ipc", pid: fresh},
		"shared processes":      {net: "/run/netns/sid", uts: "/proc/7/ns/uts", ipc: "/proc/7/ns/ipc", pid: "/proc/7/ns/pid"},
		"target":                {pod: &cri.NamespaceOption{Pid: modeContainer}, own: &cri.NamespaceOption{Pid: modeTarget, TargetId: "x"}, net: "/run/netns/sid", uts: "/proc/7/ns/uts", ipc: "/proc/7/ns/ipc", pid: "/proc/9/ns/pid"},
		"all of the host":       {pod: &cri.NamespaceOption{Network: modeNode, Ipc: modeNode, Pid: modeNode}, own: &cri.NamespaceOption{Network: modeNode, Ipc: modeNode, Pid: modeNode}, net: host, uts: host, ipc: host, pid: host},
		"host network":          {pod: &cri.NamespaceOption{Network: modeNode}, own: &cri.NamespaceOption{Pid: modeContainer}, net: host, uts: host, ipc: "/proc/7/ns/ipc", pid: fresh},
		"host IPC":              {pod: &cri.NamespaceOption{Ipc: modeNode}, own: &cri.NamespaceOption{Pid: modeContainer}, net: "/run/netns/sid", uts: "/proc/7/ns/uts", ipc: host, pid: fresh},
		"the pod's is the host": {pod: &cri.NamespaceOption{Pid: modeNode}, net: "/run/netns/sid", uts: "/proc/7/ns/uts", ipc: "/proc/7/ns/ipc", pid: host},
		"own in a host PID pod": {pod: &cri.NamespaceOption{Pid: modeNode}, own: &cri.NamespaceOption{Pid: modeContainer}, net: "/run/netns/sid", uts: "/proc/7/ns/uts", ipc: "/proc/7/ns/ipc", pid: fresh},
		"userns of the node":    {pod: &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: modeNode}}, own: &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: modeNode}}, net: "/run/netns/sid", uts: "/proc/7/ns/uts", ipc: "/proc/7/ns/ipc", pid: "/proc/7/ns/pid"},
	} {
		t.Run(name, func(t *testing.T) {
			s := mustContainer(t, func(in *ContainerInput) {
				in.Pod.Linux.SecurityContext.NamespaceOptions, sec(in).NamespaceOptions = tc.pod, tc.own
			})
			for kind, want := range map[specs.LinuxNamespaceType]string{specs.NetworkNamespace: tc.net, specs.UTSNamespace: tc.uts, specs.IPCNamespace: tc.ipc, specs.PIDNamespace: tc.pid, specs.MountNamespace: fresh} {
				got, ok := findNamespace(s, kind)
				if !ok {
					got = host
				}
				if got != want {
					t.Errorf("%s: got %q, want %q", kind, got, want)
				}
			}
			if _, ok := findNamespace(s, specs.UserNamespace); ok {
				t.Error("a user namespace")
			}
		})
	}
}

func TestContainerNamespaceErrors(t *testing.T) {
	for field, own := range map[string]*cri.NamespaceOption{
		"namespace_options.network":        {Network: modeNode},
		"options.network: CONTAINER":       {Network: modeContainer},
		"namespace_options.ipc":            {Ipc: modeNode},
		"namespace_options.pid: 9":         {Pid: 9},
		"namespace_options.target_id":      {Pid: modeTarget},
		`target_id: "x" with process name`: {Pid: modeContainer, TargetId: "x"},
		"userns_options.mode: CONTAINER":   {UsernsOptions: &cri.UserNamespace{Mode: modeContainer}},
		"userns_options: id mappings":      {UsernsOptions: &cri.UserNamespace{Mode: modeNode, Uids: []*cri.IDMapping{{}}}},
	} {
		wantError(t, errdefs.ErrInvalidArgument, field, func(in *ContainerInput) { sec(in).NamespaceOptions = own })
	}
	for kind, change := range map[string]func(*Namespaces){
		"network": func(n *Namespaces) { n.Net = "" }, "uts": func(n *Namespaces) { n.UTS = "" }, "ipc": func(n *Namespaces) { n.IPC = "" },
	} {
		wantError(t, errdefs.ErrFailedPrecondition, kind, func(in *ContainerInput) { change(&in.Namespaces) })
	}
	for _, own := range []*cri.NamespaceOption{{}, {Pid: modeTarget, TargetId: "x"}} {
		wantError(t, errdefs.ErrFailedPrecondition, "pid", func(in *ContainerInput) {
			in.Namespaces.PID, in.Namespaces.Target, sec(in).NamespaceOptions = "", "", own
		})
	}
}

func TestAnnotations(t *testing.T) {
	s := mustContainer(t, func(in *ContainerInput) {
		in.Handler.PodAnnotations = []string{"pod.io/*", "exact", "["}
		in.Handler.ContainerAnnotations = []string{"ctr.io/?", "io.kubernetes.cri.*"}
		in.Handler.BaseSpec = &specs.Spec{Annotations: map[string]string{"base": "1", "base/2": "0", AnnotationSandboxID: "evil"}}
		in.Handler.DefaultAnnotations = map[string]string{"base/2": "2", "pod.io/a": "0", "pod.io/d": "4", "ctr.io/x": "0", "ctr.io/z": "5"}
		in.Pod.Annotations = map[string]string{"pod.io/a": "1", "pod.io/a/b": "no", "exact": "2", "ctr.io/z": "no", "exactly": "no", "[": "no"}
		in.Config.Annotations = map[string]string{"ctr.io/x": "3", "ctr.io/xy": "no", "pod.io/c": "no", AnnotationSandboxID: "evil", AnnotationSandboxMemory: "evil"}
	})
	want := map[string]string{
		"pod.io/a": "1", "exact": "2", "ctr.io/x": "3", "base": "1", "base/2": "2", "pod.io/d": "4", "ctr.io/z": "5",
		AnnotationContainerType: "container", AnnotationSandboxID: "sid", AnnotationSandboxName: "pod", AnnotationSandboxNamespace: "ns",
		AnnotationSandboxUID: "uid", AnnotationContainerName: "web", AnnotationImageName: "docker.io/library/web:1",
	}
	if !maps.Equal(s.Annotations, want) {
		t.Errorf("got  %v\nwant %v", s.Annotations, want)
	}
	s = mustPause(t, func(in *PauseInput) {
		in.ImageName = "embedded"
		in.Handler.PodAnnotations = []string{"pod.io/*"}
		in.Config.Annotations = map[string]string{"pod.io/a": "1", "other": "no"}
		in.Config.Linux.Resources = &cri.LinuxContainerResources{CpuPeriod: 1, CpuQuota: -1, CpuShares: 3, MemoryLimitInBytes: 4}
	})
	want = map[string]string{
		"pod.io/a": "1", AnnotationContainerType: "sandbox", AnnotationSandboxID: "sid", AnnotationSandboxName: "pod", AnnotationSandboxNamespace: "ns",
		AnnotationSandboxUID: "uid", AnnotationSandboxLogDir: "/var/log/pods/x", AnnotationSandboxImage: "embedded",
		AnnotationSandboxCPUPeriod: "1", AnnotationSandboxCPUQuota: "-1", AnnotationSandboxCPUShares: "3", AnnotationSandboxMemory: "4",
	}
	if !maps.Equal(s.Annotations, want) {
		t.Errorf("sandbox: got  %v\nwant %v", s.Annotations, want)
	}
}

func TestImageNameIsThatOfTheUser(t *testing.T) {
	s := mustContainer(t, func(in *ContainerInput) {
		in.Config.Image = &cri.ImageSpec{Image: "sha256:1", UserSpecifiedImage: "web:latest"}
	})
	if got := s.Annotations[AnnotationImageName]; got != "web:latest" {
		t.Errorf("got %q", got)
	}
}

func TestPause(t *testing.T) {
	s := mustPause(t, nil)
	if s.Hostname != "pod-host" || !s.Root.Readonly || s.Process.User.UID != 65535 || !s.Process.NoNewPrivileges || len(s.Process.Capabilities.Bounding) != 0 || !slices.Equal(s.Process.Args, []string{"/pause"}) {
		t.Errorf("got %+v", s.Process)
	}
	if *s.Process.OOMScoreAdj != 0 || s.Linux.CgroupsPath != "/kubepods/pod1/sid" || s.Linux.Resources.Devices[0].Allow || *s.Linux.Resources.CPU.Shares != 2 || s.Linux.Seccomp != nil {
		t.Errorf("got %+v", s.Linux)
	}
	if net, _ := findNamespace(s, specs.NetworkNamespace); net != "/run/netns/sid" {
		t.Errorf("network %q", net)
	}
	for _, kind := range []specs.LinuxNamespaceType{specs.UTSNamespace, specs.IPCNamespace, specs.PIDNamespace, specs.MountNamespace} {
		if p, ok := findNamespace(s, kind); !ok || p != "" {
			t.Errorf("%s: %q, %v", kind, p, ok)
		}
	}
	if m, ok := findMount(s, "/dev/shm"); !ok || m.Source != "/pod/shm" || !slices.Contains(m.Options, "ro") {
		t.Errorf("shm: %+v", m)
	}
	s = mustPause(t, func(in *PauseInput) {
		in.Host = v2Host()
		in.Host.LowerOOMScore, in.Host.AppArmor = true, true
		in.Config.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Network: modeNode, Ipc: modeNode, Pid: modeNode},
			RunAsUser:        &cri.Int64Value{Value: 5}, RunAsGroup: &cri.Int64Value{Value: 6}, SupplementalGroups: []int64{7, 6},
			Seccomp: profile(cri.SecurityProfile_RuntimeDefault, ""),
		}
		in.NetNS = ""
	})
	if want := (specs.User{UID: 5, GID: 6, AdditionalGids: []uint32{6, 7}}); !reflect.DeepEqual(s.Process.User, want) {
		t.Errorf("user %+v", s.Process.User)
	}
	if len(s.Linux.Namespaces) != 2 || s.Hostname != "" || *s.Process.OOMScoreAdj != -998 || s.Linux.Seccomp == nil || s.Process.ApparmorProfile != AppArmorProfile {
		t.Errorf("host namespaces: %+v, %q", s.Linux.Namespaces, s.Hostname)
	}
}

func TestPauseSysfs(t *testing.T) {
	for privileged, want := range map[bool]string{false: "ro", true: "rw"} {
		s := mustPause(t, func(in *PauseInput) {
			in.Config.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{Privileged: privileged}
		})
		i := slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Type == "sysfs" })
		if i < 0 || !slices.Contains(s.Mounts[i].Options, want) {
			t.Errorf("privileged %v: mounts are %v", privileged, s.Mounts)
		}
	}
}

func TestPauseErrors(t *testing.T) {
	for name, tc := range map[string]struct {
		class  error
		change func(*PauseInput)
	}{
		"network namespace": {errdefs.ErrFailedPrecondition, func(in *PauseInput) { in.NetNS = "" }},
		"pause program":     {errdefs.ErrInternal, func(in *PauseInput) { in.Args = nil }},
		"config: missing":   {errdefs.ErrInvalidArgument, func(in *PauseInput) { in.Config = nil }},
		"seccomp profile /p": {errdefs.ErrInvalidArgument, func(in *PauseInput) {
			in.Config.Linux.SecurityContext.Seccomp = profile(cri.SecurityProfile_Localhost, "/p")
		}},
		"apparmor": {errdefs.ErrFailedPrecondition, func(in *PauseInput) {
			in.Config.Linux.SecurityContext.Apparmor = profile(cri.SecurityProfile_Localhost, "p")
		}},
	} {
		if _, err := Pause(newPause(tc.change)); !errors.Is(err, tc.class) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSysctls(t *testing.T) {
	h := testHost()
	h.UnprivilegedPorts, h.UnprivilegedICMP = true, true
	userns := h
	userns.UserNS = true
	both := Policy{UnprivilegedPorts: true, UnprivilegedICMP: true}
	pod := func(o *cri.NamespaceOption, set map[string]string) *cri.PodSandboxConfig {
		return &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{Sysctls: set, SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: o}}}
	}
	asked := map[string]string{"net.core.somaxconn": "1024", "net/ipv4/conf/eth0.1/forwarding": "1", "kernel.shmmax": "5", "fs.mqueue.msg_max": "10", "kernel.sem": "250\t32000 32 128", "kernel.domainname": "a.b"}
	got, err := Sysctls(pod(nil, asked), Policy{}, h)
	want := map[string]string{"net.core.somaxconn": "1024", "net.ipv4.conf.eth0/1.forwarding": "1", "kernel.shmmax": "5", "fs.mqueue.msg_max": "10", "kernel.sem": "250\t32000 32 128", "kernel.domainname": "a.b"}
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
	for name, tc := range map[string]struct {
		got  func() (map[string]string, error)
		want map[string]string
	}{
		"policy":         {func() (map[string]string, error) { return Sysctls(pod(nil, nil), both, h) }, map[string]string{unprivilegedPorts: "0", pingGroups: "0 2147483647"}},
		"policy, userns": {func() (map[string]string, error) { return Sysctls(pod(nil, nil), both, userns) }, map[string]string{unprivilegedPorts: "0"}},
		"old kernel":     {func() (map[string]string, error) { return Sysctls(pod(nil, nil), both, testHost()) }, map[string]string{}},
		"host network": {func() (map[string]string, error) {
			return Sysctls(pod(&cri.NamespaceOption{Network: modeNode}, nil), both, h)
		}, map[string]string{}},
		"asked for": {func() (map[string]string, error) {
			return Sysctls(pod(nil, map[string]string{"net/ipv4/ip_unprivileged_port_start": "80"}), both, h)
		}, map[string]string{unprivilegedPorts: "80", pingGroups: "0 2147483647"}},
	} {
		if got, err := tc.got(); err != nil || !maps.Equal(got, tc.want) {
			t.Errorf("%s: got %v, %v", name, got, err)
		}
	}
	if _, err := Sysctls(pod(nil, map[string]string{"net.a.b": "1", "net/a/b": "2"}), Policy{}, h); !errdefs.IsInvalidArgument(err) {
		t.Errorf("twice: %v", err)
	}
	small := pod(&cri.NamespaceOption{UsernsOptions: userNS(1000)}, nil)
	if got, err := Sysctls(small, both, h); err != nil || got[pingGroups] != "0 999" {
		t.Errorf("user namespace: %v, %v", got, err)
	}
	s := mustPause(t, func(in *PauseInput) { in.Config.Linux.Sysctls = map[string]string{"net.a": "1"} })
	if !maps.Equal(s.Linux.Sysctl, map[string]string{"net.a": "1"}) {
		t.Errorf("sandbox: %v", s.Linux.Sysctl)
	}
	if s := mustContainer(t, func(in *ContainerInput) { in.Pod.Linux.Sysctls = map[string]string{"net.a": "1"} }); len(s.Linux.Sysctl) != 0 {
		t.Errorf("container: %v", s.Linux.Sysctl)
	}
}

func TestResolvConf(t *testing.T) {
	b, own, err := ResolvConf(&cri.DNSConfig{Servers: []string{"10.0.0.10", "fe80::1%eth0"}, Searches: []string{"a.b", "b"}, Options: []string{"ndots:5", "rotate"}})
	if want := "search a.b b\nnameserver 10.0.0.10\nnameserver fe80::1%eth0\noptions ndots:5 rotate\n"; string(b) != want || !own || err != nil {
		t.Errorf("got %q, %v, %v", b, own, err)
	}
	if b, own, err := ResolvConf(&cri.DNSConfig{}); len(b) != 0 || !own || err != nil {
		t.Errorf("empty: %q, %v, %v", b, own, err)
	}
	if _, own, err := ResolvConf(nil); own || err != nil {
		t.Errorf("nil: %v, %v", own, err)
	}
	for _, bad := range []*cri.DNSConfig{{Servers: []string{"1.1.1.1\nsearch evil"}}, {Searches: []string{"a b"}}, {Options: []string{""}}, {Options: []string{"x\x00"}}} {
		if b, _, err := ResolvConf(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: got %q, %v", bad, b, err)
		}
	}
}

func TestBaseSpec(t *testing.T) {
	base := &specs.Spec{
		Version:  "0.1",
		Hostname: "base",
		Process: &specs.Process{
			Args: []string{"base"}, Cwd: "/base", Env: []string{"BASE=1", "PATH=/base"}, NoNewPrivileges: true,
			User:         specs.User{UID: 9},
			Rlimits:      []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 5, Soft: 5}},
			Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}, Inheritable: []string{"CAP_KILL"}, Ambient: []string{"CAP_KILL"}},
			OOMScoreAdj:  new(7), SelinuxLabel: "x", ApparmorProfile: "x",
		},
		Root:  &specs.Root{Path: "/", Readonly: true},
		Hooks: &specs.Hooks{Poststop: []specs.Hook{{Path: "/hook"}}},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"}, {Destination: "/run", Type: "tmpfs"}, {Destination: "/base", Type: "tmpfs"},
			{Destination: "/sys", Type: "sysfs", Options: []string{"ro"}}, {Destination: "/dev/shm", Type: "tmpfs"}, {Destination: "/sys/fs/cgroup", Type: "cgroup"},
		},
		Linux: &specs.Linux{
			Seccomp:     &specs.LinuxSeccomp{DefaultAction: specs.ActAllow},
			MaskedPaths: []string{"/base"},
			Sysctl:      map[string]string{"net.a": "1"},
			CgroupsPath: "/base",
			Namespaces:  []specs.LinuxNamespace{{Type: specs.TimeNamespace}, {Type: specs.UserNamespace}, {Type: specs.PIDNamespace, Path: "/x"}},
			Resources:   &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(99))}, Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}, {Allow: true, Type: "c", Major: new(int64(10)), Access: "r"}}},
			UIDMappings: []specs.LinuxIDMapping{{Size: 1}},
		},
	}
	before := &specs.Spec{}
	if err := deepCopy(before, base); err != nil {
		t.Fatal(err)
	}
	s := mustContainer(t, func(in *ContainerInput) { in.Handler.BaseSpec = base; in.Config.Linux.Resources = nil })
	p, l := s.Process, s.Linux
	if p.Args[0] != "/bin/web" || p.Cwd != "/" || p.NoNewPrivileges || p.User.UID != 1000 || p.SelinuxLabel != "" || p.ApparmorProfile != "" || s.Root.Readonly || s.Hostname != "" || s.Version != oldVersion {
		t.Errorf("kept what is not the base's: %+v", p)
	}
	if len(p.Rlimits) != 1 || *p.OOMScoreAdj != 7 || !slices.Equal(p.Capabilities.Bounding, []string{"CAP_KILL"}) || p.Capabilities.Inheritable != nil || p.Capabilities.Ambient != nil || len(s.Hooks.Poststop) != 1 {
		t.Errorf("process: %+v", p)
	}
	if v, _ := envOf(s, "PATH"); v != "/base" {
		t.Errorf("PATH %q", v)
	}
	if l.Seccomp == nil || l.Seccomp.DefaultAction != specs.ActAllow || *l.Resources.Pids.Limit != 99 || l.Sysctl != nil || l.UIDMappings != nil || l.CgroupsPath != "/kubepods/pod1/cid" || len(l.MaskedPaths) != 0 {
		t.Errorf("linux: %+v", l)
	}
	if pid, _ := findNamespace(s, specs.PIDNamespace); pid != "" || !slices.ContainsFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.TimeNamespace }) {
		t.Errorf("namespaces: %+v", l.Namespaces)
	}
	if _, ok := findNamespace(s, specs.UserNamespace); ok {
		t.Error("user namespace of the base")
	}
	if got := destinations(s); slices.Contains(got, "/run") || !slices.Contains(got, "/base") || slices.Contains(got, "/dev/pts") {
		t.Errorf("mounts: %v", got)
	}
	if r := l.Resources.Devices; *r[len(r)-1].Major != 10 || r[0].Allow {
		t.Errorf("devices: %+v", r)
	}
	s = mustContainer(t, func(in *ContainerInput) {
		in.Handler.BaseSpec, in.Policy.DisableProcMount = base, true
		sec(in).Seccomp = profile(cri.SecurityProfile_Unconfined, "")
	})
	if s.Linux.Seccomp != nil || !slices.Equal(s.Linux.MaskedPaths, []string{"/base"}) {
		t.Errorf("explicit: %+v", s.Linux)
	}
	s = mustContainer(t, func(in *ContainerInput) { in.Handler.BaseSpec = base; privileged(in) })
	if m, _ := findMount(s, "/sys"); s.Linux.Seccomp != nil || slices.Contains(m.Options, "ro") {
		t.Errorf("privileged: %+v", s.Linux)
	}
	if !reflect.DeepEqual(base, before) {
		t.Errorf("the base changed: %+v", base)
	}
}
