package pool

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	v2 "github.com/containerd/containerd/v2/core/runtime/v2"
)

// A process that makes a container from one of our bundles is ended before
// anybody is told how the task stands; one with another bundle is not.
func TestCreatorsEnd(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "runtime")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nread x\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	start := func(bundle string) *exec.Cmd {
		cmd := exec.Command(script, "create", "--bundle", bundle, "id")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close(); cmd.Wait() })
		return cmd
	}
	p := &Pool{shims: map[string]*shim{"a": {bundle: &v2.Bundle{ID: "a", Path: filepath.Join(dir, "a")}}}}
	ours, other := start(filepath.Join(dir, "a")), start(filepath.Join(dir, "elsewhere", "a"))
	creators(slices.Collect(maps.Values(p.shims)))
	s := p.shims["a"]
	if len(s.creators) != 1 || s.creators[0] != ours.Process.Pid {
		t.Fatalf("creators %v, want %d", s.creators, ours.Process.Pid)
	}
	s.endCreators(t.Context())
	if err := ours.Wait(); err == nil || ours.ProcessState.ExitCode() != -1 {
		t.Errorf("ours ended with %v", err)
	}
	if err := other.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the other one: %v", err)
	}
}
