package podfiles_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/podfiles"
	"github.com/gantry-cri/gantry/plugin/record"
)

var text = podfiles.Text{
	Hostname: func(c *cri.PodSandboxConfig) string { return c.GetHostname() },
	ResolvConf: func(dns *cri.DNSConfig) ([]byte, bool, error) {
		if len(dns.GetServers()) == 0 {
			return nil, false, nil
		}
		return []byte("nameserver " + dns.GetServers()[0] + "\n"), true, nil
	},
}

func TestCreateAndRemove(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	f, err := podfiles.New(filepath.Join(t.TempDir(), "sandboxes"), text)
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
	if err := unix.Statfs(p.Shm, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC || uint64(fs.Bsize)*fs.Blocks != 64<<20 {
		t.Errorf("shm: %+v %v, want a tmpfs of 64 MiB", fs, err)
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
	f, err := podfiles.New(t.TempDir(), text)
	if err != nil {
		t.Fatal(err)
	}
	node := &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
		NamespaceOptions: &cri.NamespaceOption{Ipc: cri.NamespaceMode_NODE}}}
	sb := record.Sandbox{ID: record.NewID(), Config: &cri.PodSandboxConfig{Linux: node}}
	p := f.Paths(sb)
	if p.Shm != "/dev/shm" {
		t.Errorf("shm of a pod with the node's IPC: %s", p.Shm)
	}
	if err := f.Create(context.Background(), sb); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(p.ResolvConf); err != nil || string(got) != string(want) {
		t.Errorf("resolv.conf of a pod without one: %q %v, want the node's", got, err)
	}
	if err := f.Remove(context.Background(), sb); err != nil {
		t.Fatal(err)
	}
}

// In a user namespace the files belong to its root.
func TestOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	f, err := podfiles.New(filepath.Join(t.TempDir(), "sandboxes"), text)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	sb := record.Sandbox{ID: record.NewID(), Config: &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{
		SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{
			Uids: []*cri.IDMapping{{HostId: 100000, Length: 10}}, Gids: []*cri.IDMapping{{HostId: 200000, Length: 10}},
		}}},
	}}}
	if err := f.Create(ctx, sb); err != nil {
		t.Fatal(err)
	}
	p := f.Paths(sb)
	for _, path := range []string{p.Hosts, p.Hostname, p.ResolvConf, p.Shm} {
		var s unix.Stat_t
		if err := unix.Stat(path, &s); err != nil || s.Uid != 100000 || s.Gid != 200000 {
			t.Errorf("%s belongs to %d:%d, %v", path, s.Uid, s.Gid, err)
		}
	}
	if err := f.Remove(ctx, sb); err != nil {
		t.Fatal(err)
	}
}
