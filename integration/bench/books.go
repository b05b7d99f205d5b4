package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Cgroup hierarchies of version 1; with version 2 there is only unified.
const (
	cpuacctTree = "/sys/fs/cgroup/cpuacct"
	blkioTree   = "/sys/fs/cgroup/blkio"
	unifiedTree = "/sys/fs/cgroup"
)

// books are the kernel's accounts of one daemon: a cgroup for it and all it
// starts, and the parent of its pods. Processes are charged to the group that
// they run in, and what they used stays there when they have ended.
type books struct {
	daemon, pods string // directories of the accounting tree
	blkio        string // the daemon's group that throttles, "" where there is none
}

// openBooks puts the daemon into groups of its own.
func openBooks(cgroupParent string, pid int) (*books, error) {
	tree := cpuacctTree
	if !exists(filepath.Join(tree, "cpuacct.usage")) {
		tree = unifiedTree
	}
	b := &books{daemon: filepath.Join(tree, cgroupParent+"-daemon"), pods: filepath.Join(tree, cgroupParent)}
	if exists(filepath.Join(blkioTree, "blkio.throttle.write_iops_device")) {
		b.blkio = filepath.Join(blkioTree, cgroupParent+"-daemon")
	}
	for _, dir := range []string{b.daemon, b.pods, b.blkio} {
		if dir == "" {
			continue
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return b, fmt.Errorf("open books: %w", err)
		}
	}
	return b, b.enter(pid)
}

// enter moves a daemon in, after each of its starts.
func (b *books) enter(pid int) error {
	for _, dir := range []string{b.daemon, b.blkio} {
		if dir == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o600); err != nil {
			return fmt.Errorf("enter the books: %w", err)
		}
	}
	return nil
}

// cpu is what was used so far, in milliseconds.
func (b *books) cpu() (float64, error) {
	var sum float64
	for _, dir := range []string{b.daemon, b.pods} {
		used, err := cpuOf(dir)
		if err != nil {
			return 0, fmt.Errorf("read CPU usage: %w", err)
		}
		sum += used
	}
	return sum, nil
}

func cpuOf(dir string) (float64, error) {
	if text, err := os.ReadFile(filepath.Join(dir, "cpuacct.usage")); err == nil {
		nanos, err := strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
		return nanos / 1e6, err
	}
	text, err := os.ReadFile(filepath.Join(dir, "cpu.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if micros, ok := strings.CutPrefix(line, "usage_usec "); ok {
			used, err := strconv.ParseFloat(strings.TrimSpace(micros), 64)
			return used / 1e3, err
		}
	}
	return 0, fmt.Errorf("%s has no usage_usec", dir)
}

// throttle lets the daemon's group write only so often per second to a device
// named MAJOR:MINOR; 0 is without limit. What was written before is not slowed.
func (b *books) throttle(device string, writes int) error {
	line := fmt.Appendf(nil, "%s %d", device, writes)
	if err := os.WriteFile(filepath.Join(b.blkio, "blkio.throttle.write_iops_device"), line, 0o600); err != nil {
		return fmt.Errorf("throttle the disk: %w", err)
	}
	return nil
}

// close removes the groups that the harness does not know of.
func (b *books) close() error {
	if b == nil {
		return nil
	}
	var errs []error
	for _, dir := range []string{b.daemon, b.blkio} {
		if dir == "" {
			continue
		}
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("close books: %w", err))
		}
	}
	return errors.Join(errs...)
}

// pids are the processes of the daemon's group and of its pods.
func (b *books) pids() ([]int, error) {
	var all []int
	for _, root := range []string{b.daemon, b.pods} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || d.Name() != "cgroup.procs" {
				return err
			}
			text, err := os.ReadFile(path)
			if err != nil {
				return nil // the group went meanwhile
			}
			for f := range strings.FieldsSeq(string(text)) {
				pid, err := strconv.Atoi(f)
				if err != nil {
					return fmt.Errorf("parse %s: %w", path, err)
				}
				all = append(all, pid)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list processes: %w", err)
		}
	}
	return all, nil
}

// busy is the time in milliseconds that the machine's processors worked, for
// whomever.
func busy() (float64, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, fmt.Errorf("read machine's CPU usage: %w", err)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	// user nice system idle iowait irq softirq steal; guests are in user.
	var ticks float64
	for i, f := range strings.Fields(line)[1:] {
		if i == 3 || i == 4 || i > 7 {
			continue
		}
		v, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return 0, fmt.Errorf("parse /proc/stat: %w", err)
		}
		ticks += v
	}
	return ticks * 10, nil
}

// load is the load average over the last minute.
func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(text), " ")
	return first
}
