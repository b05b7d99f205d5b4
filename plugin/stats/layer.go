package stats

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

const (
	// patience is how long a request waits for a writable layer to be
	// measured, which can mean to walk through millions of files.
	patience = time.Second
	// leisure is how many times longer than it takes to measure a layer it is
	// left alone: at most a tenth of the time is spent on it.
	leisure = 9
)

var errSlow = errors.New("measuring the writable layer takes long")

// layer is a writable layer as it was measured. The zero value is one that
// never was.
type layer struct {
	bytes, inodes uint64
	at            time.Time
	// until is how long the measurement is good enough.
	until time.Time
}

// layer returns the use of the container's writable layer: measured within the
// period, or now, or, while that takes long, what the last measurement was. It
// is nil when there is no measurement. Only the end of ctx is an error.
func (s *Stats) layer(ctx context.Context, c record.Container) (*cri.FilesystemUsage, error) {
	l := s.lookup(c.ID).layer
	if s.now().After(l.until) {
		wait, cancel := context.WithTimeoutCause(ctx, s.patience, errSlow)
		defer cancel()
		measured, err := s.walks.Do(wait, c.ID, func(ctx context.Context) (layer, error) { return s.measure(ctx, c), nil })
		switch {
		case err == nil:
			l = measured
		case !errors.Is(err, errSlow):
			return nil, fmt.Errorf("measure writable layer: %w", err)
		}
	}
	if l.at.IsZero() {
		return nil, nil
	}
	return &cri.FilesystemUsage{
		Timestamp:  l.at.UnixNano(),
		FsId:       &cri.FilesystemIdentifier{Mountpoint: s.usage.Mountpoint(c.Handler.Snapshotter)},
		UsedBytes:  known(l.bytes).message(),
		InodesUsed: known(l.inodes).message(),
	}, nil
}

// measure asks the snapshotter. What it cannot tell stays as it was; to ask
// again is put off all the same.
func (s *Stats) measure(ctx context.Context, c record.Container) layer {
	begin := s.now()
	l := s.lookup(c.ID).layer
	if !begin.After(l.until) {
		return l // measured between our look and our turn
	}
	bytes, inodes, err := s.usage.Usage(ctx, c.Handler.Snapshotter, c.ID)
	end := s.now()
	switch {
	case err == nil:
		l = layer{bytes: bytes, inodes: inodes, at: end}
	case errdefs.IsNotFound(err):
		l = layer{} // not yet made, or being removed
	default:
		log.G(ctx).WithField("container", c.ID).WithError(err).Warn("measure writable layer")
	}
	l.until = end.Add(max(s.period, leisure*end.Sub(begin)))
	s.update(c.ID, func(e *entry) { e.layer = l })
	return l
}
