package userns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// hold calls use while a process sleeps in a new user namespace, with the
// directory of that process's namespaces. With net the process is in a new
// network namespace of that user namespace too.
func (n *Namespaces) hold(u *cri.UserNamespace, net bool, use func(ns string) error) error {
	done := make(chan error, 1)
	go func() {
		// For good: the thread changes its identity, so it ends with the
		// goroutine. Until then it has to live, as its end is the sleeper's.
		runtime.LockOSThread()
		err := errors.New("the function ended its goroutine")
		defer func() { done <- err }()
		err = protect(func() error { return n.holdHere(u, net, use) })
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

func (n *Namespaces) holdHere(u *cri.UserNamespace, net bool, use func(ns string) error) error {
	// Opened here and executed by descriptor, the program need not be
	// reachable for the namespace's users.
	program, err := os.Open(n.sleeper)
	if err != nil {
		return fmt.Errorf("open sleeper: %w", err)
	}
	defer program.Close()
	c := exec.Command("/proc/self/fd/3")
	c.Args = []string{"userns"}
	c.Env = []string{}
	c.ExtraFiles = []*os.File{program}
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: mappings(u.GetUids()),
		GidMappings: mappings(u.GetGids()),
		// Containers set their groups.
		GidMappingsEnableSetgroups: true,
		Pdeathsig:                  syscall.SIGKILL,
	}
	if net {
		// The kernel makes the user namespace first, and this one in it.
		c.SysProcAttr.Cloneflags |= unix.CLONE_NEWNET
	}
	defer end(c)
	if err := asOwner(int(u.GetUids()[0].GetHostId()), c.Start); err != nil {
		return fmt.Errorf("start a process in it: %w", err)
	}
	// Not waited for before its namespaces are used, it keeps its number.
	return use(fmt.Sprintf("/proc/%d/ns", c.Process.Pid))
}

// end kills the process, if there is one, and waits for its end.
func end(c *exec.Cmd) {
	if c.Process == nil {
		return
	}
	_ = c.Process.Kill() // fails for one that has ended
	_ = c.Wait()         // killed, which is no error here
}

func mappings(list []*cri.IDMapping) (out []syscall.SysProcIDMap) {
	for _, m := range list {
		out = append(out, syscall.SysProcIDMap{ContainerID: int(m.GetContainerId()), HostID: int(m.GetHostId()), Size: int(m.GetLength())})
	}
	return out
}

// asOwner runs start with uid as the effective user of this thread, and all of
// the thread's capabilities. The kernel lets the user who makes a namespace
// account for what is limited per user inside it, as the instances of inotify;
// were that root, all pods would share root's limits.
func asOwner(uid int, start func() error) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&hdr, &caps[0]); err != nil {
		return fmt.Errorf("get capabilities: %w", err)
	}
	// The change makes the whole process one that leaves no core.
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil {
		return fmt.Errorf("get dumpable: %w", err)
	}
	own := os.Geteuid()
	if err := setEUID(uid); err != nil {
		return err
	}
	if err := unix.Capset(&hdr, &caps[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	err = start()
	if back := setEUID(own); back != nil {
		return errors.Join(err, back)
	}
	if back := unix.Capset(&hdr, &caps[0]); back != nil {
		return errors.Join(err, fmt.Errorf("set capabilities: %w", back))
	}
	if dumpable == 1 {
		err = errors.Join(err, unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0))
	}
	return err
}

// setEUID changes the effective user of this thread alone, which syscall's
// function does not.
func setEUID(uid int) error {
	keep := ^uintptr(0)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
		return fmt.Errorf("set effective user to %d: %w", uid, errno)
	}
	return nil
}
