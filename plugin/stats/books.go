package stats

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// books are the kernel's files about cgroups: the mount points of the
// hierarchies, "" for what the machine does not have.
type books struct {
	v2                   bool
	cpu, memory, unified string
	// list is a hierarchy that every container is in, to list processes.
	list string
	// swap says that the use of swap is accounted.
	swap bool
}

func newBooks(c facts.Cgroup) books {
	b := books{v2: c.V2(), memory: c.Controllers["memory"], unified: c.Unified, swap: c.SwapAccounting}
	if b.v2 {
		// CPU time is accounted whether or not the controller is there.
		b.cpu, b.list = c.Unified, c.Unified
		return b
	}
	b.cpu, b.list = c.Controllers["cpuacct"], c.Controllers["memory"]
	if b.list == "" {
		b.list = b.cpu
	}
	return b
}

// reading is what the books say about one cgroup at one moment.
type reading struct {
	cpu                                     count // in ns
	usage, inactive, rss, faults, majors    count
	memoryLimit                             count // unknown if there is none
	swap, swapLimit                         count
	cpuPressure, memoryPressure, ioPressure *cri.PsiStats
}

// read returns what the books say about group. fs.ErrNotExist says that there
// is no such cgroup.
func (b books) read(group string) (reading, error) {
	r := &reader{buf: make([]byte, 0, 4096)}
	var out reading
	cpu, memory := below(b.cpu, group), below(b.memory, group)
	if b.v2 {
		r.keys(cpu, "cpu.stat", want{"usage_usec", &out.cpu})
		out.cpu = out.cpu.times(1000)
		b.readMemory(r, memory, &out)
	} else {
		out.cpu = r.number(cpu, "cpuacct.usage")
		b.readMemoryV1(r, memory, &out)
	}
	unified := below(b.unified, group)
	out.cpuPressure = r.pressure(unified, "cpu.pressure")
	out.memoryPressure = r.pressure(unified, "memory.pressure")
	out.ioPressure = r.pressure(unified, "io.pressure")
	if r.err != nil {
		return reading{}, fmt.Errorf("read cgroup %s: %w", group, r.err)
	}
	return out, nil
}

func (b books) readMemory(r *reader, dir string, out *reading) {
	out.usage = r.number(dir, "memory.current")
	out.memoryLimit = r.number(dir, "memory.max").limit()
	r.keys(dir, "memory.stat",
		want{"anon", &out.rss}, want{"inactive_file", &out.inactive},
		want{"pgfault", &out.faults}, want{"pgmajfault", &out.majors})
	if b.swap {
		out.swap = r.optional(dir, "memory.swap.current")
		out.swapLimit = r.optional(dir, "memory.swap.max").limit()
	}
}

// readMemoryV1 reads the totals, which include cgroups that the container made
// within its own, as version 2 always does.
func (b books) readMemoryV1(r *reader, dir string, out *reading) {
	out.usage = r.number(dir, "memory.usage_in_bytes")
	out.memoryLimit = r.number(dir, "memory.limit_in_bytes").limit()
	r.keys(dir, "memory.stat",
		want{"total_rss", &out.rss}, want{"total_inactive_file", &out.inactive},
		want{"total_pgfault", &out.faults}, want{"total_pgmajfault", &out.majors},
		want{"total_swap", &out.swap})
	if b.swap {
		// The limit is one of memory and swap together.
		both := r.optional(dir, "memory.memsw.limit_in_bytes").limit()
		out.swapLimit = both.minus(out.memoryLimit)
	} else {
		out.swap = count{}
	}
}

// oomKills is how many processes of the group the kernel killed for want of
// memory, whoever's limit it was. Version 2 counts what was killed in groups
// beneath it too, version 1 does not.
func (b books) oomKills(group string) (uint64, error) {
	dir := below(b.memory, group)
	if b.v2 {
		return readKills(dir, memoryEvents)
	}
	return oomKillsV1(dir)
}

func oomKillsV1(dir string) (uint64, error) { return readKills(dir, "memory.oom_control") }

func readKills(dir, file string) (uint64, error) {
	r := &reader{}
	var kills count
	r.keys(dir, file, want{"oom_kill", &kills})
	if r.err != nil {
		return 0, fmt.Errorf("read cgroup %s: %w", dir, r.err)
	}
	return kills.n, nil
}

// memoryEvents is the file of version 2 that counts what want of memory did.
const memoryEvents = "memory.events"

// oomed reports whether want of memory made the kernel kill a process of the
// group, or choose one to be killed: that is counted before, and the group may
// be gone before the other count is told.
func (b books) oomed(group string) (bool, error) {
	r := &reader{}
	var chosen, killed count
	r.keys(below(b.memory, group), memoryEvents, want{"oom", &chosen}, want{"oom_kill", &killed})
	if r.err != nil {
		return false, fmt.Errorf("read cgroup %s: %w", group, r.err)
	}
	return chosen.n > 0 || killed.n > 0, nil
}

// processes counts the processes in the group and in those beneath it.
func (b books) processes(group string) (count, error) {
	dir := below(b.list, group)
	if dir == "" {
		return count{}, nil
	}
	total, found := 0, false
	r := &reader{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err != nil || !d.IsDir() {
			return err
		}
		data, err := r.file(path, "cgroup.procs")
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case errors.Is(err, unix.EOPNOTSUPP):
			return nil // a threaded group: its processes are in its parent's list
		}
		total, found = total+bytes.Count(data, []byte("\n")), true
		return err
	})
	if err != nil {
		return count{}, fmt.Errorf("count processes of cgroup %s: %w", group, err)
	}
	return count{uint64(total), found}, nil
}

// below is the directory of group in a hierarchy, "" if that is not mounted.
func below(mount, group string) string {
	if mount == "" {
		return ""
	}
	return filepath.Join(mount, group)
}
