package lifecycle

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// untilSignal waits for a signal by number and then exits with 100 and the number.
func untilSignal(n int) string {
	return fmt.Sprintf("trap 'exit %d' %d; echo ready; while :; do sleep 1000 & wait $!; done", 100+n, n)
}

// signals is a choice of the API's signals with the kernel's numbers.
var signals = map[cri.Signal]int{
	cri.Signal_SIGNAL_SIGHUP: 1, cri.Signal_SIGNAL_SIGQUIT: 3, cri.Signal_SIGNAL_SIGUSR1: 10, cri.Signal_SIGNAL_SIGTERM: 15, cri.Signal_SIGNAL_SIGWINCH: 28,
	cri.Signal_SIGNAL_SIGPWR: 30, cri.Signal_SIGNAL_SIGRTMIN: 34, cri.Signal_SIGNAL_SIGRTMINPLUS3: 37, cri.Signal_SIGNAL_SIGRTMINPLUS15: 49,
	cri.Signal_SIGNAL_SIGRTMAXMINUS14: 50, cri.Signal_SIGNAL_SIGRTMAXMINUS1: 63, cri.Signal_SIGNAL_SIGRTMAX: 64,
}

// aliases are second names of a signal.
var aliases = map[cri.Signal]cri.Signal{
	cri.Signal_SIGNAL_SIGCLD: cri.Signal_SIGNAL_SIGCHLD, cri.Signal_SIGNAL_SIGIOT: cri.Signal_SIGNAL_SIGABRT,
	cri.Signal_SIGNAL_SIGPOLL: cri.Signal_SIGNAL_SIGIO,
}

// TestCTR_15_StopSignal: each signal of the choice arrives, and each there is
// is understood.
func TestCTR_15_StopSignal(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	for sig, n := range signals {
		c := b.script(strings.ToLower("sig"+strings.TrimPrefix(sig.String(), "SIGNAL_SIG")), untilSignal(n))
		c.StopSignal = sig
		id := b.run(c)
		b.logged(id, "ready")
		b.stop(id, 20)
		if s := b.exited(id); s.ExitCode != int32(100+n) {
			t.Errorf("stopped with %s it exits with %d", sig, s.ExitCode)
		}
	}
	c := b.sleeper("sigkill")
	c.StopSignal = cri.Signal_SIGNAL_SIGKILL
	id := b.run(c)
	b.stop(id, 20)
	if s := b.exited(id); s.ExitCode != 137 {
		t.Errorf("stopped with SIGKILL it exits with %d", s.ExitCode)
	}
	for n, name := range cri.Signal_name {
		if n == 0 {
			continue
		}
		c := b.sleeper("all-" + strings.ToLower(name))
		c.StopSignal = cri.Signal(n)
		want := cri.Signal(n)
		if same, ok := aliases[want]; ok {
			want = same
		}
		if got := b.status(b.mustCreate(c)).StopSignal; got != want {
			t.Errorf("stop signal %s is reported as %s", name, got)
		}
	}
}

func TestCTR_16_StatusStopSignal(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	ref := image(t, b.Daemon, images.Spec{StopSignal: "SIGUSR2"})
	rt := image(t, b.Daemon, images.Spec{StopSignal: "RTMIN+3"})
	number := image(t, b.Daemon, images.Spec{StopSignal: "1"})
	for name, row := range map[string]struct {
		image     string
		asked     cri.Signal
		effective cri.Signal
	}{
		"default":    {b.image, cri.Signal_SIGNAL_RUNTIME_DEFAULT, cri.Signal_SIGNAL_SIGTERM},
		"image":      {ref, cri.Signal_SIGNAL_RUNTIME_DEFAULT, cri.Signal_SIGNAL_SIGUSR2},
		"real-time":  {rt, cri.Signal_SIGNAL_RUNTIME_DEFAULT, cri.Signal_SIGNAL_SIGRTMINPLUS3},
		"number":     {number, cri.Signal_SIGNAL_RUNTIME_DEFAULT, cri.Signal_SIGNAL_SIGHUP},
		"request":    {b.image, cri.Signal_SIGNAL_SIGINT, cri.Signal_SIGNAL_SIGINT},
		"over-image": {ref, cri.Signal_SIGNAL_SIGHUP, cri.Signal_SIGNAL_SIGHUP},
	} {
		c := daemon.ContainerConfig(name, row.image)
		c.StopSignal = row.asked
		id := b.mustCreate(c)
		if got := b.status(id).StopSignal; got != row.effective {
			t.Errorf("%s: stop signal %s, want %s", name, got, row.effective)
		}
		if name != "image" {
			continue
		}
		c = daemon.ContainerConfig("effect", row.image, "sh", "-c", untilSignal(12))
		id = b.run(c)
		b.logged(id, "ready")
		b.stop(id, 20)
		if s := b.exited(id); s.ExitCode != 112 {
			t.Errorf("stopped with the image's signal it exits with %d", s.ExitCode)
		}
	}
}

// TestCTR_17_StateMachine: states and times through a life, and the same after
// the daemon was killed and has read its records.
func TestCTR_17_StateMachine(t *testing.T) {
	b := newBox(t)
	before := time.Now()
	created := b.mustCreate(b.sleeper("created"))
	running := b.run(b.sleeper("running"))
	ended := b.run(b.script("ended", "sleep 0.3; exit 3"))
	b.exited(ended)
	want := map[string]cri.ContainerState{
		created: cri.ContainerState_CONTAINER_CREATED, running: cri.ContainerState_CONTAINER_RUNNING, ended: cri.ContainerState_CONTAINER_EXITED,
	}
	check := func(when string) map[string]*cri.ContainerStatus {
		t.Helper()
		all := map[string]*cri.ContainerStatus{}
		for id, state := range want {
			s := b.status(id)
			all[id] = s
			if s.State != state {
				t.Errorf("%s: %s is %s", when, s.Metadata.Name, s.State)
			}
			times := []int64{before.UnixNano(), s.CreatedAt, s.StartedAt, s.FinishedAt, time.Now().UnixNano()}
			if state != cri.ContainerState_CONTAINER_EXITED {
				times[3] = times[4]
			}
			if state == cri.ContainerState_CONTAINER_CREATED {
				times[2] = times[4]
			}
			if !slices.IsSorted(times) {
				t.Errorf("%s: times of %s are not in order: %v", when, s.Metadata.Name, times)
			}
		}
		if c := all[created]; c.StartedAt != 0 || c.FinishedAt != 0 {
			t.Errorf("%s: a created container started at %d, finished at %d", when, c.StartedAt, c.FinishedAt)
		}
		if r := all[running]; r.FinishedAt != 0 || r.StartedAt == 0 {
			t.Errorf("%s: a running container started at %d, finished at %d", when, r.StartedAt, r.FinishedAt)
		}
		return all
	}
	first := check("before")
	b.Kill()
	b.Up()
	second := check("after kill -9")
	for id, s := range first {
		if a, b := s.String(), second[id].String(); a != b {
			t.Errorf("status before the kill:\n%s\nafter:\n%s", a, b)
		}
	}
	if err := b.start(created); err != nil {
		t.Fatalf("start what was created before the kill: %v", err)
	}
	want[created] = cri.ContainerState_CONTAINER_RUNNING
	b.stop(running, 10)
	want[running] = cri.ContainerState_CONTAINER_EXITED
	if s := b.status(running); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 0 {
		t.Errorf("stopped after the kill: %s, exit code %d", s.State, s.ExitCode)
	}
	if s := b.status(created); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("started after the kill: %s", s.State)
	}
	if err := b.start(ended); err == nil {
		t.Error("an exited container was started again")
	}
}

func TestCTR_18_ExitCodes(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	oom := b.script("oom", "tail /dev/zero")
	oom.Linux.Resources.MemoryLimitInBytes = 16 << 20
	for name, row := range map[string]struct {
		config *cri.ContainerConfig
		kill   bool
		code   int32
		reason string
	}{
		"zero":   {b.script("zero", "exit 0"), false, 0, "Completed"},
		"one":    {b.script("one", "exit 1"), false, 1, "Error"},
		"big":    {b.script("big", "exit 255"), false, 255, "Error"},
		"killed": {b.sleeper("killed"), true, 137, "Error"},
		"oom":    {oom, false, 137, "OOMKilled"},
	} {
		id := b.run(row.config)
		if row.kill {
			b.stop(id, 0)
		}
		if s := b.exited(id); s.ExitCode != row.code || s.Reason != row.reason {
			t.Errorf("%s: exit code %d, reason %q (%s), want %d, %q", name, s.ExitCode, s.Reason, s.Message, row.code, row.reason)
		}
	}
	id := b.mustCreate(daemon.ContainerConfig("missing", b.image, "/no/such/program"))
	err := b.start(id)
	if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("start of a missing program: %v", err)
	}
	s := b.status(id)
	if s.State != cri.ContainerState_CONTAINER_EXITED || s.Reason != "StartError" || s.ExitCode != 128 || !strings.Contains(s.Message, "/no/such/program") {
		t.Errorf("after a failed start: %s, exit code %d, reason %q, message %q", s.State, s.ExitCode, s.Reason, s.Message)
	}
}

// TestCTR_20_ImageID: one identifier, wherever an image is named.
func TestCTR_20_ImageID(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := mustPull(t, b.Daemon, b.image)
	cid := b.mustCreate(b.sleeper("app"))
	img, err := b.Images().ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: b.image}})
	if err != nil {
		t.Fatal(err)
	}
	list, err := b.Runtime().ListContainers(t.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{Id: cid}})
	if err != nil || len(list.Containers) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	config, err := images.MustBuild(images.Spec{}).ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	for where, got := range map[string]string{
		"config digest": config.String(), "Image.id": img.Image.Id,
		"Container.image_id": list.Containers[0].ImageId, "ContainerStatus.image_id": b.status(cid).ImageId,
	} {
		if got != id {
			t.Errorf("%s is %q, PullImage said %q", where, got, id)
		}
	}
}

// TestCTR_21_ImageRef: the reference of the image that the container was made
// from stays what it was when the tag moves.
func TestCTR_21_ImageRef(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	first := images.MustBuild(images.Spec{Env: []string{"V=1"}})
	ref := pulledImage(t, b.Daemon, "moving:1", first)
	digest, err := first.Digest()
	if err != nil {
		t.Fatal(err)
	}
	id := b.run(daemon.ContainerConfig("app", ref))
	before := b.status(id)
	if want := strings.TrimSuffix(ref, ":1") + "@" + digest.String(); before.ImageRef != want {
		t.Errorf("image_ref is %q, want %q", before.ImageRef, want)
	}
	if before.Image.Image != ref {
		t.Errorf("image is %q, want %q", before.Image.Image, ref)
	}
	second := images.MustBuild(images.Spec{Env: []string{"V=2"}})
	if newID := mustPull(t, b.Daemon, push(t, "moving:1", second)); newID == before.ImageId {
		t.Fatal("the tag did not move")
	}
	after := b.status(id)
	if after.ImageRef != before.ImageRef || after.ImageId != before.ImageId {
		t.Errorf("after the tag moved: image_ref %q and image_id %q, before %q and %q", after.ImageRef, after.ImageId, before.ImageRef, before.ImageId)
	}
	if got := sh(b.Daemon, b.run(daemon.ContainerConfig("new", ref)), "echo $V"); got != "2" {
		t.Errorf("a container of the moved tag has V=%q", got)
	}
}

func TestCTR_24_User(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	for name, row := range map[string]struct {
		user, group *cri.Int64Value
		username    string
		groups      []int64
		policy      cri.SupplementalGroupsPolicy
	}{
		"root":   {},
		"number": {user: &cri.Int64Value{Value: images.AliceUID}},
		"name":   {username: images.Alice, groups: []int64{5000}},
		"group":  {user: &cri.Int64Value{Value: images.AliceUID}, group: &cri.Int64Value{Value: 77}, groups: []int64{6000, 5000}},
		"strict": {user: &cri.Int64Value{Value: images.AliceUID}, groups: []int64{5000}, policy: cri.SupplementalGroupsPolicy_Strict},
	} {
		c := b.script(name, "exec sleep 1000")
		sc := c.Linux.SecurityContext
		sc.RunAsUser, sc.RunAsUsername, sc.RunAsGroup, sc.SupplementalGroups, sc.SupplementalGroupsPolicy =
			row.user, row.username, row.group, row.groups, row.policy
		id := b.run(c)
		u := b.status(id).User.GetLinux()
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.begun(id)))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := fmt.Sprint(u.GetUid()), strings.Fields(field(t, string(text), "Uid:"))[0]; got != want {
			t.Errorf("%s: status says uid %s, the process has %s", name, got, want)
		}
		if got, want := fmt.Sprint(u.GetGid()), strings.Fields(field(t, string(text), "Gid:"))[0]; got != want {
			t.Errorf("%s: status says gid %s, the process has %s", name, got, want)
		}
		var got []string
		for _, g := range u.GetSupplementalGroups() {
			got = append(got, fmt.Sprint(g))
		}
		want := strings.Fields(field(t, string(text), "Groups:"))
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: status says groups %q, the process has %q", name, got, want)
		}
	}
}

// TestCTR_29_CrashLoop: the same container again and again, as the kubelet does
// it: the last one is kept until the next has ended.
func TestCTR_29_CrashLoop(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	last := ""
	for attempt := range uint32(50) {
		c := b.script("crash", fmt.Sprintf("echo attempt %d; exit 1", attempt))
		c.Metadata.Attempt = attempt
		c.LogPath = fmt.Sprintf("crash/%d.log", attempt)
		if err := os.MkdirAll(b.config.LogDirectory+"/crash", 0o755); err != nil {
			t.Fatal(err)
		}
		id := b.run(c)
		s := b.exited(id)
		if got := logText(t, s.LogPath, "stdout"); s.ExitCode != 1 || got != fmt.Sprintf("attempt %d\n", attempt) {
			t.Fatalf("attempt %d: exit code %d, log %q", attempt, s.ExitCode, got)
		}
		if last != "" {
			b.remove(last)
		}
		last = id
	}
	list, err := b.Runtime().ListContainers(t.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: b.pod}})
	if err != nil || len(list.Containers) != 1 || list.Containers[0].Id != last {
		t.Errorf("left are %v, %v", list, err)
	}
}

// TestCTR_30_Concurrent: containers of one pod do not wait for or disturb one
// another.
func TestCTR_30_Concurrent(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			if err := b.lifeOf(fmt.Sprint("c", i)); err != nil {
				t.Errorf("container %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	list, err := b.Runtime().ListContainers(t.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: b.pod}})
	if err != nil || len(list.Containers) != 0 {
		t.Errorf("left are %v, %v", list, err)
	}
}

// lifeOf takes a container through its life.
func (b *box) lifeOf(name string) error {
	ctx := context.Background()
	id, err := b.StartContainer(ctx, b.pod, b.config, b.script(name, "trap 'exit 0' TERM; touch /tmp/ready; while :; do sleep 1000 & wait $!; done"))
	if err != nil {
		return err
	}
	out, err := b.Runtime().ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", "until [ -e /tmp/ready ]; do sleep 0.05; done; hostname"}, Timeout: 60})
	if err != nil || string(out.Stdout) != "pod-host\n" {
		return fmt.Errorf("exec: %v, %w", out, err)
	}
	if err := stopContainer(b.Daemon, id, 30); err != nil {
		return err
	}
	s, err := b.Runtime().ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
	if err != nil || s.Status.State != cri.ContainerState_CONTAINER_EXITED || s.Status.ExitCode != 0 {
		return fmt.Errorf("after stop: %v, %w", s, err)
	}
	return removeContainer(b.Daemon, id)
}

// TestRefusedRequests: what the CRI cannot ask for yet is refused by name.
func TestRefusedRequests(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	for field, edit := range map[string]func(*cri.ContainerConfig){
		"windows": func(c *cri.ContainerConfig) { c.Windows = &cri.WindowsContainerConfig{} },
	} {
		c := b.sleeper(strings.ToLower(strings.ReplaceAll(field, "_", "-")))
		edit(c)
		b.refused(c, codes.Unimplemented, field)
	}
}
