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

// saying gives the pod an annotation.
func saying(name, value string) func(*cri.PodSandboxConfig) {
	return func(c *cri.PodSandboxConfig) { c.Annotations = map[string]string{name: value} }
}

// allowing lets annotations have an effect in pods of the default handler, and
// adds a handler "strict" where none has.
func allowing(names ...string) daemon.Option {
	return daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		c.Set(names, "plugins", daemon.RuntimePlugin, "containerd", "runtimes", ownTable(), "allowed_annotations")
		addHandler(in, c, "strict", nil)
	})
}

// refusedPod runs a pod that must not come into being.
func refusedPod(t *testing.T, d *daemon.Daemon, name string, edit func(*cri.PodSandboxConfig), code codes.Code, words ...string) {
	t.Helper()
	config := d.PodConfig(name)
	edit(config)
	_, err := d.StartPod(t.Context(), config, "")
	wantError(t, err, code, words...)
	list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: config.Labels}})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range list.Items {
		if p.Metadata.Name == config.Metadata.Name {
			t.Errorf("after a refused run there is %v", p)
		}
	}
}

// TestPOD_20_SandboxReadonlyRootfs: nothing can be written in a pod's sandbox,
// whether the request says so or not.
func TestPOD_20_SandboxReadonlyRootfs(t *testing.T) {
	t.Parallel()
	d := shared(t)
	for _, asked := range []bool{true, false} {
		p := runPaused(d, fmt.Sprint("readonly-", asked), func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.ReadonlyRootfs = asked })
		if !specOf(t, d, p.id).Root.Readonly {
			t.Errorf("asked %v: the specification has a writable root", asked)
		}
		err := os.WriteFile(fmt.Sprintf("/proc/%d/root/written", pidOf(t, d, p.id)), nil, 0o600)
		if err == nil || !strings.Contains(err.Error(), "read-only") {
			t.Errorf("asked %v: writing gives %v", asked, err)
		}
	}
}

// TestDEV_05_AdditionalDevices: every container has them without asking, with
// the permissions of the node, and one that is absent is told of.
func TestDEV_05_AdditionalDevices(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t, runtimeKey([]string{"/dev/fuse:/dev/extra:rw", "/dev/kmsg:r"}, "additional_devices")))
	c := b.sleeper("app")
	c.Devices = []*cri.Device{{HostPath: "/dev/null", ContainerPath: "/dev/kmsg", Permissions: "rw"}}
	id := b.run(c)
	if got := sh(b.Daemon, id, "[ -c /dev/extra ] && (: <>/dev/extra) && stat -c %t:%T /dev/extra /dev/kmsg"); got != "a:e5\n1:3" {
		t.Errorf("the devices are %q", got)
	}
	// Another path to it has no more rights: mknod is not the container's.
	if out, code := tryExec(t, b.Daemon, id, "sh", "-c", "mknod /x c 10 229 && echo made"); code != 0 {
		t.Errorf("mknod: %s", out)
	}
	if got := sh(b.Daemon, b.run(b.sleeper("other")), "stat -c %t:%T /dev/kmsg"); got != "1:b" {
		t.Errorf("in the other container it is %q", got)
	}
	absent := newBoxOn(t, start(t, runtimeKey([]string{"/dev/gantry-no-such"}, "additional_devices")))
	absent.refused(absent.sleeper("app"), codes.NotFound, "additional_devices", "/dev/gantry-no-such")
}

// TestDEV_06_AllowedDevices: a pod gets what its annotation lists and the node
// allows, where the handler lets it ask.
func TestDEV_06_AllowedDevices(t *testing.T) {
	t.Parallel()
	d := start(t, runtimeKey([]string{"/dev/fuse", "/dev/kmsg"}, "allowed_devices"), allowing("io.kubernetes.cri-o.Devices", "devices.crio.io"))
	look := "for d in /dev/fuse /dev/mine; do [ -c $d ] && (: <>$d) 2>/dev/null && echo $d; done; true"
	for name, value := range map[string]string{"io.kubernetes.cri-o.Devices": "/dev/fuse", "devices.crio.io": "/dev/kmsg:r, /dev/fuse:/dev/mine:rw"} {
		want := map[string]string{"io.kubernetes.cri-o.Devices": "/dev/fuse", "devices.crio.io": "/dev/mine"}[name]
		b := onHandler(t, d, "dev06-"+strings.ToLower(name), "", saying(name, value))
		if got := sh(d, b.run(b.sleeper("app")), look); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
		b = onHandler(t, d, "dev06-strict-"+strings.ToLower(name), "strict", saying(name, value))
		if got := sh(d, b.run(b.sleeper("app")), look); got != "" {
			t.Errorf("%s, not allowed: %q", name, got)
		}
	}
	b := onHandler(t, d, "dev06-other", "", saying("devices.crio.io", "/dev/fuse,/dev/loop0"))
	b.refused(b.sleeper("app"), codes.PermissionDenied, "devices.crio.io", "/dev/loop0", "allowed_devices")
	b = onHandler(t, d, "dev06-bad", "", saying("devices.crio.io", "/dev/fuse:x"))
	b.refused(b.sleeper("app"), codes.InvalidArgument, "devices.crio.io")
}

// TestSEC_16_PrivilegedSeccompProfile: what the profile forbids is forbidden in
// privileged containers, and in no others, and the pod itself runs.
func TestSEC_16_PrivilegedSeccompProfile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "privileged.json")
	profileFile(t, path, "mkdir", "mkdirat")
	b := newBoxOn(t, start(t, runtimeKey(path, "privileged_seccomp_profile")), privileged)
	id := b.run(b.privilegedSleeper("app"))
	b.forbids(id, "mkdir", "/tmp/x")
	if got := field(t, b.procStatus(id), "Seccomp:"); got != "2" {
		t.Errorf("Seccomp is %s", got)
	}
	b.Exec(b.run(b.sleeper("other")), "mkdir", "/tmp/x")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	b.refused(b.privilegedSleeper("late"), codes.NotFound, path)
}

// TestSEC_32_Umask: the pod's umask is that of its containers and of commands in
// them, where the handler allows it.
func TestSEC_32_Umask(t *testing.T) {
	t.Parallel()
	d := start(t, allowing("umask.crio.io", "io.kubernetes.cri-o.umask"))
	made := "touch /made && stat -c %a /made; umask"
	for _, name := range []string{"umask.crio.io", "io.kubernetes.cri-o.umask"} {
		b := onHandler(t, d, "sec32-"+strings.ToLower(name), "", saying(name, "077"))
		if got := b.output(b.script("app", made)); got != "600\n0077\n" {
			t.Errorf("%s: %q", name, got)
		}
		if got := sh(d, b.run(b.sleeper("exec")), made); got != "600\n0077" {
			t.Errorf("%s, a command: %q", name, got)
		}
		b = onHandler(t, d, "sec32-strict-"+strings.ToLower(name), "strict", saying(name, "077"))
		if got := b.output(b.script("app", made)); got != "644\n0022\n" {
			t.Errorf("%s, not allowed: %q", name, got)
		}
	}
	b := onHandler(t, d, "sec32-bad", "", saying("umask.crio.io", "079"))
	b.refused(b.sleeper("app"), codes.InvalidArgument, "umask.crio.io", "079")
}

// TestMNT_24_ShmSize: /dev/shm is as large as the pod wants it, where the handler
// allows it.
func TestMNT_24_ShmSize(t *testing.T) {
	t.Parallel()
	d := start(t, allowing("shm-size.crio.io", "io.kubernetes.cri-o.ShmSize"))
	size := func(b *box) string {
		return b.output(b.script("app", `set -- $(df -k /dev/shm | tail -1); echo $2`))
	}
	for name, value := range map[string]string{"shm-size.crio.io": "128Mi", "io.kubernetes.cri-o.ShmSize": "16Mi"} {
		want := map[string]string{"128Mi": "131072\n", "16Mi": "16384\n"}[value]
		if got := size(onHandler(t, d, "mnt24-"+value[:2], "", saying(name, value))); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
		if got := size(onHandler(t, d, "mnt24-strict-"+value[:2], "strict", saying(name, value))); got != "65536\n" {
			t.Errorf("%s, not allowed: %q", name, got)
		}
	}
	refusedPod(t, d, "mnt24-bad", saying("shm-size.crio.io", "1Mi,size=9"), codes.InvalidArgument, "shm-size.crio.io", "1Mi,size=9")
}

// TestMNT_03_AbsentMountSources: a source on the list must be there; one that is
// not listed becomes a directory.
func TestMNT_03_AbsentMountSources(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	listed, other := filepath.Join(dir, "hostname"), filepath.Join(dir, "other")
	b := newBoxOn(t, start(t, runtimeKey([]string{listed}, "absent_mount_sources_to_reject")))
	with := func(name, source string) *cri.ContainerConfig {
		c := b.sleeper(name)
		c.Mounts = []*cri.Mount{{HostPath: source, ContainerPath: "/mounted"}}
		return c
	}
	b.refused(with("listed", listed), codes.FailedPrecondition, listed, "absent_mount_sources_to_reject")
	if exists(listed) {
		t.Error("the source was made")
	}
	b.Exec(b.run(with("other", other)), "touch", "/mounted/x")
	if !exists(filepath.Join(other, "x")) {
		t.Error("the other source is not what is mounted")
	}
	if err := os.Mkdir(listed, 0o755); err != nil {
		t.Fatal(err)
	}
	b.Exec(b.run(with("there", listed)), "touch", "/mounted/x")
}

// TestMNT_20_BindMountPrefix: what is mounted is looked for below the prefix, and
// links there do not lead out of it.
func TestMNT_20_BindMountPrefix(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	for _, dir := range []string{"data", "etc"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "data", "file"), []byte("below"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/data", filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	b := newBoxOn(t, start(t, runtimeKey(root, "bind_mount_prefix")))
	c := b.sleeper("app")
	c.Mounts = []*cri.Mount{
		{HostPath: "/data", ContainerPath: "/one"}, {HostPath: "/link", ContainerPath: "/two"}, {HostPath: "/etc", ContainerPath: "/three"},
		{HostPath: "/made/here", ContainerPath: "/four"},
	}
	if got := sh(b.Daemon, b.run(c), "cat /one/file /two/file; ls /three | wc -l; touch /four/x"); got != "belowbelow0" {
		t.Errorf("inside are %q", got)
	}
	if !exists(filepath.Join(root, "made", "here", "x")) {
		t.Error("an absent source was not made below the prefix")
	}
}

// TestMNT_19_DefaultMountsFile: every container has the mounts of the file,
// read-only, unless the pod mounts something else there.
func TestMNT_19_DefaultMountsFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, source := filepath.Join(dir, "mounts.conf"), filepath.Join(dir, "secrets")
	if err := os.Mkdir(source, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(source, "token"), []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("# of the node\n" + source + ":/run/secrets\n" + source + ":/second\n" + dir + "/absent:/absent\n")
	b := newBoxOn(t, start(t, runtimeKey(file, "default_mounts_file")))
	c := b.sleeper("app")
	c.Mounts = []*cri.Mount{{HostPath: t.TempDir(), ContainerPath: "/second"}}
	id := b.run(c)
	if got := sh(b.Daemon, id, "cat /run/secrets/token; ls /second | wc -l; [ -e /absent ] || echo none; touch /run/secrets/x 2>/dev/null || echo readonly"); got != "secret0\nnone\nreadonly" {
		t.Errorf("inside are %q", got)
	}
	write("secrets:/run/secrets\n")
	b.refused(b.sleeper("bad"), codes.InvalidArgument, "default_mounts_file", file+":1")
}

// TestMNT_26_Timezone: containers have the node's choice of a time zone, and a
// pod that brings its own keeps it.
func TestMNT_26_Timezone(t *testing.T) {
	t.Parallel()
	zone := func(key string, mounts ...*cri.Mount) string {
		b := newBoxOn(t, start(t, runtimeKey(key, "timezone")))
		c := b.script("app", "date +%Z")
		c.Mounts = mounts
		return strings.TrimSpace(b.output(c))
	}
	if got := zone("Asia/Tokyo"); got != "JST" {
		t.Errorf("in Tokyo it is %q", got)
	}
	if got := zone("Asia/Tokyo", &cri.Mount{HostPath: "/usr/share/zoneinfo/Asia/Kolkata", ContainerPath: "/etc/localtime", Readonly: true}); got != "IST" {
		t.Errorf("the pod's own is %q", got)
	}
	cmd := exec.Command("date", "+%Z")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")} // without TZ
	own, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := zone("Local"); got != strings.TrimSpace(string(own)) {
		t.Errorf("it is %q, on the node %q", got, own)
	}
	in, err := daemon.Launch(t.Context(), options(runtimeKey("No/Such", "timezone"), daemon.Edit(requireCRI))...)
	if err == nil {
		t.Error("a zone that there is not was taken")
		must(in.Close())
	} else if !strings.Contains(err.Error(), "timezone") {
		t.Errorf("an unknown zone: %v", err)
	}
}

// TestSEC_30_MinimumMappableIDs: a user namespace below the bound is refused to
// who does not run as root, and above it is not.
func TestSEC_30_MinimumMappableIDs(t *testing.T) {
	t.Parallel()
	u := newRange()
	first := hostRoot(u)
	d := start(t, runtimeKey(int64(first), "minimum_mappable_uid"), runtimeKey(int64(first), "minimum_mappable_gid"))
	as := func(user int64, u *cri.UserNamespace) func(*cri.PodSandboxConfig) {
		return func(c *cri.PodSandboxConfig) {
			withUserns(u)(c)
			c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: user}
		}
	}
	low := func(ids []*cri.IDMapping) []*cri.IDMapping {
		return []*cri.IDMapping{{HostId: first - ids[0].Length, Length: ids[0].Length}}
	}
	refusedPod(t, d, "low-uid", as(1000, &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: low(u.Uids), Gids: u.Gids}), codes.InvalidArgument, "uids[0]", "minimum_mappable_uid")
	refusedPod(t, d, "low-gid", as(1000, &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: u.Uids, Gids: low(u.Gids)}), codes.InvalidArgument, "gids[0]", "minimum_mappable_gid")
	needsUserns(t, d)
	runPod(d, "high", as(1000, u))
	runPod(d, "root", as(0, &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: low(u.Uids), Gids: low(u.Gids)}))
}

// TestSEC_34_ReadOnlyNode: no unprivileged container writes to its root
// filesystem, all can write where programs expect to, and privileged ones are
// left alone.
func TestSEC_34_ReadOnlyNode(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t, runtimeKey(true, "read_only")), privileged)
	volume := t.TempDir()
	c := b.sleeper("app")
	c.Mounts = []*cri.Mount{{HostPath: volume, ContainerPath: "/volume"}}
	id := b.run(c)
	for path, can := range map[string]bool{"/x": false, "/etc/x": false, "/var/x": false, "/run/x": true, "/tmp/x": true, "/var/tmp/x": true, "/volume/x": true, "/dev/shm/x": true} {
		if out, code := tryExec(t, b.Daemon, id, "touch", path); (code == 0) != can {
			t.Errorf("%s: %q, %d", path, out, code)
		}
	}
	b.Exec(b.run(b.privilegedSleeper("privileged")), "touch", "/x")
}

// TestCTR_27_Containerenv: the marker and the node's secrets are in every
// container.
func TestCTR_27_Containerenv(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "mounts.conf")
	if err := os.WriteFile(filepath.Join(dir, "entitlement"), []byte("key"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(dir+":/run/secrets\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	b := newBoxOn(t, start(t, runtimeKey(true, "containerenv_file"), runtimeKey(file, "default_mounts_file")))
	for _, readonly := range []bool{false, true} {
		c := b.sleeper(fmt.Sprint("readonly-", readonly))
		c.Linux.SecurityContext.ReadonlyRootfs = readonly
		if got := sh(b.Daemon, b.run(c), "wc -c </run/.containerenv; cat /run/secrets/entitlement; (echo x >/run/.containerenv) 2>/dev/null || echo readonly"); got != "0\nkeyreadonly" {
			t.Errorf("read-only %v: %q", readonly, got)
		}
	}
	other := newBox(t)
	if got := sh(other.Daemon, other.run(other.sleeper("app")), "[ -e /run/.containerenv ] || echo none"); got != "none" {
		t.Errorf("without the setting: %q", got)
	}
}

// TestRES_26_GOMAXPROCS: containers without a CPU limit are told how many CPUs
// they asked for, in pods of the two lower classes of service.
func TestRES_26_GOMAXPROCS(t *testing.T) {
	t.Parallel()
	d := start(t, runtimeKey(2, "min_injected_gomaxprocs"), allowing("skip-gomaxprocs.crio.io"))
	const own = "own"
	for name, row := range map[string]struct {
		class, annotation string
		r                 *cri.LinuxContainerResources
		want              string
	}{
		"burstable":  {"burstable", "", &cri.LinuxContainerResources{CpuShares: 2049}, "3"},
		"floor":      {"burstable", "", &cri.LinuxContainerResources{CpuShares: 100}, "2"},
		"besteffort": {"besteffort", "", &cri.LinuxContainerResources{CpuShares: 2}, "2"},
		"guaranteed": {"guaranteed", "", &cri.LinuxContainerResources{CpuShares: 4096}, ""},
		"limited":    {"burstable", "", &cri.LinuxContainerResources{CpuShares: 4096, CpuQuota: 50000, CpuPeriod: 100000}, ""},
		"skipped":    {"burstable", "true", &cri.LinuxContainerResources{CpuShares: 4096}, ""},
		own:          {"burstable", "", &cri.LinuxContainerResources{CpuShares: 4096}, "16"},
	} {
		b := onHandler(t, d, "res26-"+name, "", func(c *cri.PodSandboxConfig) {
			c.Linux.CgroupParent = d.PodParent(row.class, "res26"+name)
			if row.annotation != "" {
				saying("skip-gomaxprocs.crio.io", row.annotation)(c)
			}
		})
		c := b.script("app", "echo $GOMAXPROCS")
		c.Linux.Resources = row.r
		if name == own {
			c.Envs = []*cri.KeyValue{{Key: "GOMAXPROCS", Value: []byte("16")}}
		}
		if got := strings.TrimSpace(b.output(c)); got != row.want {
			t.Errorf("%s: %q, want %q", name, got, row.want)
		}
	}
}

// TestMNT_25_LinkLogs: the logs of a pod are in the volume that its annotation
// names, for those to read that mount it, and only where the handler allows that.
func TestMNT_25_LinkLogs(t *testing.T) {
	t.Parallel()
	const key = "io.kubernetes.cri-o.LinkLogs"
	d := start(t, allowing(key, "link-logs.crio.io"))
	kubelet := t.TempDir()
	volume := func(c *cri.PodSandboxConfig) string {
		dir := filepath.Join(kubelet, "pods", c.Metadata.Uid, "volumes", "kubernetes.io~empty-dir", "logging")
		if err := os.MkdirAll(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	b := newBoxOn(t, d, saying(key, "logging"))
	dir := volume(b.config)
	c := b.script("writer", "echo hello; exec sleep inf")
	c.LogPath = "writer/0.log"
	c.Mounts = []*cri.Mount{{HostPath: dir, ContainerPath: "/data"}}
	writer := b.run(c)
	reader := b.run(b.withMounts("reader", &cri.Mount{HostPath: dir, ContainerPath: "/var/log/app", Readonly: true}, &cri.Mount{HostPath: t.TempDir(), ContainerPath: "/other"}))
	for id, path := range map[string]string{writer: "/data", reader: "/var/log/app"} {
		eventually(t, ample, func() error {
			if got := b.Exec(id, "cat", path+"/logs/writer/0.log"); !strings.HasSuffix(got, " stdout F hello\n") {
				return fmt.Errorf("the log says %q", got)
			}
			return nil
		})
		b.denied(id, "Read-only", "sh", "-c", "echo >>"+path+"/logs/writer/0.log")
		b.denied(id, "Read-only", "touch", path+"/logs/new")
	}
	b.denied(reader, "No such file", "ls", "/other/logs")
	b.Exec(writer, "touch", "/data/mine")
	// Whoever writes to the volume cannot lead the mount elsewhere.
	for _, command := range []string{"ln -s /etc logs", "ln -s ../../../.. logs", "touch logs"} {
		b := newBoxOn(t, d, saying("link-logs.crio.io", "logging"))
		dir := volume(b.config)
		if out, err := exec.Command("sh", "-c", "cd "+dir+" && "+command).CombinedOutput(); err != nil {
			t.Fatalf("%s: %s", err, out)
		}
		b.refused(b.withMounts("app", &cri.Mount{HostPath: dir, ContainerPath: "/data"}), codes.FailedPrecondition, "config.mounts[0]", "no directory")
	}
	bad := newBoxOn(t, d, saying(key, "../../x"))
	bad.refused(bad.sleeper("app"), codes.InvalidArgument, key)
	// Not allowed, it is not looked at.
	config := d.PodConfig("strict")
	saying(key, "logging")(config)
	id, err := d.StartPod(t.Context(), config, "strict")
	if err != nil {
		t.Fatal(err)
	}
	strict := &box{Daemon: d, t: t, pod: id, config: config, image: b.image}
	dir = volume(config)
	strict.run(strict.withMounts("app", &cri.Mount{HostPath: dir, ContainerPath: "/data"}))
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("not allowed: the volume has %v, %v", entries, err)
	}
}

// TestMNT_25_Userns: in a pod with a user namespace its root can read them.
func TestMNT_25_Userns(t *testing.T) {
	t.Parallel()
	d := start(t, allowing("link-logs.crio.io"))
	b := newUserBoxOn(t, d, saying("link-logs.crio.io", "logging"))
	dir := filepath.Join(t.TempDir(), "pods", b.config.Metadata.Uid, "volumes", "kubernetes.io~empty-dir", "logging")
	if err := os.MkdirAll(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	c := b.script("writer", "echo hello; exec sleep inf")
	c.Mounts = []*cri.Mount{{HostPath: dir, ContainerPath: "/data"}}
	id := b.run(c)
	eventually(t, ample, func() error {
		if got := b.Exec(id, "cat", "/data/logs/writer.log"); !strings.HasSuffix(got, " stdout F hello\n") {
			return fmt.Errorf("the log says %q", got)
		}
		return nil
	})
	b.remove(stopped(b, id))
}
