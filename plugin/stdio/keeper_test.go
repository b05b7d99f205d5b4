package stdio

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gantry-cri/gantry/plugin/stdio/keeper"
)

// startKeeper runs the real one. A directory is named after the test, which may
// be too long for a socket below it.
func startKeeper(t *testing.T) *keeper.Keeper {
	t.Helper()
	dir, err := os.MkdirTemp("", "keeper")
	if err != nil {
		t.Fatal(err)
	}
	k := keeper.New(filepath.Join(dir, keeper.Program), filepath.Join(dir, keeper.Socket))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return k
}

// TestExitWhileAway is the one moment at which output would be lost without a
// keeper: the container ends while no daemon runs.
func TestExitWhileAway(t *testing.T) {
	baseline(t)
	cfg := config(t)
	cfg.Keeper = startKeeper(t)
	o, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := startShim(t, o.Paths())
	s.say("before\n")
	if err := o.Detach(); err != nil {
		t.Fatal(err)
	}
	s.say("while away\n")
	s.exit()
	if o, err = Reattach(context.Background(), cfg); err != nil {
		t.Fatal(err)
	}
	wait(t, o)
	if got := logged(t, cfg.LogPath); got != "stdout before\nstdout while away\n" {
		t.Fatalf("got %q", got)
	}
	if err := o.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// TestKeeperIsAway: without a keeper everything else works.
func TestKeeperIsAway(t *testing.T) {
	baseline(t)
	cfg := config(t)
	k := keeper.New("/proc/no/such/program", filepath.Join(t.TempDir(), strings.Repeat("x", 200)))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.Run(ctx)
	}()
	cfg.Keeper = k
	o, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := startShim(t, o.Paths())
	s.say("line\n")
	s.exit()
	wait(t, o)
	if got := logged(t, cfg.LogPath); got != "stdout line\n" {
		t.Fatalf("got %q", got)
	}
	cancel()
	<-done
	if err := o.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(cfg.Dir); !os.IsNotExist(err) {
		t.Fatalf("directory is left: %v", err)
	}
}
