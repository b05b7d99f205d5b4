// Package cgrouptree walks the control groups below one. Who may make groups may nest
// them deeper than a path can tell, with names as long as he likes: so no path is used
// but that of the first, and few files are open at a time. Start at Walk.
package cgrouptree

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxGroups bounds a walk, which somebody may lengthen by making groups meanwhile.
const maxGroups = 1 << 20

// A group can be busy for moments after the end of its last process.
const (
	busyLimit = 20 * time.Millisecond
	busyPoll  = time.Millisecond
)

// Walk calls visit with the open directory of the group dir and of every group beneath
// it, parents first. One that is removed meanwhile, or is not there, is passed over.
// ResourceExhausted says that there are too many.
func Walk(dir string, visit func(fd int) error) error {
	return walk(dir, visit, func(int, string) error { return nil })
}

// Prune removes the groups beneath dir, the deepest first, and leaves dir. It fails where
// a process is left in one.
func Prune(dir string) error {
	return walk(dir, func(int) error { return nil }, remove)
}

// Remove removes the group dir with those beneath it. It need not be there.
func Remove(dir string) error {
	if err := Prune(dir); err != nil {
		return err
	}
	return remove(unix.AT_FDCWD, dir)
}

// walk calls before for each group, and after for each but the first, with the directory
// that it is in, once those beneath it are done.
func walk(dir string, before func(fd int) error, after func(in int, name string) error) error {
	fd, err := open(unix.AT_FDCWD, dir)
	if err != nil {
		return passed(err)
	}
	defer func() { unix.Close(fd) }()
	var path []string   // from dir to where fd is
	var left [][]string // what is to be done there, and in each above it
	for groups := 1; ; groups++ {
		if groups > maxGroups {
			return fmt.Errorf("walk through control groups: more than %d: %w", maxGroups, errdefs.ErrResourceExhausted)
		}
		if err := before(fd); err != nil {
			return err
		}
		names, err := children(fd)
		if err != nil {
			return err
		}
		left = append(left, names)
		for entered := false; !entered; {
			here := len(left) - 1
			if len(left[here]) == 0 {
				if here == 0 {
					return nil
				}
				up, err := open(fd, "..")
				if err != nil {
					return err
				}
				unix.Close(fd)
				fd = up
				name := path[here-1]
				path, left = path[:here-1], left[:here]
				if err := after(fd, name); err != nil {
					return err
				}
				continue
			}
			name := left[here][0]
			left[here] = left[here][1:]
			next, err := open(fd, name)
			if passed(err) != nil {
				return err
			}
			if err == nil {
				unix.Close(fd)
				fd, path, entered = next, append(path, name), true
			}
		}
	}
}

// passed is the error but for that of a group which is not there any more.
func passed(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

func open(in int, name string) (int, error) {
	for {
		fd, err := unix.Openat(in, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: name, Err: err}
		}
		return fd, nil
	}
}

// children are the names of the groups in a directory.
func children(fd int) (names []string, err error) {
	own, err := open(fd, ".")
	if err != nil {
		return nil, passed(err)
	}
	f := os.NewFile(uintptr(own), "control group")
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if passed(err) != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func remove(in int, name string) error {
	tick := time.NewTicker(busyPoll)
	defer tick.Stop()
	for end := time.Now().Add(busyLimit); ; <-tick.C {
		err := unix.Unlinkat(in, name, unix.AT_REMOVEDIR)
		if passed(err) == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return &os.PathError{Op: "rmdir", Path: name, Err: err}
		}
	}
}
