package pool

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	v2 "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

const (
	// silentProbes is how often a shim is asked, for probeLimit each, before it
	// is ended for its silence.
	silentProbes = 2
	// settleLimit is how long the clean-up after a dead shim may take.
	settleLimit = 20 * time.Second
	settlePoll  = 50 * time.Millisecond
)

// EndSilent ends the shim of a pod that does not answer, and returns when its
// tasks are NotFound, as after any death of a shim. It is for a pod that is to
// end anyway.
//
// The tasks of one that takes them over when it is started again are there
// afterwards as well, and it answers for them; so it may serve others too.
//
// FailedPrecondition says that nothing was done: the shim answers, or it serves
// others too, or which process it is cannot be told for certain.
func (p *Pool) EndSilent(ctx context.Context, pod string) error {
	if s := p.podOf(pod); s != nil && s.lasting {
		if err := s.renew(ctx); err != nil {
			return fmt.Errorf("end the shim of pod %s: %w", pod, err)
		}
		return nil
	}
	tasks, params, err := p.tasksOf(pod)
	if err != nil {
		return fmt.Errorf("end the shim of pod %s: %w", pod, err)
	}
	shim, err := p.shimAt(params.GetAddress(), pod)
	if errdefs.IsNotFound(err) {
		// It is dead, and the clean-up at work.
		return p.awaitGone(ctx, tasks)
	}
	if err != nil {
		return fmt.Errorf("end the shim of pod %s: %w", pod, err)
	}
	defer unix.Close(shim.fd)
	if err := shim.end(ctx, pod, params); err != nil {
		return fmt.Errorf("end the shim of pod %s: %w", pod, err)
	}
	return p.awaitGone(ctx, tasks)
}

// renew ends the shim of a lasting task or sandbox, if it does not answer, and
// returns when another one serves.
func (s *shim) renew(ctx context.Context) error {
	params, err := readBootstrap(s.bundle.Path)
	if err != nil {
		return err
	}
	old := s.current().conn
	process, err := listening(params.GetAddress())
	if err != nil && !errors.Is(err, errNobodyListens) {
		return err
	}
	if err == nil {
		defer unix.Close(process.fd)
		if err := process.end(ctx, s.bundle.ID, params); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for {
		s.nudge()
		now, err := s.serving(ctx)
		if err == nil && now != old || errdefs.IsNotFound(err) {
			return nil // without the task there is nothing to ask for
		}
		if !sleep(ctx, settlePoll) {
			return errors.Join(err, context.Cause(ctx))
		}
	}
}

// listening finds the process that listens at an address.
func listening(address string) (pinned, error) {
	pid, err := listenerAt(address)
	if err != nil {
		return pinned{}, err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return pinned{}, fmt.Errorf("open shim %d: %w", pid, err)
	}
	// Before it was held the number may have become another's.
	if again, err := listenerAt(address); err != nil || again != pid {
		unix.Close(fd)
		return pinned{}, fmt.Errorf("shim %d has made way for %d meanwhile: %w", pid, again, errors.Join(err, errdefs.ErrFailedPrecondition))
	}
	return pinned{fd, pid}, nil
}

// listenerAt asks the kernel who made the socket at an address listen.
func listenerAt(address string) (pid int, err error) {
	conn, err := knock(address)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("the address %q is no socket of this host: %w", address, errdefs.ErrFailedPrecondition)
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *unix.Ucred
	if ctrl := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); ctrl != nil || err != nil {
		return 0, fmt.Errorf("ask who listens at %s: %w", address, errors.Join(ctrl, err))
	}
	return int(peer.Pid), nil
}

// end kills the shim of a pod, unless it answers.
func (s pinned) end(ctx context.Context, pod string, params *bootapi.BootstrapResult) error {
	for range silentProbes {
		if err := probe(ctx, pod, params); err != nil {
			return err
		}
	}
	log.G(ctx).WithField("pod", pod).WithField("pid", s.pid).Warn("ending the shim of a pod that is to end: it does not answer")
	if err := unix.PidfdSendSignal(s.fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill shim %d: %w", s.pid, err)
	}
	awaitEnd(ctx, s.fd, s.pid)
	return nil
}

// tasksOf lists the tasks of a pod and says how its shim is reached. It refuses a
// shim that serves a task of another pod as well.
func (p *Pool) tasksOf(pod string) (tasks []string, params *bootapi.BootstrapResult, err error) {
	bundles, err := filepath.Glob(filepath.Join(p.State, "*", p.Namespace, "*"))
	if err != nil {
		return nil, nil, err
	}
	at := map[string]*bootapi.BootstrapResult{}
	for _, bundle := range bundles {
		found, err := readBootstrap(bundle)
		if err != nil {
			continue // no shim can be reached by this one
		}
		at[bundle] = found
		if belongs(bundle, pod) {
			tasks, params = append(tasks, filepath.Base(bundle)), found
		}
	}
	if params == nil {
		return nil, nil, fmt.Errorf("it has no task: %w", errdefs.ErrFailedPrecondition)
	}
	for bundle, other := range at {
		if same := other.GetAddress() == params.GetAddress(); same != belongs(bundle, pod) {
			return nil, nil, fmt.Errorf("it does not serve this pod alone, see %s: %w", filepath.Base(bundle), errdefs.ErrFailedPrecondition)
		}
	}
	return tasks, params, nil
}

// belongs reports whether a bundle is that of a pod or of one of its containers.
func belongs(bundle, pod string) bool {
	if filepath.Base(bundle) == pod {
		return true
	}
	of, err := os.ReadFile(filepath.Join(bundle, "sandbox"))
	return err == nil && string(of) == pod
}

// pinned is a process held by a descriptor.
type pinned struct{ fd, pid int }

// shimAt finds the shim of a pod: the one process that was started as that and
// has the socket of the address open. NotFound says that nobody listens.
func (p *Pool) shimAt(address, pod string) (pinned, error) {
	path, ok := strings.CutPrefix(address, "unix://")
	if !ok {
		return pinned{}, fmt.Errorf("its address %q is no socket of this host: %w", address, errdefs.ErrFailedPrecondition)
	}
	f, err := os.Open("/proc/net/unix")
	if err != nil {
		return pinned{}, err
	}
	defer f.Close()
	inode, err := listener(f, path)
	if err != nil {
		return pinned{}, err
	}
	if inode == "" {
		return pinned{}, fmt.Errorf("nobody listens on %s: %w", path, errdefs.ErrNotFound)
	}
	var found []int
	for _, pid := range p.processes() {
		if p.serves(pid, pod, inode) {
			found = append(found, pid)
		}
	}
	if len(found) != 1 {
		return pinned{}, fmt.Errorf("the socket %s is that of processes %v: %w", path, found, errdefs.ErrFailedPrecondition)
	}
	fd, err := unix.PidfdOpen(found[0], 0)
	if err != nil {
		return pinned{}, fmt.Errorf("open shim %d: %w", found[0], err)
	}
	// Before it was held the number may have become another's.
	if !p.serves(found[0], pod, inode) {
		unix.Close(fd)
		return pinned{}, fmt.Errorf("shim %d ended meanwhile: %w", found[0], errdefs.ErrFailedPrecondition)
	}
	return pinned{fd, found[0]}, nil
}

func (p *Pool) processes() []int {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil // only for a bad pattern
	}
	var pids []int
	for _, dir := range dirs {
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// serves reports whether a process is a pod's shim that has the socket open.
func (p *Pool) serves(pid int, pod, inode string) bool {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil || !p.isShim(strings.Split(string(line), "\x00"), p.Namespace, pod) {
		return false
	}
	files, err := filepath.Glob(filepath.Join(dir, "fd", "*"))
	if err != nil {
		return false
	}
	return slices.ContainsFunc(files, func(file string) bool {
		to, err := os.Readlink(file)
		return err == nil && to == "socket:["+inode+"]"
	})
}

// acceptsConnections is the flag of a socket that listens.
const acceptsConnections = 1 << 16

// listener finds the inode of the socket that listens at path in the table of
// /proc/net/unix, "" for none.
func listener(table io.Reader, path string) (string, error) {
	lines := bufio.NewScanner(table)
	for lines.Scan() {
		// Number, references, protocol, flags, type, state, inode, path.
		f := strings.Fields(lines.Text())
		if len(f) < 8 || strings.Join(f[7:], " ") != path {
			continue
		}
		flags, err := strconv.ParseUint(f[3], 16, 32)
		if err == nil && flags&acceptsConnections != 0 {
			return f[6], nil
		}
	}
	return "", lines.Err()
}

// probe asks the shim of a pod once. It returns nil when there is no answer, and
// FailedPrecondition when there is one, whatever it says.
func probe(ctx context.Context, pod string, params *bootapi.BootstrapResult) error {
	asked, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	conn, closed, err := dial(params)
	if errors.Is(err, errNobodyListens) {
		return nil // it died; the signal is for nobody
	}
	if err == nil {
		defer conn.Close()
		var c v2.TaskServiceClient
		if c, err = v2.NewTaskClient(conn, int(params.GetVersion())); err != nil {
			return err
		}
		if _, err = c.Connect(asked, &api.ConnectRequest{ID: pod}); err != nil {
			select {
			case <-closed:
				return fmt.Errorf("it has ended: %w", errdefs.ErrFailedPrecondition)
			default:
			}
		}
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil && (asked.Err() != nil || timedOut(err)):
		return nil
	}
	return fmt.Errorf("it answers: %w", errdefs.ErrFailedPrecondition)
}

// timedOut is also true for a socket with a full queue, of which nobody takes a
// connection.
func timedOut(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// awaitGone waits until the runtime has given the tasks up.
func (p *Pool) awaitGone(ctx context.Context, tasks []string) error {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for _, id := range tasks {
		for {
			if s := p.recovered(id); s != nil {
				s.nudge()
			}
			_, err := p.Get(ctx, id)
			if errdefs.IsNotFound(err) {
				break
			}
			if !sleep(ctx, settlePoll) {
				return fmt.Errorf("clean up after the dead shim of task %s: %w", id, context.Cause(ctx))
			}
		}
	}
	return nil
}
