package lifecycle

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// TestLIF_13_Notify: who started the daemon is told when it serves and when it
// begins to stop.
func TestLIF_13_Notify(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	told := func(want string) {
		t.Helper()
		must(l.SetReadDeadline(time.Now().Add(ample)))
		buf := make([]byte, 4096)
		for {
			n, err := l.Read(buf)
			if err != nil {
				t.Fatalf("no %s: %v", want, err)
			}
			if strings.Contains(string(buf[:n]), want) {
				return
			}
		}
	}
	d := start(t, daemon.Env("NOTIFY_SOCKET", socket))
	told("READY=1")
	d.Stop()
	told("STOPPING=1")
}

// service makes a systemd service of a daemon that is down, as a node has it.
func service(t *testing.T, d *daemon.Daemon) (name string) {
	t.Helper()
	name = "gantry-" + filepath.Base(d.Dir) + ".service"
	argv, env := d.Command()
	var b strings.Builder
	fmt.Fprintf(&b, "[Service]\nType=notify\nDelegate=yes\nKillMode=process\nExecStart=%s\nStandardOutput=append:%s\nStandardError=append:%[2]s\n",
		strings.Join(argv, " "), d.LogPath())
	for _, kv := range env {
		if strings.HasPrefix(kv, "PATH=") || strings.HasPrefix(kv, "GANTRY_") {
			fmt.Fprintf(&b, "Environment=%s\n", strconv.Quote(kv))
		}
	}
	file := filepath.Join("/run/systemd/system", name)
	must(os.WriteFile(file, []byte(b.String()), 0o644))
	t.Cleanup(func() {
		systemctl(t, "stop", name)
		must(os.Remove(file))
		systemctl(t, "daemon-reload")
	})
	systemctl(t, "daemon-reload")
	return name
}

// killService kills the first process of a service, "main", or all of it.
func killService(t *testing.T, name, whom string) {
	t.Helper()
	systemctl(t, "kill", "--kill-whom="+whom, "--signal=KILL", name)
	eventually(t, soon, func() error {
		if got := unit(t, name, "ActiveState"); got != "failed" {
			return fmt.Errorf("killed, the service is %s", got)
		}
		return nil
	})
}

// TestLIF_13_Service: as a service the daemon is started, restarted and stopped
// by systemd, and pods run on.
func TestLIF_13_Service(t *testing.T) {
	needSystemd(t)
	d := start(t)
	before := runPaused(d, "before")
	ctr := before.run(d, daemon.ContainerConfig("main", plain(t, d)))
	pids := map[string]int{before.id: pidOf(t, d, before.id), ctr: pidOf(t, d, ctr)}
	d.Stop()
	name := service(t, d)
	same := func(when string) {
		t.Helper()
		if got := unit(t, name, "ActiveState"); got != "active" {
			t.Errorf("%s: the service is %s", when, got)
		}
		for id, pid := range pids {
			if got := pidOf(t, d, id); got != pid || !alive(pid) {
				t.Errorf("%s: process of %s is %d, was %d (alive %v)", when, id, got, pid, alive(pid))
			}
		}
		for _, c := range []string{ctr} {
			if got := sh(d, c, "echo fine"); got != "fine" {
				t.Errorf("%s: a command says %q", when, got)
			}
		}
	}
	systemctl(t, "start", name)
	same("started")
	during := runPod(d, "during")
	other := during.run(d, daemon.ContainerConfig("main", plain(t, d)))
	pids[other] = pidOf(t, d, other)
	systemctl(t, "restart", name)
	same("restarted")
	if s := podStatus(t, d, during.id); s.State != cri.PodSandboxState_SANDBOX_READY {
		t.Errorf("after the restart the pod is %s", s.State)
	}
	killService(t, name, "main")
	systemctl(t, "start", name)
	same("killed and started")
	systemctl(t, "stop", name)
	d.Up()
	for id, pid := range pids {
		if got := pidOf(t, d, id); got != pid || !alive(pid) {
			t.Errorf("stopped: process of %s is %d, was %d", id, got, pid)
		}
	}
}

// TestRTH_14_OwnUnit: the supervisor is a unit of its own, so who kills all of the
// daemon's service does not kill it; and the next one joins what is left of the unit.
func TestRTH_14_OwnUnit(t *testing.T) {
	needSystemd(t)
	t.Run("kernel", func(t *testing.T) { ownUnit(t, 0) })
	t.Run("anchor", func(t *testing.T) { ownUnit(t, 1, anchored()) })
}

func ownUnit(t *testing.T, leastAnchors int, opts ...daemon.Option) {
	d := start(t, append(opts, daemon.Edit(withGantry), daemon.Edit(withPinned))...)
	d.Stop()
	name := service(t, d)
	systemctl(t, "start", name)
	p := supervisedPod(d, "pinned", "apart")
	config := daemon.ContainerConfig("terminal", plain(t, d))
	config.Tty = true // something of it outlives the supervisor
	ctr := p.run(d, config)
	pid, supervisor := pidOf(t, d, ctr), supervisors(t, d)[0]
	scope := unitOf(t, supervisor)
	if !strings.HasPrefix(scope, "gantry-") || !strings.HasSuffix(scope, ".scope") {
		t.Fatalf("the supervisor is in %s", scope)
	}
	for property, want := range map[string]string{"TasksMax": "infinity", "KillSignal": "9", "Slice": "system.slice", "Before": name} {
		if got := unit(t, scope, property); !slices.Contains(strings.Fields(got), want) {
			t.Errorf("%s of the unit is %s, want %s", property, got, want)
		}
	}
	if n := len(anchors(t, d)); n < leastAnchors {
		t.Errorf("%d anchors", n)
	}
	for _, anchor := range anchors(t, d) {
		if got := unitOf(t, anchor); got != scope {
			t.Errorf("the anchor is in %s, its supervisor in %s", got, scope)
		}
	}
	killService(t, name, "all")
	systemctl(t, "start", name)
	if now := supervisors(t, d); len(now) != 1 || now[0] != supervisor {
		t.Errorf("the supervisor was %d, now there are %v", supervisor, now)
	}
	p.alive(t, d, ctr, pid)
	kill(t, supervisor)
	p.alive(t, d, ctr, pid)
	if now := unitOf(t, supervisors(t, d)[0]); now != scope {
		t.Errorf("the next supervisor is in %s, the first was in %s", now, scope)
	}
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
	noSupervisor(t, d)
	eventually(t, soon, func() error {
		if got := unit(t, scope, "LoadState"); got != "not-found" {
			return fmt.Errorf("without a supervisor %s is %s", scope, got)
		}
		return nil
	})
	systemctl(t, "stop", name)
	d.Up()
}

// unitOf is the innermost unit of systemd that a process is in.
func unitOf(t *testing.T, pid int) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.SplitN(strings.TrimSpace(line), ":", 3); fields[0] == "0" || fields[1] == "name=systemd" {
			return filepath.Base(fields[2])
		}
	}
	t.Fatalf("process %d is in no unit: %s", pid, text)
	return ""
}
