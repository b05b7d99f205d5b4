package lifecycle

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// Handlers beside the default one, on every daemon of the package.
const (
	// otherHandler is like the default one.
	otherHandler = "other"
	// slowHandler has a shim that waits before it starts, and an OCI runtime
	// that waits before it creates, as long as stall says.
	slowHandler = "slow"
	// brokenHandler has an OCI runtime that does not exist.
	brokenHandler = "broken"
)

// What slowHandler can be made to wait at.
const (
	shimStart  = "start"  // of a pod's shim
	runcCreate = "create" // of a pod's or a container's first process
)

// wrapper passes everything on to PROGRAM, but notes each call with VERB among
// its arguments, and has it wait while the file stall-VERB is there.
const wrapper = `#!/bin/sh
for arg; do
	if [ "$arg" = VERB ]; then
		echo "$*" >> DIR/VERB
		while [ -e DIR/stall-VERB ]; do sleep 0.05; done
	fi
done
exec PROGRAM "$@"
`

func writeWrapper(dir, name, program, verb string) (path string) {
	path = filepath.Join(dir, name)
	must(os.WriteFile(path, []byte(strings.NewReplacer("DIR", dir, "PROGRAM", program, "VERB", verb).Replace(wrapper)), 0o755))
	return path
}

func wrapDir(dir string) string { return filepath.Join(dir, "wrap") }

func addWrappedHandlers(in *daemon.Instance, c daemon.Config) {
	dir := wrapDir(in.Dir)
	must(os.MkdirAll(dir, 0o755))
	shim := writeWrapper(dir, "containerd-shim-slow-v2", "containerd-shim-runc-v2", shimStart)
	runc := writeWrapper(dir, "slow-runc", "runc", runcCreate)
	addHandler(in, c, otherHandler, nil)
	addHandler(in, c, slowHandler, daemon.Config{
		"runtime_path": shim, "options": in.RuncOptions(daemon.Config{"BinaryName": runc}),
	})
	addHandler(in, c, brokenHandler, daemon.Config{"options": daemon.Config{"BinaryName": "/no/such/runtime"}})
}

// stall makes every shim or OCI runtime of slowHandler that begins from now on
// wait until the returned function is called.
func stall(t *testing.T, d *daemon.Daemon, verb string) (end func()) {
	t.Helper()
	path := filepath.Join(wrapDir(d.Dir), "stall-"+verb)
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	end = func() {
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			t.Errorf("end stall: %v", err)
		}
	}
	t.Cleanup(end)
	return end
}

// wrapped are the command lines of slowHandler's programs with the verb and an
// ID among them.
func wrapped(t *testing.T, d *daemon.Daemon, verb, id string) (calls []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(wrapDir(d.Dir), verb))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, id) {
			calls = append(calls, line)
		}
	}
	return calls
}

// shimsOf are the shim processes of a pod: those with its ID in their command
// line.
func shimsOf(t *testing.T, id string) (pids []int) {
	t.Helper()
	found, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // ended meanwhile
		}
		args := strings.Split(string(text), "\x00")
		if strings.Contains(args[0], "containerd-shim-") && strings.Contains(string(text), "\x00"+id+"\x00") {
			var pid int
			if _, err := fmt.Sscanf(f, "/proc/%d/cmdline", &pid); err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}
