package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

const (
	createdEvent = cri.ContainerEventType_CONTAINER_CREATED_EVENT
	startedEvent = cri.ContainerEventType_CONTAINER_STARTED_EVENT
	stoppedEvent = cri.ContainerEventType_CONTAINER_STOPPED_EVENT
	deletedEvent = cri.ContainerEventType_CONTAINER_DELETED_EVENT
)

// aLife is what is told of a pod or container that runs.
var aLife = []cri.ContainerEventType{createdEvent, startedEvent, stoppedEvent, deletedEvent}

// openEvents subscribes. What happens after its return is told.
func openEvents(t *testing.T, d *daemon.Daemon) grpc.ServerStreamingClient[cri.ContainerEventResponse] {
	t.Helper()
	oursAlone(t, "answer before the first event")
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour) // a call without has a short one
	t.Cleanup(cancel)
	stream, err := d.Runtime().GetContainerEvents(ctx, &cri.GetEventsRequest{})
	if err == nil {
		_, err = stream.Header()
	}
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// eventLog is what a subscriber has heard of the pods of one namespace.
type eventLog struct {
	mu  sync.Mutex
	all []*cri.ContainerEventResponse
	err error
}

// logEvents subscribes and reads all the time.
func logEvents(t *testing.T, d *daemon.Daemon, namespace string) *eventLog {
	t.Helper()
	stream, l := openEvents(t, d), &eventLog{}
	go func() {
		for {
			e, err := stream.Recv()
			l.mu.Lock()
			if err != nil {
				l.err = err
				l.mu.Unlock()
				return
			}
			if e.PodSandboxStatus.GetMetadata().GetNamespace() == namespace {
				l.all = append(l.all, e)
			}
			l.mu.Unlock()
		}
	}()
	return l
}

func (l *eventLog) of(id string) (found []*cri.ContainerEventResponse) {
	for _, e := range l.list() {
		if e.ContainerId == id {
			found = append(found, e)
		}
	}
	return found
}

func (l *eventLog) list() []*cri.ContainerEventResponse {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.all)
}

// types waits until as many events of the object have come as are wanted and
// compares them.
func (l *eventLog) types(t *testing.T, id string, want ...cri.ContainerEventType) {
	t.Helper()
	var got []cri.ContainerEventType
	eventually(t, soon, func() error {
		got = nil
		for _, e := range l.of(id) {
			got = append(got, e.ContainerEventType)
		}
		if len(got) < len(want) {
			return fmt.Errorf("events of %s are %v, want %v", id, got, want)
		}
		return nil
	})
	if !slices.Equal(got, want) {
		t.Errorf("events of %s are %v, want %v", id, got, want)
	}
}

// inNamespace gives the pod a namespace of its own.
func inNamespace(name string) func(*cri.PodSandboxConfig) {
	return func(c *cri.PodSandboxConfig) { c.Metadata.Namespace = name }
}

// TestRPC_32_GetContainerEvents: each step of a pod and its containers is told,
// with the statuses as of then.
func TestRPC_32_GetContainerEvents(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, shared(t), inNamespace("rpc-32"))
	l := logEvents(t, b.Daemon, "rpc-32")
	id := b.run(b.script("app", "exit 3"))
	b.exited(id)
	l.types(t, id, createdEvent, startedEvent, stoppedEvent)
	for i, state := range []cri.ContainerState{
		cri.ContainerState_CONTAINER_CREATED, cri.ContainerState_CONTAINER_RUNNING, cri.ContainerState_CONTAINER_EXITED,
	} {
		e := l.of(id)[i]
		if len(e.ContainersStatuses) != 1 || e.ContainersStatuses[0].Id != id || e.ContainersStatuses[0].State != state {
			t.Errorf("%s comes with %v", e.ContainerEventType, e.ContainersStatuses)
		}
		if s := e.PodSandboxStatus; s.Id != b.pod || s.State != cri.PodSandboxState_SANDBOX_READY || s.Network.Ip == "" {
			t.Errorf("%s comes with %v", e.ContainerEventType, s)
		}
		if age := time.Since(time.Unix(0, e.CreatedAt)); age < 0 || age > time.Hour {
			t.Errorf("%s is %s old", e.ContainerEventType, age)
		}
	}
	if c := l.of(id)[2].ContainersStatuses[0]; c.ExitCode != 3 || c.FinishedAt == 0 {
		t.Errorf("the end is told as %v", c)
	}
	bad := b.mustCreate(daemon.ContainerConfig("bad", plain(t, b.Daemon), "/no/such/command"))
	if err := b.start(bad); err == nil {
		t.Error("a command that is not there was started")
	}
	b.remove(bad)
	l.types(t, bad, createdEvent, stoppedEvent, deletedEvent)
	b.remove(id)
	l.types(t, id, createdEvent, startedEvent, stoppedEvent, deletedEvent)
	if s := l.of(id)[3].ContainersStatuses; len(s) != 0 {
		t.Errorf("after it was deleted the pod has %v", s)
	}
	if err := removePod(b.Daemon, b.pod); err != nil {
		t.Fatal(err)
	}
	l.types(t, b.pod, stoppedEvent, deletedEvent)
	if s := l.of(b.pod)[1].PodSandboxStatus; s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("the pod was deleted as %v", s)
	}
	for _, op := range operations(t, b.Daemon) {
		if op.Name == "GetContainerEvents" {
			t.Errorf("a subscription is shown as an operation that hangs: %+v", op)
		}
	}
}

// TestSTA_16_Order: of many pods at once, each is told in its order, and each
// with statuses that fit what is told.
func TestSTA_16_Order(t *testing.T) {
	t.Parallel()
	d := start(t)
	withPause(t, d)
	ref, l := plain(t, d), logEvents(t, d, "sta-16")
	const pods, atOnce = 16, 4
	var wg sync.WaitGroup
	lives := make(chan [2]string, pods)
	for worker := range atOnce {
		wg.Go(func() {
			for n := worker; n < pods; n += atOnce {
				life, err := aPodsLife(d, fmt.Sprint("pod", n), ref)
				if err != nil {
					t.Error(err)
				}
				lives <- life
			}
		})
	}
	wg.Wait()
	close(lives)
	for life := range lives {
		pod, ctr := life[0], life[1]
		l.types(t, pod, aLife...)
		l.types(t, ctr, aLife...)
		var order []string
		for _, e := range l.list() {
			if e.PodSandboxStatus.Id != pod {
				continue
			}
			who := map[string]string{pod: "pod", ctr: "container"}[e.ContainerId]
			order = append(order, who+" "+e.ContainerEventType.String())
			fits(t, e, pod)
		}
		first, last := []string{"pod " + createdEvent.String(), "pod " + startedEvent.String(), "container " + createdEvent.String()}, "pod "+deletedEvent.String()
		if len(order) != 8 || !slices.Equal(order[:3], first) || order[7] != last {
			t.Errorf("the order is %q", order)
		}
	}
}

// aPodsLife runs a pod with one container and removes it. It returns the IDs.
func aPodsLife(d *daemon.Daemon, name, image string) (ids [2]string, err error) {
	config := d.PodConfig(name)
	inNamespace("sta-16")(config)
	hostNetwork(config)
	if ids[0], err = d.StartPod(context.Background(), config, ""); err != nil {
		return ids, err
	}
	p := pod{ids[0], config}
	if ids[1], err = p.create(d, daemon.ContainerConfig("main", image, "true")); err != nil {
		return ids, err
	}
	if _, err := d.Runtime().StartContainer(context.Background(), &cri.StartContainerRequest{ContainerId: ids[1]}); err != nil {
		return ids, err
	}
	return ids, removePod(d, ids[0])
}

// fits checks that the statuses of an event are those of its time.
func fits(t *testing.T, e *cri.ContainerEventResponse, pod string) {
	t.Helper()
	if e.ContainerId == pod {
		ready := e.PodSandboxStatus.State == cri.PodSandboxState_SANDBOX_READY
		if up := e.ContainerEventType == createdEvent || e.ContainerEventType == startedEvent; ready != up {
			t.Errorf("pod %s comes with %s", e.ContainerEventType, e.PodSandboxStatus.State)
		}
		return
	}
	want := map[cri.ContainerEventType][]cri.ContainerState{
		createdEvent: {cri.ContainerState_CONTAINER_CREATED},
		startedEvent: {cri.ContainerState_CONTAINER_RUNNING},
		stoppedEvent: {cri.ContainerState_CONTAINER_EXITED},
		deletedEvent: nil,
	}[e.ContainerEventType]
	var got []cri.ContainerState
	for _, c := range e.ContainersStatuses {
		got = append(got, c.State)
	}
	if !slices.Equal(got, want) {
		t.Errorf("container %s comes with %v", e.ContainerEventType, got)
	}
}

// TestSTA_17_SlowConsumer: a client that reads nothing keeps nobody waiting. What
// it misses is counted, and it is told when it reads again.
func TestSTA_17_SlowConsumer(t *testing.T) {
	t.Parallel()
	metrics := freeAddress(t)
	d := start(t, daemon.Set(metrics, "plugins", "io.containerd.server.v1.metrics", "address"))
	withPause(t, d)
	b := newBoxOn(t, d, inNamespace("sta-17"), func(c *cri.PodSandboxConfig) {
		c.Annotations = map[string]string{"long": strings.Repeat("x", 16<<10)} // little of it fits into buffers on the way
	})
	stuck, l := openEvents(t, d), logEvents(t, d, "sta-17")
	// More than can be on its way to a client that does not read, and more than
	// may wait for it.
	const containers, atOnce = 160, 4
	var wg sync.WaitGroup
	for worker := range atOnce {
		wg.Go(func() {
			for n := worker; n < containers; n += atOnce {
				id, err := b.create(b.sleeper(fmt.Sprint("c", n)))
				if err == nil {
					err = removeContainer(b.Daemon, id)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	eventually(t, soon, func() error {
		if got := len(l.list()); got != 2*containers {
			return fmt.Errorf("the other subscriber has %d events of %d", got, 2*containers)
		}
		return nil
	})
	text := metricsText(t, metrics)
	if strings.Contains(text, "gantry_container_events_dropped_total 0\n") || !strings.Contains(text, "gantry_container_events_dropped_total ") {
		t.Fatal("no dropped event is counted")
	}
	if !strings.Contains(text, "gantry_container_event_subscribers 2\n") {
		t.Error("the subscribers are not counted")
	}
	for {
		if _, err := stuck.Recv(); err != nil {
			wantError(t, err, codes.ResourceExhausted, "missed")
			break
		}
	}
	eventually(t, soon, func() error {
		if !strings.Contains(metricsText(t, metrics), "gantry_container_event_subscribers 1\n") {
			return errors.New("a subscriber that was sent away is still there")
		}
		return nil
	})
}

// freeAddress is one to listen at.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// metricsText is what the daemon tells Prometheus.
func metricsText(t *testing.T, address string) string {
	t.Helper()
	resp, err := http.Get("http://" + address + "/v1/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestSTA_18_ManySubscribers: each gets every event, in the same order for each
// pod.
func TestSTA_18_ManySubscribers(t *testing.T) {
	t.Parallel()
	d := shared(t)
	var logs []*eventLog
	for range 3 {
		logs = append(logs, logEvents(t, d, "sta-18"))
	}
	p := runPod(d, "watched", inNamespace("sta-18"))
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	for _, l := range logs {
		l.types(t, p.id, aLife...)
		l.types(t, ctr, aLife...)
		if got, want := fmt.Sprint(l.list()), fmt.Sprint(logs[0].list()); got != want {
			t.Errorf("one heard %s, another %s", got, want)
		}
	}
}
