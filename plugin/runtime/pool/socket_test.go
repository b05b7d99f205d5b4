package pool

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestRemoveDead(t *testing.T) {
	dir := t.TempDir()
	listen := func(name string) (string, *net.UnixListener) {
		path := filepath.Join(dir, name)
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		t.Cleanup(func() { l.Close() })
		return path, l
	}
	alive, _ := listen("alive")
	dead, l := listen("dead")
	l.Close()
	left := removeDead(t.Context(), []string{alive, dead, filepath.Join(dir, "absent")})
	if !slices.Equal(left, []string{alive}) {
		t.Errorf("left %q", left)
	}
	if _, err := os.Stat(dead); !os.IsNotExist(err) {
		t.Errorf("the dead one: %v", err)
	}
	if _, err := os.Stat(alive); err != nil {
		t.Errorf("the living one: %v", err)
	}
}
