// Package volume makes what containers mount of images besides their root
// filesystem: images as volumes, and directories of their own for the volumes
// that an image declares, with a copy of what the image has there.
//
// Everything is named after the container's ID. Mounts are below the state
// directory and gone after a reboot, as the containers are; copies can be large
// and are below the root directory. Both directories are closed to everybody but
// root: what is in them comes from images, set-user-ID programs and device nodes
// included. Content of an image is hostile and is only gone through by Tree. The
// package knows nothing of images or snapshots: it is given mounts. Start at
// Mount and Copy; Remove takes back what either of them made.
package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// Tree goes through the content of images; package rootfs has it.
type Tree struct {
	// Resolve opens what name means inside root, for reference only.
	Resolve func(root *os.File, name string) (*os.File, error)
	// Copy copies the content and the attributes of a directory into another.
	Copy func(ctx context.Context, from, to *os.File) error
}

// Volumes are those of all containers.
type Volumes struct {
	mounts, copies string
	tree           Tree
}

// New returns the volumes below two directories of the daemon's own, which are
// made: state does not outlive a reboot, root does.
func New(state, root string, t Tree) (*Volumes, error) {
	v := &Volumes{mounts: filepath.Join(state, "volumes"), copies: filepath.Join(root, "volumes"), tree: t}
	for _, dir := range []string{v.mounts, v.copies} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("create directory of volumes: %w", err)
		}
	}
	return v, nil
}

// Mount mounts what is at sub in an image, a directory or a regular file, as
// volume number i of a container, and returns where. The image's mounts can only
// be read, and may show owners by other numbers. The mount is read-only,
// without programs, set-user-ID bits and devices.
func (v *Volumes) Mount(ctx context.Context, id string, i int, image []mount.Mount, sub string) (string, error) {
	dir := filepath.Join(v.mounts, id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("create directory of volumes: %w", err)
	}
	target := filepath.Join(dir, strconv.Itoa(i))
	err := withMounted(ctx, mount.WithTempMount, mappable(image), func(root *os.File) error {
		source, err := v.tree.Resolve(root, sub)
		if err != nil {
			return err
		}
		defer source.Close()
		return attach(source, target)
	})
	return target, err
}

// mappable are the mounts of an image so that containerd shows the owners that
// their options ask for: it forgets that for a bind mount that is read-only, as an
// image of one layer is. The volume is read-only all the same.
func mappable(image []mount.Mount) []mount.Mount {
	image = slices.Clone(image)
	for i, m := range image {
		if m.Type == "bind" {
			image[i].Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "ro" })
		}
	}
	return image
}

// attach mounts the file or directory behind source at target. What source means
// was settled when it was opened, and cannot be swapped any more.
func attach(source *os.File, target string) error {
	if err := makeTarget(source, target); err != nil {
		return err
	}
	tree, err := unix.OpenTree(int(source.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("clone mount: %w", err)
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach mount: %w", err)
	}
	const flags = unix.MS_RDONLY | unix.MS_NOEXEC | unix.MS_NOSUID | unix.MS_NODEV
	return errors.Join(
		os.NewSyscallError("set flags of mount", unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|flags, "")),
		os.NewSyscallError("set propagation of mount", unix.Mount("", target, "", unix.MS_PRIVATE, "")))
}

// makeTarget makes what source can be mounted on.
func makeTarget(source *os.File, target string) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(source.Fd()), &st); err != nil {
		return fmt.Errorf("stat %s in the image: %w", source.Name(), err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return os.Mkdir(target, 0o700)
	case unix.S_IFREG:
		return os.WriteFile(target, nil, 0o600)
	}
	return fmt.Errorf("%s in the image is neither a directory nor a regular file: %w", source.Name(), errdefs.ErrFailedPrecondition)
}

// Copy makes a directory for each path of a container's root filesystem, with
// what is there, content and attributes, the owners as the image has them. Where
// nothing is, it is an empty one of root's.
func (v *Volumes) Copy(ctx context.Context, id string, rootfs []mount.Mount, paths []string) ([]facts.Mount, error) {
	dir := filepath.Join(v.copies, id)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create directory of volumes: %w", err)
	}
	var made []facts.Mount
	err := withMounted(ctx, mount.WithReadonlyTempMount, rootfs, func(root *os.File) error {
		for i, p := range paths {
			to := filepath.Join(dir, strconv.Itoa(i))
			if err := v.copyOne(ctx, root, p, to); err != nil {
				return fmt.Errorf("volume %s of the image: %w", p, err)
			}
			made = append(made, facts.Mount{Source: to, Destination: p})
		}
		return nil
	})
	return made, err
}

func (v *Volumes) copyOne(ctx context.Context, root *os.File, name, to string) error {
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	if err := os.Chmod(to, 0o755); err != nil {
		return err
	}
	from, err := v.tree.Resolve(root, name)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer from.Close()
	dir, err := os.Open(to)
	if err != nil {
		return err
	}
	defer dir.Close()
	return v.tree.Copy(ctx, from, dir)
}

// Remove takes away all volumes of a container; none is fine.
func (v *Volumes) Remove(_ context.Context, id string) error {
	dir := filepath.Join(v.mounts, id)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("list volumes: %w", err)
	}
	for _, e := range entries {
		if err := unmount(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	// With nothing mounted below it any more.
	if err := errors.Join(os.RemoveAll(dir), os.RemoveAll(filepath.Join(v.copies, id))); err != nil {
		return fmt.Errorf("remove volumes: %w", err)
	}
	return nil
}

// unmount takes every mount off a path.
func unmount(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil:
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil // nothing is mounted there
		default:
			return fmt.Errorf("unmount volume %s: %w", path, err)
		}
	}
}

// tempMount has a filesystem mounted in a directory for as long as fn runs.
type tempMount func(ctx context.Context, mounts []mount.Mount, fn func(dir string) error) error

// withMounted calls fn with the root of a filesystem that is mounted meanwhile. A
// mount that a crash leaves is taken away by the next start of containerd.
func withMounted(ctx context.Context, temp tempMount, mounts []mount.Mount, fn func(root *os.File) error) error {
	var failure error // without the path of the mount in its words
	err := temp(ctx, mounts, func(dir string) error {
		root, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		defer root.Close()
		failure = fn(root)
		return nil
	})
	return errors.Join(failure, err)
}
