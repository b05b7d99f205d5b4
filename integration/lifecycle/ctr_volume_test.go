package lifecycle

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// fromImage is the mount of an image as the kubelet asks for it.
func fromImage(image, sub, path string) *cri.Mount {
	return &cri.Mount{Image: &cri.ImageSpec{Image: image}, ImageSubPath: sub, ContainerPath: path, Readonly: true}
}

// imageOf makes an image of nothing but the layers, as those for volumes are.
func imageOf(t *testing.T, layers ...[]images.File) v1.Image {
	t.Helper()
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	for _, files := range layers {
		layer, err := images.Layer(files)
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			t.Fatal(err)
		}
	}
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file = file.DeepCopy()
	like, err := images.MustBuild(images.Spec{}).ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file.OS, file.Architecture = like.OS, like.Architecture
	if img, err = mutate.ConfigFile(img, file); err != nil {
		t.Fatal(err)
	}
	return img
}

// pulled pushes an image and has the daemon pull it, and returns what the
// kubelet then calls it by.
func (b *box) pulled(nameTag string, img v1.Image) string {
	b.t.Helper()
	return mustPull(b.t, b.Daemon, push(b.t, nameTag, img))
}

// wantText reads a file in a container.
func (b *box) wantText(id, path, want string) {
	b.t.Helper()
	if got := b.Exec(id, "cat", path); got != want {
		b.t.Errorf("%s says %q, want %q", path, got, want)
	}
}

// denied runs a command in a container that must fail with the words.
func (b *box) denied(id, words string, command ...string) {
	b.t.Helper()
	if out, code := tryExec(b.t, b.Daemon, id, command...); code == 0 || !strings.Contains(out, words) {
		b.t.Errorf("%q: %q, %d, want %q", command, out, code, words)
	}
}

// volumesOf are the directories in which the daemon keeps volumes, with what is
// in them.
func volumesOf(t *testing.T, d *daemon.Daemon) (found []string) {
	t.Helper()
	for _, dir := range []string{d.Root, d.State} {
		entries, err := filepath.Glob(filepath.Join(dir, "io.containerd.grpc.v1.cri", "volumes", "*"))
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, entries...)
	}
	return found
}

// cutOff kills the daemon once it has begun to make the volumes of a container, and
// waits until the next one has left nothing of them.
func cutOff(t *testing.T, b *box, name string, begun func() error, mounts ...*cri.Mount) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), ample)
	defer cancel()
	created := make(chan error, 1)
	go func() { // ends with the daemon, or cancel
		_, err := b.Runtime().CreateContainer(ctx, &cri.CreateContainerRequest{
			PodSandboxId: b.pod, SandboxConfig: b.config, Config: b.withMounts(name, mounts...),
		})
		created <- err
	}()
	eventually(t, ample, begun)
	b.Kill()
	cancel()
	if err := <-created; err == nil {
		t.Log("the creation was over before the daemon died")
	}
	b.Up()
	list, err := b.Runtime().ListContainers(t.Context(), &cri.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list.Containers {
		b.remove(c.Id)
	}
	eventually(t, ample, func() error {
		if left := volumesOf(t, b.Daemon); len(left) > 0 {
			return fmt.Errorf("left are %q", left)
		}
		return nil
	})
}

// TestMNT_09_ImageVolume: an image is mounted read-only, also one of several
// layers, and stays whole while it is in use although it was removed.
func TestMNT_09_ImageVolume(t *testing.T) {
	t.Parallel()
	d := start(t)
	b := newBoxOn(t, d)
	one := b.pulled("volume/one:1", imageOf(t, []images.File{images.Dir("d", 0o755), images.Text("d/a", "one\n")}))
	two := b.pulled("volume/two:1", imageOf(t, []images.File{images.Text("a", "lower\n"), images.Text("b", "gone\n")},
		[]images.File{images.Text("a", "two\n"), images.Whiteout("b")}))
	asked := []*cri.Mount{fromImage(one, "", "/one"), {HostPath: t.TempDir(), ContainerPath: "/host"}, fromImage(two, "", "/two"), fromImage(two, "", "/again")}
	id := b.run(b.withMounts("app", asked...))
	check := func() {
		t.Helper()
		b.wantText(id, "/one/d/a", "one\n")
		b.wantText(id, "/two/a", "two\n")
		b.wantText(id, "/again/a", "two\n")
		b.denied(id, "No such file", "ls", "/two/b")
		for _, path := range []string{"/one/d/x", "/two/x", "/two/a"} {
			b.denied(id, "Read-only", "sh", "-c", "echo >"+path)
		}
	}
	check()
	got := b.status(id).Mounts
	if len(got) != len(asked) {
		t.Fatalf("status has %v", got)
	}
	for i, m := range asked {
		told := proto.Clone(got[i]).(*cri.Mount)
		if told.Image != nil {
			told.Image.ImageRef = "" // TestCTR_06 looks at it
		}
		if !proto.Equal(m, told) {
			t.Errorf("status has %v, asked was %v", told, m)
		}
	}
	created := b.mustCreate(b.withMounts("later", asked...))
	removeImage(t, d, one)
	removeImage(t, d, two)
	collectGarbage(t, d)
	check()
	b.refused(b.withMounts("gone", fromImage(one, "", "/one")), codes.NotFound, "config.mounts[0]", one)
	d.Kill()
	d.Up()
	check()
	if err := b.start(created); err != nil {
		t.Fatal(err)
	}
	b.wantText(created, "/two/a", "two\n")
	b.remove(created)
	b.remove(id)
	if left := volumesOf(t, d); len(left) > 0 {
		t.Errorf("left are %q", left)
	}
}

// collectGarbage runs containerd's garbage collector to its end.
func collectGarbage(t *testing.T, d *daemon.Daemon) {
	t.Helper()
	ctx := namespaced(t.Context())
	manager := d.Client().LeasesService()
	l, err := manager.Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	if err := manager.Delete(ctx, l, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
}

// TestMNT_10_ImageSubPath: only a part of the image is mounted, a directory or a
// file. Links lead to where they lead inside the image.
func TestMNT_10_ImageSubPath(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("secret\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 20)
	img := b.pulled("volume/sub:1", imageOf(t, []images.File{
		images.Dir("models", 0o755), images.Dir("models/small", 0o755), images.Text("models/small/w", "weights\n"), images.Text("top", "top\n"),
		images.Symlink("models/latest", "small"), images.Symlink("models/abs", "/models/small"), images.Symlink("models/up", up+"models/small"),
		images.Symlink("host", outside), images.Symlink("hostfile", outside+"/secret"), images.Symlink("hostup", up[:len(up)-1]+outside),
		images.Symlink("loop", "loop"), images.Symlink("magic", "/proc/self/root"), {Path: "pipe", Type: tar.TypeFifo},
		{Path: "null", Type: tar.TypeChar, Major: 1, Minor: 3},
	}))
	var mounts []*cri.Mount
	good := map[string]string{
		"models/small": "w", "/models/small/": "w", "models/latest": "w", "models/abs": "w", "models/up": "w", "./models/../models/small": "w",
		up + "models/small": "w", up: "top", ".": "top",
	}
	for sub := range good {
		mounts = append(mounts, fromImage(img, sub, fmt.Sprint("/v", len(mounts))))
	}
	id := b.run(b.withMounts("good", append(mounts, fromImage(img, "models/latest/w", "/file"))...))
	for _, m := range mounts {
		b.Exec(id, "test", "-f", m.ContainerPath+"/"+good[m.ImageSubPath])
	}
	b.wantText(id, "/file", "weights\n")
	b.denied(id, "Read-only", "sh", "-c", "echo >>/file")
	for sub, code := range map[string]codes.Code{
		"absent": codes.NotFound, "models/small/w/x": codes.FailedPrecondition, "host": codes.NotFound, "hostfile": codes.NotFound,
		"hostup": codes.NotFound, "hostup/secret": codes.NotFound, "magic": codes.NotFound, "loop": codes.FailedPrecondition,
		"pipe": codes.FailedPrecondition, "null": codes.FailedPrecondition, "a\x00b": codes.InvalidArgument,
	} {
		b.refused(b.withMounts("bad", fromImage(img, sub, "/v")), code, "config.mounts[0]")
	}
	b.refused(b.withMounts("no-image", &cri.Mount{HostPath: outside, ImageSubPath: "x", ContainerPath: "/v"}), codes.InvalidArgument, "image_sub_path")
	b.refused(b.withMounts("both", &cri.Mount{HostPath: outside, Image: &cri.ImageSpec{Image: img}, ContainerPath: "/v"}), codes.InvalidArgument, "host_path")
}

// TestMNT_11_ImageVolumeFlags: nothing of the volume runs, no device of it can be
// opened, no set-user-ID bit of it counts; not even for a privileged container.
func TestMNT_11_ImageVolumeFlags(t *testing.T) {
	t.Parallel()
	b := newBox(t, privileged)
	img := b.pulled("volume/tools:1", images.MustBuild(images.Spec{Layers: [][]images.File{{
		images.Dir("sub", 0o755), {Path: "sub/null", Type: tar.TypeChar, Major: 1, Minor: 3, Mode: 0o666}, images.Text("sub/script", "#!/bin/sh\necho ran\n"),
	}}}))
	c := b.privilegedSleeper("app")
	c.Mounts = []*cri.Mount{fromImage(img, "", "/all"), fromImage(img, "sub", "/sub"), fromImage(img, "bin/busybox", "/box")}
	id := b.run(c)
	for _, command := range [][]string{{"/all/bin/busybox", "true"}, {"/box", "true"}, {"/sub/script"}} {
		if out, err := b.Runtime().ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: command, Timeout: 60}); err == nil && out.ExitCode == 0 {
			t.Errorf("%q ran: %q", command, out.Stdout)
		}
		b.denied(id, "Permission denied", "sh", "-c", "exec "+strings.Join(command, " "))
	}
	b.denied(id, "Permission denied", "sh", "-c", ": </sub/null")
	for _, m := range mountsIn(b, id) {
		if !strings.HasPrefix(m.point, "/all") && m.point != "/sub" && m.point != "/box" {
			continue
		}
		for _, flag := range []string{"ro", "nosuid", "nodev", "noexec"} {
			if !strings.Contains(","+m.options+",", ","+flag+",") {
				t.Errorf("%s has options %s, not %s", m.point, m.options, flag)
			}
		}
	}
	// The container's own root can do what its runtime let it do; the volume's
	// superblock is read-only all the same.
	b.denied(id, "", "sh", "-c", "mount -o remount,rw /all && touch /all/x")
}

type mountLine struct{ point, options string }

// mountsIn are the mounts that a container sees, with their options.
func mountsIn(b *box, id string) (out []mountLine) {
	b.t.Helper()
	for line := range strings.Lines(b.Exec(id, "cat", "/proc/self/mountinfo")) {
		f := strings.Fields(line)
		out = append(out, mountLine{f[4], f[5]})
	}
	return out
}

// TestMNT_13_ErrImageVolumeMountFailed: the kubelet knows such a failure by the
// first word.
func TestMNT_13_ErrImageVolumeMountFailed(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	img := b.pulled("volume/empty:1", imageOf(t))
	for name, m := range map[string]*cri.Mount{
		"absent": fromImage("127.0.0.1:1/no/such:1", "", "/v"), "sub path": fromImage(img, "absent", "/v"),
	} {
		_, err := b.create(b.withMounts("app", m))
		if s := status.Convert(err); s.Code() != codes.NotFound || !strings.HasPrefix(s.Message(), "ImageVolumeMountFailed: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := b.create(b.withMounts("app", &cri.Mount{HostPath: "relative", ContainerPath: "/v"}))
	if err == nil || strings.Contains(err.Error(), "ImageVolumeMountFailed") {
		t.Errorf("another mount's failure: %v", err)
	}
}

// TestMNT_16_ImageDefinedVolumes: a volume that the image declares is a directory
// of its own, with what the image has there.
func TestMNT_16_ImageDefinedVolumes(t *testing.T) {
	t.Parallel()
	d := shared(t)
	b := newBoxOn(t, d)
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<20) // more than one step of the copy
	b.image = pulledImage(t, d, "volume/declared:1", images.MustBuild(images.Spec{
		Volumes: []string{"/data", "/data/nested/", "/missing/dir", "relative", "/linked", "/asked", "/asked/below", "/etc/hosts", "/proc/x", "/dev/shm", "/sys/fs/cgroup", "/"},
		Layers: [][]images.File{{
			{Path: "data", Type: tar.TypeDir, Mode: 0o2750, UID: images.AliceUID, GID: images.GroupGID, PAX: map[string]string{"SCHILY.xattr.user.dir": "yes"}},
			{Path: "data/file", Data: []byte("content\n"), Mode: 0o4640, UID: images.BobUID, GID: 7, PAX: map[string]string{"SCHILY.xattr.user.note": "hello"}},
			// A link's own header is applied to the file.
			{Path: "data/other", Type: tar.TypeLink, Link: "data/file", Mode: 0o4640, UID: images.BobUID, GID: 7}, images.Symlink("data/abs", "/etc/passwd"), images.Symlink("data/dangling", "nowhere"),
			{Path: "data/pipe", Type: tar.TypeFifo, Mode: 0o600}, images.Dir("data/nested", 0o700), images.Text("data/nested/n", "nested\n"),
			{Path: "data/big", Data: big}, images.Dir("real", 0o711), images.Text("real/r", "real\n"), images.Symlink("linked", "/real"),
			images.Dir("asked", 0o755), images.Text("asked/hidden", "hidden\n"),
		}},
	}))
	mine := t.TempDir()
	id := b.run(b.withMounts("app", &cri.Mount{HostPath: mine, ContainerPath: "/asked/"}))
	got := sh(d, id, `cd /data; stat -c '%n %a %u:%g %h' . file abs dangling pipe nested; readlink abs; readlink dangling; stat -c %i file other | uniq | wc -l; cat file nested/n; sha256sum <big; stat -c %Y file`)
	want := fmt.Sprintf(". 2750 1000:3000 3\nfile 4640 2000:7 2\nabs 777 0:0 1\ndangling 777 0:0 1\npipe 600 0:0 1\nnested 700 0:0 2\n/etc/passwd\nnowhere\n1\ncontent\nnested\n%s  -\n%d",
		fmt.Sprintf("%x", sha256.Sum256(big)), images.Epoch.Unix())
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if v := xattr(t, b, id, "/data/file", "user.note") + xattr(t, b, id, "/data", "user.dir"); v != "helloyes" {
		t.Errorf("extended attributes are %q", v)
	}
	b.wantText(id, "/linked/r", "real\n")
	if got := sh(d, id, "stat -c '%a %u:%g' /missing/dir /relative; ls -A /missing/dir; ls -A /asked; grep -c . /etc/hosts >/dev/null; stat -f -c %T /dev/shm /proc"); got != "755 0:0\n755 0:0\ntmpfs\nproc" {
		t.Errorf("got %q", got)
	}
	mounted := map[string]bool{}
	for _, m := range mountsIn(b, id) {
		mounted[m.point] = true
	}
	if !mounted["/data"] || !mounted["/real"] || mounted["/asked/below"] || mounted["/proc/x"] {
		t.Errorf("mounts are %v", mounted)
	}
	// Written to the volume, not to the layer.
	b.Exec(id, "sh", "-c", "echo new >/data/volume-new; rm /data/file")
	if found := layerFiles(t, d, "volume-new"); len(found) > 0 {
		t.Errorf("the layer has %q", found)
	}
	other := b.sleeper("other")
	other.Linux.SecurityContext.ReadonlyRootfs = true
	second := b.run(other)
	b.wantText(second, "/data/file", "content\n")
	b.Exec(second, "touch", "/data/written")
	b.denied(second, "Read-only", "touch", "/real2")
	// Without a mount of one's own there.
	b.denied(second, "No such file", "cat", "/asked/mine")
	b.wantText(second, "/asked/hidden", "hidden\n")
}

// xattr is an extended attribute of a file as a container has it.
func xattr(t *testing.T, b *box, id, path, name string) string {
	t.Helper()
	value := make([]byte, 256)
	n, err := unix.Getxattr(fmt.Sprintf("/proc/%d/root%s", b.pid(id), path), name, value)
	if err != nil {
		t.Errorf("%s of %s: %v", name, path, err)
		return ""
	}
	return string(value[:n])
}

// TestMNT_16_IgnoreImageDefinedVolumes: with the switch they are parts of the
// layer.
func TestMNT_16_IgnoreImageDefinedVolumes(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Set(true, "plugins", daemon.RuntimePlugin, "ignore_image_defined_volumes"))
	b := newBoxOn(t, d)
	b.image = pulledImage(t, d, "volume/ignored:1", images.MustBuild(images.Spec{Volumes: []string{"/data"}, Layers: [][]images.File{{
		images.Dir("data", 0o755), images.Text("data/file", "content\n"),
	}}}))
	id := b.run(b.sleeper("app"))
	b.wantText(id, "/data/file", "content\n")
	if slices.ContainsFunc(mountsIn(b, id), func(m mountLine) bool { return m.point == "/data" }) {
		t.Error("something is mounted at /data")
	}
	b.Exec(id, "touch", "/data/in-the-layer")
	if found := layerFiles(t, d, "in-the-layer"); len(found) != 1 {
		t.Errorf("the layer has %q", found)
	}
	if strings.Contains(d.Tail(10000), "ignore_image_defined_volumes") {
		t.Error("the daemon warns about a setting that has an effect")
	}
}

// layerFiles are the files of a name in the layers of a daemon's containers.
func layerFiles(t *testing.T, d *daemon.Daemon, name string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(d.Root, "io.containerd.snapshotter.v1.overlayfs", "snapshots"), func(path string, e os.DirEntry, err error) error {
		if err == nil && e.Name() == name {
			found = append(found, path)
		}
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestMNT_18_VolumesVanish: nothing of a volume outlives its container, in
// whatever way that ends.
func TestMNT_18_VolumesVanish(t *testing.T) {
	t.Parallel()
	d := start(t)
	b := newBoxOn(t, d)
	var files []images.File
	for i := range 1500 {
		files = append(files, images.Text(fmt.Sprint("data/", i), strings.Repeat("x", 4096)))
	}
	b.image = pulledImage(t, d, "volume/many:1", images.MustBuild(images.Spec{Volumes: []string{"/data"},
		Layers: [][]images.File{append([]images.File{images.Dir("data", 0o755)}, files...)}}))
	model := b.pulled("volume/model:1", imageOf(t, []images.File{images.Text("m", "m\n")}))
	none := func(when string) {
		t.Helper()
		if left := volumesOf(t, d); len(left) > 0 {
			t.Errorf("%s: left are %q", when, left)
		}
	}
	// A container that was removed.
	id := b.run(b.withMounts("removed", fromImage(model, "", "/model")))
	if len(volumesOf(t, d)) != 2 {
		t.Errorf("volumes are %q", volumesOf(t, d))
	}
	b.Exec(id, "sh", "-c", "mkdir -p /data/a/b/c; ln -s / /data/a/b/root; chmod 0 /data/a")
	b.remove(id)
	none("removed")
	// A creation that failed after the volumes were made.
	failing := b.withMounts("failing", fromImage(model, "", "/model"))
	failing.Linux.SecurityContext.RunAsUsername = "nobody-knows"
	b.refused(failing, codes.NotFound)
	none("failed")
	// A pod that was removed with its containers.
	p := runPod(d, "pod-with-volumes")
	p.run(d, daemon.ContainerConfig("app", b.image))
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	none("pod")
	// The daemon dies while it copies.
	for i := range 3 {
		cutOff(t, b, fmt.Sprint("cut-off-", i), func() error {
			if found, err := filepath.Glob(filepath.Join(d.Root, "io.containerd.grpc.v1.cri", "volumes", "*", "0", "1*")); err != nil || len(found) == 0 {
				return fmt.Errorf("nothing is copied yet: %w", err)
			}
			return nil
		}, fromImage(model, "", "/model"))
	}
}

// TestMNT_18_CopyBlocksNobody: while a large volume is copied other containers
// come and go, and the operation says what it is at.
func TestMNT_18_CopyBlocksNobody(t *testing.T) {
	oursAlone(t, "operations to read")
	t.Parallel()
	d := start(t)
	b := newBoxOn(t, d)
	var files []images.File
	for i := range 4000 {
		files = append(files, images.Text(fmt.Sprint("data/", i), "x"))
	}
	large := pulledImage(t, d, "volume/large:1", images.MustBuild(images.Spec{Volumes: []string{"/data"},
		Layers: [][]images.File{append([]images.File{images.Dir("data", 0o755)}, files...)}}))
	created := make(chan error, 1)
	go func() {
		_, err := b.create(daemon.ContainerConfig("large", large))
		created <- err
	}()
	stage := func() bool {
		return slices.ContainsFunc(operations(t, d), func(o opEntry) bool { return o.Stage == "copy image volumes" })
	}
	eventually(t, ample, func() error {
		if !stage() {
			return errors.New("no operation copies volumes")
		}
		return nil
	})
	begin := time.Now()
	b.remove(b.run(b.sleeper("small")))
	took := time.Since(begin)
	if !stage() {
		t.Logf("the copy was over within the %s of another container's life", took)
	}
	if err := <-created; err != nil {
		t.Error(err)
	}
}
