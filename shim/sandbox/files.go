package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/shim/statedir"
	"github.com/gantry-cri/gantry/shim/task"
)

const (
	// filesDir has what a containerd that is not ours leaves to whoever makes a
	// sandbox: the files of the pod, and its shared memory.
	filesDir = "files"
	shmFile  = "shm"
	// shmOptions are those that containerd has for the pods that it makes.
	shmOptions = "mode=1777,size=65536k"
)

// places are where containers have the files.
var places = map[string]string{"hostname": "/etc/hostname", "hosts": "/etc/hosts", "resolv.conf": "/etc/resolv.conf", shmFile: "/dev/shm"}

// resolvConf is the file for a pod's settings, "" where there are none.
func resolvConf(c *cri.DNSConfig) (text string) {
	if len(c.GetSearches()) > 0 {
		text += "search " + strings.Join(c.GetSearches(), " ") + "\n"
	}
	for _, s := range c.GetServers() {
		text += "nameserver " + s + "\n"
	}
	if len(c.GetOptions()) > 0 {
		text += "options " + strings.Join(c.GetOptions(), " ") + "\n"
	}
	return text
}

// makeFiles makes the files of a sandbox that is to have them, for the root of its
// containers.
func (r Record) makeFiles(dir string) error {
	if !r.Files {
		return nil
	}
	at := filepath.Join(dir, filesDir)
	if err := os.Mkdir(at, 0o755); err != nil {
		return fmt.Errorf("make directory of files: %w", err)
	}
	texts, err := r.fileTexts()
	if err != nil {
		return fmt.Errorf("files of the sandbox: %w", err)
	}
	for name, text := range texts {
		path := filepath.Join(at, name)
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o644), os.Chown(path, rootOf(r.Users), rootOf(r.Groups))); err != nil {
			return fmt.Errorf("make file of the sandbox: %w", err)
		}
	}
	if !r.IPC {
		return nil // theirs is the host's
	}
	shm := filepath.Join(at, shmFile)
	if err := os.Mkdir(shm, 0o700); err != nil {
		return fmt.Errorf("make shared memory: %w", err)
	}
	if err := unix.Mount(shmFile, shm, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, shmOptions); err != nil {
		return fmt.Errorf("mount shared memory: %w", err)
	}
	return nil
}

func (r Record) fileTexts() (map[string]string, error) {
	name, err := r.Hostname, error(nil)
	if name == "" {
		name, err = os.Hostname()
	}
	hosts, hostsErr := os.ReadFile("/etc/hosts")
	resolv, resolvErr := []byte(r.Resolv), error(nil)
	if r.Resolv == "" {
		resolv, resolvErr = os.ReadFile("/etc/resolv.conf")
	}
	return map[string]string{"hostname": name + "\n", "hosts": string(hosts), "resolv.conf": string(resolv)}, errors.Join(err, hostsErr, resolvErr)
}

// rootOf is who root is in the host.
func rootOf(mappings []specs.LinuxIDMapping) int {
	for _, m := range mappings {
		if m.ContainerID == 0 {
			return int(m.HostID)
		}
	}
	return 0
}

// dropFiles takes away the files, or what there is of them.
func dropFiles(dir string) error {
	at := filepath.Join(dir, filesDir)
	err := unix.Unmount(filepath.Join(at, shmFile), unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) { // not there, or no mount
		return fmt.Errorf("unmount shared memory: %w", err)
	}
	return os.RemoveAll(at)
}

// Files finds the files of the sandboxes with records in a directory.
func Files(state string) task.Files {
	return func(id string) (map[string]string, error) {
		dir, err := statedir.DirOf(state, id)
		if err != nil {
			return nil, err
		}
		entries, err := os.ReadDir(filepath.Join(dir, filesDir))
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		found := map[string]string{}
		for _, e := range entries {
			found[places[e.Name()]] = filepath.Join(dir, filesDir, e.Name())
		}
		return found, err
	}
}
