package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/crilog"
)

const (
	// CaptureLimit is what CRI lets ExecSync return of one stream: 16 MB.
	CaptureLimit = 16_000_000
	// answerLimit is for both streams together: the kubelet takes messages of
	// 16 MiB, with what surrounds the output.
	answerLimit = 16<<20 - 4096
)

// execBuffer is what one step of an exec's output takes.
const execBuffer = 32 << 10

// hangUpDelay is between the end of a terminal's input and its hanging up, of
// which the first process dies. A client that is gone ends the exec meanwhile: it
// is killed with what it started, which can be told while its first process lives.
const hangUpDelay = time.Second

// ExecConfig says what streams an exec has.
type ExecConfig struct {
	// Dir is for this exec alone; it is made with mode 0700, in a directory that
	// must be there.
	Dir      string
	Terminal bool
	// Streams are the ends of the client. Output for a nil one is thrown away;
	// without Stdin the process has none.
	Streams
	// CloseStdin makes the shim close its end of stdin. It is called when Stdin
	// ends and may be nil without one.
	CloseStdin func(context.Context) error
}

// Exec is the streams of one exec.
type Exec struct {
	cfg    ExecConfig
	fifos  []*crilog.Fifo
	stdin  *stdin // nil without one
	cancel context.CancelFunc

	active  atomic.Int64  // when output last came or was taken, in Unix nanoseconds
	writing atomic.Int32  // writes to the client that are under way
	drained chan struct{} // closed when every output has ended
	copyErr [2]error      // once drained
}

// NewExec makes the FIFOs and begins to copy. When ctx ends no more input is
// taken. Output is taken until Close: a shim that opens a FIFO which nobody
// reads would wait in vain, and hear of no signal meanwhile. NotFound means that
// the directory above Dir is gone, and with it the container.
func NewExec(ctx context.Context, cfg ExecConfig) (*Exec, error) {
	if cfg.Stdin != nil && cfg.CloseStdin == nil {
		return nil, fmt.Errorf("create exec stdio: stdin needs a way to be closed: %w", errdefs.ErrInvalidArgument)
	}
	err := makeFifos(cfg.Dir, cfg.Stdin != nil, cfg.Terminal)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("create exec stdio: the container is gone: %w: %w", errdefs.ErrNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("create exec stdio: %w", err)
	}
	e, err := openExec(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("create exec stdio: %w", errors.Join(err, Remove(cfg.Dir)))
	}
	return e, nil
}

// LeftExec takes up the FIFOs that NewExec made in an earlier life of the
// daemon, and throws the output away until Close: it is for the end of the exec.
func LeftExec(ctx context.Context, dir string) (*Exec, error) {
	_, err := os.Stat(paths(dir, false, false).Stderr)
	e, err := openExec(ctx, ExecConfig{Dir: dir, Terminal: errors.Is(err, fs.ErrNotExist)})
	if err != nil {
		return nil, fmt.Errorf("take up exec stdio: %w", err)
	}
	return e, nil
}

func openExec(ctx context.Context, cfg ExecConfig) (_ *Exec, err error) {
	e := &Exec{cfg: cfg, drained: make(chan struct{})}
	if e.fifos, err = openOutputs(e.Paths()); err != nil {
		return nil, err
	}
	ctx, e.cancel = context.WithCancel(ctx)
	var copies sync.WaitGroup
	for i, f := range e.fifos {
		to := [2]io.Writer{cfg.Stdout, cfg.Stderr}[i]
		copies.Go(func() { e.copyErr[i] = e.copy(f, to) })
	}
	go func() {
		copies.Wait()
		close(e.drained)
	}()
	if cfg.Stdin != nil {
		e.stdin = newStdin(e.Paths().Stdin, cfg.CloseStdin)
		go e.feed(ctx)
	}
	return e, nil
}

// Paths are what the exec request gets.
func (e *Exec) Paths() runtime.IO { return paths(e.cfg.Dir, e.cfg.Stdin != nil, e.cfg.Terminal) }

// feed passes the input on, and its end with it.
func (e *Exec) feed(ctx context.Context) {
	err := e.stdin.feed(ctx, e.cfg.Stdin, false)
	if err != nil && ctx.Err() != nil {
		return // the exec was given up; its process gets a signal, not an end of input
	}
	var after time.Duration
	if e.cfg.Terminal {
		after = hangUpDelay
	}
	select {
	case <-e.stdin.closed: // the process is gone
		return
	case <-ctx.Done():
		return
	case <-time.After(after):
		e.stdin.finish(ctx)
	}
}

// copy moves output to the client. When the client fails the rest is read all
// the same, so that the process does not block.
func (e *Exec) copy(f *crilog.Fifo, to io.Writer) (failed error) {
	b := make([]byte, execBuffer)
	for {
		n, err := f.Read(b)
		e.active.Store(time.Now().UnixNano())
		if n > 0 && to != nil && failed == nil {
			e.writing.Add(1)
			_, werr := to.Write(b[:n])
			e.active.Store(time.Now().UnixNano())
			e.writing.Add(-1)
			if werr != nil {
				failed = fmt.Errorf("write to client: %w", werr)
			}
		}
		if errors.Is(err, io.EOF) {
			return failed
		}
		if err != nil {
			return errors.Join(failed, fmt.Errorf("read output: %w", err))
		}
	}
}

// Drain bounds the wait for output after the exit of a process whose streams
// somebody else may hold open, such as a child in the background.
type Drain struct {
	// Quiet is how long nothing may come, of a process whose output the client
	// takes, before the output counts as ended.
	// Zero waits for the real end.
	Quiet time.Duration
	// Most is how long output is taken at all. Zero means no limit.
	Most time.Duration
}

// Exited says that the process is gone; no input is taken any more.
func (e *Exec) Exited() {
	for _, f := range e.fifos {
		f.Exited()
	}
	if e.stdin != nil {
		e.stdin.shut()
	}
}

// Wait is for after the exit of the process. It returns when the client has all
// the output, or an error when it does not because the client failed or ctx
// ended first.
func (e *Exec) Wait(ctx context.Context, d Drain) error {
	e.Exited()
	quiet, most := newTimer(d.Quiet), newTimer(d.Most)
	defer quiet.Stop()
	defer most.Stop()
	e.active.Store(time.Now().UnixNano())
	for {
		select {
		case <-e.drained:
			return errors.Join(e.copyErr[:]...)
		case <-quiet.C:
			// A client that is slow is no quiet: the process's side waits for it.
			busy := e.writing.Load() > 0 // before the time: a write notes it at its end
			left := d.Quiet - time.Since(time.Unix(0, e.active.Load()))
			if left <= 0 && !busy {
				e.stop()
			}
			quiet.Reset(max(left, d.Quiet/10))
		case <-most.C:
			e.stop()
		case <-ctx.Done():
			return fmt.Errorf("drain output: %w", context.Cause(ctx))
		}
	}
}

// newTimer returns a timer that does not fire for zero.
func newTimer(d time.Duration) *time.Timer {
	if d <= 0 {
		d = math.MaxInt64
	}
	return time.NewTimer(d)
}

func (e *Exec) stop() {
	for _, f := range e.fifos {
		f.Stop()
	}
}

// Close ends everything and removes the FIFOs. It may be called again. A Read
// or Write of the client that is under way is not waited for: closing the
// client's connection ends it.
func (e *Exec) Close() error {
	e.cancel()
	closeFifos(e.fifos)
	if e.stdin != nil {
		e.stdin.shut()
	}
	return Remove(e.cfg.Dir)
}

// Capture keeps the first bytes written to it and counts the rest. It never
// fails and never blocks.
type Capture struct {
	limit int

	mu      sync.Mutex
	kept    []byte
	dropped uint64
}

// NewCapture returns a Capture for at most limit bytes.
func NewCapture(limit int) *Capture { return &Capture{limit: limit} }

// Write implements io.Writer.
func (c *Capture) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	keep := min(len(p), c.limit-len(c.kept))
	c.kept = append(c.kept, p[:keep]...)
	c.dropped += uint64(len(p) - keep)
	return len(p), nil
}

// Fit cuts the output of two streams to what an answer can carry. Each is sure
// of half of that and has besides what the other does not need.
func Fit(stdout, stderr []byte) (out, errs []byte) {
	n, m := shares(len(stdout), len(stderr), answerLimit)
	return stdout[:n], stderr[:m]
}

func shares(a, b, limit int) (int, int) {
	half := limit / 2
	switch {
	case a+b <= limit:
		return a, b
	case a <= half:
		return a, limit - a
	case b <= half:
		return limit - b, b
	}
	return half, half
}

// Result returns what was kept and how many bytes were not.
func (c *Capture) Result() (kept []byte, dropped uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kept[:len(c.kept):len(c.kept)], c.dropped
}
