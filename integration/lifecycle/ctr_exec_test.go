package lifecycle

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestCTR_13_Stdin: input stays open over attached clients, unless it is for one
// only.
func TestCTR_13_Stdin(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.script("many", "cat; echo end")
	c.Stdin = true
	id := b.run(c)
	req := &cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Stderr: true}
	for _, line := range []string{"one\n", "two\n", "three\n"} {
		a := b.attach(spdyDial, req, nil)
		a.write(line)
		a.says(line)
		a.stdin.Close()
		a.cancel()
	}
	b.logged(id, "three")
	if s := b.status(id); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after three clients the container is %s", s.State)
	}
	if got := logText(t, b.status(id).LogPath, "stdout"); got != "one\ntwo\nthree\n" {
		t.Errorf("the log says %q", got)
	}

	c = b.script("once", "cat; echo end")
	c.Stdin, c.StdinOnce = true, true
	id = b.run(c)
	a := b.attach(spdyDial, &cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Stderr: true}, nil)
	a.write("only\n")
	a.says("only\n")
	a.stdin.Close()
	if s := b.exited(id); s.ExitCode != 0 {
		t.Errorf("exit code %d", s.ExitCode)
	}
	if err := a.ends(); err != nil {
		t.Errorf("the session ends with %v", err)
	}
	if got := a.out.String(); got != "only\nend\n" {
		t.Errorf("the client got %q", got)
	}

	id = b.run(b.script("none", "cat; echo end"))
	if s := b.exited(id); s.ExitCode != 0 || logText(t, s.LogPath, "stdout") != "end\n" {
		t.Errorf("without stdin: exit code %d, log %q", s.ExitCode, logText(t, s.LogPath, "stdout"))
	}
}

func TestCTR_14_TTY(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.script("app", "trap 'stty size' WINCH; tty; echo err >&2; while ! [ -e /tmp/go ]; do sleep 0.1; done; read l; echo got $l")
	c.Tty, c.Stdin = true, true
	id := b.run(c)
	b.logged(id, "err")
	sizes := make(sizeQueue, 2)
	a := b.attach(spdyDial, &cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Tty: true}, sizes)
	sizes <- remotecommand.TerminalSize{Width: 120, Height: 40}
	a.says("40 120\r\n")
	close(sizes)
	b.Exec(id, "touch", "/tmp/go")
	a.write("hello\n")
	s := b.exited(id)
	a.says("got hello\r\n")
	if got := a.err.String(); got != "" {
		t.Errorf("a terminal has stderr %q", got)
	}
	entries := readLog(t, s.LogPath)
	text := joinLog(entries, "stdout")
	for _, want := range []string{"/dev/pts/", "err\r\n", "got hello\r\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("the log %q does not have %q", text, want)
		}
	}
	if text := joinLog(entries, "stderr"); text != "" {
		t.Errorf("the log has stderr %q", text)
	}
}

func TestRPC_17_ExecSync(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	run := func(timeout int64, command ...string) (*cri.ExecSyncResponse, error) {
		return b.Runtime().ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: command, Timeout: timeout})
	}
	r, err := run(0, "sh", "-c", "echo out; echo err >&2; exit 42")
	if err != nil || string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" || r.ExitCode != 42 {
		t.Errorf("got %v, %v", r, err)
	}
	if r, err = run(0, "/no/such/program"); err == nil {
		t.Errorf("a missing program: %v", r)
	}
	const mark = "8734211"
	begin := time.Now()
	_, err = run(1, "sleep", mark)
	wantError(t, err, codes.DeadlineExceeded)
	if took := time.Since(begin); took < time.Second {
		t.Errorf("the time of 1s was over after %v", took)
	}
	eventually(t, ample, func() error { return noneWith(mark) })

	r, err = run(0, "sh", "-c", "head -c 20971520 /dev/zero && exit 9")
	if n := len(r.GetStdout()); err != nil || r.ExitCode != 9 || n > 16<<20 || n < 16_000_000 {
		t.Errorf("20 MiB of output: %d bytes, exit code %d, %v", n, r.GetExitCode(), err)
	}
	_, err = b.Runtime().ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: "absent", Cmd: []string{"true"}})
	wantError(t, err, codes.NotFound, "absent")
	_, err = run(0, "echo", "a\x00b")
	wantError(t, err, codes.InvalidArgument, "cmd[1]")
	b.stop(id, 0)
	if _, err = run(0, "true"); err == nil {
		t.Error("a command ran in a stopped container")
	}
}

// noneWith wants that no process has the word in its arguments.
func noneWith(word string) error {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, f := range files {
		if args, err := os.ReadFile(f); err == nil && bytes.Contains(args, []byte("sleep\x00"+word)) {
			return fmt.Errorf("%s is %q", f, args)
		}
	}
	return nil
}

func TestRPC_18_Exec(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.sleeper("app")
	c.Envs, c.WorkingDir = env("WORD", "value"), "/tmp"
	id := b.run(c)
	for _, d := range []dial{spdyDial, websocketDial} {
		s, err := b.exec(d, id, strings.NewReader("typed\n"), "sh", "-c", "read l; echo $l $WORD; pwd; hostname; exit 5")
		if s.stdout != "typed value\n/tmp\npod-host\n" || s.code != 5 || err != nil {
			t.Errorf("%+v, %v", s, err)
		}
	}
	// The command of a client that goes away ends.
	const mark = "8734212"
	address := b.execURL(&cri.ExecRequest{ContainerId: id, Cmd: []string{"sleep", mark}, Stdout: true})
	e, err := spdyDial.executor(address)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: io.Discard}) }()
	eventually(t, ample, func() error {
		if noneWith(mark) == nil {
			return fmt.Errorf("the command does not run")
		}
		return nil
	})
	cancel()
	<-done
	eventually(t, ample, func() error { return noneWith(mark) })
}

func TestRPC_19_Attach(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.script("app", "while read l; do echo out $l; echo err $l >&2; done; exit 4")
	c.Stdin = true
	id := b.run(c)
	req := &cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Stderr: true}
	one, two := b.attach(spdyDial, req, nil), b.attach(websocketDial, req, nil)
	one.write("1\n")
	one.says("out 1\n")
	two.write("2\n")
	for _, a := range []*attached{one, two} {
		a.says("out 2\n")
		eventually(t, ample, func() error {
			if got := a.err.String(); !strings.Contains(got, "err 2\n") || strings.Contains(got, "out") {
				return fmt.Errorf("stderr is %q", got)
			}
			return nil
		})
	}
	b.stop(id, 0)
	for _, a := range []*attached{one, two} {
		_ = a.ends()
	}
}

func TestRPC_20_PortForward(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	b.serve(id, 8000, "read l; echo port 8000")
	if got, err := talk(b.forward(8000)[0], "x\n"); got != "port 8000\n" || err != nil {
		t.Errorf("pod: %q, %v", got, err)
	}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(conn, io.LimitReader(conn, 5))
			conn.Close()
		}
	}()
	onNode := newBox(t, hostNetwork)
	port := l.Addr().(*net.TCPAddr).Port
	if got, err := talk(onNode.forward(port)[0], "hello"); got != "hello" || err != nil {
		t.Errorf("pod in the node's network: %q, %v", got, err)
	}
}
