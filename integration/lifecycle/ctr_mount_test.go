package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// withMounts is a sleeper with mounts.
func (b *box) withMounts(name string, mounts ...*cri.Mount) *cri.ContainerConfig {
	c := b.sleeper(name)
	c.Mounts = mounts
	return c
}

// mountTmpfs mounts a tmpfs for as long as the test runs.
func mountTmpfs(t *testing.T, dir string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(dir, 0o755), unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// sharedDir is a directory from and to which mounts propagate.
func sharedDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	mountTmpfs(t, dir)
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestMNT_01_HostPath(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	dir := t.TempDir()
	file, link := filepath.Join(dir, "file"), filepath.Join(t.TempDir(), "link")
	if err := errors.Join(os.WriteFile(file, []byte("from the host\n"), 0o644), os.Symlink(dir, link)); err != nil {
		t.Fatal(err)
	}
	id := b.run(b.withMounts("app",
		&cri.Mount{HostPath: dir, ContainerPath: "/dir"},
		&cri.Mount{HostPath: file, ContainerPath: "/one/file"},
		&cri.Mount{HostPath: link, ContainerPath: "/linked"},
		&cri.Mount{HostPath: filepath.Join(link, "file"), ContainerPath: "/linked-file"}))
	for _, path := range []string{"/dir/file", "/one/file", "/linked/file", "/linked-file"} {
		if got := b.Exec(id, "cat", path); got != "from the host\n" {
			t.Errorf("%s says %q", path, got)
		}
	}
	b.Exec(id, "sh", "-c", "echo inside >/dir/new; echo more >>/one/file")
	if text, err := os.ReadFile(filepath.Join(dir, "new")); err != nil || string(text) != "inside\n" {
		t.Errorf("the host sees %q, %v", text, err)
	}
	if text, err := os.ReadFile(file); err != nil || !strings.HasSuffix(string(text), "more\n") {
		t.Errorf("the host sees %q, %v", text, err)
	}
}

func TestMNT_02_MissingHostPath(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	dir := filepath.Join(t.TempDir(), "a", "b")
	id := b.run(b.withMounts("app", &cri.Mount{HostPath: dir, ContainerPath: "/dir"}))
	b.Exec(id, "touch", "/dir/x")
	if info, err := os.Stat(dir); err != nil || !info.IsDir() || !exists(filepath.Join(dir, "x")) {
		t.Errorf("the directory on the host: %v, %v", info, err)
	}
}

func TestMNT_04_Readonly(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	dir := t.TempDir()
	id := b.run(b.withMounts("app", &cri.Mount{HostPath: dir, ContainerPath: "/ro", Readonly: true}, &cri.Mount{HostPath: dir, ContainerPath: "/rw"}))
	if out, code := tryExec(t, b.Daemon, id, "touch", "/ro/x"); code == 0 || !strings.Contains(out, "Read-only") {
		t.Errorf("touch: %q, %d", out, code)
	}
	b.Exec(id, "touch", "/rw/y")
	if exists(filepath.Join(dir, "x")) || !exists(filepath.Join(dir, "y")) {
		t.Error("the host sees something else")
	}
}

// offersRecursiveReadOnly reports whether the handler under test has such mounts, as the
// daemon's status has it. If not they are refused. Whether the status is right is RTH_02's.
func (b *box) offersRecursiveReadOnly() bool {
	b.t.Helper()
	// The creation waits for the runtime to be asked.
	id, err := b.create(b.withMounts("offers", &cri.Mount{HostPath: b.t.TempDir(), ContainerPath: "/rro", Readonly: true, RecursiveReadOnly: true}))
	if known, _ := handlers(b.t, b.Daemon); !known[""].GetRecursiveReadOnlyMounts() {
		wantError(b.t, err, codes.Unimplemented, "mounts[0]", "recursive_read_only", "the runtime cannot do it")
		return false
	}
	if err != nil {
		b.t.Fatal(err)
	}
	b.remove(id)
	return true
}

// TestMNT_05_RecursiveReadOnly: with it what is mounted below cannot be
// written either.
func TestMNT_05_RecursiveReadOnly(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	dir := t.TempDir()
	mountTmpfs(t, filepath.Join(dir, "sub"))
	rro := &cri.Mount{HostPath: dir, ContainerPath: "/rro", Readonly: true, RecursiveReadOnly: true}
	if !b.offersRecursiveReadOnly() {
		t.Skip("the runtime of the default handler offers no recursive read-only mounts; one that is asked for is refused")
	}
	id := b.run(b.withMounts("app", rro, &cri.Mount{HostPath: dir, ContainerPath: "/ro", Readonly: true}))
	for _, path := range []string{"/rro/x", "/rro/sub/x", "/ro/x"} {
		if out, code := tryExec(t, b.Daemon, id, "touch", path); code == 0 || !strings.Contains(out, "Read-only") {
			t.Errorf("touch %s: %q, %d", path, out, code)
		}
	}
	b.Exec(id, "touch", "/ro/sub/y")
	if m := b.status(id).Mounts; len(m) != 2 || !m[0].RecursiveReadOnly || m[1].RecursiveReadOnly {
		t.Errorf("status has %v", m)
	}
	b.refused(b.withMounts("writable", &cri.Mount{HostPath: dir, ContainerPath: "/x", RecursiveReadOnly: true}), codes.InvalidArgument, "recursive_read_only")
	b.refused(b.withMounts("slave", &cri.Mount{HostPath: dir, ContainerPath: "/x", Readonly: true, RecursiveReadOnly: true,
		Propagation: cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}), codes.InvalidArgument, "recursive_read_only")
}

func TestMNT_06_Propagation(t *testing.T) {
	b := newBox(t, privileged)
	dir := sharedDir(t)
	c := b.privilegedSleeper("app")
	c.Mounts = []*cri.Mount{
		{HostPath: dir, ContainerPath: "/private", Propagation: cri.MountPropagation_PROPAGATION_PRIVATE},
		{HostPath: dir, ContainerPath: "/slave", Propagation: cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
		{HostPath: dir, ContainerPath: "/shared", Propagation: cri.MountPropagation_PROPAGATION_BIDIRECTIONAL},
	}
	id := b.run(c)
	late := filepath.Join(dir, "late")
	mountTmpfs(t, late)
	if err := os.WriteFile(filepath.Join(late, "mark"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if got := sh(b.Daemon, id, "ls -d /*/late/mark"); got != "/shared/late/mark\n/slave/late/mark" {
		t.Errorf("a mount of the host is seen at %q", got)
	}
	b.Exec(id, "sh", "-c", "for d in private slave shared; do mkdir -p /$d/of-$d && mount -t tmpfs none /$d/of-$d && touch /$d/of-$d/mark; done")
	t.Cleanup(func() {
		for _, d := range []string{"of-private", "of-slave", "of-shared"} {
			_ = unix.Unmount(filepath.Join(dir, d), unix.MNT_DETACH)
		}
	})
	marks, err := filepath.Glob(filepath.Join(dir, "of-*", "mark"))
	if err != nil || !slices.Equal(marks, []string{filepath.Join(dir, "of-shared", "mark")}) {
		t.Errorf("the host sees %q, %v", marks, err)
	}
	plain := t.TempDir()
	mountTmpfs(t, plain)
	if err := unix.Mount("", plain, "", unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]cri.MountPropagation{
		"slave": cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, "shared": cri.MountPropagation_PROPAGATION_BIDIRECTIONAL,
	} {
		c := b.privilegedSleeper(name)
		c.Mounts = []*cri.Mount{{HostPath: plain, ContainerPath: "/x", Propagation: p}}
		if _, err := b.create(c); err == nil || !strings.Contains(err.Error(), plain) {
			t.Errorf("%s of a private mount: %v", name, err)
		}
	}
}

// TestMNT_17_Ordering: parents come before children in whatever order they are
// asked for, and a mount that is asked for replaces one that is not.
func TestMNT_17_Ordering(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	dir := t.TempDir()
	host := func(name string) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(path, 0o755), os.WriteFile(filepath.Join(path, "mark-"+name), nil, 0o644)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts"), []byte("10.9.8.7 mine\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	id := b.run(b.withMounts("app",
		&cri.Mount{HostPath: host("deep"), ContainerPath: "/a/b/c"},
		&cri.Mount{HostPath: host("top"), ContainerPath: "/a"},
		&cri.Mount{HostPath: host("middle"), ContainerPath: "/a/b"},
		&cri.Mount{HostPath: host("shm"), ContainerPath: "/dev/shm"},
		&cri.Mount{HostPath: filepath.Join(dir, "hosts"), ContainerPath: "/etc/hosts"},
		&cri.Mount{HostPath: host("sys"), ContainerPath: "/sys/fs/cgroup"}))
	for path, want := range map[string]string{
		"/a": "b mark-top", "/a/b": "c mark-middle", "/a/b/c": "mark-deep", "/dev/shm": "mark-shm", "/sys/fs/cgroup": "mark-sys",
	} {
		if got := strings.Join(strings.Fields(b.Exec(id, "ls", path)), " "); got != want {
			t.Errorf("%s has %q, want %q", path, got, want)
		}
	}
	if got := b.Exec(id, "cat", "/etc/hosts"); got != "10.9.8.7 mine\n" {
		t.Errorf("/etc/hosts says %q", got)
	}
}

// makeCgroup makes a cgroup at the root of what a container sees of them.
const makeCgroup = "d=$(ls -d /sys/fs/cgroup/memory 2>/dev/null || echo /sys/fs/cgroup); mkdir $d/mine && rmdir $d/mine"

func TestMNT_22_CgroupMount(t *testing.T) {
	t.Parallel()
	b := newBox(t, privileged)
	id := b.run(b.sleeper("normal"))
	if out, code := tryExec(t, b.Daemon, id, "sh", "-c", makeCgroup); code == 0 || !strings.Contains(out, "Read-only") {
		t.Errorf("normal: %q, %d", out, code)
	}
	b.Exec(b.run(b.privilegedSleeper("privileged")), "sh", "-c", makeCgroup)
}

func TestCTR_22_StatusMounts(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	asked := []*cri.Mount{
		{HostPath: t.TempDir(), ContainerPath: "/plain"},
		{HostPath: t.TempDir(), ContainerPath: "/ro", Readonly: true},
		{HostPath: t.TempDir(), ContainerPath: "/rro", Readonly: true, RecursiveReadOnly: b.offersRecursiveReadOnly()},
		{HostPath: sharedDir(t), ContainerPath: "/slave", Propagation: cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
	}
	got := b.status(b.mustCreate(b.withMounts("app", asked...))).Mounts
	if len(got) != len(asked) {
		t.Fatalf("status has %v", got)
	}
	for i, m := range asked {
		if !proto.Equal(m, got[i]) {
			t.Errorf("status has %v, asked was %v", got[i], m)
		}
	}
}

func TestDEV_01_Devices(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	dir := t.TempDir()
	link, nodes := filepath.Join(dir, "link"), filepath.Join(dir, "nodes")
	if err := errors.Join(os.Symlink("/dev/fuse", link), os.Mkdir(nodes, 0o755),
		unix.Mknod(filepath.Join(nodes, "one"), unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))),
		unix.Mknod(filepath.Join(nodes, "two"), unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200)))); err != nil {
		t.Fatal(err)
	}
	for perms, want := range map[string]string{"rwm": "rw", "r": "r", "w": "w", "rw": "rw"} {
		c := b.sleeper("perms-" + perms)
		c.Devices = []*cri.Device{{HostPath: "/dev/fuse", ContainerPath: "/dev/mine", Permissions: perms}}
		id := b.run(c)
		got := ""
		for mode, redirect := range map[string]string{"r": "<", "w": ">"} {
			if _, code := tryExec(t, b.Daemon, id, "sh", "-c", ": "+redirect+"/dev/mine"); code == 0 {
				got = strings.Join(slices.Sorted(slices.Values(append(strings.Split(got, ""), mode))), "")
			}
		}
		if got != want {
			t.Errorf("permissions %s allow %q", perms, got)
		}
	}
	c := b.sleeper("sources")
	c.Devices = []*cri.Device{
		{HostPath: link, ContainerPath: "/dev/linked", Permissions: "rw"},
		{HostPath: nodes, ContainerPath: "/dev/nodes", Permissions: "rw"},
		{HostPath: "/dev/net/tun", Permissions: "rw"},
	}
	id := b.run(c)
	got := sh(b.Daemon, id, "stat -c '%n %t:%T' /dev/linked /dev/nodes/one /dev/nodes/two; : <>/dev/linked; : <>/dev/nodes/one")
	if want := "/dev/linked a:e5\n/dev/nodes/one a:e5\n/dev/nodes/two a:c8"; got != want {
		t.Errorf("devices are %q, want %q", got, want)
	}
	c = b.sleeper("missing")
	c.Devices = []*cri.Device{{HostPath: "/dev/no-such", ContainerPath: "/dev/x", Permissions: "rw"}}
	if _, err := b.create(c); err == nil || !strings.Contains(err.Error(), "/dev/no-such") {
		t.Errorf("a missing device: %v", err)
	}
}

// TestDEV_03_PrivilegedDevices: a privileged container has every node of the
// host that is there when it is made.
func TestDEV_03_PrivilegedDevices(t *testing.T) {
	b := newBox(t, privileged)
	fresh := fmt.Sprintf("/dev/gantry-test-%d", os.Getpid())
	if err := unix.Mknod(fresh, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 229))); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(fresh)
	id := b.run(b.privilegedSleeper("app"))
	inside := strings.Fields(sh(b.Daemon, id, "find /dev -type c -o -type b"))
	var missing []string
	err := filepath.WalkDir("/dev", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (path == "/dev/pts" || path == "/dev/shm" || path == "/dev/mqueue") {
			return filepath.SkipDir
		}
		device := d.Type()&os.ModeDevice != 0
		if device && path != "/dev/console" && path != "/dev/ptmx" && !slices.Contains(inside, path) {
			missing = append(missing, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(missing) > 0 || !slices.Contains(inside, fresh) {
		t.Errorf("not inside are %q", missing)
	}
	b.Exec(id, "sh", "-c", ": <>"+fresh)
}

// TestMNT_15_MountOptions: what a mount may not be used for beyond being written.
func TestMNT_15_MountOptions(t *testing.T) {
	t.Parallel()
	b := newBox(t, privileged)
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	if err := errors.Join(os.WriteFile(script, []byte("#!/bin/sh\necho ran\n"), 0o755), os.Chmod(dir, 0o755),
		unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))); err != nil {
		t.Fatal(err)
	}
	c := b.privilegedSleeper("app")
	asked := map[string][]string{"/none": nil, "/noexec": {"noexec"}, "/nodev": {"nodev"}, "/nosuid": {"nosuid"}, "/all": {"nosuid", "noexec", "nodev"}}
	for path, options := range asked {
		c.Mounts = append(c.Mounts, &cri.Mount{HostPath: dir, ContainerPath: path, MountOptions: options})
	}
	id := b.run(c)
	for path, options := range asked {
		_, ran := tryExec(t, b.Daemon, id, "sh", "-c", path+"/script")
		_, opened := tryExec(t, b.Daemon, id, "sh", "-c", ": <"+path+"/null")
		flags := ""
		for _, m := range mountsIn(b, id) {
			if m.point == path {
				flags = "," + m.options + ","
			}
		}
		got := map[string]bool{"noexec": ran != 0, "nodev": opened != 0, "nosuid": strings.Contains(flags, ",nosuid,")}
		for option, is := range got {
			if is != slices.Contains(options, option) {
				t.Errorf("%s, mounted with %q: %s is %v (%s)", path, options, option, is, flags)
			}
		}
	}
	b.Exec(id, "touch", "/all/written")
	status, err := b.Runtime().Status(t.Context(), &cri.StatusRequest{})
	if err != nil || !status.Features.MountOptions {
		t.Errorf("features are %v, %v", status.GetFeatures(), err)
	}
	b.refused(b.withMounts("unknown", &cri.Mount{HostPath: dir, ContainerPath: "/x", MountOptions: []string{"noexec", "exec"}}), codes.InvalidArgument, "config.mounts[0].mount_options[1]")
	b.refused(b.withMounts("bind", &cri.Mount{HostPath: dir, ContainerPath: "/x", MountOptions: []string{"rshared"}}), codes.InvalidArgument, "mount_options[0]")
}

// TestMNT_29_ReadonlyPodFiles: the files that a pod's containers share can be
// written by those whose root can be written.
func TestMNT_29_ReadonlyPodFiles(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	closed := b.sleeper("readonly")
	closed.Linux.SecurityContext.ReadonlyRootfs = true
	readonly, writable := b.run(closed), b.run(b.sleeper("writable"))
	for _, file := range []string{"/etc/hosts", "/etc/resolv.conf", "/etc/hostname"} {
		b.Exec(writable, "sh", "-c", "echo '# mine' >>"+file)
		if out, code := tryExec(t, b.Daemon, readonly, "sh", "-c", "echo '# other' >>"+file); code == 0 || !strings.Contains(out, "Read-only") {
			t.Errorf("%s: %q, %d", file, out, code)
		}
		if got := b.Exec(readonly, "tail", "-n", "1", file); got != "# mine\n" {
			t.Errorf("%s ends with %q", file, got)
		}
	}
	b.Exec(readonly, "touch", "/dev/shm/x")
}

// TestMNT_27_VolatileOverlay: layers can do without sync, as the snapshotter's
// configuration says. The mark that the kernel leaves in them is in nobody's way.
func TestMNT_27_VolatileOverlay(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Set([]string{"volatile"}, "plugins", "io.containerd.snapshotter.v1.overlayfs", "mount_options"))
	b := newBoxOn(t, d)
	id, created := b.run(b.sleeper("app")), b.mustCreate(b.sleeper("created"))
	wantVolatile := func(id string) {
		t.Helper()
		mounts := b.Exec(id, "cat", "/proc/self/mountinfo")
		for line := range strings.Lines(mounts) {
			if f := strings.Fields(line); f[4] == "/" && strings.Contains(f[len(f)-1]+",", "volatile,") /* or fsync=volatile */ {
				return
			}
		}
		t.Errorf("no volatile root:\n%s", mounts)
	}
	wantVolatile(id)
	b.Exec(id, "sh", "-c", "echo kept >/kept")
	d.Kill()
	d.Up()
	wantVolatile(id)
	b.wantText(id, "/kept", "kept\n")
	if err := b.start(created); err != nil {
		t.Errorf("start what was created before: %v", err)
	}
	wantVolatile(created)
}

// TestMNT_21_StoreRoot: a container that mounts a directory with the store in it
// keeps no other container's root filesystem.
func TestMNT_21_StoreRoot(t *testing.T) {
	t.Parallel()
	d := start(t)
	// As the root of a machine with an init system is.
	d.Stop()
	if err := errors.Join(unix.Mount(d.State, d.State, "", unix.MS_BIND, ""), unix.Mount("", d.State, "", unix.MS_SHARED, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.RemovePods(context.Background()); err != nil {
			t.Error(err)
		}
		d.Stop()
		if err := unix.Unmount(d.State, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	d.Up()
	b := newBoxOn(t, d)
	probe := filepath.Join(d.State, "probe")
	mountTmpfs(t, probe)
	before := b.run(b.sleeper("before"))
	asked := []*cri.Mount{{HostPath: d.Dir, ContainerPath: "/above"}, {HostPath: d.State, ContainerPath: "/state", Readonly: true}}
	watcher := b.run(b.withMounts("watcher", asked...))
	for i, m := range b.status(watcher).Mounts {
		if !proto.Equal(m, asked[i]) {
			t.Errorf("status has %v, asked was %v", m, asked[i])
		}
	}
	sees := func(point string) (n int) {
		for line := range strings.Lines(readHost(t, fmt.Sprintf("/proc/%d/mountinfo", b.pid(watcher)))) {
			if strings.Contains(line, "/"+point+" ") {
				n++
			}
		}
		return n
	}
	after := b.run(b.sleeper("after"))
	for _, id := range []string{before, after} {
		// Once in each mount at least: there are mounts of mounts.
		if n := sees(id + "/rootfs"); n < 2 {
			t.Errorf("%d mounts of %s are seen", n, id)
		}
		b.remove(id)
		if n := sees(id + "/rootfs"); n != 0 {
			t.Errorf("%d mounts of %s are kept", n, id)
		}
	}
	// One whose directory stays: with the directory the kernel takes all mounts
	// there away.
	if n := sees("probe"); n < 2 {
		t.Errorf("%d mounts of the probe are seen", n)
	}
	if err := unix.Unmount(probe, 0); err != nil {
		t.Fatal(err)
	}
	if n := sees("probe"); n != 0 {
		t.Errorf("%d mounts of the probe are kept", n)
	}
}
