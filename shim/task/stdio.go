package task

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/console"
	"github.com/containerd/errdefs"
	"github.com/containerd/go-runc"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/shim/process"
)

const (
	// readerLimit is how long a process waits for the one who reads its output.
	readerLimit = 10 * time.Second
	readerPoll  = 5 * time.Millisecond
	// drainLimit is how long what a terminal still holds may take to be copied
	// when its process has ended and others have it open.
	drainLimit = time.Second
)

// paths are where a process reads and writes: a FIFO, or for output file:// or binary://.
type paths struct {
	Stdin, Stdout, Stderr string
	Terminal              bool
	// relay has output go through pipes.
	relay bool
}

// streams are the ends of a process's paths that are held here. Without a
// terminal the process gets the FIFOs themselves: nothing is copied, unless it is to
// be relayed. Output is open for reading as well, here and in the process, so that it
// never breaks.
type streams struct {
	in, out, err *os.File // what the process gets
	hold         *os.File // keeps the input from ending

	mu      sync.Mutex
	console *os.File
	holder  *process.Process // has the console open too; see holdTerminal
	relays  []relay
	copied  sync.WaitGroup
	logger  *logger // nil for none; changed before others have the streams
}

// relay is output on its way from a pipe to a FIFO.
type relay struct{ from, to *os.File }

var _ runc.IO = (*streams)(nil)

// open opens what a process without a terminal gets, as uid and gid if they are not
// root. What a logger has is there already.
func (s *streams) open(ctx context.Context, p paths, uid, gid uint32) (err error) {
	if s.logger == nil {
		if s.out, err = openOutput(ctx, p.Stdout); err != nil {
			return fmt.Errorf("open stdout: %w", err)
		}
		if s.err, err = openOutput(ctx, p.Stderr); err != nil {
			return fmt.Errorf("open stderr: %w", err)
		}
	}
	if s.in, s.hold, err = openInput(p.Stdin); err != nil {
		return fmt.Errorf("open stdin: %w", err)
	}
	if p.relay && s.logger == nil {
		if err := errors.Join(s.relay(&s.out), s.relay(&s.err)); err != nil {
			return fmt.Errorf("relay output: %w", err)
		}
	}
	for _, f := range []*os.File{s.in, s.out, s.err} {
		if f != nil && f.Name() != os.DevNull && (uid != 0 || gid != 0) {
			if err := f.Chown(int(uid), int(gid)); err != nil {
				return fmt.Errorf("give stdio to its user: %w", err)
			}
		}
	}
	return nil
}

// relay puts a pipe in the place of a FIFO, for which it is copied from. So whoever
// reads the FIFO finds its end a little after that of the process, although children
// of the process may have its output open for ever.
func (s *streams) relay(out **os.File) error {
	st, err := (*out).Stat()
	if err != nil || st.Mode()&os.ModeNamedPipe == 0 {
		return err
	}
	r := relay{}
	if r.to, err = os.OpenFile((*out).Name(), os.O_RDWR, 0); err != nil {
		return err
	}
	from, w, err := os.Pipe()
	if err != nil {
		r.to.Close()
		return err
	}
	r.from = from
	(*out).Close()
	*out, s.relays = w, append(s.relays, r)
	s.copied.Go(func() {
		// It ends when the last process has closed the pipe, or in Close.
		_, _ = io.Copy(r.to, r.from)
		r.from.Close()
		r.to.Close()
	})
	return nil
}

// openRaw opens a file in blocking mode, as a program expects it.
func openRaw(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func openOutput(ctx context.Context, path string) (*os.File, error) {
	if path == "" {
		return openRaw(os.DevNull, unix.O_WRONLY)
	}
	return openRead(ctx, path, func() (*os.File, error) { return openRaw(path, unix.O_RDWR) })
}

// openRead opens output: a file as it is, a FIFO by fifo once somebody reads it.
func openRead(ctx context.Context, path string, fifo func() (*os.File, error)) (*os.File, error) {
	o, err := parseOutput(path)
	switch {
	case err != nil:
		return nil, err
	case o.program != nil:
		return nil, fmt.Errorf("a logger has both outputs, or none: %w", errdefs.ErrInvalidArgument)
	case o.file != "":
		// As runc's shim does; readable, as a log is.
		if err := os.MkdirAll(filepath.Dir(o.file), 0o755); err != nil {
			return nil, err
		}
		return openRaw(o.file, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND)
	}
	release, err := awaitReader(ctx, path)
	if err != nil {
		return nil, err
	}
	defer release()
	return fifo()
}

// output is where output goes: a FIFO, a file or a logger.
type output struct {
	fifo, file string
	program    *url.URL
}

const loggerScheme = "binary"

func parseOutput(address string) (o output, err error) {
	u, err := url.Parse(address)
	if err != nil {
		return o, fmt.Errorf("address of output: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	switch u.Scheme {
	case "", "fifo":
		return output{fifo: address}, nil
	case "file":
		return output{file: u.Path}, nil
	case loggerScheme, loggerScheme + "-v2":
		return output{program: u}, nil
	}
	return o, fmt.Errorf("address of output %q: %s:// is not supported by this shim, a FIFO, file:// and binary:// are: %w", address, u.Scheme, errdefs.ErrNotImplemented)
}

// awaitReader returns when somebody has the FIFO open for reading, or after a
// while: what is written before is lost when the process ends sooner than its
// reader comes. Until release the reader finds no end.
func awaitReader(ctx context.Context, path string) (release func(), err error) {
	limit := time.NewTimer(readerLimit)
	defer limit.Stop()
	tick := time.NewTicker(readerPoll)
	defer tick.Stop()
	for {
		f, err := openRaw(path, unix.O_WRONLY|unix.O_NONBLOCK)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.ENXIO) {
			return nil, err
		}
		select {
		case <-tick.C:
		case <-limit.C:
			return func() {}, nil
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for a reader: %w", ctx.Err())
		}
	}
}

// openInput opens the FIFO for the process, and once more to keep it from
// ending until CloseIO.
func openInput(path string) (in, hold *os.File, err error) {
	if path == "" {
		in, err = openRaw(os.DevNull, unix.O_RDONLY)
		return in, nil, err
	}
	// With both ends at once it does not wait for a writer.
	both, err := openRaw(path, unix.O_RDWR)
	if err != nil {
		return nil, nil, err
	}
	defer both.Close()
	if in, err = openRaw(path, unix.O_RDONLY); err != nil {
		return nil, nil, err
	}
	if hold, err = openRaw(path, unix.O_WRONLY); err != nil {
		in.Close()
		return nil, nil, err
	}
	return in, hold, nil
}

// Set implements runc.IO.
func (s *streams) Set(c *exec.Cmd) {
	c.Stdin, c.Stdout, c.Stderr = s.in, s.out, s.err
}

// Stdin implements runc.IO; nobody here writes.
func (s *streams) Stdin() io.WriteCloser { return nil }

// Stdout implements runc.IO; nobody here reads.
func (s *streams) Stdout() io.ReadCloser { return nil }

// Stderr implements runc.IO; nobody here reads.
func (s *streams) Stderr() io.ReadCloser { return nil }

// started lets go of the input, and of pipes, once the process has them.
func (s *streams) started() {
	s.mu.Lock()
	defer s.mu.Unlock()
	closeAll(&s.in)
	if len(s.relays) > 0 || s.logger != nil {
		closeAll(&s.out, &s.err)
	}
}

// closeInput ends the input when its writers have.
func (s *streams) closeInput() {
	s.mu.Lock()
	defer s.mu.Unlock()
	closeAll(&s.hold)
}

// Close lets go of everything, and has a logger end.
func (s *streams) Close() error {
	s.letGo()
	if s.logger != nil {
		s.logger.end(loggerLimit)
	}
	return nil
}

// letGo closes all that is held here. It first waits for what a terminal, or a pipe, still
// holds. A logger may have more to read.
func (s *streams) letGo() {
	s.mu.Lock()
	end := time.Now().Add(drainLimit)
	// The errors are that they are closed.
	if s.console != nil {
		_ = s.console.SetReadDeadline(end)
		if s.out != nil {
			_ = s.out.SetWriteDeadline(end)
		}
	}
	for _, r := range s.relays {
		_ = r.from.SetReadDeadline(end)
		_ = r.to.SetWriteDeadline(end)
	}
	if len(s.relays) > 0 {
		closeAll(&s.out, &s.err)
	}
	s.mu.Unlock()
	s.copied.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	closeAll(&s.in, &s.hold, &s.out, &s.err, &s.console)
	if s.holder != nil {
		endHolder(s.holder)
		s.holder = nil
	}
}

func closeAll(files ...**os.File) {
	for _, f := range files {
		if *f != nil {
			(*f).Close()
			*f = nil
		}
	}
}

// resize sets the size of the terminal, if there is one.
func (s *streams) resize(width, height uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.console == nil {
		return nil
	}
	return control(s.console, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(height), Col: uint16(width)})
	})
}

func control(f *os.File, do func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := conn.Control(func(fd uintptr) { inner = do(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// openTerminal opens what a terminal is copied from and to. These are in the
// poller: no thread waits in a copy.
func (s *streams) openTerminal(ctx context.Context, p paths) (err error) {
	if p.Stdout != "" && s.logger == nil {
		s.out, err = openRead(ctx, p.Stdout, func() (*os.File, error) { return os.OpenFile(p.Stdout, os.O_RDWR, 0) })
		if err != nil {
			return fmt.Errorf("open stdout: %w", err)
		}
	}
	if p.Stdin != "" {
		if s.in, err = os.OpenFile(p.Stdin, os.O_RDWR, 0); err != nil {
			return fmt.Errorf("open stdin: %w", err)
		}
	}
	return nil
}

// takeTerminal returns the file of a console of its own.
func takeTerminal(c console.Console) (fd int, err error) {
	defer c.Close()
	if fd, err = unix.FcntlInt(c.Fd(), unix.F_DUPFD_CLOEXEC, 3); err != nil {
		return -1, fmt.Errorf("take the terminal: %w", err)
	}
	return fd, nil
}

// attach takes the terminal and begins to copy between it and the paths.
func (s *streams) attach(fd int) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return fmt.Errorf("take the terminal: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.console = os.NewFile(uintptr(fd), "console")
	from, to := s.console, io.Discard
	if s.out != nil {
		to = s.out
	}
	s.copied.Go(func() {
		// It ends with an error when the last process has closed the terminal, or when
		// there is nobody to read; then it goes nowhere.
		_, _ = io.Copy(to, from)
		_, _ = io.Copy(io.Discard, from)
	})
	if in := s.in; in != nil {
		// It ends when the input or the terminal is closed.
		go func() { _, _ = io.Copy(from, in) }()
	}
	return nil
}
