package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/container"
	"github.com/gantry-cri/gantry/plugin/crilog"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/stdio"
	"github.com/gantry-cri/gantry/plugin/stdio/keeper"
	"github.com/gantry-cri/gantry/plugin/store"
)

const (
	// drainLimit is how long the log of an exited container waits for
	// processes that still hold its output open.
	drainLimit = 5 * time.Second
	// flushLimit is how long the exit of a container is held back for a log
	// that takes nothing, because its file system is full or hangs.
	flushLimit = 10 * time.Second
	// quietLimit is how long nothing may come from a session whose command
	// has ended before a process in the background is left to itself.
	quietLimit = time.Second
)

// streams is container.Streams over package stdio. The directory of a
// container's streams, and of its execs' below it, is named after its ID.
type streams struct {
	dir    string
	log    crilog.Options
	drain  time.Duration // of ExecSync
	keeper *keeper.Keeper
}

func newStreams(stateDir string, c config.Runtime, k *keeper.Keeper) streams {
	line := c.MaxLogLine
	if line == 0 {
		line = -1 // no limit
	}
	return streams{
		dir: filepath.Join(stateDir, "io"), log: crilog.Options{MaxLine: line, MaxSize: c.MaxLogSize},
		drain: c.DrainExecSyncIOTimeout, keeper: k,
	}
}

// main is the directory of the streams of a container's first process.
func (s streams) main(id string) string { return filepath.Join(s.dir, id, "main") }

// sweep has the keeper let go of output of containers that do not run or are
// not there, which an earlier daemon was about to do. Those whose runtime does
// not answer yet are not among them.
func (s streams) sweep(ctx context.Context, containers *store.Containers) error {
	return s.keeper.Sweep(ctx, func(name string) bool {
		c, err := containers.Get(filepath.Base(filepath.Dir(name)))
		return err == nil && c.Phase != record.ContainerExited && name == s.main(c.ID)
	})
}

func (s streams) config(c record.Container, closeStdin container.CloseStdin) stdio.Config {
	limits := s.log
	// The pod's log directory is the kubelet's; what is below it may be
	// anybody's.
	limits.Root = strings.TrimSuffix(c.LogPath, filepath.Join("/", c.Config.GetLogPath()))
	return stdio.Config{
		Dir: s.main(c.ID), Terminal: c.Config.GetTty(), Keeper: s.keeper,
		Stdin: c.Config.GetStdin(), StdinOnce: c.Config.GetStdinOnce(),
		LogPath: c.LogPath, Log: limits, CloseStdin: closeStdin,
	}
}

func (s streams) Open(ctx context.Context, c record.Container, closeStdin container.CloseStdin) (container.Stream, error) {
	if err := os.MkdirAll(filepath.Join(s.dir, c.ID), 0o700); err != nil {
		return nil, err
	}
	io, err := stdio.New(ctx, s.config(c, closeStdin))
	if err != nil {
		return nil, err
	}
	return mainStream{io}, nil
}

func (s streams) Reattach(ctx context.Context, c record.Container, closeStdin container.CloseStdin) (container.Stream, error) {
	// Where it is gone, nothing is kept of the main process, but others can be run.
	if err := os.MkdirAll(filepath.Join(s.dir, c.ID), 0o700); err != nil {
		return nil, err
	}
	io, err := stdio.Reattach(ctx, s.config(c, closeStdin))
	if err != nil {
		return nil, err
	}
	return mainStream{io}, nil
}

// started is the file whose time is that of a container's start.
func (s streams) started(id string) string { return filepath.Join(s.dir, id, "started") }

func (s streams) NoteStart(_ context.Context, id string) error {
	return os.WriteFile(s.started(id), nil, 0o600)
}

func (s streams) NotedStart(id string) (time.Time, error) {
	info, err := os.Stat(s.started(id))
	if errors.Is(err, fs.ErrNotExist) {
		return time.Time{}, nil
	}
	if err != nil {
		return time.Time{}, err
	}
	return info.ModTime(), nil
}

func (s streams) Remove(ctx context.Context, id string) error {
	s.keeper.Drop(ctx, s.main(id))
	return stdio.Remove(filepath.Join(s.dir, id))
}

// mainStream is container.Stream.
type mainStream struct{ *stdio.IO }

func (m mainStream) Endpoints() container.Endpoints { return container.Endpoints(m.Paths()) }

func (m mainStream) Reopen(ctx context.Context, path string) error { return m.ReopenLog(ctx, path) }

func (m mainStream) Attach(ctx context.Context, c container.Connection) error {
	return m.IO.Attach(ctx, stdio.Streams{Stdin: c.Stdin, Stdout: c.Stdout, Stderr: c.Stderr})
}

// Close says what of the output did not get into the log, as nothing else does.
func (m mainStream) Close(ctx context.Context) error {
	if lost := m.Lost(); lost.Bytes > 0 {
		log.G(ctx).WithFields(log.Fields{"bytes": lost.Bytes, "lines": lost.Lines}).
			Warn("output of a container was dropped, because its log took nothing for too long: is the disk full?")
	}
	return m.IO.Close(ctx)
}

func (m mainStream) Drain(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, drainLimit+flushLimit,
		fmt.Errorf("the log takes nothing for %s: %w", flushLimit, context.DeadlineExceeded))
	defer cancel()
	return m.Wait(ctx, drainLimit)
}

// execPrefix is of the directories of execs, before their IDs.
const execPrefix = "exec-"

func (s streams) execConfig(containerID, execID string) stdio.ExecConfig {
	return stdio.ExecConfig{Dir: filepath.Join(s.dir, containerID, execPrefix+execID)}
}

func (s streams) Execs(containerID string) (ids []string, err error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, containerID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, e := range entries {
		if id, ok := strings.CutPrefix(e.Name(), execPrefix); ok {
			ids = append(ids, id)
		}
	}
	return ids, err
}

func (s streams) Left(ctx context.Context, containerID, execID string) (container.Session, error) {
	dir := s.execConfig(containerID, execID).Dir
	e, err := stdio.LeftExec(ctx, dir)
	if errors.Is(err, fs.ErrNotExist) { // made or removed by half
		return nil, errors.Join(stdio.Remove(dir), errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return session{e, stdio.Drain{}}, nil
}

func (s streams) Session(ctx context.Context, containerID, execID string, c container.Connection, closeStdin container.CloseStdin) (container.Session, error) {
	cfg := s.execConfig(containerID, execID)
	cfg.Terminal, cfg.CloseStdin = c.TTY, closeStdin
	cfg.Streams = stdio.Streams{Stdin: c.Stdin, Stdout: c.Stdout, Stderr: c.Stderr}
	e, err := stdio.NewExec(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return session{e, stdio.Drain{Quiet: quietLimit}}, nil
}

// session is container.Session.
type session struct {
	*stdio.Exec
	drain stdio.Drain
}

func (s session) Endpoints() container.Endpoints { return container.Endpoints(s.Paths()) }

func (s session) Finish(ctx context.Context) error { return s.Wait(ctx, s.drain) }

func (s streams) Capture(ctx context.Context, containerID, execID string) (container.Capture, error) {
	cfg := s.execConfig(containerID, execID)
	out := capture{stdout: stdio.NewCapture(stdio.CaptureLimit), stderr: stdio.NewCapture(stdio.CaptureLimit)}
	cfg.Stdout, cfg.Stderr = out.stdout, out.stderr
	e, err := stdio.NewExec(ctx, cfg)
	if err != nil {
		return nil, err
	}
	out.session = session{e, stdio.Drain{Quiet: quietLimit, Most: s.drain}}
	return out, nil
}

// capture is container.Capture.
type capture struct {
	session
	stdout, stderr *stdio.Capture
}

func (c capture) Output() (stdout, stderr []byte, dropped uint64) {
	stdout, of1 := c.stdout.Result()
	stderr, of2 := c.stderr.Result()
	all := of1 + of2 + uint64(len(stdout)+len(stderr))
	stdout, stderr = stdio.Fit(stdout, stderr)
	return stdout, stderr, all - uint64(len(stdout)+len(stderr))
}
