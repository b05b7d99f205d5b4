package lifecycle

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// recorder is runc that writes down how it is called and, when the file DIR/hooks is
// there, gives what it creates hooks that write down their names.
const recorder = `#!/bin/sh
echo "$*" >> DIR/calls
for a; do
	[ "$before" = --bundle ] && bundle=$a
	before=$a
done
case " $* " in *" create "*)
	[ ! -e DIR/hooks ] || sed -i 's|"linux":{|"hooks":{"poststart":[{"path":"DIR/hook","args":["hook","poststart"]}],"poststop":[{"path":"DIR/hook","args":["hook","poststop"]}]},"linux":{|' "$bundle/config.json"
esac
exec runc "$@"
`

const recorderHook = `#!/bin/sh
cat > /dev/null
echo "$1" >> DIR/hooked
`

const recordedHandler = "recorded"

func recordedDir(dir string) string { return filepath.Join(dir, "recorded") }

func withRecorder(in *daemon.Instance, c daemon.Config) {
	dir := recordedDir(in.Dir)
	must(os.MkdirAll(dir, 0o755))
	for name, text := range map[string]string{"runtime": recorder, "hook": recorderHook} {
		must(os.WriteFile(filepath.Join(dir, name), []byte(strings.ReplaceAll(text, "DIR", dir)), 0o755))
	}
	addHandler(in, c, recordedHandler, daemon.Config{
		"runtime_type": "io.containerd.gantry.v2", "sandboxer": "shim",
		"options": in.RuncOptions(daemon.Config{"BinaryName": filepath.Join(dir, "runtime")}),
	})
}

// recordedVerbs are the commands about containers that the recorder was given, in
// order, and forgets them.
func recordedVerbs(t *testing.T, d *daemon.Daemon) (verbs []string) {
	t.Helper()
	path := filepath.Join(recordedDir(d.Dir), "calls")
	data, err := os.ReadFile(path)
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil {
		t.Fatal(err)
	}
	known := []string{"create", "start", "kill", "delete", "state", "exec"}
	for line := range strings.Lines(string(data)) {
		words := strings.Fields(line)
		i := slices.IndexFunc(words, func(w string) bool { return slices.Contains(known, w) })
		switch {
		case i >= 0:
			verbs = append(verbs, words[i])
		case !slices.Contains(words, "features"):
			t.Fatalf("the runtime was called with %q", line)
		}
	}
	return verbs
}

// TestRTH_14_FewCommands: our own shim runs the OCI runtime to create a container,
// and starts, kills and deletes it without, unless there are hooks for then.
func TestRTH_14_FewCommands(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(withRecorder))
	p := pod{config: d.PodConfig("recorded")}
	hostNetwork(p.config)
	p.id = d.RunPodWith(p.config, recordedHandler)

	ends := p.run(d, onHost(daemon.ContainerConfig("ends", plain(t, d), "sh", "-c", "exit 7")))
	if s := waitExited(t, d, ends); s.ExitCode != 7 {
		t.Errorf("code %d", s.ExitCode)
	}
	stubborn := p.run(d, onHost(daemon.ContainerConfig("stubborn", plain(t, d), "sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")))
	// All its processes are killed, also those that leave their parents.
	shared := daemon.ContainerConfig("shared", plain(t, d), "sh", "-c", "(setsid sleep 1000000 &); sleep 1000000")
	several := p.run(d, inNamespaces(shared, &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_NODE}))
	begun(t, pidOf(t, d, several))
	if _, err := p.create(d, onHost(daemon.ContainerConfig("never", plain(t, d), "sleep", "1000000"))); err != nil {
		t.Fatal(err)
	}
	for _, ctr := range []string{stubborn, several} {
		if err := stopContainer(d, ctr, 0); err != nil {
			t.Error(err)
		}
		if s := waitExited(t, d, ctr); s.ExitCode != 137 {
			t.Errorf("code %d", s.ExitCode)
		}
		if err := removeContainer(d, ctr); err != nil {
			t.Error(err)
		}
	}
	if err := removeContainer(d, ends); err != nil {
		t.Error(err)
	}
	if verbs := recordedVerbs(t, d); slices.ContainsFunc(verbs, func(v string) bool { return v != runcCreate }) || len(verbs) < 3 {
		t.Errorf("the runtime was called for %v", verbs)
	}

	must(os.WriteFile(filepath.Join(recordedDir(d.Dir), "hooks"), nil, 0o644))
	hooked := p.run(d, onHost(daemon.ContainerConfig("hooked", plain(t, d), "sleep", "1000000")))
	if err := stopContainer(d, hooked, 0); err != nil {
		t.Error(err)
	}
	if err := removeContainer(d, hooked); err != nil {
		t.Error(err)
	}
	if verbs := recordedVerbs(t, d); !slices.Equal(verbs, []string{"create", "start", "delete"}) {
		t.Errorf("with hooks the runtime was called for %v", verbs)
	}
	if said, err := os.ReadFile(filepath.Join(recordedDir(d.Dir), "hooked")); err != nil || string(said) != "poststart\npoststop\n" {
		t.Errorf("hooks: %q, %v", said, err)
	}
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(d.Dir, "runc", "*", "*")); err != nil || len(left) > 0 {
		t.Errorf("the runtime's directory has %v, %v", left, err)
	}
}
