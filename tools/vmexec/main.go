// Command vmexec runs a test program in a virtual machine and behaves as the
// program would: its output, its exit code.
//
//	go test -exec vmexec ./integration/lifecycle
//
// The machine is the one that scripts/vm-image made in the directory
// GANTRY_VM: Debian's kernel, systemd as process 1, control groups of version 2
// alone, what few machines that build software have. The programs under test
// (GANTRY_BIN) go along on a disk of their own. Nothing that the test changes
// outlives it, and it reaches no network. GANTRY_VM_KERNEL has parameters for the
// kernel, such as those by which systemd makes control groups of version 1, or
// the kernel uses SELinux in place of AppArmor. The machine is emulated unless
// GANTRY_VM_ACCEL names another accelerator of QEMU, as kvm.
//
// Start at run.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: GANTRY_VM=DIR GANTRY_BIN=DIRS vmexec PROGRAM [ARGUMENT...]")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT)
	code, err := run(ctx, os.Args[1], os.Args[2:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vmexec:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

// run boots a machine whose only work is the program, and returns its exit code.
func run(ctx context.Context, program string, args []string) (code int, err error) {
	dir, err := os.MkdirTemp("/var/tmp", "vmexec.")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	p := payload{
		program: program, args: args, env: os.Environ(),
		bins: filepath.SplitList(os.Getenv("GANTRY_BIN")),
	}
	m := machine{
		image: os.Getenv("GANTRY_VM"), kernel: os.Getenv("GANTRY_VM_KERNEL"), accel: os.Getenv("GANTRY_VM_ACCEL"), payload: filepath.Join(dir, "payload.img"),
		console: filepath.Join(dir, "console"), exit: filepath.Join(dir, "exit"), tmp: dir,
	}
	if err := p.pack(ctx, filepath.Join(dir, "payload"), m.payload); err != nil {
		return 0, fmt.Errorf("pack programs: %w", err)
	}
	if err := m.boot(ctx); err != nil {
		return 0, fmt.Errorf("run machine: %w\n%s", err, m.lastWords())
	}
	code, err = m.exitCode()
	if err != nil {
		return 0, fmt.Errorf("%w\n%s", err, m.lastWords())
	}
	return code, nil
}
