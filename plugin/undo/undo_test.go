package undo_test

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/gantry-cri/gantry/plugin/undo"
)

func TestUnwindRunsAllLastFirst(t *testing.T) {
	var s undo.Stack
	var order []string
	boom := errors.New("boom")
	for _, name := range []string{"netns", "network", "instance"} {
		s.Push(name, func(ctx context.Context) error {
			order = append(order, name)
			if ctx.Err() != nil {
				t.Errorf("%s: the caller's cancellation reached the release", name)
			}
			if _, bounded := ctx.Deadline(); !bounded {
				t.Errorf("%s: no deadline", name)
			}
			if name == "network" {
				return boom
			}
			return nil
		})
	}
	if got, want := s.Names(), []string{"netns", "network", "instance"}; !reflect.DeepEqual(got, want) {
		t.Errorf("names %v, want %v", got, want)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := s.Unwind(ctx)
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), "release network") {
		t.Errorf("error %v, want it to name the network", err)
	}
	if want := []string{"instance", "network", "netns"}; !reflect.DeepEqual(order, want) {
		t.Errorf("order %v, want %v", order, want)
	}
	if err := s.Unwind(ctx); err != nil || len(order) != 3 {
		t.Errorf("second unwind: %v, releases run %d", err, len(order))
	}
}
