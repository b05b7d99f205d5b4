package lifecycle

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
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

// appArmorOf is what a process is confined by.
func appArmorOf(t *testing.T, pid int) string {
	t.Helper()
	begun(t, pid)
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/attr/current", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// TestPOD_24_SandboxAppArmor: the sandbox's process has the profile that the pod
// asks for, which is not that of its containers. One that is not loaded refuses
// the pod.
func TestPOD_24_SandboxAppArmor(t *testing.T) {
	needAppArmor(t)
	const name = "gantry-test-sandbox"
	loadProfile(t, name)
	d := shared(t)
	profile := func(kind cri.SecurityProfile_ProfileType, ref string) func(*cri.PodSandboxConfig) {
		return func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
		}
	}
	for what, row := range map[string]struct {
		edit func(*cri.PodSandboxConfig)
		want string
	}{
		"not-said":   {func(*cri.PodSandboxConfig) {}, defaultAppArmorProfile + " (enforce)"},
		"default":    {profile(cri.SecurityProfile_RuntimeDefault, ""), defaultAppArmorProfile + " (enforce)"},
		"unconfined": {profile(cri.SecurityProfile_Unconfined, ""), "unconfined"},
		"localhost":  {profile(cri.SecurityProfile_Localhost, name), name + " (enforce)"},
		"privileged": {privileged, "unconfined"},
	} {
		p := runPaused(d, what, row.edit)
		if got := appArmorOf(t, pidOf(t, d, p.id)); got != row.want {
			t.Errorf("%s: the sandbox has %q, want %q", what, got, row.want)
		}
		if what == "localhost" {
			b := &box{Daemon: d, t: t, image: plain(t, d), config: p.config, pod: p.id}
			if got := appArmorOf(t, b.pid(b.run(b.sleeper("app")))); got != defaultAppArmorProfile+" (enforce)" {
				t.Errorf("the container has %q", got)
			}
		}
	}
	for what, row := range map[string]struct {
		edit  func(*cri.PodSandboxConfig)
		code  codes.Code
		words string
	}{
		"not-loaded": {profile(cri.SecurityProfile_Localhost, "gantry-no-such-profile"), codes.FailedPrecondition, `"gantry-no-such-profile" is not loaded`},
		"no-name":    {profile(cri.SecurityProfile_Localhost, ""), codes.InvalidArgument, "security_context.apparmor.localhost_ref"},
		"no-kind":    {profile(9, ""), codes.InvalidArgument, "security_context.apparmor.profile_type"},
	} {
		config := d.PodConfig(what)
		row.edit(config)
		if _, err := d.StartPod(t.Context(), config, pausing); err == nil || !strings.Contains(err.Error(), row.code.String()) || !strings.Contains(err.Error(), row.words) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestPOD_25_OldAppArmorString: a container's string is understood where there
// is no typed field, which goes first.
func TestPOD_25_OldAppArmorString(t *testing.T) {
	needAppArmor(t)
	const name = "gantry-test-old"
	loadProfile(t, name)
	b := newBox(t)
	with := func(name, old string, typed *cri.SecurityProfile) *cri.ContainerConfig {
		c := b.sleeper(name)
		c.Linux.SecurityContext.Apparmor, c.Linux.SecurityContext.ApparmorProfile = typed, old //nolint:staticcheck // kubelets of old send it
		return c
	}
	for what, row := range map[string]struct {
		old   string
		typed *cri.SecurityProfile
		want  string
	}{
		"default":    {"runtime/default", nil, defaultAppArmorProfile + " (enforce)"},
		"unconfined": {"unconfined", nil, "unconfined"},
		"localhost":  {"localhost/" + name, nil, name + " (enforce)"},
		"both":       {"localhost/" + name, &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}, "unconfined"},
	} {
		if got := appArmorOf(t, b.pid(b.run(with(what, row.old, row.typed)))); got != row.want {
			t.Errorf("%s: the profile is %q, want %q", what, got, row.want)
		}
	}
	b.refused(with("not-loaded", "localhost/gantry-no-such-profile", nil), codes.FailedPrecondition, "gantry-no-such-profile", "not loaded")
	b.refused(with("no-kind", "strict", nil), codes.InvalidArgument, "security_context.apparmor_profile", "strict")
}
