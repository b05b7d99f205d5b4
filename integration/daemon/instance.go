package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"google.golang.org/grpc"

	"github.com/gantry-cri/gantry/integration/host"
)

var (
	// stopTimeout is what a daemon has to end after SIGTERM.
	stopTimeout = Patience(30 * time.Second)
	// settleTimeout is what the machine has to become as it was.
	settleTimeout = Patience(45 * time.Second)
)

// raceLog opens the names of the files that a race-built program writes.
const raceLog = "race"

// Instance is a daemon's directory, names and, while it runs, its process. Its
// methods may be called from several goroutines, save those that start and end
// it.
type Instance struct {
	// Dir holds everything below; Root and State are containerd's.
	Dir, Root, State string
	// Socket is the gRPC socket's path.
	Socket string
	// CNIDir holds the CNI configuration, LogDir the log directories of pods.
	CNIDir, LogDir string
	// CgroupParent is given to every pod of PodConfig.
	CgroupParent string

	set    settings
	slot   slot
	conn   *grpc.ClientConn
	client *client.Client
	before host.State
	settle time.Duration // settleTimeout, save in tests of the harness

	mu  sync.Mutex
	run *run // nil while it is down
}

// run is one process of the daemon.
type run struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when the process was waited for
	err   error         // how it ended, once ended is closed
}

// Launch makes and starts a daemon and waits until it serves. The caller owes
// it Close and Discard.
func Launch(ctx context.Context, opts ...Option) (*Instance, error) {
	in, err := prepare(opts)
	if err != nil {
		return nil, fmt.Errorf("prepare daemon: %w", err)
	}
	if err := in.Start(ctx); err != nil {
		err = fmt.Errorf("%w\n%s", err, in.Tail(logTail))
		return nil, errors.Join(err, in.Discard())
	}
	if in.before, err = in.Scope().Read(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("read host: %w", err), in.Discard())
	}
	return in, nil
}

func prepare(opts []Option) (*Instance, error) {
	set, err := newSettings(opts)
	if err != nil {
		return nil, err
	}
	s, err := takeSlot()
	if err != nil {
		return nil, err
	}
	// Short, whatever TMPDIR says: socket paths have 108 bytes, and containerd
	// wants the directory of shim sockets within 42.
	dir, err := os.MkdirTemp("/tmp", "g")
	if err != nil {
		return nil, errors.Join(err, s.release())
	}
	in := &Instance{
		Dir:          dir,
		Root:         filepath.Join(dir, "root"),
		State:        filepath.Join(dir, "state"),
		Socket:       filepath.Join(dir, "c.sock"),
		CNIDir:       filepath.Join(dir, "cni"),
		LogDir:       filepath.Join(dir, "logs"),
		CgroupParent: s.cgroupParent(),
		set:          set,
		slot:         s,
		settle:       settleTimeout,
	}
	if err := errors.Join(os.Chmod(dir, 0o711), s.write(dir), in.mountState(), in.writeConfig(), in.connect()); err != nil {
		return nil, errors.Join(err, in.Discard())
	}
	return in, nil
}

// mountState puts what is under /run on a node on a tmpfs, as /run is: the state
// directory, the sockets of the shims with what these keep beside them, and runc's
// directory. On a disk each file that is replaced there waits for it. Whoever removes
// the daemon's directory unmounts them (host.Scope).
func (in *Instance) mountState() error {
	for _, dir := range in.mounts() {
		if err := os.Mkdir(dir, 0o711); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
		if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=711"); err != nil {
			return fmt.Errorf("mount tmpfs on %s: %w", dir, err)
		}
	}
	return nil
}

func (in *Instance) mounts() []string { return []string{in.State, in.path("s"), in.path("runc")} }

func (in *Instance) path(name string) string { return filepath.Join(in.Dir, name) }

// LogPath is the file that the daemon's output goes to, over all its runs.
func (in *Instance) LogPath() string { return in.path("containerd.log") }

// Scope says what on this machine belongs to the daemon.
func (in *Instance) Scope() host.Scope {
	s := in.slot.scope(in.Dir)
	s.Mounts = in.mounts()
	if in.running() != nil {
		s.Expected = append(s.Expected, in.set.expected...)
		s.Client = in.client
	}
	return s
}

// PID is the daemon's process, 0 while it is down.
func (in *Instance) PID() int {
	if r := in.running(); r != nil {
		return r.cmd.Process.Pid
	}
	return 0
}

func (in *Instance) running() *run {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.run
}

// Start starts the daemon and waits until it serves.
func (in *Instance) Start(ctx context.Context) error {
	if err := in.spawn(); err != nil {
		return fmt.Errorf("start daemon: %w", err)
	}
	if err := in.WaitReady(ctx); err != nil {
		return fmt.Errorf("start daemon: %w", err)
	}
	return nil
}

// Command is how the daemon is run, for a test that has somebody else do it.
func (in *Instance) Command() (argv, env []string) {
	return []string{in.set.binary, "--config", in.path("config.toml")}, in.set.environ(in.Dir)
}

func (in *Instance) spawn() error {
	if in.running() != nil {
		return errors.New("it runs already")
	}
	log, err := os.OpenFile(in.LogPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	argv, env := in.Command()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = in.Dir
	cmd.Env = env
	cmd.Stdout, cmd.Stderr = log, log
	// A test that dies takes its daemon along; a ^C at the terminal is for the
	// test alone, which then stops the daemon.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	r := &run{cmd: cmd, ended: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the thread that forked ends, and
		// threads end with the goroutines of tests that enter namespaces. This
		// one stays until the daemon is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		r.err = cmd.Wait()
		close(r.ended)
	}()
	if err := <-started; err != nil {
		return err
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.run = r
	return nil
}

// Stop ends the daemon with SIGTERM and wants exit code 0 in time.
func (in *Instance) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if err := in.end(ctx, syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop daemon: %w", err)
	}
	return nil
}

// Kill ends the daemon with SIGKILL.
func (in *Instance) Kill(ctx context.Context) error {
	var exit *exec.ExitError
	if err := in.end(ctx, syscall.SIGKILL); err != nil && !errors.As(err, &exit) {
		return fmt.Errorf("kill daemon: %w", err)
	}
	return nil
}

func (in *Instance) end(ctx context.Context, sig syscall.Signal) error {
	r := in.running()
	if r == nil {
		return errors.New("it does not run")
	}
	if err := r.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-r.ended:
	case <-ctx.Done():
		// SIGUSR1 makes containerd log the stacks of all goroutines.
		err := errors.Join(context.Cause(ctx), r.cmd.Process.Signal(syscall.SIGUSR1))
		return fmt.Errorf("it runs on after %v: %w", sig, err)
	}
	in.forget()
	return r.err
}

// Close removes all pods through CRI, starting the daemon for that if it is
// down, wants the machine as it was before, stops the daemon, and wants nothing
// bad in its logs. It reports everything that was not so.
func (in *Instance) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*opTimeout)
	defer cancel()
	if err := in.revive(ctx); err != nil {
		return errors.Join(err, in.health())
	}
	return errors.Join(in.RemovePods(ctx), in.CheckClean(), in.Stop(ctx), in.health())
}

// revive starts the daemon when it is down. That it went down by itself is an
// error; that a test stopped it is not.
func (in *Instance) revive(ctx context.Context) error {
	var died error
	if r := in.running(); r != nil {
		select {
		case <-r.ended:
			died = fmt.Errorf("the daemon ended by itself: %v", r.err)
			in.forget()
		default:
			return nil
		}
	}
	if err := in.Start(ctx); err != nil {
		return errors.Join(died, fmt.Errorf("start again to clean up: %w", err))
	}
	return died
}

// forget notes that the daemon's process is gone.
func (in *Instance) forget() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.run = nil
}

// CheckClean reports how the machine differs from what it was when the daemon
// had just started. Pods must have been removed.
func (in *Instance) CheckClean() error {
	ctx, cancel := context.WithTimeout(context.Background(), in.settle)
	defer cancel()
	return in.Scope().Settle(ctx, in.before)
}

// Discard kills whatever is left of the daemon, removes all that is its own on
// the machine, and gives the slot back. With GANTRY_KEEP set the files stay.
func (in *Instance) Discard() error {
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	in.disconnect()
	if os.Getenv("GANTRY_KEEP") != "" {
		return in.slot.release() // the slot keeps the name: the next daemon sweeps
	}
	if err := in.Scope().Purge(ctx); err != nil {
		return errors.Join(fmt.Errorf("discard daemon: %w", err), in.slot.release())
	}
	return errors.Join(in.slot.write(""), in.slot.release())
}

// Tail returns the last n lines of the daemon's log.
func (in *Instance) Tail(n int) string {
	text, err := os.ReadFile(in.LogPath())
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// health looks for data races and panics, of the daemon and of all it started.
func (in *Instance) health() error {
	var errs []error
	races, err := filepath.Glob(in.path(raceLog + ".*"))
	if err != nil {
		return fmt.Errorf("find race reports: %w", err)
	}
	for _, f := range races {
		text, err := os.ReadFile(f)
		if err != nil {
			return fmt.Errorf("read race report: %w", err)
		}
		errs = append(errs, fmt.Errorf("data race:\n%s", text))
	}
	text, err := os.ReadFile(in.LogPath())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read log: %w", err)
	}
	for _, sign := range []string{"\npanic: ", "\nfatal error: ", "panic: runtime error"} {
		if _, after, found := strings.Cut(string(text), sign); found {
			errs = append(errs, fmt.Errorf("the daemon's log has a panic: %s%.2000s", strings.TrimSpace(sign), after))
			break
		}
	}
	return errors.Join(errs...)
}
