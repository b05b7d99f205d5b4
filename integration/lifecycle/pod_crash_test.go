package lifecycle

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// crashCycles is how many pod lives meet a crash: 10, or as many as
// GANTRY_FAULT_LONG says, which is 200 for anything that is no number above 1.
func crashCycles() int {
	text := os.Getenv("GANTRY_FAULT_LONG")
	if text == "" {
		return 10
	}
	if n, err := strconv.Atoi(text); err == nil && n > 1 {
		return n
	}
	return 200
}

// cycleTime is a little more than a life of a pod takes, so that the crash
// meets any moment of it.
const cycleTime = 900 * time.Millisecond

// crashes kills the daemon at random moments of pods' lives, one after the other,
// and fails the test where a life does not come to its end or leaves something.
func crashes(t *testing.T, d *daemon.Daemon, lives func(cycle string) error) {
	t.Helper()
	oursAlone(t, "care for what a crash leaves")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for i := range crashCycles() {
		done := make(chan error, 1)
		go func() { done <- lives(fmt.Sprint("cycle", i)) }()
		timer := time.NewTimer(time.Duration(random.Int64N(int64(cycleTime))))
		<-timer.C
		d.Kill()
		d.Up()
		if err := <-done; err != nil {
			t.Fatalf("cycle %d: %v\n%s", i, err, d.Tail(40))
		}
		nothingLeft(t, d)
		if t.Failed() {
			t.Fatalf("after cycle %d\n%s", i, d.Tail(60))
		}
	}
}

// TestLIF_02_Crash kills the daemon at random moments of pods' lives, while a
// client goes on as the kubelet does. In the end there is nothing.
func TestLIF_02_Crash(t *testing.T) {
	t.Parallel()
	d := start(t)
	img := plain(t, d)
	crashes(t, d, func(cycle string) error { return life(d, cycle, img) })
}

// TestLIF_02_LeftLayer: the directory of a layer that the daemon was making when
// it died is in nobody's way.
func TestLIF_02_LeftLayer(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t))
	b.run(b.sleeper("before"))
	b.Kill()
	layers := filepath.Join(b.Root, "io.containerd.snapshotter.v1.overlayfs", "snapshots")
	entries, err := os.ReadDir(layers)
	if err != nil {
		t.Fatal(err)
	}
	last := 0
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			last = max(last, n)
		}
	}
	const left = 5 // some numbers after the last may have been used
	for n := range left {
		if err := os.MkdirAll(filepath.Join(layers, fmt.Sprint(last+1+n), "fs"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.Up()
	b.run(b.sleeper("after"))
	now, err := os.ReadDir(layers)
	if err != nil {
		t.Fatal(err)
	}
	if len(now) > len(entries)+1 {
		t.Errorf("directories are still there: %v, before %v", now, entries)
	}
}

// life is what the kubelet does with a pod: every step again until it succeeds.
func life(d *daemon.Daemon, name, img string, edits ...func(*cri.PodSandboxConfig)) error {
	config := d.PodConfig(name)
	for _, edit := range edits {
		edit(config)
	}
	p := pod{config: config}
	if err := insist(func(ctx context.Context) (err error) {
		p.id, err = d.StartPod(ctx, config, "")
		return err
	}); err != nil {
		return fmt.Errorf("run: %w", err)
	}
	var ctr string
	if err := insist(func(ctx context.Context) error {
		main := daemon.ContainerConfig("main", img)
		main.Linux.SecurityContext.NamespaceOptions.UsernsOptions = config.Linux.SecurityContext.NamespaceOptions.UsernsOptions
		resp, err := d.Runtime().CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: config, Config: main})
		ctr = resp.GetContainerId()
		return err
	}); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	// A start that the crash met may have failed for good; then the kubelet
	// takes the container away, as here happens to all.
	if err := insist(func(ctx context.Context) error {
		_, err := d.Runtime().StartContainer(ctx, &cri.StartContainerRequest{ContainerId: ctr})
		if status.Code(err) == codes.FailedPrecondition {
			return nil
		}
		return err
	}); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	for what, step := range []func(context.Context) error{
		func(ctx context.Context) error {
			_, err := d.Runtime().StopContainer(ctx, &cri.StopContainerRequest{ContainerId: ctr})
			return err
		},
		func(ctx context.Context) error {
			_, err := d.Runtime().RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: ctr})
			return err
		},
		func(ctx context.Context) error { return d.RemovePod(ctx, p.id) },
	} {
		if err := insist(step); err != nil {
			return fmt.Errorf("step %d of the end: %w", what, err)
		}
	}
	return nil
}

// insist repeats a call until it succeeds, for a minute.
func insist(call func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * poll)
	defer tick.Stop()
	for {
		err := call(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (last: %w)", ctx.Err(), err)
		case <-tick.C:
		}
	}
}
