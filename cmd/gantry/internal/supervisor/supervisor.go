// Package supervisor finds the supervisors of gantry's shim, and has the program
// that is installed now take over from the one that runs.
//
// Find only looks. Upgrade ends a process; the daemon then starts the next one, and
// what the old one had goes on.
package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/types"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// Supervisor is one process.
type Supervisor struct {
	Pid       int    `json:"pid"`
	Namespace string `json:"namespace"`
	Socket    string `json:"socket"`
	Program   string `json:"program"`
	// Old says that another file has come to the place of its program.
	Old bool `json:"old"`
}

// Find lists the supervisors of the containerd at an address.
func Find(address string) ([]Supervisor, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var out []Supervisor
	for _, dir := range dirs {
		line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil {
			continue // it has ended
		}
		s, of := parse(strings.Split(string(line), "\x00"))
		if of != address || s.Socket == "" {
			continue
		}
		if s.Pid, err = strconv.Atoi(filepath.Base(dir)); err != nil {
			continue
		}
		if s.program(dir) {
			out = append(out, s)
		}
	}
	return out, nil
}

// parse reads a supervisor's command line, and of which containerd it is.
func parse(args []string) (s Supervisor, address string) {
	if len(args) < 2 || args[1] != "serve" || !strings.HasPrefix(filepath.Base(args[0]), "containerd-shim-") {
		return s, ""
	}
	for i := 2; i+1 < len(args); i += 2 {
		switch args[i] {
		case "-namespace":
			s.Namespace = args[i+1]
		case "-address":
			address = args[i+1]
		case "-socket":
			s.Socket = args[i+1]
		}
	}
	return s, address
}

// program finds what the process runs, and reports whether it is there at all.
func (s *Supervisor) program(dir string) bool {
	exe := filepath.Join(dir, "exe")
	path, err := os.Readlink(exe)
	if err != nil {
		return false
	}
	s.Program = strings.TrimSuffix(path, " (deleted)")
	runs, err := os.Stat(exe)
	if err != nil {
		return false
	}
	there, err := os.Stat(s.Program)
	s.Old = err != nil || !os.SameFile(runs, there)
	return true
}

const (
	// infoLimit bounds the question to the new program.
	infoLimit = 30 * time.Second
	// endLimit is how long the old process may take: what it has begun it brings
	// to an end, for half of that.
	endLimit = time.Minute
	// nextLimit is how long the daemon may take to start the new one.
	nextLimit = time.Minute
	poll      = 50 * time.Millisecond
)

// Upgrade ends a supervisor and returns the next, once it answers.
func Upgrade(ctx context.Context, address string, s Supervisor) (Supervisor, error) {
	if err := answers(address); err != nil {
		return s, fmt.Errorf("containerd, which starts the next supervisor, does not answer: %w", err)
	}
	if err := takesOver(ctx, s.Program); err != nil {
		return s, err
	}
	if err := s.end(ctx, address); err != nil {
		return s, err
	}
	ctx, cancel := context.WithTimeout(ctx, nextLimit)
	defer cancel()
	for {
		now, err := Find(address)
		if err != nil {
			return s, err
		}
		for _, next := range now {
			if next.Socket == s.Socket && next.Pid != s.Pid && answers(s.Socket) == nil {
				return next, nil
			}
		}
		if err := pause(ctx); err != nil {
			return s, fmt.Errorf("process %d has ended, and no supervisor has taken its place: %w", s.Pid, err)
		}
	}
}

func answers(socket string) error {
	conn, err := net.DialTimeout("unix", strings.TrimPrefix(socket, "unix://"), nextLimit)
	if err != nil {
		return err
	}
	return conn.Close()
}

// takesOver asks a program whether it takes over what another supervisor has.
func takesOver(ctx context.Context, program string) error {
	ctx, cancel := context.WithTimeout(ctx, infoLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "-info")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("ask %s what it is: %w: %s", program, err, bytes.TrimSpace(stderr.Bytes()))
	}
	var info types.RuntimeInfo
	if err := proto.Unmarshal(out, &info); err != nil {
		return fmt.Errorf("ask %s what it is: %w", program, err)
	}
	if info.GetAnnotations()["io.containerd.gantry.resumes"] != "true" {
		return fmt.Errorf("%s (%s) does not take over what another one has", program, info.GetName())
	}
	return nil
}

// end asks the process to hand over, and waits for its end.
func (s Supervisor) end(ctx context.Context, address string) error {
	fd, err := unix.PidfdOpen(s.Pid, 0)
	if err != nil {
		return fmt.Errorf("open process %d: %w", s.Pid, err)
	}
	defer unix.Close(fd)
	// Before it was held the number may have become another's.
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", s.Pid))
	if err != nil {
		return err
	}
	if now, of := parse(strings.Split(string(line), "\x00")); of != address || now.Socket != s.Socket {
		return fmt.Errorf("process %d is no supervisor any more", s.Pid)
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGUSR1, nil, 0); err != nil {
		return fmt.Errorf("ask process %d to hand over: %w", s.Pid, err)
	}
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", s.Pid, err)
		}
		if n > 0 {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("process %d does not end: %w", s.Pid, err)
		}
	}
}

func pause(ctx context.Context) error {
	timer := time.NewTimer(poll)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
