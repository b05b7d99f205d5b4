package sandbox

import (
	"errors"
	"testing"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const node = cri.NamespaceMode_NODE

func request(t *testing.T, o *cri.NamespaceOption, sysctl string) *api.CreateSandboxRequest {
	t.Helper()
	c := &cri.PodSandboxConfig{Hostname: "h", Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: o}}}
	if sysctl != "" {
		c.Linux.Sysctls = map[string]string{sysctl: "1"}
	}
	a, err := anypb.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return &api.CreateSandboxRequest{SandboxID: "s", NetnsPath: "/run/netns/s", Options: a}
}

func TestNewRecord(t *testing.T) {
	users := &cri.UserNamespace{Uids: []*cri.IDMapping{{HostId: 1 << 16, Length: 1 << 16}}, Gids: []*cri.IDMapping{{HostId: 1 << 16, Length: 1 << 16}}}
	for name, tc := range map[string]struct {
		options *cri.NamespaceOption
		// paths are those of net, uts, ipc, user; holder says that one is needed.
		paths  [4]string
		holder bool
		pid    error
	}{
		"all own":     {&cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}, [4]string{"/run/netns/s", "/d/uts", "/d/ipc", ""}, false, errdefs.ErrFailedPrecondition},
		"shared":      {&cri.NamespaceOption{}, [4]string{"/run/netns/s", "/d/uts", "/d/ipc", ""}, true, errdefs.ErrFailedPrecondition},
		"all host's":  {&cri.NamespaceOption{Network: node, Ipc: node, Pid: node}, [4]string{}, false, nil},
		"own users":   {&cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER, UsernsOptions: users}, [4]string{"/run/netns/s", "/d/uts", "/d/ipc", "/d/user"}, true, errdefs.ErrFailedPrecondition},
		"no host IPC": {&cri.NamespaceOption{Network: node, Pid: cri.NamespaceMode_CONTAINER}, [4]string{"", "", "/d/ipc", ""}, false, errdefs.ErrFailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := newRecord(request(t, tc.options, ""), &options.Options{})
			if err != nil {
				t.Fatal(err)
			}
			for i, kind := range []specs.LinuxNamespaceType{specs.NetworkNamespace, specs.UTSNamespace, specs.IPCNamespace, specs.UserNamespace} {
				if got, err := r.path("/d", kind); got != tc.paths[i] || err != nil {
					t.Errorf("%s: %q, %v", kind, got, err)
				}
			}
			if _, err := r.path("/d", specs.PIDNamespace); !errors.Is(err, tc.pid) {
				t.Errorf("pid: %v, want %v", err, tc.pid)
			}
			if _, err := r.path("/d", specs.TimeNamespace); !errdefs.IsInvalidArgument(err) {
				t.Errorf("time: %v", err)
			}
			if r.byHolder() != tc.holder || (r.Hostname == "h") != r.UTS {
				t.Errorf("%+v", r)
			}
			if err := r.live(); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("before its start: %v", err)
			}
		})
	}
}

func TestSysctls(t *testing.T) {
	own, hosts := &cri.NamespaceOption{}, &cri.NamespaceOption{Network: node, Ipc: node}
	for name, want := range map[string]bool{
		"net.core.somaxconn": true, "kernel.shm_rmid_forced": true, "kernel.msgmax": true, "kernel.sem": true, "fs.mqueue.msg_max": true,
		"net/core/somaxconn": true, "kernel/panic": false, "net/../kernel/panic": false,
		"kernel.panic": false, "vm.swappiness": false, "net.../../kernel/panic": false, "net/../kernel.panic": false, "kernel.semaphore": false,
	} {
		if _, err := newRecord(request(t, own, name), nil); (err == nil) != want || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", name, err)
		}
		if _, err := newRecord(request(t, hosts, name), nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q with the host's namespaces: %v", name, err)
		}
	}
}

func TestRefused(t *testing.T) {
	none := request(t, &cri.NamespaceOption{}, "")
	none.NetnsPath = ""
	foreign := request(t, &cri.NamespaceOption{}, "")
	foreign.Options = &anypb.Any{TypeUrl: "no.such.Config"}
	odd := request(t, &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: cri.NamespaceMode_CONTAINER}}, "")
	unmapped := request(t, &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{}}, "")
	for name, r := range map[string]*api.CreateSandboxRequest{"no netns": none, "foreign": foreign, "no mappings": unmapped, "no mode of a pod": odd} {
		if _, err := newRecord(r, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCgroupsPath(t *testing.T) {
	for _, tc := range []struct {
		parent  string
		systemd bool
		want    string
	}{
		{"", false, "/k8s.io/s-holder"},
		{"/kubepods/pod1", false, "/kubepods/pod1/s-holder"},
		{"kubepods.slice/kubepods-pod1.slice", true, "kubepods-pod1.slice:cri-containerd:s-holder"},
		{"", true, "system.slice:cri-containerd:s-holder"},
	} {
		r := Record{ID: "s", CgroupParent: tc.parent, Options: &options.Options{SystemdCgroup: tc.systemd}}
		if got := r.cgroupsPath(); got != tc.want {
			t.Errorf("%q, systemd %t: %q, want %q", tc.parent, tc.systemd, got, tc.want)
		}
	}
}
