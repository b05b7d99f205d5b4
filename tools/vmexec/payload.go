package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// mountPoint is where the machine has the payload's disk; scripts/vm-image says
// so too.
const mountPoint = "/gantry"

// Serial ports of the machine: the first is its console.
const (
	outputPort = "/dev/ttyS1"
	exitPort   = "/dev/ttyS2"
)

// payload is what the machine is to run.
type payload struct {
	program string
	args    []string
	env     []string // of which it gets what is named GANTRY_…
	bins    []string // directories of the programs under test
}

// pack lays everything out in dir and makes a filesystem image of it.
func (p payload) pack(ctx context.Context, dir, image string) error {
	var bins []string
	for i, bin := range p.bins {
		name := fmt.Sprint("bin", i)
		bins = append(bins, filepath.Join(mountPoint, name))
		if err := copyPrograms(bin, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := copyFile(p.program, filepath.Join(dir, "program")); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "run"), []byte(p.script(bins)), 0o755); err != nil {
		return err
	}
	size, err := treeSize(dir)
	if err != nil {
		return err
	}
	return command(ctx, "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", dir, image, fmt.Sprintf("%dM", size>>20*9/8+32))
}

// script runs the program in the machine.
func (p payload) script(bins []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "#!/bin/sh\nstty -F %s raw -echo\nstty -F %s raw -echo\ncd /tmp\n", outputPort, exitPort)
	for _, kv := range append(p.env, "GANTRY_BIN="+strings.Join(bins, ":")) {
		if strings.HasPrefix(kv, "GANTRY_") {
			fmt.Fprintf(&b, "export %s\n", quote(kv))
		}
	}
	b.WriteString(quote(filepath.Join(mountPoint, "program")))
	for _, a := range p.args {
		// It would be a path on this machine.
		if !strings.HasPrefix(a, "-test.testlogfile=") {
			b.WriteString(" " + quote(a))
		}
	}
	fmt.Fprintf(&b, " >%s 2>&1 </dev/null\necho $? >%s\n", outputPort, exitPort)
	return b.String()
}

// quote makes s one word of a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// copyPrograms copies the executables of a bin directory and of its cni/.
func copyPrograms(from, to string) error {
	for _, sub := range []string{"", "cni"} {
		entries, err := os.ReadDir(filepath.Join(from, sub))
		if sub != "" && os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Join(to, sub), 0o755); err != nil {
			return err
		}
		for _, e := range entries {
			path := filepath.Join(from, sub, e.Name())
			// A program may have another name, which is a link.
			if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
				continue
			}
			if err := copyFile(path, filepath.Join(to, sub, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

func copyFile(from, to string) error {
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	if err := os.Link(from, to); err == nil {
		return nil
	}
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, text, 0o755)
}

func treeSize(dir string) (size int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil {
			size += info.Size() + 4096
		}
		return err
	})
	return size, err
}

func command(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}
