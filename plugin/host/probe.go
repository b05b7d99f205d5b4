// Package host looks at the machine: once, when the daemon starts, at what the
// kernel offers (Probe), and for every container at the host paths, devices
// and files it names (ResolveMounts, ResolveDevices, HostDevices, ReadProfile).
//
// It changes nothing, with one exception that is part of the CRI's practice: a
// host path that does not exist becomes a directory. It decides nothing about
// containers; package spec does, with what was found here. Start at Probe.
package host

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// Probe finds out what the machine is like. It fails when something that every
// Linux has cannot be read; what a kernel may lack is reported as absent.
func Probe() (facts.Host, error) {
	h, err := prober{}.probe()
	if err != nil {
		return facts.Host{}, fmt.Errorf("probe host: %w", err)
	}
	return h, nil
}

// prober reads below root, which is empty but in tests.
type prober struct{ root string }

func (p prober) probe() (facts.Host, error) {
	h := facts.Host{PageSize: os.Getpagesize()}
	for _, step := range []func(*facts.Host) error{p.system, p.process, p.memory, p.cgroup, p.optional} {
		if err := step(&h); err != nil {
			return facts.Host{}, err
		}
	}
	return h, nil
}

func (p prober) read(name string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(p.root, name))
	if err != nil {
		return nil, fmt.Errorf("%w (%w)", err, errdefs.ErrUnavailable)
	}
	return b, nil
}

func (p prober) exists(name string) bool {
	_, err := os.Stat(filepath.Join(p.root, name))
	return err == nil
}

// first returns the first word of a file, "" if there is none.
func (p prober) first(name string) string {
	b, err := os.ReadFile(filepath.Join(p.root, name))
	if err != nil {
		return ""
	}
	words := bytes.Fields(b)
	if len(words) == 0 {
		return ""
	}
	return string(words[0])
}

func (p prober) system(h *facts.Host) error {
	h.Hostname = p.first("/proc/sys/kernel/hostname")
	b, err := p.read("/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	if h.Kernel, err = parseKernel(string(b)); err != nil {
		return err
	}
	b, err = p.read("/sys/devices/system/cpu/possible")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	h.PossibleCPUs, err = parseCPUs(strings.TrimSpace(string(b)))
	return err
}

func (p prober) process(h *facts.Host) error {
	b, err := p.read("/proc/self/status")
	if err != nil {
		return err
	}
	status, err := parseStatus(b)
	if err != nil {
		return err
	}
	h.Capabilities, h.Seccomp = status.bounding, status.seccomp
	if b, err = p.read("/proc/self/uid_map"); err == nil {
		h.UserNS = !isInitialMap(string(b))
	}
	b, err = p.read("/proc/self/oom_score_adj")
	if err != nil {
		return err
	}
	if h.OOMScoreAdj, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		return fmt.Errorf("parse oom_score_adj: %w (%w)", err, errdefs.ErrInternal)
	}
	// The kernel asks for the capability in the initial user namespace.
	h.LowerOOMScore = !h.UserNS && slices.Contains(status.effective, "CAP_SYS_RESOURCE") && h.HasCapability("CAP_SYS_RESOURCE")
	return nil
}

func (p prober) memory(h *facts.Host) error {
	b, err := p.read("/proc/meminfo")
	if err != nil {
		return err
	}
	h.MemoryTotal, err = parseMemTotal(b)
	return err
}

// optional finds what a kernel may do without.
func (p prober) optional(h *facts.Host) error {
	// Without the program nobody could load a profile.
	h.AppArmor = p.first("/sys/module/apparmor/parameters/enabled") == "Y" && p.exists(appArmorProfiles) &&
		(p.exists("/sbin/"+appArmorParser) || p.exists("/usr/sbin/"+appArmorParser))
	h.SELinux = p.exists("/sys/fs/selinux/enforce")
	limit := p.first("/proc/sys/user/max_user_namespaces")
	h.UserNamespaces = limit != "" && limit != "0"
	h.UnprivilegedPorts = p.exists("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	h.UnprivilegedICMP = p.exists("/proc/sys/net/ipv4/ping_group_range")
	entries, err := os.ReadDir(filepath.Join(p.root, "/sys/kernel/mm/hugepages"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list huge page sizes: %w (%w)", err, errdefs.ErrUnavailable)
	}
	var sizes []uint64
	for _, e := range entries {
		if kib, ok := parseHugepages(e.Name()); ok {
			sizes = append(sizes, kib)
		}
	}
	slices.Sort(sizes)
	for _, kib := range sizes {
		h.HugepageSizes = append(h.HugepageSizes, pageSizeName(kib))
	}
	return nil
}

func (p prober) cgroup(h *facts.Host) error {
	mounts, err := p.read("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	self, err := p.read("/proc/self/cgroup")
	if err != nil {
		return err
	}
	cg, err := parseCgroup(mounts, self)
	if err != nil {
		return err
	}
	if cg.V2() {
		// Those of the root, where pods have their cgroups: the daemon's own may
		// lack some, as systemd hands down to a service what it asks for.
		b, err := p.read(filepath.Join(cg.Unified, "cgroup.controllers"))
		if err != nil {
			return err
		}
		cg.Controllers = map[string]string{}
		for c := range strings.FieldsSeq(string(b)) {
			cg.Controllers[c] = cg.Unified
		}
	}
	cg.SwapAccounting = p.swapAccounting(cg)
	h.Cgroup = cg
	return nil
}

// swapAccounting looks for the file that limits swap: on version 1 every
// cgroup has it, on version 2 all but the root.
func (p prober) swapAccounting(cg facts.Cgroup) bool {
	if !cg.Has("memory") {
		return false
	}
	if !cg.V2() {
		return p.exists(filepath.Join(cg.Controllers["memory"], "memory.memsw.limit_in_bytes")) ||
			p.exists(filepath.Join(cg.Controllers["memory"], cg.Self["memory"], "memory.memsw.limit_in_bytes"))
	}
	if p.exists(filepath.Join(cg.Unified, cg.Self[""], "memory.swap.max")) {
		return true
	}
	others, err := filepath.Glob(filepath.Join(p.root, cg.Unified, "*", "memory.swap.max"))
	return err == nil && len(others) > 0
}
