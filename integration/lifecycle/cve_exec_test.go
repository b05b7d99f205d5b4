package lifecycle

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestCVE_2022_31030_CVE_2022_1708_OutputIsBounded: commands that write without
// end, on both streams, cost the daemon no more memory than the answers may hold.
// What does not fit is read and dropped, and the log says how much.
func TestCVE_2022_31030_CVE_2022_1708_OutputIsBounded(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t))
	id := b.run(b.sleeper("app"))
	const flood = 256 << 20
	if _, err := b.Runtime().ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}}); err != nil {
		t.Fatal(err)
	}
	before, logged := memory(t, b.Daemon), fileSize(t, b.LogPath())
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute) // the machine may be slow; speed is not the point
	defer cancel()
	r, err := b.Runtime().ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c",
		fmt.Sprintf("head -c %[1]d /dev/zero & head -c %[1]d /dev/zero >&2; wait; exit 9", flood)}})
	if err != nil || r.ExitCode != 9 || len(r.Stdout)+len(r.Stderr) > 16<<20 {
		t.Errorf("%d and %d bytes, exit code %d, %v", len(r.GetStdout()), len(r.GetStderr()), r.GetExitCode(), err)
	}
	// Of 512 MiB; the race detector takes several times what it watches.
	grown := peak(t, b.Daemon) - before
	t.Logf("the daemon took %d MiB", grown)
	if grown > 450 {
		t.Errorf("the daemon took %d MiB", grown)
	}
	text, err := os.ReadFile(b.LogPath())
	if err != nil {
		t.Fatal(err)
	}
	dropped := fmt.Sprintf("dropped=%d", 2*flood-len(r.GetStdout())-len(r.GetStderr()))
	if !strings.Contains(string(text[logged:]), dropped) {
		t.Errorf("the log does not say %s", dropped)
	}
}

// sameGoroutines does the work a few times, then many times, and wants as many
// goroutines and open files in the daemon after as before.
func (b *box) sameGoroutines(times int, work func()) {
	b.t.Helper()
	repeat := func(n int) {
		var wg sync.WaitGroup
		for range 12 {
			wg.Go(func() {
				for range n / 12 {
					work()
				}
			})
		}
		wg.Wait()
	}
	repeat(12)
	files, routines := openFiles(b.t, b.PID()), b.goroutines()
	repeat(times)
	slack := 8 + times/20 // of what comes and goes by itself, such as connections
	eventually(b.t, ample, func() error {
		if now := b.goroutines(); now > routines+slack {
			return fmt.Errorf("%d goroutines run, before %d", now, routines)
		}
		if now := openFiles(b.t, b.PID()); now > files+slack {
			return fmt.Errorf("%d files are open, before %d", now, files)
		}
		return nil
	})
}

// TestCVE_2022_23471_NoGoroutineIsLeftOfATerminal: of commands with a terminal
// that do not start, whose clients go on to resize it, no goroutine is left.
func TestCVE_2022_23471_NoGoroutineIsLeftOfATerminal(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t))
	id := b.run(b.sleeper("app"))
	turns := make(chan dial, 2)
	turns <- spdyDial
	turns <- websocketDial
	b.sameGoroutines(72, func() {
		d := <-turns
		turns <- d
		address := b.execURL(&cri.ExecRequest{ContainerId: id, Cmd: []string{"/no/such/program"}, Tty: true, Stdin: true, Stdout: true})
		sizes := make(sizeQueue, 2)
		sizes <- remotecommand.TerminalSize{Width: 101, Height: 33}
		sizes <- remotecommand.TerminalSize{Width: 77, Height: 22}
		r, w := io.Pipe()
		err := d.streamTo(t.Context(), address, remotecommand.StreamOptions{Stdin: r, Stdout: io.Discard, Tty: true, TerminalSizeQueue: sizes})
		if err == nil {
			t.Error("a missing program ran")
		}
		close(sizes)
		w.Close()
	})
}

// TestCVE_2025_64329_NoGoroutineIsLeftOfAnAttach: of clients that attach and
// break off, in either protocol, at any moment and with or without a terminal, no
// goroutine is left, while the container writes nothing that would tell them.
func TestCVE_2025_64329_NoGoroutineIsLeftOfAnAttach(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t))
	c := b.sleeper("terminal")
	c.Tty, c.Stdin = true, true
	plain := b.sleeper("plain")
	plain.Stdin = true
	withTTY, without := b.run(c), b.run(plain)
	turns := make(chan func(), 4)
	for _, d := range []dial{spdyDial, websocketDial} {
		turns <- func() { b.breakOff(d, &cri.AttachRequest{ContainerId: withTTY, Stdin: true, Stdout: true, Tty: true}) }
		turns <- func() {
			b.breakOff(d, &cri.AttachRequest{ContainerId: without, Stdin: true, Stdout: true, Stderr: true})
		}
	}
	b.sameGoroutines(120, func() {
		turn := <-turns
		turns <- turn
		turn()
	})
}

// breakOff attaches and leaves a moment later, in the middle of whatever it is.
func (b *box) breakOff(d dial, req *cri.AttachRequest) {
	address := b.attachURL(req)
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(marks.Add(1)%5)*5*time.Millisecond)
	defer cancel()
	r, w := io.Pipe()
	defer w.Close()
	o := remotecommand.StreamOptions{Stdin: r, Stdout: io.Discard, Tty: req.Tty}
	if req.Stderr {
		o.Stderr = io.Discard
	}
	if err := d.streamTo(ctx, address, o); err == nil {
		b.t.Error("the session ended by itself")
	}
}

// TestCVE_2026_53495_OutputThatChildrenHoldIsNotWaitedFor: with the default
// configuration commands return although children in the background hold their
// output, or write to it for ever. The children live on, and nothing of the
// commands stays in the daemon.
func TestCVE_2026_53495_OutputThatChildrenHoldIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t))
	id := b.run(b.sleeper("app"))
	f := newFamily("sleep MARK & echo told; exit 4")
	noisy := []string{"sh", "-c", "(while :; do echo more; sleep 0.05; done) & echo told; exit 4"}
	run := func(command []string) {
		ctx, cancel := context.WithTimeout(context.Background(), ample)
		defer cancel()
		r, err := b.Runtime().ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: command})
		if err != nil || r.ExitCode != 4 || !strings.HasPrefix(string(r.Stdout), "told\n") && !strings.Contains(string(r.Stdout), "\ntold\n") {
			b.t.Errorf("%q: output %.100q, exit code %d, %v", command[2], r.GetStdout(), r.GetExitCode(), err)
		}
	}
	b.sameGoroutines(24, func() { run(f.command) })
	if n := sleepers(f.mark); n != 36 {
		t.Errorf("%d children of 36 are left", n)
	}
	run(noisy)
	b.stop(id, 0)
}
