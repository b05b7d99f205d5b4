// Package cgroupmove takes a wait out of the way of who is about to move a process
// into a control group.
//
// While nobody does that, processes fork and end without a lock. The first move waits
// until every processor has noticed that there is one, an RCU grace period, which is 5 to
// 16 ms on a machine with little to do; those that follow within some 10 ms do not
// (cgroup_threadgroup_rwsem, kernel/cgroup/cgroup.c). An OCI runtime, or systemd for it,
// makes a move for each container, some 8 ms after the runtime was executed. The mount
// option favordynmods (Linux 6.0) does away with the wait for the whole machine, at the
// price of slower forks. Start at Expect.
package cgroupmove

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/cgroups/v3"
	"github.com/moby/sys/mountinfo"
)

var under atomic.Bool // a wait is under way

// Expect says that a process is about to be moved, by anybody. It does not wait, and
// what goes wrong goes no further: then the move takes its time. This process is moved to
// where it is: should somebody move it elsewhere at the very moment, that may be undone.
func Expect() {
	if !under.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer under.Store(false)
		groups, err := os.ReadFile("/proc/self/cgroup")
		if err == nil {
			stay(string(groups), mounted())
		}
	}()
}

// ExpectCommand is Expect for one more process in a container. Where there is version 2
// alone, runtimes make that in its group at once (clone3(2), CLONE_INTO_CGROUP; runc since
// 1.4), without the wait, and would have to wait for one that is under way.
func ExpectCommand() {
	if cgroups.Mode() != cgroups.Unified {
		Expect()
	}
}

// mounted are the mounts of control groups, which stay where they are.
var mounted = sync.OnceValue(func() []*mountinfo.Info {
	// Without mounts nothing is expected.
	mounts, _ := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	return mounts
})

// stay moves this process to where it is, in one hierarchy: the lock is that of all of
// them. It reports whether there was one to do it in.
func stay(groups string, mounts []*mountinfo.Info) bool {
	for line := range strings.Lines(groups) {
		// NUMBER:CONTROLLERS:PATH, without controllers in version 2 (cgroups(7)).
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 || strings.HasPrefix(fields[2], "/..") {
			continue // outside of our namespace of control groups
		}
		i := slices.IndexFunc(mounts, func(m *mountinfo.Info) bool { return shows(m, fields[1]) })
		if i < 0 {
			continue
		}
		f, err := os.OpenFile(filepath.Join(mounts[i].Mountpoint, fields[2], "cgroup.procs"), os.O_WRONLY, 0)
		if err != nil {
			continue
		}
		// The kernel may refuse, as in a group that has groups with controllers:
		// it has taken the lock before.
		_, _ = f.WriteString(strconv.Itoa(os.Getpid()))
		_ = f.Close()
		return true
	}
	return false
}

// shows reports whether a mount is of the hierarchy with these controllers and has our
// namespace's first group at its top: paths of groups are paths there, and with another
// one they may be those of groups that we are not in.
func shows(m *mountinfo.Info, controllers string) bool {
	if m.Root != "/" {
		return false
	}
	if controllers == "" {
		return m.FSType == "cgroup2"
	}
	first, _, _ := strings.Cut(controllers, ",")
	return m.FSType == "cgroup" && slices.Contains(strings.Split(m.VFSOptions, ","), first)
}
