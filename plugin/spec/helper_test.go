package spec

import (
	"errors"
	"slices"
	"strings"
	"testing"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd/containerd/v2/pkg/cap"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// testHost lacks CAP_SYS_RESOURCE, as a daemon in a sandbox of its own does.
func testHost() facts.Host {
	return facts.Host{
		Hostname:     "node-1",
		Seccomp:      true,
		Capabilities: slices.DeleteFunc(slices.Clone(cap.Known()), func(c string) bool { return c == "CAP_SYS_RESOURCE" }),
		PossibleCPUs: []int{0, 1},
		Cgroup: facts.Cgroup{
			Mode:           facts.CgroupHybrid,
			Controllers:    map[string]string{"memory": "/sys/fs/cgroup/memory"},
			Systemd:        "/sys/fs/cgroup/systemd",
			SwapAccounting: true,
		},
	}
}

func v2Host() facts.Host {
	h := testHost()
	h.Cgroup = facts.Cgroup{
		Mode:           facts.CgroupV2,
		Controllers:    map[string]string{"memory": "/sys/fs/cgroup", "hugetlb": "/sys/fs/cgroup"},
		Unified:        "/sys/fs/cgroup",
		UnifiedOptions: []string{"nsdelegate", "memory_recursiveprot"},
		SwapAccounting: true,
	}
	return h
}

// defaultCapabilities are those of a node whose configuration names none.
var defaultCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP",
	"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SYS_CHROOT", "CAP_MKNOD", "CAP_AUDIT_WRITE", "CAP_SETFCAP",
}

// newInput is a small valid container; change makes it the one to test.
func newInput(change func(*ContainerInput)) ContainerInput {
	in := ContainerInput{
		ID: "cid", SandboxID: "sid", ImageName: "docker.io/library/web:1",
		Pod: &cri.PodSandboxConfig{
			Metadata: &cri.PodSandboxMetadata{Name: "pod", Namespace: "ns", Uid: "uid"},
			Hostname: "pod-host",
			Linux: &cri.LinuxPodSandboxConfig{
				CgroupParent:    "/kubepods/pod1",
				SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{}},
			},
		},
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "web"},
			Image:    &cri.ImageSpec{Image: "web"},
			Linux: &cri.LinuxContainerConfig{
				Resources:       &cri.LinuxContainerResources{},
				SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}, Capabilities: &cri.Capability{}},
			},
		},
		ImageConfig: imagespec.ImageConfig{Entrypoint: []string{"/bin/web"}},
		Host:        testHost(),
		Policy:      Policy{Defaults: Defaults{Capabilities: defaultCapabilities}},
		Namespaces:  Namespaces{Net: "/run/netns/sid", UTS: "/proc/7/ns/uts", IPC: "/proc/7/ns/ipc", PID: "/proc/7/ns/pid", Target: "/proc/9/ns/pid"},
		Files:       Files{Hosts: "/pod/hosts", Hostname: "/pod/hostname", ResolvConf: "/pod/resolv.conf", Shm: "/pod/shm"},
		User:        facts.User{UID: 1000, GID: 1001, AdditionalGIDs: []uint32{1001, 5}, Home: "/srv"},
	}
	if change != nil {
		change(&in)
	}
	return in
}

func mustContainer(t *testing.T, change func(*ContainerInput)) *specs.Spec {
	t.Helper()
	s, err := Container(newInput(change))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// wantError generates a container and wants an error of the class that says
// what it is about.
func wantError(t *testing.T, class error, names string, change func(*ContainerInput)) {
	t.Helper()
	s, err := Container(newInput(change))
	if !errors.Is(err, class) || err != nil && !strings.Contains(err.Error(), names) {
		t.Errorf("got %v, %v, want %v naming %q", s != nil, err, class, names)
	}
}

// privileged makes pod and container privileged.
func privileged(in *ContainerInput) {
	in.Pod.Linux.SecurityContext.Privileged = true
	in.Config.Linux.SecurityContext.Privileged = true
}

func sec(in *ContainerInput) *cri.LinuxContainerSecurityContext {
	return in.Config.Linux.SecurityContext
}

func findMount(s *specs.Spec, destination string) (specs.Mount, bool) {
	i := slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == destination })
	if i < 0 {
		return specs.Mount{}, false
	}
	return s.Mounts[i], true
}

func findNamespace(s *specs.Spec, kind specs.LinuxNamespaceType) (path string, ok bool) {
	for _, ns := range s.Linux.Namespaces {
		if ns.Type == kind {
			return ns.Path, true
		}
	}
	return "", false
}

func envOf(s *specs.Spec, key string) (string, bool) {
	for _, kv := range s.Process.Env {
		if v, ok := strings.CutPrefix(kv, key+"="); ok {
			return v, true
		}
	}
	return "", false
}
