package notifier

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// notification is struct seccomp_notif.
type notification struct {
	id         uint64
	tid, flags uint32
	number     int32
	arch       uint32
	address    uint64
	args       [6]uint64
}

// response is struct seccomp_notif_resp.
type response struct {
	id    uint64
	value int64
	errno int32
	flags uint32
}

// x32 marks calls of a second table that an x86-64 process has, nearly like
// the first.
const x32 = 1 << 30

// unknownCall is the name of calls that are in no table.
const unknownCall = "unknown"

// name is the call's on its machine.
func (n notification) name() string {
	for _, m := range []*arch.Info{arch.X86_64, arch.I386, arch.AARCH64, arch.ARM} {
		if uint32(m.ID) != n.arch {
			continue
		}
		number := int(n.number)
		if m == arch.X86_64 {
			number &^= x32
		}
		if name, ok := m.SyscallNumbers[number]; ok {
			return name
		}
	}
	return unknownCall
}

// next waits for a call; io.EOF says that no process is left to make one.
func next(raw syscall.RawConn) (n notification, err error) {
	waitErr := raw.Read(func(fd uintptr) bool {
		n, err = poll(int(fd))
		return !errors.Is(err, unix.EAGAIN)
	})
	if waitErr != nil {
		return n, waitErr
	}
	return n, err
}

// poll returns the next call, EAGAIN while there is none. It asks first: to
// receive one waits, whatever the descriptor's flags are.
func poll(fd int) (n notification, err error) {
	for {
		state := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(state, 0); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return n, os.NewSyscallError("poll", err)
		}
		got := state[0].Revents
		switch {
		case got&unix.POLLIN != 0:
		case got&(unix.POLLERR|unix.POLLNVAL) != 0:
			return n, fmt.Errorf("poll seccomp notifier: events %#x: %w", got, unix.EIO)
		case got&unix.POLLHUP != 0:
			return n, io.EOF
		default:
			return n, unix.EAGAIN
		}
		n = notification{} // the kernel wants it so
		err := ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n))
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR) {
			continue // who made it was interrupted or is gone
		}
		return n, err
	}
}

// reply lets the call fail. Its process may be gone.
func reply(raw syscall.RawConn, n notification, d facts.Denial) error {
	if d == facts.EndsProcess {
		d = facts.Denial(unix.EPERM) // it never sees that
	}
	r := response{id: n.id, errno: -int32(d)}
	err := control(raw, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// valid reports whether the call still waits, and so the number of its thread
// is still that of who made it.
func valid(raw syscall.RawConn, n notification) (bool, error) {
	id := n.id
	err := control(raw, unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&id))
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

func control(raw syscall.RawConn, request uint, arg unsafe.Pointer) (err error) {
	controlErr := raw.Control(func(fd uintptr) { err = ioctl(int(fd), request, arg) })
	if controlErr != nil {
		return controlErr
	}
	return err
}

func ioctl(fd int, request uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg)); errno != 0 {
		return os.NewSyscallError("ioctl", errno)
	}
	return nil
}

// process is one that made a call, held so that it is no other.
type process struct{ pid, fd int }

// callerOf finds the process of the thread that made a call, nil if it is gone.
func callerOf(raw syscall.RawConn, n notification) (*process, error) {
	pid, err := leader(n.tid)
	if err != nil || pid == 0 {
		return nil, err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	p := &process{pid, fd}
	// Only now: the number could have been somebody else's by then.
	if ok, err := valid(raw, n); !ok {
		p.close()
		return nil, err
	}
	return p, nil
}

// leader is the process that a thread belongs to, 0 if there is none.
func leader(tid uint32) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	_, rest, _ := bytes.Cut(text, []byte("\nTgid:"))
	value, _, _ := bytes.Cut(rest, []byte("\n"))
	return strconv.Atoi(string(bytes.TrimSpace(value)))
}

func (p *process) is(pid int) bool { return p != nil && p.pid == pid }

func (p *process) close() {
	if p != nil {
		unix.Close(p.fd)
	}
}

// end kills it. That it is gone is as good.
func (p *process) end() error {
	if p == nil {
		return nil
	}
	err := unix.PidfdSendSignal(p.fd, unix.SIGKILL, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return os.NewSyscallError("pidfd_send_signal", err)
}
