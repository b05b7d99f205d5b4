// Package podfiles makes the files that the containers of a pod share: hosts,
// hostname, resolv.conf and the memory behind /dev/shm. They lie in a
// directory named after the sandbox, below the state directory, and are gone
// after a reboot as the pods are. Their owner is whoever is root in the pod. It
// never looks into a container.
package podfiles

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// shmSize is the size of a pod's /dev/shm in bytes, the one pods know from
// every runtime.
const shmSize = 64 << 20

// maxHostFile bounds what is copied from the node's own files, in bytes.
const maxHostFile = 1 << 20

// Files makes the files below one directory.
type Files struct {
	root string
	// Where the node's own files are.
	hosts, resolvConf string
	text              Text
}

// Text is what the files say; package spec has it.
type Text struct {
	Hostname func(*cri.PodSandboxConfig) string
	// ResolvConf has own false for what is to be the node's file.
	ResolvConf func(*cri.DNSConfig) (content []byte, own bool, err error)
	// ShmSize is how large /dev/shm is to be, 0 for the usual size; nil for
	// always that.
	ShmSize func(record.Sandbox) (bytes int64, err error)
	// Label sets the SELinux label of files, nil for never.
	Label func(fileLabel string, paths ...string) error
}

// New returns the files below root, which is created.
func New(root string, t Text) (*Files, error) {
	if err := os.MkdirAll(root, 0o711); err != nil {
		return nil, fmt.Errorf("create directory of pod files: %w", err)
	}
	// Containers of a user namespace go through it; 0711 lets nobody list it.
	if err := os.Chmod(root, 0o711); err != nil {
		return nil, fmt.Errorf("set mode of directory of pod files: %w", err)
	}
	return &Files{root: root, hosts: "/etc/hosts", resolvConf: "/etc/resolv.conf", text: t}, nil
}

// Paths are the files of one pod.
type Paths struct {
	Dir, Hosts, Hostname, ResolvConf string
	// Shm is the directory to mount at /dev/shm: the node's own for a pod
	// with the node's IPC namespace.
	Shm string
}

// Paths returns where the files of sb are, made or not.
func (f *Files) Paths(sb record.Sandbox) Paths {
	dir := filepath.Join(f.root, sb.ID)
	p := Paths{
		Dir: dir, Hosts: filepath.Join(dir, "hosts"), Hostname: filepath.Join(dir, "hostname"),
		ResolvConf: filepath.Join(dir, "resolv.conf"), Shm: filepath.Join(dir, "shm"),
	}
	if hostIPC(sb) {
		p.Shm = "/dev/shm"
	}
	return p
}

func hostIPC(sb record.Sandbox) bool {
	return sb.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetIpc() == cri.NamespaceMode_NODE
}

// Create makes the files; those that exist are made anew.
func (f *Files) Create(_ context.Context, sb record.Sandbox) error {
	resolv, err := f.resolv(sb.Config.GetDnsConfig())
	if err != nil {
		return err
	}
	hosts, err := readHostFile(f.hosts)
	if err != nil {
		return err
	}
	hostname := f.text.Hostname(sb.Config)
	uid, gid := sb.HostID(0, 0)
	p := f.Paths(sb)
	if err := os.MkdirAll(p.Dir, 0o711); err != nil {
		return fmt.Errorf("create directory of pod files: %w", err)
	}
	for path, content := range map[string][]byte{p.Hosts: hosts, p.ResolvConf: resolv, p.Hostname: []byte(hostname + "\n")} {
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return fmt.Errorf("write pod file: %w", err)
		}
		if err := os.Chown(path, int(uid), int(gid)); err != nil {
			return fmt.Errorf("give pod file to the pod's root: %w", err)
		}
	}
	if !hostIPC(sb) {
		if err := f.mountShm(sb, p.Shm); err != nil {
			return err
		}
	}
	return f.label(sb, p)
}

// label lets the pod's containers use its files where SELinux would not.
func (f *Files) label(sb record.Sandbox, p Paths) error {
	if f.text.Label == nil || sb.Labels.Mount == "" {
		return nil
	}
	paths := []string{p.Hosts, p.Hostname, p.ResolvConf}
	if !hostIPC(sb) {
		paths = append(paths, p.Shm)
	}
	if err := f.text.Label(sb.Labels.Mount, paths...); err != nil {
		return fmt.Errorf("label pod files: %w", err)
	}
	return nil
}

// mountShm mounts the memory behind /dev/shm, whose root is the pod's.
func (f *Files) mountShm(sb record.Sandbox, dir string) error {
	size := int64(shmSize)
	if f.text.ShmSize != nil {
		wanted, err := f.text.ShmSize(sb)
		if err != nil {
			return err
		}
		size = cmp.Or(wanted, size)
	}
	uid, gid := sb.HostID(0, 0)
	if err := unmount(dir); err != nil { // of an attempt that was cut off
		return err
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("create directory for /dev/shm: %w", err)
	}
	err := unix.Mount("shm", dir, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV,
		fmt.Sprintf("mode=1777,size=%d,uid=%d,gid=%d", size, uid, gid))
	if err != nil {
		return fmt.Errorf("mount /dev/shm of the pod: %w", err)
	}
	return nil
}

// Remove takes the files away; none is fine.
func (f *Files) Remove(_ context.Context, sb record.Sandbox) error {
	dir := filepath.Join(f.root, sb.ID)
	if err := unmount(filepath.Join(dir, "shm")); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove pod files: %w", err)
	}
	return nil
}

// unmount takes every mount off dir. A process that still uses the memory
// keeps it until it ends.
func unmount(dir string) error {
	for {
		err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil:
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil // nothing is mounted there
		default:
			return fmt.Errorf("unmount /dev/shm of the pod: %w", err)
		}
	}
}

// resolv is the content of resolv.conf: what the pod asks for, else the node's.
func (f *Files) resolv(dns *cri.DNSConfig) ([]byte, error) {
	content, own, err := f.text.ResolvConf(dns)
	if err != nil || own {
		return content, err
	}
	return readHostFile(f.resolvConf)
}

// readHostFile reads a file of the node; one that does not exist is empty.
func readHostFile(path string) ([]byte, error) {
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the node's file: %w", err)
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxHostFile+1))
	if err == nil && len(b) > maxHostFile {
		err = fmt.Errorf("%s is larger than %d bytes: %w", path, maxHostFile, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("read the node's file: %w", err)
	}
	return b, nil
}
