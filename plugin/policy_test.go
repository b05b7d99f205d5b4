package plugin

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// Only volumes for which it is asked are relabelled, by their own paths: not
// what else is mounted in the place of a file of the pod's.
func TestCVE_2021_43816_OnlyAskedVolumesAreRelabelled(t *testing.T) {
	asked := []*cri.Mount{
		{HostPath: "/etc/passwd", ContainerPath: "/etc/hosts"},
		{HostPath: "/volume", ContainerPath: "/volume", SelinuxRelabel: true},
		{HostPath: "/etc/shadow", ContainerPath: "/dev/shm"},
		{HostPath: "/link", ContainerPath: "/etc/resolv.conf", SelinuxRelabel: true},
	}
	resolved := []facts.Mount{{Source: "/etc/passwd"}, {Source: "/volume"}, {Source: "/etc/shadow"}, {Source: "/real"}}
	own := []facts.Mount{{Source: "/copy", Destination: "/data"}}
	if got := relabelled(asked, resolved, own); !slices.Equal(got, []string{"/volume", "/real", "/copy"}) {
		t.Errorf("relabelled are %q", got)
	}
}

func TestLabelled(t *testing.T) {
	rootfs := []mount.Mount{{Type: "overlay", Options: []string{"lowerdir=/a"}}}
	for spec, want := range map[string][]string{
		`{}`:                             {"lowerdir=/a"},
		`{"linux":{"mountLabel":"u:r"}}`: {"lowerdir=/a", `context="u:r"`},
	} {
		got, err := labelled(rootfs, []byte(spec))
		if err != nil || !slices.Equal(got[0].Options, want) {
			t.Errorf("%s: %v, %v", spec, got, err)
		}
	}
	if len(rootfs[0].Options) != 1 {
		t.Error("the mounts themselves were changed")
	}
	if _, err := labelled(rootfs, []byte("{")); !errdefs.IsInternal(err) {
		t.Errorf("a broken specification: %v", err)
	}
}

func TestCVE_2024_25621_DirectoriesAreClosed(t *testing.T) {
	base := t.TempDir()
	root, state, outside := filepath.Join(base, "root"), filepath.Join(base, "state"), filepath.Join(base, "outside")
	open := []string{
		outside, filepath.Join(root, "network", "attachments"), filepath.Join(state, "sandboxes", "id", "shm"), filepath.Join(state, "io", "id"), filepath.Join(state, "pause"),
	}
	for _, dir := range open {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, filepath.Join(state, "io", "link")); err != nil {
		t.Fatal(err)
	}
	err := filepath.Walk(base, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.IsDir() {
			err = os.Chmod(path, 0o777)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := ownDirs(root, state); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{
		root: 0o711, filepath.Join(root, "network"): 0o700, open[1]: 0o700, state: 0o711, filepath.Join(state, "sandboxes"): 0o711,
		filepath.Join(state, "sandboxes", "id"): 0o711, open[2]: 0o777, filepath.Join(state, "io"): 0o711, open[3]: 0o700, open[4]: 0o711, outside: 0o777,
	} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want %o", path, info.Mode(), err, want)
		}
	}
	fresh := filepath.Join(base, "fresh")
	if err := ownDirs(filepath.Join(fresh, "root"), filepath.Join(fresh, "state")); err != nil {
		t.Errorf("on a new node: %v", err)
	}
}
