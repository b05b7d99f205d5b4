package userns_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/userns"
)

const hostRoot = 300000

func sandbox() record.Sandbox {
	return record.Sandbox{ID: record.NewID(), Config: &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{
		SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{
			Uids: []*cri.IDMapping{{HostId: hostRoot, Length: 1000}},
			Gids: []*cri.IDMapping{{HostId: hostRoot + 7, Length: 500}},
		}}},
	}}}
}

func open(t *testing.T) *userns.Namespaces {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("namespaces need root")
	}
	n, err := userns.New(filepath.Join(t.TempDir(), "userns"), sleeper(t))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// sleeper is a program that sleeps when it is called without arguments, where
// only root could reach it by name.
func sleeper(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sleeper")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nexec sleep 3600\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// within runs a command in the namespace.
func within(t *testing.T, ns string, command ...string) string {
	t.Helper()
	out, err := exec.Command("nsenter", append([]string{"--user=" + ns}, command...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v: %s", command, err, out)
	}
	return strings.Join(strings.Fields(string(out)), " ")
}

func TestCreate(t *testing.T) {
	n, sb, ctx := open(t), sandbox(), context.Background()
	path := n.Path(sb.ID)
	for range 2 { // the second replaces what it finds
		if err := n.Create(ctx, sb, nil); err != nil {
			t.Fatal(err)
		}
	}
	for file, want := range map[string]string{
		"uid_map": fmt.Sprintf("0 %d 1000", hostRoot), "gid_map": fmt.Sprintf("0 %d 500", hostRoot+7), "setgroups": "allow",
	} {
		if got := within(t, path, "cat", "/proc/self/"+file); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if owner, err := unix.IoctlGetUint32(int(f.Fd()), unix.NS_GET_OWNER_UID); err != nil || owner != hostRoot {
		t.Errorf("the owner is %d, %v", owner, err)
	}
	if euid := os.Geteuid(); euid != 0 {
		t.Errorf("the thread is user %d", euid)
	}
	for range 2 {
		if err := n.Remove(ctx, sb); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after the removal: %v", err)
	}
	if left := children(t); len(left) > 0 {
		t.Errorf("processes are left: %q", left)
	}
}

func children(t *testing.T) (names []string) {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range tasks {
		if text, err := os.ReadFile(f); err == nil { // else the thread has ended
			names = append(names, strings.Fields(string(text))...)
		}
	}
	return names
}

// The network namespace belongs to the user namespace, also when that is all
// that is left of either.
func TestCreateAdopts(t *testing.T) {
	n, sb, ctx := open(t), sandbox(), context.Background()
	var net *os.File
	if err := n.Create(ctx, sb, func(netns string) (err error) {
		net, err = os.Open(netns)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer net.Close()
	defer n.Remove(ctx, sb)
	owner, err := unix.IoctlRetInt(int(net.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(owner)
	var a, b unix.Stat_t
	if err := errors.Join(unix.Fstat(owner, &a), unix.Stat(n.Path(sb.ID), &b)); err != nil || a.Ino != b.Ino {
		t.Errorf("owned by %d, pinned is %d, %v", a.Ino, b.Ino, err)
	}
}

// Whatever fails, nothing is left.
func TestCreateFails(t *testing.T) {
	ctx := context.Background()
	struck := errors.New("struck")
	for name, tc := range map[string]struct {
		adopt func(string) error
		spoil func(*cri.UserNamespace)
		want  string
	}{
		"adopt fails":  {func(string) error { return struck }, nil, struck.Error()},
		"adopt panics": {func(string) error { panic("boom") }, nil, "boom"},
		"bad mapping":  {nil, func(u *cri.UserNamespace) { u.Uids[0].Length = 0 }, "start a process"},
	} {
		t.Run(name, func(t *testing.T) {
			n, sb := open(t), sandbox()
			if tc.spoil != nil {
				tc.spoil(sb.UserNS())
			}
			if err := n.Create(ctx, sb, tc.adopt); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v", err)
			}
			if _, err := os.Lstat(n.Path(sb.ID)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("left behind: %v", err)
			}
			if left := children(t); len(left) > 0 {
				t.Errorf("processes are left: %q", left)
			}
		})
	}
}

func TestGC(t *testing.T) {
	n, kept, gone, ctx := open(t), sandbox(), sandbox(), context.Background()
	for _, sb := range []record.Sandbox{kept, gone} {
		if err := n.Create(ctx, sb, nil); err != nil {
			t.Fatal(err)
		}
	}
	away := errors.New("the store is away")
	if err := n.GC(ctx, func(context.Context) ([]string, error) { return nil, away }); !errors.Is(err, away) {
		t.Errorf("without knowing who lives: %v", err)
	}
	if err := n.GC(ctx, func(context.Context) ([]string, error) { return []string{kept.ID}, nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(n.Path(gone.ID)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("that of a pod that is gone: %v", err)
	}
	within(t, n.Path(kept.ID), "true")
	if err := n.Remove(ctx, kept); err != nil {
		t.Fatal(err)
	}
}

// A pod in the node's user namespace has none here.
func TestNone(t *testing.T) {
	n := open(t)
	if err := n.Remove(context.Background(), record.Sandbox{ID: record.NewID(), Config: &cri.PodSandboxConfig{}}); err != nil {
		t.Error(err)
	}
}
