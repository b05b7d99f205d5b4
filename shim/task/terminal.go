package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

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
	// terminalFile is the number of the terminal there.
	terminalFile = 3
	// holderPin is the file by which the next supervisor finds the process.
	holderPin = "terminal"
)

// holdTerminal has a process that does nothing have the terminal of a container open, and
// the FIFOs that it is copied from and to: when the last one closes a terminal, the kernel
// hangs up those who use it, and the supervisor may die. The process ends with the
// streams, or with the container's record.
func (c *container) holdTerminal(s *streams) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("hold the terminal: %w", err)
		}
	}()
	binary, err := pause.Binary()
	if err != nil {
		return err
	}
	program, err := anchor.InMemory(terminalHolder, binary)
	if err != nil {
		return err
	}
	defer program.Close()
	nothing, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer nothing.Close()
	files := []uintptr{nothing.Fd(), nothing.Fd(), nothing.Fd()}
	for _, f := range []*os.File{s.console, s.out, s.in} {
		if f == nil {
			continue
		}
		// Not File.Fd, which would take them out of the poller. They stay open meanwhile.
		if err := control(f, func(fd int) error { files = append(files, uintptr(fd)); return nil }); err != nil {
			return err
		}
	}
	// The directory is for those who look at processes.
	pid, err := syscall.ForkExec(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), program.Fd()), []string{terminalHolder, c.dir},
		&syscall.ProcAttr{Dir: "/", Files: files, Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		return err
	}
	if err = process.Note(filepath.Join(c.dir, holderPin), pid); err == nil {
		s.holder, err = process.OpenPinned(filepath.Join(c.dir, holderPin), pid)
	}
	if err != nil {
		_ = unix.Kill(pid, unix.SIGKILL)
		_, _ = unix.Wait4(pid, nil, 0, nil)
	}
	return err
}

// retakeTerminal takes the terminal of a container whose supervisor died, and goes on to
// copy. What that one had read and not written yet is lost.
func (c *container) retakeTerminal(ctx context.Context) *streams {
	s := &streams{}
	if err := c.retake(s); err != nil {
		if c.Exit == nil || !errdefs.IsNotFound(err) {
			log.G(ctx).WithError(err).WithField("task", c.ID).Warn("the terminal of a container is lost with its supervisor")
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
	if s.out, err = reopen(c.Stdio.Stdout); err != nil {
		return err
	}
	if s.in, err = reopen(c.Stdio.Stdin); err != nil {
		return err
	}
	fd, err := s.holder.File(terminalFile)
	if err != nil {
		return err
	}
	return s.attach(fd)
}

// reopen opens what openTerminal did, without a wait for anybody.
func reopen(path string) (*os.File, error) {
	file, err := outputFile(path)
	switch {
	case path == "" || err != nil:
		return nil, err
	case file != "":
		return openRaw(file, unix.O_WRONLY|unix.O_APPEND)
	}
	return os.OpenFile(path, os.O_RDWR, 0)
}

// endHolder ends a process that has a terminal open. It is this process's child, unless
// an earlier supervisor has made it.
func endHolder(p *process.Process) {
	if err := p.Signal(unix.SIGKILL); err == nil {
		<-p.Done()
	}
	// If it is a child and was not reaped yet.
	_, _ = unix.Wait4(p.Pid(), nil, unix.WNOHANG, nil)
	p.Close()
}

// dropHolder ends what may be left of it when the container's record goes.
func dropHolder(dir string) error {
	path := filepath.Join(dir, holderPin)
	p, err := process.OpenPinned(path, 0)
	if err == nil {
		endHolder(p)
	} else if !errdefs.IsNotFound(err) && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("end the holder of a terminal: %w", err)
	}
	return process.Unpin(path)
}
