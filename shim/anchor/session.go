package anchor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// What anchor.c says about packets: an operation and a number, a result and three.
const (
	opHold    = 'H'
	opRelease = 'R'
	opKeep    = 'K'
	opPin     = 'P'
	opDrop    = 'D'
	opStatus  = 'S'

	resultDone    = 0
	resultFull    = 2
	resultNoChild = 3
	resultUnknown = 4
	resultRuns    = 5

	askSize    = 2 * 8
	answerSize = 4 * 8
)

const (
	// patience is what an anchor has to answer, which takes it microseconds.
	patience = 10 * time.Second
	// busyPause is before a place in the queue of its connections is tried for again.
	busyPause = 5 * time.Millisecond
)

// ID is what an anchor knows a process by, also when another one has its number.
type ID uint64

// End is how a process ended, as wait(2) has it.
type End struct {
	Status unix.WaitStatus
	At     time.Time
}

// Session is a connection to an anchor. It is safe for concurrent use.
//
// An error is Unavailable when the anchor has ended or does not answer, which is for
// good: the session is over then.
type Session struct {
	turn chan struct{} // capacity 1
	conn net.Conn
}

// Dial connects to the anchor that listens at a socket. NotFound says that there is
// none.
func Dial(socket string) (*Session, error) {
	conn, err := connect(socket)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, fmt.Errorf("the anchor has ended: %w: %w", errdefs.ErrNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to the anchor: %w: %w", errdefs.ErrUnavailable, err)
	}
	return &Session{turn: make(chan struct{}, 1), conn: conn}, nil
}

// connect waits for a place in the queue, which all who end at once may fill.
func connect(socket string) (net.Conn, error) {
	tick := time.NewTicker(busyPause)
	defer tick.Stop()
	for end := time.Now().Add(patience); ; <-tick.C {
		conn, err := net.DialTimeout("unixpacket", socket, patience)
		if !errors.Is(err, unix.EAGAIN) || time.Now().After(end) {
			return conn, err
		}
	}
}

// Close ends what the session holds and keeps.
func (s *Session) Close() error { return s.conn.Close() }

// Hold keeps children of the anchor from being reaped until Release, or until the
// session ends. Each Hold has a Release of its own.
func (s *Session) Hold() error {
	_, err := s.call(opHold, 0)
	return err
}

// Release ends a Hold.
func (s *Session) Release() error {
	_, err := s.call(opRelease, 0)
	return err
}

// Keep has the anchor keep how a child of it ends, until Drop or the end of the
// session. NotFound says that it is no child of the anchor.
func (s *Session) Keep(pid int) (ID, error) {
	r, err := s.call(opKeep, uint64(pid))
	return ID(r[1]), err
}

// Pin has it kept after the end of the session too.
func (s *Session) Pin(id ID) error {
	_, err := s.call(opPin, uint64(id))
	return err
}

// Drop ends Keep and Pin. There need be none.
func (s *Session) Drop(id ID) error {
	_, err := s.call(opDrop, uint64(id))
	return err
}

// Status returns how a process ended. FailedPrecondition says that it has not,
// NotFound that it is not kept.
func (s *Session) Status(id ID) (End, error) {
	r, err := s.call(opStatus, uint64(id))
	return End{Status: unix.WaitStatus(r[1]), At: time.Unix(int64(r[2]), int64(r[3]))}, err
}

// call asks, one after the other.
func (s *Session) call(operation byte, number uint64) (answer [4]uint64, err error) {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	buf, err := s.exchange(operation, number)
	if err != nil {
		s.conn.Close()
		return answer, fmt.Errorf("ask the anchor: %w: %w", errdefs.ErrUnavailable, err)
	}
	for i := range answer {
		answer[i] = binary.NativeEndian.Uint64(buf[8*i:])
	}
	return answer, result(answer[0])
}

func (s *Session) exchange(operation byte, number uint64) (answer [answerSize]byte, err error) {
	if err := s.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return answer, err
	}
	var ask [askSize]byte
	binary.NativeEndian.PutUint64(ask[:], uint64(operation))
	binary.NativeEndian.PutUint64(ask[8:], number)
	if _, err := s.conn.Write(ask[:]); err != nil {
		return answer, err
	}
	n, err := s.conn.Read(answer[:])
	if err == nil && n != answerSize {
		err = fmt.Errorf("an answer of %d bytes", n)
	}
	return answer, err
}

func result(r uint64) error {
	switch r {
	case resultDone:
		return nil
	case resultFull:
		return fmt.Errorf("the anchor keeps as many processes as it can: %w", errdefs.ErrResourceExhausted)
	case resultNoChild:
		return fmt.Errorf("the process is no child of the anchor: %w", errdefs.ErrNotFound)
	case resultUnknown:
		return fmt.Errorf("the anchor does not keep it: %w", errdefs.ErrNotFound)
	case resultRuns:
		return fmt.Errorf("the process has not ended: %w", errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("the anchor refuses (%d): %w", r, errdefs.ErrInvalidArgument)
}
