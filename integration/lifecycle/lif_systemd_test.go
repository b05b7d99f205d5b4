package lifecycle

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
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
	systemctl(t, "kill", "--kill-whom=main", "--signal=KILL", name)
	eventually(t, soon, func() error {
		if got := unit(t, name, "ActiveState"); got != "failed" {
			return fmt.Errorf("killed, the service is %s", got)
		}
		return nil
	})
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
