package notifier

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/record"
)

const (
	// maxHello bounds what a runtime says of a container: its annotations are
	// in it, and what the filter says of itself.
	maxHello = 4 << 20
	// maxDescriptors bounds what is taken of descriptors; one is needed.
	maxDescriptors = 8
	// maxErrno is the kernel's.
	maxErrno = 4095
)

// hello is what a runtime says of a process with a filter.
type hello struct {
	container string
	// pid is the container's first process.
	pid int
	facts.Notifier
	// at is the place of the filter's descriptor among those that came.
	at int
}

// parseHello reads what a runtime has sent.
func parseHello(b []byte) (h hello, err error) {
	var state specs.ContainerProcessState
	if err := json.Unmarshal(b, &state); err != nil {
		return h, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	h = hello{container: state.State.ID, pid: state.State.Pid, at: slices.Index(state.Fds, specs.SeccompFdName)}
	switch {
	case !record.ValidID(h.container):
		return h, fmt.Errorf("%.80q is no container: %w", h.container, errdefs.ErrInvalidArgument)
	case h.at < 0 || h.at >= maxDescriptors:
		return h, fmt.Errorf("no descriptor %s: %w", specs.SeccompFdName, errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal([]byte(state.Metadata), &h.Notifier); err != nil {
		return h, fmt.Errorf("metadata: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if h.Default > maxErrno {
		return h, fmt.Errorf("metadata: %d is no error number: %w", h.Default, errdefs.ErrInvalidArgument)
	}
	for name, d := range h.Denials {
		if d > maxErrno {
			return h, fmt.Errorf("metadata: %.80q: %d is no error number: %w", name, d, errdefs.ErrInvalidArgument)
		}
	}
	return h, nil
}

// receive takes one descriptor and what is said of it.
func receive(conn *net.UnixConn) (f *os.File, h hello, err error) {
	if err := conn.SetDeadline(time.Now().Add(handTimeout)); err != nil {
		return nil, h, err
	}
	buf, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*maxDescriptors))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, h, fmt.Errorf("receive descriptor: %w", err)
	}
	fds, err := descriptors(oob[:oobn])
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	if err != nil || flags&unix.MSG_CTRUNC != 0 {
		return nil, h, fmt.Errorf("receive descriptor: what came with it is not understood: %w", errors.Join(err, errdefs.ErrInvalidArgument))
	}
	// A runtime closes its side when it has said all.
	text, err := io.ReadAll(io.LimitReader(io.MultiReader(bytes.NewReader(buf[:n]), conn), maxHello+1))
	if err != nil {
		return nil, h, fmt.Errorf("receive descriptor: %w", err)
	}
	if len(text) > maxHello {
		return nil, h, fmt.Errorf("receive descriptor: more than %d bytes came: %w", maxHello, errdefs.ErrInvalidArgument)
	}
	if h, err = parseHello(text); err != nil {
		return nil, h, fmt.Errorf("read what came with a descriptor: %w", err)
	}
	if h.at >= len(fds) {
		return nil, h, fmt.Errorf("receive descriptor: %d came: %w", len(fds), errdefs.ErrInvalidArgument)
	}
	fd := fds[h.at]
	fds = slices.Delete(fds, h.at, h.at+1)
	// So that waiting for it takes no thread.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, h, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), "seccomp notifier"), h, nil
}

func descriptors(oob []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		got, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fds, err
		}
		fds = append(fds, got...)
	}
	return fds, nil
}
