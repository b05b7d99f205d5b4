package pool

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	client "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// A shim removes its sockets when it shuts down, if its bundle is still there to
// tell it where they are, and not at all when it is killed. A pod's shim is
// started under the pod's ID, so the names of its sockets are known.
const (
	socketPoll = 50 * time.Millisecond
	// socketLimit is how long a shim may take to be gone once its last task is.
	socketLimit = 30 * time.Second
)

// sweepSockets removes the sockets of the shim that was started under id, as
// soon as nobody listens on them.
func (p *Pool) sweepSockets(ctx context.Context, id string) {
	var left []string
	for _, debug := range []bool{false, true} {
		address, err := client.CreateSocketAddress(ctx, p.Daemon.SocketDir, p.Daemon.GRPCAddress, id, debug)
		if err != nil || p.Daemon.SocketDir == "" {
			return
		}
		left = append(left, strings.TrimPrefix(address, "unix://"))
	}
	if left = removeDead(ctx, left); len(left) == 0 {
		return
	}
	p.Background.Go("remove sockets of shim "+id, func(ctx context.Context) {
		for end := time.Now().Add(socketLimit); len(left) > 0 && time.Now().Before(end) && sleep(ctx, socketPoll); {
			left = removeDead(ctx, left)
		}
	})
}

// removeDead removes the sockets that nobody listens on and returns the others.
func removeDead(ctx context.Context, paths []string) []string {
	var alive []string
	for _, path := range paths {
		conn, err := net.Dial("unix", path)
		switch {
		case err == nil:
			conn.Close()
			alive = append(alive, path)
		case errors.Is(err, fs.ErrNotExist):
		case errors.Is(err, unix.ECONNREFUSED):
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				log.G(ctx).WithError(err).Warn("remove the socket of a shim that is gone")
			}
		default: // too many connections wait: somebody is there
			alive = append(alive, path)
		}
	}
	return alive
}
