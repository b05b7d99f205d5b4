package lifecycle

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// handlerTable is the configuration of a runc handler with these keys.
func handlerTable(name string, keys map[string]any) daemon.Option {
	return daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		table := daemon.Config{"runtime_type": "io.containerd.runc.v2", "options": daemon.Config{"Root": filepath.Join(in.Dir, "runc")}}
		for k, v := range keys {
			table[k] = v
		}
		c.Set(table, "plugins", daemon.RuntimePlugin, "containerd", "runtimes", name)
	})
}

// onHandler runs a pod on a handler.
func onHandler(t *testing.T, d *daemon.Daemon, name, handler string, edits ...func(*cri.PodSandboxConfig)) *box {
	t.Helper()
	config := d.PodConfig(name)
	for _, edit := range edits {
		edit(config)
	}
	return &box{Daemon: d, t: t, pod: d.RunPodWith(config, handler), config: config, image: plain(t, d)}
}

// specOf is the specification a container was made with.
func specOf(t *testing.T, d *daemon.Daemon, id string) *specs.Spec {
	t.Helper()
	c, err := d.Client().LoadContainer(namespaced(t.Context()), id)
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.Spec(namespaced(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestDEV_02_DeviceOwnership: with the setting a device belongs to the identity
// that the request gives the container, without it to its owner on the host.
func TestDEV_02_DeviceOwnership(t *testing.T) {
	t.Parallel()
	node := mknod(t, filepath.Join(t.TempDir(), "node"), 0o660, 123, 456)
	owners := func(d *daemon.Daemon) (list []string) {
		b := newBoxOn(t, d)
		for name, ids := range map[string][2]int64{"a-both": {1000, 2000}, "b-user": {1000, 0}, "c-root": {0, 0}} {
			c := b.sleeper(name)
			c.Devices = []*cri.Device{{HostPath: node, ContainerPath: "/dev/mine", Permissions: "rw"}}
			c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: ids[0]}
			if ids[1] != 0 {
				c.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: ids[1]}
			}
			list = append(list, name+" "+sh(d, b.run(c), "stat -c %u:%g /dev/mine; (: <>/dev/mine) 2>/dev/null && echo opened || echo refused"))
		}
		slices.Sort(list)
		return list
	}
	given := start(t, daemon.Set(true, "plugins", daemon.RuntimePlugin, "device_ownership_from_security_context"))
	if got, want := owners(given), []string{"a-both 1000:2000\nopened", "b-user 1000:456\nopened", "c-root 123:456\nopened"}; !slices.Equal(got, want) {
		t.Errorf("given away: %q, want %q", got, want)
	}
	if got, want := owners(shared(t)), []string{"a-both 123:456\nrefused", "b-user 123:456\nrefused", "c-root 123:456\nopened"}; !slices.Equal(got, want) {
		t.Errorf("kept: %q, want %q", got, want)
	}
}

// TestDEV_04_PrivilegedWithoutDevices: the handler keeps the host's devices out
// of privileged containers, and the second setting lets them use those they
// make.
func TestDEV_04_PrivilegedWithoutDevices(t *testing.T) {
	t.Parallel()
	d := start(t,
		handlerTable("without", map[string]any{"privileged_without_host_devices": true}),
		handlerTable("allowed", map[string]any{"privileged_without_host_devices": true, "privileged_without_host_devices_all_devices_allowed": true}))
	for handler, want := range map[string]string{"runc": "/dev/fuse opened", "without": "refused", "allowed": "opened"} {
		b := onHandler(t, d, "dev04-"+handler, handler, privileged)
		id := b.run(b.privilegedSleeper("app"))
		got := sh(d, id, "ls /dev/fuse 2>/dev/null; mknod /fuse c 10 229; (: <>/fuse) 2>/dev/null && echo opened || echo refused")
		if got = strings.ReplaceAll(got, "\n", " "); got != want {
			t.Errorf("handler %s: %q, want %q", handler, got, want)
		}
		// It still is privileged, and gets a device that it asks for.
		c := b.privilegedSleeper("asks")
		c.Devices = []*cri.Device{{HostPath: "/dev/fuse", ContainerPath: "/dev/mine", Permissions: "rw"}}
		id = b.run(c)
		if got := sh(d, id, ": <>/dev/mine && mkdir /mounted && mount -t tmpfs none /mounted && echo mounted"); got != "mounted" {
			t.Errorf("handler %s: %q", handler, got)
		}
	}
}

// TestDEV_22_BaseSpec: the containers of a handler start from its
// specification, and the request has the last word.
func TestDEV_22_BaseSpec(t *testing.T) {
	t.Parallel()
	base := specs.Spec{
		Version: specs.Version,
		Process: &specs.Process{
			Env:     []string{"FROM_BASE=yes", "BOTH=base"},
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1111, Soft: 1000}},
		},
		Mounts: []specs.Mount{ // all there are, but for those of the request
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755"}},
			{Destination: "/from-base", Type: "tmpfs", Source: "tmpfs", Options: []string{"size=64k"}},
		},
		Annotations: map[string]string{"io.kubernetes.cri.container-type": "forged"},
		Linux:       &specs.Linux{Resources: &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(33))}}},
	}
	text, err := json.Marshal(base)
	if err != nil {
		t.Fatal(err)
	}
	path := placeFile(t, t.TempDir(), "base.json", string(text))
	d := start(t, handlerTable("based", map[string]any{"base_runtime_spec": path}))
	b := onHandler(t, d, "dev22", "based")
	c := b.sleeper("app")
	c.Envs = []*cri.KeyValue{{Key: "BOTH", Value: []byte("request")}}
	id := b.run(c)
	if got, want := sh(d, id, "ulimit -n; ulimit -Hn; echo $FROM_BASE $BOTH; awk '$2 == \"/from-base\" {print $3}' /proc/mounts"), "1000\n1111\nyes request\ntmpfs"; got != want {
		t.Errorf("inside is %q, want %q", got, want)
	}
	if got := readInt(t, cgroupFile(t, b.pid(id), "pids", "pids.max")); got != 33 {
		t.Errorf("the limit of processes is %d", got)
	}
	if s := specOf(t, d, id); s.Annotations["io.kubernetes.cri.container-type"] != "container" {
		t.Errorf("annotations are %v", s.Annotations)
	}
	other := newBoxOn(t, d)
	if got := sh(d, other.run(other.sleeper("app")), "ulimit -Hn; echo ${FROM_BASE-none}"); strings.HasPrefix(got, "1111") || !strings.HasSuffix(got, "none") {
		t.Errorf("a container of another handler has %q", got)
	}
}

// TestDEV_20_HooksDirectory: files of both schemas, their conditions, their
// order, what a hook is told, and files that come and break while the daemon
// runs.
func TestDEV_20_HooksDirectory(t *testing.T) {
	t.Parallel()
	script, marker := hookScript(t)
	low, high := t.TempDir(), t.TempDir()
	d := start(t, daemon.Set([]string{low, high}, "plugins", daemon.RuntimePlugin, "hooks_dirs"))
	b := newBoxOn(t, d)
	hook := func(args, when, stage string) string {
		return `{"version": "1.0.0", "hook": {"path": "` + script + `", "args": ["hook", "` + args + `"]}, "when": ` + when + `, "stages": ["` + stage + `"]}`
	}
	placeFile(t, low, "20-annotated.json", hook("annotated", `{"annotations": {"^want\\.hook$": "^yes$"}}`, "createContainer"))
	placeFile(t, low, "10-Command.json", hook("replaced", `{"always": true}`, "prestart"))
	placeFile(t, high, "10-Command.json", hook("command", `{"commands": ["sh$"]}`, "prestart"))
	placeFile(t, low, "30-bind.json", hook("bind", `{"hasBindMounts": true}`, "poststart"))
	placeFile(t, low, "40-old.json", `{"hook": "`+script+`", "arguments": ["old"], "stages": ["poststop"], "annotation": ["^yes$"]}`)
	placeFile(t, low, "50-never.json", hook("never", `{"always": false}`, "prestart"))
	placeFile(t, low, "README.txt", "no hook")

	c := b.sleeper("plain")
	c.Command = []string{"sleep", "1000000"}
	b.run(c)
	if exists(marker) {
		t.Fatal("a hook ran for a container that none is for")
	}
	c = b.script("all", "sleep 1000000")
	c.Annotations = map[string]string{"want.hook": "yes"}
	c.Envs = []*cri.KeyValue{{Key: "LD_PRELOAD", Value: []byte("/evil.so")}}
	c.Mounts = []*cri.Mount{{HostPath: t.TempDir(), ContainerPath: "/bound"}}
	id := b.run(c)
	b.stop(id, 0)
	b.remove(id)
	text, err := os.ReadFile(marker)
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for line := range strings.Lines(string(text)) {
		if args, ok := strings.CutPrefix(line, "args "); ok {
			order = append(order, strings.TrimSpace(args))
		}
		if strings.HasPrefix(line, "env ") && !strings.HasPrefix(line, "env PATH=") && !strings.HasPrefix(line, "env PWD=") && !strings.HasPrefix(line, "env _=") && !strings.HasPrefix(line, "env SHLVL=") {
			t.Errorf("in a hook's environment is %q", line)
		}
		if state, ok := strings.CutPrefix(line, "state "); ok && !strings.Contains(state, id) {
			t.Errorf("a hook was told %q", state)
		}
	}
	if got := strings.Join(order, " "); got != "command annotated bind old" {
		t.Errorf("hooks ran as %q", got)
	}
	broken := placeFile(t, low, "60-broken.json", `{"version": "1.0.0"`)
	b.refused(b.sleeper("broken"), codes.FailedPrecondition, "60-broken.json")
	if err := os.Remove(broken); err != nil {
		t.Fatal(err)
	}
	b.run(b.sleeper("again"))
}

// TestDEV_20_FailingHook: a hook that fails makes the start fail, and nothing is
// left of the container's process.
func TestDEV_20_FailingHook(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	script := placeFile(t, dir, "fail.sh", "#!/bin/sh\necho no such card >&2\nexit 3\n")
	if err := os.Chmod(script, 0o755); err != nil {
		t.Fatal(err)
	}
	hooks := t.TempDir()
	placeFile(t, hooks, "fail.json", `{"version": "1.0.0", "hook": {"path": "`+script+`"}, "when": {"annotations": {"^fail$": ""}}, "stages": ["createRuntime"]}`)
	b := newBoxOn(t, start(t, daemon.Set([]string{hooks}, "plugins", daemon.RuntimePlugin, "hooks_dirs")))
	c := b.sleeper("fails")
	c.Annotations = map[string]string{"fail": ""}
	id := b.mustCreate(c)
	// runc says what the hook has written, crun which one it was.
	if err := b.start(id); err == nil || !strings.Contains(err.Error(), "no such card") && !strings.Contains(err.Error(), script) {
		t.Errorf("start: %v", err)
	}
	if s := b.status(id); s.State != cri.ContainerState_CONTAINER_EXITED || s.Reason != "StartError" {
		t.Errorf("status is %v", s)
	}
}

// TestDEV_21_TraceSyscall: the annotation by which the syscall tracer is told
// where to write reaches the hook's state.
func TestDEV_21_TraceSyscall(t *testing.T) {
	t.Parallel()
	const key = "io.containers.trace-syscall"
	script, marker := hookScript(t)
	hooks := t.TempDir()
	placeFile(t, hooks, "trace.json", `{"version": "1.0.0", "hook": {"path": "`+script+`", "args": ["hook", "-s"]}, "when": {"annotations": {"^io\\.containers\\.trace-syscall$": ".*"}}, "stages": ["prestart"]}`)
	d := start(t, daemon.Set([]string{hooks}, "plugins", daemon.RuntimePlugin, "hooks_dirs"),
		handlerTable("traced", map[string]any{"pod_annotations": []string{key}, "container_annotations": []string{key}}))
	b := onHandler(t, d, "dev21", "traced", func(c *cri.PodSandboxConfig) { c.Annotations = map[string]string{key: "of:/tmp/trace.json"} })
	b.run(b.sleeper("traced"))
	text, err := os.ReadFile(marker)
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(text), "state ")
	var state specs.State
	if err := json.Unmarshal([]byte(line), &state); err != nil || state.Annotations[key] != "of:/tmp/trace.json" || state.Pid == 0 {
		t.Errorf("the hook was told %q, %v", text, err)
	}
}
