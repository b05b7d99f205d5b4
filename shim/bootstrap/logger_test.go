package bootstrap

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// loggerScript writes down what it was started with and what it reads.
const loggerScript = `#!/bin/sh
trap 'echo terminated >> $2/life; [ $1 = deaf ] || exit 0' TERM
echo begin $$ $1 $CONTAINER_ID $CONTAINER_NAMESPACE $(env | wc -l) >> $2/life
[ $1 = stubborn ] || printf x >&5
exec 5>&-
cat <&4 >> $2/err & cat <&3 >> $2/out
while [ $1 = lasting ] || [ $1 = deaf ]; do sleep 0.1; done
wait
echo end >> $2/life
`

// logging is a logger's files.
type logging struct {
	b            bench
	program, dir string
}

func newLogging(b bench) logging {
	dir := b.t.TempDir()
	l := logging{b, filepath.Join(dir, "logger"), dir}
	b.must(os.WriteFile(l.program, []byte(loggerScript), 0o755))
	return l
}

func (l logging) address(scheme, mode string) string {
	return scheme + "://" + l.program + "?" + mode + "=" + l.dir
}

// withDev gives a bundle's container a /dev, as runc links a process's pipes there, and
// maybe a terminal.
func (b bench) withDev(id string, terminal bool) {
	b.t.Helper()
	path := filepath.Join(b.bundle(id), "config.json")
	text, err := os.ReadFile(path)
	b.must(err)
	var spec specs.Spec
	b.must(json.Unmarshal(text, &spec))
	spec.Process.Terminal = terminal
	spec.Mounts = append(spec.Mounts,
		specs.Mount{Destination: "/dev", Type: "tmpfs", Source: "tmpfs"},
		specs.Mount{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666"}})
	text, err = json.Marshal(spec)
	b.must(err)
	b.must(os.WriteFile(path, text, 0o600))
}

// has waits until a file of the logger has the text.
func (l logging) has(file, text string) {
	l.b.t.Helper()
	var got []byte
	var err error
	for l.b.ctx.Err() == nil {
		if got, err = os.ReadFile(filepath.Join(l.dir, file)); strings.Contains(string(got), text) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	l.b.t.Fatalf("%s is %q, want %q: %v", file, got, text, err)
}

// ended wants the logger, by the number it has written down, to be there no more, but for
// one whose supervisor is dead: that lies there until somebody else reaps it.
func (l logging) ended(orphan bool) {
	l.b.t.Helper()
	life, err := os.ReadFile(filepath.Join(l.dir, "life"))
	l.b.must(err)
	for line := range bytes.Lines(life) {
		var pid int
		if _, err := fmt.Sscanf(string(line), "begin %d", &pid); err != nil {
			continue
		}
		var stat []byte
		for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			stat, err = os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil || orphan && bytes.Contains(stat, []byte(") Z ")) {
				break
			}
		}
		if len(stat) > 0 && !(orphan && bytes.Contains(stat, []byte(") Z "))) {
			l.b.t.Errorf("the logger is there still: %s; it says %s", stat, life)
		}
	}
}

// TestRTH_07_Logger: the program of a binary:// address gets both outputs apart, to the
// last byte also when the supervisor is killed meanwhile, and is awaited when its container
// is deleted.
func TestRTH_07_Logger(t *testing.T) { inBothWays(t, loggers) }

func loggers(b bench) {
	for _, terminal := range []bool{false, true} {
		for _, crash := range []bool{false, true} {
			b.t.Run(fmt.Sprintf("terminal %v, crash %v", terminal, crash), func(t *testing.T) {
				b := b
				b.t = t
				logged(b, terminal, crash)
			})
		}
	}
}

func logged(b bench, terminal, crash bool) {
	l := newLogging(b)
	id := fmt.Sprintf("logged-%v-%v", terminal, crash)
	address := b.start(id, "busybox", "sh", "-c",
		"echo first; echo err >&2; trap 'echo last; exit 3' TERM; echo ready; while :; do busybox sleep 0.05; done")
	uri := l.address("binary-v2", "plain")
	r := &api.CreateTaskRequest{ID: id, Terminal: terminal, Stdout: uri, Stderr: uri}
	if terminal {
		r.Stderr = ""
	}
	b.withDev(id, terminal)
	b.runWith(address, r)
	l.has("out", "first")
	l.has("out", "ready")
	l.has("life", " plain "+id+" gantry-test ")
	if crash {
		b.killSupervisor(address)
		next := id + "-next"
		b.start(next, "busybox", "true")
		defer b.delete(next)
	}
	c := b.connect(address)
	_, err := c.Kill(b.ctx, &api.KillRequest{ID: id, Signal: 15})
	b.must(err)
	if r, err := c.Wait(b.ctx, &api.WaitRequest{ID: id}); err != nil || r.GetExitStatus() != 3 {
		b.t.Errorf("wait: %v, %v", r, err)
	}
	l.has("life", "\nend\n")
	_, err = c.Delete(b.ctx, &api.DeleteRequest{ID: id})
	b.must(err)
	l.ended(crash)
	b.delete(id)
	life, err := os.ReadFile(filepath.Join(l.dir, "life"))
	b.must(err)
	if !bytes.HasSuffix(life, []byte("\nend\n")) || bytes.Contains(life, []byte("terminated")) {
		b.t.Errorf("its life was %q", life)
	}
	out, err := os.ReadFile(filepath.Join(l.dir, "out"))
	b.must(err)
	errs, err := os.ReadFile(filepath.Join(l.dir, "err"))
	b.must(err)
	want, wantErrs := "first\nready\nlast\n", "err\n"
	if terminal {
		want, wantErrs = "first\r\nerr\r\nready\r\nlast\r\n", ""
	}
	if string(out) != want || string(errs) != wantErrs {
		b.t.Errorf("logged: %q and %q", out, errs)
	}
}

// TestRTH_07_LoggerStays: one that does not end with its input is told to, and then killed;
// one that is left by a dead supervisor by the shim's delete, for which containerd does not
// wait long.
func TestRTH_07_LoggerStays(t *testing.T) {
	b := newBench(t)
	for id, mode := range map[string]string{"deleted": "lasting", "left": "lasting", "left-deaf": "deaf"} {
		l := newLogging(b)
		address := b.start(id, "busybox", "echo", "all")
		b.withDev(id, false)
		b.runWith(address, &api.CreateTaskRequest{ID: id, Stdout: l.address("binary", mode), Stderr: l.address("binary", mode)})
		l.has("out", "all\n")
		left := id != "deleted"
		if left {
			b.killSupervisor(address)
		} else {
			c := b.connect(address)
			_, err := c.Wait(b.ctx, &api.WaitRequest{ID: id})
			b.must(err)
			_, err = c.Delete(b.ctx, &api.DeleteRequest{ID: id})
			b.must(err)
			l.ended(false)
		}
		b.delete(id)
		l.ended(left)
		l.has("life", "terminated")
	}
}

// TestRTH_07_LoggerFails: without a logger, or one that is not ready, there is no
// container, and nothing is left.
func TestRTH_07_LoggerFails(t *testing.T) {
	b := newBench(t)
	l := newLogging(b)
	address := b.start("a", "busybox", "true")
	c := b.connect(address)
	for name, want := range map[string]string{
		"binary:///no/such/logger":         "/no/such/logger: no such file",
		l.address("binary-v2", "stubborn"): "did not write there that it is ready",
		"binary-v2:///bin/false?a=b":       "did not write there that it is ready",
		"binary://" + l.dir:                "permission denied",
	} {
		_, err := c.Create(b.ctx, &api.CreateTaskRequest{ID: "a", Bundle: b.bundle("a"), Options: b.options(), Stdout: name, Stderr: name})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	if _, err := c.Create(b.ctx, &api.CreateTaskRequest{ID: "a", Bundle: b.bundle("a"), Options: b.options(), Stderr: "binary:///bin/cat"}); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("a logger of stderr alone: %v", err)
	}
	l.ended(false)
	if left, err := filepath.Glob(filepath.Join(b.Dir, "s", "*.d", "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	b.delete("a")
}
