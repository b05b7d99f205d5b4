package runtime

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Leader is the first process of an exec, which leads a session of its own: the
// OCI runtime makes one before the program runs.
type Leader struct {
	Pid int
	// Since is a moment before its start, on the clock of boottime.
	Since time.Duration
}

// KillTree ends the leader, which is in the control group, and what it started,
// and returns when none of that is left. That is
//
//   - what is in its session, also when it has itself ended;
//   - what descends from those, also in a session of its own, as far as the
//     parents are there to tell when this is called.
//
// All of it is stopped first, so that no parent ends before its children are
// found; only then it is killed. Who left the session and whose parent ended
// before, as a daemon does that forks twice, cannot be told from a child of the
// container's own process and lives on with the container, and so does who moved
// out of the container's control group. Others of the group are never touched.
//
// A leader that is not in the group is left alone with NotFound: it may be a
// number that only a guest's kernel knows. When ctx ends first the error names
// the processes that are left, which have got their SIGKILL.
func (h *Hierarchies) KillTree(ctx context.Context, path string, leader Leader) error {
	t := &tree{groups: h, path: path, leader: leader, held: map[int]*member{}}
	defer t.release()
	err := t.take()
	if err == nil {
		err = errors.Join(t.stop(ctx), t.kill(ctx))
	}
	if err != nil {
		_, failed := t.strike(true) // nothing is left stopped
		err = errors.Join(err, failed)
	}
	if err != nil {
		return fmt.Errorf("kill process %d of cgroup %s and what it started: %w", leader.Pid, path, err)
	}
	return nil
}

// restLimit is how long processes may take to stop. One in the kernel stops
// late; it is killed without.
const restLimit = 2 * time.Second

// tree is the processes that come from one.
type tree struct {
	groups *Hierarchies
	path   string
	leader Leader
	start  uint64 // of the leader; 0 if it had ended at the first look
	held   map[int]*member
}

// member is a process pinned by a descriptor: its number is its own for as long
// as the process is there, and a signal reaches it or nobody.
type member struct {
	fd    int
	start uint64
}

// ended reports whether all threads are gone; the process may be a zombie.
func (m *member) ended() bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(m.fd), Events: unix.POLLIN}}, 0)
	return err == nil && n > 0
}

func (m *member) signal(sig unix.Signal) error {
	err := unix.PidfdSendSignal(m.fd, sig, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

func (t *tree) release() {
	for _, m := range t.held {
		unix.Close(m.fd)
	}
}

// take looks who the leader is. It need not be there any more: the number of a
// session is not given away while somebody is in the session.
func (t *tree) take() error {
	s, err := readStat(t.leader.Pid)
	if errors.Is(err, errEnded) {
		return nil
	}
	if err != nil {
		return err
	}
	pids, err := t.groups.Procs(t.path)
	if err != nil {
		return err
	}
	inGroup := s.zombie() || slices.Contains(pids, t.leader.Pid) // the lists have no zombies
	if !inGroup || s.session != t.leader.Pid || s.start < uint64(t.leader.Since/clockTick) {
		return fmt.Errorf("it is not there: %w", errdefs.ErrNotFound)
	}
	t.start = s.start
	return nil
}

// stop stops all of the tree, until a look that began when all were at rest
// finds no other.
func (t *tree) stop(ctx context.Context) error {
	limit := time.Now().Add(restLimit)
	for resting := false; ; {
		found, err := t.look(unix.SIGSTOP)
		if err != nil {
			return err
		}
		if found == 0 && (resting || time.Now().After(limit)) {
			return nil
		}
		resting = t.resting()
		if err := sleep(ctx, killPoll); err != nil {
			return nil // kill tells what is left
		}
	}
}

// kill ends what is held, the leader last: while it is there nobody else's
// session has its number. Between a SIGKILL and the death a process does not
// fork, so what it did before is found by the look after it.
func (t *tree) kill(ctx context.Context) error {
	for last := len(t.held) == 1; ; {
		left, err := t.strike(last)
		if err != nil {
			return err
		}
		found, err := t.look(unix.SIGSTOP)
		if err != nil {
			return err
		}
		switch {
		case found > 0 || len(left) > 0:
			if err := sleep(ctx, killPoll); err != nil {
				return fmt.Errorf("processes %v do not end: %w", left, err)
			}
		case last:
			return nil
		default:
			last = true
		}
	}
}

// strike sends SIGKILL to what is held, to the leader only with all, and
// returns those of them that have not ended.
func (t *tree) strike(all bool) (left []int, err error) {
	for pid, m := range t.held {
		if m.ended() || pid == t.leader.Pid && !all {
			continue
		}
		if err := m.signal(unix.SIGKILL); err != nil {
			return nil, fmt.Errorf("kill process %d: %w", pid, err)
		}
		left = append(left, pid)
	}
	slices.Sort(left)
	return left, nil
}

// look finds those of the tree that are not held yet, takes hold of them and
// sends them sig. It returns how many they are.
func (t *tree) look(sig unix.Signal) (int, error) {
	pids, err := t.groups.Procs(t.path)
	if err != nil {
		return 0, err
	}
	all := map[int]stat{}
	for _, pid := range pids {
		s, err := readStat(pid)
		if errors.Is(err, errEnded) {
			continue
		}
		if err != nil {
			return 0, err
		}
		all[pid] = s
	}
	// After the others: was it still there, the number was its own all along.
	session, err := t.sessionIsOurs()
	if err != nil {
		return 0, err
	}
	found := 0
	for _, pid := range t.descend(all, session) {
		held, err := t.hold(pid, all[pid], sig)
		if err != nil {
			return found, err
		}
		if held {
			found++
		}
	}
	return found, nil
}

// sessionIsOurs reports whether the number of the leader means its session: it
// does unless somebody else has it, as may be after the last of the session.
func (t *tree) sessionIsOurs() (bool, error) {
	s, err := readStat(t.leader.Pid)
	if errors.Is(err, errEnded) {
		return true, nil
	}
	return err == nil && s.start == t.start, err
}

// descend returns those of all, which are not held yet, that are in the
// leader's session or have a parent of the tree.
func (t *tree) descend(all map[int]stat, session bool) []int {
	ours := map[int]uint64{} // to the start
	for pid, m := range t.held {
		ours[pid] = m.start
	}
	var found []int
	for grown := true; grown; {
		grown = false
		for pid, s := range all {
			if _, known := ours[pid]; known || s.zombie() {
				continue
			}
			parent, child := ours[s.parent]
			// Nobody is older than the parent: that is a number used again.
			if session && s.session == t.leader.Pid || child && parent <= s.start {
				ours[pid], grown = s.start, true
				found = append(found, pid)
			}
		}
	}
	return found
}

// hold pins a process and signals it, unless it has ended since it was seen.
func (t *tree) hold(pid int, seen stat, sig unix.Signal) (bool, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open process %d: %w", pid, err)
	}
	now, err := readStat(pid)
	if err != nil || now.start != seen.start {
		unix.Close(fd)
		if errors.Is(err, errEnded) {
			err = nil
		}
		return false, err
	}
	m := &member{fd: fd, start: seen.start}
	t.held[pid] = m
	if err := m.signal(sig); err != nil {
		return false, fmt.Errorf("signal process %d: %w", pid, err)
	}
	return true, nil
}

// resting reports whether every thread of what is held has stopped or ended.
func (t *tree) resting() bool {
	for pid, m := range t.held {
		if !m.ended() && !threadsRest(pid) {
			return false
		}
	}
	return true
}

func threadsRest(pid int) bool {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil {
		return false // only for a bad pattern
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		if s, ok := parseStat(data); !ok || !bytes.ContainsRune([]byte("TtZX"), rune(s.state)) {
			return false
		}
	}
	return true
}

// stat is what /proc tells of a process.
type stat struct {
	state           byte
	parent, session int
	start           uint64 // in ticks since boot
}

func (s stat) zombie() bool { return s.state == 'Z' || s.state == 'X' }

// clockTick is the unit of times in /proc, which is the same for every user
// space.
const clockTick = time.Second / 100

var errEnded = fmt.Errorf("the process has ended: %w", errdefs.ErrNotFound)

func readStat(pid int) (stat, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return stat{}, errEnded
	}
	if err != nil {
		return stat{}, err
	}
	s, ok := parseStat(data)
	if !ok {
		return stat{}, fmt.Errorf("read state of process %d: %q: %w", pid, data, errdefs.ErrInternal)
	}
	return s, nil
}

// parseStat reads /proc/PID/stat. The second field is a name in parentheses, in
// which anything may stand.
func parseStat(data []byte) (stat, bool) {
	name := bytes.LastIndexByte(data, ')')
	fields := bytes.Fields(data[name+1:])
	if name < 0 || len(fields) < 20 || len(fields[0]) != 1 {
		return stat{}, false
	}
	parent, err1 := strconv.Atoi(string(fields[1]))
	session, err2 := strconv.Atoi(string(fields[3]))
	start, err3 := strconv.ParseUint(string(fields[19]), 10, 64)
	return stat{fields[0][0], parent, session, start}, errors.Join(err1, err2, err3) == nil
}

// boottime is the time since boot, as the starts of processes are counted.
func boottime() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0 // every kernel that has pidfds has the clock
	}
	return time.Duration(now.Nano())
}
