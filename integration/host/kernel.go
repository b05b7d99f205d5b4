package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// owned finds the ID in the name of an object that belongs to a container, pod
// or snapshot of ours.
var owned = regexp.MustCompile(`(^|[^0-9a-f])[0-9a-f]{64}($|[^0-9a-f])`)

func (s Scope) mounts(context.Context) ([]string, error) {
	found, err := s.mountpoints()
	if err != nil {
		return nil, err
	}
	for i := range found {
		found[i] = "mount " + found[i]
	}
	return found, nil
}

// mountpoints lists what is mounted below the scope's directory, in the order
// of mounting.
func (s Scope) mountpoints() ([]string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(s.Dir))
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var points []string
	for _, m := range infos {
		points = append(points, m.Mountpoint)
	}
	return points, nil
}

func (s Scope) unmountAll() error {
	points, err := s.mountpoints()
	if err != nil {
		return err
	}
	slices.Reverse(points)
	var errs []error
	for _, p := range points {
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

// hierarchies are the mount points of every cgroup tree, version 1 and 2.
func hierarchies() ([]string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("list cgroup hierarchies: %w", err)
	}
	var points []string
	for _, m := range infos {
		points = append(points, m.Mountpoint)
	}
	return points, nil
}

// cgroupDirs lists the scope's cgroups, children before parents.
func (s Scope) cgroupDirs() ([]string, error) {
	trees, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, tree := range trees {
		err := filepath.WalkDir(filepath.Join(tree, s.CgroupParent), func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("walk cgroups: %w", err)
		}
	}
	slices.Reverse(dirs)
	return dirs, nil
}

// cgroups lists the cgroups named after a container. The parents that a test,
// in the kubelet's place, made for its pods are not the daemon's to remove.
func (s Scope) cgroups(context.Context) ([]string, error) {
	dirs, err := s.cgroupDirs()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, d := range dirs {
		if owned.MatchString(filepath.Base(d)) {
			found = append(found, "cgroup "+d)
		}
	}
	return found, nil
}

// removeCgroups repeats: a cgroup is busy until its last process is reaped.
func (s Scope) removeCgroups(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		dirs, err := s.cgroupDirs()
		if err != nil {
			return err
		}
		var last error
		for _, d := range dirs {
			if err := os.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
				last = fmt.Errorf("remove cgroup: %w", err)
			}
		}
		if last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return last
		case <-tick.C:
		}
	}
}

// notOwned are directories whose entries are named after content: they belong
// to images, not to pods.
var notOwned = regexp.MustCompile(`^(blobs|ingest|snapshots|layers|logs|io\.containerd\.(content|snapshotter)\..*)$`)

// files lists files and directories named after an ID below the scope's
// directory, without looking into mounts but those that the scope has itself.
func (s Scope) files(context.Context) ([]string, error) {
	points, err := s.mountpoints()
	if err != nil {
		return nil, err
	}
	mounted := map[string]bool{}
	for _, p := range points {
		mounted[p] = !slices.Contains(s.Mounts, p)
	}
	var found []string
	err = filepath.WalkDir(s.Dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // removed while walking
		case err != nil:
			return err
		case owned.MatchString(d.Name()):
			found = append(found, "file "+path)
		case !mounted[path] && !notOwned.MatchString(d.Name()):
			return nil
		}
		if d.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("walk %s: %w", s.Dir, err)
	}
	return found, nil
}

// removeFiles leaves the directory alone while anything is mounted in it: what
// is on the other side may not be ours.
func (s Scope) removeFiles() error {
	points, err := s.mountpoints()
	if err != nil {
		return err
	}
	if len(points) > 0 {
		return fmt.Errorf("remove %s: %s is mounted: %w", s.Dir, points[0], unix.EBUSY)
	}
	for _, f := range s.cachedResults() {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove cached CNI result: %w", err)
		}
	}
	if err := os.RemoveAll(s.Dir); err != nil {
		return fmt.Errorf("remove directory: %w", err)
	}
	return nil
}
