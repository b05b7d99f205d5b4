package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// StartPipe is where the first process of a created container waits, in the
// runtime's directory of the container. The process has it open until then.
const StartPipe = "exec.fifo"

// LetGo is for a container whose first process does not wait at the pipe any more:
// it reports whether whoever started it died before the pipe was taken away, and
// takes it away, as a runtime goes by it.
func (r *Runtime) LetGo() bool { return os.Remove(filepath.Join(r.dir(), StartPipe)) == nil }

// Start lets the first process go; ended is closed when it has ended. The runtime
// itself is asked where it has more to do, or where that process does not wait: it
// knows best how to say why.
func (r *Runtime) Start(ctx context.Context, ended <-chan struct{}) error {
	// Some runtimes run these hooks in their start command, others have done so.
	if h, err := r.hooks(); err == nil && len(h.Poststart) == 0 {
		done, err := passFIFO(ctx, filepath.Join(r.dir(), StartPipe), ended)
		if err != nil {
			return fmt.Errorf("start the first process: %w", err)
		}
		if done {
			return nil
		}
	}
	return r.explain("start", r.runc.Log, r.runc.Start(ctx, r.id))
}

// hooks reads which hooks the specification of the bundle has. The runtime may be
// one that puts hooks into it.
func (r *Runtime) hooks() (h specs.Hooks, err error) {
	data, err := os.ReadFile(filepath.Join(r.bundle, specFile))
	if err != nil {
		return h, err
	}
	spec := struct{ Hooks *specs.Hooks }{&h}
	return h, json.Unmarshal(data, &spec)
}

// passFIFO lets a process go that waits at a FIFO: either it reads, and wants a byte,
// or it is about to write one, and wants a reader. done is false if there is no
// process that waits.
func passFIFO(ctx context.Context, path string, ended <-chan struct{}) (done bool, err error) {
	w, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	switch {
	case err == nil:
		defer w.Close()
		if _, err := w.Write([]byte{0}); err != nil {
			// It is gone meanwhile.
			return false, nil
		}
	case errors.Is(err, unix.ENXIO):
		done, err := awaitByte(ctx, path, ended)
		if !done || err != nil {
			return false, err
		}
	default:
		return false, nil
	}
	// By the file the runtime knows that a container was not started.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	return true, nil
}

// awaitByte reads a byte from a FIFO that somebody is about to open, or false if that
// process ends before.
func awaitByte(ctx context.Context, path string, ended <-chan struct{}) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	conn, err := f.SyscallConn()
	if err != nil {
		return false, err
	}
	over := make(chan struct{})
	defer close(over)
	go func() {
		select {
		case <-ended:
		case <-ctx.Done():
		case <-over:
			return
		}
		// The error is that it is closed.
		_ = f.SetReadDeadline(time.Unix(1, 0))
	}()
	var got bool
	// Nothing is read before anybody has opened it, which is no end of it.
	read := func(fd uintptr) bool {
		n, err := unix.Read(int(fd), make([]byte, 1))
		got = err == nil && n > 0
		return got
	}
	if err := conn.Read(read); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return false, err
	}
	if got {
		return true, nil
	}
	// It may have written just before its end.
	if err := conn.Control(func(fd uintptr) { read(fd) }); err != nil || got {
		return got, err
	}
	select {
	case <-ended:
		return false, nil
	default:
		return false, fmt.Errorf("wait for the process: %w: %w", errdefs.ErrAborted, ctx.Err())
	}
}
