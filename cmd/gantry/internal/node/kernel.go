package node

import (
	"context"
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// Calls are system calls that not every kernel has.
type Calls struct {
	// Openat2 opens files of images without following links out of them.
	Openat2 bool
	// Pidfd names a process without confusing it with a later one.
	Pidfd bool
	// MountSetattr makes idmapped mounts, for pods with user namespaces.
	MountSetattr bool
}

// KernelCalls asks the running kernel, with calls that do nothing.
func KernelCalls() Calls {
	var c Calls
	if fd, err := unix.PidfdOpen(os.Getpid(), 0); err == nil {
		unix.Close(fd)
		c.Pidfd = true
	}
	if fd, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC}); err == nil {
		unix.Close(fd)
		c.Openat2 = true
	}
	// A kernel that has it finds fault with the descriptor.
	err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	c.MountSetattr = errors.Is(err, unix.EBADF)
	return c
}

func (n Node) kernel(context.Context) []Finding {
	l := &list{area: "kernel"}
	h, err := n.Facts()
	if err != nil {
		l.add("machine", Fail, "the daemon would not start either: mount /proc, /sys and /sys/fs/cgroup", "%v", err)
		return l.all
	}
	l.ok("version", "Linux %d.%d, %d MiB of memory, %d CPUs", h.Kernel.Major, h.Kernel.Minor, h.MemoryTotal>>20, len(h.PossibleCPUs))
	n.filesystems(l)
	n.systemCalls(l)
	n.confinement(l, h)
	n.cgroups(l, h)
	return l.all
}

func (n Node) filesystems(l *list) {
	known := n.words("/proc/filesystems")
	for _, fs := range []struct {
		name, why string
		missing   Status
	}{
		{"overlay", "the default snapshotter mounts images with it", Fail},
		{"erofs", "only the erofs snapshotter needs it", Warn},
	} {
		if slices.Contains(known, fs.name) {
			l.ok(fs.name, "the kernel has this filesystem")
			continue
		}
		l.add(fs.name, fs.missing, "modprobe "+fs.name+", and name it in /etc/modules-load.d to have it after a reboot",
			"the kernel does not have this filesystem, or has not loaded it; %s", fs.why)
	}
}

func (n Node) systemCalls(l *list) {
	c := n.Calls()
	for _, call := range []struct {
		name, since, why string
		there            bool
		missing          Status
	}{
		{"openat2", "5.6", "without it files of an image cannot be read safely, and no container is created", c.Openat2, Fail},
		{"pidfd", "5.3", "a process is named by it so that a number used again is not mistaken", c.Pidfd, Warn},
		{"idmapped mounts", "5.12, of overlay 5.19", "pods with user namespaces need them", c.MountSetattr, Warn},
	} {
		if call.there {
			l.ok(call.name, "the kernel has it")
			continue
		}
		l.add(call.name, call.missing, "use Linux "+call.since+" or newer", "the kernel does not have it; %s", call.why)
	}
}

func (n Node) confinement(l *list, h facts.Host) {
	if !h.Seccomp {
		l.add("seccomp", Fail, "use a kernel with CONFIG_SECCOMP_FILTER", "the kernel cannot filter system calls; pods with a seccomp profile fail")
	} else if slices.Contains(n.words("/proc/sys/kernel/seccomp/actions_avail"), "user_notif") {
		l.ok("seccomp", "filters and user notification")
	} else {
		l.add("seccomp", Warn, "use Linux 5.0 or newer", "filters, but no user notification; profiles that name a listener fail")
	}
	var lsm []string
	if h.AppArmor {
		lsm = append(lsm, "AppArmor")
	}
	if h.SELinux {
		lsm = append(lsm, "SELinux")
	}
	if len(lsm) == 0 {
		l.add("security modules", Warn, "", "neither AppArmor nor SELinux is active; containers are confined by namespaces, capabilities and seccomp alone")
	} else {
		l.ok("security modules", "%s", strings.Join(lsm, " and "))
	}
	most := n.words("/proc/sys/user/max_user_namespaces")
	if len(most) == 1 {
		if count, err := strconv.Atoi(most[0]); err == nil && count > 0 {
			l.ok("user namespaces", "up to %d", count)
			return
		}
	}
	l.add("user namespaces", Warn, "sysctl -w user.max_user_namespaces=15000", "not available; pods with hostUsers: false fail")
}

// wanted are the controllers without which a pod's limits mean nothing.
var wanted = []string{"cpu", "memory", "pids"}

func (n Node) cgroups(l *list, h facts.Host) {
	switch h.Cgroup.Mode {
	case facts.CgroupV2:
		l.ok("cgroups", "version 2")
	case facts.CgroupHybrid:
		l.add("cgroups", Warn, "boot with systemd.unified_cgroup_hierarchy=1; Kubernetes gives version 1 up",
			"version 1 holds the controllers, with a version 2 tree beside it (hybrid)")
	default:
		l.add("cgroups", Warn, "boot with systemd.unified_cgroup_hierarchy=1; Kubernetes gives version 1 up", "version 1")
	}
	var missing []string
	for _, c := range wanted {
		if !h.Cgroup.Has(c) {
			missing = append(missing, c)
		}
	}
	if len(missing) > 0 {
		l.add("cgroup controllers", Fail, "enable them on the kernel's command line (cgroup_enable=memory and the like) or in the parent's cgroup.subtree_control",
			"missing: %s; limits of pods would not hold", strings.Join(missing, ", "))
		return
	}
	l.ok("cgroup controllers", "%s are there", strings.Join(wanted, ", "))
}

// words returns the words of a file, none if it cannot be read.
func (n Node) words(path string) []string {
	b, err := os.ReadFile(n.path(path))
	if err != nil {
		return nil
	}
	return strings.Fields(string(b))
}
