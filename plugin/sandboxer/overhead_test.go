package sandboxer_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/sandboxer"
)

// called notes what it is asked, in order; what fails is failing.
type called struct {
	calls   []string
	failing string
}

func (c *called) note(what string) error {
	c.calls = append(c.calls, what)
	if what == c.failing {
		return errors.New(what)
	}
	return nil
}

func (c *called) Make(path string) error   { return c.note("make " + path) }
func (c *called) Vacate(path string) error { return c.note("vacate " + path) }
func (c *called) Kill(_ context.Context, path string) (int, error) {
	return 0, c.note("kill " + path)
}
func (c *called) Remove(path string) error { return c.note("remove " + path) }

type started struct {
	sandboxer.Sandboxer
	c *called
}

func (s started) Start(context.Context, record.Sandbox) (record.Instance, error) {
	return record.Instance{}, s.c.note("start")
}
func (s started) Shutdown(context.Context, record.Sandbox) error { return s.c.note("shutdown") }

// TestCharged: the group of a shim is there before it and goes after it, and no other
// pod's is touched.
func TestCharged(t *testing.T) {
	for name, c := range map[string]struct {
		group, failing string
		want           []string
	}{
		"none":            {"", "", []string{"start", "shutdown"}},
		"charged":         {"/a", "", []string{"make /a", "start", "shutdown", "vacate /a", "remove /a"}},
		"no group":        {"/a", "make /a", []string{"make /a", "shutdown", "vacate /a", "remove /a"}},
		"shim is left":    {"/a", "shutdown", []string{"make /a", "start", "shutdown"}},
		"cannot be moved": {"/a", "vacate /a", []string{"make /a", "start", "shutdown", "vacate /a", "remove /a"}},
		"process is left": {"/a", "remove /a", []string{"make /a", "start", "shutdown", "vacate /a", "remove /a", "kill /a", "remove /a"}},
	} {
		seen := &called{failing: c.failing}
		s := sandboxer.Charged{Sandboxer: started{c: seen}, Group: func(record.Sandbox) string { return c.group }, Groups: seen, Patience: 10 * time.Millisecond}
		_, err := s.Start(t.Context(), record.Sandbox{})
		if err = errors.Join(err, s.Shutdown(t.Context(), record.Sandbox{})); (err != nil) != (c.failing != "" && c.failing != "vacate /a") {
			t.Errorf("%s: %v", name, err)
		}
		if !slices.Equal(seen.calls, c.want) {
			t.Errorf("%s: %q, want %q", name, seen.calls, c.want)
		}
	}
}
