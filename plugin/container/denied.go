package container

import (
	"context"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/log"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
	"github.com/gantry-cri/gantry/plugin/record"
)

const (
	// deniedPause is how long after the last denied call a container that is to
	// end for it ends, so that what it tries is known as a whole; deniedLimit is
	// the longest since the first.
	deniedPause = 5 * time.Second
	deniedLimit = 30 * time.Second
	// maxDenied bounds the calls that a record names.
	maxDenied = 64
)

// denials is what memory knows of the calls that a container's filter denied.
type denials struct {
	// noted are in the record.
	noted map[string]bool
	// last is when the latest came of those for which the container is to end;
	// zero while none did.
	last time.Time
}

// Denied takes note of a system call that the filter of a container denied, and
// has the container end for it if it is to. It returns when that is on disk.
func (s *Service) Denied(ctx context.Context, id string, call facts.DeniedCall) error {
	l, ok := s.lookup(id)
	if !ok {
		return nil // it has ended
	}
	if call.Stop {
		defer s.endSoon(id, l)
	}
	if !s.isNews(l, call) {
		return nil
	}
	log.G(ctx).WithField("container", id).WithField("syscall", call.Name).Warn("the seccomp filter of a container denied a system call")
	if err := s.noteDenied(ctx, id, call); err != nil {
		return err
	}
	s.setNoted(l, call)
	return nil
}

// isNews reports whether a call changes the record.
func (s *Service) isNews(l *live, call facts.DeniedCall) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return call.Ends || !l.denied.noted[call.Name] && len(l.denied.noted) < maxDenied
}

func (s *Service) setNoted(l *live, call facts.DeniedCall) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.denied.noted == nil {
		l.denied.noted = map[string]bool{}
	}
	l.denied.noted[call.Name] = true
}

func (s *Service) noteDenied(ctx context.Context, id string, call facts.DeniedCall) error {
	_, err := s.Store.Update(ctx, id, func(r *record.Container) error {
		r.Condemned = r.Condemned || call.Stop || call.Ends
		if !slices.Contains(r.Denied, call.Name) && len(r.Denied) < maxDenied {
			r.Denied = append(slices.Clone(r.Denied), call.Name)
		}
		return nil
	})
	return ignoreNotFound(err)
}

// endSoon ends the container when it has made no denied call for some time.
func (s *Service) endSoon(id string, l *live) {
	s.mu.Lock()
	begun := !l.denied.last.IsZero()
	l.denied.last = time.Now()
	s.mu.Unlock()
	if begun {
		return
	}
	s.Background.Go("end container "+id+" for a denied system call", func(ctx context.Context) {
		if s.awaitPause(ctx, l) {
			lifecycle.Retry(ctx, "end a container for a denied system call", retries, func() error { return s.Stop(ctx, id, 0) })
		}
	})
}

// awaitPause waits until no denied call has come for the pause, and reports
// whether the container still is to be ended then.
func (s *Service) awaitPause(ctx context.Context, l *live) bool {
	limit := time.Now().Add(deniedLimit)
	for {
		s.mu.Lock()
		at := l.denied.last.Add(deniedPause)
		s.mu.Unlock()
		if at.After(limit) {
			at = limit
		}
		wait := time.Until(at)
		if wait <= 0 {
			return true
		}
		select {
		case <-time.After(wait):
		case <-l.exited:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// byNotifier reports whether it was for a denied call that a container ended
// with this code, for which the runtime knows no better reason.
func byNotifier(c record.Container, code uint32, reason string) bool {
	return c.Condemned && reason == record.ReasonError && code == 128+uint32(syscall.SIGKILL)
}

// deniedMessage is what a status says of denied calls, "" without any.
func deniedMessage(c record.Container) string {
	if len(c.Denied) == 0 {
		return ""
	}
	return "system calls that the seccomp profile denies: " + strings.Join(c.Denied, ", ")
}
