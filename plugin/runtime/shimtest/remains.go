package shimtest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/runtime"
)

// Remains is what an Env left on the host.
type Remains struct {
	Shims, Processes []int
	Mounts, Bundles  []string
}

// Remains looks for processes, mounts and bundles of this Env.
func (e *Env) Remains() (Remains, error) { return remains(e.Dir) }

func (r Remains) empty() bool {
	return len(r.Shims)+len(r.Processes)+len(r.Mounts)+len(r.Bundles) == 0
}

func remains(dir string) (r Remains, err error) {
	r.Shims = append(ShimPids(dir), anchorPids(dir)...)
	h, err := runtime.NewHierarchies()
	if err != nil {
		return r, err
	}
	if r.Processes, err = h.Procs("/" + filepath.Base(dir)); err != nil {
		return r, err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return r, err
	}
	for _, m := range mounts {
		r.Mounts = append(r.Mounts, m.Mountpoint)
	}
	r.Bundles, err = filepath.Glob(filepath.Join(dir, "state", Namespace, "*"))
	return r, err
}

// noRemains fails the test for what is left and takes it away. A shim that was
// told to go needs a moment.
func noRemains(t testing.TB, dir string) {
	t.Helper()
	r, err := settled(dir)
	if err != nil {
		t.Error(err)
		return
	}
	if !r.empty() {
		t.Errorf("left behind: %+v", r)
	}
	for _, pid := range r.Shims {
		// The error is that it ended by itself.
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	if err := sweep(dir, r); err != nil {
		t.Error(err)
	}
}

// settled returns what is left when nothing is, or after five seconds.
func settled(dir string) (Remains, error) {
	deadline := time.After(5 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		r, err := remains(dir)
		if err != nil || r.empty() {
			return r, err
		}
		select {
		case <-tick.C:
		case <-deadline:
			return r, nil
		}
	}
}

func sweep(dir string, r Remains) error {
	h, err := runtime.NewHierarchies()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	group := "/" + filepath.Base(dir)
	if _, err := h.Kill(ctx, group); err != nil {
		return err
	}
	if err := h.Remove(group); err != nil {
		return err
	}
	for i := len(r.Mounts) - 1; i >= 0; i-- {
		if err := unix.Unmount(r.Mounts[i], unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", r.Mounts[i], err)
		}
	}
	return os.RemoveAll(dir)
}

// ShimPids lists the shims of the Env in dir. Each has the daemon's address in
// its command line.
func ShimPids(dir string) []int {
	return called(func(line []byte) bool {
		return bytes.Contains(line, []byte(dir+"/")) && bytes.Contains(line, []byte("-namespace"))
	})
}

// anchorPids lists the anchors of our own shim's supervisors in dir.
func anchorPids(dir string) []int {
	return called(func(line []byte) bool { return bytes.HasPrefix(line, []byte("gantry-anchor\x00"+dir+"/")) })
}

// called lists the processes whose command line is of a kind.
func called(kind func(line []byte) bool) []int {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil // only for a bad pattern
	}
	var pids []int
	for _, file := range files {
		line, err := os.ReadFile(file)
		if err != nil || !kind(line) {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(file, "/")[2])
		if err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}
