package lifecycle

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// cdiFile is a description of CDI devices.
type cdiFile struct {
	Version string      `json:"cdiVersion"`
	Kind    string      `json:"kind"`
	Devices []cdiDevice `json:"devices"`
	Edits   *cdiEdits   `json:"containerEdits,omitempty"`
}

type cdiDevice struct {
	Name  string   `json:"name"`
	Edits cdiEdits `json:"containerEdits"`
}

type cdiEdits struct {
	Env    []string   `json:"env,omitempty"`
	Nodes  []cdiNode  `json:"deviceNodes,omitempty"`
	Mounts []cdiMount `json:"mounts,omitempty"`
	Hooks  []cdiHook  `json:"hooks,omitempty"`
	GIDs   []uint32   `json:"additionalGids,omitempty"`
}

type cdiNode struct {
	Path        string `json:"path"`
	HostPath    string `json:"hostPath,omitempty"`
	Permissions string `json:"permissions,omitempty"`
}

type cdiMount struct {
	HostPath      string   `json:"hostPath"`
	ContainerPath string   `json:"containerPath"`
	Options       []string `json:"options"`
}

type cdiHook struct {
	Name string   `json:"hookName"`
	Path string   `json:"path"`
	Args []string `json:"args,omitempty"`
	Env  []string `json:"env,omitempty"`
}

// envDevices are devices of which each sets a variable to its value.
func envDevices(kind string, values map[string]string) cdiFile {
	f := cdiFile{Version: "0.7.0", Kind: kind}
	for name, value := range values {
		f.Devices = append(f.Devices, cdiDevice{name, cdiEdits{Env: []string{strings.ToUpper(name) + "=" + value}}})
	}
	return f
}

// cdiDir is where the daemons of these tests look for descriptions.
func cdiDir(d *daemon.Daemon) string { return filepath.Join(d.Dir, "cdi") }

// describe writes a description, until the test is over.
func describe(t *testing.T, dir, name string, f cdiFile) string {
	t.Helper()
	text, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	return placeFile(t, dir, name, string(text))
}

func placeFile(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
	return path
}

// hookScript is a hook that adds to a file what it was told and in which
// environment.
func hookScript(t *testing.T) (script, marker string) {
	t.Helper()
	dir := t.TempDir()
	marker = filepath.Join(dir, "marker")
	script = placeFile(t, dir, "hook.sh", "#!/bin/sh\n"+
		"{ echo \"args $*\"; echo \"cwd $(/bin/pwd)\"; /usr/bin/env | /usr/bin/sort | /bin/sed 's/^/env /'; echo \"state $(/bin/cat)\"; } >> "+marker+"\n")
	if err := os.Chmod(script, 0o755); err != nil {
		t.Fatal(err)
	}
	return script, marker
}

// mknod makes a character device with the numbers of /dev/fuse, which opens
// without anything happening.
func mknod(t *testing.T, path string, mode uint32, uid, gid int) string {
	t.Helper()
	if err := errors.Join(unix.Mknod(path, unix.S_IFCHR|mode, int(unix.Mkdev(10, 229))), os.Chown(path, uid, gid), os.Chmod(path, os.FileMode(mode))); err != nil {
		t.Fatal(err)
	}
	return path
}

// withCDI asks for devices in the CRI's field.
func withCDI(c *cri.ContainerConfig, names ...string) *cri.ContainerConfig {
	for _, n := range names {
		c.CDIDevices = append(c.CDIDevices, &cri.CDIDevice{Name: n})
	}
	return c
}

// variables runs a container to its end and returns what it finds of these
// variables.
func (b *box) variables(c *cri.ContainerConfig, names ...string) string {
	b.t.Helper()
	text := "echo"
	for _, n := range names {
		text += fmt.Sprintf(" \"${%s-none}\"", n)
	}
	c.Command = []string{"sh", "-c", text}
	return strings.TrimSpace(b.output(c))
}

// TestDEV_07_CDI: a device that the request names brings its node, mount,
// variables and hook, and those that its whole description brings.
func TestDEV_07_CDI(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	dir := t.TempDir()
	library := placeFile(t, dir, "library", "from the vendor")
	script, marker := hookScript(t)
	node := mknod(t, filepath.Join(dir, "card0"), 0o660, 0, 0)
	describe(t, cdiDir(b.Daemon), "dev07.json", cdiFile{
		Version: "0.7.0", Kind: "dev07.test/card",
		Edits: &cdiEdits{
			Env:    []string{"DRIVER=1.2"},
			Mounts: []cdiMount{{library, "/usr/lib/vendor/library", []string{"ro", "nosuid", "nodev", "bind"}}},
			GIDs:   []uint32{4711},
		},
		Devices: []cdiDevice{
			{"0", cdiEdits{Env: []string{"CARD0=yes"}, Nodes: []cdiNode{{"/dev/vendor/card0", node, "rw"}}}},
			{"1", cdiEdits{Env: []string{"CARD1=yes"}, Hooks: []cdiHook{{"createRuntime", script, []string{"hook", "told"}, nil}}}},
		},
	})
	c := withCDI(b.sleeper("one"), "dev07.test/card=0")
	c.Linux.SecurityContext.RunAsUser, c.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: 1000}, &cri.Int64Value{Value: 2000}
	id := b.run(c)
	got := sh(b.Daemon, id, "stat -c '%t:%T %u:%g' /dev/vendor/card0; : <>/dev/vendor/card0 && echo opened; cat /usr/lib/vendor/library; echo; echo $DRIVER $CARD0 ${CARD1-none}")
	if want := "a:e5 1000:2000\nopened\nfrom the vendor\n1.2 yes none"; got != want {
		t.Errorf("inside is %q, want %q", got, want)
	}
	if out := sh(b.Daemon, id, "echo >/usr/lib/vendor/library; id -G"); !strings.Contains(out, "4711") {
		t.Errorf("groups are %q", out)
	}
	if exists(marker) {
		t.Error("the hook of another device ran")
	}
	b.run(withCDI(b.sleeper("two"), "dev07.test/card=0", "dev07.test/card=1"))
	if text, err := os.ReadFile(marker); err != nil || !strings.Contains(string(text), "args told") {
		t.Errorf("the hook wrote %q, %v", text, err)
	}
	b.refused(withCDI(b.sleeper("missing"), "dev07.test/card=0", "dev07.test/card=7"), codes.NotFound, "dev07.test/card=7", cdiDir(b.Daemon))
	b.refused(withCDI(b.sleeper("unqualified"), "card0"), codes.InvalidArgument, "CDI_devices[0]")
	if err := os.Remove(node); err != nil {
		t.Fatal(err)
	}
	b.refused(withCDI(b.sleeper("no-node"), "dev07.test/card=0"), codes.FailedPrecondition, "card0")
}

// TestDEV_08_CDIAnnotations: devices named in annotations, in the field, or in
// both, are injected once. An image that brings such an annotation gets nothing.
func TestDEV_08_CDIAnnotations(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	script, marker := hookScript(t)
	f := envDevices("dev08.test/card", map[string]string{"one": "1", "two": "2"})
	f.Devices = append(f.Devices, cdiDevice{"hooked", cdiEdits{Hooks: []cdiHook{{"createRuntime", script, nil, nil}}}})
	describe(t, cdiDir(b.Daemon), "dev08.json", f)
	c := b.script("annotated", "")
	c.Annotations = map[string]string{"cdi.k8s.io/vendor_a": "dev08.test/card=one,dev08.test/card=two"}
	if got := b.variables(c, "ONE", "TWO"); got != "1 2" {
		t.Errorf("by annotation: %q", got)
	}
	c = withCDI(b.script("both", ""), "dev08.test/card=hooked", "dev08.test/card=hooked")
	c.Annotations = map[string]string{"cdi.k8s.io/vendor_a": "dev08.test/card=hooked,dev08.test/card=two", "cdi.k8s.io/vendor_b": "dev08.test/card=hooked"}
	if got := b.variables(c, "ONE", "TWO"); got != "none 2" {
		t.Errorf("by both: %q", got)
	}
	if text, err := os.ReadFile(marker); err != nil || strings.Count(string(text), "args") != 1 {
		t.Errorf("a device that is named four times wrote %q, %v", text, err)
	}
	c = b.sleeper("bad")
	c.Annotations = map[string]string{"cdi.k8s.io/vendor_a": "two"}
	b.refused(c, codes.InvalidArgument, "cdi.k8s.io/vendor_a")
	c = b.script("image", "")
	c.Image.Annotations = map[string]string{"cdi.k8s.io/vendor_a": "dev08.test/card=one"}
	if got := b.variables(c, "ONE"); got != "none" {
		t.Errorf("by an annotation of the image: %q", got)
	}
}

// TestDEV_09_CDIDirectories: of two directories the later wins; descriptions
// that come, change and go count for the next container; a broken one costs its
// own devices, and two of equal rights are an error that names both.
func TestDEV_09_CDIDirectories(t *testing.T) {
	t.Parallel()
	low, high := t.TempDir(), filepath.Join(t.TempDir(), "not", "there", "yet")
	d := start(t, daemon.Set([]string{low, high}, "plugins", daemon.RuntimePlugin, "cdi_spec_dirs"))
	b := newBoxOn(t, d)
	n := 0
	want := func(value string) {
		t.Helper()
		n++
		if got := b.variables(withCDI(b.script(fmt.Sprintf("c%d", n), ""), "dev09.test/card=one"), "ONE"); got != value {
			t.Errorf("container %d: got %q, want %q", n, got, value)
		}
	}
	missing := func(name string, words ...string) {
		t.Helper()
		n++
		b.refused(withCDI(b.sleeper(fmt.Sprintf("c%d", n)), name), codes.NotFound, append(words, name)...)
	}
	one := func(value string) cdiFile {
		return envDevices("dev09.test/card", map[string]string{"one": value})
	}
	missing("dev09.test/card=one", low, high)
	describe(t, low, "vendor.json", one("low"))
	want("low")
	over := describe(t, high, "vendor.yaml", one("high"))
	want("high")
	describe(t, high, "vendor.yaml", one("new"))
	want("new")
	placeFile(t, low, "broken.json", `{"cdiVersion": "0.7.0", "kind": "dev09.test/broken", "devices": [{]}`)
	want("new")
	missing("dev09.test/broken=x", "broken.json")
	if err := os.Remove(over); err != nil {
		t.Fatal(err)
	}
	want("low")
	describe(t, low, "twin.json", one("twin"))
	missing("dev09.test/card=one", "twin.json", "vendor.json")
}

// TestDEV_09_NoDirectories: without directories there are no devices, and a
// request for one is no silent success.
func TestDEV_09_NoDirectories(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Set([]string{}, "plugins", daemon.RuntimePlugin, "cdi_spec_dirs"))
	b := newBoxOn(t, d)
	b.refused(withCDI(b.sleeper("one"), "dev09.test/card=one"), codes.FailedPrecondition, "cdi_spec_dirs")
}

// TestDEV_10_CDIAccelerator stands in for a GPU: a description of the shape that
// a vendor's tool generates, with nodes that are no GPU's.
func TestDEV_10_CDIAccelerator(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	dir := t.TempDir()
	script, marker := hookScript(t)
	control := mknod(t, filepath.Join(dir, "nvidiactl"), 0o666, 0, 0)
	uvm := mknod(t, filepath.Join(dir, "nvidia-uvm"), 0o666, 0, 0)
	card := mknod(t, filepath.Join(dir, "nvidia0"), 0o666, 0, 0)
	smi := placeFile(t, dir, "smi", "#!/bin/sh\nls /dev/nvidia*\ncat /usr/lib/x86_64-linux-gnu/libcuda.so.1\n")
	if err := os.Chmod(smi, 0o755); err != nil {
		t.Fatal(err)
	}
	library := placeFile(t, dir, "libcuda.so.570", "cuda")
	bind := []string{"ro", "nosuid", "nodev", "rbind", "rprivate"}
	describe(t, cdiDir(b.Daemon), "nvidia.yaml", cdiFile{
		Version: "0.5.0", Kind: "dev10.nvidia.test/gpu",
		Devices: []cdiDevice{
			{"0", cdiEdits{Nodes: []cdiNode{{Path: "/dev/nvidia0", HostPath: card}}}},
			{"all", cdiEdits{Nodes: []cdiNode{{Path: "/dev/nvidia0", HostPath: card}}}},
		},
		Edits: &cdiEdits{
			Env:    []string{"NVIDIA_VISIBLE_DEVICES=void"},
			Nodes:  []cdiNode{{Path: "/dev/nvidiactl", HostPath: control}, {Path: "/dev/nvidia-uvm", HostPath: uvm}},
			Mounts: []cdiMount{{smi, "/usr/bin/nvidia-smi", bind}, {library, "/usr/lib/x86_64-linux-gnu/libcuda.so.1", bind}},
			Hooks: []cdiHook{
				{"createContainer", script, []string{"nvidia-cdi-hook", "create-symlinks"}, []string{"NVIDIA_CTK_DEBUG=false"}},
				{"createContainer", script, []string{"nvidia-cdi-hook", "update-ldcache"}, nil},
			},
		},
	})
	c := withCDI(b.sleeper("app"), "dev10.nvidia.test/gpu=all")
	c.Envs = []*cri.KeyValue{{Key: "NVIDIA_VISIBLE_DEVICES", Value: []byte("all")}, {Key: "LD_PRELOAD", Value: []byte("/evil.so")}}
	id := b.run(c)
	if got, want := sh(b.Daemon, id, "nvidia-smi; echo; : <>/dev/nvidiactl && echo $NVIDIA_VISIBLE_DEVICES"), "/dev/nvidia-uvm\n/dev/nvidia0\n/dev/nvidiactl\ncuda\nvoid"; got != want {
		t.Errorf("inside is %q, want %q", got, want)
	}
	text, err := os.ReadFile(marker)
	if err != nil {
		t.Fatal(err)
	}
	first, second, _ := strings.Cut(string(text), "args update-ldcache")
	if !strings.Contains(first, "args create-symlinks") || !strings.Contains(first, "env NVIDIA_CTK_DEBUG=false") || second == "" {
		t.Errorf("the hooks wrote %q", text)
	}
	// What a hook is not given it does not inherit from the container.
	if strings.Contains(string(text), "LD_PRELOAD") || !strings.Contains(second, "env PATH=/usr/local/sbin:") {
		t.Errorf("the hooks' environment is the container's: %q", text)
	}
}
