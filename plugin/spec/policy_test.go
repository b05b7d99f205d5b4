package spec

import (
	"slices"
	"testing"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// TestReadOnlyNode: a node whose containers are all read-only gives them room to
// write in memory, which what the pod mounts there replaces; privileged ones are
// left alone.
func TestReadOnlyNode(t *testing.T) {
	s := mustContainer(t, func(in *ContainerInput) {
		in.Policy.ReadOnly = true
		withMounts(bind("/a", "/tmp"))(in)
	})
	if !s.Root.Readonly {
		t.Error("the root is writable")
	}
	for dir, kind := range map[string]string{"/run": "tmpfs", "/var/tmp": "tmpfs", "/tmp": "bind"} {
		if m, _ := findMount(s, dir); m.Type != kind || !slices.Contains(m.Options, "rw") {
			t.Errorf("%s is %+v", dir, m)
		}
	}
	s = mustContainer(t, func(in *ContainerInput) { in.Policy.ReadOnly = true; privileged(in) })
	if _, found := findMount(s, "/run"); found || s.Root.Readonly {
		t.Errorf("privileged: readonly %v, /run %v", s.Root.Readonly, found)
	}
	s = mustContainer(t, func(in *ContainerInput) { sec(in).ReadonlyRootfs = true })
	if _, found := findMount(s, "/run"); found || !s.Root.Readonly {
		t.Errorf("read-only of its own: readonly %v, /run %v", s.Root.Readonly, found)
	}
}

// TestNodeMounts: the node's mounts and files are read-only, and what the pod
// mounts goes before them.
func TestNodeMounts(t *testing.T) {
	s := mustContainer(t, func(in *ContainerInput) {
		in.NodeMounts = []facts.Mount{{Source: "/node/one", Destination: "/one", Readonly: true}, {Source: "/node/two", Destination: "/two", Readonly: true}}
		in.Files.Env, in.Files.Timezone = "/pod/env", "/zones/X"
		withMounts(bind("/a", "/two"))(in)
	})
	for destination, source := range map[string]string{"/one": "/node/one", "/two": "/a", "/run/.containerenv": "/pod/env", "/etc/localtime": "/zones/X"} {
		if m, _ := findMount(s, destination); m.Source != source || slices.Contains(m.Options, "ro") != (source != "/a") {
			t.Errorf("%s is %+v", destination, m)
		}
	}
}

func TestPrivilegedSeccompProfile(t *testing.T) {
	s := mustContainer(t, func(in *ContainerInput) {
		privileged(in)
		in.Policy.PrivilegedSeccompProfile, in.SeccompProfile = "/p.json", []byte(profileJSON)
	})
	if s.Linux.Seccomp == nil {
		t.Error("a privileged container has no filter")
	}
	if s := mustContainer(t, privileged); s.Linux.Seccomp != nil {
		t.Error("without a profile it has one")
	}
	s = mustContainer(t, func(in *ContainerInput) { in.Policy.PrivilegedSeccompProfile = "/p.json" })
	if s.Linux.Seccomp != nil {
		t.Error("another container has it")
	}
}
