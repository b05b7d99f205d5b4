package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	maxIDLength = 128
	// ownNS is the network namespace of the calling thread, not that of the
	// process's first one.
	ownNS = "/proc/thread-self/ns/net"
)

// NSPath is where the network namespace of the pod is pinned, existing or not.
func (n *Networks) NSPath(id string) string {
	return filepath.Join(n.conf.NetNSDir, n.prefix+id)
}

// CreateNS pins a new network namespace for the pod, loopback up, and returns
// its path. The mount is the last step: what is pinned is complete. A namespace
// pinned before is returned as it is, whatever is left of an attempt that was
// interrupted is used up.
func (n *Networks) CreateNS(ctx context.Context, id string) (string, error) {
	return n.pin(ctx, id, func(path string) error {
		return onThread(func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			return settle(path)
		})
	})
}

// PinNS pins an existing network namespace, named by a path such as
// /proc/PID/ns/net, as that of the pod and sets its loopback up. It is for
// namespaces that must be made elsewhere, inside a user namespace for one. As
// with CreateNS, one that is pinned already stays, whatever the source.
func (n *Networks) PinNS(ctx context.Context, id, source string) (string, error) {
	return n.pin(ctx, id, func(path string) error {
		return Do(source, func() error { return settle(path) })
	})
}

// settle sets loopback up in the thread's namespace and pins it at path.
func settle(path string) error {
	if err := loopbackUp(); err != nil {
		return err
	}
	if err := unix.Mount(ownNS, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	return nil
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	return nil
}

func (n *Networks) pin(ctx context.Context, id string, mount func(path string) error) (_ string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("create network namespace: %w", err)
		}
	}()
	if err := checkID(id); err != nil {
		return "", err
	}
	leave, err := n.gate.enter(ctx, id)
	if err != nil {
		return "", err
	}
	defer leave()
	path := n.NSPath(id)
	if pinned(path) {
		return path, nil
	}
	if err := os.MkdirAll(n.conf.NetNSDir, 0o755); err != nil {
		return "", err
	}
	if err := makeMountPoint(path); err != nil {
		return "", err
	}
	if err := mount(path); err != nil {
		return "", errors.Join(err, removeNS(ctx, path))
	}
	return path, nil
}

// makeMountPoint makes an empty file, or takes the one that a crash before the
// mount left behind.
func makeMountPoint(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o444)
	if err == nil {
		return f.Close()
	}
	if !errors.Is(err, os.ErrExist) {
		return err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file: %w", path, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// pinned reports whether a network namespace is mounted at path.
func pinned(path string) bool {
	fd, err := openNS(path)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// openNS opens path if it is a network namespace.
func openNS(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		unix.Close(fd)
		return -1, fmt.Errorf("%s is not a network namespace: %w", path, errdefs.ErrFailedPrecondition)
	}
	return fd, nil
}

// removeNS unmounts and deletes path; it succeeds if nothing is there.
func removeNS(ctx context.Context, path string) error {
	const (
		tries = 20
		pause = 10 * time.Millisecond
	)
	for try := 0; ; try++ {
		err := unpin(path)
		if err == nil || try == tries || !errors.Is(err, unix.EBUSY) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		}
	}
}

func unpin(path string) error {
	for {
		// EINVAL: not, or no longer, a mount. An interrupted attempt may
		// have mounted twice, so go on until it says so.
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) {
			break
		}
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unmount network namespace %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !missing(err) {
		return fmt.Errorf("remove network namespace: %w", err)
	}
	return nil
}

// List returns the IDs of the pods that have a network namespace, or what an
// interrupted CreateNS left of one. It takes no notice of other files in the
// directory, those of another daemon with the same naming included.
func (n *Networks) List() ([]string, error) {
	entries, err := os.ReadDir(n.conf.NetNSDir)
	if missing(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	var ids []string
	for _, e := range entries {
		id, ours := strings.CutPrefix(e.Name(), n.prefix)
		if ours && checkID(id) == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// Do runs fn in the network namespace at path. What fn opens stays in that
// namespace after Do; a goroutine that fn starts does not run in it. A panic in
// fn is returned as an error.
func Do(path string, fn func() error) error {
	fd, err := openNS(path)
	if err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	defer unix.Close(fd)
	return onThread(func() error {
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", path, err)
		}
		return fn()
	})
}

// onThread runs fn, which may change the thread's network namespace, on a
// thread of its own and brings it back. A thread that cannot be brought back
// ends with its goroutine.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open(ownNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		err = errors.New("the function ended its goroutine")
		defer func() {
			if unix.Setns(home, unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			unix.Close(home)
			done <- err
		}()
		err = protect(fn)
	}()
	return <-done
}

func protect(fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return fn()
}
