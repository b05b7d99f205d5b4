package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/gantry-cri/gantry/integration/host"
)

// slotDir holds a lock file for each slot, with the directory of the daemon
// that has it. It is one place for the machine: what a slot hands out (bridge,
// subnet, cgroup parent) is the machine's.
const slotDir = "/tmp/gantry-test-slots"

// slots bounds the daemons that can run at once on one machine.
const slots = 100

// sweepTimeout bounds the cleaning after one dead test.
var sweepTimeout = Patience(20 * time.Second)

// slot is a number that this process alone has until it releases it, and the
// names made of it.
type slot struct {
	n    int
	lock *os.File
}

// cgroupParent is a slice where systemd runs the machine, and only there:
// containerd's own CRI takes any cgroup of such a name for systemd's.
func (s slot) cgroupParent() string {
	if Systemd() {
		return fmt.Sprintf("/gantrytest%d.slice", s.n)
	}
	return fmt.Sprintf("/gantry-test-%d", s.n)
}

func (s slot) bridge() string  { return fmt.Sprintf("gtest%d", s.n) }
func (s slot) network() string { return fmt.Sprintf("gantry-test-%d", s.n) }

func (s slot) subnet() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 213, byte(s.n), 0}), 24)
}

func (s slot) subnet6() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, 0x02, 0x13, 0, byte(s.n)}), 64)
}

// scope says what belongs to the daemon that lives in dir and has this slot.
func (s slot) scope(dir string) host.Scope {
	return host.Scope{
		Marker:       marker(dir),
		Dir:          dir,
		CgroupParent: s.cgroupParent(),
		Bridge:       s.bridge(),
		Network:      s.network(),
		Subnet:       s.subnet(),
		Table:        table(dir),
		IPAM:         filepath.Join(dir, "ipam"),
		Expected:     []string{"containerd", "containerd-shim-gantry-v2", "gantry-anchor"},
	}
}

// table is the name that follows from the directory where a daemon keeps networks.
func table(dir string) string {
	sum := sha256.Sum256([]byte(filepath.Join(dir, "root", CRIPlugin, "network")))
	return "gantry-" + hex.EncodeToString(sum[:4])
}

// marker is the environment variable by which a daemon's processes are known.
func marker(dir string) string { return "GANTRY_TEST_DAEMON=" + dir }

// takeSlot takes the first free slot, after it has cleaned up what tests left
// behind that died with theirs.
func takeSlot() (slot, error) {
	if err := os.MkdirAll(slotDir, 0o700); err != nil {
		return slot{}, fmt.Errorf("make slot directory: %w", err)
	}
	var mine *slot
	for n := range slots {
		s, err := trySlot(n, mine == nil)
		if errors.Is(err, syscall.EWOULDBLOCK) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return slot{}, errors.Join(err, mine.release())
		}
		if err := s.sweep(); err != nil {
			return slot{}, errors.Join(err, s.release(), mine.release())
		}
		if mine == nil {
			mine = &s
		} else if err := s.release(); err != nil {
			return slot{}, err
		}
	}
	if mine == nil {
		return slot{}, fmt.Errorf("take slot: all %d are taken: %w", slots, syscall.EBUSY)
	}
	return *mine, nil
}

// trySlot locks slot n; unless create is set it must exist.
func trySlot(n int, create bool) (slot, error) {
	flags := os.O_RDWR
	if create {
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(filepath.Join(slotDir, fmt.Sprint(n)), flags, 0o600)
	if err != nil {
		return slot{}, fmt.Errorf("open slot: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return slot{}, errors.Join(fmt.Errorf("lock slot %d: %w", n, err), f.Close())
	}
	return slot{n, f}, nil
}

// sweep removes what the slot's last owner left, when it died before it could.
func (s slot) sweep() error {
	text, err := os.ReadFile(s.lock.Name())
	if err != nil {
		return fmt.Errorf("read slot: %w", err)
	}
	dir := strings.TrimSpace(string(text))
	if dir == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), sweepTimeout)
	defer cancel()
	if err := s.scope(dir).Purge(ctx); err != nil {
		return fmt.Errorf("clean up after the dead test in %s: %w", dir, err)
	}
	return s.write("")
}

// write notes whose slot it is; empty means that nothing is left of it.
func (s slot) write(dir string) error {
	if err := s.lock.Truncate(0); err != nil {
		return fmt.Errorf("empty slot: %w", err)
	}
	if _, err := s.lock.WriteAt([]byte(dir), 0); err != nil {
		return fmt.Errorf("write slot: %w", err)
	}
	return nil
}

// release lets another process have the slot. On nil it does nothing.
func (s *slot) release() error {
	if s == nil {
		return nil
	}
	return s.lock.Close()
}
