package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process is what /proc says about one of the scope's processes.
type process struct {
	pid, parent int
	exe         string // base name, empty for a zombie
	cmdline     string
	state       byte
}

func (p process) String() string {
	if p.state == 'Z' {
		return fmt.Sprintf("process %d: zombie of %d", p.pid, p.parent)
	}
	return fmt.Sprintf("process %d: %s", p.pid, p.cmdline)
}

// calledAs is the name by which a program was started, which may be a link's.
func (p process) calledAs() string {
	name, _, _ := strings.Cut(p.cmdline, " ")
	return filepath.Base(name)
}

func (s Scope) processes(context.Context) ([]string, error) {
	all, err := s.list()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, p := range all {
		if p.exe == "" || !slices.Contains(s.Expected, p.exe) && !slices.Contains(s.Expected, p.calledAs()) {
			lines = append(lines, p.String())
		}
	}
	return lines, nil
}

// list finds the scope's processes: those which carry the marker, those in its
// cgroups, and the children of both.
func (s Scope) list() ([]process, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	every, ours := map[int]process{}, map[int]bool{}
	for _, dir := range dirs {
		p, ok := readProcess(dir)
		if !ok || p.pid == os.Getpid() {
			continue // ended meanwhile
		}
		every[p.pid] = p
		ours[p.pid] = s.claims(dir)
	}
	var found []process
	for pid, p := range every {
		for anc := pid; anc > 1; anc = every[anc].parent {
			if ours[anc] {
				found = append(found, p)
				break
			}
		}
	}
	slices.SortFunc(found, func(a, b process) int { return a.pid - b.pid })
	return found, nil
}

// claims looks at what a process inherited: its environment and its cgroup.
func (s Scope) claims(dir string) bool {
	env, _ := os.ReadFile(dir + "/environ")
	for v := range bytes.SplitSeq(env, []byte{0}) {
		if string(v) == s.Marker {
			return true
		}
	}
	groups, _ := os.ReadFile(dir + "/cgroup")
	for l := range strings.Lines(string(groups)) {
		_, path, _ := strings.Cut(strings.TrimSpace(l), ":/")
		if below("/"+path, s.CgroupParent) {
			return true
		}
	}
	return false
}

// below reports whether path is dir or inside it.
func below(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

func readProcess(dir string) (process, bool) {
	pid, err := strconv.Atoi(filepath.Base(dir))
	if err != nil {
		return process{}, false
	}
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return process{}, false
	}
	// The name in parentheses may hold anything, so the fields are counted
	// from its end.
	_, rest, ok := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	f := strings.Fields(rest)
	if !ok || len(f) < 2 {
		return process{}, false
	}
	parent, _ := strconv.Atoi(f[1])
	exe, err := os.Readlink(dir + "/exe")
	if err == nil {
		exe = filepath.Base(strings.TrimSuffix(exe, " (deleted)"))
	}
	args, _ := os.ReadFile(dir + "/cmdline")
	return process{
		pid:     pid,
		parent:  parent,
		exe:     exe,
		cmdline: strings.TrimSpace(string(bytes.ReplaceAll(args, []byte{0}, []byte{' '}))),
		state:   f[0][0],
	}, true
}

// killAll kills until nothing is left: what is killed may just be forking.
func (s Scope) killAll(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		all, err := s.list()
		if err != nil {
			return err
		}
		alive := 0
		for _, p := range all {
			if p.state == 'Z' {
				continue // its parent's business; gone with the parent
			}
			alive++
			if err := unix.Kill(p.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("kill %v: %w", p, err)
			}
		}
		if alive == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("kill processes: %d left: %w", alive, context.Cause(ctx))
		case <-tick.C:
		}
	}
}
