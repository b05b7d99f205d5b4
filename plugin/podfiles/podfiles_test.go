package podfiles

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

func TestResolvConf(t *testing.T) {
	got, err := ResolvConf(&cri.DNSConfig{Servers: []string{"10.0.0.1", "fd00::1"}, Searches: []string{"a.b", "c"}, Options: []string{"ndots:5"}})
	want := "search a.b c\nnameserver 10.0.0.1\nnameserver fd00::1\noptions ndots:5\n"
	if err != nil || string(got) != want {
		t.Errorf("got %q %v, want %q", got, err, want)
	}
	if got, err := ResolvConf(&cri.DNSConfig{}); err != nil || len(got) != 0 {
		t.Errorf("empty: %q %v", got, err)
	}
	for _, bad := range []string{"", "a b", "1.1.1.1\nnameserver 6.6.6.6", "x\r", "x\x00", "\t"} {
		for _, dns := range []*cri.DNSConfig{{Servers: []string{bad}}, {Searches: []string{bad}}, {Options: []string{bad}}} {
			if _, err := ResolvConf(dns); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: %v, want InvalidArgument", bad, err)
			}
		}
	}
}

func FuzzResolvConf(f *testing.F) {
	f.Add("1.1.1.1", "a.b", "ndots:5")
	f.Fuzz(func(t *testing.T, server, search, option string) {
		got, err := ResolvConf(&cri.DNSConfig{Servers: []string{server}, Searches: []string{search}, Options: []string{option}})
		if err == nil && strings.Count(string(got), "\n") != 3 {
			t.Errorf("%q %q %q made %q", server, search, option, got)
		}
	})
}

func TestCreateAndRemove(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	f, err := New(filepath.Join(t.TempDir(), "sandboxes"))
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	sb := record.Sandbox{ID: record.NewID(), Config: &cri.PodSandboxConfig{Hostname: "web", DnsConfig: &cri.DNSConfig{Servers: []string{"10.0.0.1"}}}}
	p := f.Paths(sb)
	for range 2 { // a second time, as after an attempt that was cut off
		if err := f.Create(ctx, sb); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]string{p.Hostname: "web\n", p.ResolvConf: "nameserver 10.0.0.1\n"} {
		if b, err := os.ReadFile(path); err != nil || string(b) != want {
			t.Errorf("%s: %q %v, want %q", path, b, err, want)
		}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(p.Shm, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC || uint64(fs.Bsize)*fs.Blocks != shmSize {
		t.Errorf("shm: %+v %v, want a tmpfs of %d bytes", fs, err, shmSize)
	}
	for range 2 {
		if err := f.Remove(ctx, sb); err != nil {
			t.Fatal(err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), sb.ID) {
		t.Errorf("a mount is left (%v)", err)
	}
	if _, err := os.Stat(p.Dir); !os.IsNotExist(err) {
		t.Errorf("the directory is left: %v", err)
	}
}

func TestHostNamespaces(t *testing.T) {
	f, err := New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f.hostname = func() (string, error) { return "node-1", nil }
	node := &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
		NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Ipc: cri.NamespaceMode_NODE}}}
	sb := record.Sandbox{ID: record.NewID(), Config: &cri.PodSandboxConfig{Hostname: "web", Linux: node}}
	if h, err := f.Hostname(sb); err != nil || h != "node-1" {
		t.Errorf("hostname of a pod on the node's network: %q %v, want the node's", h, err)
	}
	if got := f.Paths(sb).Shm; got != "/dev/shm" {
		t.Errorf("shm of a pod with the node's IPC: %s", got)
	}
}
