package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// traced are the system calls that strace reports, by what they count as.
var (
	syncCalls    = []string{"fsync", "fdatasync", "sync_file_range", "syncfs", "sync", "msync"}
	mountCalls   = []string{"mount", "move_mount"}
	unmountCalls = []string{"umount2"}
	execCalls    = []string{"execve", "execveat"}
)

// tracer is a running strace.
type tracer struct {
	cmd   *exec.Cmd
	notes *bufio.Reader
}

// attach follows a process and all that it starts from now on, until detach.
func attach(ctx context.Context, pid int, file string, more ...string) (*tracer, error) {
	calls := strings.Join(slices.Concat(syncCalls, mountCalls, unmountCalls, execCalls), ",")
	args := append([]string{"-f", "-y", "-s", "128", "-e", "trace=" + calls, "-e", "signal=none", "-o", file, "-p", strconv.Itoa(pid)}, more...)
	cmd := exec.CommandContext(ctx, "strace", args...)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, fmt.Errorf("attach strace: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("attach strace: %w", err)
	}
	t := &tracer{cmd: cmd, notes: bufio.NewReader(stderr)}
	// It says "Process N attached" once it sees everything.
	if line, err := t.notes.ReadString('\n'); err != nil {
		return nil, fmt.Errorf("attach strace: %w: %s", errors.Join(err, cmd.Wait()), line)
	}
	return t, nil
}

// detach leaves the processes alone and waits until the file is whole.
func (t *tracer) detach() error {
	if err := t.cmd.Process.Signal(syscall.SIGINT); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("detach strace: %w", err)
	}
	if _, err := io.Copy(io.Discard, t.notes); err != nil {
		return fmt.Errorf("detach strace: %w", err)
	}
	// It ends by the signal that it was sent, which is what was wanted.
	if err := t.cmd.Wait(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		return fmt.Errorf("detach strace: %w", err)
	}
	return nil
}

// counts are the calls of a trace.
type counts struct {
	syncs            map[string]int // by file
	execs            map[string]int // by program
	mounts, unmounts int
}

func (c *counts) sum(by map[string]int) int {
	n := 0
	for _, v := range by {
		n += v
	}
	return n
}

var (
	// traceLine is "PID call(arguments…", which a call that is interrupted by
	// another process's has too; its "resumed" line is the other form.
	traceLine   = regexp.MustCompile(`^(\d+) +([a-z0-9_]+)\((.*)$`)
	resumedLine = regexp.MustCompile(`^(\d+) +<\.\.\. ([a-z0-9_]+) resumed>.*= 0$`)
	descriptor  = regexp.MustCompile(`^\d+<([^>]*)>`)
	quoted      = regexp.MustCompile(`"((?:[^"\\]|\\.)*)"`)
	anyID       = regexp.MustCompile(`[0-9a-f]{64}`)
	anyNumber   = regexp.MustCompile(`\d+`)
)

// count reads what strace wrote. Files below dir are named from there.
func count(r io.Reader, dir string) (*counts, error) {
	c := &counts{syncs: map[string]int{}, execs: map[string]int{}}
	pending := map[string]string{} // program, by the process that is about to become it
	scan := bufio.NewScanner(r)
	scan.Buffer(nil, 1<<20)
	for scan.Scan() {
		if m := resumedLine.FindStringSubmatch(scan.Text()); m != nil {
			if program, ok := pending[m[1]]; ok && slices.Contains(execCalls, m[2]) {
				c.execs[program]++
				delete(pending, m[1])
			}
			continue
		}
		m := traceLine.FindStringSubmatch(scan.Text())
		if m == nil {
			continue
		}
		pid, call, rest := m[1], m[2], m[3]
		switch {
		case slices.Contains(syncCalls, call):
			c.syncs[fileOf(rest, dir)]++
		case slices.Contains(mountCalls, call):
			c.mounts++
		case slices.Contains(unmountCalls, call):
			c.unmounts++
		case !slices.Contains(execCalls, call):
			// strace shows calls that it does not know whatever it is asked for.
		case strings.HasSuffix(rest, "= 0"):
			c.execs[programOf(rest)]++
		case strings.HasSuffix(rest, "<unfinished ...>"):
			pending[pid] = programOf(rest)
		}
	}
	if err := scan.Err(); err != nil {
		return nil, fmt.Errorf("read trace: %w", err)
	}
	return c, nil
}

// fileOf names the file of a sync: without what changes from pod to pod.
func fileOf(arguments, dir string) string {
	m := descriptor.FindStringSubmatch(arguments)
	if m == nil {
		return "no file"
	}
	file := strings.TrimPrefix(m[1], dir+"/")
	file = strings.TrimSuffix(file, "(deleted)")
	file = anyID.ReplaceAllString(file, "ID")
	parts := strings.Split(file, "/")
	for i, p := range parts {
		if _, err := strconv.Atoi(p); err == nil || strings.HasPrefix(p, ".") {
			parts[i] = anyNumber.ReplaceAllString(p, "N")
		}
	}
	return strings.Join(parts, "/")
}

// programOf is the program's name and its subcommand: the first argument that
// is neither an option nor an option's value, as far as one can tell.
func programOf(arguments string) string {
	words := quoted.FindAllStringSubmatch(arguments, -1)
	if len(words) == 0 {
		return "?"
	}
	name := filepath.Base(words[0][1])
	if _, err := strconv.Atoi(name); err == nil && len(words) > 1 {
		name = filepath.Base(words[1][1]) // of /proc/self/fd/N, what it calls itself
	}
	for _, w := range words[min(2, len(words)):] {
		if slices.Contains(subcommands, w[1]) {
			return name + " " + w[1]
		}
	}
	return name
}

// subcommands are those by which calls of one program differ.
var subcommands = []string{"create", "start", "state", "kill", "delete", "exec", "init", "features", "update", "ps"}
