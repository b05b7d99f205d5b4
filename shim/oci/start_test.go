package oci

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func newFIFO(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), StartPipe)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestPassFIFO: both kinds of process that wait at a FIFO are let go, and the file
// that says that they wait is gone.
func TestPassFIFO(t *testing.T) {
	for name, wait := range map[string]func(path string, waits func()) error{
		// As runc: opens when somebody reads.
		"writer": func(path string, waits func()) error {
			waits()
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.Write([]byte("0"))
			return err
		},
		// As crun: has it open, and reads.
		"reader": func(path string, waits func()) error {
			f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
			waits()
			if err != nil {
				return err
			}
			defer f.Close()
			for {
				n, err := f.Read(make([]byte, 1))
				if n == 1 {
					return nil
				}
				if n > 0 || err == nil {
					return errors.New("it read nothing")
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := newFIFO(t)
			ready, gone := make(chan struct{}), make(chan error, 1)
			go func() { gone <- wait(path, func() { close(ready) }) }()
			<-ready
			if done, err := passFIFO(t.Context(), path, make(chan struct{})); !done || err != nil {
				t.Fatalf("%t, %v", done, err)
			}
			if err := <-gone; err != nil {
				t.Errorf("the process: %v", err)
			}
			if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the FIFO is still there: %v", err)
			}
		})
	}
}

// TestPassFIFO_Nobody: without a process that waits nothing is started, and the
// runtime may tell why.
func TestPassFIFO_Nobody(t *testing.T) {
	ended := make(chan struct{})
	close(ended)
	if done, err := passFIFO(t.Context(), filepath.Join(t.TempDir(), StartPipe), ended); done || err != nil {
		t.Errorf("no FIFO: %t, %v", done, err)
	}
	path := newFIFO(t)
	if done, err := passFIFO(t.Context(), path, ended); done || err != nil {
		t.Errorf("no process: %t, %v", done, err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if done, err := passFIFO(ctx, path, make(chan struct{})); done || !errdefs.IsAborted(err) {
		t.Errorf("a process that does nothing: %t, %v", done, err)
	}
}

// TestPassFIFO_Ended: a process that passed and has ended since was started.
func TestPassFIFO_Ended(t *testing.T) {
	path := newFIFO(t)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if f, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
			f.WriteString("0")
			f.Close()
		}
	}()
	if done, err := passFIFO(t.Context(), path, ended); !done || err != nil {
		t.Errorf("%t, %v", done, err)
	}
}
