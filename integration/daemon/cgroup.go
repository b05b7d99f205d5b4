package daemon

import (
	"os"
	"path"
	"strings"
)

// Systemd reports whether systemd runs this machine. Then daemons have it make
// their cgroups, as a kubelet there expects, unless Cgroupfs was given.
func Systemd() bool {
	info, err := os.Stat("/run/systemd/system")
	return err == nil && info.IsDir()
}

// SystemdCgroup reports whether systemd makes the cgroups of this daemon.
func (in *Instance) SystemdCgroup() bool { return Systemd() && !in.set.cgroupfs }

// PodParent is a cgroup below the daemon's own as the kubelet names it: with the
// systemd driver each name becomes a slice, which carries those above it.
func (in *Instance) PodParent(names ...string) string {
	parent := in.CgroupParent
	for _, n := range names {
		if in.SystemdCgroup() {
			above := strings.TrimSuffix(path.Base(parent), ".slice")
			n = above + "-" + strings.ReplaceAll(n, "-", "_") + ".slice"
		}
		parent = path.Join(parent, n)
	}
	return parent
}

// CgroupOf is where the cgroup of a container or pod sandbox must be.
func (in *Instance) CgroupOf(parent, id string) string {
	if in.SystemdCgroup() {
		return path.Join(parent, "cri-containerd-"+id+".scope")
	}
	return path.Join(parent, id)
}
