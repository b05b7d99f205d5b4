package stdio

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
)

func startKeeper(t *testing.T) *RemoteKeeper {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keeper.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ServeKeeper(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return NewRemoteKeeper(path)
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

func TestKeeperLetsGo(t *testing.T) {
	baseline(t)
	k := startKeeper(t)
	for range 50 {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second replaces the first
			if err := k.Keep(context.Background(), "a", []*os.File{w}); err != nil {
				t.Fatal(err)
			}
		}
		w.Close()
		for range 2 {
			if err := k.Drop(context.Background(), "a"); err != nil {
				t.Fatal(err)
			}
		}
		expectEOF(t, r)
		r.Close()
	}
}

func TestKeeperIsAway(t *testing.T) {
	cfg := config(t)
	cfg.Keeper = NewRemoteKeeper(filepath.Join(t.TempDir(), "none"))
	o, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(cfg.Dir); !os.IsNotExist(err) {
		t.Fatalf("directory is left: %v", err)
	}
}

func FuzzKeeperRequest(f *testing.F) {
	f.Add([]byte(`{"keep":"a"}`))
	f.Add([]byte(`{"keep":"a","drop":"b"}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeKeeperRequest(b)
		if err == nil && (r.Keep == "") == (r.Drop == "") {
			t.Fatalf("accepted %+v", r)
		}
	})
}
