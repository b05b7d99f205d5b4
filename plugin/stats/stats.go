// Package stats reads what the kernel's books say about containers and pods:
// CPU time, memory, swap, pressure, network counters, processes killed for want
// of memory, and how much the writable layers hold.
//
// It changes nothing on the machine and asks no shim: a container costs a few
// reads of small files when somebody asks. The one thing that cannot be read
// afterwards, that a process was killed for want of memory, is looked out for
// while a container runs (oom.go). What it
// remembers between two requests, the last CPU readings and the size of a
// writable layer, which is dear to measure, is forgotten when nobody has asked
// for two minutes. Where controllers are on version 1 hierarchies and a version
// 2 tree is mounted beside them, pressure is read from that tree.
//
// What the kernel does not tell is absent in the answer and not zero. A cgroup
// that is gone is a container that just ended, not an error. Start at Container,
// then books.go for the files.
package stats

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/flight"
	"github.com/gantry-cri/gantry/plugin/record"
)

// Usage measures writable layers.
type Usage interface {
	// Usage is what the snapshot takes, in bytes and inodes. NotFound says
	// that there is no such snapshot.
	Usage(ctx context.Context, snapshotter, key string) (bytes, inodes uint64, err error)
	// Mountpoint is a directory on the filesystem that holds the snapshots.
	Mountpoint(snapshotter string) string
}

// Stats measures containers and pods.
type Stats struct {
	books    books
	usage    Usage
	period   time.Duration
	patience time.Duration
	now      func() time.Time
	walks    flight.Group[string, layer]
	kills    *kills
	alarms   alarms

	mu      sync.Mutex
	entries map[string]*entry
	swept   time.Time
}

// entry is what is remembered of a container or a pod, by ID.
type entry struct {
	seen time.Time
	// group is the cgroup's path, "" until it was looked up: to find it in a
	// specification takes longer than to read the books.
	group string
	samples
	layer layer
}

// New returns the statistics of a machine. A writable layer is measured at most
// once in a period.
func New(host facts.Host, usage Usage, period time.Duration) *Stats {
	s := &Stats{
		books: newBooks(host.Cgroup), usage: usage, period: period,
		patience: patience, now: time.Now, entries: map[string]*entry{}, kills: newKills(host.Cgroup.V2()),
		alarms: alarms{follows: map[string]*alarm{}},
	}
	// A layer that takes longer than a client waits would never be measured
	// if each of them took the measurement with it when it leaves.
	s.walks.Linger = flight.Forever
	return s
}

// Wait blocks until no writable layer is being measured.
func (s *Stats) Wait() { s.walks.Wait() }

// Container measures a container. One that was not started used nothing; of one
// that ended there is no book left, and the answer has none of its numbers.
// NotFound says that the record is not one of a container, or that its
// specification names no cgroup.
func (s *Stats) Container(ctx context.Context, c record.Container) (*cri.ContainerStats, error) {
	out := &cri.ContainerStats{Attributes: &cri.ContainerAttributes{
		Id: c.ID, Metadata: c.Config.GetMetadata(), Labels: c.Config.GetLabels(), Annotations: c.Config.GetAnnotations(),
	}}
	switch c.Phase {
	case record.ContainerCreating, record.ContainerCreated:
		s.unused(out)
	case record.ContainerRunning:
		if err := s.running(c, out); err != nil {
			return nil, fmt.Errorf("measure container: %w", err)
		}
	case record.ContainerExited:
	default:
		return nil, fmt.Errorf("measure container %q: there is none: %w", c.ID, errdefs.ErrNotFound)
	}
	var err error
	if out.WritableLayer, err = s.layer(ctx, c); err != nil {
		return nil, err
	}
	return out, nil
}

// WorkingSet is the memory that the container uses and that the kernel could
// not just drop. It is not known of a container whose cgroup is gone.
func (s *Stats) WorkingSet(c record.Container) (bytes uint64, known bool, err error) {
	group, err := s.group(c.ID, c.Spec)
	if err != nil {
		return 0, false, err
	}
	r, err := s.books.read(group)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	working := r.usage.minus(r.inactive)
	return working.n, working.ok, err
}

// unused fills in the numbers of a container that never ran.
func (s *Stats) unused(out *cri.ContainerStats) {
	zero := known(0)
	r := reading{cpu: zero, usage: zero, inactive: zero, rss: zero, faults: zero, majors: zero}
	if s.books.swap {
		r.swap = zero
	}
	r.fill(out, s.now(), zero)
}

func (s *Stats) running(c record.Container, out *cri.ContainerStats) error {
	group, err := s.group(c.ID, c.Spec)
	if err != nil {
		return err
	}
	r, err := s.books.read(group)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	now := s.now()
	r.fill(out, now, s.rate(c.ID, now, r.cpu, c.StartedAt))
	return nil
}

// fill sets the numbers of a container.
func (r reading) fill(out *cri.ContainerStats, at time.Time, rate count) {
	out.Cpu, out.Memory = r.cpuUsage(at, rate), r.memoryUsage(at)
	out.Swap, out.Io = r.swapUsage(at), r.ioUsage(at)
}

func (r reading) cpuUsage(at time.Time, rate count) *cri.CpuUsage {
	if !r.cpu.ok {
		return nil
	}
	return &cri.CpuUsage{
		Timestamp: at.UnixNano(), UsageCoreNanoSeconds: r.cpu.message(), UsageNanoCores: rate.message(), Psi: r.cpuPressure,
	}
}

// memoryUsage computes what the kubelet goes by: the working set is what is in
// use less the file pages that the kernel would drop first.
func (r reading) memoryUsage(at time.Time) *cri.MemoryUsage {
	if !r.usage.ok {
		return nil
	}
	working := r.usage.minus(r.inactive)
	return &cri.MemoryUsage{
		Timestamp: at.UnixNano(), UsageBytes: r.usage.message(), WorkingSetBytes: working.message(),
		AvailableBytes: r.memoryLimit.minus(working).message(), RssBytes: r.rss.message(),
		PageFaults: r.faults.message(), MajorPageFaults: r.majors.message(), Psi: r.memoryPressure,
	}
}

func (r reading) swapUsage(at time.Time) *cri.SwapUsage {
	if !r.swap.ok {
		return nil
	}
	return &cri.SwapUsage{
		Timestamp: at.UnixNano(), SwapUsageBytes: r.swap.message(), SwapAvailableBytes: r.swapLimit.minus(r.swap).message(),
	}
}

func (r reading) ioUsage(at time.Time) *cri.IoUsage {
	if r.ioPressure == nil {
		return nil
	}
	return &cri.IoUsage{Timestamp: at.UnixNano(), Psi: r.ioPressure}
}

// rate enters a reading of the CPU time and returns the use per second. started
// is when it was zero, if that is known.
func (s *Stats) rate(id string, now time.Time, cpu count, started time.Time) (r count) {
	if !cpu.ok {
		return count{}
	}
	s.update(id, func(e *entry) {
		if e.last.at.IsZero() && !started.IsZero() {
			e.last = sample{at: started}
		}
		r = e.rate(sample{at: now, cpu: cpu.n})
	})
	return r
}

// group returns the cgroup of the container or sandbox with that ID.
func (s *Stats) group(id string, spec []byte) (string, error) {
	if g := s.lookup(id).group; g != "" {
		return g, nil
	}
	g, err := groupOf(spec)
	if err != nil {
		return "", err
	}
	s.update(id, func(e *entry) { e.group = g })
	return g, nil
}

// lookup returns what is remembered of id.
func (s *Stats) lookup(id string) entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.entries[id]; ok {
		return *e
	}
	return entry{}
}

// update changes what is remembered of id, and forgets what nobody asked for.
func (s *Stats) update(id string, change func(*entry)) {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.swept) > retention {
		s.swept = now
		for id, e := range s.entries {
			if now.Sub(e.seen) > retention && now.After(e.layer.until) {
				delete(s.entries, id)
			}
		}
	}
	e, ok := s.entries[id]
	if !ok {
		e = &entry{}
		s.entries[id] = e
	}
	e.seen = now
	change(e)
}
