package lifecycle

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// procStatus is /proc/PID/status of a running container.
func (b *box) procStatus(id string) string {
	b.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.begun(id)))
	if err != nil {
		b.t.Fatal(err)
	}
	return string(text)
}

// capsOf reads a set of capabilities from a process's status.
func capsOf(t *testing.T, status, set string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(field(t, status, set+":"), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// bounding is what no container can go beyond here: the daemon's own set.
func (b *box) bounding() uint64 {
	b.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.PID()))
	if err != nil {
		b.t.Fatal(err)
	}
	return capsOf(b.t, string(text), "CapBnd")
}

const (
	netAdmin = uint64(1) << unix.CAP_NET_ADMIN
	chown    = uint64(1) << unix.CAP_CHOWN
	netRaw   = uint64(1) << unix.CAP_NET_RAW
	sysAdmin = uint64(1) << unix.CAP_SYS_ADMIN
)

func TestSEC_01_Capabilities(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	eff := func(name string, c *cri.Capability) uint64 {
		config := b.sleeper(name)
		config.Linux.SecurityContext.Capabilities = c
		id := b.run(config)
		text := b.procStatus(id)
		caps := capsOf(t, text, "CapEff")
		if bound := capsOf(t, text, "CapBnd"); bound != caps {
			t.Errorf("%s: effective %x, bounding %x", name, caps, bound)
		}
		if exec := capsOf(t, b.Exec(id, "cat", "/proc/self/status"), "CapEff"); exec != caps {
			t.Errorf("%s: a command has %x, the container %x", name, exec, caps)
		}
		return caps
	}
	normal := eff("normal", nil)
	if normal&chown == 0 || normal&netRaw == 0 || normal&(netAdmin|sysAdmin) != 0 {
		t.Errorf("by default %x", normal)
	}
	if got := eff("add", &cri.Capability{AddCapabilities: []string{"NET_ADMIN"}}); got != normal|netAdmin {
		t.Errorf("with NET_ADMIN %x", got)
	}
	if got := eff("drop", &cri.Capability{DropCapabilities: []string{"CHOWN", "NET_RAW"}}); got != normal&^(chown|netRaw) {
		t.Errorf("without CHOWN, NET_RAW %x", got)
	}
	if got := eff("none", &cri.Capability{DropCapabilities: []string{"ALL"}}); got != 0 {
		t.Errorf("without all %x", got)
	}
	if got := eff("only", &cri.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"CHOWN"}}); got != chown {
		t.Errorf("with CHOWN only %x", got)
	}
	if got := eff("all-but", &cri.Capability{AddCapabilities: []string{"ALL"}, DropCapabilities: []string{"SYS_ADMIN"}}); got != b.bounding()&^sysAdmin {
		t.Errorf("with all but SYS_ADMIN %x", got)
	}
	c := b.sleeper("unknown")
	c.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"NO_SUCH"}}
	b.refused(c, codes.InvalidArgument, "NO_SUCH")
	// Out of hand: it can chown only where it may.
	out, code := tryExec(t, b.Daemon, b.run(func() *cri.ContainerConfig {
		c := b.sleeper("effect")
		c.Linux.SecurityContext.Capabilities = &cri.Capability{DropCapabilities: []string{"CHOWN"}}
		return c
	}()), "sh", "-c", "touch /tmp/f && chown 1 /tmp/f")
	if code == 0 || !strings.Contains(out, "not permitted") {
		t.Errorf("chown without CHOWN: %q, %d", out, code)
	}
}

// TestSEC_02_AmbientCapabilities: a process that is not root's has what was
// named and nothing else, and so have commands; what inherits by a file is no
// more than that.
func TestSEC_02_AmbientCapabilities(t *testing.T) {
	t.Parallel()
	const bind = uint64(1) << unix.CAP_NET_BIND_SERVICE
	b := newBox(t, privileged)
	run := func(name string, user int64, c *cri.Capability, edits ...func(*cri.LinuxContainerSecurityContext)) (string, map[string]uint64) {
		config := b.sleeper(name)
		config.Linux.SecurityContext.Capabilities = c
		config.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: user}
		for _, edit := range edits {
			edit(config.Linux.SecurityContext)
		}
		id := b.run(config)
		command := b.Exec(id, "cat", "/proc/self/status")
		sets := map[string]uint64{}
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			sets[set] = capsOf(t, b.procStatus(id), set)
			if got := capsOf(t, command, set); got != sets[set] {
				t.Errorf("%s: %s of a command is %x, the container's %x", name, set, got, sets[set])
			}
		}
		return id, sets
	}
	want := func(name string, sets map[string]uint64, ambient, effective uint64) {
		t.Helper()
		if sets["CapAmb"] != ambient || sets["CapInh"] != ambient || sets["CapPrm"] != effective || sets["CapEff"] != effective {
			t.Errorf("%s: %x, want ambient %x and effective %x", name, sets, ambient, effective)
		}
	}
	_, normal := run("none", 1000, nil)
	want("none", normal, 0, 0)
	id, sets := run("one", 1000, &cri.Capability{AddAmbientCapabilities: []string{"NET_ADMIN", "cap_chown"}})
	want("one", sets, netAdmin|chown, netAdmin|chown)
	if sets["CapBnd"] != normal["CapBnd"]|netAdmin {
		t.Errorf("bounding %x, without it %x", sets["CapBnd"], normal["CapBnd"])
	}
	// It counts, and in the program that a program runs too.
	b.Exec(id, "sh", "-c", "touch /tmp/f && chown 7 /tmp/f && [ $(stat -c %u /tmp/f) = 7 ] && ip link set lo down && ip link set lo up")
	_, sets = run("only", 1000, &cri.Capability{DropCapabilities: []string{"ALL"}, AddAmbientCapabilities: []string{"NET_BIND_SERVICE"}})
	want("only", sets, bind, bind)
	_, sets = run("dropped", 1000, &cri.Capability{DropCapabilities: []string{"CHOWN"}, AddAmbientCapabilities: []string{"CHOWN"}})
	want("dropped", sets, 0, 0)
	_, sets = run("all", 1000, &cri.Capability{AddCapabilities: []string{"ALL"}, AddAmbientCapabilities: []string{"ALL"}})
	want("all", sets, b.bounding(), b.bounding())
	_, sets = run("root", 0, &cri.Capability{AddAmbientCapabilities: []string{"NET_ADMIN"}})
	want("root", sets, netAdmin, normal["CapBnd"]|netAdmin)
	all := func(s *cri.LinuxContainerSecurityContext) { s.Privileged = true }
	_, sets = run("privileged", 1000, nil, all)
	want("privileged", sets, 0, 0)
	_, sets = run("privileged-asked", 1000, &cri.Capability{AddAmbientCapabilities: []string{"SYS_ADMIN"}}, all)
	want("privileged-asked", sets, sysAdmin, sysAdmin)
	c := b.sleeper("unknown")
	c.Linux.SecurityContext.Capabilities = &cri.Capability{AddAmbientCapabilities: []string{"NO_SUCH"}}
	b.refused(c, codes.InvalidArgument, "add_ambient_capabilities", "NO_SUCH")
}

// privileged makes a pod one of privileged containers.
func privileged(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true }

func (b *box) privilegedSleeper(name string) *cri.ContainerConfig {
	c := b.sleeper(name)
	c.Linux.SecurityContext.Privileged = true
	c.Linux.SecurityContext.MaskedPaths = []string{"/proc/meminfo"}
	c.Linux.SecurityContext.ReadonlyPaths = []string{"/proc/sys"}
	c.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
	return c
}

func TestSEC_05_Privileged(t *testing.T) {
	t.Parallel()
	b := newBox(t, privileged)
	id := b.run(b.privilegedSleeper("app"))
	text := b.procStatus(id)
	if got, want := capsOf(t, text, "CapEff"), b.bounding(); got != want {
		t.Errorf("capabilities %x, want %x", got, want)
	}
	if got := field(t, text, "Seccomp:"); got != "0" {
		t.Errorf("Seccomp is %s", got)
	}
	if got := field(t, text, "NoNewPrivs:"); got != "0" {
		t.Errorf("NoNewPrivs is %s", got)
	}
	if got := sh(b.Daemon, id, "wc -c </proc/meminfo"); got == "0" {
		t.Error("a path is masked")
	}
	for what, script := range map[string]string{
		"/proc/sys":   "echo $(cat /proc/sys/kernel/domainname) >/proc/sys/kernel/domainname",
		"mount":       "mkdir /tmp/m && mount -t tmpfs none /tmp/m && touch /tmp/m/x",
		"/sys":        "mkdir /sys/fs/bpf/x || grep ' /sys ' /proc/mounts | grep -w rw || { cat /proc/mounts; exit 1; }",
		"cgroup":      makeCgroup,
		"device node": "[ -c /dev/kmsg ] && head -c 1 /dev/urandom >/dev/null && mknod /tmp/fuse c 10 229 && : <>/tmp/fuse",
	} {
		if out, code := tryExec(t, b.Daemon, id, "sh", "-c", script); code != 0 {
			t.Errorf("%s: %s", what, out)
		}
	}
	other := newBox(t)
	c := other.sleeper("app")
	c.Linux.SecurityContext.Privileged = true
	if _, err := other.create(c); err == nil {
		t.Error("a pod that is not privileged got a privileged container")
	}
}

func TestSEC_06_Identity(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	number := func(n int64) *cri.Int64Value { return &cri.Int64Value{Value: n} }
	asAlice := image(t, b.Daemon, images.Spec{User: images.Alice})
	for name, row := range map[string]struct {
		image string
		edit  func(*cri.LinuxContainerSecurityContext)
		want  string
	}{
		"default":  {b.image, func(*cri.LinuxContainerSecurityContext) {}, "0:0"},
		"image":    {asAlice, func(*cri.LinuxContainerSecurityContext) {}, "1000:1000"},
		"number":   {b.image, func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = number(2000) }, "2000:2000"},
		"stranger": {b.image, func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = number(4242) }, "4242:0"},
		"name":     {asAlice, func(s *cri.LinuxContainerSecurityContext) { s.RunAsUsername = images.Bob }, "2000:2000"},
		"group":    {b.image, func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser, s.RunAsGroup = number(1000), number(77) }, "1000:77"},
		"root":     {asAlice, func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = number(0) }, "0:0"},
	} {
		c := daemon.ContainerConfig(name, row.image)
		row.edit(c.Linux.SecurityContext)
		id := b.run(c)
		text := b.procStatus(id)
		got := strings.Fields(field(t, text, "Uid:"))[1] + ":" + strings.Fields(field(t, text, "Gid:"))[1]
		if exec := sh(b.Daemon, id, "echo $(id -u):$(id -g)"); got != row.want || exec != got {
			t.Errorf("%s: the container is %s, a command %s, want %s", name, got, exec, row.want)
		}
	}
	c := b.sleeper("group-alone")
	c.Linux.SecurityContext.RunAsGroup = number(77)
	b.refused(c, codes.InvalidArgument, "run_as_group")
	c = b.sleeper("unknown-name")
	c.Linux.SecurityContext.RunAsUsername = "nobody-knows"
	if _, err := b.create(c); err == nil || !strings.Contains(err.Error(), "nobody-knows") {
		t.Errorf("an unknown user: %v", err)
	}
}

func TestSEC_07_ReadonlyRootfs(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	volume := t.TempDir()
	c := b.sleeper("app")
	c.Linux.SecurityContext.ReadonlyRootfs = true
	c.Mounts = []*cri.Mount{{HostPath: volume, ContainerPath: "/volume"}}
	id := b.run(c)
	for _, path := range []string{"/x", "/etc/x", "/tmp/x"} {
		if out, code := tryExec(t, b.Daemon, id, "touch", path); code == 0 || !strings.Contains(out, "Read-only") {
			t.Errorf("touch %s: %q, %d", path, out, code)
		}
	}
	b.Exec(id, "touch", "/volume/x", "/dev/shm/x")
	if !exists(filepath.Join(volume, "x")) {
		t.Error("nothing came out of the volume")
	}
}

// groupsOf are the supplemental groups of a container's process, sorted.
func (b *box) groupsOf(id string) []string {
	b.t.Helper()
	groups := strings.Fields(field(b.t, b.procStatus(id), "Groups:"))
	slices.Sort(groups)
	return groups
}

func TestSEC_08_SupplementalGroups(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.sleeper("app")
	c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: images.BobUID}
	c.Linux.SecurityContext.SupplementalGroups = []int64{5000, 6000}
	id := b.run(c)
	got := b.groupsOf(id)
	if !slices.Contains(got, "5000") || !slices.Contains(got, "6000") {
		t.Errorf("groups are %q", got)
	}
	if exec := strings.Fields(sh(b.Daemon, id, "id -G")); !slices.Contains(exec, "5000") || !slices.Contains(exec, "6000") {
		t.Errorf("a command has %q", exec)
	}
}

// TestSEC_09_SupplementalGroupsPolicy: the image says that alice is in a group
// of its own.
func TestSEC_09_SupplementalGroupsPolicy(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	for policy, want := range map[cri.SupplementalGroupsPolicy]bool{
		cri.SupplementalGroupsPolicy_Merge: true, cri.SupplementalGroupsPolicy_Strict: false,
	} {
		c := b.sleeper(strings.ToLower(policy.String()))
		sc := c.Linux.SecurityContext
		sc.RunAsUser, sc.SupplementalGroups, sc.SupplementalGroupsPolicy = &cri.Int64Value{Value: images.AliceUID}, []int64{5000}, policy
		got := b.groupsOf(b.run(c))
		if slices.Contains(got, fmt.Sprint(images.GroupGID)) != want || !slices.Contains(got, "5000") {
			t.Errorf("%s: groups are %q", policy, got)
		}
	}
	c := b.sleeper("unknown")
	c.Linux.SecurityContext.SupplementalGroupsPolicy = 77
	b.refused(c, codes.InvalidArgument, "supplemental_groups_policy")
}

func TestSEC_10_NoNewPrivs(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	for want, on := range []bool{false, true} {
		c := b.sleeper(fmt.Sprint("nnp-", on))
		c.Linux.SecurityContext.NoNewPrivs = on
		id := b.run(c)
		if got := field(t, b.procStatus(id), "NoNewPrivs:"); got != fmt.Sprint(want) {
			t.Errorf("no_new_privs %v: NoNewPrivs is %s", on, got)
		}
		if got := field(t, b.Exec(id, "cat", "/proc/self/status"), "NoNewPrivs:"); got != fmt.Sprint(want) {
			t.Errorf("no_new_privs %v: of a command NoNewPrivs is %s", on, got)
		}
	}
}

func TestSEC_11_MaskedAndReadonlyPaths(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.sleeper("masked")
	c.Linux.SecurityContext.MaskedPaths = []string{"/proc/meminfo", "/home", "/no/such"}
	c.Linux.SecurityContext.ReadonlyPaths = []string{"/proc/sys", "/tmp"}
	id := b.run(c)
	if got := sh(b.Daemon, id, "cat /proc/meminfo; ls /home"); got != "" {
		t.Errorf("masked paths show %q", got)
	}
	for _, script := range []string{"touch /tmp/x", "echo x >/proc/sys/kernel/domainname"} {
		if out, code := tryExec(t, b.Daemon, id, "sh", "-c", script); code == 0 || !strings.Contains(out, "Read-only") {
			t.Errorf("%s: %q, %d", script, out, code)
		}
	}
	id = b.run(b.sleeper("open"))
	if got := sh(b.Daemon, id, "wc -l </proc/meminfo; ls /home"); strings.HasPrefix(got, "0") || !strings.Contains(got, images.Alice) {
		t.Errorf("without lists: %q", got)
	}
	b.Exec(id, "touch", "/tmp/x")
	c = b.sleeper("relative")
	c.Linux.SecurityContext.MaskedPaths = []string{"relative"}
	b.refused(c, codes.InvalidArgument, "masked_paths")
}

// withSeccomp is a sleeper under a profile.
func (b *box) withSeccomp(name string, p *cri.SecurityProfile) *cri.ContainerConfig {
	c := b.sleeper(name)
	c.Linux.SecurityContext.Seccomp = p
	return c
}

// TestSEC_12_SeccompDefault: the built-in profile stops what needs privileges,
// and lets those through who have them.
func TestSEC_12_SeccompDefault(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.withSeccomp("default", &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}))
	if got := field(t, b.procStatus(id), "Seccomp:"); got != "2" {
		t.Errorf("Seccomp is %s", got)
	}
	if got := field(t, b.Exec(id, "cat", "/proc/self/status"), "Seccomp:"); got != "2" {
		t.Errorf("of a command Seccomp is %s", got)
	}
	for _, command := range []string{"unshare -U true", "unshare -m true", "mount -t tmpfs none /tmp"} {
		if out, code := tryExec(t, b.Daemon, id, "sh", "-c", command); code == 0 || !strings.Contains(out, "not permitted") && !strings.Contains(out, "denied") {
			t.Errorf("%s: %q, %d", command, out, code)
		}
	}
	c := b.withSeccomp("admin", &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault})
	c.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
	b.Exec(b.run(c), "unshare", "-m", "true")
}

func TestSEC_13_SeccompLocalhostAndUnconfined(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.withSeccomp("unconfined", &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}))
	if got := field(t, b.procStatus(id), "Seccomp:"); got != "0" {
		t.Errorf("unconfined: Seccomp is %s", got)
	}
	b.Exec(id, "unshare", "-U", "true")
	dir := t.TempDir()
	profile := func(name, text string) *cri.SecurityProfile {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: path}
	}
	id = b.run(b.withSeccomp("localhost", profile("good.json",
		`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}`)))
	if out, code := tryExec(t, b.Daemon, id, "mkdir", "/tmp/x"); code == 0 || !strings.Contains(out, "not permitted") {
		t.Errorf("mkdir under a profile that forbids it: %q, %d", out, code)
	}
	b.Exec(id, "touch", "/tmp/x")
	for name, p := range map[string]*cri.SecurityProfile{
		"missing.json": {ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: filepath.Join(dir, "missing.json")},
		"broken.json":  profile("broken.json", `{"defaultAction":`),
	} {
		_, err := b.create(b.withSeccomp(strings.TrimSuffix(name, ".json"), p))
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSEC_26_DeviceDefaultDeny: no node of the host works that was not given.
func TestSEC_26_DeviceDefaultDeny(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	for _, node := range []string{"c 1 1", "c 10 229", "b 7 0"} {
		script := "rm -f /tmp/n; mknod /tmp/n " + node + " && : </tmp/n"
		if out, code := tryExec(t, b.Daemon, id, "sh", "-c", script); code == 0 || !strings.Contains(out, "not permitted") {
			t.Errorf("device %s: %q, %d", node, out, code)
		}
	}
	b.Exec(id, "sh", "-c", "mknod /tmp/null c 1 3 && echo x >/tmp/null && : </dev/zero && : </dev/full && : </dev/urandom")
	if got := sh(b.Daemon, id, "ls /dev"); strings.Contains(got, "kmsg") || strings.Contains(got, "loop") {
		t.Errorf("/dev has %q", got)
	}
}

// TestSEC_36_PathEscape: what an image brings never leads out of the root
// filesystem.
func TestSEC_36_PathEscape(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	outside := t.TempDir()
	up := "../../../../../../../../.." + outside
	evil := image(t, b.Daemon, images.Spec{Layers: [][]images.File{{
		images.Symlink("absolute", outside), images.Symlink("relative", up), images.Dir("safe", 0o755),
	}}})
	for _, link := range []string{"absolute", "relative"} {
		c := daemon.ContainerConfig(link, evil)
		c.WorkingDir = "/" + link + "/cwd"
		c.Mounts = []*cri.Mount{
			{HostPath: t.TempDir(), ContainerPath: "/" + link + "/mount"},
			{HostPath: t.TempDir(), ContainerPath: "/safe/../" + link + "/dots"},
		}
		if id, err := b.create(c); err == nil {
			if err := b.start(id); err != nil {
				t.Logf("%s does not start, which is safe: %v", link, err)
			}
		}
	}
	for name, files := range map[string][]images.File{
		"dots":    {images.Text(up+"/dots", "x")},
		"link":    {images.Symlink("out", outside), images.Text("out/link", "x")},
		"uplink":  {images.Symlink("up", up), images.Text("up/uplink", "x")},
		"hard":    {images.Hardlink("hard", up+"/target"), images.Text("hard", "changed")},
		"removal": {images.Symlink("gone", outside), images.Whiteout("gone/target")},
	} {
		if err := os.WriteFile(filepath.Join(outside, "target"), []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		ref := push(t, "evil:"+name, images.MustBuild(images.Spec{Layers: [][]images.File{files}}))
		if _, err := pull(t.Context(), b.Daemon, ref, nil); err == nil {
			id, err := b.create(daemon.ContainerConfig("layer-"+name, ref))
			if err == nil {
				_ = b.start(id)
			}
		}
		text, err := os.ReadFile(filepath.Join(outside, "target"))
		if err != nil || string(text) != "mine" {
			t.Errorf("%s: the file outside says %q, %v", name, text, err)
		}
	}
	left, err := os.ReadDir(outside)
	if err != nil || len(left) != 1 {
		t.Errorf("outside are %v, %v", left, err)
	}
}

// TestSEC_12_FilterCompiledOnce: crun, which would compile the profile for each container,
// is given what it compiled for the first, in containers and in what is executed in them;
// another profile is another filter.
func TestSEC_12_FilterCompiledOnce(t *testing.T) {
	t.Parallel()
	d := start(t, append(under(t, noHybridProgram, noHybridDaemon), daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		addHandler(in, c, "as-it-is", daemon.Config{
			"runtime_type": "io.containerd.gantry.v2", "sandboxer": "shim", "options": in.RuncOptions(daemon.Config{"BinaryName": "crun"}),
		})
	}))...)
	b := boxWith(t, d, "as-it-is", hostNetwork)
	other := filepath.Join(t.TempDir(), "no-mkdir.json")
	text := `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}`
	must(os.WriteFile(other, []byte(text), 0o644))
	byDefault := &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
	local := &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: other}
	for _, step := range []struct {
		name    string
		profile *cri.SecurityProfile
		given   bool
	}{
		{"first", byDefault, false}, {"second", byDefault, true}, {"local", local, false}, {"again", local, true},
		{"none", nil, false}, {"third", byDefault, true},
	} {
		id := b.run(b.withSeccomp(step.name, step.profile))
		spec := string(bundleFile(t, b.Daemon, id, "config.json"))
		if got := strings.Contains(spec, "run.oci.seccomp_bpf_data"); got != step.given {
			t.Errorf("%s: crun is given a filter: %v", step.name, got)
		}
		out := sh(b.Daemon, id, "unshare -U true 2>/dev/null && echo unshares; mkdir /tmp/x 2>/dev/null && echo makes; true")
		if want := map[*cri.SecurityProfile]string{byDefault: "makes", local: "unshares", nil: "unshares\nmakes"}[step.profile]; strings.TrimSpace(out) != want {
			t.Errorf("%s: what is executed in it %q, want %q", step.name, out, want)
		}
		want := "2"
		if step.profile == nil {
			want = "0"
		}
		for whose, status := range map[string]string{"its first process": b.procStatus(id), "a command": b.Exec(id, "cat", "/proc/self/status")} {
			if got := field(t, status, "Seccomp:"); got != want {
				t.Errorf("%s: Seccomp of %s is %s", step.name, whose, got)
			}
		}
	}
}
