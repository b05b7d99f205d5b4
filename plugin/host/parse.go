package host

import (
	"bufio"
	"bytes"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"

	"github.com/gantry-cri/gantry/plugin/facts"
)

const cgroupRoot = "/sys/fs/cgroup"

// maxCPUs bounds a list of CPUs; the kernel's own limit is 8192.
const maxCPUs = 1 << 16

var kernelVersion = regexp.MustCompile(`^([0-9]{1,4})\.([0-9]{1,4})`)

func parseKernel(release string) (facts.Kernel, error) {
	m := kernelVersion.FindStringSubmatch(release)
	if m == nil {
		return facts.Kernel{}, fmt.Errorf("parse kernel release %q: %w", release, errdefs.ErrInternal)
	}
	// Four digits always fit.
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	return facts.Kernel{Major: major, Minor: minor}, nil
}

// parseCPUs reads a list such as "0-3,8".
func parseCPUs(s string) ([]int, error) {
	bad := fmt.Errorf("parse CPU list %.64q: %w", s, errdefs.ErrInternal)
	var cpus []int
	for r := range strings.SplitSeq(s, ",") {
		first, last, isRange := strings.Cut(r, "-")
		if !isRange {
			last = first
		}
		a, errA := strconv.ParseUint(first, 10, 16)
		b, errB := strconv.ParseUint(last, 10, 16)
		if errA != nil || errB != nil || a > b || len(cpus)+int(b-a) >= maxCPUs {
			return nil, bad
		}
		for n := a; n <= b; n++ {
			cpus = append(cpus, int(n))
		}
	}
	slices.Sort(cpus)
	return slices.Compact(cpus), nil
}

type procStatus struct {
	bounding, effective []string
	seccomp             bool
}

// parseStatus reads what matters of /proc/PID/status. A kernel with seccomp
// filters has a line about them.
func parseStatus(b []byte) (procStatus, error) {
	sets, err := cap.ParseProcPIDStatus(bytes.NewReader(b))
	if err != nil {
		return procStatus{}, fmt.Errorf("parse status: %w (%w)", err, errdefs.ErrInternal)
	}
	var s procStatus
	s.bounding, _ = cap.FromBitmap(sets[cap.Bounding])
	s.effective, _ = cap.FromBitmap(sets[cap.Effective])
	s.seccomp = bytes.Contains(b, []byte("\nSeccomp:"))
	return s, nil
}

// isInitialMap recognises the initial user namespace's mapping: all ids, each
// to itself.
func isInitialMap(uidMap string) bool {
	return slices.Equal(strings.Fields(uidMap), []string{"0", "0", "4294967295"})
}

func parseMemTotal(b []byte) (uint64, error) {
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) != 3 || f[0] != "MemTotal:" || f[2] != "kB" {
			continue
		}
		kib, err := strconv.ParseUint(f[1], 10, 54)
		if err != nil {
			return 0, fmt.Errorf("parse MemTotal: %w (%w)", err, errdefs.ErrInternal)
		}
		return kib << 10, nil
	}
	return 0, fmt.Errorf("no MemTotal in meminfo: %w", errdefs.ErrInternal)
}

// parseHugepages reads a name such as "hugepages-2048kB".
func parseHugepages(name string) (kib uint64, ok bool) {
	n, isSize := strings.CutPrefix(name, "hugepages-")
	n, isKiB := strings.CutSuffix(n, "kB")
	kib, err := strconv.ParseUint(n, 10, 54)
	return kib, isSize && isKiB && err == nil && kib > 0
}

// pageSizeName writes a size as the hugetlb controller does.
func pageSizeName(kib uint64) string {
	units := "KMG"
	i := 0
	for ; kib%1024 == 0 && i < len(units)-1; i++ {
		kib /= 1024
	}
	return fmt.Sprintf("%d%cB", kib, units[i])
}

// systemdHierarchy is how the kernel calls the one that systemd keeps its groups in.
const systemdHierarchy = "name=systemd"

// parseCgroup reads the layout of the hierarchies out of mountinfo and
// /proc/self/cgroup. The controllers of a version 2 tree are not in there.
func parseCgroup(mounts, self []byte) (facts.Cgroup, error) {
	infos, err := mountinfo.GetMountsFromReader(bytes.NewReader(mounts), mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return facts.Cgroup{}, fmt.Errorf("parse mountinfo: %w (%w)", err, errdefs.ErrInternal)
	}
	cg := facts.Cgroup{Mode: facts.CgroupV1, Controllers: map[string]string{}, Self: parseSelf(self)}
	for _, m := range infos {
		if m.Mountpoint != cgroupRoot && path.Dir(m.Mountpoint) != cgroupRoot {
			continue // a container's or somebody's private one
		}
		if m.FSType == "cgroup2" {
			cg.Unified, cg.UnifiedOptions = m.Mountpoint, remountOptions(m.VFSOptions)
			continue
		}
		for option := range strings.SplitSeq(m.VFSOptions, ",") {
			// Named hierarchies hold no controller.
			if option == systemdHierarchy {
				cg.Systemd = m.Mountpoint
			}
			if _, controller := cg.Self[option]; controller && option != "" && !strings.Contains(option, "=") {
				cg.Controllers[option] = m.Mountpoint
			}
		}
	}
	switch {
	case cg.Unified == cgroupRoot:
		cg.Mode = facts.CgroupV2
	case cg.Unified != "":
		cg.Mode = facts.CgroupHybrid
	case len(cg.Controllers) == 0:
		return facts.Cgroup{}, fmt.Errorf("no cgroup hierarchy is mounted at %s: %w", cgroupRoot, errdefs.ErrFailedPrecondition)
	}
	return cg, nil
}

// remountOptions are those that mounting the tree again without them resets.
func remountOptions(options string) (list []string) {
	for o := range strings.SplitSeq(options, ",") {
		if strings.HasPrefix(o, "memory_") || strings.HasPrefix(o, "pids_") || o == "nsdelegate" || o == "favordynmods" {
			list = append(list, o)
		}
	}
	return list
}

// parseSelf reads /proc/self/cgroup: "number:controllers:path" per line.
func parseSelf(b []byte) map[string]string {
	self := map[string]string{}
	s := bufio.NewScanner(bytes.NewReader(b))
	for s.Scan() {
		f := strings.SplitN(s.Text(), ":", 3)
		if len(f) != 3 || !strings.HasPrefix(f[2], "/") {
			continue
		}
		for c := range strings.SplitSeq(f[1], ",") {
			self[c] = f[2]
		}
	}
	return self
}
