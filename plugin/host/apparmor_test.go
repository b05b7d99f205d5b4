package host

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// parser puts a program in the place of apparmor_parser that keeps what it is
// given, and ends with the code.
func parser(t *testing.T, code string) (given func() string) {
	t.Helper()
	dir := t.TempDir()
	text := "#!/bin/sh\necho \"$@\" >" + dir + "/given; cat >>" + dir + "/given; echo line 7: no >&2; exit " + code + "\n"
	if err := os.WriteFile(filepath.Join(dir, appArmorParser), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func() string {
		b, err := os.ReadFile(filepath.Join(dir, "given"))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return string(b)
	}
}

func TestNeedAppArmor(t *testing.T) {
	root := t.TempDir()
	file := filepath.Join(root, appArmorProfiles)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("mine (enforce)\nwith space (x) (complain)\nmine-too (kill)\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	given := parser(t, "0")
	p := prober{root: root}
	for name, loaded := range map[string]bool{"": true, "mine": true, "with space (x)": true, "mine-too": true, "min": false, "mine (enforce)": false, "space": false} {
		err := p.needAppArmor(name, "own")
		if loaded && err != nil || !loaded && (!errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), name)) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if got := given(); got != "" {
		t.Errorf("a profile was loaded: %s", got)
	}
	if err := p.needAppArmor("own", "own"); err != nil || !strings.Contains(given(), "profile own flags=") {
		t.Errorf("the default profile that was removed: %v, %q", err, given())
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := p.needAppArmor("mine", "own"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a list: %v", err)
	}
}

func TestLoadAppArmor(t *testing.T) {
	given := parser(t, "0")
	if err := LoadAppArmor("a.profile"); err != nil {
		t.Fatal(err)
	}
	text := given()
	for _, want := range []string{"--replace", "profile a.profile flags=", "signal (send, receive) peer=a.profile,", "deny mount,", "signal (receive) peer=unconfined,"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %s", want, text)
		}
	}
	if strings.Contains(text, "NAME") || strings.Count(text, "{") != strings.Count(text, "}") {
		t.Errorf("the text is %s", text)
	}
	parser(t, "1")
	if err := LoadAppArmor("a.profile"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "line 7") || !strings.Contains(err.Error(), "a.profile") {
		t.Errorf("a parser that refuses: %v", err)
	}
}
