package lifecycle

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

func TestPOD_01_Metadata(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "first")
	again, err := d.StartPod(t.Context(), proto.CloneOf(p.config), "")
	if err != nil || again != p.id {
		t.Errorf("the same request gave %q, %v; want the same pod %q", again, err, p.id)
	}
	other := proto.CloneOf(p.config)
	other.Annotations = map[string]string{"other": "request"}
	_, err = d.StartPod(t.Context(), other, "")
	wantError(t, err, codes.AlreadyExists, "first", p.id)

	if err := stopPod(d, p.id); err != nil {
		t.Fatal(err)
	}
	next := proto.CloneOf(p.config)
	next.Metadata.Attempt = 1
	second, err := d.StartPod(t.Context(), next, "")
	if err != nil || second == p.id {
		t.Fatalf("the next attempt gave %q, %v", second, err)
	}
	for id, want := range map[string]*cri.PodSandboxMetadata{p.id: p.config.Metadata, second: next.Metadata} {
		if got := podStatus(t, d, id).Metadata; !proto.Equal(got, want) {
			t.Errorf("status has %v, want %v", got, want)
		}
		list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{Id: id}})
		if err != nil || len(list.Items) != 1 || !proto.Equal(list.Items[0].Metadata, want) {
			t.Errorf("list has %v, %v, want %v", list, err, want)
		}
	}
}

func TestPOD_03_Hostname(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "named", func(c *cri.PodSandboxConfig) { c.Hostname = "web-0" })
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	if got := sh(d, ctr, "hostname; echo $HOSTNAME"); got != "web-0\nweb-0" {
		t.Errorf("hostname and HOSTNAME are %q", got)
	}
	node, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	host := runPod(d, "on-node", hostNetwork)
	ctr = host.run(d, onHost(daemon.ContainerConfig("main", plain(t, d))))
	if got := sh(d, ctr, "hostname; echo $HOSTNAME"); got != node+"\n"+node {
		t.Errorf("in the node's network hostname and HOSTNAME are %q, want %q", got, node)
	}
}

func TestPOD_04_LogDirectory(t *testing.T) {
	t.Parallel()
	d := shared(t)
	config := d.PodConfig("logs")
	config.LogDirectory = filepath.Join(d.LogDir, "made", "for", config.Metadata.Uid)
	resp, err := d.Runtime().RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatal(err)
	}
	p := pod{resp.PodSandboxId, config}
	c := daemon.ContainerConfig("main", plain(t, d), "sh", "-c", "echo written; sleep 1000")
	c.LogPath = "main/0.log"
	id := p.run(d, c)
	path := filepath.Join(config.LogDirectory, "main/0.log")
	if got := containerStatus(t, d, id).LogPath; got != path {
		t.Errorf("log path is %q, want %q", got, path)
	}
	eventually(t, soon, func() error {
		text, err := os.ReadFile(path)
		if err == nil && !strings.HasSuffix(string(text), " stdout F written\n") {
			err = fmt.Errorf("log is %q", text)
		}
		return err
	})
}

func TestPOD_05_DNS(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "dns", func(c *cri.PodSandboxConfig) {
		c.DnsConfig = &cri.DNSConfig{
			Servers: []string{"10.10.10.10", "fd00::10"}, Searches: []string{"a.local", "b.local"}, Options: []string{"ndots:5", "edns0"},
		}
	})
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	want := "search a.local b.local\nnameserver 10.10.10.10\nnameserver fd00::10\noptions ndots:5 edns0"
	if got := sh(d, ctr, "cat /etc/resolv.conf"); got != want {
		t.Errorf("resolv.conf is\n%s\nwant\n%s", got, want)
	}
	p = runPod(d, "no-dns")
	ctr = p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	node, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Fatal(err)
	}
	if got := sh(d, ctr, "cat /etc/resolv.conf"); got != strings.TrimSuffix(string(node), "\n") {
		t.Errorf("without a configuration resolv.conf is\n%s\nwant the node's\n%s", got, node)
	}
}

func TestPOD_07_Labels(t *testing.T) {
	t.Parallel()
	d := shared(t)
	labels := map[string]string{"pod07": "yes", "empty": "", "a.b/c-d_e": "Value-1", "long": strings.Repeat("v", 6000)}
	p := runPod(d, "labelled", hostNetwork, func(c *cri.PodSandboxConfig) { maps.Copy(c.Labels, labels) })
	runPod(d, "not-labelled", hostNetwork)
	if got := podStatus(t, d, p.id).Labels; !maps.Equal(got, p.config.Labels) {
		t.Errorf("labels are %v, want %v", got, p.config.Labels)
	}
	list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: labels}})
	if err != nil {
		t.Fatal(err)
	}
	samePods(t, "all labels", list.Items, []pod{p})
	if !maps.Equal(list.Items[0].Labels, p.config.Labels) {
		t.Errorf("listed with %v", list.Items[0].Labels)
	}
	list, err = d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{
		Filter: &cri.PodSandboxFilter{LabelSelector: map[string]string{"pod07": "yes", "empty": "not"}}})
	if err != nil {
		t.Fatal(err)
	}
	samePods(t, "one label differs", list.Items, nil)
}

func TestPOD_08_Annotations(t *testing.T) {
	t.Parallel()
	d := shared(t)
	notes := map[string]string{
		"io.kubernetes.cri.something": "else", "empty": "", "json": `{"a": ["b", "ü", "\n"]}`, "lines": "a\nb\r\n\tc",
		"prefix.example/name": strings.Repeat("long ", 20000),
	}
	p := runPod(d, "annotated", hostNetwork, func(c *cri.PodSandboxConfig) { c.Annotations = notes })
	if got := podStatus(t, d, p.id).Annotations; !maps.Equal(got, notes) {
		t.Errorf("annotations are %.300v", got)
	}
	list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{Id: p.id}})
	if err != nil || len(list.Items) != 1 || !maps.Equal(list.Items[0].Annotations, notes) {
		t.Errorf("listed: %.300v, %v", list, err)
	}
}

func TestPOD_09_CgroupParent(t *testing.T) {
	t.Parallel()
	d := shared(t)
	parent := d.PodParent("kubepods", "burstable", "pod-09")
	p := runPaused(d, "grouped", func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	for _, id := range []string{p.id, ctr} {
		for _, controller := range []string{"memory", "cpu", "pids"} {
			if got, want := cgroupPath(t, pidOf(t, d, id), controller), d.CgroupOf(parent, id); got != want {
				t.Errorf("%s cgroup is %q, want %q", controller, got, want)
			}
		}
	}
}

func TestPOD_10_Sysctls(t *testing.T) {
	t.Parallel()
	d := shared(t)
	hostValue := func(name string) string {
		t.Helper()
		text, err := os.ReadFile("/proc/sys/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(text))
	}
	before := hostValue("net/core/somaxconn")
	p := runPod(d, "tuned", func(c *cri.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{
			"net.ipv4.ip_local_port_range": "1024 65000", "net/core/somaxconn": "777", "kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "11",
		}
	})
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	got := sh(d, ctr, "cd /proc/sys; cat net/ipv4/ip_local_port_range net/core/somaxconn kernel/shm_rmid_forced fs/mqueue/msg_max")
	if strings.Join(strings.Fields(got), " ") != "1024 65000 777 1 11" {
		t.Errorf("in the pod the settings are %q", got)
	}
	if after := hostValue("net/core/somaxconn"); after != before || after == "777" {
		t.Errorf("the host's setting was %s and is %s", before, after)
	}

	for name, edit := range map[string]func(*cri.PodSandboxConfig){
		"kernel.panic":           func(*cri.PodSandboxConfig) {},
		"vm.overcommit_memory":   func(*cri.PodSandboxConfig) {},
		"net.core.somaxconn":     hostNetwork,
		"kernel.shm_rmid_forced": withNamespaces(&cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER, Ipc: cri.NamespaceMode_NODE}),
		"../../etc/passwd":       func(*cri.PodSandboxConfig) {},
	} {
		config := d.PodConfig("untunable")
		edit(config)
		config.Linux.Sysctls = map[string]string{name: "1"}
		_, err := d.StartPod(t.Context(), config, "")
		wantError(t, err, codes.InvalidArgument, "linux.sysctls", name)
	}
}

func TestPOD_12_NetworkNamespace(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "own-network")
	a, b := p.run(d, daemon.ContainerConfig("a", plain(t, d))), p.run(d, daemon.ContainerConfig("b", plain(t, d)))
	h := runPod(d, "node-network", hostNetwork)
	host := h.run(d, onHost(daemon.ContainerConfig("main", plain(t, d))))
	ns := func(ctr string) string { return sh(d, ctr, "readlink /proc/self/ns/net") }
	if ns(a) != ns(b) || ns(a) == nsOf(t, "self", "net") {
		t.Errorf("namespaces of one pod are %s and %s, the host's is %s", ns(a), ns(b), nsOf(t, "self", "net"))
	}
	if ns(host) != nsOf(t, "self", "net") {
		t.Errorf("with the node's network the namespace is %s, the host's is %s", ns(host), nsOf(t, "self", "net"))
	}
	// One container of the pod reaches the other over loopback.
	p.run(d, daemon.ContainerConfig("server", plain(t, d), "httpd", "-f", "-p", "127.0.0.1:8081", "-h", "/www"))
	fetched(t, d, b, "127.0.0.1", 8081)
}

// fetched waits until a container gets the page that every image has from a
// server.
func fetched(t *testing.T, d *daemon.Daemon, ctr, host string, port int) {
	t.Helper()
	get := fmt.Sprintf("printf 'GET /index.html HTTP/1.0\\r\\n\\r\\n' | nc -w 2 %s %d", host, port)
	eventually(t, soon, func() error {
		if out, code := tryExec(t, d, ctr, "sh", "-c", get); !strings.HasSuffix(out, "\r\n\r\nhello from the pod\n") {
			return fmt.Errorf("%s:%d: exit %d: got %q", host, port, code, out)
		}
		return nil
	})
}

// TestPOD_13_PIDNamespace: own, the pod's, the node's and that of a target.
func TestPOD_13_PIDNamespace(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := plain(t, d)
	pid1 := func(ctr string) string { return sh(d, ctr, "tr '\\0' ' ' < /proc/1/cmdline") }

	own := runPod(d, "own-pids")
	a := own.run(d, daemon.ContainerConfig("a", img, "sleep", "10001"))
	b := own.run(d, daemon.ContainerConfig("b", img, "sleep", "10002"))
	if pid1(a) != "sleep 10001 " || strings.Contains(sh(d, b, "ps"), "10001") {
		t.Errorf("process 1 is %q, of b %q", pid1(a), sh(d, b, "ps"))
	}

	common := &cri.NamespaceOption{Pid: cri.NamespaceMode_POD}
	shares := runPod(d, "shared-pids", withNamespaces(common))
	a = shares.run(d, inNamespaces(daemon.ContainerConfig("a", img, "sleep", "10003"), common))
	b = shares.run(d, inNamespaces(daemon.ContainerConfig("b", img, "sleep", "10004"), common))
	if first, seen := pid1(a), sh(d, b, "ps"); strings.Contains(first, "sleep 1000") || !strings.Contains(seen, "10003") {
		t.Errorf("process 1 of the pod is %q, b sees %q", first, seen)
	}

	node := &cri.NamespaceOption{Pid: cri.NamespaceMode_NODE}
	host := runPod(d, "node-pids", withNamespaces(node))
	a = host.run(d, inNamespaces(daemon.ContainerConfig("a", img), node))
	if got := sh(d, a, "readlink /proc/self/ns/pid"); got != nsOf(t, "self", "pid") {
		t.Errorf("with the node's processes the namespace is %s", got)
	}
	if got := sh(d, a, fmt.Sprintf("cat /proc/%d/comm", os.Getpid())); !strings.HasPrefix(filepath.Base(os.Args[0]), got) {
		t.Errorf("this process is %q there", got)
	}

	target := &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET}
	victim := own.run(d, daemon.ContainerConfig("victim", img, "sleep", "10005"))
	target.TargetId = victim
	debug := own.run(d, inNamespaces(daemon.ContainerConfig("debug", img, "sleep", "10006"), target))
	if first, seen := pid1(debug), sh(d, victim, "ps"); first != "sleep 10005 " || !strings.Contains(seen, "10006") {
		t.Errorf("process 1 of the debugger is %q, its target sees %q", first, seen)
	}
	if err := stopContainer(d, victim, 0); err != nil {
		t.Fatal(err)
	}
	_, err := own.create(d, inNamespaces(daemon.ContainerConfig("late", img), target))
	wantError(t, err, codes.FailedPrecondition, "target_id", victim)
}

func TestPOD_14_IPCNamespace(t *testing.T) {
	t.Parallel()
	d := shared(t)
	ns := func(ctr string) string { return sh(d, ctr, "readlink /proc/self/ns/ipc") }
	p := runPod(d, "own-ipc")
	a, b := p.run(d, daemon.ContainerConfig("a", plain(t, d))), p.run(d, daemon.ContainerConfig("b", plain(t, d)))
	if ns(a) != ns(b) || ns(a) == nsOf(t, "self", "ipc") {
		t.Errorf("namespaces of one pod are %s and %s, the host's is %s", ns(a), ns(b), nsOf(t, "self", "ipc"))
	}
	node := &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER, Ipc: cri.NamespaceMode_NODE}
	h := runPod(d, "node-ipc", withNamespaces(node))
	host := h.run(d, inNamespaces(daemon.ContainerConfig("main", plain(t, d)), node))
	if ns(host) != nsOf(t, "self", "ipc") {
		t.Errorf("with the node's IPC the namespace is %s, the host's is %s", ns(host), nsOf(t, "self", "ipc"))
	}
	mark, err := os.CreateTemp("/dev/shm", "gantry-test-")
	if err != nil {
		t.Fatal(err)
	}
	mark.Close()
	defer os.Remove(mark.Name())
	if _, code := tryExec(t, d, host, "test", "-e", mark.Name()); code != 0 {
		t.Error("/dev/shm is not the node's with the node's IPC")
	}
	if _, code := tryExec(t, d, a, "test", "-e", mark.Name()); code == 0 {
		t.Error("/dev/shm is the node's without the node's IPC")
	}
}

func TestPOD_22_PrivilegedGate(t *testing.T) {
	t.Parallel()
	d := shared(t)
	privileged := daemon.ContainerConfig("main", plain(t, d))
	privileged.Linux.SecurityContext.Privileged = true
	p := runPod(d, "plain-pod")
	_, err := p.create(d, privileged)
	wantError(t, err, codes.InvalidArgument, "privileged")
	p = runPod(d, "privileged-pod", func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	ctr := p.run(d, privileged)
	if got := sh(d, ctr, "mkdir /m && mount -t tmpfs none /m && grep -c ' /m ' /proc/mounts"); got != "1" {
		t.Errorf("a privileged container mounts: %q", got)
	}
	ordinary := p.run(d, daemon.ContainerConfig("ordinary", plain(t, d)))
	if out, code := tryExec(t, d, ordinary, "sh", "-c", "mkdir /m && mount -t tmpfs none /m"); code == 0 {
		t.Errorf("an ordinary container of that pod mounts: %q", out)
	}
}

// TestPOD_23_Seccomp looks at the filter of the sandbox's process.
func TestPOD_23_Seccomp(t *testing.T) {
	t.Parallel()
	d := shared(t)
	mode := func(p pod) string {
		t.Helper()
		text := podProcess(t, d, p.id)
		_, rest, _ := strings.Cut(text, "\nSeccomp:")
		value, _, _ := strings.Cut(rest, "\n")
		return strings.TrimSpace(value)
	}
	profile := filepath.Join(t.TempDir(), "profile.json")
	if err := os.WriteFile(profile, []byte(`{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["swapon"], "action": "SCMP_ACT_ERRNO"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	with := func(s *cri.SecurityProfile) func(*cri.PodSandboxConfig) {
		return func(c *cri.PodSandboxConfig) { hostNetwork(c); c.Linux.SecurityContext.Seccomp = s }
	}
	for name, c := range map[string]struct {
		profile *cri.SecurityProfile
		want    string
	}{
		"default":    {&cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}, "2"},
		"unconfined": {&cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}, "0"},
		"localhost":  {&cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: profile}, "2"},
	} {
		if got := mode(runPaused(d, name, with(c.profile))); got != c.want {
			t.Errorf("%s: the mode is %q, want %q", name, got, c.want)
		}
	}
	config := d.PodConfig("no-profile")
	with(&cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "/no/such/profile"})(config)
	_, err := d.StartPod(t.Context(), config, pausing)
	wantError(t, err, status.Code(err), "/no/such/profile")
	with(&cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost})(config)
	_, err = d.StartPod(t.Context(), config, "")
	wantError(t, err, codes.InvalidArgument, "localhost")
}

func TestPOD_26_RuntimeHandler(t *testing.T) {
	t.Parallel()
	d := shared(t)
	for handler, want := range map[string]string{"": defaultHandler, "runc": "runc", otherHandler: otherHandler} {
		config := d.PodConfig("handled")
		hostNetwork(config)
		id := d.RunPodWith(config, handler)
		if got := podStatus(t, d, id).RuntimeHandler; got != want {
			t.Errorf("handler %q: the status has %q", handler, got)
		}
	}
	_, err := d.StartPod(t.Context(), d.PodConfig("bogus"), "bogus")
	wantError(t, err, codes.NotFound, "runtime handler", "bogus", otherHandler)
}

func TestPOD_27_Addresses(t *testing.T) {
	t.Parallel()
	d := shared(t)
	order(t, d, "ADD", "three-addresses", stubOrder{Addresses: []string{"10.99.0.7/24", "fd00:99::7/64", "10.98.0.7/24"}})
	config := d.PodConfig("three-addresses")
	n := podStatus(t, d, d.RunPodWith(config, stubHandler)).Network
	if n.Ip != "10.99.0.7" || len(n.AdditionalIps) != 2 || n.AdditionalIps[0].Ip != "fd00:99::7" || n.AdditionalIps[1].Ip != "10.98.0.7" {
		t.Errorf("addresses are %v", n)
	}
	if n := podStatus(t, d, runPod(d, "none", hostNetwork).id).Network; n.GetIp() != "" || len(n.GetAdditionalIps()) != 0 {
		t.Errorf("in the node's network the addresses are %v", n)
	}
}

func TestPOD_28_State(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPaused(d, "dies")
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_READY {
		t.Errorf("pod is %s", s.State)
	}
	if err := unix.Kill(pidOf(t, d, p.id), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, soon, func() error {
		if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
			return fmt.Errorf("with its process killed the pod is %s", s.State)
		}
		return nil
	})
	_, err := p.create(d, daemon.ContainerConfig("late", plain(t, d)))
	wantError(t, err, codes.FailedPrecondition, p.id)
	if err := errors.Join(stopPod(d, p.id), removePod(d, p.id)); err != nil {
		t.Error(err)
	}
	_, err = d.Runtime().ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: ctr})
	wantError(t, err, codes.NotFound)
}

func TestPOD_29_ContainersStatuses(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "with-statuses", hostNetwork)
	ctr := p.run(d, onHost(daemon.ContainerConfig("main", plain(t, d))))
	resp, err := d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.ContainersStatuses) != 1 || !proto.Equal(resp.ContainersStatuses[0], containerStatus(t, d, ctr)) || resp.Timestamp == 0 {
		t.Errorf("at %d statuses are %v", resp.Timestamp, resp.ContainersStatuses)
	}
}

func TestPOD_30_VerboseInfo(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPaused(d, "verbose")
	resp, err := d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct {
		Pid         int
		RuntimeSpec struct{ OciVersion string }
		CNIResult   json.RawMessage
		Config      struct{ Metadata struct{ Name string } }
	}
	if err := json.Unmarshal([]byte(resp.Info["info"]), &info); err != nil {
		t.Fatalf("%v: %.500v", err, resp.Info)
	}
	if info.Pid != pidOf(t, d, p.id) || info.RuntimeSpec.OciVersion == "" || info.Config.Metadata.Name != "verbose" ||
		!strings.Contains(string(info.CNIResult), resp.Status.Network.Ip) {
		t.Errorf("info is %.2000s", resp.Info["info"])
	}
	quiet, err := d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil || len(quiet.Info) != 0 {
		t.Errorf("not asked for, there is %v, %v", quiet.Info, err)
	}
}

func TestPOD_31_Files(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "files", func(c *cri.PodSandboxConfig) { c.DnsConfig = &cri.DNSConfig{Servers: []string{"10.10.10.10"}} })
	ctr := p.run(d, daemon.ContainerConfig("generated", plain(t, d)))
	if got := sh(d, ctr, "cat /etc/hostname /etc/resolv.conf; grep -c '127.0.0.1.*localhost' /etc/hosts"); got != "files\nnameserver 10.10.10.10\n1" {
		t.Errorf("generated files are %q", got)
	}
	// Shared by the pod's containers.
	second := p.run(d, daemon.ContainerConfig("second", plain(t, d)))
	sh(d, ctr, "echo '10.1.1.1 added' >> /etc/hosts")
	if got := sh(d, second, "tail -n 1 /etc/hosts"); got != "10.1.1.1 added" {
		t.Errorf("another container's hosts ends with %q", got)
	}

	own := t.TempDir()
	config := daemon.ContainerConfig("mounted", plain(t, d))
	for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
		if err := os.WriteFile(filepath.Join(own, name), []byte("the kubelet's "+name+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		config.Mounts = append(config.Mounts, &cri.Mount{ContainerPath: "/etc/" + name, HostPath: filepath.Join(own, name)})
	}
	ctr = p.run(d, config)
	want := "the kubelet's hosts\nthe kubelet's hostname\nthe kubelet's resolv.conf"
	if got := sh(d, ctr, "cd /etc; cat hosts hostname resolv.conf"); got != want {
		t.Errorf("with mounts of its own the files are %q", got)
	}
}

func TestPOD_32_SharedMemory(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "memory")
	a, b := p.run(d, daemon.ContainerConfig("a", plain(t, d))), p.run(d, daemon.ContainerConfig("b", plain(t, d)))
	sh(d, a, "echo from-a > /dev/shm/f")
	if got := sh(d, b, "cat /dev/shm/f"); got != "from-a" {
		t.Errorf("the other container reads %q", got)
	}
	if got := sh(d, a, "df -k /dev/shm | awk 'END {print $2}'; grep -c ' /dev/shm tmpfs ' /proc/mounts"); got != "65536\n1" {
		t.Errorf("size in KiB and number of mounts are %q", got)
	}
	flags := sh(d, a, "grep ' /dev/shm tmpfs ' /proc/mounts | cut -d ' ' -f 4")
	for _, want := range []string{"nosuid", "nodev", "noexec"} {
		if !strings.Contains(flags, want) {
			t.Errorf("%s is not among the flags %q of /dev/shm", want, flags)
		}
	}
	other := runPod(d, "other-memory")
	c := other.run(d, daemon.ContainerConfig("c", plain(t, d)))
	if _, code := tryExec(t, d, c, "test", "-e", "/dev/shm/f"); code == 0 {
		t.Error("another pod sees it")
	}
}

func TestPOD_33_Zombies(t *testing.T) {
	oursAlone(t, "pause program of its own")
	t.Parallel()
	d := shared(t)
	common := &cri.NamespaceOption{Pid: cri.NamespaceMode_POD}
	p := runPod(d, "orphans", withNamespaces(common))
	ctr := p.run(d, inNamespaces(daemon.ContainerConfig("main", plain(t, d)), common))
	// Each outer shell ends at once, so the inner one belongs to process 1.
	sh(d, ctr, "i=0; while [ $i -lt 50 ]; do sh -c 'sh -c \"sleep 0.1; echo x >> /done\" &' ; i=$((i+1)); done")
	eventually(t, soon, func() error {
		if got := sh(d, ctr, "wc -l < /done"); got != "50" {
			return fmt.Errorf("%s of 50 orphans have ended", got)
		}
		if got := sh(d, ctr, "grep -l '^State:.*zombie' /proc/[0-9]*/status 2>/dev/null | wc -l"); got != "0" {
			return fmt.Errorf("%s zombies", got)
		}
		return nil
	})
}

func TestPOD_35_IDPrefix(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "prefixed", hostNetwork)
	ctr := p.run(d, onHost(daemon.ContainerConfig("main", plain(t, d))))
	if got := podStatus(t, d, p.id[:12]).Id; got != p.id {
		t.Errorf("prefix of a pod gives %s", got)
	}
	if got := sh(d, ctr[:12], "echo reached"); got != "reached" {
		t.Errorf("exec by prefix gives %q", got)
	}
	if got := containerStatus(t, d, ctr[:12]).Id; got != ctr {
		t.Errorf("prefix of a container gives %s", got)
	}
	// Among 17 containers two begin with the same digit.
	seen := map[byte]string{ctr[0]: ctr}
	for i := range 17 {
		id, err := p.create(d, onHost(daemon.ContainerConfig(fmt.Sprint("c", i), plain(t, d))))
		if err != nil {
			t.Fatal(err)
		}
		if seen[id[0]] != "" {
			_, err := d.Runtime().ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id[:1]})
			wantError(t, err, codes.InvalidArgument, "ambiguous")
			break
		}
		seen[id[0]] = id
	}
	if err := stopContainer(d, ctr[:12], 0); err != nil {
		t.Fatal(err)
	}
	if err := removeContainer(d, ctr[:12]); err != nil {
		t.Fatal(err)
	}
	_, err := d.Runtime().ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: ctr})
	wantError(t, err, codes.NotFound)
}

// TestPOD_36_NilConfigs: what a person writes for a first try, and nothing more.
func TestPOD_36_NilConfigs(t *testing.T) {
	d := shared(t)
	for name, linux := range map[string]*cri.LinuxPodSandboxConfig{"no-linux": nil, "empty-linux": {}} {
		config := &cri.PodSandboxConfig{
			Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "hdishd83djaidwnduwk28bcsb", Attempt: 1},
			Linux:    linux,
		}
		p := pod{d.RunPod(config), config}
		ctr := p.run(d, &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main"},
			Image:    &cri.ImageSpec{Image: plain(t, d)},
			Command:  []string{"sleep", "10000"},
		})
		// What is not said is shared with the pod, save for what is the node's.
		if got := sh(d, ctr, "id -u; ip -4 -o addr show eth0 | wc -l"); got != "0\n1" {
			t.Errorf("%s: user and addresses are %q", name, got)
		}
		pid := pidOf(t, d, ctr)
		if err := removePod(d, p.id); err != nil {
			t.Error(err)
		}
		waitGone(t, pid)
	}
}

// TestStateWithoutExec: pods run where no program may be executed from the
// state directory, as below /run on many nodes; also after a restart.
func TestStateWithoutExec(t *testing.T) {
	t.Parallel()
	base, err := os.MkdirTemp("/tmp", "noexec")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(os.RemoveAll(base)) })
	must(os.Chmod(base, 0o711))
	must(unix.Mount("tmpfs", base, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, "mode=711"))
	t.Cleanup(func() { must(unix.Unmount(base, unix.MNT_DETACH)) })
	d := start(t, daemon.Edit(func(_ *daemon.Instance, c daemon.Config) { c["state"] = filepath.Join(base, "state") }))
	p := runPod(d, "before")
	d.Exec(p.run(d, daemon.ContainerConfig("app", plain(t, d))), "true")
	d.Restart()
	needsUserns(t, d)
	u := newRange()
	p = runPod(d, "userns", withUserns(u))
	c := daemon.ContainerConfig("app", plain(t, d))
	c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = u
	d.Exec(p.run(d, c), "true")
}
