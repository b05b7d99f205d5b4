package pool

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

func FuzzBootstrap(f *testing.F) {
	for _, s := range []string{`{"version":3,"address":"unix:///run/s","protocol":"ttrpc"}`, `{}`, `{"version":-1,"address":"x"}`, `[`, ``, `{"extensions":[{}]}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseBootstrap(data)
		if err != nil {
			if !errors.Is(err, errdefs.ErrDataLoss) {
				t.Errorf("%v has no class", err)
			}
			return
		}
		if r.GetAddress() == "" || r.GetVersion() < 2 {
			t.Errorf("accepted %q", data)
		}
	})
}

func FuzzDeleted(f *testing.F) {
	for _, s := range []string{"", "\x08\x01\x10\x07", "\x1a\x02\x08\x01", "\xff"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		exit, err := parseDeleted(data)
		if err != nil && (exit != nil || !errors.Is(err, errdefs.ErrDataLoss)) {
			t.Errorf("%+v, %v", exit, err)
		}
	})
}

func FuzzValidName(f *testing.F) {
	for _, s := range []string{"abc", "", "..", "a/b", "*", "[a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if validName(s) && (filepath.Base(s) != s || filepath.Join("/x", s) == "/x") {
			t.Errorf("%q is no name of a file", s)
		}
	})
}

func TestLookup(t *testing.T) {
	for in, want := range map[string]string{"/opt/shim": "/opt/shim", "": "", "x": ""} {
		if got := lookup(in); got != want {
			t.Errorf("lookup(%q) = %q, want %q", in, got, want)
		}
	}
	if got := filepath.Base(lookup("io.containerd.no-such.v9")); got != "containerd-shim-no-such-v9" {
		t.Errorf("lookup of a runtime's name: %q", got)
	}
}
