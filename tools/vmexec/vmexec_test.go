package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestScript: the shell gets the arguments to the letter, and only what the
// machine understands.
func TestScript(t *testing.T) {
	args := []string{"-test.run=^Test'A|B'$", "two words", `"$HOME"`, "-test.testlogfile=/tmp/x", ""}
	p := payload{args: args, env: []string{"GANTRY_X=it's", "HOME=/nowhere", "GANTRY_BIN=/here"}}
	text := p.script([]string{"/gantry/bin0", "/gantry/bin1"})
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("#!/bin/sh\nfor a; do echo \"<$a>\"; done\necho \"$GANTRY_X $GANTRY_BIN\"\nexit 7\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	output, exit := filepath.Join(dir, "output"), filepath.Join(dir, "exit")
	text = strings.NewReplacer("/gantry/program", program, outputPort, output, exitPort, exit, "stty", "true").Replace(text)
	if out, err := exec.Command("/bin/sh", "-c", text).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got, err := os.ReadFile(output)
	if err != nil {
		t.Fatal(err)
	}
	if want := "<-test.run=^Test'A|B'$>\n<two words>\n<\"$HOME\">\n<>\nit's /gantry/bin0:/gantry/bin1\n"; string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if code, err := (machine{exit: exit}).exitCode(); code != 7 || err != nil {
		t.Errorf("exit code %d, %v", code, err)
	}
}

// TestExitCode: a machine that went down by itself is no success.
func TestExitCode(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]int{"0\n": 0, "2\n": 2, "": -1, "x": -1} {
		file := filepath.Join(dir, "exit")
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		code, err := (machine{exit: file}).exitCode()
		if (err != nil) != (want < 0) || err == nil && code != want {
			t.Errorf("%q: %d, %v", text, code, err)
		}
	}
	if _, err := (machine{exit: filepath.Join(dir, "none")}).exitCode(); err == nil {
		t.Error("no file: no error")
	}
}

// TestPack: programs and those of cni/ are on the disk.
func TestPack(t *testing.T) {
	if _, err := exec.LookPath("mke2fs"); err != nil {
		t.Skip(err)
	}
	dir, bin := t.TempDir(), t.TempDir()
	for _, f := range []string{"containerd", "cni/bridge", "race/containerd"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(bin, f)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(bin, f), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p := payload{program: "/bin/true", bins: []string{bin}}
	payloadDir, image := filepath.Join(dir, "payload"), filepath.Join(dir, "image")
	if err := p.pack(t.Context(), payloadDir, image); err != nil {
		t.Fatal(err)
	}
	for f, want := range map[string]bool{"program": true, "run": true, "bin0/containerd": true, "bin0/cni/bridge": true, "bin0/race": false} {
		if _, err := os.Stat(filepath.Join(payloadDir, f)); (err == nil) != want {
			t.Errorf("%s: %v", f, err)
		}
	}
	if info, err := os.Stat(image); err != nil || info.Size() < 1<<20 {
		t.Errorf("image: %v, %v", info, err)
	}
}
