package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// leisure is how many times longer than a measurement takes the next one is put
// off: at most a tenth of the time goes into walks over files.
const leisure = 9

// usage knows how much disk the snapshotters use. It is measured in one
// goroutine, only while somebody asks, and every answer is the last
// measurement: no request waits for a walk over files, save the first.
type usage struct {
	snapshotters map[string]Snapshotter
	names        []string // the default first
	period       time.Duration
	wanted       chan struct{}
	first        chan struct{} // closed after the first measurement

	mu   sync.Mutex
	last measurement
}

// measurement is what was found at a time. It is good enough until another.
type measurement struct {
	at, until         time.Time
	images, container []*cri.FilesystemUsage
}

func newUsage(sns map[string]Snapshotter, def string, period time.Duration) *usage {
	names := []string{def}
	for n := range sns {
		if n != def {
			names = append(names, n)
		}
	}
	slices.Sort(names[1:])
	return &usage{snapshotters: sns, names: names, period: period, wanted: make(chan struct{}, 1), first: make(chan struct{})}
}

// FSInfo returns the usage of the image filesystems, the default
// snapshotter's first, and of the containers' writable layers in them. The
// figures of an image filesystem cover everything under its mount point,
// writable layers included; they are as old as their timestamp says, and a
// measurement starts in the background when that is more than the configured
// period, and long ago for how long the last one took. The messages are shared:
// do not change them.
func (s *Service) FSInfo(ctx context.Context) (images, containers []*cri.FilesystemUsage, err error) {
	m := s.usage.current()
	if time.Now().After(m.until) {
		select {
		case s.usage.wanted <- struct{}{}:
		default: // one is due already
		}
	}
	if m.at.IsZero() {
		select {
		case <-s.usage.first:
			m = s.usage.current()
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("measure image filesystem: %w", context.Cause(ctx))
		}
	}
	return m.images, m.container, nil
}

func (u *usage) current() measurement {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.last
}

func (u *usage) run(ctx context.Context) {
	committed := map[string]map[string]snapshots.Usage{}
	for {
		select {
		case <-u.wanted:
		case <-ctx.Done():
			return
		}
		last := u.current()
		begun := time.Now()
		if !begun.After(last.until) {
			continue // asked for while the last one was under way
		}
		m, err := u.measureAll(ctx, committed)
		if err != nil {
			return
		}
		m.at = time.Now()
		m.until = m.at.Add(max(u.period, leisure*m.at.Sub(begun)))
		u.mu.Lock()
		u.last = m
		u.mu.Unlock()
		if last.at.IsZero() {
			close(u.first)
		}
	}
}

// measureAll sums up every snapshotter that is in use, and the default one. Only
// the end of ctx is an error: what cannot be measured is left out.
func (u *usage) measureAll(ctx context.Context, committed map[string]map[string]snapshots.Usage) (m measurement, _ error) {
	for i, name := range u.names {
		total, active, n, err := u.measure(ctx, name, committed)
		if ctx.Err() != nil {
			return m, context.Cause(ctx)
		}
		if err != nil {
			logFailure(ctx, "measure snapshotter "+name, err)
		}
		if n == 0 && i > 0 {
			continue // in nobody's use
		}
		root := u.snapshotters[name].Root
		m.images = append(m.images, report(root, total))
		m.container = append(m.container, report(root, active))
	}
	return m, nil
}

// measure sums up one snapshotter. The usage of a committed snapshot never
// changes and is remembered; that of an active one is a walk over its files.
func (u *usage) measure(ctx context.Context, name string, seen map[string]map[string]snapshots.Usage) (total, active snapshots.Usage, n int, err error) {
	sn := u.snapshotters[name]
	old := seen[name]
	committed := map[string]snapshots.Usage{}
	var infos []snapshots.Info
	err = sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		infos = append(infos, i)
		return nil
	})
	for _, i := range infos {
		use, known := old[i.Name]
		if !known || i.Kind != snapshots.KindCommitted {
			var failed error
			use, failed = sn.Usage(ctx, i.Name)
			if errdefs.IsNotFound(failed) {
				continue // gone meanwhile
			}
			if failed != nil {
				err = errors.Join(err, fmt.Errorf("snapshot %s: %w", i.Name, failed))
				continue
			}
		}
		total.Add(use)
		switch i.Kind {
		case snapshots.KindCommitted:
			committed[i.Name] = use
		case snapshots.KindActive:
			active.Add(use)
		}
	}
	seen[name] = committed
	return total, active, len(infos), err
}

func report(root string, u snapshots.Usage) *cri.FilesystemUsage {
	return &cri.FilesystemUsage{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &cri.FilesystemIdentifier{Mountpoint: root},
		UsedBytes:  &cri.UInt64Value{Value: uint64(max(u.Size, 0))},
		InodesUsed: &cri.UInt64Value{Value: uint64(max(u.Inodes, 0))},
	}
}
