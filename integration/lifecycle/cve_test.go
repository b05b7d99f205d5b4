package lifecycle

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/images"
)

// outside is a directory of the host that no image may reach.
type outside struct {
	t   *testing.T
	dir string
}

func newOutside(t *testing.T) outside {
	t.Helper()
	// Not a test's own directory, which only root could look into.
	dir, err := os.MkdirTemp("/tmp", "outside")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(filepath.Join(dir, "secret"), []byte("secret\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	return outside{t, dir}
}

// up leads to it from any directory of an image.
func (o outside) up() string { return strings.Repeat("../", 20) + o.dir[1:] }

// untouched fails the test when anything was made, changed or mounted there.
func (o outside) untouched() {
	o.t.Helper()
	entries, err := os.ReadDir(o.dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "secret" {
		o.t.Errorf("outside there are %v, %v", entries, err)
	}
	if text, err := os.ReadFile(filepath.Join(o.dir, "secret")); err != nil || string(text) != "secret\n" {
		o.t.Errorf("outside the file says %q, %v", text, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), o.dir) {
		o.t.Errorf("something is mounted in %s: %v", o.dir, err)
	}
}

// TestCVE_2022_23648_DeclaredVolumes: an image declares volumes at places which
// lead to the host, by names and by links. Nothing of the host is copied, nothing
// of it is mounted on.
func TestCVE_2022_23648_DeclaredVolumes(t *testing.T) {
	t.Parallel()
	d := shared(t)
	b := newBoxOn(t, d)
	o := newOutside(t)
	b.declaredVolumes(o, "nothing")
	b.declaredVolumes(o, "a directory", images.Dir(o.dir[1:], 0o755))
	// A way through /proc is one that runtimes refuse to go.
	b.image = pulledImage(t, d, "cve/volumes:3", images.MustBuild(images.Spec{Volumes: []string{"/magic"}, Layers: [][]images.File{{
		images.Symlink("magic", "/proc/self/root"+o.dir),
	}}}))
	b.attempt(b.sleeper("magic"))
	o.untouched()
	// A volume at a link to a single file of the host is no directory.
	b.image = pulledImage(t, d, "cve/volumes:2", images.MustBuild(images.Spec{Volumes: []string{"/file"}, Layers: [][]images.File{{
		images.Symlink("file", o.dir+"/secret"),
	}}}))
	if second := b.onLinks(b.sleeper("file"), false); second != "" {
		if out, _ := tryExec(t, d, second, "sh", "-c", "cat /file; cat /file/*"); strings.Contains(out, "secret\n") {
			t.Errorf("inside it says %q", out)
		}
	}
	o.untouched()
}

// onLinks runs a container with mounts at links. Where they lead to nothing in the image,
// runc makes what they lead to, and crun refuses: then there is no container.
func (b *box) onLinks(c *cri.ContainerConfig, whole bool) (id string) {
	b.t.Helper()
	id = b.mustCreate(c)
	err := b.start(id)
	if err == nil {
		return id
	}
	if whole || !strings.Contains(err.Error(), "No such file or directory") {
		b.t.Errorf("%s: %v", c.Metadata.Name, err)
	}
	b.remove(id)
	return ""
}

// declaredVolumes runs a container of an image in which the way to the host leads to
// what it has itself at that path.
func (b *box) declaredVolumes(o outside, leadsTo string, itself ...images.File) {
	t, d := b.t, b.Daemon
	t.Helper()
	volumes := []string{
		"/" + o.up(), "/proc/.." + o.dir, "/proc/self/root" + o.dir, "/proc/1/cwd" + o.dir, "/dev/.." + o.dir, o.dir,
		"/abs", "/rel", "/deep/abs/secret-too", "/through/sub", "/abs2/./../abs2",
	}
	b.image = pulledImage(t, d, fmt.Sprint("cve/volumes:to-", len(itself)), images.MustBuild(images.Spec{Volumes: volumes, Layers: [][]images.File{itself, {
		images.Symlink("abs", o.dir), images.Symlink("rel", o.up()), images.Dir("deep", 0o755), images.Symlink("deep/abs", o.dir),
		images.Symlink("through", "/abs"), images.Symlink("abs2", o.dir+"/."),
	}}}))
	id := b.onLinks(b.sleeper(fmt.Sprint("app", len(itself))), len(itself) > 0)
	o.untouched()
	if id == "" {
		return
	}
	if got := sh(d, id, "find / -xdev -name secret 2>/dev/null; for m in $(awk '{print $5}' /proc/self/mountinfo); do find $m -xdev -name secret 2>/dev/null; done; true"); got != "" {
		t.Errorf("to %s: inside there is %q", leadsTo, got)
	}
	for _, dir := range volumesOf(t, d) {
		if err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
			if e != nil && e.Name() == "secret" {
				t.Errorf("copied: %s", path)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}
	b.Exec(id, "sh", "-c", "touch /abs/new /rel/new")
	o.untouched()
}

// hostileRoots are images in which a directory that a runtime writes to or mounts
// on is a link to the host.
func (o outside) hostileRoots(dir string) map[string]images.Spec {
	roots := map[string]images.Spec{}
	for name, target := range map[string]string{"absolute": o.dir, "relative": o.up(), "magic": "/proc/self/root" + o.dir, "root": "/", "up": "../"} {
		roots[name] = images.Spec{Layers: [][]images.File{{images.Whiteout(dir)}, {images.Symlink(dir, target)}}}
	}
	return roots
}

// attempt creates and starts a container; whether that works is the runtime's
// business.
func (b *box) attempt(c *cri.ContainerConfig) {
	b.t.Helper()
	id, err := b.create(c)
	if err == nil {
		err = b.start(id)
	}
	b.t.Logf("%s: %v", c.Metadata.Name, err)
	if id != "" {
		b.remove(id)
	}
}

// TestCVE_2024_5154_Etc: the files of a pod are put into an /etc that leads to
// the host.
func TestCVE_2024_5154_Etc(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	o := newOutside(t)
	hosts, err := os.ReadFile("/etc/hosts")
	if err != nil {
		t.Fatal(err)
	}
	for name, spec := range o.hostileRoots("etc") {
		b.image = image(t, b.Daemon, spec)
		b.attempt(b.sleeper(name))
		o.untouched()
	}
	for _, name := range []string{"/mtab", "/hostname", "/resolv.conf", "/hosts"} {
		if exists(name) {
			t.Errorf("%s is on the host", name)
		}
	}
	if now, err := os.ReadFile("/etc/hosts"); err != nil || string(now) != string(hosts) {
		t.Errorf("the host's own file: %q, %v", now, err)
	}
}

// TestCVE_2026_41579_SystemDirectories: the kernel's filesystems are mounted on
// directories that lead to the host.
func TestCVE_2026_41579_SystemDirectories(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	o := newOutside(t)
	for _, dir := range []string{"dev", "proc", "sys"} {
		for name, spec := range o.hostileRoots(dir) {
			b.image = image(t, b.Daemon, spec)
			b.attempt(b.sleeper(dir + "-" + name))
			o.untouched()
		}
	}
}

// TestCVE_2024_9341_MountOnLink: mounts that are asked for at a path which the
// image made a link to the host; source and target stay what they are.
func TestCVE_2024_9341_MountOnLink(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	o := newOutside(t)
	links := []images.File{
		images.Symlink("abs", o.dir), images.Symlink("rel", o.up()), images.Symlink("magic", "/proc/self/root"+o.dir),
		images.Symlink("file", o.dir+"/secret"),
	}
	b.image = image(t, b.Daemon, images.Spec{Layers: [][]images.File{links}})
	model := b.pulled("cve/model:1", imageOf(t, []images.File{images.Text("mine", "mine\n"), images.Symlink("link", o.dir)}))
	for i, p := range []string{"/abs", "/rel", "/abs/new", "/rel/new/deep", "/magic", "/file"} {
		mine := t.TempDir()
		if err := os.WriteFile(filepath.Join(mine, "mine"), []byte("mine\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		b.attempt(b.withMounts(fmt.Sprint("host-path-", i), &cri.Mount{HostPath: mine, ContainerPath: p}))
		o.untouched()
		b.attempt(b.withMounts(fmt.Sprint("image-", i), fromImage(model, "", p)))
		o.untouched()
	}
	for _, itself := range [][]images.File{nil, {images.Dir(o.dir[1:], 0o755)}} { // where the links lead to in the image
		b.image = image(t, b.Daemon, images.Spec{Layers: [][]images.File{itself, links}})
		name := fmt.Sprint("inside-", len(itself))
		if id := b.onLinks(b.withMounts(name, &cri.Mount{HostPath: t.TempDir(), ContainerPath: "/abs"}), len(itself) > 0); id != "" {
			b.denied(id, "No such file", "cat", "/abs/secret")
		}
		o.untouched()
	}
	b.refused(b.withMounts("sub-path", fromImage(model, "link", "/x")), codes.NotFound)
}

// TestCVE_2024_45310_SwappedTarget: while a container is made that mounts below a
// shared volume, another one swaps the directory there for a link to the host,
// again and again.
func TestCVE_2024_45310_SwappedTarget(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	o := newOutside(t)
	shared, mine := t.TempDir(), t.TempDir()
	file := filepath.Join(mine, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	volume := &cri.Mount{HostPath: shared, ContainerPath: "/vol"}
	swapper := b.script("swapper", "cd /vol; while :; do mkdir x; rm -rf x; ln -s "+o.dir+" x; rm -f x; ln -s "+o.up()+" x; rm -f x; done 2>/dev/null")
	swapper.Mounts = []*cri.Mount{volume}
	id := b.run(swapper)
	for i := range 12 {
		b.attempt(b.withMounts(fmt.Sprint("victim-", i), volume,
			&cri.Mount{HostPath: mine, ContainerPath: "/vol/x/dir"}, &cri.Mount{HostPath: file, ContainerPath: "/vol/x/file"}))
	}
	o.untouched()
	b.stop(id, 0)
}

// TestCVE_2026_24054_NoLayers: the root filesystem of an image without layers is
// an empty directory of the container's own, and nothing else.
func TestCVE_2026_24054_NoLayers(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	img := b.pulled("cve/scratch:1", imageOf(t))
	c := b.sleeper("app")
	c.Image.Image, c.Command = img, []string{"/program"}
	program := filepath.Join(t.TempDir(), "program")
	text, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, text, 0o755); err != nil {
		t.Fatal(err)
	}
	// Without any program it cannot start, and says so.
	id := b.mustCreate(c)
	wantError(t, b.start(id), codes.Unknown, "/program")
	b.remove(id)
	// With one from elsewhere it runs, and sees what the runtime made.
	c.Metadata.Attempt, c.Mounts = 1, []*cri.Mount{{HostPath: program, ContainerPath: "/busybox", Readonly: true}}
	c.Command = []string{"/busybox", "sleep", "1000000"}
	id = b.run(c)
	found := strings.Fields(b.Exec(id, "/busybox", "ls", "-A", "/"))
	if want := []string{"busybox", "dev", "etc", "proc", "sys"}; !slices.Equal(found, want) {
		t.Errorf("the root has %q, want %q", found, want)
	}
	b.Exec(id, "/busybox", "mkdir", "/mine")
	// As a volume it is an empty directory.
	second := b.run(b.withMounts("volume", fromImage(img, "", "/v")))
	if got := b.Exec(second, "ls", "-A", "/v"); got != "" {
		t.Errorf("the volume has %q", got)
	}
	b.denied(second, "Read-only", "touch", "/v/x")
}

// TestCVE_2022_23648_Archive: layers that are themselves hostile put nothing
// outside either: names that go up, links and hard links to the host.
func TestCVE_2022_23648_Archive(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	o := newOutside(t)
	for name, files := range map[string][]images.File{
		"name": {images.Text(o.up()+"/new", "new\n")},
		"link": {images.Symlink("l", o.dir), images.Text("l/new", "new\n")},
		"hard": {{Path: "h", Type: tar.TypeLink, Link: o.up() + "/secret"}},
	} {
		ref := push(t, "cve/archive-"+name+":1", images.MustBuild(images.Spec{Volumes: []string{"/l", "/h", o.dir}, Layers: [][]images.File{files}}))
		if _, err := pull(t.Context(), b.Daemon, ref, nil); err != nil {
			t.Logf("%s: %v", name, err)
			continue
		}
		b.image = ref
		b.attempt(b.sleeper(name))
		o.untouched()
	}
	o.untouched()
}
