package network_test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/gantry-cri/gantry/plugin/network"
	"golang.org/x/sys/unix"
)

// TestCreateNS starts from what a kill between any two steps leaves.
func TestCreateNS(t *testing.T) {
	for _, c := range []struct {
		name  string
		left  func(path string) error
		wants func(error) bool
	}{
		{"nothing", func(string) error { return nil }, nil},
		{"the file", func(p string) error { return os.WriteFile(p, nil, 0o444) }, nil},
		{"a mount of something else", func(p string) error {
			return errors.Join(os.WriteFile(p, nil, 0o444), unix.Mount("/proc/self/ns/uts", p, "", unix.MS_BIND, ""))
		}, nil},
		{"a directory", func(p string) error { return os.Mkdir(p, 0o755) }, errdefs.IsFailedPrecondition},
		{"a link", func(p string) error { return os.Symlink("/etc/passwd", p) }, errdefs.IsFailedPrecondition},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.open()
			path := h.net.NSPath("a1")
			mustDo(t, os.MkdirAll(filepath.Dir(path), 0o755))
			mustDo(t, c.left(path))
			got, err := h.net.CreateNS(t.Context(), "a1")
			if c.wants != nil {
				if !c.wants(err) {
					t.Errorf("create: %v", err)
				}
				mustDo(t, os.Remove(path))
				return
			}
			mustDo(t, err)
			if got != path {
				t.Errorf("path %s, want %s", got, path)
			}
			mustDo(t, network.Do(path, loopbackOnly))
			h.detach("a1")
		})
	}
}

// loopbackOnly wants to be in a namespace with lo alone, and that up.
func loopbackOnly() error {
	links, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, l := range links {
		if up := l.Flags&net.FlagUp != 0; up != (l.Name == "lo") {
			return errors.New("interface " + l.Name + " is " + l.Flags.String())
		}
	}
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		if err := l.Close(); err != nil {
			return err
		}
	}
	return nil
}

// TestList tells our namespaces from other files, those of a daemon with
// another cache included, and GC leaves these alone.
func TestList(t *testing.T) {
	h := newHost(t)
	first := h.open()
	_, err := first.CreateNS(t.Context(), "a1")
	mustDo(t, err)
	h.conf.CacheDir = filepath.Join(h.root, "cache2")
	second := h.open()
	_, err = second.CreateNS(t.Context(), "b1")
	mustDo(t, err)
	foreign := filepath.Join(h.conf.NetNSDir, "cni-0123")
	mustDo(t, os.WriteFile(foreign, nil, 0o644))
	for n, want := range map[*network.Networks]string{first: "a1", second: "b1"} {
		if ids, err := n.List(); err != nil || strings.Join(ids, " ") != want {
			t.Errorf("list: %v, %v, want %s", ids, err, want)
		}
	}
	mustDo(t, second.Detach(t.Context(), pod("b1")))
	if ids, err := first.List(); err != nil || len(ids) != 1 {
		t.Errorf("list: %v, %v", ids, err)
	}
	mustDo(t, first.Detach(t.Context(), pod("a1")))
	if _, err := os.Stat(foreign); err != nil {
		t.Error(err)
	}
	mustDo(t, os.Remove(foreign))
}

// TestPinNS pins a namespace that another process made in a user namespace.
func TestPinNS(t *testing.T) {
	h := newHost(t)
	h.open()
	c := exec.Command("sleep", "3600")
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 1000}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 1000}},
	}
	mustDo(t, c.Start())
	source := filepath.Join("/proc", strconv.Itoa(c.Process.Pid), "ns", "net")
	want, err := os.Stat(source)
	mustDo(t, err)
	path, err := h.net.PinNS(t.Context(), "a1", source)
	mustDo(t, err)
	mustDo(t, c.Process.Kill())
	_ = c.Wait() // killed
	got, err := os.Stat(path)
	mustDo(t, err)
	if !os.SameFile(want, got) {
		t.Error("another namespace is pinned")
	}
	mustDo(t, network.Do(path, loopbackOnly))
	h.detach("a1")
	if _, err := h.net.PinNS(t.Context(), "a2", "/etc/passwd"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("pin a file: %v", err)
	}
}

// TestDo leaves neither a thread nor the caller in another namespace, however
// the function ends.
func TestDo(t *testing.T) {
	h := newHost(t)
	h.open()
	path, err := h.net.CreateNS(t.Context(), "a1")
	mustDo(t, err)
	inside, err := os.Stat(path)
	mustDo(t, err)
	sentinel := errors.New("sentinel")
	if err := network.Do(path, func() error {
		now, err := os.Stat("/proc/thread-self/ns/net")
		if err != nil || !os.SameFile(now, inside) {
			t.Errorf("not in the namespace: %v", err)
		}
		return sentinel
	}); !errors.Is(err, sentinel) {
		t.Errorf("error: %v", err)
	}
	if err := network.Do(path, func() error { panic("boom") }); err == nil || !strings.Contains(err.Error(), "boom") {
		t.Errorf("panic: %v", err)
	}
	if err := network.Do(path, func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("goexit: no error")
	}
	if err := network.Do(filepath.Join(h.root, "none"), func() error { return nil }); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no namespace: %v", err)
	}
	for range 200 {
		mustDo(t, network.Do(path, func() error { return nil }))
	}
	tasks, err := os.ReadDir("/proc/self/task")
	mustDo(t, err)
	if len(tasks) > 100 {
		t.Errorf("%d threads", len(tasks))
	}
	for _, task := range tasks {
		ns, err := os.Stat(filepath.Join("/proc/self/task", task.Name(), "ns", "net"))
		if err == nil && os.SameFile(ns, inside) {
			t.Errorf("thread %s stayed in the namespace", task.Name())
		}
	}
	h.detach("a1")
}
