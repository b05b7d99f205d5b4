package rootfs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/facts"
)

func TestWithEntries(t *testing.T) {
	const passwd, groups = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh", "root:x:0:\ncrew:x:3000:alice\n"
	for name, tc := range map[string]struct {
		passwd, group string // "-" for no file
		user          facts.User
		wantPasswd    string
		wantGroup     string
	}{
		"known":            {passwd, groups, facts.User{UID: 1000, GID: 1000, Name: "alice"}, "", ""},
		"stranger":         {passwd, groups, facts.User{UID: 4242, GID: 77}, passwd + "\n4242:x:4242:77::/:/sbin/nologin\n", groups + "77:x:77:\n"},
		"of a known group": {passwd, groups, facts.User{UID: 4242, GID: 3000}, passwd + "\n4242:x:4242:3000::/:/sbin/nologin\n", ""},
		"no files":         {"-", "-", facts.User{UID: 4242, GID: 77}, "", ""},
		"empty files":      {"", "", facts.User{UID: 4242, GID: 77}, "4242:x:4242:77::/:/sbin/nologin\n", "77:x:77:\n"},
		"home of others":   {passwd, groups, facts.User{UID: 4242, GID: 0, Home: "/x:0:0\nevil:x:0:0"}, passwd + "\n4242:x:4242:0::/:/sbin/nologin\n", ""},
		"too large":        {strings.Repeat("#\n", maxCopied), groups, facts.User{UID: 4242}, "", ""},
	} {
		root := databases(t, tc.passwd, tc.group)
		d, err := WithEntries(root, tc.user)
		if err != nil || string(d.Passwd) != tc.wantPasswd || string(d.Group) != tc.wantGroup {
			t.Errorf("%s: %q, %q, %v", name, d.Passwd, d.Group, err)
		}
	}
	root := databases(t, "-", "-")
	if err := os.Mkdir(filepath.Join(root.Name(), "etc/passwd"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := WithEntries(root, facts.User{UID: 4242}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a directory: %v", err)
	}
}

func databases(t *testing.T, passwd, groups string) *os.File {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"passwd": passwd, "group": groups} {
		if text == "-" {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, "etc", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	root, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}
