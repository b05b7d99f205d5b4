package sandboxertest_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/sandboxer/sandboxertest"
)

func TestFake(t *testing.T) {
	sandboxertest.Suite(t, func(t *testing.T) sandboxertest.Subject {
		fake := sandboxertest.New()
		return sandboxertest.Subject{
			Sandboxer: fake, Context: t.Context(),
			Record: func(_ *testing.T, id string) record.Sandbox { return record.Sandbox{ID: id} },
			Exit:   func(_ *testing.T, sb record.Sandbox) { fake.Exit(sb.ID, 3) },
			Lose:   func(_ *testing.T, sb record.Sandbox) { fake.Lose(sb.ID) },
			Remains: func(t *testing.T, id string) {
				if slices.Contains(fake.Held(), id) {
					t.Errorf("sandbox %s is not released", id)
				}
			},
		}
	})
}

func TestFaults(t *testing.T) {
	boom := errors.New("boom")
	for name, c := range map[string]struct {
		fault sandboxertest.Fault
		held  []string
	}{
		"before": {sandboxertest.Fault{Op: "start", Err: boom}, nil},
		"after":  {sandboxertest.Fault{Op: "start", ID: "b", After: true, Err: boom}, []string{"a", "b"}},
		"second": {sandboxertest.Fault{Op: "start", Nth: 2, Err: boom}, []string{"a"}},
	} {
		t.Run(name, func(t *testing.T) {
			fake := sandboxertest.New()
			fake.Inject(c.fault)
			_, one := fake.Start(t.Context(), record.Sandbox{ID: "a"})
			_, two := fake.Start(t.Context(), record.Sandbox{ID: "b"})
			if err := errors.Join(one, two); !errors.Is(err, boom) || !slices.Equal(fake.Held(), c.held) {
				t.Errorf("%v, held %v; want boom and %v", err, fake.Held(), c.held)
			}
		})
	}
}
