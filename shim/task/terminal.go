package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/pause"
	"github.com/gantry-cri/gantry/shim/anchor"
	"github.com/gantry-cri/gantry/shim/process"
)

const (
	// terminalHolder is the name of the process that has a container's terminal open.
	terminalHolder = "gantry-terminal"
	// terminalFile is the number of the terminal there, and outputFile of what it is
	// copied to.
	terminalFile, outputFile = 3, 4
	// holderPin is the file by which the next supervisor finds the process.
	holderPin = "terminal"
)

// holdTerminal has a process that does nothing have the terminal of a container open, and
// the FIFOs that it is copied from and to: when the last one closes a terminal, the kernel
// hangs up those who use it, and the supervisor may die. The process ends with the
// streams, or with the container's record. Where there can be none, the terminal ends with
// the supervisor.
func (c *container) holdTerminal(ctx context.Context, s *streams) {
	if err := c.hold(s); err != nil {
		log.G(ctx).WithError(err).WithField("task", c.ID).Warn("a terminal will not outlive its supervisor")
	}
}

func (c *container) hold(s *streams) error {
	binary, err := pause.Binary()
	if err != nil {
		return err
	}
	program, err := anchor.InMemory(terminalHolder, binary)
	if err != nil {
		return err
	}
	defer program.Close()
	var files []uintptr
	for _, f := range []*os.File{s.console, s.out, s.in} {
		if f == nil {
			continue
		}
		// Not File.Fd, which would take them out of the poller. They stay open meanwhile.
		if err := control(f, func(fd int) error { files = append(files, uintptr(fd)); return nil }); err != nil {
			return err
		}
	}
	// An empty file says that there may be one whose number was not written down.
	pin := filepath.Join(c.dir, holderPin)
	if err := os.WriteFile(pin, nil, 0o600); err != nil {
		return err
	}
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), program.Fd())
	s.holder, err = spawn(pin, path, []string{terminalHolder, c.dir}, nil, files)
	return err
}

// retakeTerminal takes the terminal of a container whose supervisor died, and goes on to
// copy. What that one had read and not written yet is lost.
func (c *container) retakeTerminal(ctx context.Context) *streams {
	s := &streams{}
	if err := c.retake(s); err != nil {
		if c.Exit == nil || !errdefs.IsNotFound(err) {
			log.G(ctx).WithError(err).WithField("task", c.ID).Warn("the terminal of a container is not taken over")
		}
		// Whoever comes next may be able to.
		if s.holder != nil {
			s.holder.Close()
			s.holder = nil
		}
		s.Close()
		return &streams{}
	}
	return s
}

func (c *container) retake(s *streams) (err error) {
	if s.holder, err = process.OpenPinned(filepath.Join(c.dir, holderPin), 0); err != nil {
		return err
	}
	if s.out, err = s.reopen(c.Stdio.Stdout); err != nil {
		return err
	}
	if s.in, err = s.reopen(c.Stdio.Stdin); err != nil {
		return err
	}
	fd, err := s.holder.File(terminalFile)
	if err != nil {
		return err
	}
	return s.attach(fd)
}

// reopen opens what openTerminal did, without a wait for anybody. The pipe of a logger is
// the holder's.
func (s *streams) reopen(path string) (*os.File, error) {
	o, err := parseOutput(path)
	switch {
	case path == "" || err != nil:
		return nil, err
	case o.file != "":
		return openRaw(o.file, unix.O_WRONLY|unix.O_APPEND)
	case o.program == nil:
		return os.OpenFile(path, os.O_RDWR, 0)
	}
	fd, err := s.holder.File(outputFile)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), path), nil
}

// endHolder ends a process that has a terminal open. It is this process's child, unless
// an earlier supervisor has made it.
func endHolder(p *process.Process) {
	if err := p.Signal(unix.SIGKILL); err == nil {
		<-p.Done()
	}
	p.Reap()
	p.Close()
}

// dropHolder ends what may be left of it when the container's record goes.
func dropHolder(dir string) error {
	pin := filepath.Join(dir, holderPin)
	st, err := os.Stat(pin)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil && st.Size() == 0 {
		err = killUnnoted(dir)
	} else if err == nil {
		var p *process.Process
		if p, err = process.OpenPinned(pin, 0); err == nil {
			endHolder(p)
		}
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("end the holder of a terminal: %w", err)
	}
	return process.Unpin(pin)
}

// killUnnoted ends a holder whose supervisor died before it wrote the number down: by what
// it was started with, which nobody else is.
func killUnnoted(dir string) error {
	found, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, file := range found {
		line, err := os.ReadFile(file)
		if err != nil || string(line) != terminalHolder+"\x00"+dir+"\x00" {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return err
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}
