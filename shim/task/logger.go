package task

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/shim/process"
)

const (
	// readyLimit is how long a logger may take to be ready.
	readyLimit = 30 * time.Second
	// loggerLimit is how long one that was told to end may take to put away what it has,
	// and leftLimit where nobody has awaited it: containerd bounds the shim's delete.
	loggerLimit, leftLimit = 10 * time.Second, 2 * time.Second
	// loggerPin ends the name of the file by which the next supervisor finds a logger.
	loggerPin = ".logger"
)

// logger is the program of a binary:// address, which reads what a process says. The
// process has its pipes, so it goes on when the supervisor dies; it ends when all who
// write have. Source: docs/runtime-v2.md of containerd, "Logging".
type logger struct {
	pin string

	mu      sync.Mutex
	process *process.Process // nil once it has ended
}

// startLogger starts the logger of a process and returns, when that is ready, the pipes to
// write to; all are nil without one.
func (p *proc) startLogger(ctx context.Context) (l *logger, stdout, stderr *os.File, err error) {
	o, err := parseOutput(p.stdio.Stdout)
	if err != nil || o.program == nil {
		return nil, nil, nil, err
	}
	l = &logger{pin: filepath.Join(p.c.dir, loggerPin)}
	if p.exec != "" {
		// After a crash the logger of one of the same name may be there still.
		l.pin = filepath.Join(p.c.dir, fmt.Sprintf("%s.%d%s", p.exec, time.Now().UnixNano(), loggerPin))
	}
	if stdout, stderr, err = l.start(ctx, p, o.program); err != nil {
		return nil, nil, nil, fmt.Errorf("start logger %s: %w", o.program.Path, err)
	}
	return l, stdout, stderr, nil
}

func (l *logger) start(ctx context.Context, p *proc, program *url.URL) (stdout, stderr *os.File, err error) {
	var theirs, ours []*os.File
	defer func() {
		closeFiles(theirs)
		if err != nil {
			closeFiles(ours)
			l.end(loggerLimit)
		}
	}()
	for range 3 {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, nil, err
		}
		theirs, ours = append(theirs, r), append(ours, w)
	}
	// It reads what a process says, and writes that it is ready.
	theirs[2], ours[2] = ours[2], theirs[2]
	if err := l.execute(p, program, theirs); err != nil {
		return nil, nil, err
	}
	closeFiles(theirs)
	if err := awaitReady(ctx, ours[2], program.Scheme); err != nil {
		return nil, nil, err
	}
	ours[2].Close()
	return ours[0], ours[1], nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// execute starts the program with the files as 3, 4 and 5.
func (l *logger) execute(p *proc, program *url.URL, theirs []*os.File) (err error) {
	var files []uintptr
	for _, f := range theirs {
		files = append(files, f.Fd()) // which has it block, as a program expects
	}
	defer p.c.service.reaper.Hold()()
	env := []string{"CONTAINER_ID=" + p.name(), "CONTAINER_NAMESPACE=" + p.c.service.namespace}
	if l.process, err = spawn(l.pin, program.Path, loggerArgs(program), env, files); err != nil {
		return err
	}
	closeEnded(l.process)
	return nil
}

// closeEnded reaps and closes a process once it has ended.
func closeEnded(p *process.Process) {
	go func() {
		<-p.Done()
		p.Reap()
		p.Close()
	}()
}

// loggerArgs are the program and the keys and values of its address.
func loggerArgs(program *url.URL) []string {
	args, q := []string{program.Path}, program.Query()
	for _, key := range slices.Sorted(maps.Keys(q)) {
		args = append(args, key, q[key][0])
	}
	return args
}

// awaitReady reads a byte or, what the older scheme has for ready too, the end.
func awaitReady(ctx context.Context, f *os.File, scheme string) error {
	if err := f.SetReadDeadline(time.Now().Add(readyLimit)); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Now()) })()
	_, err := f.Read(make([]byte, 1))
	switch {
	case err == nil, errors.Is(err, io.EOF) && scheme == loggerScheme:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("wait until it is ready: %w", ctx.Err())
	case errors.Is(err, io.EOF):
		return fmt.Errorf("it closed file 5 and did not write there that it is ready: %w", errdefs.ErrUnavailable)
	}
	return fmt.Errorf("wait until it writes to file 5, or closes it: %w", err)
}

// openLogger finds the logger of a process that an earlier supervisor has started, nil
// for one that has ended.
func openLogger(pin string) *logger {
	p, err := process.OpenPinned(pin, 0)
	if err != nil {
		return nil
	}
	closeEnded(p)
	return &logger{pin: pin, process: p}
}

// end returns when the logger has ended: at the end of its input or, when it does not, by
// a signal. One that no signal ends, as its disk does not answer, is left.
func (l *logger) end(limit time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.process == nil {
		return
	}
	ended := l.ends(drainLimit)
	for _, signal := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if !ended {
			_ = l.process.Signal(signal) // the error is that it has ended
			ended = l.ends(limit)
		}
	}
	if ended {
		l.process.Reap()
	} else {
		log.L.WithField("pid", l.process.Pid()).Warn("a logger is left that cannot be killed")
	}
	l.process = nil
	if err := process.Unpin(l.pin); err != nil {
		log.L.WithError(err).Warn("forget a logger")
	}
}

func (l *logger) ends(within time.Duration) bool {
	limit := time.NewTimer(within)
	defer limit.Stop()
	select {
	case <-l.process.Done():
		return true
	case <-limit.C:
		return false
	}
}

// dropLoggers ends what may be left of them when the container's record goes.
func dropLoggers(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var ending sync.WaitGroup
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), loggerPin) {
			continue
		}
		if l := openLogger(filepath.Join(dir, e.Name())); l != nil {
			ending.Go(func() { l.end(leftLimit) })
		}
	}
	ending.Wait()
	return nil
}
