// Package cgroupmove takes a wait out of the way of who is about to move a process
// into a control group.
//
// While nobody does that, processes fork and end without a lock. The first move waits
// until every processor has noticed that there is one, an RCU grace period, which is 5 to
// 16 ms on a machine with little to do; those that follow within some 10 ms do not
// (cgroup_threadgroup_rwsem, kernel/cgroup/cgroup.c). An OCI runtime makes a move for
// each container and each command, some 8 ms after it was executed. The mount option
// favordynmods (Linux 6.0) does away with the wait for the whole machine, at the price of
// slower forks. Start at Expect.
package cgroupmove

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
)

const (
	self = "/proc/self/cgroup"
	root = "/sys/fs/cgroup"
)

var under atomic.Bool // a wait is under way

// Expect says that a process is about to be moved, by anybody. It does not wait, and
// what goes wrong goes no further: then the move takes its time.
func Expect() {
	if !under.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer under.Store(false)
		stay(self, root)
	}()
}

// stay moves this process to where it is, in one hierarchy: the lock is that of all of
// them. It reports whether there was one to do it in.
func stay(groups, root string) bool {
	text, err := os.ReadFile(groups)
	if err != nil {
		return false
	}
	pid := []byte(strconv.Itoa(os.Getpid()))
	for line := range strings.Lines(string(text)) {
		// NUMBER:CONTROLLERS:PATH, without controllers in version 2 (cgroups(7)).
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 {
			continue
		}
		mounted := []string{strings.TrimPrefix(fields[1], "name=")}
		if fields[1] == "" {
			mounted = []string{"", "unified"}
		}
		for _, dir := range mounted {
			f, err := os.OpenFile(filepath.Join(root, dir, fields[2], "cgroup.procs"), os.O_WRONLY, 0)
			if err != nil {
				continue
			}
			// The kernel may refuse, as in a group that has groups with controllers:
			// it has taken the lock before.
			_, _ = f.Write(pid)
			_ = f.Close()
			return true
		}
	}
	return false
}
