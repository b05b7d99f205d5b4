package lifecycle

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

const (
	notifierAction    = "seccomp-notifier-action.crio.io"
	notifierActionOld = "io.kubernetes.cri-o.seccompNotifierAction"
)

var byDefault = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}

// metricsAddress is one of this process alone.
func metricsAddress() string {
	pid := os.Getpid()
	return fmt.Sprintf("127.%d.%d.%d:9338", 1+pid>>16&127, pid>>8&255, pid&255)
}

// metric is the value of a metric of the daemon, "" without one.
func metric(t *testing.T, name string) string {
	t.Helper()
	resp, err := http.Get("http://" + metricsAddress() + "/v1/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			return value
		}
	}
	return ""
}

func deniedCalls(t *testing.T, syscall string) string {
	return metric(t, fmt.Sprintf("gantry_seccomp_denied_calls_total{syscall=%q}", syscall))
}

// filtered is a shell script under a profile.
func (b *box) filtered(name, text string, p *cri.SecurityProfile) *cri.ContainerConfig {
	c := b.script(name, text)
	c.Linux.SecurityContext.Seccomp = p
	return c
}

// needsNotifier ends the test if the runtime of the handler under test does not say that
// it can tell of system calls: then the daemon refuses who asks for that.
func (b *box) needsNotifier() {
	b.t.Helper()
	if strings.Contains(saysOfItself(ownRuntime(b.t)), "SCMP_ACT_NOTIFY") {
		return
	}
	c := b.filtered("needs", "exec sleep 1000", byDefault)
	c.Annotations = map[string]string{notifierAction: ""}
	b.refused(c, codes.FailedPrecondition, "SCMP_ACT_NOTIFY", defaultHandler)
	b.t.Skip("the runtime of the default handler does not say that it can tell of system calls; who asks for that is refused")
}

// TestSEC_18_SeccompNotifier: what the profile denies is counted and still denied,
// for the first process and for commands, before and after a crash of the daemon.
func TestSEC_18_SeccompNotifier(t *testing.T) {
	t.Parallel()
	d := start(t, allowing(notifierAction, notifierActionOld), daemon.Set(metricsAddress(), "plugins", "io.containerd.server.v1.metrics", "address"))
	b := newBoxOn(t, d, saying(notifierAction, ""))
	b.needsNotifier()
	const script = `try() { unshare -U true && echo "$1 allowed" || echo "$1 denied"; }
		try first
		until [ -e /tmp/go ]; do sleep 0.2; done
		try second
		exec sleep 1000`
	id := b.run(b.filtered("counted", script, byDefault))
	b.logged(id, "first denied")
	if got := deniedCalls(t, "unshare"); got != "1" {
		t.Errorf("after one call %q are counted", got)
	}
	forbidden := func(command string) {
		t.Helper()
		if out, code := tryExec(t, d, id, "sh", "-c", command); code == 0 || !strings.Contains(out, "not permitted") {
			t.Errorf("%s: %q, %d", command, out, code)
		}
	}
	forbidden("unshare -m true")
	forbidden("pivot_root / /")
	if mounts, pivots := deniedCalls(t, "unshare"), deniedCalls(t, "pivot_root"); mounts != "2" || pivots != "1" {
		t.Errorf("after commands %q and %q are counted", mounts, pivots)
	}
	if out := b.Exec(id, "sh", "-c", "mkdir /tmp/x && ls /tmp"); !strings.Contains(out, "x") {
		t.Errorf("what is allowed gives %q", out)
	}

	d.Kill()
	d.Up()
	forbidden("unshare -U true")
	if got := deniedCalls(t, "unshare"); got != "1" {
		t.Errorf("of a command after a crash %q are counted", got)
	}
	b.Exec(id, "touch", "/tmp/go")
	b.logged(id, "second denied")
	b.stop(id, 0)
	if s := b.exited(id); s.Reason != "Error" || s.Message != "" {
		t.Errorf("of an end that nothing was denied for: %q, %q", s.Reason, s.Message)
	}
}

// TestANN_08_SeccompNotifierAction: only who may ask for it gets it, by either
// name, for the pod or one container; and a profile that ends processes still does.
func TestANN_08_SeccompNotifierAction(t *testing.T) {
	t.Parallel()
	d := start(t, allowing(notifierAction, notifierActionOld))
	strict := d.PodConfig("strict")
	saying(notifierAction, "stop")(strict)
	b := &box{Daemon: d, t: t, image: plain(t, d), config: strict, pod: d.RunPodWith(strict, "strict")}
	if s := specOf(t, d, b.run(b.filtered("strict", "exec sleep 1000", byDefault))); s.Linux.Seccomp.ListenerPath != "" {
		t.Errorf("where it is not allowed the filter tells of calls at %s", s.Linux.Seccomp.ListenerPath)
	}
	b = newBoxOn(t, d, saying(notifierActionOld, "log"))
	b.refused(b.filtered("bad", "exec sleep 1000", byDefault), codes.InvalidArgument, notifierActionOld, "stop")

	b.needsNotifier()
	p := runPod(d, "killing", saying(notifierActionOld, ""))
	b.pod, b.config = p.id, p.config
	path := filepath.Join(t.TempDir(), "kill.json")
	text := `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_KILL_PROCESS"}]}`
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	killing := &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: path}
	if s := b.exited(b.run(b.filtered("killed", "exec mkdir /tmp/x", killing))); s.Reason != "seccomp killed" || s.ExitCode != 137 || !strings.Contains(s.Message, "mkdir") {
		t.Errorf("the first process ended with %q, %q, %d", s.Reason, s.Message, s.ExitCode)
	}
	if s := b.exited(b.run(b.filtered("child", "mkdir /tmp/x; echo $?; exit 3", killing))); s.Reason != "Error" || s.ExitCode != 3 || logText(t, s.LogPath, "stdout") != "137\n" {
		t.Errorf("after the end of a child: %q, %d, %q", s.Reason, s.ExitCode, logText(t, s.LogPath, "stdout"))
	}
	own := b.filtered("own", "unshare -U true; exec sleep 1000", byDefault)
	own.Annotations = map[string]string{notifierAction: "stop"}
	if s := b.exited(b.run(own)); s.Reason != "seccomp killed" {
		t.Errorf("a container that asks for itself ended with %q, %d", s.Reason, s.ExitCode)
	}
}

// TestCTR_19_SeccompNotifierStop: a container that is to end for a denied call
// does, also if the daemon crashes meanwhile; the status says so and names the calls.
// Its neighbour goes on.
func TestCTR_19_SeccompNotifierStop(t *testing.T) {
	t.Parallel()
	d := start(t, allowing(notifierAction, notifierActionOld))
	b := newBoxOn(t, d, saying(notifierAction, "stop"))
	b.needsNotifier()
	neighbour := b.run(b.filtered("neighbour", "exec sleep 1000", byDefault))
	const script = "unshare -U true; pivot_root / /; echo tried; exec sleep 1000"
	ended := func(id string) {
		t.Helper()
		s := b.exited(id)
		if s.Reason != "seccomp killed" || s.ExitCode != 137 || !strings.HasSuffix(s.Message, ": unshare, pivot_root") {
			t.Errorf("it ended with %q, %q, %d", s.Reason, s.Message, s.ExitCode)
		}
	}
	ended(b.run(b.filtered("stopped", script, byDefault)))
	if s := b.exited(b.run(b.filtered("done", "unshare -U true; exit 0", byDefault))); s.Reason != "Completed" {
		t.Errorf("one that ends by itself before: %q", s.Reason)
	}
	id := b.run(b.filtered("crash", script, byDefault))
	b.logged(id, "tried")
	d.Kill()
	d.Up()
	ended(id)
	if s := b.status(neighbour); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the neighbour is %s: %q", s.State, s.Message)
	}
}
