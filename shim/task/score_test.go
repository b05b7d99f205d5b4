package task

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestSetScore: a command gets its score after it has started others, and they get it
// too, but for one that has chosen its own.
func TestSetScore(t *testing.T) {
	const script = `sleep 1000 & a=$!
sh -c 'sleep 1000 & echo $!; wait' &
sh -c 'echo 777 >/proc/self/oom_score_adj; echo chosen; exec sleep 1000' & b=$!
echo $a; echo of $b; wait`
	cmd := exec.Command("sh", "-c", script)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var children []string
	var own string
	for lines, n := bufio.NewScanner(out), 0; n < 4 && lines.Scan(); n++ {
		if pid, ok := strings.CutPrefix(lines.Text(), "of "); ok {
			own = pid
		} else if lines.Text() != "chosen" {
			children = append(children, lines.Text())
		}
	}
	t.Cleanup(func() {
		for _, pid := range append(children, own) {
			if err := exec.Command("kill", "-9", pid).Run(); err != nil {
				t.Errorf("end %s: %v", pid, err)
			}
		}
		cmd.Wait() // the code is the script's
	})
	if err := setScore(cmd.Process.Pid, new(900)); err != nil {
		t.Fatal(err)
	}
	if len(children) != 2 {
		t.Fatalf("it has the children %q", children)
	}
	for _, pid := range append(children, fmt.Sprint(cmd.Process.Pid)) {
		if got := scoreText(t, pid); got != "900" {
			t.Errorf("process %s has %s", pid, got)
		}
	}
	if got := scoreText(t, own); got != "777" {
		t.Errorf("who has chosen 777 has %s", got)
	}
}

// TestSetScoreOfNone: there is nothing to do, or nobody.
func TestSetScoreOfNone(t *testing.T) {
	before := scoreText(t, "self")
	if err := setScore(os.Getpid(), nil); err != nil || scoreText(t, "self") != before {
		t.Errorf("without a score: %v, the process has %s", err, scoreText(t, "self"))
	}
	const nobody = 1 << 22 // the kernel's largest number is one less
	if err := setScore(nobody, new(900)); err != nil {
		t.Errorf("of no process: %v", err)
	}
}

func scoreText(t *testing.T, pid string) string {
	t.Helper()
	text, err := os.ReadFile("/proc/" + pid + "/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}
