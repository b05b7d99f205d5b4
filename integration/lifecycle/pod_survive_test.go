package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// waiting is a container that exits with a code as soon as the test makes the
// file it looks for.
type waiting struct {
	id, file string
	pid      int
}

func (p pod) wait(t *testing.T, d *daemon.Daemon, code int) waiting {
	t.Helper()
	return p.waitThen(t, d, fmt.Sprint("exits-", code), fmt.Sprint("exit ", code))
}

// waitThen is a container that does something else than exit when the file is there.
func (p pod) waitThen(t *testing.T, d *daemon.Daemon, name, then string, edits ...func(*cri.ContainerConfig)) (w waiting) {
	t.Helper()
	dir := t.TempDir()
	w.file = filepath.Join(dir, "go")
	config := daemon.ContainerConfig(name, plain(t, d), "sh", "-c", "while [ ! -e /ctl/go ]; do sleep 0.05; done; "+then)
	for _, edit := range edits {
		edit(config)
	}
	config.Mounts = []*cri.Mount{{ContainerPath: "/ctl", HostPath: dir, Readonly: true}}
	w.id = p.run(d, config)
	w.pid = pidOf(t, d, w.id)
	return w
}

// exit makes the container exit and waits for its end.
func (w waiting) exit(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(w.file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	waitGone(t, w.pid)
}

// TestLIF_01_Restart: pods run on while the daemon is down, and what ended
// meanwhile is known afterwards with its code.
func TestLIF_01_Restart(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*daemon.Daemon){"stopped": (*daemon.Daemon).Stop, "killed": (*daemon.Daemon).Kill} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := start(t)
			var pods []pod
			var left []waiting
			var steady []string
			pids := map[string]int{}
			for i := range 4 {
				p := runPod(d, fmt.Sprint("stays", i))
				left = append(left, p.wait(t, d, i))
				ctr := p.run(d, daemon.ContainerConfig("steady", plain(t, d)))
				pods, steady, pids[ctr] = append(pods, p), append(steady, ctr), pidOf(t, d, ctr)
			}
			dead := runPaused(d, "dies") // the pod itself ends meanwhile
			pause := pidOf(t, d, dead.id)
			down := time.Now()
			end(d)
			for _, w := range left {
				w.exit(t)
			}
			kill(t, pause)
			waitGone(t, pause)
			up := time.Now()
			d.Up()

			samePodsListed(t, d, append(pods, dead))
			for i, w := range left {
				s := waitExited(t, d, w.id)
				at := time.Unix(0, s.FinishedAt)
				if s.ExitCode != int32(i) || at.Before(down.Add(-time.Second)) || at.After(up.Add(time.Second)) {
					t.Errorf("%s: code %d at %v, the daemon was down from %v to %v", s.Metadata.Name, s.ExitCode, at, down, up)
				}
			}
			for _, ctr := range steady {
				if s := containerStatus(t, d, ctr); s.State != cri.ContainerState_CONTAINER_RUNNING || pidOf(t, d, ctr) != pids[ctr] {
					t.Errorf("the steady container is %s", s.State)
				}
				if got := sh(d, ctr, "echo here"); got != "here" {
					t.Errorf("exec gives %q", got)
				}
				if err := stopContainer(d, ctr, 0); err != nil {
					t.Error(err)
				}
				if s := waitExited(t, d, ctr); s.ExitCode != 137 {
					t.Errorf("stopped after the restart with code %d", s.ExitCode)
				}
			}
			eventually(t, soon, func() error {
				if s := podStatus(t, d, dead.id); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
					return fmt.Errorf("the pod that died is %s", s.State)
				}
				return nil
			})
			runPod(d, "afterwards")
		})
	}
}

func samePodsListed(t *testing.T, d *daemon.Daemon, pods []pod) {
	t.Helper()
	list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	samePods(t, "pods", list.Items, pods)
}

func kill(t *testing.T, pid int) {
	t.Helper()
	p, err := os.FindProcess(pid)
	if err == nil {
		err = p.Kill()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestLIF_03_DamagedState: what cannot be read of one pod is that pod's
// trouble.
func TestLIF_03_DamagedState(t *testing.T) {
	t.Parallel()
	d := start(t)
	good, bad, torn := runPod(d, "good"), runPaused(d, "bad"), runPod(d, "torn")
	ctr := good.run(d, daemon.ContainerConfig("main", plain(t, d)))
	ip, pin := ipOf(t, d, bad), pinOf(t, d, bad.id)
	d.Stop()
	mend := damage(t, d, bad.id)
	emptied := emptyFilesOf(t, d, torn.id)
	d.Up()
	eventually(t, soon, func() error { // then leftovers of networks are released
		if strings.Count(d.Tail(10000), "every pod and container has been looked at") < 2 {
			return errors.New("the recovery is not over")
		}
		return nil
	})

	list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	samePods(t, "pods", list.Items, []pod{good, torn})
	if got := sh(d, ctr, "echo here"); got != "here" {
		t.Errorf("exec in the good pod gives %q", got)
	}
	if !strings.Contains(d.Tail(500), bad.id) {
		t.Error("the log does not name the damaged pod")
	}
	next := runPod(d, "next")
	if err := errors.Join(removePod(d, next.id), removePod(d, good.id)); err != nil {
		t.Error(err)
	}
	t.Logf("emptied %q", emptied)
	if err := removePod(d, torn.id); err != nil {
		t.Errorf("remove the pod whose files are empty: %v", err)
	}
	if !exists(ipamFile(d, ip)) || !slices.Contains(netnsMounts(t, d), pin) {
		t.Error("the network of the pod that cannot be read was given back")
	}
	if err := pingAs(0, pin, gateway(d)); err != nil {
		t.Errorf("the pod that cannot be read runs and reaches nobody: %v", err)
	}

	// Whoever has a copy can put it back.
	d.Stop()
	mend()
	d.Up()
	samePodList(t, d, bad.id)
	if err := removePod(d, bad.id); err != nil {
		t.Error(err)
	}
	nothingLeft(t, d)
}

// damage overwrites the records of a pod in containerd's database with rubbish
// of the same length. The returned function puts them back.
func damage(t *testing.T, d *daemon.Daemon, id string) (mend func()) {
	t.Helper()
	saved := map[string][]byte{}
	edit := func(change func(b *bolt.Bucket, key, value []byte) error) {
		t.Helper()
		db, err := bolt.Open(filepath.Join(d.Root, "io.containerd.metadata.v1.bolt", "meta.db"), 0o600, &bolt.Options{Timeout: soon})
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		err = db.Update(func(tx *bolt.Tx) error {
			b := tx.Bucket([]byte("v1"))
			for _, name := range []string{daemon.Namespace, "sandboxes", id, "extensions"} {
				if b = b.Bucket([]byte(name)); b == nil {
					return fmt.Errorf("no %s in the database", name)
				}
			}
			return b.ForEach(func(k, v []byte) error { return change(b, k, v) })
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	edit(func(b *bolt.Bucket, k, v []byte) error {
		saved[string(k)] = append([]byte{}, v...)
		return b.Put(k, []byte(strings.Repeat("{", len(v))))
	})
	if len(saved) == 0 {
		t.Fatal("the pod has no records")
	}
	return func() {
		edit(func(b *bolt.Bucket, k, _ []byte) error { return b.Put(k, saved[string(k)]) })
	}
}

// emptyFilesOf empties every regular file below the daemon's directories whose
// own or directory's name has the pod's ID, and returns their names. What is
// mounted is left alone, and so is the state of shim and OCI runtime.
func emptyFilesOf(t *testing.T, d *daemon.Daemon, id string) (emptied []string) {
	t.Helper()
	for _, dir := range []string{filepath.Join(d.Root, daemon.CRIPlugin), filepath.Join(d.State, daemon.CRIPlugin)} {
		err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
			if err != nil || !strings.Contains(path, id) || !info.Mode().IsRegular() || strings.Contains(path, "/netns/") {
				return err
			}
			emptied = append(emptied, strings.TrimPrefix(path, d.Dir))
			return os.Truncate(path, 0)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(emptied) == 0 {
		t.Fatal("no file to empty")
	}
	return emptied
}

// TestLIF_10_Cancellation: a client that goes away at any moment finds the pod
// made, or not made, when it comes back.
func TestLIF_10_Cancellation(t *testing.T) {
	t.Parallel()
	d := start(t)
	img := plain(t, d)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	impatient := func(call func(context.Context) error) error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(random.Int64N(int64(200*time.Millisecond))))
		defer cancel()
		err := call(ctx)
		if code := status.Code(err); err != nil && code != codes.DeadlineExceeded && code != codes.Canceled {
			t.Errorf("given up with %v", err)
		}
		return call(t.Context())
	}
	for i := range 8 {
		config := d.PodConfig(fmt.Sprint("fickle", i))
		p := pod{config: config}
		var ctr string
		for name, call := range []func(context.Context) error{
			func(ctx context.Context) (err error) {
				p.id, err = d.StartPod(ctx, config, "")
				return err
			},
			func(ctx context.Context) error {
				resp, err := d.Runtime().CreateContainer(ctx, &cri.CreateContainerRequest{
					PodSandboxId: p.id, SandboxConfig: config, Config: daemon.ContainerConfig("main", img)})
				ctr = resp.GetContainerId()
				return err
			},
			func(ctx context.Context) error {
				_, err := d.Runtime().StartContainer(ctx, &cri.StartContainerRequest{ContainerId: ctr})
				return err
			},
		} {
			if err := impatient(call); err != nil {
				t.Fatalf("pod %d, step %d: %v", i, name, err)
			}
		}
		samePodList(t, d, p.id)
		if s := containerStatus(t, d, ctr); s.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("the container is %s", s.State)
		}
		if i%2 == 0 {
			if err := impatient(func(ctx context.Context) error {
				_, err := d.Runtime().StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id})
				return err
			}); err != nil {
				t.Fatal(err)
			}
		}
		if err := impatient(func(ctx context.Context) error {
			_, err := d.Runtime().RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		samePodList(t, d)
	}
	nothingLeft(t, d)
}
