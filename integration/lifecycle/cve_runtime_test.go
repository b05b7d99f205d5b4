package lifecycle

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// harmless is a setting of the host that takes numbers alone, so that a test which
// finds a hole does no harm.
const harmless = "/proc/sys/vm/stat_interval"

// usual are the paths that a kubelet asks to have masked and read-only.
func usual(c *cri.ContainerConfig) *cri.ContainerConfig {
	s := c.Linux.SecurityContext
	s.MaskedPaths = []string{"/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
		"/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"}
	s.ReadonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
	return c
}

// confined makes a container with the usual paths and wants that, if it starts at
// all, it has the kernel's own file systems in their places, with what is masked
// masked and what is read-only read-only. It reports whether it started.
func (b *box) confined(c *cri.ContainerConfig) (started bool) {
	b.t.Helper()
	id, err := b.create(usual(c))
	if err == nil {
		err = b.start(id)
	}
	if err != nil {
		b.t.Logf("%s: %v", c.Metadata.Name, err)
	}
	if id == "" {
		return false
	}
	defer b.remove(id)
	if err != nil {
		return false
	}
	// It writes nothing: /dev/null may be anything.
	resp, err := b.Runtime().ExecSync(b.t.Context(), &cri.ExecSyncRequest{ContainerId: id, Timeout: 60, Cmd: []string{"sh", "-c", `stat -f -c %t /proc /sys; wc -c /proc/keys /proc/timer_list
for f in ` + harmless + ` /proc/sysrq-trigger /sys/kernel/profiling; do sh -c ": >>$f" && echo writable $f; done
cat /proc/self/mountinfo`}})
	if err != nil {
		b.withoutProc(id, err)
		return true
	}
	out := string(resp.Stdout)
	const proc, sysfs = "9fa0", "62656572"
	if got := strings.Fields(out); len(got) < 6 || !slices.Equal(got[:6], []string{proc, sysfs, "0", "/proc/keys", "0", "/proc/timer_list"}) {
		b.t.Errorf("%s: /proc, /sys and what is masked of them are %.200q", c.Metadata.Name, out)
	}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		open := len(f) > 6 && strings.Contains(line, " - cgroup") && !strings.HasPrefix(f[5], "ro,")
		if open || strings.HasPrefix(line, "writable") || strings.Contains(line, strings.TrimPrefix(harmless, "/proc")+" /") {
			b.t.Errorf("%s: there is %s", c.Metadata.Name, line)
		}
	}
	return true
}

// withoutProc wants that a container in which no command can be run has nothing of the
// kernel's to be confined: crun lets a volume be in place of /proc.
func (b *box) withoutProc(id string, why error) {
	b.t.Helper()
	b.t.Logf("%s: %v", id, why)
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", b.pid(id)))
	if err != nil || len(mounts) == 0 || !strings.Contains(why.Error(), "/proc/self") {
		b.t.Errorf("no command can be run: %v; mounts: %v", why, err)
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if strings.Contains(line, " - proc ") || strings.Contains(line, " - cgroup") && !strings.HasPrefix(f[5], "ro,") {
			b.t.Errorf("there is %s", line)
		}
	}
}

// TestCVE_2023_27561_CVE_2023_28642_CVE_2023_25809_ProcAndSysAreTheKernels: /proc
// or /sys of the image are links, to directories of the image, to a volume that
// has all that a label is written to, or one to the other, or a volume is asked for
// in place of /proc. There is no container, or one that is confined as ever.
func TestCVE_2023_27561_CVE_2023_28642_CVE_2023_25809_ProcAndSysAreTheKernels(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	if !b.confined(b.sleeper("honest")) {
		t.Error("an honest container does not start")
	}
	fake := t.TempDir()
	for _, dir := range []string{"self/attr/apparmor", "self/fd", "sys/kernel", "fs/cgroup"} {
		if err := os.MkdirAll(filepath.Join(fake, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"self/attr/exec", "self/attr/apparmor/exec", "keys", "timer_list", "sysrq-trigger"} {
		if err := os.WriteFile(filepath.Join(fake, file), nil, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	volume := &cri.Mount{HostPath: fake, ContainerPath: "/vol"}
	inside := []images.File{images.Dir("fake", 0o755), images.Dir("fake/self", 0o755), images.Dir("fake/self/attr", 0o755), images.Text("fake/self/attr/exec", "")}
	honest := b.image
	for name, links := range map[string][]images.File{
		"proc-inside": {images.Whiteout("proc"), images.Symlink("proc", "/fake")},
		"proc-volume": {images.Whiteout("proc"), images.Symlink("proc", "vol")},
		"proc-sys":    {images.Whiteout("proc"), images.Symlink("proc", "/sys")},
		"sys-inside":  {images.Whiteout("sys"), images.Symlink("sys", "/fake")},
		"sys-volume":  {images.Whiteout("sys"), images.Symlink("sys", "/vol")},
		"sys-proc":    {images.Whiteout("sys"), images.Symlink("sys", "/proc")},
	} {
		b.image = image(t, b.Daemon, images.Spec{Layers: [][]images.File{inside, links[:1], links[1:]}})
		b.confined(b.withMounts(name, volume))
	}
	b.image = honest
	b.confined(b.withMounts("volume-at-proc", &cri.Mount{HostPath: fake, ContainerPath: "/proc"}))
	b.confined(b.withMounts("volume-in-proc", &cri.Mount{HostPath: filepath.Join(fake, "self/attr"), ContainerPath: "/proc/self/attr"}))
}

// TestCVE_2025_31133_CVE_2025_52565_CVE_2025_52881_DevicesAreLinks: /dev/null,
// /dev/console and the terminals are links to settings of the kernel or to the host,
// in the image or in a volume at /dev; there is a terminal or none. What is masked
// stays masked, and nothing is written through the links.
func TestCVE_2025_31133_CVE_2025_52565_CVE_2025_52881_DevicesAreLinks(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	o := newOutside(t)
	honest := b.image
	for name, target := range map[string]string{"kernel": harmless, "up": o.up() + "/secret"} {
		volume := t.TempDir()
		if err := os.Mkdir(filepath.Join(volume, "pts"), 0o755); err != nil {
			t.Fatal(err)
		}
		files := []images.File{images.Dir("dev/pts", 0o755)}
		for _, device := range []string{"null", "zero", "console", "ptmx", "tty", "stdout", "pts/0", "pts/1", "pts/ptmx"} {
			files = append(files, images.Symlink("dev/"+device, target))
			if err := os.Symlink(target, filepath.Join(volume, device)); err != nil {
				t.Fatal(err)
			}
		}
		linked := image(t, b.Daemon, images.Spec{Layers: [][]images.File{files}})
		for _, tty := range []bool{false, true} {
			b.image = linked
			c := b.sleeper(fmt.Sprint("image-", name, "-", tty))
			c.Tty = tty
			if !b.confined(c) {
				t.Errorf("%s does not start, although /dev is not the image's", c.Metadata.Name)
			}
			b.image = honest
			c = b.withMounts(fmt.Sprint("volume-", name, "-", tty), &cri.Mount{HostPath: volume, ContainerPath: "/dev"})
			c.Tty = tty
			b.confined(c)
			o.untouched()
		}
	}
}

// TestCVE_2025_31133_CVE_2025_52565_CVE_2025_52881_OldRuncIsToldOf: a handler whose
// runc is older than the corrections runs pods as before, and an operator is told
// of it with the numbers and the versions to have, in the log and in a condition.
func TestCVE_2025_31133_CVE_2025_52565_CVE_2025_52881_OldRuncIsToldOf(t *testing.T) {
	t.Parallel()
	const old = "/usr/sbin/runc" // Debian's, before any that is found by name
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		addHandler(in, c, "old-runc", daemon.Config{"options": in.RuncOptions(daemon.Config{"BinaryName": old})})
	}))
	words := []string{"old-runc", "CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881", "1.2.8", "1.3.3", "1.4.0-rc.3", "distribution"}
	lacks := func(text string) error {
		for _, w := range words {
			if !strings.Contains(text, w) {
				return fmt.Errorf("%s is not in %q", w, text)
			}
		}
		return nil
	}
	eventually(t, soon, func() error { // they are asked in the background
		s, err := d.Runtime().Status(t.Context(), &cri.StatusRequest{})
		if err != nil {
			return err
		}
		at := slices.IndexFunc(s.Status.Conditions, func(c *cri.RuntimeCondition) bool { return c.Type == "RuntimesHaveNoKnownWeaknesses" })
		if at < 0 {
			return errors.New("there is no condition")
		}
		c := s.Status.Conditions[at]
		if c.Status || c.Reason != "KnownWeaknesses" || strings.Contains(c.Message, `"runc":`) {
			return fmt.Errorf("the condition is %v", c)
		}
		return lacks(c.Message)
	})
	var told string
	for line := range strings.Lines(d.Tail(1 << 20)) {
		if strings.Contains(line, "Known weakness") {
			told += line
		}
	}
	if err := lacks(told); err != nil || !strings.Contains(told, "level=warning") || strings.Contains(told, "handler=runc") {
		t.Errorf("the log says %q: %v", told, err)
	}
	config := d.PodConfig("old")
	b := &box{Daemon: d, t: t, image: plain(t, d), config: config, pod: d.RunPodWith(config, "old-runc")}
	if got := sh(d, b.run(b.sleeper("app")), "echo runs"); got != "runs" {
		t.Errorf("the container says %q", got)
	}
}

// TestCVE_2024_0132_CVE_2024_0133_CVE_2025_23266_CVE_2025_23267_HooksAreTheHosts: a
// container sets all that makes a program of the host load or find something of its
// own. Hooks of each stage, of a hooks directory and of a device, have none of it
// in their environments, and do not run in its working directory: those of
// createContainer run where runc puts them, at the root of the container's files,
// all others in the bundle.
func TestCVE_2024_0132_CVE_2024_0133_CVE_2025_23266_CVE_2025_23267_HooksAreTheHosts(t *testing.T) {
	t.Parallel()
	hooks := t.TempDir()
	script, marker := hookScript(t)
	stages := []string{"prestart", "createRuntime", "createContainer", "poststart", "poststop"}
	for _, stage := range stages {
		placeFile(t, hooks, stage+".json", fmt.Sprintf(`{"version": "1.0.0", "hook": {"path": %q, "args": ["hook", %q]}, "when": {"always": true}, "stages": [%q]}`, script, stage, stage))
	}
	b := newBoxOn(t, start(t, daemon.Set([]string{hooks}, "plugins", daemon.RuntimePlugin, "hooks_dirs")))
	var ofDevice []cdiHook
	for _, stage := range stages {
		ofDevice = append(ofDevice, cdiHook{stage, script, []string{"hook", "device-" + stage}, nil})
	}
	describe(t, cdiDir(b.Daemon), "cve.json", cdiFile{Version: "0.5.0", Kind: "cve.test/gpu", Devices: []cdiDevice{{"0", cdiEdits{Hooks: ofDevice}}}})
	hostile := []string{"LD_PRELOAD=./proc/self/cwd/evil.so", "LD_AUDIT=/evil.so", "LD_LIBRARY_PATH=.", "ENV=/evil.sh", "BASH_ENV=/evil.sh", "PATH=.:/evil",
		"GCONV_PATH=.", "GODEBUG=x=1", "PYTHONPATH=.", "NVIDIA_DRIVER_ROOT=/evil", "IFS=/"}
	b.image = image(t, b.Daemon, images.Spec{Env: hostile, WorkingDir: "/evil", Layers: [][]images.File{{
		images.Dir("evil", 0o755), images.Executable("evil/env", []byte("#!/bin/sh\necho evil\n")), images.Symlink("evil.so", "/bin/busybox"), images.Symlink("etc/ld.so.cache", "/evil.so"),
	}}})
	c := withCDI(b.sleeper("app"), "cve.test/gpu=0")
	c.Command = []string{"/bin/sleep", "1000000"}
	c.WorkingDir = "/evil"
	c.Envs = []*cri.KeyValue{{Key: "LD_PRELOAD", Value: []byte("/evil.so")}, {Key: "LD_PRELOAD_", Value: []byte("x\nLD_PRELOAD=/evil.so")}}
	id := b.run(c)
	b.stop(id, 0)
	b.remove(id)
	text, err := os.ReadFile(marker)
	if err != nil {
		t.Fatal(err)
	}
	var ran []string
	for line := range strings.Lines(string(text)) {
		kind, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		name, _, _ := strings.Cut(value, "=")
		switch {
		case kind == "args":
			ran = append(ran, value)
		case kind == "cwd" && (strings.Contains(value, "evil") || strings.Contains(value, "/rootfs") && !strings.HasSuffix(ran[len(ran)-1], "createContainer")):
			t.Errorf("hook %s runs in %s", ran[len(ran)-1], value)
		case kind == "env" && (!slices.Contains([]string{"PATH", "PWD", "SHLVL", "_"}, name) || strings.Contains(value, "evil")):
			t.Errorf("a hook has %q", value)
		}
	}
	for _, stage := range stages {
		for _, want := range []string{stage, "device-" + stage} {
			if !slices.Contains(ran, want) {
				t.Errorf("hook %s did not run: %q", want, ran)
			}
		}
	}
}
