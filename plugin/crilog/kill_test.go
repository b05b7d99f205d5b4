package crilog

import (
	"bufio"
	"context"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary runs itself as the writer, so that it can be killed.
const writerEnv = "CRILOG_TEST_WRITER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerEnv); dir != "" {
		runWriter(dir)
		return
	}
	os.Exit(m.Run())
}

// runWriter is a daemon with one container. It obeys "reopen" and "exit".
func runWriter(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
	}
	path := filepath.Join(os.Getenv(writerEnv+"_LOG"), "0.log")
	l, err := Open(filepath.Join(dir, "journal"), path, Options{MaxLine: 2000})
	fail(err)
	var copies sync.WaitGroup
	var fifos [streams]*Fifo
	for s := range streams {
		fifos[s], err = OpenFifo(filepath.Join(dir, "fifo-"+s.String()))
		fail(err)
		copies.Go(func() { fail(l.Copy(s, fifos[s], nil)) })
	}
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		switch in.Text() {
		case "reopen":
			fail(l.Reopen(context.Background(), path))
		case "exit":
			for _, f := range fifos {
				f.Exited()
			}
			copies.Wait()
			fail(l.Flush(context.Background()))
		}
		fmt.Println("ok")
	}
}

// victim is one run of the writer.
type victim struct {
	cmd *exec.Cmd
	in  *os.File
	out *bufio.Scanner
}

func startVictim(t *testing.T, state, logs string) *victim {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), writerEnv+"="+state, writerEnv+"_LOG="+logs)
	cmd.Stdin, cmd.Stderr = r, os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.Close()
	return &victim{cmd: cmd, in: w, out: bufio.NewScanner(out)}
}

// expect reads one line of the answer.
func (v *victim) expect(t *testing.T, want string) {
	t.Helper()
	if !v.out.Scan() || v.out.Text() != want {
		t.Fatalf("writer says %q, want %q (%v)", v.out.Text(), want, v.out.Err())
	}
}

func (v *victim) kill(t *testing.T) {
	t.Helper()
	if err := v.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for v.out.Scan() {
		if strings.HasPrefix(v.out.Text(), "error") {
			t.Error(v.out.Text())
		}
	}
	_ = v.cmd.Wait() // killed, as asked
	v.in.Close()
}

// generator writes numbered lines of many lengths into one FIFO and keeps what
// it wrote.
type generator struct {
	file *os.File
	stop chan struct{}
	done chan struct{}
	sent strings.Builder
}

func generate(t *testing.T, path string, seed int64) *generator {
	t.Helper()
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	g := &generator{file: f, stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(g.done)
		rnd := rand.New(rand.NewSource(seed))
		for i := 0; ; i++ {
			select {
			case <-g.stop:
				return
			default:
			}
			pad := rnd.Intn(120)
			if rnd.Intn(50) == 0 {
				pad = rnd.Intn(9000)
			}
			line := fmt.Sprintf("%08d %s\n", i, strings.Repeat("p", pad))
			for rest := line; rest != ""; {
				n := 1 + rnd.Intn(len(rest))
				if _, err := f.WriteString(rest[:n]); err != nil {
					t.Error(err)
					return
				}
				rest = rest[n:]
			}
			g.sent.WriteString(line)
			if g.sent.Len() > 16<<20 {
				time.Sleep(time.Millisecond) // enough: keep the test small
			}
		}
	}()
	return g
}

func TestKilledAtAnyMoment(t *testing.T) {
	for _, rotate := range []bool{false, true} {
		t.Run(fmt.Sprintf("rotate %v", rotate), func(t *testing.T) { killLoop(t, rotate) })
	}
}

func killLoop(t *testing.T, rotate bool) {
	kills := 100
	if testing.Short() {
		kills = 30
	}
	state, logs := memDir(t), t.TempDir()
	current := filepath.Join(logs, "0.log")
	var gens [streams]*generator
	for s := range streams {
		gens[s] = generate(t, filepath.Join(state, "fifo-"+s.String()), int64(s)+7)
	}
	rnd := rand.New(rand.NewSource(time.Now().UnixNano()))
	var rotated []string
	for range kills {
		v := startVictim(t, state, logs)
		if rnd.Intn(4) > 0 {
			v.expect(t, "ready")
		}
		time.Sleep(time.Duration(rnd.Intn(8_000)) * time.Microsecond)
		if rotate {
			to := fmt.Sprintf("%s.%04d", current, len(rotated))
			if os.Rename(current, to) == nil {
				rotated = append(rotated, to)
			}
			fmt.Fprintln(v.in, "reopen")
			time.Sleep(time.Duration(rnd.Intn(3_000)) * time.Microsecond)
		}
		v.kill(t)
	}
	v := startVictim(t, state, logs)
	v.expect(t, "ready")
	for _, g := range gens {
		close(g.stop)
		<-g.done
		g.file.Close()
	}
	fmt.Fprintln(v.in, "exit")
	v.expect(t, "ok")
	v.kill(t)

	if _, err := os.Stat(current); err == nil {
		rotated = append(rotated, current)
	}
	stdout, stderr := read(t, rotated...)
	t.Logf("%d and %d bytes over %d kills in %d files", len(stdout), len(stderr), kills, len(rotated))
	compare(t, "stdout", stdout, gens[Stdout].sent.String())
	compare(t, "stderr", stderr, gens[Stderr].sent.String())
	for _, name := range rotated {
		if b, err := os.ReadFile(name); err != nil || len(b) > 0 && b[len(b)-1] != '\n' {
			t.Errorf("%s ends in a torn record (%v)", name, err)
		}
	}
}

func compare(t *testing.T, what, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	at := 0
	for at < len(got) && at < len(want) && got[at] == want[at] {
		at++
	}
	t.Errorf("%s: %d bytes, want %d; differs at %d: %.60q, want %.60q", what, len(got), len(want), at, got[at:], want[at:])
}
