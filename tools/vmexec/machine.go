package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// machine is a virtual machine and the files that it reads and writes.
type machine struct {
	image   string // directory made by scripts/vm-image
	kernel  string // more parameters of the kernel
	accel   string // QEMU's accelerator, emulation if it is ""
	payload string // filesystem image with what it runs
	console string // what the kernel and systemd say
	exit    string // the program's exit code
	tmp     string // what it changes on its disk
}

// emulated is what runs everywhere. KVM may be there and not work, within another
// virtual machine, and stops the guest then.
const emulated = "tcg,thread=multi,tb-size=512"

// kernelLine: quiet, as an emulated serial port is slow, and without the
// defences against other users of the same processor. A few huge pages are for
// tests of their limits.
const kernelLine = "console=ttyS0 root=/dev/vda rw quiet loglevel=4 panic=-1 mitigations=off nokaslr random.trust_cpu=on audit=0 apparmor=1 security=apparmor hugepages=8 systemd.show_status=0 systemd.default_timeout_start_sec=1800 systemd.watchdog_sec=0"

// boot runs the machine until it turns itself off. The program's output goes to
// our own.
func (m machine) boot(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", m.args()...)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{os.Stdout}
	cmd.Env = append(os.Environ(), "TMPDIR="+m.tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd.Run()
}

func (m machine) args() []string {
	return []string{
		"-machine", "q35", "-accel", cmp.Or(m.accel, emulated), "-cpu", "max",
		"-smp", "2", "-m", "3072", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", filepath.Join(m.image, "vmlinuz"), "-initrd", filepath.Join(m.image, "initrd"), "-append", strings.TrimSpace(kernelLine + " " + m.kernel),
		"-drive", "if=virtio,format=raw,cache=unsafe,snapshot=on,file=" + filepath.Join(m.image, "root.img"),
		"-drive", "if=virtio,format=raw,readonly=on,file=" + m.payload,
		"-device", "virtio-rng-pci",
		"-serial", "file:" + m.console,
		"-chardev", "file,id=output,append=on,path=/dev/fd/3", "-serial", "chardev:output",
		"-serial", "file:" + m.exit,
	}
}

// exitCode is what the program ended with. A machine that went down without
// telling had no program that ended.
func (m machine) exitCode() (int, error) {
	text, err := os.ReadFile(m.exit)
	if err != nil {
		return 0, fmt.Errorf("read exit code: %w", err)
	}
	code, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("the machine went down before the program ended: %w", err)
	}
	return code, nil
}

// lastWords is the end of what the machine wrote to its console.
func (m machine) lastWords() string {
	text, err := os.ReadFile(m.console)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-60):], "\n")
}
