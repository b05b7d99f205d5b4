package host

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// mountInfoFile belongs to the thread: it shows what a mount made by this
// process would see.
const mountInfoFile = "/proc/thread-self/mountinfo"

// MountRules are the node's for sources of mounts.
type MountRules struct {
	// Prefix is where the node's root is, "" for the usual place.
	Prefix string
	// Reject are paths that are not made when they do not exist.
	Reject []string
	// Store are directories, without links, in which root filesystems are mounted.
	Store []string
}

// propagation is what a mount gets: one with a part of the store in it would, if
// it were private, keep every root filesystem mounted that it has seen, whatever
// becomes of the container. What is not to be written at all stays as it is: what
// propagates into such a mount could be.
func (r MountRules) propagation(m *cri.Mount, source string) cri.MountPropagation {
	private := m.GetPropagation() == cri.MountPropagation_PROPAGATION_PRIVATE && !m.GetRecursiveReadOnly()
	if private && slices.ContainsFunc(r.Store, func(dir string) bool { return within(dir, source) || within(source, dir) }) {
		return cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	}
	return m.GetPropagation()
}

// within reports whether p is dir or below it.
func within(dir, p string) bool {
	return dir == "/" || p == dir || strings.HasPrefix(p, dir+"/")
}

// ResolveMounts resolves the host paths of a container's mounts, in order. A
// path that does not exist becomes a directory, unless the rules say otherwise;
// links are followed to the end.
// A mount that shall propagate must come from a mount that does. The mounts
// have passed spec.ValidateContainer; images tells where the images among them
// are, by the index of the mount.
func ResolveMounts(mounts []*cri.Mount, images map[int]string, rules MountRules) ([]facts.Mount, error) {
	resolved := make([]facts.Mount, 0, len(mounts))
	var infos []*mountinfo.Info
	for i, m := range mounts {
		if source, ok := images[i]; ok {
			resolved = append(resolved, imageMount(m, source))
			continue
		}
		source, err := rules.source(m)
		if err != nil {
			return nil, fmt.Errorf("resolve config.mounts[%d]: %w", i, err)
		}
		if m.GetPropagation() != cri.MountPropagation_PROPAGATION_PRIVATE {
			if infos == nil {
				if infos, err = readMounts(); err != nil {
					return nil, fmt.Errorf("resolve config.mounts[%d]: %w", i, err)
				}
			}
			if err := checkPropagation(source, m.GetPropagation(), infos); err != nil {
				return nil, fmt.Errorf("resolve config.mounts[%d]: %w", i, err)
			}
		}
		resolved = append(resolved, facts.Mount{
			Source:            source,
			Destination:       filepath.Clean(m.GetContainerPath()),
			Readonly:          m.GetReadonly(),
			RecursiveReadonly: m.GetRecursiveReadOnly(),
			Propagation:       rules.propagation(m, source),
			UIDMappings:       m.GetUidMappings(),
			GIDMappings:       m.GetGidMappings(),
			Options:           m.GetMountOptions(),
		})
	}
	return resolved, nil
}

// imageMount is the mount of an image that is at source. A mount of a mount loses
// its flags unless they are said again.
func imageMount(m *cri.Mount, source string) facts.Mount {
	return facts.Mount{
		Source: source, Destination: filepath.Clean(m.GetContainerPath()), Readonly: true,
		Options: []string{"nosuid", "nodev", "noexec"},
	}
}

func (r MountRules) source(m *cri.Mount) (string, error) {
	p := m.GetHostPath()
	if !filepath.IsAbs(p) || strings.IndexByte(p, 0) >= 0 {
		return "", fmt.Errorf("host_path: %.256q is not an absolute path: %w", p, errdefs.ErrInvalidArgument)
	}
	asked := filepath.Clean(p)
	if r.Prefix != "" {
		var err error
		if p, err = securejoin.SecureJoin(r.Prefix, p); err != nil {
			return "", fmt.Errorf("host_path: %w", classed(err))
		}
	}
	if _, err := os.Stat(p); errors.Is(err, fs.ErrNotExist) {
		if slices.Contains(r.Reject, asked) {
			return "", fmt.Errorf("host_path: %s does not exist, and absent_mount_sources_to_reject has it: %w", asked, errdefs.ErrFailedPrecondition)
		}
		if err := os.MkdirAll(p, 0o755); err != nil {
			return "", fmt.Errorf("host_path: make missing directory: %w", classed(err))
		}
	}
	source, err := filepath.EvalSymlinks(p)
	if err != nil {
		return "", fmt.Errorf("host_path: %w", classed(err))
	}
	return source, nil
}

// MakeDir makes the directory name in dir, where others write too, unless it is
// there. What is there and no directory is an error, a link to one included.
func MakeDir(dir, name string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("open volume: %w", classed(err))
	}
	defer root.Close()
	err = root.Mkdir(name, 0o755)
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return classed(err)
	}
	fi, err := root.Lstat(name)
	if err != nil {
		return classed(err)
	}
	if !fi.IsDir() {
		return fmt.Errorf("%s is there and no directory: %w", name, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func readMounts() ([]*mountinfo.Info, error) {
	b, err := os.ReadFile(mountInfoFile)
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", classed(err))
	}
	infos, err := mountinfo.GetMountsFromReader(bytes.NewReader(b), nil)
	if err != nil {
		return nil, fmt.Errorf("parse mounts: %w (%w)", err, errdefs.ErrInternal)
	}
	return infos, nil
}

// checkPropagation: without a peer group (or a master) the mount would be made
// and nothing would ever propagate.
func checkPropagation(source string, p cri.MountPropagation, infos []*mountinfo.Info) error {
	m := mountOf(source, infos)
	if m == nil {
		return fmt.Errorf("host_path: no mount holds %s: %w", source, errdefs.ErrInternal)
	}
	has := func(tag string) bool {
		return slices.ContainsFunc(strings.Fields(m.Optional), func(o string) bool { return strings.HasPrefix(o, tag) })
	}
	switch {
	case has("shared:"):
		return nil
	case p == cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER && has("master:"):
		return nil
	}
	return fmt.Errorf("propagation: %s is on %s, which is not a shared mount, so %s is not possible: %w", source, m.Mountpoint, p, errdefs.ErrFailedPrecondition)
}

// mountOf finds the mount a path is on: the one with the longest mount point
// above it, and of several there the last, which hides the others.
func mountOf(p string, infos []*mountinfo.Info) (found *mountinfo.Info) {
	for _, m := range infos {
		if within(m.Mountpoint, p) && (found == nil || len(m.Mountpoint) >= len(found.Mountpoint)) {
			found = m
		}
	}
	return found
}

// classed gives an error of the file system the errdefs class a caller can act
// on.
func classed(err error) error {
	var class error = errdefs.ErrInternal
	switch {
	case errors.Is(err, fs.ErrNotExist):
		class = errdefs.ErrNotFound
	case errors.Is(err, fs.ErrPermission):
		class = errdefs.ErrPermissionDenied
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.EEXIST), errors.Is(err, unix.EROFS):
		class = errdefs.ErrFailedPrecondition
	case errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.EINVAL):
		class = errdefs.ErrInvalidArgument
	}
	return fmt.Errorf("%w (%w)", err, class)
}
