package lifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

const (
	// stallFor is how long the plugin or shim hangs: longer than two clients
	// wait. A user's would hang for 30 s; the rest is the same.
	stallFor = 8 * time.Second
	// patience is a client's deadline.
	patience = 3 * time.Second
	// afterStall is what a client may wait once nothing hangs any more.
	afterStall = time.Second
	// listBound holds the 99th percentile of the lists meanwhile. They take
	// less than a millisecond on an idle machine without the race detector.
	listBound = 250 * time.Millisecond
)

// opEntry is a row of the operations table.
type opEntry struct {
	Name, Object, ID, Stage string
	Since, StageSince       time.Time
}

// operations reads the table from its own socket, as gantry ops does.
func operations(t *testing.T, d *daemon.Daemon) (ops []opEntry) {
	t.Helper()
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(d.State, daemon.CRIPlugin, "gantry.sock"))
		},
	}}
	resp, err := client.Get("http://gantry/operations")
	if err != nil {
		t.Errorf("read operations: %v", err)
		return nil
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&ops); err != nil {
		t.Errorf("read operations: %v", err)
	}
	return ops
}

// shown waits until the table has an operation of that name and stage on the
// object and returns it.
func shown(t *testing.T, d *daemon.Daemon, name, object, stage string) (found opEntry) {
	t.Helper()
	eventually(t, patience, func() error {
		ops := operations(t, d)
		i := slices.IndexFunc(ops, func(o opEntry) bool {
			return o.Name == name && strings.Contains(o.Object, object) && strings.Contains(o.Stage, stage)
		})
		if i < 0 {
			return fmt.Errorf("no %s of %s at %q in %+v", name, object, stage, ops)
		}
		found = ops[i]
		return nil
	})
	return found
}

// retried calls again and again, each call with a client's deadline, until one
// succeeds, and checks every error on the way. It returns how many there were.
// On a busy machine the client's own clock can be faster than the answer, which
// comes some 100 ms before the deadline; but not always.
func retried(t *testing.T, stage string, call func(context.Context) error) (failures int) {
	t.Helper()
	answers := 0
	for {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		err := call(ctx)
		cancel()
		if err == nil {
			if failures > 0 && answers == 0 {
				t.Errorf("none of %d clients got an answer", failures)
			}
			return failures
		}
		failures++
		if failures > 5*int(stallFor/patience) {
			t.Fatalf("no end of it: %v", err)
		}
		if strings.Contains(status.Convert(err).Message(), "reserved") {
			t.Errorf("a name is reserved: %v", err)
		}
		if strings.HasSuffix(err.Error(), "desc = "+context.DeadlineExceeded.Error()) {
			continue
		}
		answers++
		wantError(t, err, codes.DeadlineExceeded, stage)
	}
}

// lists measures lists of pods until stop is called, which returns the 99th
// percentile.
func lists(t *testing.T, d *daemon.Daemon) (stop func() time.Duration) {
	ctx, cancel := context.WithCancel(t.Context())
	took := make(chan []time.Duration, 1)
	go func() {
		var all []time.Duration
		tick := time.NewTicker(poll)
		defer tick.Stop()
		for {
			begin := time.Now()
			if _, err := d.Runtime().ListPodSandbox(ctx, &cri.ListPodSandboxRequest{}); err == nil {
				all = append(all, time.Since(begin))
			} else if ctx.Err() == nil {
				t.Errorf("list: %v", err)
			}
			select {
			case <-ctx.Done():
				took <- all
				return
			case <-tick.C:
			}
		}
	}()
	return func() time.Duration {
		cancel()
		all := <-took
		slices.Sort(all)
		if len(all) < 100 {
			t.Errorf("only %d lists", len(all))
			return 0
		}
		return all[len(all)*99/100]
	}
}

// TestPOD_02_RetryJoins: a client that gave up comes back and joins what goes on.
// Until then it is told what hangs, others are not held up, and the plugin is
// called once.
func TestPOD_02_RetryJoins(t *testing.T) {
	oursAlone(t, "joining of a request made twice")
	d := shared(t)
	end := order(t, d, "ADD", "joined", stubOrder{Stall: true})
	config, begin := d.PodConfig("joined"), time.Now()
	ended := make(chan time.Time, 1)
	defer time.AfterFunc(stallFor, func() { ended <- time.Now(); end() }).Stop()
	stop := lists(t, d)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		op := shown(t, d, "run", "test/joined", "attach network")
		if op.ID == "" || op.Since.Before(begin) || op.StageSince.Before(op.Since) {
			t.Errorf("operation is %+v", op)
		}
	}()
	var id string
	failures := retried(t, "attach network", func(ctx context.Context) (err error) {
		id, err = d.StartPod(ctx, config, stubHandler)
		return err
	})
	if late := time.Since(<-ended); late > afterStall {
		t.Errorf("the pod was there %s after nothing hung any more", late)
	}
	<-watched
	if p99 := stop(); p99 > listBound {
		t.Errorf("the 99th percentile of lists meanwhile is %s", p99)
	}
	if want := int(stallFor / patience); failures < want {
		t.Errorf("%d clients gave up, want %d", failures, want)
	}
	if got := commandsOf(stubCalls(t, d, "joined")); got != "ADD" {
		t.Errorf("the plugin was called for %q", got)
	}
	if s := podStatus(t, d, id); s.State != cri.PodSandboxState_SANDBOX_READY || s.Network.Ip+"/24" != stubAddress {
		t.Errorf("status is %v", s)
	}
	if again, err := d.StartPod(t.Context(), config, stubHandler); err != nil || again != id {
		t.Errorf("once more: %q, %v, want %q", again, err, id)
	}
}

// TestPOD_02_RetryAfterCrash: the same when the daemon dies meanwhile.
func TestPOD_02_RetryAfterCrash(t *testing.T) {
	oursAlone(t, "joining of a request made twice")
	t.Parallel()
	d := start(t)
	end := order(t, d, "ADD", "crashed", stubOrder{Stall: true})
	config := d.PodConfig("crashed")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := d.StartPod(ctx, config, stubHandler)
		done <- err
	}()
	eventually(t, soon, func() error { // until the plugin is all that is waited for
		if !slices.ContainsFunc(operations(t, d), func(o opEntry) bool { return o.Stage == "attach network" }) {
			return errors.New("the pod is not made yet but for its network")
		}
		return nil
	})
	d.Kill()
	if err := <-done; err == nil {
		t.Fatal("a dead daemon made a pod")
	}
	d.Up()
	end()
	id, err := d.StartPod(t.Context(), config, stubHandler)
	if err != nil {
		t.Fatal(err)
	}
	samePodList(t, d, id)
	calls := stubCalls(t, d, "crashed")
	if got := commandsOf(calls); !strings.HasPrefix(got, "ADD DEL") || !strings.HasSuffix(got, "DEL ADD") {
		t.Errorf("the plugin was called for %q", got)
	}
	for i, c := range calls {
		if i > 0 && calls[i-1].ID == c.ID && calls[i-1].End.After(c.Begin) {
			t.Errorf("two calls for one pod at once: %+v", calls)
		}
	}
	if err := removePod(d, id); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, d)
}

// samePodList checks that there are these pods and no others.
func samePodList(t *testing.T, d *daemon.Daemon, ids ...string) {
	t.Helper()
	list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var want []pod
	for _, id := range ids {
		want = append(want, pod{id: id})
	}
	samePods(t, "pods", list.Items, want)
}

// TestPOD_02_RetryJoinsStart: the same for a container whose runtime hangs.
func TestPOD_02_RetryJoinsStart(t *testing.T) {
	oursAlone(t, "joining of a request made twice")
	d := shared(t)
	config := d.PodConfig("slow-shim")
	p := pod{d.RunPodWith(config, slowHandler), config}
	ctr, err := p.create(d, daemon.ContainerConfig("main", plain(t, d)))
	if err != nil {
		t.Fatal(err)
	}
	if again, err := p.create(d, daemon.ContainerConfig("main", plain(t, d))); err != nil || again != ctr {
		t.Errorf("the same request gave %q, %v; want %q", again, err, ctr)
	}
	end := stall(t, d, runcCreate)
	ended := make(chan time.Time, 1)
	defer time.AfterFunc(stallFor, func() { ended <- time.Now(); end() }).Stop()
	stop := lists(t, d)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if op := shown(t, d, "start", "container main", "create task"); op.ID != ctr {
			t.Errorf("operation is %+v", op)
		}
	}()
	// It is at "start task" for the last of them where the machine is busy.
	failures := retried(t, ` task"`, func(ctx context.Context) error {
		_, err := d.Runtime().StartContainer(ctx, &cri.StartContainerRequest{ContainerId: ctr})
		return err
	})
	if late := time.Since(<-ended); late > 2*afterStall { // the runtime's work begins only now
		t.Errorf("the container ran %s after nothing hung any more", late)
	}
	<-watched
	if p99 := stop(); p99 > listBound {
		t.Errorf("the 99th percentile of lists meanwhile is %s", p99)
	}
	if calls := wrapped(t, d, runcCreate, ctr); len(calls) != 1 || failures < int(stallFor/patience) {
		t.Errorf("%d clients gave up, created %d times: %q", failures, len(calls), calls)
	}
	if got := sh(d, ctr, "echo runs"); got != "runs" {
		t.Errorf("the container says %q", got)
	}
}

// TestPOD_02_StartAfterCrash: the daemon dies while the runtime makes the
// container, which is nothing that ever ran and may be started once more.
func TestPOD_02_StartAfterCrash(t *testing.T) {
	t.Parallel()
	d := start(t)
	config := d.PodConfig("cut-off")
	p := pod{d.RunPodWith(config, slowHandler), config}
	ctr, err := p.create(d, daemon.ContainerConfig("main", plain(t, d)))
	if err != nil {
		t.Fatal(err)
	}
	end := stall(t, d, runcCreate)
	done := make(chan error, 1)
	go func() {
		_, err := d.Runtime().StartContainer(context.WithoutCancel(t.Context()), &cri.StartContainerRequest{ContainerId: ctr})
		done <- err
	}()
	eventually(t, soon, func() error {
		if len(wrapped(t, d, runcCreate, ctr)) == 0 {
			return errors.New("the runtime does not yet make the container")
		}
		return nil
	})
	d.Kill()
	if err := <-done; err == nil {
		t.Fatal("a dead daemon started a container")
	}
	d.Up()
	if s := containerStatus(t, d, ctr); s.State != cri.ContainerState_CONTAINER_CREATED && s.State != cri.ContainerState_CONTAINER_UNKNOWN {
		t.Errorf("a container that never ran is %s", s.State)
	}
	end()
	if _, err := d.Runtime().StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: ctr}); err != nil {
		t.Fatal(err)
	}
	if got := sh(d, ctr, "echo runs"); got != "runs" {
		t.Errorf("the container says %q", got)
	}
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, d)
}

// TestPOD_02_RetryJoinsPause: the same for a pod whose shim hangs.
func TestPOD_02_RetryJoinsPause(t *testing.T) {
	oursAlone(t, "joining of a request made twice")
	d := shared(t)
	end := stall(t, d, shimStart)
	defer time.AfterFunc(stallFor/2, end).Stop()
	config := d.PodConfig("slow-pause")
	var id string
	failures := retried(t, "start sandbox", func(ctx context.Context) (err error) {
		id, err = d.StartPod(ctx, config, slowHandler)
		return err
	})
	if starts := wrapped(t, d, shimStart, id); len(starts) != 1 || failures < 1 {
		t.Errorf("%d clients gave up, the shim was started %d times: %q", failures, len(starts), starts)
	}
}
