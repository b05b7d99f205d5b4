package networktest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

func TestFake(t *testing.T) {
	Suite(t, func(*testing.T) World {
		f := NewFake()
		return World{
			Network: f,
			Held:    f.Held,
			Reopen:  func() Network { return f },
			Break:   func(fault Fault) { breakFake(f, fault) },
		}
	})
}

func breakFake(f *Fake, fault Fault) {
	f.SetReady(nil)
	f.Hook(nil)
	switch fault {
	case NoFault:
	case NoConf:
		f.SetReady(fmt.Errorf("no network configuration: %w", errdefs.ErrUnavailable))
	case AddFails:
		f.FailAfter(3, errInjected) // of create, save, add
	case DelFails:
		f.Hook(func(_ context.Context, effect, _ string) error {
			if effect == EffectDel {
				return errInjected
			}
			return nil
		})
	}
}

var errInjected = errors.New("injected")

// TestFakeFaults fails every effect of a pod's life, before and after it
// happens, and detaches: nothing may be left, and the fault must be seen.
func TestFakeFaults(t *testing.T) {
	const effects = 5
	for n := 1; n <= effects; n++ {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("effect %d after %t", n, after), func(t *testing.T) {
				f := NewFake()
				f.inject(n, after, errInjected)
				err := lifeOf(t, f, "a1")
				if !errors.Is(err, errInjected) {
					t.Errorf("life: %v, want the injected fault", err)
				}
				if err := f.Detach(t.Context(), Pod("a1")); err != nil {
					t.Errorf("detach: %v", err)
				}
				if held := f.Held(); len(held) > 0 {
					t.Errorf("held: %v", held)
				}
			})
		}
	}
}

func lifeOf(t *testing.T, f *Fake, id string) error {
	ns, err := f.CreateNS(t.Context(), id)
	if err != nil {
		return err
	}
	if _, err := f.Attach(t.Context(), Pod(id), ns); err != nil {
		return err
	}
	return f.Detach(t.Context(), Pod(id))
}

func TestFakeEffects(t *testing.T) {
	f := NewFake()
	var seen []string
	f.Hook(func(_ context.Context, effect, id string) error {
		seen = append(seen, effect+" of "+id)
		return nil
	})
	if err := lifeOf(t, f, "a1"); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"create netns of a1", "save attachment of a1", "add of a1", "del of a1", "remove netns of a1",
	}
	if !slices.Equal(seen, want) || f.Effects() != len(want) {
		t.Errorf("%d effects %v, want %v", f.Effects(), seen, want)
	}
}
