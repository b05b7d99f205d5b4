package pool

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
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

func TestListener(t *testing.T) {
	const table = `Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000003 00000000 00000000 0001 03 111 /run/s/a
0000000000000000: 00000002 00000000 00010000 0001 01 222 /run/s/a
0000000000000000: 00000002 00000000 00010000 0001 01 333 /run/s/ab
0000000000000000: 00000002 00000000 00010000 0001 01 444 /run/s/a b
0000000000000000: 00000003 00000000 00000000 0001 03 555
0000000000000000: 00000002 00000000 zz 0001 01 666 /run/s/c
`
	for path, want := range map[string]string{"/run/s/a": "222", "/run/s/ab": "333", "/run/s/a b": "444", "/run/s": "", "/run/s/c": "", "": ""} {
		if got, err := listener(strings.NewReader(table), path); got != want || err != nil {
			t.Errorf("%q: inode %q, %v, want %q", path, got, err, want)
		}
	}
}
