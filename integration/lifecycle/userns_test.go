package lifecycle

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// TestPOD_15_UserNamespace: all of the pod is in one user namespace, with the
// numbers that were asked for, and in it root is root.
func TestPOD_15_UserNamespace(t *testing.T) {
	t.Parallel()
	b := pausedUserBox(t, shared(t))
	id := b.run(b.sleeper("app"))
	want := fmt.Sprintf("0 %d %d", hostRoot(b.u), rangeSize)
	for _, file := range []string{"uid_map", "gid_map"} {
		if got := lines(b.Exec(id, "cat", "/proc/self/"+file)); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
	if got := sh(b.Daemon, id, "id -u; id -g"); got != "0\n0" {
		t.Errorf("inside it is %q", got)
	}
	pid, pause := b.begun(id), pidOf(t, b.Daemon, b.pod)
	wantOwner(t, fmt.Sprintf("/proc/%d", pid), hostRoot(b.u))
	wantOwner(t, fmt.Sprintf("/proc/%d", pause), hostRoot(b.u)+65535)
	other := newUserBox(t)
	otherID := other.run(other.sleeper("app"))
	ns := nsOf(t, pid, "user")
	if ns == nsOf(t, "self", "user") || ns != nsOf(t, pause, "user") || ns == nsOf(t, other.begun(otherID), "user") {
		t.Errorf("user namespaces: container %s, pause %s, host %s", ns, nsOf(t, pause, "user"), nsOf(t, "self", "user"))
	}
	second := b.run(b.sleeper("second"))
	if got := nsOf(t, b.begun(second), "user"); got != ns {
		t.Errorf("a second container is in %s, the first in %s", got, ns)
	}
	if got := podStatus(t, b.Daemon, b.pod).Linux.Namespaces.Options.UsernsOptions; !proto.Equal(got, b.u) {
		t.Errorf("status has %v", got)
	}
	features, _ := handlers(t, b.Daemon)
	for _, name := range []string{"", "runc"} {
		if !features[name].GetUserNamespaces() {
			t.Errorf("handler %q does not offer it: %v", name, features[name])
		}
	}
	// An ordinary pod beside it is as ever.
	plain := newBox(t, func(c *cri.PodSandboxConfig) { c.Metadata.Name = "beside" })
	if got := nsOf(t, plain.begun(plain.run(plain.sleeper("app"))), "user"); got != nsOf(t, os.Getpid(), "user") {
		t.Errorf("a pod that asked for none is in %s", got)
	}
}

// makeOneMore tries to make a cgroup.
const makeOneMore = "mkdir $(ls -d /sys/fs/cgroup/memory 2>/dev/null || echo /sys/fs/cgroup)/mine"

// TestPOD_15_Files: the pod's own files and its /dev/shm belong to its root, in
// every container of it.
func TestPOD_15_Files(t *testing.T) {
	t.Parallel()
	b := newUserBox(t, func(c *cri.PodSandboxConfig) { c.DnsConfig = &cri.DNSConfig{Servers: []string{"192.0.2.53"}} })
	first, second := b.run(b.sleeper("first")), b.run(b.sleeper("second"))
	for _, file := range []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm"} {
		if got := sh(b.Daemon, first, "stat -c %u:%g "+file); got != "0:0" {
			t.Errorf("%s belongs to %s", file, got)
		}
	}
	sh(b.Daemon, first, "echo 192.0.2.1 me >> /etc/hosts && echo '# mine' >> /etc/resolv.conf && echo hello > /dev/shm/file")
	if got := sh(b.Daemon, second, "grep -c 192.0.2.1 /etc/hosts; cat /dev/shm/file; stat -c %u /dev/shm/file; cat /etc/hostname"); got != "1\nhello\n0\npod-host" {
		t.Errorf("the other container sees %q", got)
	}
	// The kernel's filesystems are as ever.
	mounts := b.Exec(first, "cat", "/proc/mounts")
	for _, want := range []string{" /proc proc rw", " /sys sysfs ro", " /dev/mqueue mqueue rw", " /dev/shm tmpfs rw", " /dev/pts devpts rw"} {
		if !strings.Contains(mounts, want) {
			t.Errorf("no%s in\n%s", want, mounts)
		}
	}
	if out, code := tryExec(t, b.Daemon, first, "sh", "-c", makeOneMore); code == 0 {
		t.Errorf("a cgroup was made: %q", out)
	}
	if got := sh(b.Daemon, first, "echo x > /dev/null && head -c 7 /dev/urandom | wc -c"); got != "7" {
		t.Errorf("devices give %q", got)
	}
	owner := b.script("terminal", "tty && stat -c %u:%g $(tty)")
	owner.Tty = true
	if got := b.output(owner); !strings.Contains(got, "0:5") {
		t.Errorf("a terminal is %q", got)
	}
}

// TestPOD_15_Limits: what is set for a container holds in a user namespace.
func TestPOD_15_Limits(t *testing.T) {
	t.Parallel()
	b := newUserBox(t, privileged)
	own := readInt(t, fmt.Sprintf("/proc/%d/oom_score_adj", b.PID()))
	c := b.sleeper("app")
	c.Linux.Resources = &cri.LinuxContainerResources{OomScoreAdj: 700, CpuShares: 200}
	sc := c.Linux.SecurityContext
	sc.NoNewPrivs = true
	sc.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
	sc.Capabilities = &cri.Capability{AddCapabilities: []string{"SYS_TIME"}, DropCapabilities: []string{"CHOWN"}}
	sc.RunAsUser, sc.RunAsGroup = &cri.Int64Value{Value: 4000}, &cri.Int64Value{Value: 4001}
	sc.SupplementalGroups = []int64{4002}
	id := b.run(c)
	pid := b.begun(id)
	if got := readInt(t, fmt.Sprintf("/proc/%d/oom_score_adj", pid)); got != max(700, own) {
		t.Errorf("OOM score %d", got)
	}
	status := b.procStatus(id)
	for name, want := range map[string]string{"NoNewPrivs:": "1", "Seccomp:": "2"} {
		if got := field(t, status, name); got != want {
			t.Errorf("%s %s, want %s", name, got, want)
		}
	}
	if set := capsOf(t, status, "CapBnd"); set&(1<<0) != 0 || set&(1<<25) == 0 {
		t.Errorf("capabilities %#x", set)
	}
	if got := sh(b.Daemon, id, "id -u; id -G"); got != "4000\n4001 4002" {
		t.Errorf("identity %q", got)
	}
	wantOwner(t, fmt.Sprintf("/proc/%d/cwd/.", pid), hostRoot(b.u))
	if uid, gid := ownerOf(t, fmt.Sprintf("/proc/%d", pid)); uid != hostRoot(b.u)+4000 || gid != hostRoot(b.u)+4001 {
		t.Errorf("on the host it is %d:%d", uid, gid)
	}
	for name, edit := range map[string]func(*cri.LinuxContainerSecurityContext){
		"user 70000":  func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = &cri.Int64Value{Value: 70000} },
		"group 70001": func(s *cri.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{70001} },
	} {
		c := b.sleeper(strings.ReplaceAll(name, " ", "-"))
		edit(c.Linux.SecurityContext)
		b.refused(c, codes.InvalidArgument, name)
	}
	// A privileged container is so in its user namespace alone.
	full := b.in(b.privilegedSleeper("privileged"))
	fullID := b.run(full)
	sh(b.Daemon, fullID, "mkdir /m && mount -t tmpfs none /m && umount /m")
	if out, code := tryExec(t, b.Daemon, fullID, "sh", "-c", "mknod /n b 7 0"); code == 0 {
		t.Errorf("a block device was made: %q", out)
	}
	// A device of the host, by its rights for others.
	dev := b.sleeper("device")
	dev.Devices = []*cri.Device{{HostPath: "/dev/zero", ContainerPath: "/dev/mine", Permissions: "r"}}
	if got := sh(b.Daemon, b.run(dev), "head -c 3 /dev/mine | wc -c"); got != "3" {
		t.Errorf("read %q from the device", got)
	}
}

// TestPOD_15_Streams: output also by name, commands, terminals, forwarded
// ports and numbers of use.
func TestPOD_15_Streams(t *testing.T) {
	t.Parallel()
	b := newUserBox(t)
	for _, user := range []int64{0, 4000} {
		c := b.script(fmt.Sprint("writes-", user), "echo one; echo two > /dev/stdout; echo three > /dev/stderr; echo four > /proc/self/fd/1")
		c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: user}
		id := b.run(c)
		s := b.exited(id)
		if out, errs := logText(t, s.LogPath, "stdout"), logText(t, s.LogPath, "stderr"); s.ExitCode != 0 || out != "one\ntwo\nfour\n" || errs != "three\n" {
			t.Errorf("user %d: %d, %q, %q", user, s.ExitCode, out, errs)
		}
	}
	id := b.run(b.script("server", "while :; do echo pong | nc -l -p 8080; done"))
	if out, code := tryExec(t, b.Daemon, id, "sh", "-c", "echo by name > /dev/stdout; exit 3"); code != 3 || out != "by name\n" {
		t.Errorf("a command: %d, %q", code, out)
	}
	got, err := b.exec(spdyDial, id, strings.NewReader("to and fro"), "cat")
	if err != nil || got.stdout != "to and fro" {
		t.Errorf("a session: %+v, %v", got, err)
	}
	eventually(t, ample, func() error {
		reply, err := talk(b.forward(8080)[0], "ping\n")
		if err != nil || reply != "pong\n" {
			return fmt.Errorf("forwarded: %q, %w", reply, err)
		}
		return nil
	})
	if s := b.stats(id); s.Memory.GetWorkingSetBytes().GetValue() == 0 || s.Cpu.GetUsageCoreNanoSeconds().GetValue() == 0 || s.WritableLayer.GetUsedBytes().GetValue() == 0 {
		t.Errorf("stats %v", s)
	}
	resp, err := b.Runtime().PodSandboxStats(t.Context(), &cri.PodSandboxStatsRequest{PodSandboxId: b.pod})
	if err != nil || resp.Stats.Linux.Network.GetDefaultInterface().GetName() == "" {
		t.Errorf("pod stats %v, %v", resp, err)
	}
}

// TestPOD_15_SharedProcesses: a process namespace of the pod, and that of
// another container, are in the user namespace too.
func TestPOD_15_SharedProcesses(t *testing.T) {
	t.Parallel()
	b := pausedUserBox(t, shared(t), func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
	})
	own := b.run(b.sleeper("own"))
	shared := b.sleeper("shared")
	shared.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
	sharedID := b.run(shared)
	target := b.sleeper("target")
	target.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_TARGET
	target.Linux.SecurityContext.NamespaceOptions.TargetId = own
	targetID := b.run(target)
	if got := nsOf(t, b.begun(sharedID), "pid"); got != nsOf(t, pidOf(t, b.Daemon, b.pod), "pid") {
		t.Errorf("shared is in %s", got)
	}
	if got := nsOf(t, b.begun(targetID), "pid"); got != nsOf(t, b.begun(own), "pid") {
		t.Errorf("target is in %s", got)
	}
	if got := sh(b.Daemon, sharedID, "cat /proc/1/comm"); got != "pause" {
		t.Errorf("process 1 is %q", got)
	}
}

// TestPOD_15_Survives: a daemon that was killed goes on with the pod, also in
// what it makes in it later.
func TestPOD_15_Survives(t *testing.T) {
	t.Parallel()
	d := start(t)
	b := newUserBoxOn(t, d)
	id := b.run(b.sleeper("app"))
	ns := nsOf(t, b.begun(id), "user")
	d.Kill()
	d.Up()
	if got := lines(b.Exec(id, "cat", "/proc/self/uid_map")); got != fmt.Sprintf("0 %d %d", hostRoot(b.u), rangeSize) {
		t.Errorf("after the crash uid_map is %q", got)
	}
	later := b.run(b.sleeper("later"))
	if got := nsOf(t, b.begun(later), "user"); got != ns {
		t.Errorf("a container made later is in %s, not %s", got, ns)
	}
	if err := d.RemovePod(t.Context(), b.pod); err != nil {
		t.Error(err)
	}
	nothingLeft(t, d)
}

// TestPOD_15_Crash: at whatever moment of its life the daemon dies, nothing of
// the pod is left in the end.
func TestPOD_15_Crash(t *testing.T) {
	t.Parallel()
	d := start(t)
	needsUserns(t, d)
	img := plain(t, d)
	crashes(t, d, func(cycle string) error { return life(d, cycle, img, withUserns(newRange())) })
}

// TestPOD_15_Leftovers: a user namespace whose pod nobody knows is taken away
// by the next start.
func TestPOD_15_Leftovers(t *testing.T) {
	t.Parallel()
	d := start(t)
	b := newUserBoxOn(t, d)
	pinned, err := filepath.Glob(filepath.Join(d.State, "*", "userns", b.pod))
	if err != nil || len(pinned) != 1 {
		t.Fatalf("pinned are %v, %v", pinned, err)
	}
	orphan := filepath.Join(filepath.Dir(pinned[0]), strings.Repeat("ab", 32))
	must(os.WriteFile(orphan, nil, 0o444))
	must(unix.Mount(pinned[0], orphan, "", unix.MS_BIND, ""))
	d.Restart()
	eventually(t, ample, func() error {
		if _, err := os.Lstat(orphan); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("the orphan is there: %w", err)
		}
		return nil
	})
	b.Exec(b.run(b.sleeper("app")), "true")
}

// TestSEC_29_StaticMappings: pods that say nothing are in the node's mapping, as
// are their containers, also when the configuration has none any more; pods of the node are not.
func TestSEC_29_StaticMappings(t *testing.T) {
	t.Parallel()
	u := newRange()
	text := fmt.Sprintf("0:%d:%d", hostRoot(u), rangeSize)
	d := start(t, runtimeKey(text, "uid_mappings"), runtimeKey(text, "gid_mappings"))
	b := pausedBox(t, d)
	id := b.run(b.sleeper("app"))
	want := fmt.Sprintf("0 %d %d", hostRoot(u), rangeSize)
	for _, file := range []string{"uid_map", "gid_map"} {
		if got := lines(b.Exec(id, "cat", "/proc/self/"+file)); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
	if got := podStatus(t, d, b.pod).Linux.Namespaces.Options.UsernsOptions; !proto.Equal(got, u) {
		t.Errorf("status has %v", got)
	}
	kubelets := b.sleeper("kubelets")
	kubelets.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_NODE}
	if got := nsOf(t, b.begun(b.run(kubelets)), "user"); got != nsOf(t, pidOf(t, d, b.pod), "user") || got == nsOf(t, "self", "user") {
		t.Errorf("a container that asks for the host's is in %s", got)
	}
	own := newUserBoxOn(t, d, func(c *cri.PodSandboxConfig) { c.Metadata.Name = "own" })
	if got := lines(own.Exec(own.run(own.sleeper("app")), "cat", "/proc/self/uid_map")); got != fmt.Sprintf("0 %d %d", hostRoot(own.u), rangeSize) {
		t.Errorf("a pod that asks for its own has %q", got)
	}
	for name, edit := range map[string]func(*cri.PodSandboxConfig){"privileged": privileged, "network": hostNetwork} {
		if got := nsOf(t, pidOf(t, d, runPaused(d, name, edit).id), "user"); got != nsOf(t, "self", "user") {
			t.Errorf("a pod of the node by %s is in %s", name, got)
		}
	}
	file := filepath.Join(d.Dir, "config.toml")
	config, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(string(config), text, "")), 0); err != nil {
		t.Fatal(err)
	}
	d.Restart()
	if got := lines(b.Exec(b.run(b.sleeper("later")), "cat", "/proc/self/uid_map")); got != want {
		t.Errorf("of a container made when the configuration has none the mapping is %q", got)
	}
}

// TestPOD_16_Validation: what cannot be a pod's user namespace is refused by
// name, and nothing is made.
func TestPOD_16_Validation(t *testing.T) {
	t.Parallel()
	d := shared(t)
	for field, edit := range map[string]func(*cri.NamespaceOption){
		"uids: 2 mappings": func(o *cri.NamespaceOption) {
			o.UsernsOptions.Uids = append(o.UsernsOptions.Uids, &cri.IDMapping{HostId: 1, ContainerId: rangeSize, Length: 1})
		},
		"gids: 2 mappings": func(o *cri.NamespaceOption) {
			o.UsernsOptions.Gids = append(o.UsernsOptions.Gids, &cri.IDMapping{HostId: 1, ContainerId: rangeSize, Length: 1})
		},
		"uids: 0 mappings":     func(o *cri.NamespaceOption) { o.UsernsOptions.Uids = nil },
		"gids: 0 mappings":     func(o *cri.NamespaceOption) { o.UsernsOptions.Gids = nil },
		"uids[0].container_id": func(o *cri.NamespaceOption) { o.UsernsOptions.Uids[0].ContainerId = 1 },
		"gids[0].container_id": func(o *cri.NamespaceOption) { o.UsernsOptions.Gids[0].ContainerId = 1 },
		"uids[0].length":       func(o *cri.NamespaceOption) { o.UsernsOptions.Uids[0].Length = 0 },
		"gids[0]: 4294967295":  func(o *cri.NamespaceOption) { o.UsernsOptions.Gids[0].Length = 1<<32 - 1 },
		"mode: CONTAINER":      func(o *cri.NamespaceOption) { o.UsernsOptions.Mode = cri.NamespaceMode_CONTAINER },
		"mode: TARGET":         func(o *cri.NamespaceOption) { o.UsernsOptions.Mode = cri.NamespaceMode_TARGET },
		"with mode NODE":       func(o *cri.NamespaceOption) { o.UsernsOptions.Mode = cri.NamespaceMode_NODE },
		"pid with a user":      func(o *cri.NamespaceOption) { o.Pid = cri.NamespaceMode_NODE },
		"ipc with a user":      func(o *cri.NamespaceOption) { o.Ipc = cri.NamespaceMode_NODE },
	} {
		config := d.PodConfig("refused")
		withUserns(newRange())(config)
		edit(config.Linux.SecurityContext.NamespaceOptions)
		_, err := d.StartPod(t.Context(), config, "")
		wantError(t, err, codes.InvalidArgument, "namespace_options", field)
	}
	list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: map[string]string{"io.kubernetes.pod.name": "refused"}}})
	if err != nil || len(list.Items) != 0 {
		t.Errorf("refused pods are listed: %v, %v", list, err)
	}
}

// TestPOD_16_ContainerMismatch: a container has the user namespace of its pod.
func TestPOD_16_ContainerMismatch(t *testing.T) {
	t.Parallel()
	b := newUserBox(t)
	for name, u := range map[string]*cri.UserNamespace{"none": nil, "nodes": {Mode: cri.NamespaceMode_NODE}, "another": newRange()} {
		c := b.sleeper(name)
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = u
		b.refused(c, codes.InvalidArgument, "userns_options", "those of the pod")
	}
	c := b.sleeper("host-pid")
	c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_NODE
	b.refused(c, codes.InvalidArgument, "pid with a user namespace")
	ordinary := newBox(t, func(c *cri.PodSandboxConfig) { c.Metadata.Name = "ordinary" })
	c = ordinary.sleeper("own")
	c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = newRange()
	ordinary.refused(c, codes.InvalidArgument, "userns_options", "those of the pod")
}

// TestPOD_16_HandlerWithout: where the runtime or the snapshotter cannot do it,
// a pod is refused, and its mounts.
func TestPOD_16_HandlerWithout(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		old := filepath.Join(in.Dir, "old-runc")
		must(os.WriteFile(old, []byte("#!/bin/sh\nfor a; do [ \"$a\" != features ] || { echo 'no such command' >&2; exit 1; }; done\nexec runc \"$@\"\n"), 0o755))
		addHandler(in, c, "old", daemon.Config{"options": daemon.Config{"BinaryName": old, "Root": filepath.Join(in.Dir, "runc")}})
		addHandler(in, c, "copying", daemon.Config{"snapshotter": "native"})
	}))
	for handler, why := range map[string]string{"old": "does not offer", "copying": `"native"`} {
		config := d.PodConfig(handler)
		withUserns(newRange())(config)
		_, err := d.StartPod(t.Context(), config, handler)
		wantError(t, err, codes.FailedPrecondition, "user namespace", handler, why)
		if got, _ := handlers(t, d); got[handler].GetUserNamespaces() {
			t.Errorf("handler %s offers it", handler)
		}
	}
	config := d.PodConfig("mounts")
	p := pod{d.RunPodWith(config, "old"), config}
	c := daemon.ContainerConfig("mapped", plain(t, d))
	u := newRange()
	c.Mounts = []*cri.Mount{{ContainerPath: "/v", HostPath: t.TempDir(), UidMappings: u.Uids, GidMappings: u.Gids}}
	_, err := p.create(d, c)
	wantError(t, err, codes.FailedPrecondition, "mounts[0]", "uidMappings", `"old"`)
}

// TestPOD_17_HostNetwork: the node's network with a user namespace, and its
// /sys, of which the pod can change nothing.
func TestPOD_17_HostNetwork(t *testing.T) {
	t.Parallel()
	b := newUserBox(t, hostNetwork)
	if _, features := handlers(t, b.Daemon); !features.GetUserNamespacesHostNetwork() {
		t.Errorf("features are %v", features)
	}
	id := b.run(b.sleeper("app"))
	pid := b.begun(id)
	if nsOf(t, pid, "net") != nsOf(t, os.Getpid(), "net") || nsOf(t, pid, "user") == nsOf(t, os.Getpid(), "user") {
		t.Errorf("network %s, users %s", nsOf(t, pid, "net"), nsOf(t, pid, "user"))
	}
	if got := lines(b.Exec(id, "cat", "/proc/self/uid_map")); got != fmt.Sprintf("0 %d %d", hostRoot(b.u), rangeSize) {
		t.Errorf("uid_map is %q", got)
	}
	if got := sh(b.Daemon, id, "cat /sys/class/net/lo/address"); got != "00:00:00:00:00:00" {
		t.Errorf("address of lo is %q", got)
	}
	for _, try := range []string{"echo 1500 > /sys/class/net/lo/mtu", makeOneMore, "ip link set lo mtu 1400"} {
		if out, code := tryExec(t, b.Daemon, id, "sh", "-c", try); code == 0 {
			t.Errorf("%s: %q", try, out)
		}
	}
	for line := range strings.Lines(b.Exec(id, "cat", "/proc/self/mountinfo")) {
		f := strings.Fields(line)
		// Version 1 hierarchies are mounted in a tmpfs of the container's own.
		if f[4] == "/sys/fs/cgroup" && slices.Contains(f, "tmpfs") {
			continue
		}
		if (f[4] == "/sys" || strings.HasPrefix(f[4], "/sys/")) && !strings.HasPrefix(f[5], "ro") {
			t.Errorf("writable: %s", line)
		}
	}
}

// TestNET_22_OwnedNetwork: the pod's network belongs to its user namespace: who
// is root in it may set it up.
func TestNET_22_OwnedNetwork(t *testing.T) {
	t.Parallel()
	b := newUserBox(t, func(c *cri.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "40000 50000", "kernel.shm_rmid_forced": "1"}
	})
	c := b.sleeper("app")
	c.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"NET_ADMIN"}}
	id := b.run(c)
	pid := b.begun(id)
	for _, kind := range []string{"net", "ipc", "uts", "mnt", "pid"} {
		if got := ownerNamespace(t, pid, kind); got != nsOf(t, pid, "user") {
			t.Errorf("%s belongs to %s, the user namespace is %s", kind, got, nsOf(t, pid, "user"))
		}
	}
	if got := sh(b.Daemon, id, "cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/shm_rmid_forced"); lines(got) != "40000 50000\n1" {
		t.Errorf("settings of the pod are %q", got)
	}
	hosts := readHost(t, "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/ping_group_range", "/proc/sys/net/ipv4/ip_unprivileged_port_start")
	sh(b.Daemon, id, "echo 0 > /proc/sys/net/ipv4/ip_forward && echo 1 > /proc/sys/net/ipv4/ip_forward")
	sh(b.Daemon, id, "ip addr add 198.51.100.7/32 dev lo && ip link add dum0 type dummy 2>/dev/null; ip addr show dev lo")
	if got := sh(b.Daemon, id, "ip addr show dev lo"); !strings.Contains(got, "198.51.100.7") || !strings.Contains(got, "UP") {
		t.Errorf("lo is %q", got)
	}
	// Without the capability it may not.
	without := b.run(b.sleeper("without"))
	if out, code := tryExec(t, b.Daemon, without, "ip", "addr", "add", "198.51.100.8/32", "dev", "lo"); code == 0 {
		t.Errorf("an address was added: %q", out)
	}
	// Ping and low ports without privilege, for every user there is.
	if got := lines(sh(b.Daemon, id, "cat /proc/sys/net/ipv4/ping_group_range /proc/sys/net/ipv4/ip_unprivileged_port_start")); got != "0 65535\n0" {
		t.Errorf("defaults are %q", got)
	}
	if now := readHost(t, "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/ping_group_range", "/proc/sys/net/ipv4/ip_unprivileged_port_start"); now != hosts {
		t.Errorf("the host had %q and has %q", hosts, now)
	}
	if ip := podStatus(t, b.Daemon, b.pod).Network.Ip; ip == "" || !strings.Contains(sh(b.Daemon, id, "ip addr"), ip) {
		t.Errorf("the pod's address is %q", ip)
	}
}

func readHost(t *testing.T, files ...string) string {
	t.Helper()
	var all []byte
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, text...)
	}
	return string(all)
}

// bigImage has one layer of 48 MiB beside the base.
func bigImage(t *testing.T, d *daemon.Daemon) string {
	t.Helper()
	big := make([]byte, bigSize)
	for i := 0; i < len(big); i += 512 { // no holes
		binary.LittleEndian.PutUint64(big[i:], uint64(i))
	}
	return image(t, d, images.Spec{Layers: [][]images.File{{
		{Path: "big", Data: big}, {Path: "alices", Data: []byte("hers"), UID: images.AliceUID, GID: images.AliceUID},
		{Path: "setuid", Data: []byte("s"), Mode: 0o4755},
	}}})
}

const bigSize = 48 << 20

// TestSEC_27_NoCopy: containers of several user namespaces see the files of a
// big image as their own, and it lies on the disk once, unchanged.
func TestSEC_27_NoCopy(t *testing.T) {
	t.Parallel()
	d := start(t)
	img := bigImage(t, d)
	snapshots := filepath.Join(d.Root, "io.containerd.snapshotter.v1.overlayfs")
	before, _ := diskUse(t, snapshots)
	if before < bigSize {
		t.Fatalf("the image takes %d bytes", before)
	}
	for i := range 3 {
		b := newUserBoxOn(t, d, func(c *cri.PodSandboxConfig) { c.Metadata.Name = fmt.Sprint("big", i) })
		c := b.sleeper("app")
		c.Image = &cri.ImageSpec{Image: img}
		id := b.run(c)
		if got := sh(d, id, "stat -c '%u:%g %s' /big /bin/busybox | cut -d' ' -f1; stat -c %u:%g /alices; stat -c %a /setuid"); got != "0:0\n0:0\n1000:1000\n4755" {
			t.Errorf("owners are %q", got)
		}
		sh(d, id, "echo mine > /new && chown 1000:1000 /new && rm /alices")
		layer, err := filepath.Glob(filepath.Join(snapshots, "snapshots", "*", "fs", "new"))
		if err != nil || len(layer) == 0 {
			t.Fatalf("the new file is in %v, %v", layer, err)
		}
		if uid, _ := ownerOf(t, layer[len(layer)-1]); uid < rangeSize {
			t.Errorf("on the disk it belongs to %d", uid)
		}
	}
	if after, _ := diskUse(t, snapshots); after-before > 1<<20 {
		t.Errorf("three pods took %d bytes of disk", after-before)
	}
	originals, err := filepath.Glob(filepath.Join(snapshots, "snapshots", "*", "fs", "big"))
	if err != nil || len(originals) != 1 {
		t.Fatalf("the file lies in %v, %v", originals, err)
	}
	wantOwner(t, originals[0], 0)
}

// TestSNP_05_RemappedLayers: the layers are shown with other owners by the
// mount, in time that does not grow with them, and nothing of that stays.
func TestSNP_05_RemappedLayers(t *testing.T) {
	t.Parallel()
	d := start(t)
	b := newUserBoxOn(t, d)
	id := b.run(b.sleeper("app"))
	info, err := d.Client().SnapshotService("overlayfs").Stat(namespaced(t.Context()), id)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("0:%d:%d", hostRoot(b.u), rangeSize)
	for _, key := range []string{"containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping"} {
		if info.Labels[key] != want {
			t.Errorf("label %s is %q, want %q", key, info.Labels[key], want)
		}
	}
	parent, err := d.Client().SnapshotService("overlayfs").Stat(namespaced(t.Context()), info.Parent)
	if err != nil || parent.Labels["containerd.io/snapshot/uidmapping"] != "" {
		t.Errorf("the parent is %v, %v", parent, err)
	}
	if got := b.Exec(id, "cat", "/proc/self/mountinfo"); !strings.Contains(got, " / / ") || !strings.Contains(got, "overlay") {
		t.Errorf("mounts are %q", got)
	}
	// Identities are those of the image, whoever looks them up.
	c := b.sleeper("alice")
	c.Linux.SecurityContext.RunAsUsername = images.Alice
	if got := sh(d, b.run(c), "id -u; id -G"); got != fmt.Sprintf("%d\n%d %d", images.AliceUID, images.AliceUID, images.GroupGID) {
		t.Errorf("alice is %q", got)
	}
	for line := range strings.Lines(readHost(t, "/proc/self/mountinfo")) {
		if strings.HasPrefix(strings.Fields(line)[4], filepath.Join(d.Dir, "tmp")+"/") {
			t.Errorf("a mount is left: %s", line)
		}
	}
}

// filesystems are directories on filesystems that volumes lie on.
func filesystems(t *testing.T) map[string]string {
	t.Helper()
	dirs := map[string]string{"tmpfs": t.TempDir()}
	mountTmpfs(t, dirs["tmpfs"])
	for _, kind := range []string{"ext4", "xfs"} {
		mkfs, err := exec.LookPath("mkfs." + kind)
		if err != nil {
			t.Fatalf("scripts/install-deps installs mkfs.%s: %v", kind, err)
		}
		dir := t.TempDir()
		disk, root := filepath.Join(dir, "disk"), filepath.Join(dir, "root")
		must(os.WriteFile(disk, nil, 0o600))
		must(os.Truncate(disk, 320<<20))
		must(os.Mkdir(root, 0o755))
		if out, err := exec.Command(mkfs, "-q", disk).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", mkfs, err, out)
		}
		if out, err := exec.Command("mount", "-o", "loop", disk, root).CombinedOutput(); err != nil {
			t.Fatalf("mount %s: %v: %s", kind, err, out)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
				t.Errorf("unmount %s: %v", root, err)
			}
		})
		dirs[kind] = root
	}
	return dirs
}

// TestMNT_08_IDMappedVolumes: a volume with the pod's mappings has the owners
// inside that it has outside; one without has the host's.
func TestMNT_08_IDMappedVolumes(t *testing.T) {
	t.Parallel()
	b := newUserBox(t)
	for kind, dir := range filesystems(t) {
		must(os.WriteFile(filepath.Join(dir, "roots"), []byte("0"), 0o600))
		must(os.WriteFile(filepath.Join(dir, "users"), []byte("1000"), 0o600))
		must(os.Chown(filepath.Join(dir, "users"), 1000, 1001))
		must(os.WriteFile(filepath.Join(dir, "pods"), []byte("pod"), 0o600))
		must(os.Chown(filepath.Join(dir, "pods"), int(hostRoot(b.u)), int(hostRoot(b.u))))
		c := b.sleeper(kind)
		c.Mounts = []*cri.Mount{
			{ContainerPath: "/mapped", HostPath: dir, UidMappings: b.u.Uids, GidMappings: b.u.Gids},
			{ContainerPath: "/reading", HostPath: dir, Readonly: true, UidMappings: b.u.Uids, GidMappings: b.u.Gids},
			{ContainerPath: "/plain", HostPath: dir},
		}
		id := b.run(c)
		for path, want := range map[string]string{
			"/mapped": "0:0", "/mapped/roots": "0:0", "/mapped/users": "1000:1001", "/mapped/pods": "65534:65534",
			"/reading/users": "1000:1001", "/plain": "65534:65534", "/plain/roots": "65534:65534", "/plain/pods": "0:0",
		} {
			if got := sh(b.Daemon, id, "stat -c %u:%g "+path); got != want {
				t.Errorf("%s: %s belongs to %s, want %s", kind, path, got, want)
			}
		}
		if got := sh(b.Daemon, id, "cat /mapped/roots /mapped/users /reading/users /plain/pods && echo new > /mapped/new && touch /mapped/hers && chown 1000:1001 /mapped/hers"); got != "010001000pod" {
			t.Errorf("%s: read %q", kind, got)
		}
		for _, try := range []string{"cat /plain/roots", "echo x > /plain/roots", "echo x > /reading/roots", "cat /mapped/pods"} {
			if out, code := tryExec(t, b.Daemon, id, "sh", "-c", try); code == 0 {
				t.Errorf("%s: %s: %q", kind, try, out)
			}
		}
		wantOwner(t, filepath.Join(dir, "new"), 0)
		if uid, gid := ownerOf(t, filepath.Join(dir, "hers")); uid != 1000 || gid != 1001 {
			t.Errorf("%s: outside hers belongs to %d:%d", kind, uid, gid)
		}
		if got := b.status(id).Mounts; len(got) != 3 || !proto.Equal(got[0], c.Mounts[0]) {
			t.Errorf("%s: status has %v", kind, got)
		}
		b.remove(stopped(b, id))
	}
}

func stopped(b *userBox, id string) string {
	b.stop(id, 0)
	return id
}

// TestMNT_08_Refused: mappings that no kernel would take are named.
func TestMNT_08_Refused(t *testing.T) {
	t.Parallel()
	b := newUserBox(t)
	for field, edit := range map[string]func(*cri.Mount){
		"only one is set":       func(m *cri.Mount) { m.GidMappings = nil },
		"uidMappings[0].length": func(m *cri.Mount) { m.UidMappings = []*cri.IDMapping{{}} },
		"gidMappings[1]: overl": func(m *cri.Mount) { m.GidMappings = append(m.GidMappings, m.GidMappings[0]) },
	} {
		c := b.sleeper("refused")
		m := &cri.Mount{ContainerPath: "/v", HostPath: t.TempDir(), UidMappings: b.u.Uids, GidMappings: slices.Clone(b.u.Gids)}
		edit(m)
		c.Mounts = []*cri.Mount{m}
		b.refused(c, codes.InvalidArgument, "mounts[0]", field)
	}
	// A filesystem that has no such mounts, as /proc, is the container's to
	// hear of, and nothing is left of it.
	c := b.sleeper("proc")
	c.Mounts = []*cri.Mount{{ContainerPath: "/v", HostPath: "/proc", UidMappings: b.u.Uids, GidMappings: b.u.Gids}}
	id, err := b.create(c)
	if err == nil {
		err = b.start(id)
	}
	if err == nil {
		t.Error("/proc was mounted with other owners")
	}
}

// TestMNT_12_ImageVolumeUserns: the files of an image volume, of one layer and of
// several, below a sub path and a single one, belong to whom the image says, by
// the numbers of the pod's user namespace.
func TestMNT_12_ImageVolumeUserns(t *testing.T) {
	t.Parallel()
	b := newUserBox(t)
	hers := images.Text("d/hers", "hers\n")
	hers.UID, hers.GID, hers.Mode = 1000, 1001, 0o640
	roots := images.Text("d/roots", "roots\n")
	roots.Mode = 0o600
	one := b.pulled("userns/one:1", imageOf(t, []images.File{images.Dir("d", 0o755), hers, roots}))
	two := b.pulled("userns/two:1", imageOf(t, []images.File{images.Dir("d", 0o755), roots}, []images.File{hers}))
	c := b.sleeper("app")
	mapped := fromImage(two, "d", "/asked")
	mapped.UidMappings, mapped.GidMappings = b.u.Uids, b.u.Gids
	c.Mounts = []*cri.Mount{
		fromImage(one, "", "/one"), fromImage(two, "", "/two"), fromImage(two, "d", "/sub"), fromImage(one, "d/hers", "/file"), mapped,
	}
	id := b.run(c)
	for path, want := range map[string]string{
		"/one/d": "0:0", "/one/d/roots": "0:0", "/one/d/hers": "1000:1001", "/two/d": "0:0", "/two/d/roots": "0:0", "/two/d/hers": "1000:1001",
		"/sub": "0:0", "/sub/hers": "1000:1001", "/file": "1000:1001", "/asked/roots": "0:0", "/asked/hers": "1000:1001",
	} {
		if got := sh(b.Daemon, id, "stat -c %u:%g "+path); got != want {
			t.Errorf("%s belongs to %s, want %s", path, got, want)
		}
	}
	if got := sh(b.Daemon, id, "cat /one/d/roots /two/d/hers"); got != "roots\nhers" {
		t.Errorf("root reads %q", got)
	}
	b.remove(stopped(b, id))
}

// TestMNT_18_ImageDeclaredUserns: the same for the volumes that an image declares,
// which root of the pod may write.
func TestMNT_18_ImageDeclaredUserns(t *testing.T) {
	t.Parallel()
	b := newUserBox(t)
	hers := images.Text("data/hers", "hers\n")
	hers.UID, hers.GID = 1000, 1001
	c := b.sleeper("app")
	c.Image = &cri.ImageSpec{Image: image(t, b.Daemon, images.Spec{
		Volumes: []string{"/data", "/empty"}, Layers: [][]images.File{{images.Dir("data", 0o755), hers}},
	})}
	id := b.run(c)
	b.Exec(id, "sh", "-c", "touch /data/new /empty/new && chown 1000:1001 /data/new")
	for path, want := range map[string]string{"/data": "0:0", "/data/hers": "1000:1001", "/data/new": "1000:1001", "/empty": "0:0", "/empty/new": "0:0"} {
		if got := sh(b.Daemon, id, "stat -c %u:%g "+path); got != want {
			t.Errorf("%s belongs to %s, want %s", path, got, want)
		}
	}
	b.remove(stopped(b, id))
}

// TestCVE_2025_47291_Limits: a pod with a user namespace is in the cgroup that
// the kubelet chose, and its limits hold.
func TestCVE_2025_47291_Limits(t *testing.T) {
	t.Parallel()
	b := pausedUserBox(t, shared(t))
	const limit = 24 << 20
	c := b.sleeper("app")
	c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: limit, CpuShares: 333}
	id := b.run(c)
	for what, pid := range map[string]int{id: b.begun(id), b.pod: pidOf(t, b.Daemon, b.pod)} {
		text := readHost(t, fmt.Sprintf("/proc/%d/cgroup", pid))
		want := filepath.Join(b.config.Linux.CgroupParent, what)
		for _, controller := range []string{"memory", "cpu", "pids"} {
			if versionOne(controller) && !strings.Contains(text, ":"+want+"\n") {
				t.Errorf("%s is in\n%s\nwant %s", what, text, want)
			}
		}
		if !strings.Contains(text, want) {
			t.Errorf("%s is in\n%s\nwant %s", what, text, want)
		}
	}
	if got := b.knob(id, "memory", "memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(limit) {
		t.Errorf("memory is limited to %s", got)
	}
	c = b.script("greedy", "exec tail /dev/zero")
	c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: limit}
	if s := b.exited(b.run(c)); s.Reason != "OOMKilled" {
		t.Errorf("beyond the limit: %s, %d", s.Reason, s.ExitCode)
	}
	if err := b.update(id, &cri.LinuxContainerResources{MemoryLimitInBytes: 2 * limit}); err != nil {
		t.Error(err)
	}
	if got := b.knob(id, "memory", "memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(2*limit) {
		t.Errorf("after an update memory is limited to %s", got)
	}
}
