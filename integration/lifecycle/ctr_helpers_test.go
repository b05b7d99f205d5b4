package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// ample is what anything may take that is not measured.
var ample = daemon.Patience(45 * time.Second)

// push puts an image into the package's registry.
func push(t *testing.T, nameTag string, img v1.Image) string {
	t.Helper()
	fixtures.mu.Lock()
	defer fixtures.mu.Unlock()
	if fixtures.registry == nil {
		fixtures.registry = images.NewRegistry()
	}
	return fixtures.registry.Push(t, nameTag, img)
}

// box is a pod with what a test does in it.
type box struct {
	*daemon.Daemon
	t      *testing.T
	pod    string
	config *cri.PodSandboxConfig
	image  string // of containers that ask for no other
}

// newBox runs a pod on the shared daemon.
func newBox(t *testing.T, edits ...func(*cri.PodSandboxConfig)) *box {
	t.Helper()
	return newBoxOn(t, shared(t), edits...)
}

func newBoxOn(t *testing.T, d *daemon.Daemon, edits ...func(*cri.PodSandboxConfig)) *box {
	t.Helper()
	return boxWith(t, d, "", edits...)
}

// pausedBox is newBoxOn for a pod with a pause process.
func pausedBox(t *testing.T, d *daemon.Daemon, edits ...func(*cri.PodSandboxConfig)) *box {
	t.Helper()
	return boxWith(t, d, pausing, edits...)
}

func boxWith(t *testing.T, d *daemon.Daemon, handler string, edits ...func(*cri.PodSandboxConfig)) *box {
	t.Helper()
	name := strings.ToLower(strings.NewReplacer("_", "-", "/", "-", "Test", "").Replace(t.Name()))
	b := &box{Daemon: d, t: t, image: plain(t, d)}
	p := runPodWith(d, handler, name, append([]func(*cri.PodSandboxConfig){func(c *cri.PodSandboxConfig) { c.Hostname = "pod-host" }}, edits...)...)
	b.pod, b.config = p.id, p.config
	return b
}

// pulledImage pushes an image to the package's registry and pulls it.
func pulledImage(t *testing.T, d *daemon.Daemon, nameTag string, img v1.Image) string {
	t.Helper()
	ref := push(t, nameTag, img)
	mustPull(t, d, ref)
	return ref
}

// mustPull pulls and returns the image's ID.
func mustPull(t *testing.T, d *daemon.Daemon, ref string) string {
	t.Helper()
	resp, err := d.Images().PullImage(context.Background(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatalf("pull %s: %v", ref, err)
	}
	return resp.ImageRef
}

// script is a container that runs shell commands in the plain image.
func (b *box) script(name, text string) *cri.ContainerConfig {
	return daemon.ContainerConfig(name, b.image, "sh", "-c", text)
}

// sleeper is a container that runs until it is stopped.
func (b *box) sleeper(name string) *cri.ContainerConfig {
	return daemon.ContainerConfig(name, b.image)
}

func (b *box) create(c *cri.ContainerConfig) (string, error) {
	resp, err := b.Runtime().CreateContainer(context.Background(), &cri.CreateContainerRequest{
		PodSandboxId: b.pod, Config: c, SandboxConfig: b.config,
	})
	return resp.GetContainerId(), err
}

func (b *box) mustCreate(c *cri.ContainerConfig) string {
	b.t.Helper()
	id, err := b.create(c)
	if err != nil {
		b.t.Fatalf("create container %s: %v", c.Metadata.Name, err)
	}
	return id
}

func (b *box) start(id string) error {
	_, err := b.Runtime().StartContainer(context.Background(), &cri.StartContainerRequest{ContainerId: id})
	return err
}

func (b *box) stop(id string, timeout int64) {
	b.t.Helper()
	if err := stopContainer(b.Daemon, id, timeout); err != nil {
		b.t.Fatalf("stop container: %v", err)
	}
}

func (b *box) remove(id string) {
	b.t.Helper()
	if err := removeContainer(b.Daemon, id); err != nil {
		b.t.Fatalf("remove container: %v", err)
	}
}

// run creates and starts a container.
func (b *box) run(c *cri.ContainerConfig) string {
	b.t.Helper()
	return b.RunContainer(b.pod, b.config, c)
}

func (b *box) status(id string) *cri.ContainerStatus {
	b.t.Helper()
	return containerStatus(b.t, b.Daemon, id)
}

// pid is the process of a running container, on the host.
func (b *box) pid(id string) int {
	b.t.Helper()
	return pidOf(b.t, b.Daemon, id)
}

// exited waits for the container's end.
func (b *box) exited(id string) *cri.ContainerStatus {
	b.t.Helper()
	return waitExited(b.t, b.Daemon, id)
}

// output runs a container to its end, which must be a success, and returns what
// it wrote to stdout.
func (b *box) output(c *cri.ContainerConfig) string {
	b.t.Helper()
	id := b.run(c)
	s := b.exited(id)
	out := logText(b.t, s.LogPath, "stdout")
	if s.ExitCode != 0 {
		b.t.Fatalf("container %s: exit %d: %s%s", c.Metadata.Name, s.ExitCode, out, logText(b.t, s.LogPath, "stderr"))
	}
	return out
}

// refused wants the creation of a container to fail with this code and with
// every one of the words, and nothing to be left of it.
func (b *box) refused(c *cri.ContainerConfig, code codes.Code, words ...string) {
	b.t.Helper()
	_, err := b.create(c)
	wantError(b.t, err, code, words...)
	list, err := b.Runtime().ListContainers(context.Background(), &cri.ListContainersRequest{
		Filter: &cri.ContainerFilter{PodSandboxId: b.pod, LabelSelector: c.Labels},
	})
	if err != nil || len(list.Containers) != 0 {
		b.t.Errorf("after a refused creation there are %v, %v", list, err)
	}
}

// entry is one line of a log file.
type entry struct {
	at      time.Time
	stream  string
	partial bool
	text    string
}

var logLine = regexp.MustCompile(`^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(?:Z|[+-]\d\d:\d\d)) (stdout|stderr) ([FP]) ?`)

// readLog reads a log file without tolerance.
func readLog(t *testing.T, path string) []entry {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := parseLog(string(text))
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return entries
}

func parseLog(text string) ([]entry, error) {
	var out []entry
	for line := range strings.Lines(text) {
		body, whole := strings.CutSuffix(line, "\n")
		m := logLine.FindStringSubmatch(body)
		if m == nil || !whole {
			return out, fmt.Errorf("line %d is malformed: %.200q", len(out)+1, line)
		}
		at, err := time.Parse(time.RFC3339Nano, m[1])
		if err != nil {
			return out, fmt.Errorf("line %d: %w", len(out)+1, err)
		}
		out = append(out, entry{at: at, stream: m[2], partial: m[3] == "P", text: body[len(m[0]):]})
	}
	return out, nil
}

// logText is what a container wrote to a stream, put together again.
func logText(t *testing.T, path, stream string) string {
	t.Helper()
	return joinLog(readLog(t, path), stream)
}

func joinLog(entries []entry, stream string) string {
	var out strings.Builder
	for _, e := range entries {
		if e.stream != stream {
			continue
		}
		out.WriteString(e.text)
		if !e.partial {
			out.WriteByte('\n')
		}
	}
	return out.String()
}

// logged waits until the log holds the text.
func (b *box) logged(id, text string) {
	b.t.Helper()
	path := b.status(id).LogPath
	eventually(b.t, ample, func() error {
		file, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if !strings.Contains(string(file), text) {
			return fmt.Errorf("the log has %d bytes", len(file))
		}
		return nil
	})
}

// field is the value after a name at the beginning of a line, as in
// /proc/PID/status.
func field(t *testing.T, text, name string) string {
	t.Helper()
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, name); ok {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("no %q in:\n%s", name, text)
	return ""
}

// statusNumber is the number of a line that the kernel has of a process in status.
func statusNumber(t *testing.T, pid int, name string) (n int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(field(t, string(text), name+":"), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// drain collects what the messages of a stream hold, to its end.
func drain[M, V any](t *testing.T, recv func() (M, error), values func(M) []V) []V {
	t.Helper()
	var all []V
	for {
		m, err := recv()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, values(m)...)
	}
}

// begun waits until the container's own program runs, and returns its process.
func (b *box) begun(id string) int {
	b.t.Helper()
	pid := b.pid(id)
	begun(b.t, pid)
	return pid
}
