package keeper

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// What keeper.c says about packets.
const (
	opKeep = 'K'
	opDrop = 'D'
	opList = 'L'

	maxName  = 255
	maxFiles = 4

	replyDone   = 0
	replyFull   = 2
	replyNoMore = 4
)

// A session that had one of these errors is of no use any more.
var (
	errGone   = errors.New("the keeper has ended")
	errSilent = errors.New("the keeper does not answer")
)

// session is a connection to a keeper, for one goroutine.
type session struct {
	conn     *net.UnixConn
	replies  chan []byte // closed when the keeper has gone
	patience time.Duration
	since    time.Time
}

// newSession takes conn over. Patience is what the keeper has to answer, which
// takes it microseconds.
func newSession(conn *net.UnixConn, patience time.Duration) *session {
	s := &session{conn: conn, replies: make(chan []byte, 1), patience: patience, since: time.Now()}
	go s.read()
	return s
}

func (s *session) read() {
	defer close(s.replies)
	b := make([]byte, 1+maxName)
	for {
		n, err := s.conn.Read(b)
		if err != nil {
			return
		}
		s.replies <- bytes.Clone(b[:n])
	}
}

// close may be called once; it waits for the reading goroutine.
func (s *session) close() {
	_ = s.conn.Close()
	for range s.replies {
	}
}

func (s *session) call(op byte, text []byte, fds ...int) ([]byte, error) {
	_ = s.conn.SetWriteDeadline(time.Now().Add(s.patience)) // fails as the write will
	var rights []byte
	if len(fds) > 0 { // without any the kernel wants none
		rights = unix.UnixRights(fds...)
	}
	_, _, err := s.conn.WriteMsgUnix(append([]byte{op}, text...), rights, nil)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("%w: %w", errSilent, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errGone, err)
	}
	late := time.NewTimer(s.patience)
	defer late.Stop()
	select {
	case r, ok := <-s.replies:
		if !ok || len(r) == 0 {
			return nil, errGone
		}
		return r, nil
	case <-late.C:
		return nil, fmt.Errorf("%w within %s", errSilent, s.patience)
	}
}

func (s *session) keep(name string, fifos []string) error {
	fds, err := openAll(fifos)
	defer closeAll(fds)
	if err != nil {
		return err
	}
	r, err := s.call(opKeep, []byte(name), fds...)
	return result(r, err)
}

func (s *session) drop(name string) error {
	r, err := s.call(opDrop, []byte(name))
	return result(r, err)
}

// name returns the n-th name; false when there are not so many.
func (s *session) name(n int) (string, bool, error) {
	r, err := s.call(opList, binary.NativeEndian.AppendUint32(nil, uint32(n)))
	if err == nil && r[0] == replyNoMore {
		return "", false, nil
	}
	if err := result(r, err); err != nil {
		return "", false, err
	}
	return string(r[1:]), true, nil
}

func result(reply []byte, err error) error {
	switch {
	case err != nil:
		return err
	case reply[0] == replyDone:
		return nil
	case reply[0] == replyFull:
		return fmt.Errorf("the keeper holds as much as it can: %w", errdefs.ErrResourceExhausted)
	}
	return fmt.Errorf("the keeper refuses (%d): %w", reply[0], errdefs.ErrInvalidArgument)
}

// openAll opens reading ends. They are only readers: they change nothing about
// when an end of output is seen.
func openAll(fifos []string) (fds []int, err error) {
	for _, path := range fifos {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fds, &os.PathError{Op: "open", Path: path, Err: err}
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
