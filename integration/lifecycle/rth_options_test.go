package lifecycle

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// TestRTH_06_Options: each option of runc's shim reaches the runtime, and does
// what it says.
func TestRTH_06_Options(t *testing.T) {
	t.Parallel()
	group := fmt.Sprintf("/gantry-options-%d", os.Getpid())
	cgroupsMade(t, group)
	const uid, gid = 1234, 2345
	var runc, root, work string
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		runc = noting(filepath.Join(in.Dir, "noted"), "noted-runc", "runc")
		root, work = filepath.Join(in.Dir, "odd root"), filepath.Join(in.Dir, "criu")
		addHandler(in, c, "all", daemon.Config{"options": in.RuncOptions(daemon.Config{
			"BinaryName": runc, "Root": root, "NoNewKeyring": true, "NoPivotRoot": true, "ShimCgroup": group,
			"IoUid": uid, "IoGid": gid, "CriuImagePath": work, "CriuWorkPath": work,
		})})
	}))
	config := d.PodConfig("optional")
	hostNetwork(config)
	privileged(config)
	with := pod{d.RunPodWith(config, "all"), config}
	plainly := runPod(d, "plain", hostNetwork, privileged)
	look := func(p pod, name string) string {
		return p.run(d, looksAround(daemon.ContainerConfig(name, plain(t, d))))
	}
	all, none := look(with, "all"), look(plainly, "none")

	for _, id := range []string{with.id, all} {
		made := calls(t, runc, "--root "+filepath.Join(root, daemon.Namespace), "create", "--no-new-keyring", "--no-pivot", id)
		if len(made) != 1 {
			t.Errorf("%s was made by %q", id, made)
		}
		if !exists(filepath.Join(root, daemon.Namespace, id, "state.json")) {
			t.Errorf("the state of %s is not in %s", id, root)
		}
	}
	if len(calls(t, runc, "create", all, fmt.Sprintf("output=%d:%d", uid, gid))) != 1 {
		t.Errorf("the container's output belonged to others: %q", calls(t, runc, "create"))
	}
	if found := calls(t, runc, none); len(found) != 0 || exists(filepath.Join(root, daemon.Namespace, none)) {
		t.Errorf("another handler's runtime was run: %q", found)
	}
	var kept runcoptions.Options
	if err := json.Unmarshal(bundleFile(t, d, all, "options.json"), &kept); err != nil || kept.CriuImagePath != work || kept.CriuWorkPath != work {
		t.Errorf("the shim's options are %v, %v", &kept, err)
	}
	if got := cgroupPath(t, parentOf(t, pidOf(t, d, all)), "memory"); got != group {
		t.Errorf("the shim's memory group is %s", got)
	}
	// What the options change, seen from inside.
	for id, want := range map[string]bool{all: true, none: false} {
		keys := sh(d, id, "cat /proc/keys")
		if own := strings.Contains(keys, id+": "); own == want {
			t.Errorf("%s: a session keyring of its own is %v:\n%s", containerStatus(t, d, id).Metadata.Name, own, keys)
		}
		// The runtime gives it to the container's user, and leaves the group.
		if group := sh(d, id, "stat -L -c %g /proc/1/fd/1"); (group == fmt.Sprint(gid)) != want {
			t.Errorf("%s: its output belongs to group %s", containerStatus(t, d, id).Metadata.Name, group)
		}
	}
	if root := sh(d, all, "ls /"); strings.Contains(root, "boot") || !strings.Contains(root, "bin") {
		t.Errorf("the root that was not pivoted to has %q", root)
	}
	if err := removePod(d, with.id); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(root, daemon.Namespace, "*")); len(left) != 0 {
		t.Errorf("left in the state directory is %q", left)
	}
}

// looksAround is a container that may look at everything.
func looksAround(c *cri.ContainerConfig) *cri.ContainerConfig {
	onHost(c).Linux.SecurityContext.Privileged = true
	return c
}

// TestRTH_06_SystemdCgroup: with the option the runtime is told to ask systemd,
// and gets a path as systemd has them. What systemd does with it is tested where
// there is one.
func TestRTH_06_SystemdCgroup(t *testing.T) {
	t.Parallel()
	var runc string
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		// It shows what it was given and makes nothing.
		runc = noting(filepath.Join(in.Dir, "noted"), "noted-runc", filepath.Join(in.Dir, "noted", "refusing"))
		must(os.WriteFile(filepath.Join(in.Dir, "noted", "refusing"), []byte("#!/bin/sh\n[ \"$1\" = features ] && exit 1\ncat config.json >\"${0%/*}/spec.json\" 2>/dev/null\necho refused >&2; exit 1\n"), 0o755))
		addHandler(in, c, "systemd", daemon.Config{"options": in.RuncOptions(daemon.Config{"BinaryName": runc, "SystemdCgroup": true})})
	}))
	config := d.PodConfig("sliced")
	hostNetwork(config)
	config.Linux.CgroupParent = "/kubepods.slice/kubepods-pod1.slice"
	if id, err := d.StartPod(t.Context(), config, "systemd"); err == nil {
		t.Fatalf("pod %s runs", id)
	}
	made := calls(t, runc, "--systemd-cgroup", "create")
	if len(made) != 1 {
		t.Fatalf("the runtime was called as %q", calls(t, runc))
	}
	words := strings.Fields(made[0])
	id := words[len(words)-2] // before the note of the output
	text, err := os.ReadFile(filepath.Join(filepath.Dir(runc), "spec.json"))
	if want := `"cgroupsPath":"kubepods-pod1.slice:cri-containerd:` + id + `"`; err != nil || !strings.Contains(string(text), want) {
		t.Errorf("no %s in %.4000s, %v", want, text, err)
	}
}
