package daemon

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestMain(m *testing.M) { Main(m, NoCRI()) }

// TestShared: two users have the same daemon, in turn and at once, and it is
// checked for leaks when nobody has it.
func TestShared(t *testing.T) {
	needRoot(t)
	var first *Instance
	t.Run("one", func(t *testing.T) {
		d := Shared(t)
		first = d.Instance
		if again := Shared(t); again.Instance != first {
			t.Error("a second daemon in one package")
		}
		d.Stop() // the next user finds it running
	})
	t.Run("two", func(t *testing.T) {
		d := Shared(t)
		if d.Instance != first || d.PID() == 0 {
			t.Errorf("daemon %p with PID %d after %p", d.Instance, d.PID(), first)
		}
		if a, b := d.PodConfig("x"), d.PodConfig("x"); a.Metadata.Uid == b.Metadata.Uid || a.Labels[ownerLabel] == "" {
			t.Errorf("pod configs %v and %v", a, b)
		}
	})
	t.Run("leak", func(t *testing.T) {
		in, err := acquireShared()
		if err != nil {
			t.Fatal(err)
		}
		in.settle = 300 * time.Millisecond
		defer func() { in.settle = settleTimeout }()
		leak := filepath.Join(in.State, testID)
		if err := os.Mkdir(leak, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := (&Daemon{Instance: in}).releaseShared(); err == nil {
			t.Error("a leak was not reported")
		}
		if err := os.Remove(leak); err != nil {
			t.Fatal(err)
		}
	})
}
