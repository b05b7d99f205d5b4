package lifecycle

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// anchored has supervisors started as on kernels that do not keep exit statuses.
func anchored() daemon.Option { return daemon.Env("GANTRY_SHIM_ANCHOR", "1") }

// anchors are the anchors of a daemon's supervisors.
func anchors(t *testing.T, d *daemon.Daemon) []int {
	t.Helper()
	return started(t, func(args []string) bool { return args[0] == "gantry-anchor" && strings.HasPrefix(args[1], d.Dir+"/") })
}

// noAnchor waits for the end of all anchors, which is after that of the supervisor.
func noAnchor(t *testing.T, d *daemon.Daemon) {
	t.Helper()
	noSupervisor(t, d)
	eventually(t, soon, func() error {
		if left := anchors(t, d); len(left) > 0 {
			return fmt.Errorf("without pods there are anchors %v", left)
		}
		return nil
	})
	nothingLeft(t, d)
}

// What the kernel does for a supervisor, an anchor does where it cannot.

func TestRTH_12_AnchorSupervisorDies(t *testing.T)   { supervisorDies(t, anchored()) }
func TestRTH_12_AnchorSandboxesSurvive(t *testing.T) { sandboxesSurvive(t, anchored()) }
func TestRTH_12_AnchorUpgrade(t *testing.T)          { upgrades(t, anchored()) }

func TestRTH_12_AnchorCrash(t *testing.T) {
	cycles := 3
	if all := crashCycles(); all > 10 {
		cycles = all / len(supervised)
	}
	supervisorCrashes(t, cycles, anchored())
}

// TestRTH_12_AnchorReaps: what a container leaves in the host's process namespace is
// reaped; a container that ends while neither daemon nor supervisor is there has its
// code, and the time of its end.
func TestRTH_12_AnchorReaps(t *testing.T) {
	oursAlone(t, "tasks that outlive their shim")
	t.Parallel()
	d := start(t, anchored(), daemon.Edit(withPinned))
	node := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_NODE}
	p := pinnedPod(d, "leaves", hostNetwork, withNamespaces(node))
	found := anchors(t, d)
	if len(found) != 1 {
		t.Fatalf("anchors are %v", found)
	}
	ctr := p.run(d, inNamespaces(daemon.ContainerConfig("main", plain(t, d)), node))
	if parent := parentOf(t, pidOf(t, d, ctr)); parent != found[0] {
		t.Errorf("the parent of a container is %d, the anchor %d", parent, found[0])
	}
	pid, err := strconv.Atoi(sh(d, ctr, "sleep 1000 >/dev/null 2>&1 & echo $!"))
	if err != nil {
		t.Fatal(err)
	}
	if parent := parentOf(t, pid); parent != found[0] {
		t.Errorf("the parent of an orphan is %d, the anchor %d", parent, found[0])
	}
	kill(t, pid)
	eventually(t, soon, func() error {
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && strings.Contains(string(stat), "(sleep)") {
			return fmt.Errorf("an orphan that ended is there: %s", stat)
		}
		return nil
	})

	ending := pinnedPod(d, "ends")
	w := ending.wait(t, d, 6)
	old := supervisors(t, d)
	d.Kill()
	kill(t, old[0])
	w.exit(t)
	const long, slack = 3 * time.Second, 2 * time.Second
	ended := time.Now()
	<-time.NewTimer(long).C
	d.Up()
	if s := waitExited(t, d, w.id); s.ExitCode != 6 || time.Unix(0, s.FinishedAt).After(ended.Add(slack)) {
		t.Errorf("code %d, ended at %s; it was at %s", s.ExitCode, time.Unix(0, s.FinishedAt), ended)
	}
	for _, p := range []pod{p, ending} {
		if err := removePod(d, p.id); err != nil {
			t.Fatal(err)
		}
	}
	noAnchor(t, d)
}

// TestRTH_12_AnchorDies: the death of the anchor ends nothing, and blocks nothing. How
// those end that it had is not known any more; how later ones end is, while the
// supervisor lives.
func TestRTH_12_AnchorDies(t *testing.T) {
	oursAlone(t, "tasks that outlive their shim")
	t.Parallel()
	for _, handler := range supervised {
		t.Run(handler, func(t *testing.T) {
			t.Parallel()
			d := start(t, anchored(), daemon.Edit(withGantry), daemon.Edit(withPinned))
			p := supervisedPod(d, handler, "adrift")
			runs := p.run(d, daemon.ContainerConfig("steady", plain(t, d)))
			known, pid := p.wait(t, d, 7), pidOf(t, d, runs)
			kill(t, anchors(t, d)[0])
			p.alive(t, d, runs, pid)
			later := p.wait(t, d, 9)
			later.exit(t)
			if s := waitExited(t, d, later.id); s.ExitCode != 9 {
				t.Errorf("a container that was made without an anchor has code %d", s.ExitCode)
			}
			known.exit(t)
			if s := waitExited(t, d, known.id); s.ExitCode != 7 && s.ExitCode != 137 {
				t.Errorf("code %d", s.ExitCode)
			}
			last := p.wait(t, d, 3)
			kill(t, supervisors(t, d)[0])
			p.alive(t, d, runs, pid)
			p.alive(t, d, last.id, last.pid)
			if n := len(anchors(t, d)); n != 1 {
				t.Errorf("the next supervisor has %d anchors", n)
			}
			wholeLife(t, d, p)
			if err := removePod(d, p.id); err != nil {
				t.Error(err)
			}
			noAnchor(t, d)
		})
	}
}
