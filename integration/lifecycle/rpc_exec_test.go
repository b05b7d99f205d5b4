package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// families are commands that start others. Each says that it has by making the
// file READY, and the processes that must be gone in the end sleep for MARK
// seconds.
var families = map[string]string{
	"alone":    "touch READY; exec sleep MARK",
	"children": "sleep MARK & sleep MARK & touch READY; wait",
	"nested":   `sh -c 'sleep MARK & sh -c "sleep MARK & touch READY; sleep MARK; true"; true'; true`,
	"setsid":   "setsid sleep MARK & setsid sh -c 'sleep MARK & touch READY; sleep MARK; true' & wait",
	"daemon":   "setsid sh -c 'setsid sleep MARK </dev/null >/dev/null 2>&1 & touch READY'; sleep MARK; true",
	"orphans":  "(sleep MARK &); (sleep MARK &); touch READY; sleep MARK; true",
	"deaf":     "trap '' TERM HUP INT; sh -c 'sleep MARK; true' & touch READY; wait; wait",
	"forks":    "while :; do sleep MARK & [ -e READY ] || touch READY; sleep 0.05; done",
}

var marks atomic.Int64

// family is one of the families in a container.
type family struct {
	mark, ready string
	command     []string
}

func newFamily(text string) family {
	f := family{mark: strconv.Itoa(87350000 + int(marks.Add(1)))}
	f.ready = "/tmp/ready-" + f.mark
	f.command = []string{"sh", "-c", strings.NewReplacer("MARK", f.mark, "READY", f.ready).Replace(text)}
	return f
}

// started reports whether the command in a container, of which pid is a
// process, has said that it is ready and runs.
func (f family) started(pid int) error {
	if _, err := os.Stat(filepath.Join("/proc", strconv.Itoa(pid), "root", f.ready)); err != nil {
		return err
	}
	if noneMarked(f.mark) == nil {
		return fmt.Errorf("the command does not run")
	}
	return nil
}

// TestRPC_17_NothingIsLeft: of a command that is killed because its time is up
// or its client is gone no process is left, whatever it has started, and nothing
// else in the container suffers.
func TestRPC_17_NothingIsLeft(t *testing.T) {
	oursAlone(t, "end of all that a command has started")
	t.Parallel()
	for name, pids := range map[string]cri.NamespaceMode{"own": cri.NamespaceMode_CONTAINER, "node": cri.NamespaceMode_NODE} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t, withNamespaces(&cri.NamespaceOption{Pid: pids}))
			main, other := newFamily(""), newFamily("setsid sleep MARK & touch READY; sleep MARK; true")
			c := b.script("app", "sleep "+main.mark+" & setsid sleep "+main.mark+" & sleep "+main.mark+"; true")
			id := b.run(inNamespaces(c, &cri.NamespaceOption{Pid: pids}))
			pid := b.pid(id)
			ended := make(chan error, 1)
			ctx, cancel := context.WithTimeout(context.Background(), time.Hour) // a call without has a short one
			defer cancel()
			go func() {
				_, err := b.Runtime().ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: other.command})
				ended <- err
			}()
			eventually(t, ample, func() error { return other.started(pid) })
			for way, run := range map[string]func(family){
				"timeout":          func(f family) { b.execTimeout(id, f) },
				"client gone":      func(f family) { b.execCancelled(id, f) },
				"stream gone":      func(f family) { b.streamAbandoned(id, f, false) },
				"tty stream gone":  func(f family) { b.streamAbandoned(id, f, true) },
				"websocket closed": func(f family) { b.socketAbandoned(id, f) },
			} {
				var wg sync.WaitGroup
				for kind, text := range families {
					f := newFamily(text)
					wg.Go(func() {
						run(f)
						if err := within(ample, func() error { return noneMarked(f.mark) }); err != nil {
							t.Errorf("%s, %s: %v", way, kind, err)
						}
					})
				}
				wg.Wait()
			}
			for what, f := range map[string]family{"the main process": main, "another command": other} {
				if n := sleepers(f.mark); n < 2 {
					t.Errorf("%s: %d of its processes are left", what, n)
				}
			}
			select {
			case err := <-ended:
				t.Errorf("another command ended: %v", err)
			default:
			}
			if s := b.status(id); s.State != cri.ContainerState_CONTAINER_RUNNING {
				t.Errorf("the container is %s", s.State)
			}
			b.stop(id, 0)
			<-ended
		})
	}
}

// execTimeout runs the command until its time is up. The time is for it to start
// all that it starts, and not what is tested.
func (b *box) execTimeout(id string, f family) {
	for timeout := int64(2); ; timeout *= 4 {
		_, err := b.Runtime().ExecSync(context.Background(), &cri.ExecSyncRequest{ContainerId: id, Cmd: f.command, Timeout: timeout})
		wantError(b.t, err, codes.DeadlineExceeded)
		// No process is left when the client hears of it.
		if err := noneMarked(f.mark); err != nil {
			b.t.Errorf("right after a timeout: %v", err)
		}
		_, err = os.Stat(filepath.Join("/proc", strconv.Itoa(b.pid(id)), "root", f.ready))
		if err == nil || timeout > 60 {
			if err != nil {
				b.t.Errorf("the command did not begin: %v", err)
			}
			return
		}
	}
}

// execCancelled runs the command and goes away when it runs.
func (b *box) execCancelled(id string, f family) {
	b.abandon(id, f, func(ctx context.Context) error {
		_, err := b.Runtime().ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: f.command})
		return err
	})
}

func (b *box) streamAbandoned(id string, f family, tty bool) {
	address := b.execURL(&cri.ExecRequest{ContainerId: id, Cmd: f.command, Stdin: true, Stdout: true, Tty: tty})
	b.abandon(id, f, func(ctx context.Context) error {
		in, typed := io.Pipe()
		defer typed.Close()
		return spdyDial.streamTo(ctx, address, remotecommand.StreamOptions{Stdin: in, Stdout: io.Discard, Tty: tty})
	})
}

func (b *box) socketAbandoned(id string, f family) {
	address := b.execURL(&cri.ExecRequest{ContainerId: id, Cmd: f.command, Stdout: true, Stderr: true})
	b.abandon(id, f, func(ctx context.Context) error {
		return websocketDial.streamTo(ctx, address, remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard})
	})
}

// abandon runs a client until the command has started all that it starts.
func (b *box) abandon(id string, f family, client func(context.Context) error) {
	pid := b.pid(id)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- client(ctx) }()
	err := within(ample, func() error {
		select {
		case err := <-done:
			done <- err
			return fmt.Errorf("the client ended: %w", err)
		default:
			return f.started(pid)
		}
	})
	if err != nil {
		b.t.Errorf("%q: %v", f.command, err)
	}
	cancel()
	<-done
}

// within is eventually for a goroutine that is not the test's.
func within(limit time.Duration, check func() error) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(poll) {
		err := check()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// noneMarked wants that no process has the mark in its arguments.
func noneMarked(mark string) error {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, f := range files {
		if args, err := os.ReadFile(f); err == nil && strings.Contains(string(args), mark) {
			return fmt.Errorf("%s is %q", f, args)
		}
	}
	return nil
}

// sleepers is how many processes sleep for that many seconds.
func sleepers(mark string) int {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0
	}
	n := 0
	for _, f := range files {
		if args, err := os.ReadFile(f); err == nil && string(args) == "sleep\x00"+mark+"\x00" {
			n++
		}
	}
	return n
}

// TestRPC_17_BackgroundStays: what a command leaves running when it ends by
// itself goes on.
func TestRPC_17_BackgroundStays(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	const text = "sleep MARK >/dev/null 2>&1 </dev/null & echo started"
	one, two := newFamily(text), newFamily(text)
	r, err := b.Runtime().ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: one.command, Timeout: 60})
	if err != nil || string(r.Stdout) != "started\n" || r.ExitCode != 0 {
		t.Fatalf("%v, %v", r, err)
	}
	if s, err := b.exec(spdyDial, id, nil, two.command...); err != nil || s.stdout != "started\n" {
		t.Fatalf("%+v, %v", s, err)
	}
	// One that times out beside them does not take them along.
	_, err = b.Runtime().ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sleep", "1000"}, Timeout: 1})
	wantError(t, err, codes.DeadlineExceeded)
	for _, f := range []family{one, two} {
		if n := sleepers(f.mark); n != 1 {
			t.Errorf("%d processes of %q are there", n, f.command)
		}
	}
	b.stop(id, 0)
	eventually(t, ample, func() error { return errors.Join(noneMarked(one.mark), noneMarked(two.mark)) })
}

// TestRPC_17_MuchOutput: an answer always fits into a message of the size that
// the kubelet takes, begins each stream at its beginning, and leaves none out.
func TestRPC_17_MuchOutput(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute) // the machine may be slow; speed is not the point
	defer cancel()
	const much = 20 << 20
	flood := func(text string, to int) string {
		return fmt.Sprintf("yes %s | head -c %d >&%d", text, much, to)
	}
	for name, c := range map[string]struct {
		script   string
		out, err int // at least
	}{
		"stdout":               {script: flood("out", 1), out: 16_000_000},
		"stderr":               {script: flood("err", 2), err: 16_000_000},
		"both":                 {script: flood("out", 1) + "; " + flood("err", 2), out: 8_000_000, err: 8_000_000},
		"both at a time":       {script: flood("out", 1) + " & " + flood("err", 2) + "; wait", out: 8_000_000, err: 8_000_000},
		"stdout, a bit of err": {script: flood("out", 1) + "; echo err >&2", out: 16_000_000, err: 4},
	} {
		r, err := b.Runtime().ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", c.script + "; exit 9"}},
			grpc.MaxCallRecvMsgSize(16<<20))
		if err != nil || r.ExitCode != 9 {
			t.Errorf("%s: exit code %d, %v", name, r.GetExitCode(), err)
			continue
		}
		for stream, s := range map[string]struct {
			got   []byte
			least int
		}{"out": {r.Stdout, c.out}, "err": {r.Stderr, c.err}} {
			if n := len(s.got); n < s.least || n > 16_000_000 || s.least == 0 && n > 0 {
				t.Errorf("%s: %d bytes of std%s, want %d at least", name, n, stream, s.least)
			}
			if want := strings.Repeat(stream+"\n", len(s.got)/4+1)[:len(s.got)]; string(s.got) != want {
				t.Errorf("%s: std%s is not what was written", name, stream)
			}
		}
	}
}

// TestRPC_17_DaemonDies: the client of an exec goes with the daemon, so the next
// daemon ends the command, and the runtime forgets it.
func TestRPC_17_DaemonDies(t *testing.T) {
	oursAlone(t, "end of commands whose daemon died")
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	f := newFamily(families["children"])
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = b.Runtime().ExecSync(context.Background(), &cri.ExecSyncRequest{ContainerId: id, Cmd: f.command})
	}()
	eventually(t, ample, func() error { return f.started(b.pid(id)) })
	execs := func() []string {
		dirs, err := filepath.Glob(filepath.Join(b.State, "io.containerd.grpc.v1.cri", "io", id, "exec-*"))
		if err != nil {
			t.Error(err)
		}
		return dirs
	}
	if len(execs()) != 1 {
		t.Errorf("the streams of the command are in %q", execs())
	}
	b.Kill()
	<-ended
	if err := noneMarked(f.mark); err == nil {
		t.Error("the command ended with the daemon: nothing is tested")
	}
	b.Up()
	eventually(t, ample, func() error {
		if left := execs(); len(left) > 0 {
			return fmt.Errorf("left: %q", left)
		}
		return noneMarked(f.mark)
	})
	if s := b.status(id); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the container is %s", s.State)
	}
	if got := b.Exec(id, "echo", "next"); got != "next\n" {
		t.Errorf("the next command says %q", got)
	}
}

// TestRPC_17_DaemonDiesEarly: the daemon dies while the runtime, which has begun a command
// already, has not said so: the command is not forgotten.
func TestRPC_17_DaemonDiesEarly(t *testing.T) {
	oursAlone(t, "end of commands whose daemon died")
	t.Parallel()
	begun, goOn := filepath.Join(t.TempDir(), "begun"), filepath.Join(t.TempDir(), "go-on")
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		text := fmt.Sprintf("#!/bin/sh\n%s \"$@\"\nrc=$?\ncase \" $* \" in *' exec '*) touch %s; while ! test -e %s; do sleep 0.05; done ;; esac\nexit $rc\n", inBin(t, "runc"), begun, goOn)
		path := filepath.Join(in.Dir, "late-runc")
		must(os.WriteFile(path, []byte(text), 0o755))
		addHandler(in, c, "late", daemon.Config{
			"runtime_type": "io.containerd.gantry.v2", "sandboxer": "shim", "options": in.RuncOptions(daemon.Config{"BinaryName": path}),
		})
	}))
	b := boxWith(t, d, "late")
	id := b.run(b.sleeper("app"))
	f := newFamily(families["children"])
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = b.Runtime().ExecSync(context.Background(), &cri.ExecSyncRequest{ContainerId: id, Cmd: f.command})
	}()
	eventually(t, ample, func() error {
		_, err := os.Stat(begun)
		return errors.Join(err, f.started(b.pid(id)))
	})
	b.Kill()
	<-ended
	b.Up()
	must(os.WriteFile(goOn, nil, 0o600))
	eventually(t, ample, func() error { return noneMarked(f.mark) })
	if got := b.Exec(id, "echo", "next"); got != "next\n" {
		t.Errorf("the next command says %q", got)
	}
}
