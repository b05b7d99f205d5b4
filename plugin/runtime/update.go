package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/config"
)

// Change is what is to become of a running container.
type Change struct {
	Before, After *specs.Spec
	// Annotations go to the runtime with the resources.
	Annotations map[string]string
}

// Change makes the running container what After says where Before says
// otherwise: resources through the runtime, and what no runtime takes in an
// update, huge page limits and the OOM score, in the kernel; so is a quota of CPU
// time lifted where the runtime does not do it. When it fails some of it may be done.
func (t *Task) Change(ctx context.Context, c Change) error {
	before, after := c.Before, c.After
	path := after.Linux.CgroupsPath
	if err := t.setResources(ctx, path, c); err != nil {
		return err
	}
	if err := t.tasks.setHugepages(path, before.Linux.Resources, after.Linux.Resources); err != nil {
		return fmt.Errorf("update task %s: %w", t.ID(), err)
	}
	if score, changed := newScore(before.Process, after.Process); changed {
		if err := setOOMScore(t.tasks.cgs, path, score, everyone); err != nil {
			return fmt.Errorf("update task %s: %w", t.ID(), err)
		}
	}
	return nil
}

// setResources has the runtime set what After says. A quota that is only in Before has
// to be lifted by name: runc sets what it had last otherwise. crun cannot on cgroup v1,
// and does not remember it.
func (t *Task) setResources(ctx context.Context, path string, c Change) error {
	after := c.After.Linux.Resources
	if quota(c.Before.Linux.Resources) <= 0 || quota(after) != 0 {
		return t.Update(ctx, after, c.Annotations)
	}
	lifted := *after
	lifted.CPU = &specs.LinuxCPU{}
	if after.CPU != nil {
		*lifted.CPU = *after.CPU
	}
	lifted.CPU.Quota = new(int64(-1))
	refused := t.Update(ctx, &lifted, c.Annotations)
	if refused == nil || ctx.Err() != nil {
		return refused
	}
	if err := t.Update(ctx, after, c.Annotations); err != nil {
		return refused // it is not for the quota
	}
	for _, file := range []struct{ name, value string }{{"cpu.cfs_quota_us", "-1"}, {"cpu.max", "max"}} {
		if _, err := t.tasks.cgs.Set(path, file.name, file.value); err != nil {
			return fmt.Errorf("update task %s: lift the CPU quota: %w", t.ID(), err)
		}
	}
	return nil
}

// quota is 0 where r says nothing of it.
func quota(r *specs.LinuxResources) int64 {
	if r == nil || r.CPU == nil || r.CPU.Quota == nil {
		return 0
	}
	return *r.CPU.Quota
}

// newScore is after's OOM score, and whether before has another.
func newScore(before, after *specs.Process) (int, bool) {
	score := func(p *specs.Process) int {
		if p == nil || p.OOMScoreAdj == nil {
			return 0
		}
		return *p.OOMScoreAdj
	}
	return score(after), score(before) != score(after)
}

// hugepages are limits that the runtime is not told of.
type hugepages struct {
	path   string
	limits *specs.LinuxResources
}

// takeHugepages takes the huge page limits out of the specification where runc is to set
// limits later: with each update it sets those of the creation, which the kernel refuses
// while more pages are in use.
func takeHugepages(req *CreateRequest) (hugepages, error) {
	// A restored container has no group before its start.
	if req.Checkpoint != "" || !config.RuncUpdates(req.Handler.Runtime) || !bytes.Contains(req.Spec, []byte(`"hugepageLimits"`)) {
		return hugepages{}, nil
	}
	var s specs.Spec
	if err := json.Unmarshal(req.Spec, &s); err != nil {
		return hugepages{}, fmt.Errorf("read specification: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if s.Linux == nil || s.Linux.Resources == nil || len(s.Linux.Resources.HugepageLimits) == 0 {
		return hugepages{}, nil
	}
	taken := hugepages{s.Linux.CgroupsPath, &specs.LinuxResources{HugepageLimits: s.Linux.Resources.HugepageLimits}}
	s.Linux.Resources.HugepageLimits = nil
	var err error
	if req.Spec, err = json.Marshal(s); err != nil {
		return hugepages{}, fmt.Errorf("write specification: %w", err)
	}
	return taken, nil
}

// setHugepages writes the limits, of pages in use and of reserved ones, also
// those that did not change: containers of before takeHugepages are among them.
// One that is only in before has no old value to go back to, and is lifted.
func (t *Tasks) setHugepages(path string, before, after *specs.LinuxResources) error {
	old, now := pageLimits(before), pageLimits(after)
	for size := range old {
		if _, ok := now[size]; !ok {
			now[size] = noPageLimit
		}
	}
	for size, limit := range now {
		value := strconv.FormatUint(limit, 10)
		v2 := value
		if limit == noPageLimit {
			value, v2 = "-1", "max"
		}
		some := false
		for _, file := range []struct{ name, value string }{
			{".limit_in_bytes", value}, {".rsvd.limit_in_bytes", value}, {".max", v2}, {".rsvd.max", v2},
		} {
			done, err := t.cgs.Set(path, "hugetlb."+size+file.name, file.value)
			if err != nil {
				return fmt.Errorf("set huge page limit: %w", err)
			}
			some = some || done
		}
		if !some {
			return fmt.Errorf("set huge page limit: cgroup %s has none for pages of %s: %w", path, size, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

const noPageLimit = ^uint64(0)

func pageLimits(r *specs.LinuxResources) map[string]uint64 {
	limits := map[string]uint64{}
	if r == nil {
		return limits
	}
	for _, l := range r.HugepageLimits {
		limits[l.Pagesize] = l.Limit
	}
	return limits
}

// scoreRounds is how often new processes are looked for. A process that is made
// meanwhile has the score of its parent, so few rounds find any.
const scoreRounds = 100

// chooser reports whether a process is meant.
type chooser func(pid int) (bool, error)

func everyone(int) (bool, error) { return true, nil }

// setOOMScore gives the chosen processes of the control group the score.
func setOOMScore(cgs Cgroups, path string, score int, chosen chooser) error {
	done := map[int]bool{}
	for range scoreRounds {
		pids, err := cgs.Procs(path)
		if err != nil {
			return err
		}
		pids = slices.DeleteFunc(pids, func(pid int) bool { return done[pid] })
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			done[pid] = true
		}
		if err := (scoring{cgs, path, score, chosen}).give(pids); err != nil {
			return fmt.Errorf("set OOM score %d: %w", score, err)
		}
	}
	return fmt.Errorf("set OOM score %d: new processes come without end: %w", score, errdefs.ErrUnavailable)
}

type scoring struct {
	cgs    Cgroups
	path   string
	score  int
	chosen chooser
}

// give writes the score of those of pids that still are members and are chosen:
// a pid read from a list may by now be somebody else's, so all are opened and
// looked up again.
func (s scoring) give(pids []int) error {
	files := map[int]*os.File{}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, pid := range pids {
		f, err := os.OpenFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), os.O_WRONLY, 0)
		if gone(err) {
			continue
		}
		if err != nil {
			return err
		}
		files[pid] = f
	}
	members, err := s.cgs.Procs(s.path)
	if err != nil {
		return err
	}
	for pid, f := range files {
		if !slices.Contains(members, pid) {
			continue
		}
		chosen, err := s.chosen(pid)
		if err != nil {
			return err
		}
		if !chosen {
			continue
		}
		if _, err := f.WriteString(strconv.Itoa(s.score)); err != nil && !gone(err) {
			return err
		}
	}
	return nil
}

// gone reports whether err says that there is no such process any more.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
}
