package logs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/crilog"
)

const ample = 30 * time.Second

// rig is a container's output, a daemon that comes and goes, and a supervisor.
type rig struct {
	t         *testing.T
	out       Output
	path      string
	shim      *os.File
	connected atomic.Bool
	changed   chan struct{}
	stop      func()
}

func newRig(t *testing.T) *rig {
	dir := t.TempDir()
	r := &rig{t: t, path: filepath.Join(t.TempDir(), "0.log"), changed: make(chan struct{}, 1)}
	r.out = Output{Stdout: filepath.Join(dir, "stdout")}
	if err := unix.Mkfifo(r.out.Stdout, 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if r.shim, err = os.OpenFile(r.out.Stdout, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	r.connected.Store(true)
	w := &Writers{Outputs: func() []Output { return []Output{r.out} }, Connected: r.connected.Load, Changed: r.changed}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { w.Run(ctx) })
	r.stop = func() { cancel(); running.Wait() }
	t.Cleanup(func() { r.stop(); r.shim.Close() })
	return r
}

// connect says whether a daemon is connected.
func (r *rig) connect(is bool) {
	r.connected.Store(is)
	r.changed <- struct{}{}
}

// daemon has the log until the returned function is called.
func (r *rig) daemon() (end func()) {
	r.t.Helper()
	l, err := crilog.Resume(filepath.Join(filepath.Dir(r.out.Stdout), crilog.DirName), r.path, crilog.Options{})
	if err != nil {
		r.t.Fatal(err)
	}
	// Until then nothing says where the log goes.
	if err := l.Flush(context.Background()); err != nil {
		r.t.Fatal(err)
	}
	f, err := crilog.OpenFifo(r.out.Stdout)
	if err != nil {
		r.t.Fatal(err)
	}
	var copies sync.WaitGroup
	copies.Go(func() { _ = l.Copy(crilog.Stdout, f, nil) }) // it ends by the close
	return func() {
		_ = f.Close()
		if err := l.Close(); err != nil {
			r.t.Error(err)
		}
		copies.Wait()
	}
}

// lines are the numbers in the log, which are to be 1, 2, 3 and so on.
func (r *rig) lines() (int, error) {
	data, err := os.ReadFile(r.path)
	if err != nil {
		return 0, err
	}
	n := 0
	for line := range strings.Lines(string(data)) {
		if !strings.HasSuffix(line, "\n") {
			break // it is being written
		}
		n++
		if _, text, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " F "); !ok || text != fmt.Sprint("line ", n) {
			return n, fmt.Errorf("line %d is %q", n, line)
		}
	}
	return n, nil
}

func (r *rig) grown(than int) (n int) {
	r.t.Helper()
	for end := time.Now().Add(ample); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		var err error
		if n, err = r.lines(); err != nil && !errors.Is(err, os.ErrNotExist) {
			r.t.Fatal(err)
		}
		if n > than {
			return n
		}
	}
	r.t.Fatalf("the log has %d lines and no more than %d", n, than)
	return 0
}

// The log goes back and forth while the container writes, and has every line once.
func TestBackAndForth(t *testing.T) {
	r := newRig(t)
	var enough atomic.Bool
	wrote := make(chan int, 1)
	go func() {
		n := 0
		for ; !enough.Load(); time.Sleep(time.Millisecond) {
			for range 30 {
				n++
				if _, err := fmt.Fprintf(r.shim, "line %d\n", n); err != nil {
					t.Error(err)
				}
			}
		}
		wrote <- n
	}()
	seen := 0
	for range 10 {
		end := r.daemon()
		seen = r.grown(seen)
		end()
		r.connect(false)
		seen = r.grown(seen + 1000) // more than was under way
		r.connect(true)
	}
	end := r.daemon()
	enough.Store(true)
	n := <-wrote
	if got := r.grown(n - 1); got != n {
		t.Errorf("%d lines are there, %d were written", got, n)
	}
	end()
}

// Of a container that ends without a daemon everything is in the log, which is then
// free for a daemon although nobody is connected yet.
func TestEnds(t *testing.T) {
	r := newRig(t)
	r.daemon()()
	r.connect(false)
	if _, err := r.shim.WriteString("line 1\n"); err != nil {
		t.Fatal(err)
	}
	r.grown(0)
	if _, err := r.shim.WriteString("line 2\nline 3"); err != nil {
		t.Fatal(err)
	}
	r.shim.Close()
	var l *crilog.Log
	var err error
	for end := time.Now().Add(ample); l == nil; time.Sleep(time.Millisecond) {
		if l, err = crilog.Continue(filepath.Join(filepath.Dir(r.out.Stdout), crilog.DirName)); err != nil && time.Now().After(end) {
			t.Fatal(err)
		}
	}
	defer l.Close()
	if data, err := os.ReadFile(r.path); err != nil || strings.Count(string(data), "\n") != 3 || !strings.HasSuffix(string(data), " P line 3\n") {
		t.Errorf("the log has %q, %v", data, err)
	}
}

// What a daemon still has is left to it, and what no daemon made is not touched.
func TestOthers(t *testing.T) {
	r := newRig(t)
	r.connect(false)
	if _, err := r.shim.WriteString("line 1\n"); err != nil {
		t.Fatal(err)
	}
	end := r.daemon()
	defer end()
	if _, err := r.shim.WriteString("line 2\n"); err != nil {
		t.Fatal(err)
	}
	r.grown(1)
}
