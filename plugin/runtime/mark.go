package runtime

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Mark tells the processes that come from one exec from all others of its
// container: a hard limit, found nowhere else, of the CPU time (µs) that a
// process may use under a real-time policy without a pause. It means some
// 100,000 years, so that it limits nothing. A process gets it before it runs its
// program, and hands it to all that it forks, whoever is their parent or leads
// their session later. 0 is no mark.
type Mark uint64

const (
	markLimit = "RLIMIT_RTTIME"
	markFrom  = 1 << 62
)

// mark marks a process that is not running yet, of a container in a user namespace
// of its own or not. The mark is 0 where the process cannot get one: from a runtime
// that may not set the limits of processes of other users, or that has such a limit
// itself, as it could only be raised; and where the container has a limit that is
// not to be changed.
func mark(p *specs.Process, userns bool) (*specs.Process, Mark) {
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_RTTIME, &own); err != nil || own.Max != unix.RLIM_INFINITY {
		return p, 0
	}
	if userns && !setsLimits() {
		return p, 0
	}
	if slices.ContainsFunc(p.Rlimits, isMark) {
		return p, 0
	}
	m := markFrom + rand.Uint64N(markFrom)
	marked := *p
	marked.Rlimits = append(slices.Clip(p.Rlimits), specs.POSIXRlimit{Type: markLimit, Soft: m, Hard: m})
	return &marked, Mark(m)
}

// setsLimits reports whether this process, and so the runtime that it starts, may
// set limits of any process.
func setsLimits() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	err := unix.Capget(&hdr, &caps[0])
	return err == nil && caps[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

func isMark(l specs.POSIXRlimit) bool { return l.Type == markLimit }

// MarkOf is the mark that a process is to get, 0 for none.
func MarkOf(p *specs.Process) Mark {
	if i := slices.IndexFunc(p.Rlimits, isMark); i >= 0 && p.Rlimits[i].Hard >= markFrom {
		return Mark(p.Rlimits[i].Hard)
	}
	return 0
}

// KillMarked ends the processes with the mark in the control group and beneath
// it, and returns when none is left. Others of the group are never touched. When
// ctx ends first the error names those that are left, which have got their
// SIGKILL.
func (h *Hierarchies) KillMarked(ctx context.Context, path string, m Mark) error {
	for idle := 0; ; {
		left, missed, err := h.strike(path, m)
		if err != nil {
			return fmt.Errorf("kill processes of cgroup %s: %w", path, err)
		}
		// One that ended before it was looked at may have forked another. In a busy
		// container some always do.
		if idle++; len(left) > 0 {
			idle = 0
		}
		if idle > 0 && !missed || idle == idleLooks {
			return nil
		}
		if err := sleep(ctx, killPoll); err != nil {
			return fmt.Errorf("processes %v of cgroup %s do not end: %w", left, path, err)
		}
	}
}

// idleLooks is how many looks in a row that find nobody are enough.
const idleLooks = 10

// strike sends SIGKILL to all that have the mark, and returns them. missed says
// that one ended before it was known whether it has.
func (h *Hierarchies) strike(path string, m Mark) (left []int, missed bool, err error) {
	pids, err := h.Procs(path)
	if err != nil {
		return nil, false, err
	}
	for _, pid := range pids {
		killed, err := killMarked(pid, m)
		switch {
		case errors.Is(err, errEnded):
			missed = true
		case err != nil:
			return nil, false, fmt.Errorf("process %d: %w", pid, err)
		case killed:
			left = append(left, pid)
		}
	}
	return left, missed, nil
}

var errEnded = errors.New("the process has ended")

// killMarked sends SIGKILL to a process if it has the mark. The process whose
// mark is read is the one that is killed, also when its number is used again.
func killMarked(pid int, m Mark) (bool, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false, ended(err)
	}
	defer unix.Close(fd)
	if found, err := markOn(pid); err != nil || found != m {
		return false, err
	}
	err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	return err == nil, ended(err)
}

// markOn is the mark that a process has, 0 for none. With errEnded there is no
// process.
func markOn(pid int) (Mark, error) {
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		return 0, ended(err)
	}
	return parseMark(limits), nil
}

// ended is errEnded for an error that says so.
func ended(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return errEnded
	}
	return err
}

// parseMark reads a mark, 0 for none, from /proc/PID/limits, whose lines are a
// name, the soft limit, the hard limit and the unit.
func parseMark(limits []byte) Mark {
	for line := range bytes.Lines(limits) {
		rest, ok := bytes.CutPrefix(line, []byte("Max realtime timeout "))
		if !ok {
			continue
		}
		fields := bytes.Fields(rest)
		if len(fields) < 2 {
			return 0
		}
		hard, err := strconv.ParseUint(string(fields[1]), 10, 64)
		if err != nil || hard < markFrom {
			return 0
		}
		return Mark(hard)
	}
	return 0
}
