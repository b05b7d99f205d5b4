package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/cgroupspath"
	"github.com/gantry-cri/gantry/plugin/cgrouptree"
)

// Hierarchies is the host's control groups: one tree on cgroup v2, one per
// controller on v1, both on a hybrid host. A container's group has the same
// path in each.
type Hierarchies struct {
	roots []string
}

// NewHierarchies finds the control groups that are mounted.
func NewHierarchies() (*Hierarchies, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("find cgroup mounts: %w", err)
	}
	h := &Hierarchies{}
	for _, m := range mounts {
		h.roots = append(h.roots, m.Mountpoint)
	}
	if len(h.roots) == 0 {
		return nil, fmt.Errorf("find cgroup mounts: none: %w", errdefs.ErrFailedPrecondition)
	}
	return h, nil
}

// Procs lists the processes in the control group and beneath it, sorted. A
// group that does not exist has none.
func (h *Hierarchies) Procs(path string) ([]int, error) {
	dirs, err := h.dirs(path)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, dir := range dirs {
		found, err := procsBeneath(dir)
		if err != nil {
			return nil, fmt.Errorf("list processes of cgroup %s: %w", path, err)
		}
		pids = append(pids, found...)
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// killPoll is the pause between looks at a group whose processes were killed.
const killPoll = 10 * time.Millisecond

// Kill ends every process in the control group and beneath it and returns when
// none is left, with the number of those it found first. It refuses a group
// that holds this process or process 1. When ctx ends first the error names
// the processes that are left.
func (h *Hierarchies) Kill(ctx context.Context, path string) (int, error) {
	dirs, err := h.dirs(path)
	if err != nil {
		return 0, err
	}
	found := -1
	for {
		pids, err := h.Procs(path)
		if err != nil {
			return max(found, 0), err
		}
		if found < 0 {
			found = len(pids)
		}
		if len(pids) == 0 {
			return found, nil
		}
		if slices.Contains(pids, os.Getpid()) || slices.Contains(pids, 1) {
			return 0, fmt.Errorf("kill cgroup %s: it is not a container's: %w", path, errdefs.ErrFailedPrecondition)
		}
		if err := h.killOnce(path, dirs, pids); err != nil {
			return found, fmt.Errorf("kill cgroup %s: %w", path, err)
		}
		if err := sleep(ctx, killPoll); err != nil {
			return found, fmt.Errorf("kill cgroup %s: processes %v do not end: %w", path, pids, err)
		}
	}
}

// killOnce sends one round of SIGKILL: to the whole group at once where the
// kernel does that, and to each process, of which some may fork meanwhile. On
// a hybrid host no single hierarchy need hold them all.
func (h *Hierarchies) killOnce(path string, dirs []string, pids []int) error {
	for _, dir := range dirs {
		if _, err := put(unix.AT_FDCWD, filepath.Join(dir, "cgroup.kill"), "1"); err != nil {
			return err
		}
	}
	if err := h.killMembers(path, pids); err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := thaw(dir); err != nil {
			return err
		}
	}
	return nil
}

// killMembers kills those of pids that still are members: a pid read from a
// list may by now be somebody else's, so all are pinned and looked up again.
func (h *Hierarchies) killMembers(path string, pids []int) error {
	pinned := map[int]int{}
	defer func() {
		for _, fd := range pinned {
			unix.Close(fd)
		}
	}()
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return fmt.Errorf("open process %d: %w", pid, err)
		}
		pinned[pid] = fd
	}
	members, err := h.Procs(path)
	if err != nil {
		return err
	}
	for pid, fd := range pinned {
		if !slices.Contains(members, pid) {
			continue
		}
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill process %d: %w", pid, err)
		}
	}
	return nil
}

// thaw lets a group of the v1 freezer and those beneath it run: their processes
// die only then. The groups of other hierarchies have no such file.
func thaw(dir string) error {
	return cgrouptree.Walk(dir, func(fd int) error {
		_, err := put(fd, "freezer.state", "THAWED")
		return err
	})
}

// put writes a control file if the group has it.
func put(dir int, file, value string) (wrote bool, err error) {
	f, err := openAt(dir, file, unix.O_WRONLY)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = f.WriteString(value)
	if errors.Is(err, unix.ENODEV) {
		return false, nil // the group was removed meanwhile
	}
	return err == nil, err
}

// openAt opens a control file of a group that is open.
func openAt(dir int, file string, flags int) (*os.File, error) {
	for {
		fd, err := unix.Openat(dir, file, flags|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: file, Err: err}
		}
		return os.NewFile(uintptr(fd), file), nil
	}
}

// Set writes a file of the control group in the hierarchies where it has it, and reports
// whether there is one.
func (h *Hierarchies) Set(path, file, value string) (done bool, err error) {
	dirs, err := h.dirs(path)
	if err != nil {
		return false, err
	}
	for _, dir := range dirs {
		wrote, err := put(unix.AT_FDCWD, filepath.Join(dir, file), value)
		if err != nil {
			return done, fmt.Errorf("set %s of cgroup %s: %w", file, path, err)
		}
		done = done || wrote
	}
	return done, nil
}

// Remove removes the control group and those beneath it in every hierarchy.
// FailedPrecondition says that a process is left. It is idempotent.
func (h *Hierarchies) Remove(path string) error {
	pids, err := h.Procs(path)
	if err != nil {
		return err
	}
	if len(pids) > 0 {
		return fmt.Errorf("remove cgroup %s: processes %v are left: %w", path, pids, errdefs.ErrFailedPrecondition)
	}
	dirs, err := h.dirs(path)
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		errs = append(errs, cgrouptree.Remove(dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove cgroup %s: %w", path, err)
	}
	return nil
}

// dirs returns the group's directories that exist. It refuses a path that is
// no group of its own.
func (h *Hierarchies) dirs(path string) ([]string, error) {
	rel, err := cgroupspath.Group(path)
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, root := range h.roots {
		dir := filepath.Join(root, rel)
		if _, err := os.Lstat(dir); err == nil {
			dirs = append(dirs, dir)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("find cgroup %s: %w", path, err)
		}
	}
	return dirs, nil
}

// procsBeneath reads cgroup.procs of dir and of every group beneath it.
func procsBeneath(dir string) (pids []int, err error) {
	err = cgrouptree.Walk(dir, func(fd int) error {
		found, err := readProcs(fd)
		pids = append(pids, found...)
		return err
	})
	return pids, err
}

func readProcs(dir int) ([]int, error) {
	const file = "cgroup.procs"
	f, err := openAt(dir, file, unix.O_RDONLY)
	var data []byte
	if err == nil {
		data, err = io.ReadAll(f)
		f.Close()
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV):
		return nil, nil // the group was removed meanwhile
	case errors.Is(err, unix.EOPNOTSUPP):
		return nil, nil // a threaded group: its processes are in its parent's list
	case err != nil:
		return nil, err
	}
	var pids []int
	for _, field := range strings.Fields(string(data)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", file, err)
		}
		if pid != 0 { // 0: a process of a pid namespace that is not ours
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Prune removes the groups beneath the control group in every hierarchy, however deep
// they are. It fails where a process is left in one.
func (h *Hierarchies) Prune(path string) error {
	dirs, err := h.dirs(path)
	for _, dir := range dirs {
		err = errors.Join(err, cgrouptree.Prune(dir))
	}
	if err != nil {
		return fmt.Errorf("remove groups beneath cgroup %s: %w", path, err)
	}
	return nil
}
