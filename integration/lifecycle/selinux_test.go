package lifecycle

import (
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
	"github.com/gantry-cri/gantry/integration/images"
)

// needSELinux skips where no process and no file has a label.
func needSELinux(t *testing.T) {
	t.Helper()
	if labelOf(os.Getpid()) == "" {
		t.Skip("the kernel of this machine does not use SELinux")
	}
}

// labelledBox is a pod of a daemon that gives labels.
func labelledBox(d *daemon.Daemon, t *testing.T, name string, edits ...func(*cri.PodSandboxConfig)) *box {
	t.Helper()
	p := runPaused(d, name, edits...)
	return &box{Daemon: d, t: t, image: plain(t, d), config: p.config, pod: p.id}
}

// fileLabel is the label of a file, a link's its own, "" for none.
func fileLabel(t *testing.T, path string) string {
	t.Helper()
	buf := make([]byte, 512)
	n, err := unix.Lgetxattr(path, "security.selinux", buf)
	if err != nil && !errors.Is(err, unix.ENODATA) {
		t.Fatalf("label of %s: %v", path, err)
	}
	return strings.TrimRight(string(buf[:max(0, n)]), "\x00")
}

// setLabel gives a file a label.
func setLabel(t *testing.T, path, label string) {
	t.Helper()
	if err := unix.Lsetxattr(path, "security.selinux", []byte(label), 0); err != nil {
		t.Fatalf("label %s: %v", path, err)
	}
}

// levelOf is the last part of a label.
func levelOf(label string) string {
	parts := strings.SplitN(label, ":", 4)
	return parts[len(parts)-1]
}

// wantLabels compares what is inside a container with what it should be: the
// process's label, that of a command, and that of its files.
func (b *box) wantLabels(id, process, file string) {
	b.t.Helper()
	pid := b.begun(id)
	if got := labelOf(pid); got != process {
		b.t.Errorf("the process has %s, want %s", got, process)
	}
	if got := strings.TrimRight(sh(b.Daemon, id, "cat /proc/self/attr/current"), "\x00\n"); got != process {
		b.t.Errorf("a command has %s, want %s", got, process)
	}
	for _, path := range []string{"/", "/bin", "/dev/shm", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"} {
		if got := fileLabel(b.t, fmt.Sprintf("/proc/%d/root%s", pid, path)); got != file {
			b.t.Errorf("%s has %s, want %s", path, got, file)
		}
	}
}

// TestPOD_18_Labels: the sandbox's process, the pod's files and its containers
// have what the pod asks for, part by part.
func TestPOD_18_Labels(t *testing.T) {
	needSELinux(t)
	t.Parallel()
	d := start(t, runtimeKey(true, "enable_selinux"))
	b := labelledBox(d, t, "asked", func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{User: "unconfined_u", Role: "system_r", Type: "spc_t", Level: "s0:c7,c8"}
	})
	const process, file = "unconfined_u:system_r:spc_t:s0:c7,c8", "unconfined_u:object_r:container_file_t:s0:c7,c8"
	if got := labelOf(pidOf(t, d, b.pod)); got != process {
		t.Errorf("the sandbox has %s, want %s", got, process)
	}
	b.wantLabels(b.run(b.sleeper("app")), process, file)
	// What no policy knows is refused, and leaves nothing behind.
	config := d.PodConfig("unknown")
	config.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Type: "gantry_no_such_t"}
	if id, err := d.StartPod(t.Context(), config, pausing); err == nil {
		t.Errorf("pod %s runs as a type that there is not", id)
	}
}

// TestSEC_21_Labels: each pod has a pair of categories of its own, which its
// containers, their commands and its files share. A container's own options go
// first. Privilege, and the host's processes or IPC, are not confined.
func TestSEC_21_Labels(t *testing.T) {
	needSELinux(t)
	t.Parallel()
	d := start(t, runtimeKey(true, "enable_selinux"))
	b := labelledBox(d, t, "one")
	pause := labelOf(pidOf(t, d, b.pod))
	level := levelOf(pause)
	if !strings.HasPrefix(pause, "system_u:system_r:container_t:s0:c") || !strings.Contains(level, ",c") {
		t.Fatalf("the sandbox has %s", pause)
	}
	file := "system_u:object_r:container_file_t:" + level
	b.wantLabels(b.run(b.sleeper("first")), pause, file)
	b.wantLabels(b.run(b.sleeper("second")), pause, file)
	own := b.sleeper("own")
	own.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Type: "spc_t"}
	b.wantLabels(b.run(own), "system_u:system_r:spc_t:"+level, file)
	if other := labelOf(pidOf(t, d, runPaused(d, "other").id)); levelOf(other) == level || other == "" {
		t.Errorf("another pod has %s too", other)
	}
	daemons := labelOf(b.PID())
	node := &cri.NamespaceOption{Pid: cri.NamespaceMode_NODE}
	for name, edit := range map[string]func(*cri.PodSandboxConfig){"privileged": privileged, "host-processes": withNamespaces(node), "host-ipc": withNamespaces(&cri.NamespaceOption{Ipc: cri.NamespaceMode_NODE})} {
		b := labelledBox(d, t, name, edit)
		c := b.sleeper("app")
		if name == "privileged" {
			c = b.privilegedSleeper("app")
		}
		c.Linux.SecurityContext.NamespaceOptions = b.config.Linux.SecurityContext.NamespaceOptions
		id := b.run(c)
		for who, pid := range map[string]int{"sandbox": pidOf(t, d, b.pod), "container": b.begun(id)} {
			if got := labelOf(pid); got != daemons {
				t.Errorf("%s, %s: %s, and the daemon is %s", name, who, got, daemons)
			}
		}
		if _, mount := specLabels(t, d, id); !strings.HasPrefix(mount, "system_u:object_r:container_file_t:s0:c") {
			t.Errorf("%s: its files have %q", name, mount)
		}
	}
}

// TestSEC_22_CategoryRange: pairs are below the bound. They are taken for as
// long as their pod is there, for a daemon that has just begun too, and free
// after that.
func TestSEC_22_CategoryRange(t *testing.T) {
	needSELinux(t)
	t.Parallel()
	d := start(t, runtimeKey(true, "enable_selinux"), runtimeKey(3, "selinux_category_range"))
	levels := map[string]string{}
	for i := range 3 {
		id := runPaused(d, fmt.Sprint("pod-", i)).id
		levels[levelOf(labelOf(pidOf(t, d, id)))] = id
	}
	for _, level := range []string{"s0:c0,c1", "s0:c0,c2", "s0:c1,c2"} {
		if levels[level] == "" {
			t.Fatalf("nobody has %s: %v", level, levels)
		}
	}
	full := func() {
		t.Helper()
		_, err := d.StartPod(t.Context(), d.PodConfig("more"), "")
		if err == nil || !strings.Contains(err.Error(), codes.ResourceExhausted.String()) {
			t.Errorf("a pod more than there are pairs: %v", err)
		}
	}
	full()
	d.Restart()
	full()
	if err := errors.Join(stopPod(d, levels["s0:c0,c2"]), removePod(d, levels["s0:c0,c2"])); err != nil {
		t.Fatal(err)
	}
	if got := levelOf(labelOf(pidOf(t, d, runPaused(d, "next").id))); got != "s0:c0,c2" {
		t.Errorf("the next pod has %s", got)
	}
}

// TestSEC_23_HostNetwork: by the switch, pods in the node's network are not
// confined, unless they ask for a type; and volumes of a process that may use
// every file are not relabelled for it.
func TestSEC_23_HostNetwork(t *testing.T) {
	needSELinux(t)
	t.Parallel()
	d := start(t, runtimeKey(true, "enable_selinux"), runtimeKey(true, "hostnetwork_disable_selinux"))
	daemons := labelOf(d.PID())
	b := labelledBox(d, t, "host", hostNetwork)
	app := b.begun(b.run(onHost(b.sleeper("app"))))
	typed := onHost(b.sleeper("typed"))
	typed.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Type: "container_t"}
	if got := labelOf(b.begun(b.run(typed))); !strings.HasPrefix(got, "system_u:system_r:container_t:s0:c") {
		t.Errorf("with a type the container has %s", got)
	}
	for who, pid := range map[string]int{"sandbox": pidOf(t, d, b.pod), "container": app} {
		if got := labelOf(pid); got != daemons {
			t.Errorf("%s: %s, and the daemon is %s", who, got, daemons)
		}
	}
	b = labelledBox(d, t, "own-network")
	if got := labelOf(pidOf(t, d, b.pod)); !strings.HasPrefix(got, "system_u:system_r:container_t:s0:c") {
		t.Errorf("a pod with a network of its own has %s", got)
	}
	volume := t.TempDir()
	before := fileLabel(t, volume)
	super := b.sleeper("super")
	super.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Type: "spc_t"}
	super.Mounts = []*cri.Mount{{HostPath: volume, ContainerPath: "/volume", SelinuxRelabel: true}}
	b.run(super)
	if got := fileLabel(t, volume); got != before {
		t.Errorf("a volume of spc_t was relabelled from %q to %q", before, got)
	}
}

// volumeTree is a volume with a file in a directory.
func volumeTree(t *testing.T) (volume, file string) {
	t.Helper()
	volume = t.TempDir()
	file = filepath.Join(volume, "sub", "file")
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.WriteFile(file, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	return volume, file
}

// changed tells when a file's attributes were last set.
func changed(t *testing.T, path string) unix.Timespec {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ctim
}

// TestMNT_07_Relabel: a volume gets the label of the pod where it is asked for,
// all through and not again when it has it; nothing else is touched, and no
// directory of the system (CVE-2021-43816).
func TestMNT_07_Relabel(t *testing.T) {
	needSELinux(t)
	t.Parallel()
	d := start(t, runtimeKey(true, "enable_selinux"))
	sharing := func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Level: "s0"}
	}
	one, other := labelledBox(d, t, "one"), labelledBox(d, t, "other", sharing)
	volume, file := volumeTree(t)
	mounting := func(b *box, name string, relabel bool) *cri.ContainerConfig {
		c := b.sleeper(name)
		c.Mounts = []*cri.Mount{{HostPath: volume, ContainerPath: "/volume", SelinuxRelabel: relabel}}
		return c
	}
	labelled := func(want string) {
		t.Helper()
		for _, path := range []string{volume, file} {
			if got := fileLabel(t, path); got != want {
				t.Errorf("%s has %q, want %q", path, got, want)
			}
		}
	}
	before := fileLabel(t, file)
	one.run(mounting(one, "as-it-is", false))
	labelled(before)
	_, private := specLabels(t, d, one.run(mounting(one, "private", true)))
	labelled(private)
	set := changed(t, file)
	one.run(mounting(one, "again", true))
	if now := changed(t, file); now != set {
		t.Errorf("what had its label was labelled again, at %v after %v", now, set)
	}
	// Pods that share a level share what has it.
	other.run(mounting(other, "shared", true))
	labelled("system_u:object_r:container_file_t:s0")

	// A file in the place of one of the pod's is nobody's to label.
	hosts := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(hosts, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	before = fileLabel(t, hosts)
	c := one.sleeper("in-place")
	c.Mounts = []*cri.Mount{{HostPath: hosts, ContainerPath: "/etc/hosts"}}
	one.run(c)
	if got := fileLabel(t, hosts); got != before {
		t.Errorf("a file in the place of the pod's was relabelled from %q to %q", before, got)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/etc", link); err != nil {
		t.Fatal(err)
	}
	for i, path := range []string{"/etc", "/usr/", link} {
		before := fileLabel(t, "/etc/passwd")
		c := one.sleeper(fmt.Sprint("system-", i))
		c.Mounts = []*cri.Mount{{HostPath: path, ContainerPath: "/volume", SelinuxRelabel: true}}
		one.refused(c, codes.FailedPrecondition, "relabel", "not allowed")
		if got := fileLabel(t, "/etc/passwd"); got != before {
			t.Errorf("/etc/passwd was relabelled from %q to %q", before, got)
		}
	}
	// What an image declares becomes the container's own.
	ref := image(t, d, images.Spec{Volumes: []string{"/data"}, Layers: [][]images.File{{images.Text("data/file", "x")}}})
	id := one.run(daemon.ContainerConfig("declared", ref))
	if got := fileLabel(t, fmt.Sprintf("/proc/%d/root/data/file", one.begun(id))); got != private {
		t.Errorf("a volume of the image has %q, want %q", got, private)
	}
}

// TestSEC_24_TrySkipRelabel: by the pod's annotation, a volume that has its label
// is not gone through.
func TestSEC_24_TrySkipRelabel(t *testing.T) {
	needSELinux(t)
	t.Parallel()
	d := start(t, runtimeKey(true, "enable_selinux"))
	level := func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Level: "s0:c3,c4"}
	}
	usual := labelledBox(d, t, "usual", level)
	quick := labelledBox(d, t, "quick", level, func(c *cri.PodSandboxConfig) {
		c.Annotations = map[string]string{"io.kubernetes.cri-o.TrySkipVolumeSELinuxLabel": "true"}
	})
	const want, odd = "system_u:object_r:container_file_t:s0:c3,c4", "system_u:object_r:container_file_t:s0:c5,c6"
	volume, file := volumeTree(t)
	for i, step := range []struct {
		b     *box
		label string // the file's, after
	}{{quick, want}, {quick, odd}, {usual, want}} {
		if i > 0 {
			setLabel(t, file, odd)
		}
		c := step.b.sleeper(fmt.Sprint("step-", i))
		c.Mounts = []*cri.Mount{{HostPath: volume, ContainerPath: "/volume", SelinuxRelabel: true}}
		step.b.run(c)
		if got := fileLabel(t, file); got != step.label || fileLabel(t, volume) != want {
			t.Errorf("step %d: the file has %s, want %s; the volume has %s", i, got, step.label, fileLabel(t, volume))
		}
	}
}

// TestCTR_28_SELinuxType: systemd has the type of init systems, unless the
// container asks for another.
func TestCTR_28_SELinuxType(t *testing.T) {
	needSELinux(t)
	t.Parallel()
	b := labelledBox(start(t, runtimeKey(true, "enable_selinux")), t, "pod")
	ref := image(t, b.Daemon, images.Spec{Entrypoint: []string{"/usr/lib/systemd/systemd"}, Layers: [][]images.File{{
		images.Executable("usr/lib/systemd/systemd", []byte("#!/bin/sh\ntrap 'exit 0' 37\nwhile :; do sleep 1000 & wait $!; done\n")),
	}}})
	level := levelOf(labelOf(pidOf(t, b.Daemon, b.pod)))
	for kind, options := range map[string]*cri.SELinuxOption{"container_init_t": nil, "container_t": {Type: "container_t"}} {
		c := daemon.ContainerConfig(strings.ReplaceAll(kind, "_", "-"), ref)
		c.Linux.SecurityContext.SelinuxOptions = options
		if got, want := labelOf(b.begun(b.run(c))), "system_u:system_r:"+kind+":"+level; got != want {
			t.Errorf("%v: %s, want %s", options, got, want)
		}
	}
}
