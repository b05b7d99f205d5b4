package stats

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// role in the environment makes the test program one of the processes that the
// tests measure.
const role = "GANTRY_STATS_ROLE"

func TestMain(m *testing.M) {
	if r := os.Getenv(role); r != "" {
		os.Exit(play(r, bufio.NewReader(os.Stdin), os.Stdout))
	}
	os.Exit(m.Run())
}

// play waits for a line, so that the process can be moved first, does what it
// is for, says so, and ends with its input.
func play(role string, in *bufio.Reader, out io.Writer) int {
	if _, err := in.ReadString('\n'); err != nil {
		return 2
	}
	var keep []byte
	switch name, arg, _ := strings.Cut(role, ":"); name {
	case "burn":
		go burn(arg)
	case "allocate":
		mib, err := strconv.Atoi(arg)
		if err != nil {
			return 2
		}
		if keep, err = allocate(mib << 20); err != nil {
			return 2
		}
	case "parent":
		child := exec.Command("/proc/self/exe")
		child.Env = []string{"GANTRY_STATS_ROLE=allocate:" + arg}
		child.Stdin = strings.NewReader("go\n")
		if err := child.Run(); err == nil {
			return 2
		}
	}
	fmt.Fprintln(out, "done")
	in.ReadString('\n')
	runtime.KeepAlive(keep)
	return 0
}

// burn uses a CPU, the named one if there is one.
func burn(cpu string) {
	runtime.LockOSThread()
	if n, err := strconv.Atoi(cpu); err == nil {
		var set unix.CPUSet
		set.Set(n)
		unix.SchedSetaffinity(0, &set)
	}
	for n := 0; ; n++ {
		runtime.KeepAlive(n)
	}
}

// allocate uses memory, page by page, outside the heap: the race detector
// would use as much again.
func allocate(size int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, err
	}
	if err := unix.Madvise(b, unix.MADV_NOHUGEPAGE); err != nil && err != unix.EINVAL {
		return nil, err
	}
	for i := 0; i < size; i += os.Getpagesize() {
		b[i] = 1
	}
	return b, nil
}

// cgroup is a control group made for a test.
type cgroup struct {
	*testing.T
	host facts.Host
	path string
}

const root = "/sys/fs/cgroup"

// testDir is this run's alone: another may be going on, or have been cut off.
var testDir = fmt.Sprint("/gantry-test-stats-", os.Getpid())

// newCgroup makes a control group in every hierarchy that is read, and takes it
// away, with its parent, at the end of the test.
func newCgroup(t *testing.T) *cgroup {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	c := &cgroup{T: t, host: thisHost(t), path: testDir + "/" + strings.ReplaceAll(t.Name(), "/", "-")}
	t.Cleanup(c.remove)
	for _, dir := range c.mounts() {
		c.must(os.MkdirAll(dir+testDir, 0o755))
		if c.host.Cgroup.V2() {
			c.must(os.WriteFile(dir+"/cgroup.subtree_control", []byte("+memory"), 0))
			c.must(os.WriteFile(dir+testDir+"/cgroup.subtree_control", []byte("+memory"), 0))
		}
		c.must(os.Mkdir(dir+c.path, 0o755))
	}
	return c
}

func (c *cgroup) remove() {
	for _, dir := range c.mounts() {
		// A killed process leaves its group a moment after its parent has
		// heard of its end.
		var err error
		if !poll(func() bool {
			err = unix.Rmdir(dir + c.path)
			return err == nil || err == unix.ENOENT
		}) {
			c.Errorf("remove %s: %v", dir+c.path, err)
		}
		unix.Rmdir(dir + testDir) // the last test's
	}
}

func (c *cgroup) must(err error) {
	c.Helper()
	if err != nil {
		c.Fatal(err)
	}
}

// mounts are the hierarchies that are read.
func (c *cgroup) mounts() []string {
	b := newBooks(c.host.Cgroup)
	if b.v2 {
		return []string{b.unified}
	}
	dirs := []string{b.cpu, b.memory}
	if b.unified != "" {
		dirs = append(dirs, b.unified)
	}
	return dirs
}

func (c *cgroup) memory(v1, v2, value string) {
	c.Helper()
	b := newBooks(c.host.Cgroup)
	name := v1
	if b.v2 {
		name = v2
	}
	c.must(os.WriteFile(filepath.Join(b.memory, c.path, name), []byte(value), 0))
}

// limitMemory sets the limit, without swap.
func (c *cgroup) limitMemory(limit string) {
	c.Helper()
	c.memory("memory.limit_in_bytes", "memory.max", limit)
	if c.host.Cgroup.SwapAccounting && !c.host.Cgroup.V2() {
		c.memory("memory.memsw.limit_in_bytes", "", limit)
	}
}

// number reads a file of one number of the group itself.
func (c *cgroup) number(mount, name string) uint64 {
	c.Helper()
	data, err := os.ReadFile(filepath.Join(mount, c.path, name))
	c.must(err)
	n, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	c.must(err)
	return n
}

// process is one that a test measures.
type process struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// start runs a process in the group, which does what it is for from now on.
func (c *cgroup) start(what string) *process {
	c.Helper()
	p := &process{Cmd: exec.Command("/proc/self/exe")}
	p.Env = append(os.Environ(), role+"="+what)
	p.Stderr = os.Stderr
	var err error
	p.in, err = p.StdinPipe()
	c.must(err)
	out, err := p.StdoutPipe()
	c.must(err)
	p.out = bufio.NewReader(out)
	c.must(p.Start())
	c.Cleanup(func() {
		p.Process.Kill()
		p.Wait()
	})
	for _, dir := range c.mounts() {
		c.must(os.WriteFile(dir+c.path+"/cgroup.procs", []byte(strconv.Itoa(p.Process.Pid)), 0))
	}
	_, err = io.WriteString(p.in, "go\n")
	c.must(err)
	return p
}

// done waits until the process has done what it is for.
func (c *cgroup) done(p *process) {
	c.Helper()
	if line, err := p.out.ReadString('\n'); line != "done\n" {
		c.Fatalf("the process ended: %q, %v", line, err)
	}
}

// eventually calls f until it says yes.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	if !poll(f) {
		t.Fatalf("it never came about that %s", what)
	}
}

func poll(f func() bool) bool {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); !f(); <-tick.C {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// thisHost finds the hierarchies where every distribution mounts them.
func thisHost(t testing.TB) facts.Host {
	t.Helper()
	cg := facts.Cgroup{Mode: facts.CgroupV2, Controllers: map[string]string{}}
	var fsys unix.Statfs_t
	if err := unix.Statfs(root, &fsys); err != nil {
		t.Fatal(err)
	}
	if fsys.Type == unix.CGROUP2_SUPER_MAGIC {
		cg.Unified, cg.Controllers["memory"], cg.SwapAccounting = root, root, true
		return facts.Host{Cgroup: cg}
	}
	cg.Mode = facts.CgroupV1
	for _, name := range []string{"cpuacct", "memory"} {
		if _, err := os.Stat(filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
		cg.Controllers[name] = filepath.Join(root, name)
	}
	_, err := os.Stat(root + "/memory/memory.memsw.limit_in_bytes")
	cg.SwapAccounting = err == nil
	if _, err := os.Stat(root + "/unified"); !errors.Is(err, os.ErrNotExist) {
		cg.Mode, cg.Unified = facts.CgroupHybrid, root+"/unified"
	}
	return facts.Host{Cgroup: cg}
}
