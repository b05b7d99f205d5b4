package network

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// orphanGrace is what a plugin of a daemon that died gets to come to its end,
// from when it was found.
const orphanGrace = 5 * time.Second

// orphans are the plugins that a daemon with our cache directory left running
// when it died. Each holds up its own pod only: an ADD that goes on could
// allocate after the DEL that recovery asks for. One may never end, when the
// kernel does not let go of it.
type orphans []*orphan

type orphan struct {
	pid       int
	container string
	found     time.Time

	turnMu sync.Mutex // held by the one that waits for its end
	fd     int        // a pidfd, as the number may become another's; -1 after the end
}

// findOrphans lists those there are. One that works for no pod is killed: it
// only looked, or collected what the next GC finds as well.
func findOrphans(owner string) (orphans, error) {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found orphans
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // a thread, or it has ended
		}
		environ, ours := orphanEnv(pid, owner)
		container := lookup(environ, "CNI_CONTAINERID")
		if ours && container != "" {
			found = append(found, &orphan{pid: pid, container: container, found: time.Now(), fd: fd})
			continue
		}
		if ours {
			err = killGroup(pid)
		}
		unix.Close(fd)
		if err != nil {
			return nil, fmt.Errorf("process %d: %w", pid, err)
		}
	}
	return found, nil
}

// orphanEnv tells a plugin from what a plugin may have started to stay: a
// daemon leads a session, a plugin only a process group.
func orphanEnv(pid int, owner string) ([]string, bool) {
	pgid, err := unix.Getpgid(pid)
	if err != nil || pgid != pid {
		return nil, false
	}
	sid, err := unix.Getsid(pid)
	if err != nil || sid == pid {
		return nil, false
	}
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
	if err != nil {
		return nil, false
	}
	environ := strings.Split(string(data), "\x00")
	return environ, lookup(environ, ownerEnv) == owner
}

// end waits for the plugins that work for the container, or for any with "",
// and kills those that do not end. An error says that one is still there.
func (o orphans) end(container string) error {
	var g errgroup.Group
	for _, p := range o {
		if container == "" || p.container == container {
			g.Go(p.end)
		}
	}
	return g.Wait()
}

func (p *orphan) end() error {
	p.turnMu.Lock()
	defer p.turnMu.Unlock()
	if p.fd < 0 {
		return nil
	}
	if _, err := endGroupOf(p.fd, p.pid, orphanGrace-time.Since(p.found)); err != nil {
		return fmt.Errorf("end process %d, a plugin of an earlier run: %w", p.pid, err)
	}
	unix.Close(p.fd)
	p.fd = -1
	return nil
}
