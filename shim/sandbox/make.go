package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/shim/process"
)

// makeHere makes the namespaces of a sandbox that needs no holder, in a thread
// that ends with them: they stay by their pins alone.
func (r Record) makeHere(dir string) (err error) {
	process.InThread(func() { err = r.makeInThread(dir) })
	return err
}

func (r Record) makeInThread(dir string) error {
	if r.NetNS != "" {
		// The settings of the network are written from inside.
		if err := enter(r.NetNS, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
	}
	flags := 0
	if r.UTS {
		flags |= unix.CLONE_NEWUTS
	}
	if r.IPC {
		flags |= unix.CLONE_NEWIPC
	}
	if err := unix.Unshare(flags); err != nil {
		return fmt.Errorf("make namespaces: %w", err)
	}
	if r.Hostname != "" {
		if err := unix.Sethostname([]byte(r.Hostname)); err != nil {
			return fmt.Errorf("set hostname: %w", err)
		}
	}
	for name, value := range r.Sysctls {
		if err := setSysctl(name, value); err != nil {
			return err
		}
	}
	return r.pinAll(dir, "/proc/thread-self/ns", specs.UTSNamespace, specs.IPCNamespace)
}

func enter(path string, kind int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Setns(int(f.Fd()), kind)
}

// setSysctl writes a setting of the namespaces of this thread.
func setSysctl(name, value string) error {
	f, err := os.OpenFile(filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/")), os.O_WRONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("sysctls[%q]: this kernel has no such setting: %w", name, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("sysctls[%q]: %w", name, err)
	}
	_, err = f.WriteString(value)
	err = errors.Join(err, f.Close())
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("sysctls[%q]: the kernel does not take %.64q: %w: %w", name, value, errdefs.ErrInvalidArgument, err)
	}
	if err != nil {
		return fmt.Errorf("sysctls[%q]: %w", name, err)
	}
	return nil
}

// pinAll pins those of the kinds that the sandbox has, from a directory such as
// /proc/PID/ns.
func (r Record) pinAll(dir, ns string, which ...specs.LinuxNamespaceType) error {
	for _, kind := range kinds {
		if !r.has(kind) || !slices.Contains(which, kind) {
			continue
		}
		if err := pin(filepath.Join(ns, string(kind)), filepath.Join(dir, string(kind))); err != nil {
			return fmt.Errorf("pin %s namespace: %w", kind, err)
		}
	}
	return nil
}

func pin(source, target string) error {
	f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	return unix.Mount(source, target, "", unix.MS_BIND, "")
}

// pinOwner pins the user namespace to which the network namespace belongs: that
// is the pod's.
func pinOwner(netns, target string) error {
	f, err := os.Open(netns)
	if err != nil {
		return err
	}
	defer f.Close()
	fd, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		return fmt.Errorf("find the user namespace of the network: %w", err)
	}
	defer unix.Close(fd)
	var of, ours unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &of), unix.Stat("/proc/self/ns/user", &ours)); err != nil {
		return err
	}
	if of.Ino == ours.Ino {
		return fmt.Errorf("the network namespace belongs to the host's user namespace, not to the pod's: %w", errdefs.ErrFailedPrecondition)
	}
	return pin(fmt.Sprintf("/proc/self/fd/%d", fd), target)
}

// unpinAll takes away all pins, or what there is of them.
func unpinAll(dir string) error {
	var errs []error
	for _, kind := range kinds {
		if err := process.Unpin(filepath.Join(dir, string(kind))); err != nil {
			errs = append(errs, fmt.Errorf("%s namespace: %w", kind, err))
		}
	}
	return errors.Join(errs...)
}
