package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// slowLabel is the bucket of the daemon's histogram of calls that ends at
// listGoal, in seconds.
const slowLabel = `le="0.005"`

// handled counts the calls of an RPC that a daemon has handled, and those that
// took it no longer than listGoal. What the client and the machine add to a
// call is not in it.
type handled struct{ all, quick float64 }

// over is which part of the calls since then took longer, in percent.
func (h handled) over(then handled) float64 {
	all, quick := h.all-then.all, h.quick-then.quick
	return 100 * (all - quick) / all
}

// measureCalls has a daemon time its calls and tell at a free port of loopback.
func measureCalls() ([]daemon.Option, string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, "", fmt.Errorf("find a free port: %w", err)
	}
	address := l.Addr().String()
	return []daemon.Option{
		daemon.Set(address, "plugins", "io.containerd.server.v1.metrics", "address"),
		daemon.Set(true, "plugins", "io.containerd.metrics.v1.grpc-prometheus", "grpc_histogram"),
	}, address, l.Close()
}

// readHandled asks the daemon for its calls of an RPC of the runtime service.
func readHandled(ctx context.Context, address, rpc string) (handled, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/v1/metrics", nil)
	if err != nil {
		return handled{}, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return handled{}, fmt.Errorf("read metrics: %w", err)
	}
	defer resp.Body.Close()
	return parseHandled(resp.Body, rpc)
}

func parseHandled(r io.Reader, rpc string) (handled, error) {
	var h handled
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), "} ")
		if !strings.Contains(name, `grpc_method="`+rpc+`"`) {
			continue
		}
		sum := &h.all
		switch {
		case strings.HasPrefix(name, "grpc_server_handling_seconds_bucket{") && strings.Contains(name, slowLabel):
			sum = &h.quick
		case !strings.HasPrefix(name, "grpc_server_handling_seconds_count{"):
			continue
		}
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return h, fmt.Errorf("read metrics: %q: %w", lines.Text(), err)
		}
		*sum = n
	}
	return h, lines.Err()
}
