package notifier

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/lifecycle"
)

var id = strings.Repeat("a", 64)

// said is what a runtime says.
func said(t testing.TB, change func(*specs.ContainerProcessState)) []byte {
	t.Helper()
	s := specs.ContainerProcessState{
		Fds: []string{"other", specs.SeccompFdName}, Pid: 8, Metadata: `{"stop":true,"default":1,"denials":{"mount":0}}`,
		State: specs.State{ID: id, Pid: 7},
	}
	change(&s)
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func unchanged(*specs.ContainerProcessState) {}

func TestParseHello(t *testing.T) {
	h, err := parseHello(said(t, unchanged))
	if err != nil || h.container != id || h.pid != 7 || h.at != 1 || !h.Stop || h.Of("mount") != facts.EndsProcess || h.Of("reboot") != 1 {
		t.Errorf("%+v, %v", h, err)
	}
	for name, change := range map[string]func(*specs.ContainerProcessState){
		"no container":  func(s *specs.ContainerProcessState) { s.State.ID = "../x" },
		"no descriptor": func(s *specs.ContainerProcessState) { s.Fds = []string{"other"} },
		"too many": func(s *specs.ContainerProcessState) {
			s.Fds = append(make([]string, maxDescriptors), specs.SeccompFdName)
		},
		"no metadata":     func(s *specs.ContainerProcessState) { s.Metadata = "" },
		"no error number": func(s *specs.ContainerProcessState) { s.Metadata = `{"default":5000}` },
		"nor of a call":   func(s *specs.ContainerProcessState) { s.Metadata = `{"default":1,"denials":{"mount":4096}}` },
		"a negative one":  func(s *specs.ContainerProcessState) { s.Metadata = `{"default":-1}` },
	} {
		if _, err := parseHello(said(t, change)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := parseHello([]byte("{")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no JSON: %v", err)
	}
}

func FuzzHello(f *testing.F) {
	f.Add(said(f, unchanged))
	f.Add([]byte(`{"fds":["seccompFd"],"metadata":"{}"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHello(b)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("no class: %v", err)
			}
			return
		}
		if len(h.container) != 64 || h.at < 0 || h.at >= maxDescriptors {
			t.Errorf("%+v", h)
		}
		for _, name := range []string{"mount", ""} {
			if h.Of(name) > maxErrno {
				t.Errorf("%q is denied by %d", name, h.Of(name))
			}
		}
	})
}

// TestReceive: of the descriptors that come, the filter's is kept and no other,
// and none of a runtime that is not understood.
func TestReceive(t *testing.T) {
	for name, tc := range map[string]struct {
		text []byte
		send int
		ok   bool
	}{
		"as it should be": {said(t, unchanged), 2, true},
		"long":            {said(t, func(s *specs.ContainerProcessState) { s.State.Bundle = strings.Repeat("b", 200<<10) }), 2, true},
		"too few":         {said(t, unchanged), 1, false},
		"too many":        {said(t, unchanged), maxDescriptors + 2, false},
		"not understood":  {[]byte("hello"), 2, false},
	} {
		before := open(t)
		f, err := received(t, tc.text, tc.send)
		if (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
		if f != nil {
			f.Close()
		}
		if after := open(t); after != before {
			t.Errorf("%s: %d descriptors are open, %d were", name, after, before)
		}
	}
}

// received sends descriptors of a pipe and what is said of them.
func received(t *testing.T, text []byte, count int) (*os.File, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	client, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	sent := make(chan error, 1)
	go func() {
		defer client.Close()
		n, _, err := client.WriteMsgUnix(text, unix.UnixRights(slices.Repeat([]int{int(r.Fd())}, count)...), nil)
		if err == nil && n < len(text) {
			_, err = client.Write(text[n:])
		}
		sent <- err
	}()
	f, _, err := receive(server)
	if sendErr := <-sent; sendErr != nil && err == nil {
		t.Fatal(sendErr)
	}
	return f, err
}

func open(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestCallName(t *testing.T) {
	for _, tc := range []struct {
		arch   uint32
		number int32
		want   string
	}{
		{uint32(arch.X86_64.ID), 165, "mount"},
		{uint32(arch.X86_64.ID), 165 | x32, "mount"},
		{uint32(arch.I386.ID), 21, "mount"},
		{uint32(arch.AARCH64.ID), 40, "mount"},
		{uint32(arch.X86_64.ID), 100000, unknownCall},
		{1, 165, unknownCall},
	} {
		if got := (notification{arch: tc.arch, number: tc.number}).name(); got != tc.want {
			t.Errorf("%d of %#x is %s", tc.number, tc.arch, got)
		}
	}
}

// TestListen: the socket is root's, replaces what an earlier daemon left, and
// can be given up twice.
func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	group := lifecycle.New(t.Context())
	n, err := Listen(path, group, func(context.Context, string, facts.DeniedCall) error { return errors.New("nothing was sent") })
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	group.Go("run", n.Run)
	for range 2 {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := group.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}
