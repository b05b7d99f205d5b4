package lifecycle

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// TestRTH_12_Terminal: a container's terminal outlives the supervisor, and so do those who
// use it: what is typed arrives, what is said is in the session and in the log, the size
// changes, and the exit code is right. Nothing holds it any more when the container has
// ended.
func TestRTH_12_Terminal(t *testing.T) { terminalSurvives(t) }

func TestRTH_12_AnchorTerminal(t *testing.T) { terminalSurvives(t, anchored()) }

func terminalSurvives(t *testing.T, opts ...daemon.Option) {
	oursAlone(t, "tasks that outlive their shim")
	t.Parallel()
	d := start(t, append(opts, daemon.Edit(withGantry))...)
	b := boxWith(t, d, "gantry")
	c := b.script("app", "trap 'echo hung up; exit 9' HUP; trap 'echo last words; exit 6' USR1; n=0; while read l; do n=$((n+1)); echo \"$n is $l ($(stty size))\"; done; echo no more; exit 8")
	c.Tty, c.Stdin = true, true
	id := b.run(c)
	pid := b.pid(id)
	sizes := make(sizeQueue, 8)
	session := b.attach(spdyDial, &cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Tty: true}, sizes)
	said := 0
	say := func(want string) error {
		said++
		session.write(fmt.Sprintf("w%d\n", said))
		session.says(fmt.Sprintf("\n%d is w%d (", said, said))
		if got := session.out.String(); !strings.Contains(got, fmt.Sprintf("\n%d is w%d (%s)", said, said, want)) {
			return fmt.Errorf("the size is not %s: %q", want, got)
		}
		return nil
	}
	sizes <- remotecommand.TerminalSize{Width: 80, Height: 24}
	eventually(t, ample, func() error { return say("24 80") })
	if held := terminalHolders(t, d); len(held) != 1 {
		t.Errorf("the terminal is held by %v", held)
	}
	for range 3 {
		old := supervisors(t, d)[0]
		kill(t, old)
		b.alive(id, pid)
		if now := supervisors(t, d); len(now) != 1 || slices.Contains(now, old) {
			t.Fatalf("supervisors are %v, and were %d", now, old)
		}
		if err := say("24 80"); err != nil {
			t.Error(err)
		}
	}
	sizes <- remotecommand.TerminalSize{Width: 100, Height: 30}
	eventually(t, ample, func() error { return say("30 100") })
	// It ends while there is nobody, and what it said last is not lost.
	old := supervisors(t, d)[0]
	d.Kill()
	kill(t, old)
	if err := unix.Kill(pid, unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	eventually(t, ample, func() error {
		if alive(pid) {
			return errors.New("it does not end")
		}
		return nil
	})
	d.Up()
	if s := b.exited(id); s.ExitCode != 6 {
		t.Errorf("code %d", s.ExitCode)
	}
	log := logText(t, b.status(id).LogPath, "stdout")
	for n := 1; n <= said; n++ {
		if strings.Count(log, fmt.Sprintf("\n%d is w%d (", n, n)) != 1 {
			t.Errorf("line %d is not once in the log", n)
		}
	}
	if !strings.Contains(log, "last words") || strings.Contains(log, "hung up") {
		t.Errorf("the log ends with %q", log[max(0, len(log)-200):])
	}
	eventually(t, soon, func() error {
		if left := terminalHolders(t, d); len(left) > 0 {
			return fmt.Errorf("the terminal is held by %v", left)
		}
		return nil
	})
	b.remove(id)
	if err := removePod(d, b.pod); err != nil {
		t.Error(err)
	}
	noSupervisor(t, d)
	nothingLeft(t, d)
}

// alive fails the test unless a container runs as the process that it has had, and
// another supervisor answers for it.
func (b *box) alive(id string, pid int) {
	b.t.Helper()
	p := pod{b.pod, b.config}
	p.alive(b.t, b.Daemon, id, pid)
}

// terminalHolders are the processes that hold terminals for a daemon's supervisors.
func terminalHolders(t *testing.T, d *daemon.Daemon) []int {
	t.Helper()
	return started(t, func(args []string) bool {
		return args[0] == "gantry-terminal" && strings.HasPrefix(args[1], d.Dir+"/")
	})
}
