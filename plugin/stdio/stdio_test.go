package stdio

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	ctrruntime "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/errdefs"
)

// shim opens FIFOs the way the runc shim does: outputs for writing, then for
// reading, stdin for writing and for reading.
type shim struct {
	t              *testing.T
	stdout, stderr *os.File
	others         []*os.File
	stdin          *os.File // what the process reads
	stdinWrite     *os.File // what CloseIO closes
}

func startShim(t *testing.T, p ctrruntime.IO) *shim {
	t.Helper()
	s := &shim{t: t}
	open := func(path string, flags int) *os.File {
		f, err := os.OpenFile(path, flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	s.stdout = open(p.Stdout, os.O_WRONLY)
	s.others = append(s.others, open(p.Stdout, os.O_RDONLY))
	if p.Stderr != "" {
		s.stderr = open(p.Stderr, os.O_WRONLY)
		s.others = append(s.others, open(p.Stderr, os.O_RDONLY))
	}
	if p.Stdin != "" {
		s.stdin = open(p.Stdin, os.O_RDONLY|unix.O_NONBLOCK)
		s.stdinWrite = open(p.Stdin, os.O_WRONLY)
	}
	t.Cleanup(s.exit)
	return s
}

func (s *shim) say(text string) {
	s.t.Helper()
	if _, err := s.stdout.WriteString(text); err != nil {
		s.t.Fatal(err)
	}
}

// closeIO is the callback for Config.CloseStdin.
func (s *shim) closeIO(context.Context) error { return s.stdinWrite.Close() }

// exit is what the shim does when the output of the process has ended.
func (s *shim) exit() {
	for _, f := range append([]*os.File{s.stdout, s.stderr, s.stdin, s.stdinWrite}, s.others...) {
		if f != nil {
			f.Close()
		}
	}
}

func config(t *testing.T) Config {
	t.Helper()
	return Config{Dir: filepath.Join(t.TempDir(), "state", "io"), LogPath: filepath.Join(t.TempDir(), "pod", "0.log")}
}

func create(t *testing.T, cfg Config) *IO {
	t.Helper()
	o, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := o.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return o
}

func wait(t *testing.T, o *IO) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := o.Wait(ctx, 10*time.Second); err != nil {
		t.Fatal(err)
	}
}

// logged returns the bytes of the log without what the format adds.
func logged(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for line := range strings.Lines(string(raw)) {
		parts := strings.SplitN(line, " ", 4)
		if len(parts) != 4 {
			t.Fatalf("not a record: %q", line)
		}
		fmt.Fprintf(&b, "%s %s", parts[1], parts[3])
	}
	return b.String()
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// baseline fails the test when it ends with more goroutines or files than it
// began with.
func baseline(t *testing.T) {
	t.Helper()
	fds := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	g, f := runtime.NumGoroutine(), fds()
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		deadline := time.Now().Add(10 * time.Second)
		for runtime.NumGoroutine() > g || fds() > f {
			if time.Now().After(deadline) {
				b := make([]byte, 1<<20)
				t.Fatalf("goroutines %d → %d, files %d → %d\n%s", g, runtime.NumGoroutine(), f, fds(), b[:runtime.Stack(b, true)])
			}
			time.Sleep(time.Millisecond)
		}
	})
}

// output is a client's end that can be looked at while it is written.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

func TestLife(t *testing.T) {
	baseline(t)
	cfg := config(t)
	o, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(cfg.Dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Fatalf("directory: %v, %v", st, err)
	}
	if p := o.Paths(); p.Stdin != "" || p.Terminal || p.Stderr == "" {
		t.Fatalf("paths are %+v", p)
	}
	s := startShim(t, o.Paths())
	s.say("hello\nlast")
	s.stderr.WriteString("oops\n")
	s.exit()
	wait(t, o)
	got := logged(t, cfg.LogPath)
	for _, want := range []string{"stdout hello\n", "stdout last\n", "stderr oops\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("log lacks %q: %q", want, got)
		}
	}
	for range 2 {
		if err := o.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(cfg.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("directory is left: %v", err)
	}
}

func TestShimNeverComes(t *testing.T) {
	baseline(t)
	o, err := New(context.Background(), config(t))
	if err != nil {
		t.Fatal(err)
	}
	wait(t, o)
	if err := o.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestChildHoldsTheStreams(t *testing.T) {
	o := create(t, config(t))
	s := startShim(t, o.Paths())
	s.say("parent\n")
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := o.Wait(ctx, 20*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if got := logged(t, o.cfg.LogPath); got != "stdout parent\n" {
		t.Fatalf("got %q", got)
	}
}

func TestReattach(t *testing.T) {
	baseline(t)
	cfg := config(t)
	cfg.Terminal = true
	o, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := startShim(t, o.Paths())
	s.say("before, ")
	if err := o.Detach(); err != nil {
		t.Fatal(err)
	}
	s.say("meanwhile, ")
	if o, err = Reattach(context.Background(), cfg); err != nil {
		t.Fatal(err)
	}
	s.say("after\n")
	s.exit()
	wait(t, o)
	if got := logged(t, cfg.LogPath); got != "stdout before, meanwhile, after\n" {
		t.Fatalf("got %q", got)
	}
	if err := o.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := Reattach(context.Background(), cfg); !errdefs.IsNotFound(err) {
		t.Fatalf("reattach of nothing: %v", err)
	}
}

func TestRotation(t *testing.T) {
	o := create(t, config(t))
	s := startShim(t, o.Paths())
	s.say("one\n")
	waitFor(t, "the first line", func() bool { return logged(t, o.cfg.LogPath) != "" })
	if err := os.Rename(o.cfg.LogPath, o.cfg.LogPath+".1"); err != nil {
		t.Fatal(err)
	}
	if err := o.ReopenLog(context.Background(), o.cfg.LogPath); err != nil {
		t.Fatal(err)
	}
	s.say("two\n")
	s.exit()
	wait(t, o)
	if a, b := logged(t, o.cfg.LogPath+".1"), logged(t, o.cfg.LogPath); a != "stdout one\n" || b != "stdout two\n" {
		t.Fatalf("got %q and %q", a, b)
	}
}

func TestAttachFanOut(t *testing.T) {
	for _, logs := range []bool{true, false} {
		t.Run(fmt.Sprintf("log %v", logs), func(t *testing.T) {
			baseline(t)
			cfg := config(t)
			cfg.AttachBuffer, cfg.AttachStall = 256<<10, time.Millisecond
			if !logs {
				cfg.LogPath = ""
			}
			o, err := New(context.Background(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			s := startShim(t, o.Paths())
			var outs, errs [3]output
			results := make(chan error, 3)
			attach := func(i int) {
				t.Helper()
				n := o.hub.watching.Load()
				go func() {
					results <- o.Attach(context.Background(), Streams{Stdout: &outs[i], Stderr: &errs[i]})
				}()
				waitFor(t, "the client", func() bool { return o.hub.watching.Load() > n })
			}
			attach(0)
			attach(1)
			stalled, stalledEnd := io.Pipe() // nobody reads
			slow := make(chan error, 1)
			go func() { slow <- o.Attach(context.Background(), Streams{Stdout: stalledEnd}) }()
			waitFor(t, "the slow client", func() bool { return o.hub.watching.Load() == 3 })

			s.say("early\n")
			waitFor(t, "early", func() bool { return outs[0].String() == "early\n" && outs[1].String() == "early\n" })
			attach(2)
			sent := 0
			for line := strings.Repeat("x", 999) + "\n"; sent < 1<<20; sent += len(line) {
				s.say(line)
				// Clients that read are within their buffer at any speed.
				if sent%(64<<10) < len(line) {
					waitFor(t, "the clients", func() bool {
						return min(len(outs[0].String()), len(outs[1].String()), len(outs[2].String())) >= sent-32<<10
					})
				}
			}
			s.stderr.WriteString("bye\n")
			select {
			case err := <-slow:
				if !errdefs.IsResourceExhausted(err) {
					t.Fatalf("slow client: %v", err)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("the slow client was not dropped")
			}
			stalled.Close()
			s.exit()
			wait(t, o)
			for range 3 {
				if err := <-results; err != nil {
					t.Error(err)
				}
			}
			for i := range outs {
				want := sent
				if i < 2 {
					want += len("early\n")
				}
				if got := len(outs[i].String()); got != want {
					t.Errorf("client %d got %d bytes, want %d", i, got, want)
				}
				if errs[i].String() != "bye\n" {
					t.Errorf("client %d got stderr %q", i, errs[i].String())
				}
			}
			if err := o.Attach(context.Background(), Streams{Stdout: io.Discard}); err != nil {
				t.Errorf("attach after the end: %v", err)
			}
			if err := o.Close(context.Background()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A client that is slow and reads is not dropped: it gets what finds room, in
// order, and hears in the end what it did not get.
func TestAttachSlow(t *testing.T) {
	baseline(t)
	cfg := config(t)
	cfg.AttachBuffer = 16 << 10
	o, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := startShim(t, o.Paths())
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- o.Attach(context.Background(), Streams{Stdout: w})
		w.Close()
	}()
	waitFor(t, "the client", func() bool { return o.hub.watching.Load() == 1 })
	sent := 0
	for i := range 2000 {
		line := fmt.Sprintf("%04d %s\n", i, strings.Repeat("x", 500))
		s.say(line)
		sent += len(line)
		if i == 19 { // what comes as one piece afterwards may be too big for the rest
			waitFor(t, "what finds room", func() bool { return behind(o) >= sent })
		}
	}
	s.exit()
	wait(t, o) // nothing waits for the client
	var got []byte
	for b := make([]byte, 1000); ; {
		n, err := r.Read(b)
		got = append(got, b[:n]...)
		if err != nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	err = <-ended
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), fmt.Sprintf(" %d bytes", sent-len(got))) {
		t.Errorf("%d of %d bytes came: %v", len(got), sent, err)
	}
	if len(got) < 8<<10 || !strings.HasPrefix(string(got), "0000 xxx") {
		t.Errorf("the client got %d bytes, %.10q", len(got), got)
	}
	if err := o.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// behind is how much waits for the clients.
func behind(o *IO) (n int) {
	o.hub.mu.Lock()
	defer o.hub.mu.Unlock()
	for c := range o.hub.clients {
		c.mu.Lock()
		n += c.size
		c.mu.Unlock()
	}
	return n
}

// However slow it is, a client whose backlog has room gets everything.
func TestAttachLate(t *testing.T) {
	baseline(t)
	cfg := config(t)
	cfg.AttachStall = time.Millisecond
	o, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := startShim(t, o.Paths())
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- o.Attach(context.Background(), Streams{Stdout: w})
		w.Close()
	}()
	waitFor(t, "the client", func() bool { return o.hub.watching.Load() == 1 })
	const lines = 4000
	for range lines {
		s.say(strings.Repeat("y", 999) + "\n")
	}
	s.exit()
	wait(t, o)
	got, err := io.ReadAll(r)
	if err != nil || len(got) != lines*1000 {
		t.Errorf("%d of %d bytes came, %v", len(got), lines*1000, err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := o.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestAttachEndsWithItsContext(t *testing.T) {
	baseline(t)
	cfg := config(t)
	cfg.Stdin = true
	o := func() *IO {
		o, err := New(context.Background(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		return o
	}()
	s := startShim(t, o.Paths())
	for range 200 {
		ctx, cancel := context.WithCancelCause(context.Background())
		in, inEnd := io.Pipe()
		done := make(chan error, 1)
		go func() { done <- o.Attach(ctx, Streams{Stdin: in, Stdout: io.Discard}) }()
		cause := errors.New("client left")
		cancel(cause)
		if err := <-done; !errors.Is(err, cause) {
			t.Fatalf("got %v", err)
		}
		inEnd.Close() // the connection
	}
	s.exit()
	if err := o.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func readAvailable(t *testing.T, f *os.File, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if err := f.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(f, b); err != nil || string(b) != want {
		t.Fatalf("read %q, %v, want %q", b, err, want)
	}
}

func expectEOF(t *testing.T, f *os.File) {
	t.Helper()
	if err := f.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := f.Read(make([]byte, 10)); err != io.EOF {
		t.Fatalf("read %d, %v, want EOF", n, err)
	}
}

func TestStdinStaysOpen(t *testing.T) {
	cfg := config(t)
	cfg.Stdin = true
	o := create(t, cfg)
	s := startShim(t, o.Paths())
	for _, text := range []string{"first", "second"} {
		if err := o.Attach(context.Background(), Streams{Stdin: strings.NewReader(text)}); err != nil {
			t.Fatal(err)
		}
		readAvailable(t, s.stdin, text)
	}
	if err := s.stdin.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.stdin.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("stdin ended: %v", err)
	}
}

func TestStdinOnce(t *testing.T) {
	var calls atomic.Int32
	var s *shim
	cfg := config(t)
	cfg.Stdin, cfg.StdinOnce = true, true
	cfg.CloseStdin = func(ctx context.Context) error { calls.Add(1); return s.closeIO(ctx) }
	o := create(t, cfg)
	s = startShim(t, o.Paths())
	var out output
	done := make(chan error, 1)
	go func() {
		done <- o.Attach(context.Background(), Streams{Stdin: strings.NewReader("input"), Stdout: &out})
	}()
	readAvailable(t, s.stdin, "input")
	expectEOF(t, s.stdin)
	s.say("answer") // output goes on after the end of input
	waitFor(t, "the answer", func() bool { return out.String() == "answer" })
	s.exit()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := o.Attach(context.Background(), Streams{Stdin: strings.NewReader("more")}); err != nil {
		t.Fatal(err)
	}
	if n := calls.Load(); n != 1 {
		t.Fatalf("stdin was closed %d times", n)
	}
}

func TestStdinOnceOutlivesTheDaemon(t *testing.T) {
	var s *shim
	cfg := config(t)
	cfg.Stdin, cfg.StdinOnce = true, true
	cfg.CloseStdin = func(ctx context.Context) error { return s.closeIO(ctx) }
	o, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	s = startShim(t, o.Paths())
	in, inEnd := io.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go o.feed(ctx, in) // an attach that never comes to its end
	inEnd.Write([]byte("in"))
	readAvailable(t, s.stdin, "in")
	if err := o.Detach(); err != nil {
		t.Fatal(err)
	}
	if o, err = Reattach(context.Background(), cfg); err != nil {
		t.Fatal(err)
	}
	expectEOF(t, s.stdin)
	inEnd.Close()
	if err := o.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// TestStalledStdin has a process that reads nothing.
func TestStalledStdin(t *testing.T) {
	baseline(t)
	cfg := config(t)
	cfg.Stdin = true
	o, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := startShim(t, o.Paths())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- o.Attach(ctx, Streams{Stdin: bytes.NewReader(make([]byte, 4<<20)), Stdout: io.Discard})
	}()
	waitFor(t, "a full pipe", func() bool {
		n, err := unix.IoctlGetInt(int(s.others[0].Fd()), unix.TIOCINQ)
		m, err2 := unix.IoctlGetInt(int(s.stdinWrite.Fd()), unix.TIOCINQ)
		return err == nil && err2 == nil && n == 0 && m >= 64<<10
	})
	s.say("still alive\n") // the other streams do not care
	waitFor(t, "the log", func() bool { return logged(t, cfg.LogPath) != "" })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	s.exit()
	if err := o.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	for name, cfg := range map[string]Config{
		"relative directory":  {Dir: "io"},
		"the root":            {Dir: "/"},
		"once without closer": {Dir: "/x/io", Stdin: true, StdinOnce: true},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := New(context.Background(), cfg); !errdefs.IsInvalidArgument(err) {
				t.Errorf("New: %v", err)
			}
			if _, err := Reattach(context.Background(), cfg); !errdefs.IsInvalidArgument(err) {
				t.Errorf("Reattach: %v", err)
			}
		})
	}
	bad := config(t)
	bad.LogPath = "relative"
	if _, err := New(context.Background(), bad); !errdefs.IsInvalidArgument(err) {
		t.Errorf("log path: %v", err)
	}
	if _, err := os.Stat(bad.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed New left its directory: %v", err)
	}
}
