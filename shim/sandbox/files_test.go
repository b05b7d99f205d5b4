package sandbox

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestResolvConf(t *testing.T) {
	got := resolvConf(&cri.DNSConfig{Servers: []string{"10.0.0.1", "10.0.0.2"}, Searches: []string{"a.b", "c"}, Options: []string{"ndots:5"}})
	if want := "search a.b c\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := resolvConf(nil); got != "" {
		t.Errorf("without settings %q", got)
	}
}

func TestFiles(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	state := t.TempDir()
	dir := filepath.Join(state, "s")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r := Record{ID: "s", Files: true, IPC: true, Hostname: "h", Resolv: "nameserver 10.0.0.1\n", Users: []specs.LinuxIDMapping{{HostID: 70000, Size: 10}}}
	if err := r.makeFiles(dir); err != nil {
		t.Fatal(err)
	}
	files, err := Files(state)("s")
	if err != nil || len(files) != len(places) {
		t.Fatalf("files are %v, %v", files, err)
	}
	for at, want := range map[string]string{"/etc/hostname": "h\n", "/etc/resolv.conf": r.Resolv} {
		var st unix.Stat_t
		text, err := os.ReadFile(files[at])
		if err != nil || string(text) != want || unix.Stat(files[at], &st) != nil || st.Uid != 70000 || st.Gid != 0 {
			t.Errorf("%s of %d:%d is %q, %v", at, st.Uid, st.Gid, text, err)
		}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(files["/dev/shm"], &fs); err != nil || fs.Type != unix.TMPFS_MAGIC || fs.Blocks*uint64(fs.Bsize) != 64<<20 {
		t.Errorf("shared memory is %+v, %v", fs, err)
	}
	for range 2 {
		if err := dropFiles(dir); err != nil {
			t.Error(err)
		}
	}
	if files, err := Files(state)("s"); err != nil || files != nil {
		t.Errorf("afterwards there are %v, %v", files, err)
	}
	if err := (Record{}).makeFiles(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, filesDir)); err == nil {
		t.Error("a sandbox that is to have no files has some")
	}
}
