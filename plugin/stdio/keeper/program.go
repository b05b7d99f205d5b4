package keeper

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

//go:generate sh build.sh

// files holds bin/keeper, if it was built.
//
//go:embed all:bin
var files embed.FS

const (
	startTimeout = 10 * time.Second
	// backlog is how many connections may wait for the keeper.
	backlog = 128
)

// unpack puts the program at path, or leaves it there if it is the same. It
// replaces the file: an older one may be running.
func unpack(path string) error {
	program, err := files.ReadFile("bin/keeper")
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unpack keeper: the program is not part of this build: run `make build`: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("unpack keeper: %w", err)
	}
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, program) {
		return nil
	}
	temp := path + ".new"
	if err := os.WriteFile(temp, program, 0o700); err != nil {
		return fmt.Errorf("unpack keeper: %w", err)
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("unpack keeper: %w", err)
	}
	return nil
}

// start runs a keeper of its own process group and session, which listens at
// socket, and returns a connection to it. The connection is made first, so that
// the keeper has a reason to stay from its beginning.
func start(ctx context.Context, program, socket string) (_ *net.UnixConn, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := unpack(program); err != nil {
		return nil, err
	}
	l, err := listen(socket)
	if err != nil {
		return nil, fmt.Errorf("start keeper: %w", err)
	}
	defer l.Close()
	conn, err := dial(ctx, socket)
	if err != nil {
		return nil, fmt.Errorf("start keeper: %w", err)
	}
	if err := launch(ctx, program, socket, l); err != nil {
		return nil, fmt.Errorf("start keeper: %w", errors.Join(err, conn.Close()))
	}
	return conn, nil
}

// listen binds a socket that only its owner may connect to, from the moment on
// in which it has a name.
func listen(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	l := os.NewFile(uintptr(fd), path)
	for _, step := range []struct {
		name string
		err  func() error
	}{
		{"chmod", func() error { return unix.Fchmod(fd, 0o600) }},
		{"bind", func() error { return unix.Bind(fd, &unix.SockaddrUnix{Name: path}) }},
		{"listen", func() error { return unix.Listen(fd, backlog) }},
	} {
		if err := step.err(); err != nil {
			return nil, errors.Join(&os.PathError{Op: step.name, Path: path, Err: err}, l.Close())
		}
	}
	return l, nil
}

func dial(ctx context.Context, socket string) (*net.UnixConn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unixpacket", socket)
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

// launch runs the program, which leaves a process behind and returns. The name
// of the socket is for those who look at processes.
func launch(ctx context.Context, program, socket string, l *os.File) error {
	for {
		cmd := exec.CommandContext(ctx, program, socket)
		cmd.Dir = "/"
		cmd.ExtraFiles = []*os.File{l}
		err := cmd.Run()
		if !errors.Is(err, unix.ETXTBSY) {
			return err
		}
		// It was just unpacked, and a process that another goroutine is about
		// to start still has the file open for writing.
		select {
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
}
