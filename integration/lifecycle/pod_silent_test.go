package lifecycle

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// silentBound is what the end of a pod with a silent shim may take: one attempt
// through the shim, the questions to it, the clean-up after it.
const silentBound = 90 * time.Second

// silence stops the pod's shim as a debugger would.
func silence(t *testing.T, pod string) int {
	t.Helper()
	pids := shimsOf(t, pod)
	if len(pids) != 1 {
		t.Fatalf("the pod has shims %v", pids)
	}
	if err := unix.Kill(pids[0], unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Kill(pids[0], unix.SIGCONT) }) // for when the test failed
	return pids[0]
}

// TestRTH_11_SilentShim: a pod whose shim does not answer can be stopped and
// removed, and nobody else's shim suffers. The host is clean afterwards.
func TestRTH_11_SilentShim(t *testing.T) {
	oursAlone(t, "bound on a silent shim")
	t.Parallel()
	for name, restart := range map[string]bool{"same daemon": false, "after a restart": true} {
		t.Run(name, func(t *testing.T) {
			d := start(t)
			other := runPaused(d, "other")
			witness := other.run(d, daemon.ContainerConfig("witness", plain(t, d)))
			p := runPaused(d, "silent")
			img := plain(t, d)
			const mark = "87360011"
			ids := []string{
				p.run(d, daemon.ContainerConfig("one", img, "sh", "-c", "sleep "+mark+" & setsid sleep "+mark+" & wait")),
				p.run(d, daemon.ContainerConfig("two", img)),
			}
			eventually(t, ample, func() error {
				if n := sleepers(mark); n != 2 {
					return fmt.Errorf("%d processes", n)
				}
				return nil
			})
			bystander := shimsOf(t, other.id)
			silence(t, p.id)
			if restart {
				d.Restart() // a kill may undo the record of a start that was just made
			}
			ctx, cancel := context.WithTimeout(t.Context(), silentBound)
			defer cancel()
			begin := time.Now()
			if _, err := d.Runtime().StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
				t.Fatalf("stop after %s: %v", time.Since(begin), err)
			}
			t.Logf("stopped after %s", time.Since(begin))
			for _, id := range ids {
				if s := containerStatus(t, d, id); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 {
					t.Errorf("container %s: %s, exit code %d", id, s.State, s.ExitCode)
				}
			}
			if err := noneMarked(mark); err != nil {
				t.Error(err)
			}
			if left := shimsOf(t, p.id); len(left) > 0 {
				t.Errorf("shims %v are left", left)
			}
			if _, err := d.Runtime().RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
				t.Fatalf("remove: %v", err)
			}
			if now := shimsOf(t, other.id); !slices.Equal(now, bystander) {
				t.Errorf("another pod's shim is %v, was %v", now, bystander)
			}
			if got := sh(d, witness, "echo here"); got != "here" {
				t.Errorf("another pod's container says %q", got)
			}
			if err := removePod(d, other.id); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRTH_11_SilentShimRemoved: a removal without a stop before it converges as well,
// also of a pod that has no container.
func TestRTH_11_SilentShimRemoved(t *testing.T) {
	oursAlone(t, "bound on a silent shim")
	t.Parallel()
	d := shared(t)
	p := runPaused(d, "silent")
	silence(t, p.id)
	ctx, cancel := context.WithTimeout(t.Context(), silentBound)
	defer cancel()
	if _, err := d.Runtime().RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Fatalf("remove: %v", err)
	}
	if left := shimsOf(t, p.id); len(left) > 0 {
		t.Errorf("shims %v are left", left)
	}
	if _, err := d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id}); err == nil || !strings.Contains(err.Error(), p.id) {
		t.Errorf("after the removal: %v", err)
	}
}

// TestRTH_11_SilentSupervisor: the supervisor of all pods holds up the removal of
// none: it is ended when it does not answer, and the pods that stay live on.
func TestRTH_11_SilentSupervisor(t *testing.T) {
	oursAlone(t, "bound on a silent shim")
	t.Parallel()
	for _, handler := range supervised {
		t.Run(handler, func(t *testing.T) {
			t.Parallel()
			d := start(t, daemon.Edit(withGantry), daemon.Edit(withPinned))
			goes, stays := supervisedPod(d, handler, "goes"), supervisedPod(d, handler, "stays")
			goes.run(d, daemon.ContainerConfig("main", plain(t, d)))
			ctr := stays.run(d, daemon.ContainerConfig("main", plain(t, d)))
			pid, old := pidOf(t, d, ctr), supervisors(t, d)
			if err := unix.Kill(old[0], unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Kill(old[0], unix.SIGCONT) }) // for when the test failed
			ctx, cancel := context.WithTimeout(t.Context(), silentBound)
			defer cancel()
			if _, err := d.Runtime().RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: goes.id}); err != nil {
				t.Fatalf("remove: %v\n%s", err, d.Tail(60))
			}
			if now := supervisors(t, d); len(now) != 1 || now[0] == old[0] {
				t.Errorf("supervisors are %v and were %v", now, old)
			}
			stays.alive(t, d, ctr, pid)
			if err := removePod(d, stays.id); err != nil {
				t.Error(err)
			}
			noSupervisor(t, d)
			nothingLeft(t, d)
		})
	}
}
