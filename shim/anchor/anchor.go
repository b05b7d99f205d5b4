// Package anchor runs the anchor: a small process that is the parent of the
// supervisor on kernels that do not keep exit statuses for pidfds.
//
// What is orphaned below it comes to the anchor, which reaps it, and tells how those
// ended that it was to keep, also to the next supervisor. The program is anchor.c,
// built by build.sh before the Go build and executed from memory. There is one for
// each supervisor; it outlives that as long as it has a child, or an end to tell.
// Start reading at Wrap and Session.
package anchor

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

//go:generate sh build.sh

// files holds bin/anchor, if it was built.
//
//go:embed all:bin
var files embed.FS

const (
	// Program is the name by which the anchor is called; its socket is the first
	// argument.
	Program = "gantry-anchor"
	// backlog is how many connections may wait for the anchor.
	backlog = 128
)

// Gate holds back a command that runs below an anchor. The zero Gate is that of any
// other command, and holds nothing back.
type Gate struct {
	files []*os.File // given to the anchor, and its program
	open  *os.File
}

// Wrap has a command run below an anchor, which listens at socket. After its Start
// the anchor is what the command is known as, and waits: what is done to it before
// Open, such as to move it into a control group, is inherited by the program. The
// command has one extra file, for which the program waits.
//
// Close gives back what is here of it, and ends an anchor that waits: once it is
// started.
func Wrap(cmd *exec.Cmd, socket string) (_ *Gate, err error) {
	if len(cmd.ExtraFiles) != 1 {
		return nil, fmt.Errorf("run an anchor: %d extra files: %w", len(cmd.ExtraFiles), errdefs.ErrInvalidArgument)
	}
	g := &Gate{}
	defer func() {
		if err != nil {
			g.Close()
			err = fmt.Errorf("run an anchor: %w", err)
		}
	}()
	program, err := unpack()
	if err != nil {
		return nil, err
	}
	g.files = append(g.files, program)
	l, err := listen(socket)
	if err != nil {
		return nil, err
	}
	g.files = append(g.files, l)
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	g.files, g.open = append(g.files, r), w
	cmd.ExtraFiles = append(cmd.ExtraFiles, l, r)
	cmd.Args = append([]string{Program, socket, cmd.Path}, cmd.Args[1:]...)
	// By the number of this process, as that of the new one has other files there.
	cmd.Path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), program.Fd())
	return g, nil
}

// Open lets the program begin.
func (g *Gate) Open() error {
	if g.open == nil {
		return nil
	}
	_, err := g.open.Write([]byte{0})
	return err
}

// Close may be called at any time.
func (g *Gate) Close() {
	for _, f := range g.files {
		f.Close()
	}
	if g.open != nil {
		g.open.Close()
	}
}

// unpack puts the program into memory, as on many nodes nothing can be executed below
// /run.
func unpack() (*os.File, error) {
	program, err := files.ReadFile("bin/anchor")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the program is not part of this build: run `make build`: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, err
	}
	return InMemory(Program, program)
}

// InMemory is a program in memory that can be executed.
func InMemory(name string, program []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before 6.3 it need not be said
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.Write(program); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// listen binds a socket that only its owner may connect to, from the moment on in
// which it has a name.
func listen(path string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	l := os.NewFile(uintptr(fd), path)
	err = unix.Fchmod(fd, 0o600)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	}
	if err == nil {
		err = unix.Listen(fd, backlog)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), l.Close())
	}
	return l, nil
}
