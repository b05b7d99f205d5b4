package host

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestProcessStart(t *testing.T) {
	before := time.Now()
	cmd := exec.Command("sleep", "100")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	got := ProcessStart(uint32(cmd.Process.Pid))
	if got.Before(before.Add(-50*time.Millisecond)) || got.After(time.Now().Add(50*time.Millisecond)) {
		t.Errorf("a process of now began at %v, %v away", got, time.Since(got))
	}
	if got := ProcessStart(1 << 30); !got.IsZero() {
		t.Errorf("no process began at %v", got)
	}
	if self := ProcessStart(uint32(os.Getpid())); self.IsZero() || self.After(got) {
		t.Errorf("this process began at %v", self)
	}
}

func TestStartTicks(t *testing.T) {
	for stat, want := range map[string]uint64{
		"1 (a b) c) S 0 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 10": 4711,
		"1 (a": 0, "": 0, ")": 0, "1 (a) S 1": 0,
	} {
		if got, _ := startTicks([]byte(stat)); got != want {
			t.Errorf("%q: %d, want %d", stat, got, want)
		}
	}
}
