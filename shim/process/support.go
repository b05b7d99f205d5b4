package process

import (
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	supportLimit = time.Second
	supportPoll  = time.Millisecond
)

// Supported says whether this kernel keeps exit statuses for pidfds; if not, it takes
// an anchor. It has a thread end and asks how: that needs no other program.
func Supported() error {
	t := endingThread()
	if t.err != nil {
		return unsupported(t.err)
	}
	defer unix.Close(t.fd)
	return awaitInfo(t.fd)
}

type thread struct {
	fd  int
	err error
}

// endingThread returns the pidfd of a thread that is ending.
func endingThread() (t thread) {
	InThread(func() { t.fd, t.err = unix.PidfdOpen(unix.Gettid(), unix.PIDFD_THREAD) })
	return t
}

// InThread runs a function in a thread that ends after it and runs nothing else, so
// that it may change what threads have for themselves.
func InThread(do func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // not unlocked: the thread ends with the function
		if unix.Gettid() == unix.Getpid() {
			// A process's first thread stays. While it is locked here, another
			// goroutine gets another one.
			InThread(do)
			runtime.UnlockOSThread()
			return
		}
		do()
	}()
	<-done
}

func awaitInfo(fd int) error {
	tick := time.NewTicker(supportPoll)
	defer tick.Stop()
	for end := time.Now().Add(supportLimit); time.Now().Before(end); <-tick.C {
		in, err := info(fd, unix.PIDFD_INFO_EXIT)
		if err != nil {
			return unsupported(err)
		}
		if in.Mask&unix.PIDFD_INFO_EXIT != 0 {
			return nil
		}
	}
	return unsupported(errors.New("a thread has ended and there is no status"))
}

func unsupported(err error) error {
	return fmt.Errorf("the kernel does not keep exit statuses for pidfds, Linux 6.15 does: %w: %w", errdefs.ErrNotImplemented, err)
}
