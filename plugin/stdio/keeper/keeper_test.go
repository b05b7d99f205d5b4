package keeper

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// ample is what anything may take here.
const ample = 20 * time.Second

// home is a directory of a keeper. Those of tests may be too long for a socket.
func home(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "keeper")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// A test that fails may leave one that still holds something.
		defer func() {
			for _, pid := range processes(t, dir) {
				if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
					t.Error(err)
				}
			}
		}()
		waitFor(t, "the keeper's end", func() bool { return len(processes(t, dir)) == 0 })
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func newIn(dir string) *Keeper { return New(filepath.Join(dir, Program), filepath.Join(dir, Socket)) }

// run runs a keeper as a daemon does; the function ends the daemon's part.
func run(t testing.TB, k *Keeper) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.Run(ctx)
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return stop
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(ample)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// processes finds the keepers that listen in dir.
func processes(t testing.TB, dir string) (pids []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		text, _ := os.ReadFile(path)
		if bytes.HasSuffix(text, []byte("\x00"+filepath.Join(dir, Socket)+"\x00")) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// process is the only keeper in dir.
func process(t testing.TB, dir string) int {
	t.Helper()
	pids := processes(t, dir)
	if len(pids) != 1 {
		t.Fatalf("keepers: %v", pids)
	}
	return pids[0]
}

func openFiles(t testing.TB, pid int) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// fifo makes a FIFO with text in it, which is there until held is called.
func fifo(t testing.TB, text string) (path string, held func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	return path, func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// content reads what is in a FIFO that nobody writes to.
func content(t testing.TB, path string) string {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	text, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func mustKeep(t testing.TB, k *Keeper, name string, fifos ...string) {
	t.Helper()
	if err := k.Keep(context.Background(), name, fifos); err != nil {
		t.Fatal(err)
	}
}

func TestOutlivesTheDaemon(t *testing.T) {
	dir := home(t)
	a, heldA := fifo(t, "out")
	b, heldB := fifo(t, "err")
	first := newIn(dir)
	stop := run(t, first)
	mustKeep(t, first, "x", a, b)
	stop()
	heldA()
	heldB()
	pid := process(t, dir)

	next := newIn(dir)
	run(t, next)
	mustKeep(t, next, "x", a, b) // as a daemon does that takes up a container
	if process(t, dir) != pid {
		t.Error("the keeper was not found again")
	}
	if got := content(t, a) + content(t, b); got != "outerr" {
		t.Errorf("kept %q", got)
	}
	next.Drop(context.Background(), "x")
	waitFor(t, "the end of a keeper that holds nothing", func() bool { return len(processes(t, dir)) == 0 })
}

func TestLetsGo(t *testing.T) {
	dir := home(t)
	k := newIn(dir)
	run(t, k)
	other, held := fifo(t, "")
	defer held()
	mustKeep(t, k, "other", other)
	files := openFiles(t, process(t, dir))
	for range 50 {
		a, held := fifo(t, "text")
		for range 2 { // the second replaces the first
			mustKeep(t, k, "a", a, a)
		}
		held()
		for range 2 {
			k.Drop(context.Background(), "a")
		}
		if got := content(t, a); got != "" {
			t.Fatalf("%q is still there", got)
		}
	}
	if now := openFiles(t, process(t, dir)); now != files {
		t.Errorf("%d files are open, before %d", now, files)
	}
	k.Drop(context.Background(), "other")
}

// TestEndedBetweenCalls: the daemon starts a keeper whenever it needs one.
func TestEndedBetweenCalls(t *testing.T) {
	dir := home(t)
	k := newIn(dir)
	run(t, k)
	a, held := fifo(t, "text")
	defer held()
	for range 20 {
		mustKeep(t, k, "a", a)
		process(t, dir)
		k.Drop(context.Background(), "a")
	}
}

func TestManyAtOnce(t *testing.T) {
	dir := home(t)
	k := newIn(dir)
	run(t, k)
	a, held := fifo(t, "text")
	defer held()
	var all sync.WaitGroup
	for i := range 300 {
		all.Go(func() {
			if err := k.Keep(context.Background(), fmt.Sprint(i), []string{a, a}); err != nil {
				t.Error(err)
			}
			if i%3 > 0 {
				k.Drop(context.Background(), fmt.Sprint(i))
			}
		})
	}
	all.Wait()
	if n := openFiles(t, process(t, dir)); n < 200 || n > 210 {
		t.Errorf("%d files are open for 100 names", n)
	}
	if err := k.Sweep(context.Background(), func(string) bool { return false }); err != nil {
		t.Fatal(err)
	}
	if n := openFiles(t, process(t, dir)); n < 200 {
		t.Error("what this daemon keeps was swept")
	}
	for i := range 300 {
		k.Drop(context.Background(), fmt.Sprint(i))
	}
}

func TestKilled(t *testing.T) {
	dir := home(t)
	k := newIn(dir)
	stop := run(t, k)
	a, held := fifo(t, "text")
	mustKeep(t, k, "a", a)
	mustKeep(t, k, "b", a)
	for range 3 {
		pid := process(t, dir)
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "another keeper with both files", func() bool {
			pids := processes(t, dir)
			if len(pids) != 1 || pids[0] == pid {
				return false
			}
			// The process that was started ends once it has left the keeper.
			open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pids[0]))
			return err == nil && len(open) >= 7
		})
	}
	stop()
	held()
	if got := content(t, a); got != "text" {
		t.Errorf("kept %q", got)
	}
	next := newIn(dir)
	run(t, next)
	next.Drop(context.Background(), "a")
	next.Drop(context.Background(), "b")
}

// TestBothKilled: a daemon that finds no keeper starts one for what there is.
func TestBothKilled(t *testing.T) {
	dir := home(t)
	k := newIn(dir)
	stop := run(t, k)
	a, held := fifo(t, "text")
	mustKeep(t, k, "a", a)
	stop()
	pid := process(t, dir)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "its end", func() bool { return len(processes(t, dir)) == 0 })
	next := newIn(dir)
	run(t, next)
	next.Drop(context.Background(), "unknown")
	if n := processes(t, dir); len(n) > 0 {
		t.Errorf("keepers %v run for nothing", n)
	}
	mustKeep(t, next, "a", a)
	held()
	if got := content(t, a); got != "text" {
		t.Errorf("kept %q", got)
	}
	next.Drop(context.Background(), "a")
}

// TestSilent: a keeper that hangs holds nobody up for long, and hears later of
// what it missed.
func TestSilent(t *testing.T) {
	dir := home(t)
	k := newIn(dir)
	k.patience, k.pause = 100*time.Millisecond, 300*time.Millisecond
	run(t, k)
	a, held := fifo(t, "text")
	gone, heldGone := fifo(t, "text")
	heldGone()
	mustKeep(t, k, "gone", gone)
	pid := process(t, dir)
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := k.Keep(context.Background(), "a", []string{a}); !errors.Is(err, errSilent) {
		t.Errorf("got %v", err)
	}
	k.Drop(context.Background(), "gone")
	if err := unix.Kill(pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the file", func() bool {
		links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		text := ""
		for _, l := range links {
			to, _ := os.Readlink(l)
			text += to + "\n"
		}
		return strings.Contains(text, a) && !strings.Contains(text, gone)
	})
	held()
	if got := content(t, a); got != "text" {
		t.Errorf("kept %q", got)
	}
	waitFor(t, "the keeper to answer", func() bool { return k.Sweep(context.Background(), func(string) bool { return true }) == nil })
	k.Drop(context.Background(), "a")
}

func TestSweep(t *testing.T) {
	dir := home(t)
	first := newIn(dir)
	stop := run(t, first)
	a, held := fifo(t, "text")
	defer held()
	for _, name := range []string{"a", "dead", "b", "dead2", "dead3"} {
		mustKeep(t, first, name, a)
	}
	stop()
	next := newIn(dir)
	run(t, next)
	known := func(name string) bool { return !strings.HasPrefix(name, "dead") }
	if err := next.Sweep(context.Background(), known); err != nil {
		t.Fatal(err)
	}
	var left []string
	if err := next.Sweep(context.Background(), func(name string) bool { left = append(left, name); return true }); err != nil {
		t.Fatal(err)
	}
	if len(left) != 2 || !known(left[0]) || !known(left[1]) {
		t.Errorf("left: %q", left)
	}
	if err := next.Sweep(context.Background(), func(string) bool { return false }); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "its end", func() bool { return len(processes(t, dir)) == 0 })
	if err := next.Sweep(context.Background(), known); err != nil {
		t.Errorf("without a keeper: %v", err)
	}
}

func TestRefusedHere(t *testing.T) {
	dir := home(t)
	k := newIn(dir)
	stop := run(t, k)
	a, held := fifo(t, "text")
	defer held()
	for what, call := range map[string]func() error{
		"no name":   func() error { return k.Keep(context.Background(), "", []string{a}) },
		"long name": func() error { return k.Keep(context.Background(), strings.Repeat("x", maxName+1), []string{a}) },
		"no file":   func() error { return k.Keep(context.Background(), "a", nil) },
		"5 files":   func() error { return k.Keep(context.Background(), "a", []string{a, a, a, a, a}) },
	} {
		if err := call(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := k.Keep(context.Background(), "a", []string{a + "x"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if err := k.Keep(context.Background(), "a", []string{"/dev/null"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no FIFO: %v", err)
	}
	mustKeep(t, k, strings.Repeat("x", maxName), a, a, a, a)
	k.Drop(context.Background(), strings.Repeat("x", maxName))
	k.Drop(context.Background(), "a")
	stop()
	if err := k.Keep(context.Background(), "a", []string{a}); !errdefs.IsUnavailable(err) {
		t.Errorf("after the end: %v", err)
	}
	k.Drop(context.Background(), "a") // returns
}

func TestCannotStart(t *testing.T) {
	k := New("/proc/none/keeper", filepath.Join(home(t), Socket))
	run(t, k)
	a, held := fifo(t, "text")
	defer held()
	begin := time.Now()
	for range 3 {
		if err := k.Keep(context.Background(), "a", []string{a}); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	}
	k.Drop(context.Background(), "a")
	if took := time.Since(begin); took > ample {
		t.Errorf("it took %s", took)
	}
}

// TestCannotStartForLong: what came and went meanwhile is not remembered.
func TestCannotStartForLong(t *testing.T) {
	k := New("/proc/none/keeper", filepath.Join(home(t), Socket))
	k.pause = time.Millisecond
	run(t, k)
	a, held := fifo(t, "text")
	defer held()
	ctx := context.Background()
	for n := range 100 {
		_ = k.Keep(ctx, fmt.Sprint(n), []string{a})
		if n > 0 {
			k.Drop(ctx, fmt.Sprint(n))
		}
	}
	waitFor(t, "the books to be what is to be held", func() (ok bool) {
		err := k.do(func(_ context.Context, b *books) error {
			ok = len(b.want) == 1 && len(b.news) == 1 && len(b.want["0"]) == 1
			return nil
		})
		return ok && err == nil
	})
}

func TestSize(t *testing.T) {
	b, err := files.ReadFile("bin/keeper")
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > 16<<10 {
		t.Errorf("the program has %d bytes: it is linked with a library", len(b))
	}
}

// raw is a session whose files and words need not be right.
type raw struct {
	*session
	t   testing.TB
	pid int
}

func newRaw(t testing.TB) raw {
	t.Helper()
	dir := home(t)
	conn, err := start(context.Background(), filepath.Join(dir, Program), filepath.Join(dir, Socket))
	if err != nil {
		t.Fatal(err)
	}
	r := raw{newSession(conn, ample), t, process(t, dir)}
	r.empty() // an answer: it has the connection among its files now
	t.Cleanup(func() {
		r.empty()
		r.close()
	})
	return r
}

// empty drops every name and returns how many there were.
func (r raw) empty() (n int) {
	r.t.Helper()
	for {
		name, there, err := r.name(0)
		if err != nil {
			r.t.Fatal(err)
		}
		if !there {
			return n
		}
		if err := r.drop(name); err != nil {
			r.t.Fatal(err)
		}
		n++
	}
}

// reply sends a packet and returns the first byte of what comes back.
func (r raw) reply(packet string, fds ...int) int {
	r.t.Helper()
	got, err := r.call(packet[0], []byte(packet[1:]), fds...)
	if err != nil {
		r.t.Fatalf("%.20q: %v", packet, err)
	}
	return int(got[0])
}

func (r raw) wantFiles(want int, after string) {
	r.t.Helper()
	if now := openFiles(r.t, r.pid); now != want {
		r.t.Errorf("after %s %d files are open, want %d", after, now, want)
	}
}

// someFiles are a reading and a writing end of a FIFO and a file.
func someFiles(t testing.TB) (reading, writing, file int) {
	t.Helper()
	path, held := fifo(t, "")
	t.Cleanup(held)
	var fds [3]int
	for i, f := range []struct {
		path  string
		flags int
	}{{path, unix.O_RDONLY}, {path, unix.O_WRONLY}, {"/dev/null", unix.O_RDONLY}} {
		fd, err := unix.Open(f.path, f.flags|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { closeAll([]int{fd}) })
		fds[i] = fd
	}
	return fds[0], fds[1], fds[2]
}

func index(n int32) string {
	return string(opList) + string(binary.NativeEndian.AppendUint32(nil, uint32(n)))
}

const (
	replyMalformed = 1
	replyNoFifo    = 3
)

func TestPackets(t *testing.T) {
	r := newRaw(t)
	in, out, file := someFiles(t)
	long := strings.Repeat("n", maxName)
	before := openFiles(t, r.pid)
	for _, row := range []struct {
		packet string
		fds    []int
		want   int
	}{
		{"Kname", nil, replyMalformed},
		{"K", []int{in}, replyMalformed},
		{"K" + long + "n", []int{in}, replyMalformed},
		{"K" + strings.Repeat("n", 100000), []int{in}, replyMalformed},
		{"Kname", []int{out}, replyNoFifo},
		{"Kname", []int{in, file}, replyNoFifo},
		{"Kname", []int{in, in, in, in, in}, replyFull},
		{"Dname", nil, replyDone},
		{"Dname", []int{in, in}, replyMalformed},
		{"D", nil, replyMalformed},
		{"L", nil, replyMalformed},
		{"Lx", nil, replyMalformed},
		{index(0), nil, replyNoMore},
		{index(-1), nil, replyNoMore},
		{index(1 << 30), nil, replyNoMore},
		{index(0), []int{in}, replyMalformed},
		{"Xname", []int{in}, replyMalformed},
		{"\x00", nil, replyMalformed},
	} {
		what := fmt.Sprintf("%.20q with %d files", row.packet, len(row.fds))
		if got := r.reply(row.packet, row.fds...); got != row.want {
			t.Errorf("%s: %d, want %d", what, got, row.want)
		}
		r.wantFiles(before, what)
	}
	if got := r.reply("K"+long, in, in, in, in); got != replyDone {
		t.Errorf("the longest: %d", got)
	}
	r.wantFiles(before+4, "the longest")
	if name, there, err := r.name(0); name != long || !there || err != nil {
		t.Errorf("listed %q, %v, %v", name, there, err)
	}
}

// TestEmptyPacket: it cannot be told from an end, and ends the connection; what
// came with it is closed.
func TestEmptyPacket(t *testing.T) {
	r := newRaw(t)
	in, _, _ := someFiles(t)
	before := openFiles(t, r.pid)
	conn, err := dial(context.Background(), r.conn.RemoteAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	sendEmpty(t, conn, unix.UnixRights(in, in))
	if n, err := conn.Read(make([]byte, 10)); n != 0 || err == nil {
		t.Errorf("read %d, %v", n, err)
	}
	waitFor(t, "the files to be closed", func() bool { return openFiles(t, r.pid) == before })
}

// sendEmpty sends nothing but files, to which the libraries would add a byte.
func sendEmpty(t *testing.T, conn *net.UnixConn, rights []byte) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	m := unix.Msghdr{Control: &rights[0], Controllen: uint64(len(rights))}
	var errno unix.Errno
	if err := raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&m)), 0)
	}); err != nil || errno != 0 {
		t.Fatal(err, errno)
	}
}

// TestCrowd: more clients than it takes wait for their turn, and those who leave
// in the middle of a call cost nothing.
func TestCrowd(t *testing.T) {
	r := newRaw(t)
	in, _, _ := someFiles(t)
	before := openFiles(t, r.pid)
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			conn, err := dial(context.Background(), r.conn.RemoteAddr().String())
			if err != nil {
				t.Error(err)
				return
			}
			s := newSession(conn, ample)
			defer s.close()
			if i%2 == 0 {
				_, _, _ = conn.WriteMsgUnix([]byte("Kx"), unix.UnixRights(in), nil)
				return
			}
			if err := s.drop("unknown"); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	r.empty()
	waitFor(t, "the clients to be gone", func() bool { return openFiles(t, r.pid) <= before || r.empty() > 0 })
}

// TestFull: there is an end to what it holds, and it works on.
func TestFull(t *testing.T) {
	r := newRaw(t)
	in, _, _ := someFiles(t)
	var err error
	n := 0
	for ; err == nil && n < 10000; n++ {
		_, err = r.call(opKeep, fmt.Appendf(nil, "name %d", n), in, in)
		if got := r.reply(fmt.Sprintf("Kname %d", n), in, in); got != replyDone {
			err = result([]byte{byte(got)}, nil)
		}
	}
	if !errdefs.IsResourceExhausted(err) {
		t.Fatalf("after %d names: %v", n, err)
	}
	before := openFiles(t, r.pid)
	if got := r.reply("Kone more", in, in); got != replyFull {
		t.Errorf("one more: %d", got)
	}
	r.wantFiles(before, "a refusal")
	if got := r.reply("Kname 7", in, in); got != replyDone {
		t.Errorf("another for the same name: %d", got)
	}
	if err := r.drop("name 7"); err != nil {
		t.Error(err)
	}
	if got := r.reply("Kone more", in, in); got != replyDone {
		t.Errorf("after a drop: %d", got)
	}
	if got := r.empty(); got != n-1 {
		t.Errorf("held %d names, want %d", got, n-1)
	}
}

func TestSignals(t *testing.T) {
	r := newRaw(t)
	for _, sig := range []unix.Signal{unix.SIGHUP, unix.SIGPIPE} {
		if err := unix.Kill(r.pid, sig); err != nil {
			t.Fatal(err)
		}
		if got := r.reply("Dx"); got != replyDone {
			t.Errorf("after %s: %d", unix.SignalName(sig), got)
		}
	}
	if sid, err := unix.Getsid(r.pid); err != nil || sid != r.pid {
		t.Errorf("it is in session %d, %v", sid, err)
	}
}

// FuzzPacket sends the real program anything, with any number of files.
func FuzzPacket(f *testing.F) {
	for _, p := range []string{"Ka", "Da", "L", "K", "X", index(0), index(5), "K" + strings.Repeat("x", 300)} {
		f.Add([]byte(p), byte(0))
		f.Add([]byte(p), byte(1))
		f.Add([]byte(p), byte(6))
	}
	r := newRaw(f)
	in, _, _ := someFiles(f)
	before := openFiles(f, r.pid)
	f.Fuzz(func(t *testing.T, packet []byte, files byte) {
		if len(packet) == 0 {
			return // that is an end, see TestEmptyPacket
		}
		var fds []int
		for range files % 8 {
			fds = append(fds, in)
		}
		held := 0
		for range 2 {
			want := expected(packet, len(fds), held)
			got, err := r.call(packet[0], packet[1:], fds...)
			if err != nil {
				t.Fatal(err)
			}
			if int(got[0]) != want {
				t.Fatalf("%q with %d files: %d, want %d", packet, len(fds), got[0], want)
			}
			if packet[0] == opKeep && want == replyDone {
				held = len(fds)
			}
			raw{r.session, t, r.pid}.wantFiles(before+held, fmt.Sprintf("%q with %d files", packet, len(fds)))
		}
		raw{r.session, t, r.pid}.empty()
	})
}

// expected is the protocol, said again.
func expected(packet []byte, files, held int) int {
	named := len(packet) > 1 && len(packet) <= 1+maxName
	switch {
	case files > maxFiles:
		return replyFull
	case named && packet[0] == opKeep && files > 0, named && packet[0] == opDrop && files == 0:
		return replyDone
	case len(packet) == 5 && packet[0] == opList && files == 0:
		if held > 0 && string(packet) == index(0) {
			return replyDone
		}
		return replyNoMore
	}
	return replyMalformed
}
