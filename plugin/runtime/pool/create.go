package pool

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// createLimit is how long an OCI runtime may take to end after SIGKILL. It may
// be in the kernel, making a control group, and come out of it late.
const createLimit = 10 * time.Second

// creators finds the processes of an OCI runtime that are making a container
// for a daemon that is dead: those that were given one of our bundles. The shim
// kills its create when the daemon's connection closes, yet what a create does
// in its last moments may come after what a recovery has looked at.
func creators(shims []*shim) {
	byPath := map[string]*shim{}
	for _, s := range shims {
		byPath[s.bundle.Path] = s
	}
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(shims) == 0 {
		return // the error is only for a bad pattern
	}
	for _, file := range files {
		line, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(string(line), "\x00")
		i := slices.Index(args, "--bundle")
		if i < 0 || i+1 >= len(args) {
			continue
		}
		s, ours := byPath[args[i+1]]
		if !ours {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
			s.creators = append(s.creators, pid)
		}
	}
}

// endCreators ends what creators found. It returns when they are gone.
func (s *shim) endCreators(ctx context.Context) {
	for _, pid := range s.creators {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // gone
		}
		log.G(ctx).WithField("pid", pid).Info("ending an OCI runtime that makes a container for a daemon that is dead")
		// Between the look and the open the number may have become another's.
		if s.creates(pid) {
			if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
				log.G(ctx).WithError(err).WithField("pid", pid).Warn("end an OCI runtime")
			}
			awaitEnd(ctx, fd, pid)
		}
		unix.Close(fd)
	}
}

func (s *shim) creates(pid int) bool {
	line, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	return err == nil && slices.Contains(strings.Split(string(line), "\x00"), s.bundle.Path)
}

// awaitEnd waits until the process of the descriptor has ended.
func awaitEnd(ctx context.Context, fd, pid int) {
	for end := time.Now().Add(createLimit); time.Now().Before(end) && ctx.Err() == nil; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			log.G(ctx).WithError(err).Warn("wait for the end of an OCI runtime")
			return
		}
		if n > 0 {
			return
		}
	}
	log.G(ctx).WithField("pid", pid).Warn("an OCI runtime does not end after SIGKILL")
}
