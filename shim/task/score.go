package task

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// setScore gives a process its OOM score where the runtime has not: crun gives a
// command that of whoever runs it. The command runs already, so what it has started
// gets it too, as far as that still is below it.
func setScore(pid int, want *int) error {
	if want == nil {
		return nil
	}
	f, err := openScore(pid)
	if err == nil {
		defer f.Close()
		var had int
		if had, err = readScore(f); err == nil && had != *want {
			err = passOn(f, pid, had, *want)
		}
	}
	return unlessEnded(err)
}

// passOn sets the score of a process, and then of all its children that have begun
// with the same. What it starts from then on begins with the new one.
func passOn(f *os.File, pid, had, want int) error {
	if _, err := f.WriteAt([]byte(strconv.Itoa(want)), 0); err != nil {
		return err
	}
	for _, child := range childrenOf(pid) {
		if err := unlessEnded(inherit(pid, child, had, want)); err != nil {
			return err
		}
	}
	return nil
}

// inherit sets the score of a child that has that of its parent.
func inherit(pid, child, had, want int) error {
	f, err := openScore(child)
	if err != nil {
		return err
	}
	defer f.Close()
	has, err := readScore(f)
	// What is open stays the process that it was, but the number may have been
	// another's already when it was opened.
	if err != nil || has != had || !slices.Contains(childrenOf(pid), child) {
		return err
	}
	return passOn(f, child, had, want)
}

// childrenOf lists the children of all threads of a process, as far as it is there.
func childrenOf(pid int) (children []int) {
	// The pattern is a good one.
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil {
			continue // the thread has ended
		}
		for _, n := range strings.Fields(string(text)) {
			if child, err := strconv.Atoi(n); err == nil {
				children = append(children, child)
			}
		}
	}
	return children
}

func openScore(pid int) (*os.File, error) {
	return os.OpenFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), os.O_RDWR, 0)
}

func readScore(f *os.File) (int, error) {
	var text [16]byte
	n, err := f.ReadAt(text[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text[:n])))
}

// unlessEnded is err unless it says that the process is not there any more.
func unlessEnded(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}
