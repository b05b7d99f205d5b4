package lifecycle

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-client/pkg/logs"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// TestLOG_01_Format: each line has its time, stream and tag, and kubectl's own
// reader understands them.
func TestLOG_01_Format(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	before := time.Now()
	s := b.exited(b.run(b.script("app", "echo one; echo two >&2; echo; echo '  three'")))
	entries := readLog(t, s.LogPath)
	last := before
	var out, errs []string
	for _, e := range entries {
		if e.partial {
			t.Errorf("%q is tagged as a part", e.text)
		}
		if e.stream == "stdout" {
			out = append(out, e.text)
			if e.at.Before(last) {
				t.Errorf("%q was written at %v, the line before at %v", e.text, e.at, last)
			}
			last = e.at
		} else {
			errs = append(errs, e.text)
		}
		if e.at.Before(before) || e.at.After(time.Now()) {
			t.Errorf("%q was written at %v", e.text, e.at)
		}
	}
	if got := strings.Join(out, "|") + "&" + strings.Join(errs, "|"); got != "one||  three&two" {
		t.Errorf("stdout and stderr are %q", got)
	}
	rt, _ := b.CRI()
	var stdout, stderr bytes.Buffer
	if err := logs.ReadLogs(t.Context(), s.LogPath, s.Id, &logs.LogOptions{}, rt, &stdout, &stderr); err != nil {
		t.Fatal(err)
	}
	if stdout.String() != "one\n\n  three\n" || stderr.String() != "two\n" {
		t.Errorf("kubectl shows %q and %q", stdout.String(), stderr.String())
	}
}

func TestLOG_02_PartialLines(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	s := b.exited(b.run(b.script("app", "head -c 1048576 /dev/zero | tr '\\0' x; echo y; printf end")))
	entries := readLog(t, s.LogPath)
	parts := 0
	for _, e := range entries {
		if e.partial {
			parts++
		}
		if len(e.text) > 16<<10 {
			t.Errorf("a line has %d bytes", len(e.text))
		}
	}
	got := strings.TrimSuffix(joinLog(entries, "stdout"), "\n")
	if want := strings.Repeat("x", 1<<20) + "y\nend"; got != want {
		t.Errorf("the log has %d bytes that end in %.20q, want %d", len(got), got[max(0, len(got)-20):], len(want))
	}
	if parts < 64 {
		t.Errorf("a line of 1 MiB came in %d parts", parts)
	}
}

func TestLOG_03_LineSize(t *testing.T) {
	for name, row := range map[string]struct {
		size  int
		want  []int
		parts string
	}{
		"4096":      {4096, []int{4096, 4096, 1808}, "PPF"},
		"unlimited": {-1, []int{10000}, "F"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBoxOn(t, start(t, daemon.Set(row.size, "plugins", daemon.RuntimePlugin, "max_container_log_line_size")))
			s := b.exited(b.run(b.script("app", "head -c 10000 /dev/zero | tr '\\0' x; echo")))
			var sizes []int
			parts := ""
			for _, e := range readLog(t, s.LogPath) {
				sizes = append(sizes, len(e.text))
				parts += map[bool]string{true: "P", false: "F"}[e.partial]
			}
			if fmt.Sprint(sizes) != fmt.Sprint(row.want) || parts != row.parts {
				t.Errorf("lines of %v bytes tagged %s, want %v and %s", sizes, parts, row.want, row.parts)
			}
		})
	}
}

// counter writes numbered lines on both streams until /tmp/stop exists.
const counter = "i=0; while ! [ -e /tmp/stop ]; do i=$((i+1)); echo line $i; echo error $i >&2; done; echo total $i"

// checkCounted wants every line of counter once and in order.
func checkCounted(t *testing.T, entries []entry) int {
	t.Helper()
	out, errs := 0, 0
	for n, e := range entries {
		var want string
		switch {
		case e.stream == "stderr":
			errs++
			want = fmt.Sprint("error ", errs)
		case strings.HasPrefix(e.text, "total"):
			want = fmt.Sprint("total ", out)
		default:
			out++
			want = fmt.Sprint("line ", out)
		}
		if e.text != want || e.partial {
			t.Fatalf("entry %d of %d is %+v, want %q", n, len(entries), e, want)
		}
	}
	if len(entries) == 0 || out != errs {
		t.Errorf("%d lines on stdout and %d on stderr", out, errs)
	}
	return out
}

// joined puts lines together that stock containerd has cut in two: it opens a log anew
// between any two bytes.
func joined(entries []entry) (whole []entry) {
	begun := map[string]string{}
	for _, e := range entries {
		e.text = begun[e.stream] + e.text
		begun[e.stream] = ""
		if e.partial {
			begun[e.stream] = e.text
			continue
		}
		whole = append(whole, e)
	}
	return whole
}

// stopCounter ends a counter. The end of the container may kill the command that
// brought it about, so how that went does not matter.
func (b *box) stopCounter(id string) *cri.ContainerStatus {
	b.t.Helper()
	_, _ = b.Runtime().ExecSync(b.t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"touch", "/tmp/stop"}})
	return b.exited(id)
}

// TestLOG_04_Rotation: no line is lost while the log moves on under load.
func TestLOG_04_Rotation(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.script("app", counter))
	path := b.status(id).LogPath
	const rotations = 100
	for n := range rotations {
		b.grown(path)
		if err := os.Rename(path, fmt.Sprint(path, ".", n)); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Runtime().ReopenContainerLog(t.Context(), &cri.ReopenContainerLogRequest{ContainerId: id}); err != nil {
			t.Fatalf("rotation %d: %v", n, err)
		}
	}
	b.stopCounter(id)
	var all []entry
	for n := range rotations {
		all = append(all, readLog(t, fmt.Sprint(path, ".", n))...)
	}
	all = append(all, readLog(t, path)...)
	if stock {
		all = joined(all)
	}
	t.Logf("%d lines over %d files", checkCounted(t, all), rotations+1)

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Runtime().ReopenContainerLog(t.Context(), &cri.ReopenContainerLogRequest{ContainerId: id}); err == nil {
		t.Error("the log of a stopped container was opened again")
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a log file was made for a stopped container: %v", err)
	}
}

// grown waits until there is something in the file.
func (b *box) grown(path string) {
	b.t.Helper()
	eventually(b.t, ample, func() error {
		info, err := os.Stat(path)
		if err == nil && info.Size() == 0 {
			err = errors.New("the log is empty")
		}
		return err
	})
}

// TestLOG_05_SizeMax: a log never gets longer than the configuration allows, and
// always has the last lines, whole and in order.
func TestLOG_05_SizeMax(t *testing.T) {
	const most = 16 << 10
	b := newBoxOn(t, start(t, daemon.Set(most, "plugins", daemon.RuntimePlugin, "log_size_max")))
	const lines = 20000
	id := b.run(b.script("app", fmt.Sprintf("i=0; while [ $i -lt %d ]; do i=$((i+1)); echo line $i; done; head -c 20000 /dev/zero | tr '\\0' x", lines)))
	path := b.status(id).LogPath
	looks := 0
	for ; b.status(id).State == cri.ContainerState_CONTAINER_RUNNING; time.Sleep(poll) {
		if info, err := os.Stat(path); err != nil || info.Size() > most {
			t.Fatalf("the log while it is written: %v, %v", info, err)
		}
		looks++
	}
	b.exited(id)
	if size := fileSize(t, path); size > most || size == 0 {
		t.Errorf("after %d looks the log has %d bytes", looks, size)
	}
	rest := ""
	for _, e := range readLog(t, path) {
		rest += e.text
	}
	if rest == "" || strings.Trim(rest, "x") != "" {
		t.Errorf("the log ends with %.60q", rest)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("the log directory has %v, %v", entries, err)
	}

	id = b.run(b.script("lines", "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo line $i; done"))
	path = b.exited(id).LogPath
	all := readLog(t, path)
	if size := fileSize(t, path); size > most || len(all) == 0 {
		t.Fatalf("the log has %d bytes and %d entries", size, len(all))
	}
	for i, e := range all {
		if want := fmt.Sprint("line ", 2000-len(all)+1+i); e.text != want || e.partial {
			t.Fatalf("entry %d of %d is %+v, want %q", i, len(all), e, want)
		}
	}
}

// TestLOG_08_Safety: a log never goes where a symbolic link in the log
// directory points.
func TestLOG_08_Safety(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("mine\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := b.script("file", "echo written by the container")
	if err := os.Symlink(outside, filepath.Join(b.config.LogDirectory, file.LogPath)); err != nil {
		t.Fatal(err)
	}
	dir := b.script("dir", "echo written by the container")
	dir.LogPath = "link/app.log"
	if err := os.Symlink(filepath.Dir(outside), filepath.Join(b.config.LogDirectory, "link")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*cri.ContainerConfig{file, dir} {
		id, err := b.create(c)
		if err == nil {
			err = b.start(id)
		}
		if err == nil {
			t.Errorf("%s: a container started with its log behind a symbolic link", c.Metadata.Name)
			b.exited(id)
		}
	}
	if text, err := os.ReadFile(outside); err != nil || string(text) != "mine\n" {
		t.Errorf("the file behind the link says %q, %v", text, err)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(outside), "app.log")); err == nil {
		t.Error("a log was made in the directory behind the link")
	}
	escape := b.script("escape", "true")
	escape.LogPath = "../escape.log"
	b.refused(escape, codes.InvalidArgument, "log_path")

	s := b.exited(b.run(b.script("mode", "echo x")))
	info, err := os.Stat(s.LogPath)
	if err != nil {
		t.Fatal(err)
	}
	if mode := info.Mode(); !mode.IsRegular() || mode.Perm()&0o027 != 0 {
		t.Errorf("the log file is %s", mode)
	}
}

// TestLOG_09_DaemonRestart: the container writes on while the daemon is killed,
// and every line is in the log once.
func TestLOG_09_DaemonRestart(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t))
	id := b.run(b.script("app", counter))
	path := b.status(id).LogPath
	for range 4 {
		b.grown(path)
		b.Kill()
		b.Up()
		size := fileSize(t, path)
		eventually(t, ample, func() error {
			if fileSize(t, path) == size {
				return errors.New("no line since the restart")
			}
			return nil
		})
	}
	s := b.stopCounter(id)
	if s.ExitCode != 0 {
		t.Errorf("exit code %d", s.ExitCode)
	}
	t.Logf("%d lines over 4 kills", checkCounted(t, readLog(t, path)))
}

// TestLOG_09_LogComesBack: a log that cannot be continued after a restart, here
// for a symbolic link on its way, is continued once it can, and until then a
// rotation hears why not.
func TestLOG_09_LogComesBack(t *testing.T) {
	oursAlone(t, "log that goes on over restarts")
	b := newBox(t)
	c := b.script("app", "echo first; while ! [ -e /tmp/go ]; do sleep 0.05; done; echo second; sleep 1000")
	c.LogPath = "app/0.log"
	id := b.run(c)
	b.logged(id, "first")
	dir := filepath.Dir(b.status(id).LogPath)
	away := dir + ".away"
	b.Kill()
	// In one step: the shim, whose log it is now, would make the directory again.
	if err := errors.Join(os.Symlink(away, away), unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, away, unix.RENAME_EXCHANGE)); err != nil {
		t.Fatal(err)
	}
	b.Up()
	reopen := func() error {
		_, err := b.Runtime().ReopenContainerLog(t.Context(), &cri.ReopenContainerLogRequest{ContainerId: id})
		return err
	}
	eventually(t, ample, func() error {
		if err := reopen(); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "symlinks are refused") {
			return fmt.Errorf("a log behind a symbolic link: %w", err)
		}
		return nil
	})
	if err := errors.Join(os.Remove(dir), os.Rename(away, dir)); err != nil {
		t.Fatal(err)
	}
	if err := reopen(); err != nil {
		t.Error(err)
	}
	b.Exec(id, "touch", "/tmp/go")
	b.logged(id, "second")
}

// keptBox is a box with a directory in which a test gives its containers signs,
// whether or not there is a daemon.
type keptBox struct {
	*box
	signs string
}

func newKeptBox(t *testing.T) keptBox {
	t.Helper()
	return keptBox{pausedBox(t, start(t)), t.TempDir()}
}

// counting is a container that waits for the sign "go", writes so many numbered
// lines on either stream, or until the sign "stop" for 0, and ends with a code.
func (b keptBox) counting(name string, lines, code int) string {
	b.t.Helper()
	more := fmt.Sprintf("[ $i -lt %d ]", lines)
	if lines == 0 {
		more = "! [ -e /signs/stop ]"
	}
	c := b.script(name, fmt.Sprintf("while ! [ -e /signs/go ]; do sleep 0.1; done; i=0; "+
		"while %s; do i=$((i+1)); echo line $i; echo error $i >&2; done; echo total $i; exit %d", more, code))
	c.Mounts = []*cri.Mount{{ContainerPath: "/signs", HostPath: b.signs}}
	return b.run(c)
}

func (b keptBox) sign(name string) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.signs, name), nil, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// holders are the programs that have an output of a container open, by process.
func (b keptBox) holders(id string) map[int]string {
	b.t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		b.t.Fatal(err)
	}
	found := map[int]string{}
	for _, l := range links {
		to, _ := os.Readlink(l)
		if !strings.Contains(to, "/"+id+"/main/std") {
			continue
		}
		proc := filepath.Dir(filepath.Dir(l))
		pid, err := strconv.Atoi(filepath.Base(proc))
		if err != nil {
			b.t.Fatal(err)
		}
		exe, _ := os.Readlink(proc + "/exe")
		found[pid] = filepath.Base(exe)
	}
	return found
}

const keeperProgram = "gantry-keeper"

// keeper is the process that keeps the output of a container, once there is one
// that is not the one before.
func (b keptBox) keeper(id string, before int) (keeper int) {
	b.t.Helper()
	eventually(b.t, ample, func() error {
		for pid, exe := range b.holders(id) {
			if exe == keeperProgram && pid != before {
				keeper = pid
				return nil
			}
		}
		return errors.New("nobody keeps the container's output")
	})
	return keeper
}

// onlyKept waits until the containers have ended and their shim has closed their
// output, while there is no daemon: what is left of it is with the keeper.
func (b keptBox) onlyKept(ids ...string) {
	b.t.Helper()
	for _, id := range ids {
		eventually(b.t, ample, func() error {
			for pid, exe := range b.holders(id) {
				if exe != keeperProgram {
					return fmt.Errorf("process %d, %s, has the output open", pid, exe)
				}
			}
			return nil
		})
	}
}

// counted checks the end of containers that ended with these codes.
func (b keptBox) counted(ids []string, codes ...int32) {
	b.t.Helper()
	for i, id := range ids {
		s := b.exited(id)
		if s.ExitCode != codes[i] {
			b.t.Errorf("container %d ended with %d, want %d", i, s.ExitCode, codes[i])
		}
		lines := checkCounted(b.t, readLog(b.t, s.LogPath))
		b.t.Logf("container %d: %d lines", i, lines)
	}
}

// TestLOG_09_EndsWhileDown: containers write what fits into a pipe and end while
// there is no daemon. The next daemon has all of it.
func TestLOG_09_EndsWhileDown(t *testing.T) {
	oursAlone(t, "log that goes on over restarts")
	t.Parallel()
	b := newKeptBox(t)
	var ids []string
	var codes []int32
	for i := range 12 {
		// The small ones fit in a pipe of any size that Linux gives; the large
		// ones take most of what the daemon asks for.
		lines := []int{0, 1, 500, 2000, 12000}[i%5]
		if lines == 0 {
			lines = i + 2
		}
		ids = append(ids, b.counting(fmt.Sprint("app", i), lines, i))
		codes = append(codes, int32(i))
	}
	b.Kill()
	b.sign("go")
	b.onlyKept(ids...)
	b.Up()
	b.counted(ids, codes...)
}

// TestLOG_09_MoreThanAPipe: containers that write more than a pipe holds wait
// for a daemon, which may be killed again while it takes what there is.
func TestLOG_09_MoreThanAPipe(t *testing.T) {
	t.Parallel()
	b := newKeptBox(t)
	ids := []string{b.counting("one", 40_000, 3), b.counting("two", 40_000, 0)}
	b.Kill()
	b.sign("go")
	for range 3 {
		b.Up()
		b.grown(b.status(ids[0]).LogPath)
		b.Kill()
	}
	b.Up()
	b.counted(ids, 3, 0)
}

// TestLOG_09_WithoutDaemon: containers of our own shim do not wait for a daemon:
// while there is none, their logs go on.
// The next daemon goes on with them, and each line is there once.
func TestLOG_09_WithoutDaemon(t *testing.T) {
	oursAlone(t, "log that goes on over restarts")
	t.Parallel()
	d := start(t, daemon.Edit(withGantry))
	p := gantryPod(d, "writes-on")
	b := keptBox{&box{Daemon: d, t: t, pod: p.id, config: p.config, image: plain(t, d)}, t.TempDir()}
	ids := []string{b.counting("ends", 60_000, 3), b.counting("goes-on", 0, 4)}
	b.sign("go")
	path := b.status(ids[1]).LogPath
	b.grown(path)
	longer := func() {
		size := fileSize(t, path)
		eventually(t, ample, func() error {
			if now := fileSize(t, path); now < size+1<<20 {
				return fmt.Errorf("the log has grown from %d bytes to %d", size, now)
			}
			return nil
		})
	}
	for range 2 {
		b.Kill()
		longer()
		b.Up()
		longer()
	}
	b.sign("stop")
	b.counted(ids, 3, 4)
}

// TestLOG_09_KeeperKilled: a keeper that is killed is replaced, and the one that
// takes its place has everything.
func TestLOG_09_KeeperKilled(t *testing.T) {
	oursAlone(t, "log that goes on over restarts")
	t.Parallel()
	b := newKeptBox(t)
	ids := []string{b.counting("first", 0, 0), b.counting("second", 0, 5)}
	b.sign("go")
	keeper := 0
	for range 3 {
		keeper = b.keeper(ids[0], keeper)
		if err := syscall.Kill(keeper, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	b.keeper(ids[0], keeper)
	b.keeper(ids[1], keeper)
	b.Kill()
	b.sign("stop")
	// The rest waits for room in the pipe, or is with the keeper.
	b.Up()
	b.counted(ids, 0, 5)
}

// TestLOG_09_BothKilled: the daemon finds no keeper when it starts.
func TestLOG_09_BothKilled(t *testing.T) {
	oursAlone(t, "log that goes on over restarts")
	t.Parallel()
	b := newKeptBox(t)
	ids := []string{b.counting("first", 2000, 0), b.counting("second", 2000, 9)}
	keeper := b.keeper(ids[1], 0)
	b.Kill()
	if err := syscall.Kill(keeper, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.Up()
	for _, id := range ids {
		b.keeper(id, keeper)
	}
	b.Kill()
	b.sign("go")
	b.onlyKept(ids...)
	b.Up()
	b.counted(ids, 0, 9)
}

// TestLOG_09_NothingKept: without containers there is no keeper, and what an
// earlier daemon was about to drop is dropped by the next one.
func TestLOG_09_NothingKept(t *testing.T) {
	oursAlone(t, "log that goes on over restarts")
	t.Parallel()
	b := newKeptBox(t)
	id := b.counting("app", 1, 0)
	keeper := b.keeper(id, 0)
	b.Stop()
	if !alive(keeper) {
		t.Error("the keeper ended with the daemon")
	}
	b.Up()
	if now := b.keeper(id, 0); now != keeper {
		t.Errorf("the keeper is process %d, before %d", now, keeper)
	}
	b.sign("go")
	b.counted([]string{id}, 0)
	waitGone(t, keeper)
}

func fileSize(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// TestLOG_12_ExecDrain: a command is over when it exits, although a child of it
// holds on to the output.
func TestLOG_12_ExecDrain(t *testing.T) {
	b := newBoxOn(t, start(t, daemon.Set("1s", "plugins", daemon.RuntimePlugin, "drain_exec_sync_io_timeout")))
	id := b.run(b.sleeper("app"))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	resp, err := b.Runtime().ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", "echo parent; sleep 1000 & exit 0"}})
	// The row lets a runtime give what it has or say that it is not all.
	if err == nil && string(resp.Stdout) != "parent\n" {
		t.Errorf("output %q", resp.Stdout)
	}
	if ctx.Err() != nil {
		t.Errorf("the command did not come back: %v", err)
	}
	if got := sh(b.Daemon, id, "echo next"); got != "next" {
		t.Errorf("the next command says %q", got)
	}
}

// TestLOG_15_Leaks: hundreds of commands and failing starts leave neither files
// nor goroutines, in the daemon or the shims.
func TestLOG_15_Leaks(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t))
	id := b.run(b.sleeper("app"))
	work := func(execs, starts int) {
		var wg sync.WaitGroup
		for i := range 6 {
			wg.Go(func() {
				for range execs / 6 {
					b.anyExec(id, i)
				}
			})
		}
		wg.Wait()
		for n := range starts {
			b.failedStart(fmt.Sprint("fails", n))
		}
	}
	work(24, 2)
	files, routines := b.allFiles(), b.goroutines()
	work(180, 12)
	eventually(t, ample, func() error {
		if now := b.allFiles(); now > files+5 {
			return fmt.Errorf("%d files are open, before %d", now, files)
		}
		if now := b.goroutines(); now > routines+10 {
			return fmt.Errorf("%d goroutines run, before %d", now, routines)
		}
		return nil
	})
}

// anyExec runs a command, in one way or another.
func (b *box) anyExec(id string, i int) {
	var err error
	switch i % 6 {
	case 0:
		_, err = b.exec(spdyDial, id, strings.NewReader("x\n"), "cat")
	case 1:
		_, err = b.exec(websocketDial, id, nil, "true")
	case 2:
		if _, failed := b.exec(spdyDial, id, nil, "/no/such/program"); failed == nil {
			err = errors.New("a missing program ran")
		}
	case 3:
		_, err = b.Runtime().ExecSync(context.Background(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"/no/such/program"}})
		if err != nil {
			err = nil
		} else {
			err = errors.New("a missing program ran")
		}
	default:
		_, err = b.Runtime().ExecSync(context.Background(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"echo", "x"}})
	}
	if err != nil {
		b.t.Errorf("exec %d: %v", i%6, err)
	}
}

// failedStart makes a container whose program does not exist.
func (b *box) failedStart(name string) {
	id, err := b.create(daemon.ContainerConfig(name, b.image, "/no/such/program"))
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.start(id); err == nil {
		b.t.Error("a missing program was started")
	}
	b.remove(id)
}

// allFiles counts the open files of the daemon and all its shims.
func (b *box) allFiles() int {
	b.t.Helper()
	total := openFiles(b.t, b.PID())
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		b.t.Fatal(err)
	}
	for _, dir := range dirs {
		exe, _ := os.Readlink(dir + "/exe")
		env, _ := os.ReadFile(dir + "/environ")
		args, _ := os.ReadFile(dir + "/cmdline")
		if strings.Contains(exe, "containerd-shim") && bytes.Contains(append(env, args...), []byte(b.Dir)) {
			list, _ := os.ReadDir(dir + "/fd")
			total += len(list)
		}
	}
	return total
}

// goroutines counts those of the daemon, by its debug socket.
func (b *box) goroutines() int {
	b.t.Helper()
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(b.Dir, "debug.sock"))
	}}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://debug/debug/pprof/goroutine?debug=1")
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	var n int
	if _, err := fmt.Sscanf(string(text), "goroutine profile: total %d", &n); err != nil {
		b.t.Fatalf("%v: %.200s", err, text)
	}
	return n
}

func TestLOG_16_BinaryAndStderr(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.script("app", "for f in a b; do head -c 300000 /dev/urandom >/tmp/$f; echo >>/tmp/$f; done; cat /tmp/a; cat /tmp/b >&2; touch /tmp/done; sleep 1000"))
	eventually(t, ample, func() error {
		if _, code := tryExec(t, b.Daemon, id, "test", "-e", "/tmp/done"); code != 0 {
			return errors.New("it still writes")
		}
		return nil
	})
	sums := strings.Fields(b.Exec(id, "sha256sum", "/tmp/a", "/tmp/b"))
	b.stop(id, 0)
	entries := readLog(t, b.status(id).LogPath)
	for i, stream := range []string{"stdout", "stderr"} {
		text := joinLog(entries, stream)
		if got := fmt.Sprintf("%x", sha256.Sum256([]byte(text))); got != sums[2*i] {
			t.Errorf("%s: %d bytes have the sum %s, those written %s", stream, len(text), got, sums[2*i])
		}
	}
}

func TestRPC_16_ReopenContainerLog(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.script("app", "echo first; while ! [ -e /tmp/go ]; do sleep 0.05; done; echo second; while ! [ -e /tmp/on ]; do sleep 0.05; done; echo third; sleep 1000"))
	b.logged(id, "first")
	path := b.status(id).LogPath
	before := inodeOf(t, path)
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Runtime().ReopenContainerLog(t.Context(), &cri.ReopenContainerLogRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	if inodeOf(t, path) == before {
		t.Error("the same file")
	}
	b.Exec(id, "touch", "/tmp/go")
	b.logged(id, "second")
	if got := logText(t, path+".old", "stdout") + logText(t, path, "stdout"); got != "first\nsecond\n" {
		t.Errorf("the files say %q", got)
	}
	if err := errors.Join(os.Rename(path, path+".new"), os.Mkdir(path, 0o755)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Runtime().ReopenContainerLog(t.Context(), &cri.ReopenContainerLogRequest{ContainerId: id}); err == nil {
		t.Error("a directory was opened as a log")
	}
	b.Exec(id, "touch", "/tmp/on")
	eventually(t, ample, func() error {
		if got := logText(t, path+".new", "stdout"); got != "second\nthird\n" {
			return fmt.Errorf("after a failed rotation the log says %q", got)
		}
		return nil
	})
	_, err := b.Runtime().ReopenContainerLog(t.Context(), &cri.ReopenContainerLogRequest{ContainerId: "absent"})
	wantError(t, err, codes.NotFound, "absent")
}

func inodeOf(t *testing.T, path string) uint64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return inode(info)
}

// TestLOG_10_FullDisk: a container that ends while its log takes nothing is
// reported all the same, with its exit code, and can be removed.
func TestLOG_10_FullDisk(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "on-a-full-disk")
	dir := p.config.LogDirectory
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	// Far more than the file system takes, and than a pipe holds.
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d), "sh", "-c", "yes | head -c 3000000; exit 7"))
	var s *cri.ContainerStatus
	eventually(t, 2*time.Minute, func() error {
		if s = containerStatus(t, d, ctr); s.State != cri.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("the container is %s", s.State)
		}
		return nil
	})
	if s.ExitCode != 7 {
		t.Errorf("exit code is %d (%s)", s.ExitCode, s.Reason)
	}
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
}
