package crilog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/cri-client/pkg/logs"

	"github.com/containerd/errdefs"
)

// rig is a Log with FIFOs that the test writes to, as a shim does.
type rig struct {
	t      *testing.T
	state  string
	path   string
	log    *Log
	fifos  [streams]*Fifo
	shim   [streams]*os.File // open read-write, as the runc shim's two files are
	copies sync.WaitGroup
	errs   [streams]error
}

// memDir is a directory on tmpfs where there is one.
func memDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "crilog")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newRig(t *testing.T, opts Options) *rig {
	t.Helper()
	r := &rig{t: t, state: memDir(t), path: filepath.Join(t.TempDir(), "pod", "app", "0.log")}
	for s := range streams {
		name := r.fifo(s)
		if err := unix.Mkfifo(name, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		r.shim[s] = f
	}
	r.start(opts)
	t.Cleanup(func() {
		for _, f := range r.shim {
			f.Close()
		}
		r.stop()
	})
	return r
}

func (r *rig) fifo(s Stream) string { return filepath.Join(r.state, "fifo-"+s.String()) }

func (r *rig) start(opts Options) {
	r.t.Helper()
	r.startWith(Open, opts)
}

func (r *rig) startWith(open func(dir, path string, _ Options) (*Log, error), opts Options) {
	r.t.Helper()
	var err error
	if r.log, err = open(filepath.Join(r.state, "journal"), r.path, opts); err != nil {
		r.t.Fatal(err)
	}
	for s := range streams {
		if r.fifos[s], err = OpenFifo(r.fifo(s)); err != nil {
			r.t.Fatal(err)
		}
		r.copies.Go(func() { r.errs[s] = r.log.Copy(s, r.fifos[s], nil) })
	}
}

// stop ends everything as a daemon that shuts down does.
func (r *rig) stop() {
	for _, f := range r.fifos {
		f.Close()
	}
	r.copies.Wait()
	if err := r.log.Close(); err != nil {
		r.t.Error(err)
	}
}

func (r *rig) write(s Stream, p string) {
	r.t.Helper()
	if _, err := r.shim[s].WriteString(p); err != nil {
		r.t.Fatal(err)
	}
}

// exit is the end of the container: the shim closes its files.
func (r *rig) exit() {
	r.t.Helper()
	for s, f := range r.shim {
		f.Close()
		r.fifos[s].Exited()
	}
	r.copies.Wait()
	if err := errors.Join(r.errs[:]...); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := r.log.Flush(ctx); err != nil {
		r.t.Fatal(err)
	}
}

// read gives what a kubelet shows of log files.
func read(t testing.TB, paths ...string) (stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	for _, p := range paths {
		if err := logs.ReadLogs(context.Background(), p, "", &logs.LogOptions{LimitBytes: nil}, nil, &out, &errs); err != nil && !strings.Contains(err.Error(), "get parse function") {
			t.Fatal(err)
		}
	}
	return out.String(), errs.String()
}

// waitFor polls what another process or goroutine does to a file.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestRecords(t *testing.T) {
	for name, tc := range map[string]struct {
		in   string
		max  int
		last bool
		want []string // tag and bytes
		used int
	}{
		"lines":               {in: "a\nbc\n", max: 8, want: []string{"F a", "F bc"}, used: 5},
		"empty line":          {in: "\n\n", max: 8, want: []string{"F ", "F "}, used: 2},
		"start of a line":     {in: "a\nbc", max: 8, want: []string{"F a"}, used: 2},
		"end without newline": {in: "a\nbc", max: 8, last: true, want: []string{"F a", "P bc"}, used: 4},
		"as long as allowed":  {in: "12345678\n", max: 8, want: []string{"F 12345678"}, used: 9},
		"newline may follow":  {in: "12345678", max: 8, used: 0},
		"one too long":        {in: "123456789\n", max: 8, want: []string{"P 12345678", "F 9"}, used: 10},
		"piece of a long one": {in: "1234567812345678x", max: 8, want: []string{"P 12345678", "P 12345678"}, used: 16},
		"carriage return":     {in: "a\r\n", max: 8, want: []string{"F a\r"}, used: 3},
		"raw bytes":           {in: "\x00\xff \x80\n", max: 8, want: []string{"F \x00\xff \x80"}, used: 5},
	} {
		t.Run(name, func(t *testing.T) {
			f := formatter{maxLine: tc.max, limit: 1 << 20}
			f.stamp(time.Unix(1, 5), Stderr)
			if used := f.format([]byte(tc.in), tc.last); used != tc.used {
				t.Errorf("used %d bytes, want %d", used, tc.used)
			}
			var want strings.Builder
			for _, r := range tc.want {
				want.WriteString("1970-01-01T00:00:01.000000005Z stderr " + r + "\n")
			}
			if got := string(f.out); got != want.String() {
				t.Errorf("got %q, want %q", got, want.String())
			}
		})
	}
}

func FuzzFormat(f *testing.F) {
	f.Add([]byte("one\ntwo"), 3, uint16(100))
	f.Add([]byte("\n\n\r\n"), 1, uint16(0))
	f.Add(bytes.Repeat([]byte("x"), 100), 7, uint16(50))
	f.Fuzz(func(t *testing.T, in []byte, maxLine int, limit uint16) {
		if maxLine < 1 || maxLine > 1<<20 {
			t.Skip()
		}
		fm := formatter{maxLine: maxLine, limit: int(limit)}
		var file []byte
		for done := 0; done < len(in); {
			fm.out = fm.out[:0]
			fm.stamp(time.Unix(1, 0), Stdout)
			n := fm.format(in[done:], true)
			if n == 0 {
				t.Fatalf("no progress at %d of %q", done, in)
			}
			done += n
			file = append(file, fm.out...)
		}
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		if len(file) == 0 {
			return
		}
		if out, errs := read(t, path); out != string(in) || errs != "" {
			t.Fatalf("read back %q and %q, want %q", out, errs, in)
		}
	})
}

func FuzzDecodeState(f *testing.F) {
	f.Add(make([]byte, stateSize))
	page := make([]byte, stateSize)
	slot{size: 5}.encode(page[slotsAt:])
	f.Add(page)
	f.Add([]byte("short"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, _, err := decodeState(b)
		if err == nil && (s.pos[0] < 0 || s.pos[1] < 0 || s.size < 0) {
			t.Fatalf("accepted %+v", s)
		}
	})
}

// FuzzParsePlan: what is accepted can be written and read again.
func FuzzParsePlan(f *testing.F) {
	f.Add([]byte(`{"Path":"/var/log/pods/p/c/0.log","Options":{"MaxLine":16384,"Stall":10000000000}}`))
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"Path":""}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parsePlan(b)
		if err != nil {
			if !errdefs.IsDataLoss(err) {
				t.Fatalf("%q: %v, want data loss", b, err)
			}
			return
		}
		again, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parsePlan(again); err != nil || got.Path == "" {
			t.Fatalf("%q: %v after a second time: %v", b, got, err)
		}
	})
}

// Another process goes on with a log of which it knows the directory, once nobody
// has it open, and where the last Reopen said.
func TestContinue(t *testing.T) {
	if _, err := Continue(t.TempDir()); !errdefs.IsNotFound(err) {
		t.Errorf("without a log: %v", err)
	}
	r := newRig(t, Options{MaxLine: 100})
	dir := filepath.Join(r.state, DirName)
	r.write(Stdout, "one\n")
	waitFor(t, "the first line", func() bool { out, _ := read(t, r.path); return out == "one\n" })
	if _, err := Continue(dir); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a log that is open: %v", err)
	}
	moved := r.path + ".new"
	if err := r.log.Reopen(t.Context(), moved); err != nil {
		t.Fatal(err)
	}
	r.write(Stdout, "two\nthr")
	waitFor(t, "the second line", func() bool { out, _ := read(t, moved); return out == "two\n" })
	r.stop()
	r.startWith(func(dir, _ string, _ Options) (*Log, error) { return Continue(dir) }, Options{})
	if r.log.opts.MaxLine != 100 {
		t.Errorf("it goes on with %+v", r.log.opts)
	}
	r.write(Stdout, "ee\n")
	r.exit()
	if out, _ := read(t, moved); out != "two\nthree\n" {
		t.Errorf("the log has %q", out)
	}
	if err := os.WriteFile(filepath.Join(dir, planFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Continue(dir); !errdefs.IsDataLoss(err) {
		t.Errorf("with a damaged plan: %v", err)
	}
}

func TestContainerLife(t *testing.T) {
	r := newRig(t, Options{})
	long := strings.Repeat("z", 100_000)
	r.write(Stdout, "hello\n"+long+"\n")
	r.write(Stderr, "oops\n")
	r.write(Stdout, "no newline")
	r.exit()
	out, errs := read(t, r.path)
	if want := "hello\n" + long + "\nno newline"; out != want {
		t.Errorf("stdout: got %d bytes, want %d", len(out), len(want))
	}
	if errs != "oops\n" {
		t.Errorf("stderr: got %q", errs)
	}
	st, err := os.Stat(r.path)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() != 0o640 {
		t.Errorf("mode is %v", st.Mode())
	}
	raw, err := os.ReadFile(r.path)
	if err != nil {
		t.Fatal(err)
	}
	record := regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (stdout|stderr) [FP] `)
	for line := range bytes.Lines(raw) {
		if !record.Match(line) {
			t.Errorf("not a record: %.80q", line)
		}
		if len(line) > defaultMaxLine+recordRoom {
			t.Errorf("record of %d bytes", len(line))
		}
	}
}

func TestRandomBytesSurvive(t *testing.T) {
	r := newRig(t, Options{MaxLine: 1000})
	rnd := rand.New(rand.NewSource(1))
	want := make([]byte, 3<<20)
	rnd.Read(want)
	for rest := want; len(rest) > 0; {
		n := min(len(rest), 1+rnd.Intn(9000))
		r.write(Stdout, string(rest[:n]))
		rest = rest[n:]
	}
	r.exit()
	if out, _ := read(t, r.path); out != string(want) {
		t.Fatalf("%d bytes came back changed, want %d", len(out), len(want))
	}
	var raw unix.Stat_t
	if err := unix.Stat(filepath.Join(r.state, "journal", "stdout"), &raw); err != nil {
		t.Fatal(err)
	}
	if raw.Size != int64(len(want)) {
		t.Errorf("journal is %d long, want %d", raw.Size, len(want))
	}
	if used := raw.Blocks * 512; used > 2*trimStep {
		t.Errorf("a journal that is done takes %d bytes", used)
	}
}

func TestRestartContinuesALine(t *testing.T) {
	r := newRig(t, Options{})
	r.write(Stdout, "first half, ")
	waitFor(t, "the journal", func() bool { return r.log.journals[Stdout].end.Load() > 0 })
	r.stop()
	r.write(Stdout, "while away, ")
	r.start(Options{})
	r.write(Stdout, "second half\n")
	r.exit()
	if out, _ := read(t, r.path); out != "first half, while away, second half\n" {
		t.Fatalf("got %q", out)
	}
	raw, err := os.ReadFile(r.path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Count(raw, []byte("\n")) != 1 {
		t.Fatalf("more than one record: %q", raw)
	}
}

func TestOneWriterPerState(t *testing.T) {
	r := newRig(t, Options{})
	if _, err := Open(filepath.Join(r.state, "journal"), r.path, Options{}); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("second Open: %v", err)
	}
}

// TestResume: a log that cannot be continued at first goes on when it can.
func TestResume(t *testing.T) {
	// kept is a log in a directory that is not there, after a first life.
	kept := func(t *testing.T, opts Options) (r *rig, putBack func()) {
		r = newRig(t, opts)
		r.write(Stdout, "one\ntw")
		waitFor(t, "the first line", func() bool { out, _ := read(t, r.path); return out == "one\n" })
		r.stop()
		dir := filepath.Dir(r.path)
		if err := errors.Join(os.Rename(dir, dir+".away"), os.Symlink(dir+".away", dir)); err != nil {
			t.Fatal(err)
		}
		opts.Root = filepath.Dir(dir)
		r.startWith(Resume, opts)
		return r, func() {
			if err := errors.Join(os.Remove(dir), os.Rename(dir+".away", dir)); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Run("soon", func(t *testing.T) {
		r, putBack := kept(t, Options{Stall: time.Hour})
		r.write(Stdout, "o\nthree")
		if err := r.log.Reopen(t.Context(), r.path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("reopen behind a symlink: %v", err)
		}
		putBack()
		r.exit()
		if out, _ := read(t, r.path); out != "one\ntwo\nthree" {
			t.Errorf("the log says %q", out)
		}
		if lost := r.log.Lost(); lost.Bytes != 0 {
			t.Errorf("lost %+v", lost)
		}
	})
	t.Run("late", func(t *testing.T) {
		r, putBack := kept(t, Options{Stall: time.Millisecond})
		r.write(Stdout, "o\nthree\n")
		waitFor(t, "a loss", func() bool { return r.log.Lost() == Lost{Bytes: 8, Lines: 2} })
		putBack()
		if err := r.log.Reopen(t.Context(), r.path); err != nil {
			t.Error(err)
		}
		r.write(Stdout, "fo\nfour\n")
		r.exit()
		if out, _ := read(t, r.path); out != "one\ntw\nfour\n" {
			t.Errorf("the log says %q", out)
		}
	})
	t.Run("never", func(t *testing.T) {
		r, _ := kept(t, Options{Stall: time.Millisecond})
		r.write(Stdout, "o\n")
		r.shim[Stdout].Close()
		r.fifos[Stdout].Exited()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		if err := r.log.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("flush: %v", err)
		}
	})
	t.Run("two writers", func(t *testing.T) {
		r := newRig(t, Options{Stall: time.Hour})
		first := r.log
		for _, f := range r.fifos {
			f.Close()
		}
		r.copies.Wait()
		r.startWith(Resume, Options{Stall: time.Hour})
		r.write(Stdout, "one\n")
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the line", func() bool { out, _ := read(t, r.path); return out == "one\n" })
	})
	t.Run("no sense", func(t *testing.T) {
		r := newRig(t, Options{})
		r.write(Stdout, "one\n")
		waitFor(t, "the first line", func() bool { out, _ := read(t, r.path); return out == "one\n" })
		r.stop()
		if err := os.WriteFile(filepath.Join(r.state, "journal", "state"), bytes.Repeat([]byte{7}, stateSize), 0o600); err != nil {
			t.Fatal(err)
		}
		r.startWith(Resume, Options{})
		r.write(Stdout, "two\n")
		r.exit()
		if out, _ := read(t, r.path); out != "one\ntwo\n" {
			t.Errorf("the log says %q", out)
		}
	})
}

func TestRotationUnderLoad(t *testing.T) {
	const lines, rotations = 20_000, 100
	r := newRig(t, Options{})
	var want strings.Builder
	var gen sync.WaitGroup
	gen.Go(func() {
		for i := range lines {
			line := fmt.Sprintf("line %06d\n", i)
			want.WriteString(line)
			if _, err := r.shim[Stdout].WriteString(line); err != nil {
				t.Error(err)
				return
			}
		}
	})
	var files []string
	for i := range rotations {
		old := fmt.Sprintf("%s.%03d", r.path, i)
		if err := os.Rename(r.path, old); err != nil {
			t.Fatal(err)
		}
		files = append(files, old)
		if err := r.log.Reopen(context.Background(), r.path); err != nil {
			t.Fatal(err)
		}
	}
	gen.Wait()
	r.exit()
	out, _ := read(t, append(files, r.path)...)
	if out != want.String() {
		t.Fatalf("got %d bytes in %d files, want %d", len(out), len(files)+1, want.Len())
	}
	if lost := r.log.Lost(); lost != (Lost{}) {
		t.Fatalf("lost %+v", lost)
	}
}

// TestReopenOfABusyLog has more output than the writer can take in.
func TestReopenOfABusyLog(t *testing.T) {
	r := newRig(t, Options{})
	stop := make(chan struct{})
	var gen sync.WaitGroup
	gen.Go(func() {
		block := strings.Repeat("busy\n", 10_000)
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := r.shim[Stdout].WriteString(block); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for range 20 {
		if err := r.log.Reopen(ctx, r.path); err != nil {
			t.Error(err)
		}
		if err := r.log.Flush(ctx); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	gen.Wait()
}

func TestReopenFailureKeepsTheFile(t *testing.T) {
	r := newRig(t, Options{})
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/nowhere", link); err != nil {
		t.Fatal(err)
	}
	if err := r.log.Reopen(context.Background(), link); !errdefs.IsInvalidArgument(err) {
		t.Fatalf("got %v", err)
	}
	r.write(Stdout, "still here\n")
	r.exit()
	if out, _ := read(t, r.path); out != "still here\n" {
		t.Fatalf("got %q", out)
	}
	r.stop()
	other := filepath.Join(t.TempDir(), "other")
	if err := r.log.Reopen(context.Background(), other); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("after Close: %v", err)
	}
	if _, err := os.Stat(other); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a file was made: %v", err)
	}
	r.start(Options{}) // for the clean-up
}

func TestForeignPaths(t *testing.T) {
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(filepath.Join(dir, "pods"), 0o755))
	must(os.Symlink(dir, filepath.Join(dir, "pods", "app")))
	must(os.Symlink(filepath.Join(dir, "victim"), filepath.Join(dir, "pods", "0.log")))
	must(unix.Mkfifo(filepath.Join(dir, "pods", "fifo"), 0o600))
	must(os.Mkdir(filepath.Join(dir, "pods", "dir"), 0o755))
	root := filepath.Join(dir, "pods")
	for name, tc := range map[string]struct{ path, root string }{
		"relative":                 {path: "pods/x"},
		"dot dot":                  {path: root + "/../x"},
		"outside root":             {path: filepath.Join(dir, "x"), root: root},
		"symlink":                  {path: root + "/0.log"},
		"symlink below root":       {path: root + "/0.log", root: root},
		"symlinked parent in root": {path: root + "/app/x", root: root},
		"fifo":                     {path: root + "/fifo"},
		"directory":                {path: root + "/dir"},
		"device":                   {path: "/dev/null"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Open(t.TempDir(), tc.path, Options{Root: tc.root})
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("got %v", err)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(dir, "victim")); !errors.Is(err, os.ErrNotExist) {
		t.Fatal("the target of the symlink was made")
	}
	l, err := Open(t.TempDir(), filepath.Join(root, "new", "deep", "0.log"), Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	must(l.Close())
	st, err := os.Stat(filepath.Join(root, "new", "deep"))
	must(err)
	if st.Mode().Perm() != 0o755 {
		t.Fatalf("parent has mode %v", st.Mode())
	}
}

func TestSizeLimit(t *testing.T) {
	const limit = 16 << 10
	r := newRig(t, Options{MaxSize: limit})
	for i := range 3000 {
		r.write(Stdout, fmt.Sprintf("line %06d %s\n", i, strings.Repeat("x", i%300)))
		if st, err := os.Stat(r.path); err == nil && st.Size() > limit {
			t.Fatalf("log grew to %d", st.Size())
		}
	}
	r.write(Stdout, strings.Repeat("y", 100_000)+"\n")
	r.write(Stdout, "the last one\n")
	r.exit()
	out, _ := read(t, r.path)
	if !strings.HasSuffix(out, "the last one\n") {
		t.Fatalf("ends with %.40q", out[max(0, len(out)-40):])
	}
	if st, err := os.Stat(r.path); err != nil || st.Size() > limit {
		t.Fatalf("log is %d long, %v", st.Size(), err)
	}
	r.stop()
	if err := os.WriteFile(filepath.Join(filepath.Dir(r.path), nextOf(filepath.Base(r.path))), nil, 0o600); err != nil { // as a crash does
		t.Fatal(err)
	}
	r.start(Options{MaxSize: limit})
	names, err := os.ReadDir(filepath.Dir(r.path))
	if err != nil || len(names) != 1 {
		t.Fatalf("left beside the log: %v, %v", names, err)
	}
}

// TestFullDisk gives the log a filesystem of its own and fills it.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs to mount")
	}
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(disk, unix.MNT_DETACH)
	r := &rig{t: t, state: memDir(t), path: filepath.Join(disk, "0.log")}
	for s := range streams {
		if err := unix.Mkfifo(r.fifo(s), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(r.fifo(s), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		r.shim[s] = f
	}
	r.start(Options{MaxLine: 1024, Journal: 64 << 10})
	defer r.stop()
	var sent int
	for i := range 60_000 { // some 6 MB: must not block
		line := fmt.Sprintf("line %06d %s\n", i, strings.Repeat("x", 90))
		r.write(Stdout, line)
		sent += len(line)
	}
	waitFor(t, "a loss", func() bool { return r.log.Lost().Lines > 0 })
	old := r.path + ".old"
	if err := os.Rename(r.path, old); err != nil {
		t.Fatal(err)
	}
	if err := r.log.Reopen(context.Background(), r.path); err != nil {
		t.Fatal(err)
	}
	first, _ := read(t, old) // now that nobody writes to it
	if err := os.Truncate(old, 0); err != nil {
		t.Fatal(err)
	}
	// Lines until one gets through again: the disk has space now.
	waitFor(t, "the log to resume", func() bool {
		line := "again\n"
		r.write(Stdout, line)
		sent += len(line)
		out, _ := read(t, r.path)
		return strings.HasSuffix(out, "again\n")
	})
	r.exit()
	out, _ := read(t, r.path)
	seen := map[string]bool{}
	for line := range strings.Lines(first + out) {
		if !strings.HasPrefix(line, "line ") && line != "again\n" && !strings.HasPrefix("line ", strings.TrimSuffix(line, "\n")) {
			t.Errorf("torn line %.60q", line)
		}
		if strings.HasPrefix(line, "line ") && len(line) > 12 && seen[line[:11]] {
			t.Errorf("doubled %q", line[:11])
		}
		if len(line) > 12 {
			seen[line[:11]] = true
		}
	}
	got, lost := len(first)+len(out), int(r.log.Lost().Bytes)
	// One newline is added where a gap begins.
	if diff := got + lost - sent; diff < 0 || diff > 16 {
		t.Errorf("sent %d, logged %d, lost %d", sent, got, lost)
	}
}

// TestStalledDisk holds the goroutine that owns the log file, which is what a
// filesystem that does not answer does.
func TestStalledDisk(t *testing.T) {
	r := newRig(t, Options{MaxLine: 1024, Journal: 16 << 10, Stall: 50 * time.Millisecond})
	started, release, held := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		held <- r.log.call(context.Background(), func(*writer) error { close(started); <-release; return nil })
	}()
	<-started
	line := strings.Repeat("x", 99) + "\n"
	for range 10_000 {
		r.write(Stdout, line)
	}
	waitFor(t, "a loss", func() bool { return r.log.Lost().Lines > 0 })
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := r.log.Reopen(ctx, r.path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("reopen of a stalled log: %v", err)
	}
	close(release)
	if err := <-held; err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the log to resume", func() bool {
		r.write(Stdout, "again\n")
		out, _ := read(t, r.path)
		return strings.HasSuffix(out, "again\n")
	})
	lost := r.log.Lost()
	r.exit()
	r.stop()
	r.start(Options{})
	if got := r.log.Lost(); got.Bytes < lost.Bytes {
		t.Errorf("the count went from %+v to %+v over a restart", lost, got)
	}
}

// TestNoNewline: the log of a program that writes no lines goes on, too.
func TestNoNewline(t *testing.T) {
	for name, row := range map[string]struct {
		opts  Options
		piece int
	}{
		"much":   {Options{MaxLine: 1024, Journal: 16 << 10, Stall: time.Second}, 4096},
		"little": {Options{MaxLine: 256 << 10, Stall: time.Second}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, row.opts)
			started, release, held := make(chan struct{}), make(chan struct{}), make(chan error, 1)
			go func() {
				held <- r.log.call(context.Background(), func(*writer) error { close(started); <-release; return nil })
			}()
			<-started
			for r.log.Lost().Bytes == 0 {
				r.write(Stdout, strings.Repeat("x", 10_000))
			}
			end := r.log.journals[Stdout].end.Load()
			close(release)
			if err := <-held; err != nil {
				t.Fatal(err)
			}
			waitFor(t, "the log to go on", func() bool {
				r.write(Stdout, strings.Repeat("y", row.piece))
				return r.log.journals[Stdout].end.Load() > end
			})
			r.write(Stdout, "z")
			r.exit()
			if out, _ := read(t, r.path); !strings.HasSuffix(out, "yz") {
				t.Errorf("the log ends with %q", out[max(0, len(out)-20):])
			}
		})
	}
}

// TestForeignHands cuts and lengthens the log file behind the writer's back.
func TestForeignHands(t *testing.T) {
	r := newRig(t, Options{})
	say := func(s string) {
		t.Helper()
		r.write(Stdout, s)
		waitFor(t, s, func() bool { out, _ := read(t, r.path); return strings.HasSuffix(out, s) })
	}
	say("one\n")
	if err := os.Truncate(r.path, 0); err != nil {
		t.Fatal(err)
	}
	say("two\n")
	r.stop()
	r.start(Options{})
	say("three\n")
	if out, _ := read(t, r.path); out != "two\nthree\n" {
		t.Fatalf("got %q", out)
	}
	if err := os.Remove(r.path); err != nil {
		t.Fatal(err)
	}
	if err := r.log.Reopen(context.Background(), r.path); err != nil {
		t.Fatal(err)
	}
	say("four\n")
}

type capture struct {
	mu  sync.Mutex
	got [streams][]byte
}

func (c *capture) Watching() bool { return true }
func (c *capture) Observe(s Stream, p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.got[s] = append(c.got[s], p...)
}

func TestObserver(t *testing.T) {
	for _, path := range []string{"", filepath.Join(t.TempDir(), "log")} {
		t.Run("log "+path, func(t *testing.T) {
			dir := memDir(t)
			name := filepath.Join(dir, "fifo")
			if err := unix.Mkfifo(name, 0o600); err != nil {
				t.Fatal(err)
			}
			l, err := Open(filepath.Join(dir, "journal"), path, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			f, err := OpenFifo(name)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			w, err := os.OpenFile(name, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			want := strings.Repeat("0123456789", 100_000) + "end"
			var gen sync.WaitGroup
			gen.Go(func() { _, _ = w.WriteString(want); w.Close() })
			var c capture
			if err := l.Copy(Stderr, f, &c); err != nil {
				t.Fatal(err)
			}
			gen.Wait()
			if got := string(c.got[Stderr]); got != want {
				t.Fatalf("observed %d bytes, want %d", len(got), len(want))
			}
			if path == "" {
				if err := l.Reopen(context.Background(), "/x"); !errdefs.IsFailedPrecondition(err) {
					t.Fatalf("reopen of nothing: %v", err)
				}
			}
		})
	}
}

func TestFifoEnds(t *testing.T) {
	for name, tc := range map[string]struct {
		flags int // how the other side opens, -1 not at all
		end   func(f *Fifo, w *os.File)
		want  string
	}{
		"hang up":                {os.O_WRONLY, func(_ *Fifo, w *os.File) { w.WriteString("x"); w.Close() }, "x"},
		"hang up without data":   {os.O_WRONLY, func(_ *Fifo, w *os.File) { w.Close() }, ""},
		"nobody came":            {-1, func(f *Fifo, _ *os.File) { f.Exited() }, ""},
		"stopped with nobody":    {-1, func(f *Fifo, _ *os.File) { f.Stop() }, ""},
		"held open":              {os.O_RDWR, func(f *Fifo, w *os.File) { w.WriteString("x"); f.Stop() }, "x"},
		"exited, then hung up":   {os.O_RDWR, func(f *Fifo, w *os.File) { f.Exited(); w.WriteString("y"); w.Close() }, "y"},
		"exited, held, stopped":  {os.O_RDWR, func(f *Fifo, w *os.File) { f.Exited(); w.WriteString("y"); f.Stop() }, "y"},
		"stop comes before exit": {os.O_RDWR, func(f *Fifo, w *os.File) { w.WriteString("z"); f.Stop(); f.Exited() }, "z"},
	} {
		for _, watched := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/%t", name, watched), func(t *testing.T) {
				f, path := newFifo(t)
				var w *os.File
				if tc.flags >= 0 {
					var err error
					if w, err = os.OpenFile(path, tc.flags, 0); err != nil {
						t.Fatal(err)
					}
					defer w.Close()
				}
				if !watched {
					f.unwatch()
				}
				got := make(chan string, 1)
				go func() { b, _ := io.ReadAll(f); got <- string(b) }()
				tc.end(f, w)
				select {
				case s := <-got:
					if s != tc.want {
						t.Fatalf("got %q, want %q", s, tc.want)
					}
				case <-time.After(10 * time.Second):
					t.Fatal("no end")
				}
			})
		}
	}
}

func newFifo(t *testing.T) (f *Fifo, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := OpenFifo(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, path
}

// TestFifoUnwatched: what is written is read once and in order however often the poller
// is done without, and a close ends reading in either state.
func TestFifoUnwatched(t *testing.T) {
	f, path := newFifo(t)
	w, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	go func() {
		for i := range 2000 {
			fmt.Fprintln(w, i)
			if i%7 == 0 {
				time.Sleep(50 * time.Microsecond)
			}
		}
	}()
	var all, want bytes.Buffer
	for i := range 2000 {
		fmt.Fprintln(&want, i)
	}
	b := make([]byte, 64)
	for i := 0; all.Len() < want.Len(); i++ {
		if i%3 == 0 {
			f.unwatch()
		}
		n, err := f.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(b[:n])
	}
	if !bytes.Equal(all.Bytes(), want.Bytes()) {
		t.Error("what was read is not what was written")
	}
	for _, watched := range []bool{true, false} {
		f, _ := newFifo(t)
		if !watched {
			f.unwatch()
		}
		ended := make(chan error, 1)
		go func() {
			_, err := f.Read(make([]byte, 1))
			ended <- err
		}()
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if err := <-ended; err == nil || errors.Is(err, io.EOF) {
			t.Errorf("watched %t: reading ended with %v", watched, err)
		}
		f.unwatch()
		if _, err := f.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("watched %t: after the end %v", watched, err)
		}
	}
}

func TestStopEndsAnEndlessWriter(t *testing.T) {
	r := newRig(t, Options{})
	stop := make(chan struct{})
	var gen sync.WaitGroup
	gen.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := r.shim[Stdout].WriteString("again and again\n"); err != nil {
					return
				}
			}
		}
	})
	r.fifos[Stdout].Stop()
	r.fifos[Stderr].Stop()
	r.copies.Wait()
	close(stop)
	r.shim[Stdout].Close()
	gen.Wait()
}

func TestOpenFifoRefusesFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenFifo(path); err == nil {
		t.Fatal("a regular file was opened")
	}
}

func BenchmarkLog(b *testing.B) {
	for name, size := range map[string]int{"line": 100, "batch": 64 << 10} {
		b.Run(name, func(b *testing.B) {
			dir := memDir(b)
			fifo := filepath.Join(dir, "fifo")
			if err := unix.Mkfifo(fifo, 0o600); err != nil {
				b.Fatal(err)
			}
			l, err := Open(filepath.Join(dir, "journal"), filepath.Join(b.TempDir(), "log"), Options{MaxSize: 64 << 20})
			if err != nil {
				b.Fatal(err)
			}
			f, err := OpenFifo(fifo)
			if err != nil {
				b.Fatal(err)
			}
			w, err := os.OpenFile(fifo, os.O_WRONLY, 0)
			if err != nil {
				b.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- l.Copy(Stdout, f, nil) }()
			p := bytes.Repeat(append(bytes.Repeat([]byte("x"), 99), '\n'), size/100)
			b.SetBytes(int64(len(p)))
			for b.Loop() {
				if _, err := w.Write(p); err != nil {
					b.Fatal(err)
				}
			}
			w.Close()
			if err := <-done; err != nil {
				b.Fatal(err)
			}
			if err := l.Flush(context.Background()); err != nil {
				b.Fatal(err)
			}
			f.Close()
			l.Close()
		})
	}
}
