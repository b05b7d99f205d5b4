package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// Seconds for which a profile is taken, and an execution trace, which is big.
const (
	profileSeconds = 20
	traceSeconds   = 5
)

// profile writes, for every subject, what tells where a pod's life spends its
// time while pods come and go one at a time:
//
//	NAME.cpu     go tool pprof
//	NAME.trace   go tool trace -pprof=syscall gives the stacks of disk syncs
//	NAME.strace  with times: programs, syncs and mounts
//	NAME.log     at debug level
func (b *bench) profile(ctx context.Context) (err error) {
	if err := os.MkdirAll(b.profiles, 0o755); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	nodes, err := b.launch(ctx, b.subjects, daemon.Set("debug", "debug", "level"))
	defer func() { err = errors.Join(err, retire(nodes)) }()
	if err != nil {
		return err
	}
	for _, n := range nodes {
		out := func(kind string) string { return filepath.Join(b.profiles, n.name+"."+kind) }
		err := errors.Join(
			b.whileBusy(ctx, n, func() error {
				return n.fetch(ctx, fmt.Sprintf("/debug/pprof/profile?seconds=%d", profileSeconds), out("cpu"))
			}),
			b.whileBusy(ctx, n, func() error {
				return n.fetch(ctx, fmt.Sprintf("/debug/pprof/trace?seconds=%d", traceSeconds), out("trace"))
			}),
			b.follow(ctx, n, out("strace"), "-ttt", "-T"))
		if err != nil {
			return fmt.Errorf("profile %s: %w", n.name, err)
		}
		log, err := os.ReadFile(n.LogPath())
		if err == nil {
			err = os.WriteFile(out("log"), log, 0o644)
		}
		if err != nil {
			return fmt.Errorf("save log: %w", err)
		}
		b.progress("profile: %s is done", n.name)
	}
	return nil
}

// whileBusy does something while pods come and go.
func (b *bench) whileBusy(ctx context.Context, n *node, do func() error) error {
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- n.churn(ctx, cri.NamespaceMode_POD, stop, func(*pod) {}) }()
	err := do()
	close(stop)
	return errors.Join(err, <-done)
}

// fetch writes a page of the daemon's debug server to a file.
func (n *node) fetch(ctx context.Context, path, file string) error {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(n.Dir, "debug.sock"))
	}
	client := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://debug"+path, nil)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", path, err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", path, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("fetch %s: %s", path, resp.Status)
	}
	f, err := os.Create(file)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", path, err)
	}
	_, err = io.Copy(f, resp.Body)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("fetch %s: %w", path, err)
	}
	return nil
}
