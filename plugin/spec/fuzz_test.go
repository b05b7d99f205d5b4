package spec

import (
	"encoding/json"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

func marshal(f *testing.F, m proto.Message) []byte {
	f.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	return b
}

// FuzzContainer: whatever bytes a caller sends, a specification is an error or
// one that keeps the promises of invariants.
func FuzzContainer(f *testing.F) {
	full := newInput(func(in *ContainerInput) {
		privileged(in)
		withMounts(bind("/a", "/b"), bind("/dev", "/dev"))(in)
		in.Config.Envs = []*cri.KeyValue{{Key: "A", Value: []byte("\xff")}}
		in.Config.Devices = []*cri.Device{{HostPath: "/dev/fuse", Permissions: "rw"}}
		in.Config.Annotations = map[string]string{"a": "b"}
		in.Config.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 5, CpusetCpus: "0", HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB"}}, Unified: map[string]string{"memory.high": "1"}}
		sec(in).Capabilities = &cri.Capability{AddCapabilities: []string{"ALL"}, DropCapabilities: []string{"KILL"}, AddAmbientCapabilities: []string{"KILL", "SYS_TIME"}}
		sec(in).Seccomp = profile(cri.SecurityProfile_Localhost, "/p")
	})
	plain := newInput(func(in *ContainerInput) {
		sec(in).NamespaceOptions.Pid = modeTarget
		sec(in).NamespaceOptions.TargetId = "x"
		sec(in).Seccomp = profile(cri.SecurityProfile_RuntimeDefault, "")
	})
	f.Add(marshal(f, full.Config), marshal(f, full.Pod), []byte(profileJSON), "A=b", true)
	f.Add(marshal(f, plain.Config), marshal(f, plain.Pod), []byte("{}"), "HOME=/\n", false)
	f.Add([]byte{}, []byte{}, []byte{}, "", false)
	f.Fuzz(func(t *testing.T, config, pod, profile []byte, image string, v2 bool) {
		in := newInput(func(in *ContainerInput) { in.Config, in.Pod = &cri.ContainerConfig{}, &cri.PodSandboxConfig{} })
		if proto.Unmarshal(config, in.Config) != nil || proto.Unmarshal(pod, in.Pod) != nil {
			return
		}
		if v2 {
			in.Host = v2Host()
		}
		in.SeccompProfile = profile
		in.ImageConfig = imagespec.ImageConfig{Entrypoint: []string{"/x" + image}, Env: []string{image}, WorkingDir: image, StopSignal: image}
		for _, m := range in.Config.GetMounts() {
			in.Mounts = append(in.Mounts, facts.Mount{
				Source: m.GetHostPath(), Destination: m.GetContainerPath(), Readonly: m.GetReadonly(),
				RecursiveReadonly: m.GetRecursiveReadOnly(), Propagation: m.GetPropagation(),
			})
		}
		before := proto.Clone(in.Config)
		s, err := Container(in)
		if err == nil {
			invariants(t, &in, s)
		}
		if !proto.Equal(before, in.Config) {
			t.Error("the request was changed")
		}
		_, _ = StopSignal(in.Config, in.ImageConfig)
		_, _, _ = ResolvConf(in.Pod.GetDnsConfig())
		if p, err := Pause(PauseInput{ID: "sid", Config: in.Pod, Args: []string{"/pause"}, Host: in.Host, NetNS: "/n", SeccompProfile: profile}); err == nil {
			invariantsOfAll(t, p)
			checkHostNamespaces(t, in.Pod, podOptions(in.Pod).GetPid() == modeNode, p)
		}
	})
}

// invariants hold for every container.
func invariants(t *testing.T, in *ContainerInput, s *specs.Spec) {
	t.Helper()
	invariantsOfAll(t, s)
	own := in.security().GetNamespaceOptions().GetPid()
	checkHostNamespaces(t, in.Pod, own == modeNode || own == modePod && podOptions(in.Pod).GetPid() == modeNode, s)
	if len(s.Linux.Sysctl) != 0 {
		t.Errorf("sysctls in a container: %v", s.Linux.Sysctl)
	}
	keys := map[string]bool{}
	for _, kv := range s.Process.Env {
		key, _, ok := strings.Cut(kv, "=")
		if !ok || key == "" || keys[key] || strings.IndexByte(kv, 0) >= 0 {
			t.Errorf("environment %q", s.Process.Env)
		}
		keys[key] = true
	}
	for k := range s.Annotations {
		if !strings.HasPrefix(k, ownPrefix) {
			t.Errorf("annotation %q", k)
		}
	}
	if !in.privileged() && (s.Linux.Resources.Devices[0].Allow || s.Linux.Resources.Devices[0].Access != allAccess) {
		t.Errorf("devices are not denied: %+v", s.Linux.Resources.Devices)
	}
	if in.privileged() && !in.Pod.GetLinux().GetSecurityContext().GetPrivileged() {
		t.Error("privileged in an ordinary pod")
	}
}

func invariantsOfAll(t *testing.T, s *specs.Spec) {
	t.Helper()
	if _, err := json.Marshal(s); err != nil {
		t.Errorf("marshal: %v", err)
	}
	c := s.Process.Capabilities
	unheld := func(name string) bool { return !slices.Contains(c.Permitted, name) }
	if !slices.Equal(c.Inheritable, c.Ambient) || slices.ContainsFunc(c.Ambient, unheld) || slices.Contains(c.Bounding, "CAP_SYS_RESOURCE") {
		t.Errorf("capabilities %+v", c)
	}
	if len(s.Process.Args) == 0 || !path.IsAbs(s.Process.Cwd) || s.Root.Path != rootfsDir {
		t.Errorf("process %+v", s.Process)
	}
	if p := s.Linux.CgroupsPath; !strings.HasPrefix(p, "/") || strings.Contains(p, "..") && hasDotDot(p) {
		t.Errorf("cgroup %q", p)
	}
	seen := map[string]bool{}
	for i, m := range s.Mounts {
		if seen[m.Destination] || !path.IsAbs(m.Destination) || path.Clean(m.Destination) != m.Destination || m.Destination == "/" {
			t.Errorf("mount %+v", m)
		}
		seen[m.Destination] = true
		if i > 0 && depth(s.Mounts[i-1].Destination) > depth(m.Destination) {
			t.Errorf("mounts out of order: %v", destinations(s))
		}
	}
	if adj := s.Process.OOMScoreAdj; adj != nil && (*adj < 0 || *adj > 1000) {
		t.Errorf("score %d", *adj)
	}
}

// checkHostNamespaces: a namespace is the host's only if that was asked for.
func checkHostNamespaces(t *testing.T, pod *cri.PodSandboxConfig, hostPID bool, s *specs.Spec) {
	t.Helper()
	for kind, host := range map[specs.LinuxNamespaceType]bool{
		specs.MountNamespace:   false,
		specs.NetworkNamespace: podOptions(pod).GetNetwork() == modeNode,
		specs.UTSNamespace:     podOptions(pod).GetNetwork() == modeNode,
		specs.IPCNamespace:     podOptions(pod).GetIpc() == modeNode,
		specs.PIDNamespace:     hostPID,
	} {
		if _, own := findNamespace(s, kind); own == host {
			t.Errorf("%s namespace: own %v, host asked for %v", kind, own, host)
		}
	}
}

func FuzzParseSignal(f *testing.F) {
	for _, s := range []string{"SIGTERM", "15", "RTMIN+3", "SIGRTMAX-14", "rt", "SIGRTMIN+"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		sig, err := ParseSignal(s)
		if err != nil {
			return
		}
		if again, err := ParseSignal(sig.Name); err != nil || again != sig || sig.Number <= 0 || sig.Number > rtMax {
			t.Errorf("%q: %+v, then %+v, %v", s, sig, again, err)
		}
	})
}

func FuzzSysctl(f *testing.F) {
	for _, s := range []string{"net.core.somaxconn", "net/ipv4/conf/eth0.1/x", "kernel.sem", "net/../kernel", "net..x"} {
		f.Add(s, "1 2")
	}
	f.Fuzz(func(t *testing.T, name, value string) {
		pod := &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{Sysctls: map[string]string{name: value}}}
		set, err := Sysctls(pod, Policy{}, facts.Host{})
		if err != nil {
			return
		}
		for k, v := range set {
			// What a runtime makes of the name must stay below /proc/sys.
			file := path.Join("/proc/sys", strings.ReplaceAll(k, ".", "/"))
			if !strings.HasPrefix(file, "/proc/sys/net/") && !strings.HasPrefix(file, "/proc/sys/fs/mqueue/") && !strings.HasPrefix(file, "/proc/sys/kernel/") || strings.ContainsAny(k+v, "+=\n\x00") {
				t.Errorf("%q = %q", k, v)
			}
		}
	})
}

// A profile that is taken has known actions and no rule without a name, and one
// for fewer capabilities has no other rules.
func FuzzParseSeccomp(f *testing.F) {
	for _, s := range []string{
		profileJSON, "", "{}", `{"defaultAction":"SCMP_ACT_ALLOW"}`,
		`{"defaultAction":"SCMP_ACT_ERRNO","archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]}],"syscalls":[{"name":"read","action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_KILL"],"minKernel":"4.8"}}]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		for _, caps := range [][]string{nil, {"CAP_KILL"}} {
			got, err := parseSeccomp("p", content, caps, facts.Kernel{Major: 6})
			if err != nil {
				if !errdefs.IsInvalidArgument(err) {
					t.Errorf("class of %v", err)
				}
				continue
			}
			if !slices.Contains(seccompActions, got.DefaultAction) {
				t.Errorf("default %q", got.DefaultAction)
			}
			for _, r := range got.Syscalls {
				if len(r.Names) == 0 || !slices.Contains(seccompActions, r.Action) {
					t.Errorf("rule %+v", r)
				}
			}
		}
	})
}
