package lifecycle

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

const defaultAppArmorProfile = "cri-containerd.apparmor.d"

// needAppArmor skips where no profile is ever in force.
func needAppArmor(t *testing.T) {
	t.Helper()
	if on, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err != nil || string(on) != "Y\n" {
		t.Skip("the kernel of this machine does not use AppArmor")
	}
}

// profileOf is what a process is confined by.
func profileOf(d *daemon.Daemon, id string) string { return sh(d, id, "cat /proc/self/attr/current") }

// loadProfile loads a profile for the time of the test. It denies what is below
// /tmp/denied.
func loadProfile(t *testing.T, name string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "profile")
	text := "profile " + name + " flags=(attach_disconnected,mediate_deleted) {\n" +
		"  file,\n  capability,\n  network,\n  signal,\n  ptrace,\n  mount,\n  umount,\n  unix,\n  deny /tmp/denied/** rwklx,\n}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	parse := func(flag string) {
		if out, err := exec.Command("apparmor_parser", flag, "-K", file).CombinedOutput(); err != nil {
			t.Fatalf("apparmor_parser %s: %v: %s", flag, err, out)
		}
	}
	parse("-r")
	t.Cleanup(func() { parse("-R") })
}

// TestSEC_19_AppArmorEnforced: the default profile is in force for the container
// and for commands in it, denies what it is for, and lets privilege alone.
func TestSEC_19_AppArmorEnforced(t *testing.T) {
	needAppArmor(t)
	b := newBox(t)
	for what, profile := range map[string]*cri.SecurityProfile{
		"asked for": {ProfileType: cri.SecurityProfile_RuntimeDefault}, "not said": nil,
	} {
		c := b.sleeper(strings.ReplaceAll(what, " ", "-"))
		c.Linux.SecurityContext.Apparmor = profile
		c.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
		id := b.run(c)
		if got := profileOf(b.Daemon, id); got != defaultAppArmorProfile+" (enforce)" {
			t.Errorf("%s: the profile is %q", what, got)
		}
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/attr/current", b.begun(id)))
		if got := strings.TrimSpace(string(text)); err != nil || got != defaultAppArmorProfile+" (enforce)" {
			t.Errorf("%s: the container's own process has %q, %v", what, got, err)
		}
		if out, code := tryExec(t, b.Daemon, id, "mount", "-t", "tmpfs", "none", "/mnt"); code == 0 {
			t.Errorf("%s: a mount is allowed: %s", what, out)
		}
		b.Exec(id, "sh", "-c", "echo x >/tmp/x && cat /tmp/x")
	}
	c := b.sleeper("open")
	c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}
	if got := profileOf(b.Daemon, b.run(c)); got != "unconfined" {
		t.Errorf("unconfined is %q", got)
	}
}

// TestSEC_20_AppArmorLoaded: a profile of the node is in force for the container
// that names it, and a pod's does not become its containers'.
func TestSEC_20_AppArmorLoaded(t *testing.T) {
	needAppArmor(t)
	const name = "gantry-test-denied"
	loadProfile(t, name)
	b := newBox(t)
	for what, edit := range map[string]func(*cri.LinuxContainerSecurityContext){
		"by field": func(s *cri.LinuxContainerSecurityContext) {
			s.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: name}
		},
		"by field with a prefix": func(s *cri.LinuxContainerSecurityContext) {
			s.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "localhost/" + name}
		},
		"by the old field": func(s *cri.LinuxContainerSecurityContext) {
			s.ApparmorProfile = "localhost/" + name //nolint:staticcheck // kubelets of old send it
		},
	} {
		c := b.sleeper(strings.ReplaceAll(what, " ", "-"))
		edit(c.Linux.SecurityContext)
		id := b.run(c)
		if got := profileOf(b.Daemon, id); got != name+" (enforce)" {
			t.Errorf("%s: the profile is %q", what, got)
		}
		b.Exec(id, "mkdir", "/tmp/denied")
		if out, code := tryExec(t, b.Daemon, id, "touch", "/tmp/denied/x"); code == 0 {
			t.Errorf("%s: what the profile denies is allowed: %s", what, out)
		}
		b.Exec(id, "touch", "/tmp/allowed")
	}
}
