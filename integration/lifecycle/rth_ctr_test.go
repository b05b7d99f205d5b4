package lifecycle

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/console"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// ctrUser uses containers of a stock containerd by ctr alone.
type ctrUser struct {
	t   *testing.T
	d   *daemon.Daemon
	ref string
	id  string
}

// newCtrUser has a daemon and an image. The container's name is one of the machine, as
// runc's directory is.
func newCtrUser(t *testing.T, name string) ctrUser {
	t.Helper()
	d := start(t, daemon.Stock())
	ref := images.Serve(t).Push(t, "app:v1", images.MustBuild(images.Spec{}))
	if _, err := d.Images().PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Fatal(err)
	}
	return ctrUser{t, d, ref, name + "-" + filepath.Base(d.Dir)}
}

// run are the arguments that run a container by the shim under test, with flags.
func (u ctrUser) run(flags, command []string) []string {
	shim := "io.containerd.gantry.v2"
	if defaultHandler == "runc" {
		shim = "io.containerd.runc.v2"
	}
	args := append([]string{"run", "--runtime", shim, "--cgroup", path.Join(u.d.CgroupParent, u.id)}, flags...)
	return append(append(args, u.ref, u.id), command...)
}

func (u ctrUser) command(args []string) *exec.Cmd {
	return exec.CommandContext(u.t.Context(), inBin(u.t, "ctr"), append([]string{"-a", u.d.Socket, "-n", daemon.Namespace}, args...)...)
}

// exits runs ctr, which has to exit with the code, and returns what it says, without its
// warnings if all is well.
func (u ctrUser) exits(code int, args ...string) string {
	u.t.Helper()
	cmd := u.command(args)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != code {
		u.t.Errorf("ctr %s: %v, want exit code %d: %s%s", strings.Join(args, " "), err, code, &out, &errs)
	}
	if code == 0 {
		return out.String()
	}
	return out.String() + errs.String()
}

// is waits until ctr lists the container's task as that.
func (u ctrUser) is(status string) {
	u.t.Helper()
	eventually(u.t, soon, func() error {
		for line := range strings.Lines(u.exits(0, "task", "ls")) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == u.id && f[2] == status {
				return nil
			}
		}
		return fmt.Errorf("ctr does not list %s as %s", u.id, status)
	})
}

// TestRTH_07_CtrForeground: a container that ctr waits for gets its input, says what it
// says on both outputs, and ends with its code.
func TestRTH_07_CtrForeground(t *testing.T) {
	t.Parallel()
	u := newCtrUser(t, "front")
	cmd := u.command(u.run([]string{"--rm"}, []string{"sh", "-c", "echo out; echo err >&2; cat; exit 7"}))
	var out, errs lockedBuffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	input, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(input, "typed\n"); err != nil {
		t.Error(err)
	}
	// ctr does not tell of an end of input that comes while it makes the task.
	eventually(t, soon, func() error {
		if got := out.String(); got != "out\ntyped\n" {
			return fmt.Errorf("it says %q", got)
		}
		return nil
	})
	input.Close()
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 7 || !strings.Contains(errs.String(), "err\n") {
		t.Errorf("%v, want exit code 7; it says %q", err, errs.String())
	}
	if list := u.exits(0, "container", "ls", "-q"); list != "" {
		t.Errorf("afterwards there is %q", list)
	}
}

// TestRTH_07_CtrTask: each command that ctr has for a task, before and after the daemon
// was killed.
func TestRTH_07_CtrTask(t *testing.T) {
	t.Parallel()
	u := newCtrUser(t, "task")
	u.exits(0, u.run([]string{"-d"}, []string{"sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.1; done"})...)
	for i, when := range []string{"at first", "after a crash"} {
		u.is("RUNNING")
		u.begun()
		if out := u.exits(0, "task", "exec", "--exec-id", "says", u.id, "sh", "-c", "echo in it"); out != "in it\n" {
			t.Errorf("%s exec says %q", when, out)
		}
		u.exits(5, "task", "exec", "--exec-id", "ends", u.id, "sh", "-c", "exit 5")
		stays := fmt.Sprint("stays-", i)
		u.exits(0, "task", "exec", "-d", "--exec-id", stays, u.id, "sleep", "1000000")
		pids := strings.Fields(u.exits(0, "task", "ps", u.id))
		if !slices.ContainsFunc(pids, func(f string) bool { return strings.Contains(f, stays) }) {
			t.Errorf("%s ps lists %q", when, pids)
		}
		u.exits(0, "task", "kill", "-s", "KILL", "--exec-id", stays, u.id)
		if out := u.exits(0, "task", "metrics", u.id); !strings.Contains(out, "pids.current") {
			t.Errorf("%s metrics are %q", when, out)
		}
		u.exits(0, "task", "pause", u.id)
		u.is("PAUSED")
		u.exits(0, "task", "resume", u.id)
		u.is("RUNNING")
		if _, err := exec.LookPath("criu"); err != nil {
			if out := u.exits(1, "task", "checkpoint", u.id); !strings.Contains(out, "criu") {
				t.Errorf("%s checkpoint without criu says %q", when, out)
			}
			u.is("RUNNING")
		}
		u.d.Kill()
		u.d.Up()
	}
	u.exits(1, "task", "delete", u.id) // it runs
	u.exits(0, "task", "kill", u.id)
	u.is("STOPPED")
	u.gone(9)
	u.exits(0, "task", "start", "-d", u.id)
	u.is("RUNNING")
	u.gone(137, "-f")
	u.exits(0, "container", "rm", u.id)
}

// gone deletes the task and wants ctr to warn of its code unless that is 0.
func (u ctrUser) gone(code int, flags ...string) {
	u.t.Helper()
	cmd := u.command(append(append([]string{"task", "delete"}, flags...), u.id))
	out, err := cmd.CombinedOutput()
	if err != nil || code != 0 && !strings.Contains(string(out), fmt.Sprintf("exit code %d", code)) {
		u.t.Errorf("ctr task delete: %v, want exit code %d to be told: %s", err, code, out)
	}
}

// begun waits until the container's first process is its own program.
func (u ctrUser) begun() {
	u.t.Helper()
	begun(u.t, pidOf(u.t, u.d, u.id))
}

// TestRTH_07_CtrTerminal: a container on ctr's terminal has its size, gets what is typed
// and says what it says; so does a command in it.
func TestRTH_07_CtrTerminal(t *testing.T) {
	t.Parallel()
	u := newCtrUser(t, "terminal")
	// ctr sets the size when the process has begun.
	const script = "echo asks; read line; until [ \"$(stty size 2>&1)\" = '33 77' ]; do sleep 0.1; done; echo got $line; exit 6"
	u.onTerminal(u.run([]string{"-t", "--rm"}, []string{"sh", "-c", script}))
	u.exits(0, u.run([]string{"-d"}, []string{"sleep", "1000000"})...)
	u.onTerminal([]string{"task", "exec", "-t", "--exec-id", "asks", u.id, "sh", "-c", script})
	u.gone(137, "-f")
	u.exits(0, "container", "rm", u.id)
}

// onTerminal runs ctr on a terminal of 33 lines and 77 columns, types a line when asked,
// and wants it answered and the code 6.
func (u ctrUser) onTerminal(args []string) {
	u.t.Helper()
	must := func(err error) {
		u.t.Helper()
		if err != nil {
			u.t.Fatal(err)
		}
	}
	ours, name, err := console.NewPty()
	must(err)
	defer ours.Close()
	must(ours.Resize(console.WinSize{Height: 33, Width: 77}))
	theirs, err := os.OpenFile(name, os.O_RDWR|syscall.O_NOCTTY, 0)
	must(err)
	cmd := u.command(args)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	must(cmd.Start())
	must(theirs.Close())
	var said lockedBuffer
	go io.Copy(&said, ours)
	says := func(want string) {
		u.t.Helper()
		eventually(u.t, soon, func() error {
			if got := said.String(); !strings.Contains(got, want) {
				return fmt.Errorf("ctr %s says %q, want %q", strings.Join(args, " "), got, want)
			}
			return nil
		})
	}
	says("asks")
	_, err = ours.Write([]byte("hello\r"))
	must(err)
	says("got hello")
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 6 {
		u.t.Errorf("%v, want exit code 6", err)
	}
}

// TestRTH_07_CtrLogFile: the output of a container goes to a file where ctr asks for that,
// and the shim makes its directory.
func TestRTH_07_CtrLogFile(t *testing.T) {
	t.Parallel()
	u := newCtrUser(t, "file")
	path := filepath.Join(t.TempDir(), "of", "app.log")
	u.exits(0, u.run([]string{"-d", "--log-uri", "file://" + path}, []string{"sh", "-c", "echo out; echo err >&2"})...)
	u.is("STOPPED")
	// runc's shim copies what is written, and no longer once the task is deleted.
	eventually(t, soon, func() error {
		text, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(text), "out\n") || !strings.Contains(string(text), "err\n") {
			return fmt.Errorf("the file has %q: %v", text, err)
		}
		return nil
	})
	u.gone(0)
	u.exits(0, "container", "rm", u.id)
}

// TestRTH_07_CtrLogger: the output of a container, and of a command in it, goes to a
// program where ctr asks for that. The program has their names and says when it is ready.
func TestRTH_07_CtrLogger(t *testing.T) {
	t.Parallel()
	u := newCtrUser(t, "logger")
	dir := t.TempDir()
	program := filepath.Join(dir, "logger")
	const script = "#!/bin/sh\nprintf x >&5; exec 5>&-\ncat <&3 >> $2/$CONTAINER_ID.out & cat <&4 >> $2/$CONTAINER_ID.err; wait\n"
	if err := os.WriteFile(program, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	uri := "binary-v2://" + program + "?into=" + dir
	has := func(file, want string) {
		t.Helper()
		eventually(t, soon, func() error {
			text, err := os.ReadFile(filepath.Join(dir, file))
			if err != nil || string(text) != want {
				return fmt.Errorf("%s is %q, want %q: %v", file, text, want, err)
			}
			return nil
		})
	}
	u.exits(0, u.run([]string{"-d", "--log-uri", uri}, []string{"sh", "-c", "echo out; echo err >&2; while :; do sleep 0.1; done"})...)
	has(u.id+".out", "out\n")
	has(u.id+".err", "err\n")
	// What the command leaves behind still writes when that has ended.
	u.exits(0, "task", "exec", "-d", "--exec-id", "says", "--log-uri", uri, u.id, "sh", "-c", "(sleep 2; echo late) & echo in it")
	has("says.out", "in it\nlate\n")
	u.gone(137, "-f")
	u.exits(0, "container", "rm", u.id)
}
