package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/gantry-cri/gantry/shim/anchor"
)

// pinned is what a file says of a process whose end the kernel does not keep. The
// number and the beginning name the process; the rest is who knows how it ended.
type pinned struct {
	Pid   int
	Start uint64
	// Anchor is the socket of the anchor that keeps the process, "" for none.
	Anchor string    `json:",omitempty"`
	ID     anchor.ID `json:",omitempty"`
}

// readPin reads the pin of a file, or false if that is none, such as a pidfd.
func readPin(path string) (p pinned, ok bool) {
	text, err := os.ReadFile(path)
	if err != nil {
		return p, false
	}
	return parsePin(text)
}

func parsePin(text []byte) (p pinned, ok bool) {
	err := json.Unmarshal(text, &p)
	return p, err == nil && p.Pid > 0
}

// named is the process that has a number now, and that nobody reaps meanwhile.
func named(pid int) pinned {
	s, _ := readStat(pid)
	return pinned{Pid: pid, Start: s.start}
}

// Note has OpenPinned find the process that has the number now by the file path, as long
// as it runs. Nobody keeps how it ends.
func Note(path string, pid int) error { return named(pid).write(path) }

func (p pinned) write(path string) error {
	text, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o600)
}

// open returns the process of a pin, also of one whose anchor has ended, as long as
// it runs.
func (p pinned) open() (*Process, error) {
	// First the descriptor: if the anchor says then that it has not ended, the
	// number was its own all the time.
	fd, gone := openFD(p.Pid)
	exit, err := p.exit()
	kept := &byAnchor{pinned: p}
	switch {
	case err == nil:
		if gone == nil {
			os.NewFile(uintptr(fd), "pidfd").Close()
		}
		return over(p.Pid, exit, kept), nil
	case gone != nil:
		return nil, fmt.Errorf("open pinned process: %w: %w: %w", errdefs.ErrNotFound, gone, err)
	case errdefs.IsFailedPrecondition(err):
		return watch(p.Pid, fd, kept), nil
	case p.lives():
		return watch(p.Pid, fd, stranger(p)), nil
	}
	os.NewFile(uintptr(fd), "pidfd").Close()
	return nil, fmt.Errorf("open pinned process: %w: %w", errdefs.ErrNotFound, err)
}

// lives reports whether the number is the process's own, ended or not.
func (p pinned) lives() bool {
	s, ok := readStat(p.Pid)
	return ok && p.Start != 0 && s.start == p.Start
}

// ask calls the anchor of the pin.
func (p pinned) ask(do func(*anchor.Session) error) error {
	if p.Anchor == "" {
		return fmt.Errorf("no anchor keeps it: %w", errdefs.ErrNotFound)
	}
	s, err := anchor.Dial(p.Anchor)
	if err != nil {
		return err
	}
	defer s.Close()
	return do(s)
}

// exit returns how the process ended; FailedPrecondition says that it has not.
func (p pinned) exit() (exit Exit, err error) {
	err = p.ask(func(s *anchor.Session) error {
		exit, err = exitOf(s, p.ID)
		return err
	})
	return exit, err
}

// drop has the anchor forget the process. One that does not answer is no reason to
// keep a container: the anchor then stays, which costs a few pages.
func (p pinned) drop() {
	err := p.ask(func(s *anchor.Session) error { return s.Drop(p.ID) })
	if err != nil && !errdefs.IsNotFound(err) {
		log.L.WithError(err).WithField("pid", p.Pid).Warn("have an anchor forget a process")
	}
}

func exitOf(s *anchor.Session, id anchor.ID) (Exit, error) {
	end, err := s.Status(id)
	return Exit{Code: codeOf(end.Status), At: end.At}, err
}

// byAnchor is the keeping by an anchor: that of this process, with which there is a
// session, or that of an earlier supervisor.
type byAnchor struct {
	pinned
	own   *anchor.Session // nil for another's, which keeps by the pin
	stays bool            // own keeps it by a pin too
}

func (k *byAnchor) ended(fd int) (exit Exit, found bool, err error) {
	if k.own != nil {
		exit, err = exitOf(k.own, k.ID)
	}
	// A session may be over by slowness alone.
	if k.own == nil || errdefs.IsUnavailable(err) {
		exit, err = k.exit()
	}
	switch {
	case err == nil:
		return exit, true, nil
	case errdefs.IsFailedPrecondition(err):
		return Exit{}, false, nil // somebody traces it, who is told first
	}
	return stranger(k.pinned).ended(fd)
}

// pin writes the file first: what an anchor keeps for longer than this process has
// to be found by it.
func (k *byAnchor) pin(_ int, path string) error {
	if err := k.write(path); err != nil || k.own == nil {
		return err
	}
	if err := k.own.Pin(k.ID); err != nil && !errdefs.IsUnavailable(err) {
		return err
	}
	// Without the anchor the process is still found, as long as it runs.
	k.stays = true
	return nil
}

func (k *byAnchor) letGo() {
	if k.own != nil && !k.stays {
		// The error is that the anchor has ended.
		_ = k.own.Drop(k.ID)
	}
}

// stranger is a process that others reap, who tell nobody. How it ended can be seen
// for as long as it lies there.
type stranger pinned

func (k stranger) ended(int) (Exit, bool, error) {
	s, ok := readStat(k.Pid)
	if !ok || !s.zombie() || s.start != k.Start {
		return Exit{}, false, lost(errNotKept)
	}
	return exited(s.status), true, nil
}

func (k stranger) pin(_ int, path string) error { return pinned(k).write(path) }

func (stranger) letGo() {}

var errNotKept = errors.New("it was reaped")
