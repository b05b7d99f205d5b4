package oci

import (
	"bufio"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
)

func TestOptions(t *testing.T) {
	want := &options.Options{BinaryName: "/bin/crun", Root: "/r", SystemdCgroup: true, NoPivotRoot: true, IoUid: 5}
	table := &runtimeoptions.Options{ConfigBody: []byte("BinaryName = '/bin/crun'\nRoot = '/r'\nSystemdCgroup = true\nNoPivotRoot = true\nIoUid = 5\n")}
	for name, in := range map[string]proto.Message{"message": want, "table": table} {
		a, err := typeurl.MarshalAny(in)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Options(a); err != nil || !proto.Equal(got, want) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if got, err := Options(nil); err != nil || !proto.Equal(got, &options.Options{}) {
		t.Errorf("none: %v, %v", got, err)
	}
	for name, in := range map[string]proto.Message{
		"path":      &runtimeoptions.Options{ConfigPath: "/etc/x.toml"},
		"not TOML":  &runtimeoptions.Options{ConfigBody: []byte("= 1")},
		"a process": &options.ProcessDetails{},
	} {
		a, err := typeurl.MarshalAny(in)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Options(a); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestLastError(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "not JSON\n": "",
		`{"level":"error","msg":"first"}` + "\n" + `{"level":"error","msg":" second\n"}` + "\n" + `{"level":"warning","msg":"third"}`: "second",
	} {
		if got := lastError(bufio.NewScanner(strings.NewReader(in))); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func FuzzLastError(f *testing.F) {
	f.Add(`{"level":"error","msg":"x"}`)
	f.Fuzz(func(_ *testing.T, s string) { lastError(bufio.NewScanner(strings.NewReader(s))) })
}

func FuzzFromTable(f *testing.F) {
	f.Add([]byte("Root = '/r'"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = fromTable(b) })
}
