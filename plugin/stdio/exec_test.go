package stdio

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestExecSync(t *testing.T) {
	baseline(t)
	out, errs := NewCapture(1000), NewCapture(1000)
	cfg := ExecConfig{Dir: filepath.Join(t.TempDir(), "exec"), Streams: Streams{Stdout: out, Stderr: errs}}
	e, err := NewExec(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := startShim(t, e.Paths())
	s.say(strings.Repeat("o", 300_000)) // more than is kept, and than a FIFO holds
	s.stderr.WriteString("problem")
	s.exit()
	if err := e.Wait(context.Background(), Drain{Quiet: time.Minute}); err != nil {
		t.Fatal(err)
	}
	if kept, dropped := out.Result(); len(kept) != 1000 || dropped != 299_000 {
		t.Errorf("kept %d, dropped %d", len(kept), dropped)
	}
	if kept, dropped := errs.Result(); string(kept) != "problem" || dropped != 0 {
		t.Errorf("kept %q, dropped %d", kept, dropped)
	}
	for range 2 {
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(cfg.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("directory is left: %v", err)
	}
}

// TestExecDrain has somebody hold the streams after the exit.
func TestExecDrain(t *testing.T) {
	for name, tc := range map[string]struct {
		chatty bool
		drain  Drain
	}{
		"quiet child":          {drain: Drain{Quiet: 20 * time.Millisecond}},
		"quiet child, limit":   {drain: Drain{Most: 20 * time.Millisecond}},
		"chatty child, limit":  {chatty: true, drain: Drain{Quiet: time.Minute, Most: 50 * time.Millisecond}},
		"chatty child, no end": {chatty: true, drain: Drain{Quiet: time.Minute, Most: time.Millisecond}},
	} {
		t.Run(name, func(t *testing.T) {
			baseline(t)
			out := NewCapture(CaptureLimit)
			e, err := NewExec(context.Background(), ExecConfig{Dir: filepath.Join(t.TempDir(), "exec"), Streams: Streams{Stdout: out}})
			if err != nil {
				t.Fatal(err)
			}
			s := startShim(t, e.Paths())
			s.say("done\n")
			talk := make(chan struct{})
			go func() {
				defer close(talk)
				for tc.chatty {
					if _, err := s.stdout.WriteString("noise\n"); err != nil {
						return
					}
				}
			}()
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			if err := e.Wait(ctx, tc.drain); err != nil {
				t.Fatal(err)
			}
			if kept, _ := out.Result(); !bytes.HasPrefix(kept, []byte("done\n")) {
				t.Fatalf("got %.20q", kept)
			}
			if err := e.Close(); err != nil {
				t.Fatal(err)
			}
			s.exit()
			<-talk
		})
	}
}

func TestExecStdinHalfClose(t *testing.T) {
	baseline(t)
	started := make(chan *shim, 1)
	var out output
	e, err := NewExec(context.Background(), ExecConfig{
		Dir:        filepath.Join(t.TempDir(), "exec"),
		Streams:    Streams{Stdin: strings.NewReader("archive"), Stdout: &out},
		CloseStdin: func(ctx context.Context) error { return (<-started).closeIO(ctx) },
	})
	if err != nil {
		t.Fatal(err)
	}
	s := startShim(t, e.Paths())
	started <- s
	readAvailable(t, s.stdin, "archive")
	expectEOF(t, s.stdin)
	s.say("unpacked")
	s.exit()
	if err := e.Wait(context.Background(), Drain{}); err != nil {
		t.Fatal(err)
	}
	if out.String() != "unpacked" {
		t.Fatalf("got %q", out.String())
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestExecThatNeverStarts(t *testing.T) {
	baseline(t)
	dir := filepath.Join(t.TempDir(), "exec")
	for range 300 {
		in, inEnd := io.Pipe()
		e, err := NewExec(context.Background(), ExecConfig{
			Dir: dir, Terminal: true,
			Streams:    Streams{Stdin: in, Stdout: io.Discard},
			CloseStdin: func(context.Context) error { return errdefs.ErrNotFound },
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		inEnd.Close()
	}
}

// TestExecEndsWithItsContext: a shim that is late opens its ends all the same,
// for only then it can be told to kill the process.
func TestExecEndsWithItsContext(t *testing.T) {
	baseline(t)
	ctx, cancel := context.WithCancelCause(context.Background())
	e, err := NewExec(ctx, ExecConfig{Dir: filepath.Join(t.TempDir(), "exec"), Streams: Streams{Stdout: io.Discard}})
	if err != nil {
		t.Fatal(err)
	}
	cancel(errors.New("client left"))
	if err := e.Wait(ctx, Drain{}); err == nil {
		t.Fatal("no error")
	}
	for _, path := range []string{e.Paths().Stdout, e.Paths().Stderr} {
		f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatalf("nobody reads any more: %v", err)
		}
		f.Close()
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// TestExecClientGone must not block the process.
func TestExecClientGone(t *testing.T) {
	e, err := NewExec(context.Background(), ExecConfig{Dir: filepath.Join(t.TempDir(), "exec"), Streams: Streams{Stdout: brokenWriter{}}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	s := startShim(t, e.Paths())
	s.say(strings.Repeat("x", 1<<20))
	s.exit()
	if err := e.Wait(context.Background(), Drain{}); !errors.Is(err, io.ErrClosedPipe) {
		t.Fatalf("got %v", err)
	}
}

func TestExecNeedsAWayToCloseStdin(t *testing.T) {
	_, err := NewExec(context.Background(), ExecConfig{Dir: t.TempDir(), Streams: Streams{Stdin: strings.NewReader("")}})
	if !errdefs.IsInvalidArgument(err) {
		t.Fatalf("got %v", err)
	}
}

func TestShares(t *testing.T) {
	for _, c := range []struct{ a, b, wantA, wantB int }{
		{0, 0, 0, 0}, {60, 40, 60, 40}, {100, 0, 100, 0}, {101, 0, 100, 0}, {0, 200, 0, 100},
		{90, 20, 80, 20}, {20, 90, 20, 80}, {50, 90, 50, 50}, {200, 200, 50, 50}, {51, 51, 50, 50},
	} {
		if a, b := shares(c.a, c.b, 100); a != c.wantA || b != c.wantB {
			t.Errorf("%d and %d get %d and %d, want %d and %d", c.a, c.b, a, b, c.wantA, c.wantB)
		}
	}
	long := make([]byte, CaptureLimit)
	if out, errs := Fit(long, long); len(out) != len(errs) || len(out)+len(errs) > 16<<20-1024 || len(out) < 8_000_000 {
		t.Errorf("two long streams: %d and %d", len(out), len(errs))
	}
	if out, errs := Fit(long, long[:1]); len(out) != CaptureLimit || len(errs) != 1 {
		t.Errorf("one long stream: %d and %d", len(out), len(errs))
	}
}

// stalling takes nothing for a while, once, as a client does whose network
// stalls.
type stalling struct {
	pause time.Duration
	n     int
}

func (s *stalling) Write(p []byte) (int, error) {
	<-time.After(s.pause)
	s.pause = 0
	s.n += len(p)
	return len(p), nil
}

// TestExecSlowClient: quiet is counted while the client takes what comes.
func TestExecSlowClient(t *testing.T) {
	const step, steps = 32 << 10, 12 // more than a FIFO holds
	out := &stalling{pause: 300 * time.Millisecond}
	e, err := NewExec(context.Background(), ExecConfig{Dir: filepath.Join(t.TempDir(), "exec"), Streams: Streams{Stdout: out}})
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := os.OpenFile(e.Paths().Stdout, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := os.OpenFile(e.Paths().Stderr, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer stderr.Close()
		defer stdout.Close()
		for range steps {
			if _, err := stdout.Write(make([]byte, step)); err != nil {
				return
			}
		}
	}()
	if err := e.Wait(context.Background(), Drain{Quiet: 100 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if out.n != step*steps {
		t.Errorf("the client got %d of %d bytes", out.n, step*steps)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestExecOfARemovedContainer: it does not bring the container's directory back.
func TestExecOfARemovedContainer(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "container")
	if _, err := NewExec(t.Context(), ExecConfig{Dir: filepath.Join(dir, "exec")}); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("%s: %v", dir, err)
	}
}

// TestLeftExec: what an exec of an earlier daemon writes is taken until it ends.
func TestLeftExec(t *testing.T) {
	for _, terminal := range []bool{false, true} {
		t.Run(fmt.Sprint("terminal ", terminal), func(t *testing.T) {
			baseline(t)
			dir := filepath.Join(t.TempDir(), "exec")
			if err := makeFifos(dir, true, terminal); err != nil {
				t.Fatal(err)
			}
			e, err := LeftExec(t.Context(), dir)
			if err != nil {
				t.Fatal(err)
			}
			s := startShim(t, paths(dir, true, terminal)) // which waits for a reader
			s.say(strings.Repeat("more than a pipe holds\n", 50_000))
			s.exit()
			if err := e.Close(); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(dir); !os.IsNotExist(err) {
				t.Errorf("%s: %v", dir, err)
			}
			if _, err := LeftExec(t.Context(), dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("of nothing: %v", err)
			}
		})
	}
}
