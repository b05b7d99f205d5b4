// Package undo keeps what a workflow has acquired, so that a failure gives all
// of it back.
//
// Push the release, then act: an effect may have happened even when it reports
// failure, so a release must accept that there is nothing to release. Unwind
// runs every release, the last pushed first, each with its own deadline and on
// a context that the caller's cancellation does not reach; it never stops at a
// failing one, never retries, and joins the errors.
package undo

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// StepTimeout bounds one release.
const StepTimeout = time.Minute

// Release gives back one resource. It must succeed when the resource is absent.
type Release func(context.Context) error

// Stack is a list of releases. It is safe for concurrent use, so that steps
// which run in parallel can push.
type Stack struct {
	mu    sync.Mutex
	steps []step
}

type step struct {
	name    string
	release Release
}

// Push adds a release under the name of the resource.
func (s *Stack) Push(name string, r Release) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps = append(s.steps, step{name, r})
}

// Names lists what has been pushed, the first pushed first.
func (s *Stack) Names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := make([]string, len(s.steps))
	for i, st := range s.steps {
		names[i] = st.name
	}
	return names
}

// Unwind releases everything, last pushed first, and empties the stack. The
// values of ctx are kept, its cancellation and deadline are not.
func (s *Stack) Unwind(ctx context.Context) error {
	s.mu.Lock()
	steps := s.steps
	s.steps = nil
	s.mu.Unlock()
	ctx = context.WithoutCancel(ctx)
	var errs []error
	for i := len(steps) - 1; i >= 0; i-- {
		if err := run(ctx, steps[i]); err != nil {
			errs = append(errs, fmt.Errorf("release %s: %w", steps[i].name, err))
		}
	}
	return errors.Join(errs...)
}

func run(ctx context.Context, st step) error {
	ctx, cancel := context.WithTimeout(ctx, StepTimeout)
	defer cancel()
	return st.release(ctx)
}
