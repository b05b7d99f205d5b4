package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// lastSet is the file in the bundle that has what the last update set. The runtime
// is not told of updates, so its own state has what the container was created with.
const lastSet = "resources.json"

// setting is held while files of control groups are written: the library keeps what it
// finds out of version 1 in variables of its own. systemd may not answer, and whoever
// waits for it holds up nobody else.
var setting sync.Mutex

// Update sets limits; what l has no value for, or 0, stays. When it fails, those of
// before are set again, as far as there were any, but not of huge pages and not files
// of version 2. The runtime itself is asked if its files do not say where the
// control groups are.
//
// Unlike runc's, it takes huge page limits, and leaves alone those that l does not
// name: the kernel refuses a limit below what is in use, also one of long ago.
func (r *Runtime) Update(ctx context.Context, l *specs.LinuxResources) error {
	s, ok := r.readState()
	if !ok || s.rootless() {
		return r.explain("update", r.runc.Log, r.runc.Update(ctx, r.id, l))
	}
	before, err := r.resources(s)
	if err != nil {
		return err
	}
	after := changed(before, l)
	m, err := s.manager()
	if err != nil {
		return err
	}
	if !s.Config.Cgroups.Systemd {
		setting.Lock()
		defer setting.Unlock()
	}
	if err = m.Set(after); err != nil {
		err = fmt.Errorf("set limits of the control group: %w", err)
	} else if err = r.keep(after); err == nil {
		return nil
	}
	if again := m.Set(before); again != nil {
		err = errors.Join(err, fmt.Errorf("set those of before: %w", again))
	}
	return err
}

// Pause freezes the container.
func (r *Runtime) Pause(ctx context.Context) error {
	return r.freeze(cgroups.Frozen, "pause", func() error { return r.runc.Pause(ctx, r.id) })
}

// Resume thaws the container.
func (r *Runtime) Resume(ctx context.Context) error {
	return r.freeze(cgroups.Thawed, "resume", func() error { return r.runc.Resume(ctx, r.id) })
}

// freeze asks the runtime where its files do not say where the control groups are.
func (r *Runtime) freeze(to cgroups.FreezerState, verb string, ask func() error) error {
	s, ok := r.readState()
	if !ok || s.rootless() {
		return r.explain(verb, r.runc.Log, ask())
	}
	m, err := s.manager()
	if err != nil {
		return err
	}
	if err := m.Freeze(to); err != nil {
		err = fmt.Errorf("%s the control group: %w", verb, err)
		if to == cgroups.Frozen {
			err = errors.Join(err, m.Freeze(cgroups.Thawed)) // it is not half frozen for ever
		}
		return err
	}
	// The library takes a freezer that it cannot open for one that is thawed.
	if _, known := s.frozen(); to == cgroups.Thawed && !known {
		return fmt.Errorf("%s the control group: whether it is frozen cannot be read: %w", verb, errdefs.ErrUnavailable)
	}
	return nil
}

// manager sets the control groups that the runtime has made.
func (s state) manager() (cgroups.Manager, error) {
	c := *s.Config.Cgroups
	c.Resources = &cgroups.Resources{SkipDevices: true}
	m, err := manager.NewWithPaths(&c, s.CgroupPaths)
	if err != nil {
		return nil, fmt.Errorf("open the control groups: %w", err)
	}
	return m, nil
}

// resources is what is set, but for huge pages, devices and the files of version 2,
// which are set when they are named.
func (r *Runtime) resources(s state) (*cgroups.Resources, error) {
	now := &cgroups.Resources{}
	if s.Config.Cgroups.Resources != nil {
		now = s.Config.Cgroups.Resources
	}
	data, err := r.lastSet()
	if err != nil {
		return nil, err
	}
	if data != nil {
		now = &cgroups.Resources{}
		if err := json.Unmarshal(data, now); err != nil {
			return nil, fmt.Errorf("read the limits of the last update: %w: %w", errdefs.ErrInternal, err)
		}
	}
	now.Devices, now.SkipDevices, now.HugetlbLimit, now.Unified, now.Freezer = nil, true, nil, nil, cgroups.Undefined
	now.MemoryCheckBeforeUpdate = false
	if now.PidsLimit != nil && *now.PidsLimit == 0 {
		now.PidsLimit = nil // older versions of runc write that for none
	}
	return now, nil
}

// lastSet is what the last update has kept, nil if there was none, or if the runtime
// has written its state since: then somebody had it make an update.
func (r *Runtime) lastSet() ([]byte, error) {
	path := filepath.Join(r.bundle, lastSet)
	kept, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if written, err := os.Stat(filepath.Join(r.dir(), stateName)); err == nil && written.ModTime().After(kept.ModTime()) {
		return nil, nil
	}
	return os.ReadFile(path)
}

func (r *Runtime) keep(set *cgroups.Resources) error {
	data, err := json.Marshal(set)
	if err != nil {
		return err
	}
	path := filepath.Join(r.bundle, lastSet)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// changed is r with the values of l.
func changed(r *cgroups.Resources, l *specs.LinuxResources) *cgroups.Resources {
	n := *r
	if l.Memory != nil {
		changeMemory(&n, l.Memory)
	}
	if l.CPU != nil {
		changeCPU(&n, l.CPU)
	}
	if l.Pids != nil && l.Pids.Limit != nil {
		n.PidsLimit = l.Pids.Limit
	}
	if l.BlockIO != nil {
		changeBlockIO(&n, l.BlockIO)
	}
	for _, h := range l.HugepageLimits {
		n.HugetlbLimit = append(n.HugetlbLimit, &cgroups.HugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
	}
	if len(l.Unified) > 0 {
		n.Unified = l.Unified
	}
	return &n
}

func changeMemory(n *cgroups.Resources, m *specs.LinuxMemory) {
	set(&n.Memory, m.Limit)
	set(&n.MemoryReservation, m.Reservation)
	set(&n.MemorySwap, m.Swap)
	if n.Memory == -1 && m.Swap == nil {
		n.MemorySwap = 0 // there is none without a limit of memory
	}
	if m.Swappiness != nil {
		n.MemorySwappiness = m.Swappiness
	}
	n.MemoryCheckBeforeUpdate = m.CheckBeforeUpdate != nil && *m.CheckBeforeUpdate
}

func changeCPU(n *cgroups.Resources, c *specs.LinuxCPU) {
	set(&n.CpuPeriod, c.Period)
	set(&n.CpuQuota, c.Quota)
	set(&n.CpuRtPeriod, c.RealtimePeriod)
	set(&n.CpuRtRuntime, c.RealtimeRuntime)
	if c.Burst != nil {
		n.CpuBurst = c.Burst
	}
	if c.Idle != nil {
		n.CPUIdle = c.Idle
	}
	before := n.CpuShares
	set(&n.CpuShares, c.Shares)
	if n.CPUIdle != nil && *n.CPUIdle != 0 {
		n.CpuShares = 0 // an idle group takes none
	}
	if n.CpuShares != before { // else it stays as the runtime has worked it out
		n.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(n.CpuShares)
	}
	if c.Cpus != "" {
		n.CpusetCpus = c.Cpus
	}
	if c.Mems != "" {
		n.CpusetMems = c.Mems
	}
}

func changeBlockIO(n *cgroups.Resources, b *specs.LinuxBlockIO) {
	set(&n.BlkioWeight, b.Weight)
	set(&n.BlkioLeafWeight, b.LeafWeight)
	for _, w := range b.WeightDevice {
		var weight, leaf uint16
		set(&weight, w.Weight)
		set(&leaf, w.LeafWeight)
		others := slices.DeleteFunc(slices.Clone(n.BlkioWeightDevice), func(o *cgroups.WeightDevice) bool {
			return o.Major == w.Major && o.Minor == w.Minor
		})
		n.BlkioWeightDevice = append(others, cgroups.NewWeightDevice(w.Major, w.Minor, weight, leaf))
	}
	for _, t := range []struct {
		to   *[]*cgroups.ThrottleDevice
		from []specs.LinuxThrottleDevice
	}{
		{&n.BlkioThrottleReadBpsDevice, b.ThrottleReadBpsDevice},
		{&n.BlkioThrottleWriteBpsDevice, b.ThrottleWriteBpsDevice},
		{&n.BlkioThrottleReadIOPSDevice, b.ThrottleReadIOPSDevice},
		{&n.BlkioThrottleWriteIOPSDevice, b.ThrottleWriteIOPSDevice},
	} {
		for _, d := range t.from {
			others := slices.DeleteFunc(slices.Clone(*t.to), func(o *cgroups.ThrottleDevice) bool {
				return o.Major == d.Major && o.Minor == d.Minor
			})
			*t.to = append(others, cgroups.NewThrottleDevice(d.Major, d.Minor, d.Rate))
		}
	}
}

// set leaves what there is no value for.
func set[T comparable](to, value *T) {
	var none T
	if value != nil && *value != none {
		*to = *value
	}
}
