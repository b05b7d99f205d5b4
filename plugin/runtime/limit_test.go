package runtime

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestBounded(t *testing.T) {
	flat := errors.New("flattened")
	hang := func(ctx context.Context) error { <-ctx.Done(); return flat }
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		fn   func(context.Context) error
		want func(error) bool
	}{
		"limit":         {t.Context(), hang, errdefs.IsDeadlineExceeded},
		"caller left":   {ended, hang, errdefs.IsCanceled},
		"class is kept": {ended, func(context.Context) error { return errdefs.ErrNotFound }, errdefs.IsNotFound},
		"error":         {t.Context(), func(context.Context) error { return flat }, func(err error) bool { return errors.Is(err, flat) }},
	} {
		t.Run(name, func(t *testing.T) {
			err := bounded(c.ctx, "start task", "x", 10*time.Millisecond, c.fn)
			if !c.want(err) || !strings.HasPrefix(err.Error(), "start task x: ") {
				t.Errorf("%v", err)
			}
		})
	}
	if err := bounded(t.Context(), "start task", "x", time.Minute, func(context.Context) error { return nil }); err != nil {
		t.Error(err)
	}
}
