package container_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/container"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/runtime"
	"github.com/gantry-cri/gantry/plugin/runtime/runtimetest"
	"github.com/gantry-cri/gantry/plugin/store"
)

// life creates, starts and removes a container that runs until it is killed.
func life(ctx context.Context, d *daemon) error {
	id, err := d.Create(ctx, d.request("run"))
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	if err := d.Start(ctx, id); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	if err := d.Remove(ctx, id); err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	return nil
}

// Every single effect of a container's life is struck in turn, as in package
// sandbox. Whatever happens, a removal of what is listed leaves nothing.
func TestLifeEveryFault(t *testing.T) {
	var effects []string
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		if err := life(context.Background(), d); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		d.clean()
		effects = w.names
	})
	if len(effects) < 12 {
		t.Fatalf("a life has effects %v", effects)
	}
	for n, name := range effects {
		for _, fault := range []string{"fails", "happens and fails", "crash before", "crash after"} {
			t.Run(fmt.Sprintf("%d %s %s", n, name, fault), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { strikeLife(t, n, fault) })
			})
		}
	}
}

func strikeLife(t *testing.T, at int, fault string) {
	w := newWorld(t)
	d := w.start()
	ctx := context.Background()
	w.strike = func(n int, _ string) (before, after error) {
		if n != at {
			return nil, nil
		}
		switch fault {
		case "fails":
			return errStruck, nil
		case "happens and fails":
			return nil, errStruck
		case "crash before":
			w.crash()
			return errDead, nil
		}
		w.crash()
		return nil, errDead
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	err := life(short, d)
	if strings.HasPrefix(fault, "crash") {
		d.bg.Stop(ctx)
		d = w.start()
		<-d.Recover(ctx)
	}
	time.Sleep(time.Hour) // of the bubble: all that goes on in the background is done
	_ = err               // a fault late in a removal may be repaired before it ends
	for _, c := range d.store.Containers.List() {
		if c.Phase == record.ContainerExited && c.FinishedAt.IsZero() {
			t.Errorf("exited without a time: %+v", c)
		}
		if err := d.Remove(ctx, c.ID); err != nil {
			t.Fatalf("remove: %v", err)
		}
	}
	time.Sleep(time.Hour)
	d.clean()
}

// Exit codes and reasons survive: seen at once, and by the next daemon for
// containers that ended while there was none.
func TestExits(t *testing.T) {
	for _, c := range []struct {
		name   string
		code   uint32
		oom    bool
		reason string
	}{
		{"zero", 0, false, record.ReasonCompleted},
		{"one", 1, false, record.ReasonError},
		{"killed", 137, false, record.ReasonError},
		{"SIGSYS without a filter", 159, false, record.ReasonError},
		{"out of memory", 137, true, record.ReasonOOMKilled},
		{"survived a child's OOM", 0, true, record.ReasonCompleted},
	} {
		for _, down := range []bool{false, true} {
			t.Run(fmt.Sprint(c.name, " down=", down), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					d := w.start()
					ctx := context.Background()
					id := mustStart(t, d)
					w.set(w.oom, id, c.oom)
					if down {
						w.crash()
						d.bg.Stop(ctx)
					}
					w.runtime.Exit(id, c.code)
					if down {
						d = w.start()
						<-d.Recover(ctx)
					}
					synctest.Wait()
					got, err := d.Get(id)
					if err != nil || got.Phase != record.ContainerExited || got.ExitCode != int32(c.code) || got.Reason != c.reason || got.FinishedAt.IsZero() || got.StartedAt.IsZero() {
						t.Errorf("got %s code %d %s, started %v finished %v, %v", got.Phase, got.ExitCode, got.Reason, got.StartedAt, got.FinishedAt, err)
					}
					if w.logged[id] == 0 {
						t.Error("the output was not drained before the exit was told")
					}
					if len(w.runtime.Known()) != 0 {
						t.Error("the task of an exited container is still there")
					}
				})
			})
		}
	}
}

// Streams that cannot be connected after a restart are connected later.
func TestStreamsComeLate(t *testing.T) {
	for _, fails := range []int64{3, 1000} {
		t.Run(fmt.Sprint("after ", fails), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { streamsComeLate(t, fails) })
		})
	}
}

func streamsComeLate(t *testing.T, fails int64) {
	w := newWorld(t)
	d := w.start()
	ctx := context.Background()
	id := mustStart(t, d)
	w.crash()
	d.bg.Stop(ctx)
	var tries atomic.Int64
	w.strike = func(_ int, name string) (before, after error) {
		if name != "reattach streams" {
			return nil, nil
		}
		if tries.Add(1) > fails {
			return nil, nil
		}
		return errStruck, nil
	}
	d = w.start()
	<-d.Recover(ctx)
	if err := d.ReopenLog(ctx, id); !errdefs.IsUnavailable(err) {
		t.Errorf("reopen without streams: %v", err)
	}
	time.Sleep(time.Minute)
	late := tries.Load() > fails
	if err := d.ReopenLog(ctx, id); (err == nil) != late {
		t.Errorf("reopen after %d tries: %v", tries.Load(), err)
	}
	w.runtime.Exit(id, 3)
	synctest.Wait()
	if got, err := d.Get(id); err != nil || got.ExitCode != 3 || (w.logged[id] > 0) != late {
		t.Errorf("exit code %d, drained %d times, %v", got.ExitCode, w.logged[id], err)
	}
	if err := d.Remove(ctx, id); err != nil {
		t.Error(err)
	}
	before := tries.Load()
	time.Sleep(time.Hour)
	if n := tries.Load() - before; n > 1 {
		t.Errorf("%d tries after the end", n)
	}
	d.clean()
}

func mustStart(t *testing.T, d *daemon) string {
	t.Helper()
	id, err := d.Create(context.Background(), d.request("run"))
	if err == nil {
		err = d.Start(context.Background(), id)
	}
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// A shim that dies ends the container, with no process left; one that is silent
// ends nothing: the container reads as unknown until the shim answers.
func TestShimDeathAndSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		ctx := context.Background()
		id := mustStart(t, d)
		w.crash()
		d.bg.Stop(ctx)
		resume := w.runtime.Silence(w.pod.ID)
		d = w.start()
		d.Recover(ctx)
		time.Sleep(time.Minute)
		if c, err := d.Get(id); err != nil || c.Phase != record.ContainerRunning || d.Silent(id) {
			t.Errorf("a shim that is silent for a minute: %s silent=%v %v", c.Phase, d.Silent(id), err)
		}
		time.Sleep(time.Hour)
		if c, err := d.Get(id); err != nil || c.Phase != record.ContainerRunning || !d.Silent(id) {
			t.Errorf("a silent shim: %s silent=%v %v", c.Phase, d.Silent(id), err)
		}
		resume()
		time.Sleep(time.Hour)
		if c, err := d.Get(id); err != nil || c.Phase != record.ContainerRunning || d.Silent(id) {
			t.Errorf("a shim that answers again: %s silent=%v %v", c.Phase, d.Silent(id), err)
		}
		w.runtime.KillShim(w.pod.ID, true)
		time.Sleep(time.Hour)
		c, err := d.Get(id)
		if err != nil || c.Phase != record.ContainerExited || c.Reason != record.ReasonUnknown {
			t.Errorf("a dead shim: %s %s %v", c.Phase, c.Reason, err)
		}
		if alive := w.runtime.Alive(); len(alive) > 0 {
			t.Errorf("processes are left: %v", alive)
		}
	})
}

// A container that ran is not listed as one that may still be started, although
// the daemon ended before its start was on disk, and its shim with it.
func TestStartIsNotForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		ctx := context.Background()
		id, err := d.Create(ctx, d.request("run"))
		if err != nil {
			t.Fatal(err)
		}
		created, err := d.Get(id)
		if err == nil {
			err = d.Start(ctx, id)
		}
		if err != nil {
			t.Fatal(err)
		}
		w.crash()
		d.bg.Stop(ctx)
		w.runtime.KillShim(w.pod.ID, false)
		if err := w.disk.Write(ctx, store.Change{PutContainer: &created}); err != nil {
			t.Fatal(err)
		}
		d = w.start()
		looked := d.Recover(ctx)
		if c, err := d.Get(id); err != nil || c.Phase == record.ContainerCreated {
			t.Errorf("before its runtime was asked it is %s, %v", c.Phase, err)
		}
		<-looked
		time.Sleep(time.Minute)
		c, err := d.Get(id)
		if err != nil || c.Phase != record.ContainerExited || c.Reason != record.ReasonUnknown || c.StartedAt.IsZero() || c.FinishedAt.Before(c.StartedAt) {
			t.Errorf("got %s %s, started %v finished %v, %v", c.Phase, c.Reason, c.StartedAt, c.FinishedAt, err)
		}
		if err := d.Start(ctx, id); err == nil {
			t.Error("it was started a second time")
		}
		if err := d.Remove(ctx, id); err != nil {
			t.Fatal(err)
		}
		d.clean()
	})
}

// A start that was cut off after its note and before the process was released can
// be made again.
func TestStartCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		ctx := context.Background()
		id, err := d.Create(ctx, d.request("run"))
		if err != nil {
			t.Fatal(err)
		}
		w.strike = func(_ int, name string) (before, after error) {
			if name != "note the start" {
				return nil, nil
			}
			w.crash()
			return nil, errDead
		}
		if err := d.Start(ctx, id); err == nil {
			t.Fatal("the daemon did not end")
		}
		w.strike = nil
		d.bg.Stop(ctx)
		d = w.start()
		<-d.Recover(ctx)
		time.Sleep(time.Minute)
		if c, err := d.Get(id); err != nil || c.Phase != record.ContainerCreated || c.Pid != 0 || !c.StartedAt.IsZero() {
			t.Errorf("it is %s, pid %d, started %v, %v", c.Phase, c.Pid, c.StartedAt, err)
		}
		if err := d.Start(ctx, id); err != nil {
			t.Fatal(err)
		}
		if c, err := d.Get(id); err != nil || c.Phase != record.ContainerRunning || c.Pid == 0 {
			t.Errorf("started again it is %s, pid %d, %v", c.Phase, c.Pid, err)
		}
		if err := d.Remove(ctx, id); err != nil {
			t.Fatal(err)
		}
		d.clean()
	})
}

func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		ctx := context.Background()
		id := mustStart(t, d)
		for range 2 {
			if err := d.Stop(ctx, id, time.Minute); err != nil {
				t.Fatal(err)
			}
		}
		if c, err := d.Get(id); err != nil || c.ExitCode != 128+15 {
			t.Errorf("stopped by SIGTERM: code %d %v", c.ExitCode, err)
		}
		if err := d.Stop(ctx, "unknown", 0); err != nil {
			t.Errorf("stop of an unknown container: %v", err)
		}
		if err := d.Start(ctx, id); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("start of an exited container: %v", err)
		}
		if err := d.Remove(ctx, id); err != nil {
			t.Error(err)
		}
		if err := d.Remove(ctx, id); err != nil {
			t.Errorf("second remove: %v", err)
		}
		d.clean()
	})
}

func TestCreateRefuses(t *testing.T) {
	w := newWorld(t)
	d := w.start()
	ctx := context.Background()
	absent := d.request()
	absent.Config.Image.Image = "absent"
	if _, err := d.Create(ctx, absent); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "resolve image") {
		t.Errorf("absent image: %v", err)
	}
	artifact := d.request()
	artifact.Config.Image.Image = "artifact"
	if _, err := d.Create(ctx, artifact); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "config.image") {
		t.Errorf("artifact: %v", err)
	}
	if _, err := d.Create(ctx, container.Request{SandboxID: record.NewID(), Config: absent.Config}); !errdefs.IsNotFound(err) {
		t.Errorf("absent sandbox: %v", err)
	}
	a, err := d.Create(ctx, d.request("run"))
	if err != nil {
		t.Fatal(err)
	}
	if again, err := d.Create(ctx, d.request("run")); err != nil || again != a {
		t.Errorf("a client that did not hear: %s %v, want %s", again, err, a)
	}
	if err := d.Remove(ctx, a); err != nil {
		t.Fatal(err)
	}
	if _, err := d.store.Sandboxes.Move(ctx, w.pod.ID, record.Stopped, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Create(ctx, d.request("run")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("pod that is not ready: %v", err)
	}
	d.clean()
}

func TestUpdateIsAllOrNothing(t *testing.T) {
	w := newWorld(t)
	d := w.start()
	ctx := context.Background()
	id := mustStart(t, d)
	if err := d.Update(ctx, id, &cri.LinuxContainerResources{CpuQuota: 100, CpuShares: 7}, nil); err != nil {
		t.Fatal(err)
	}
	if c, _ := d.Get(id); c.Resources.GetCpuQuota() != 100 || c.Resources.GetCpuShares() != 7 || !strings.Contains(string(c.Spec), `"quota":100`) {
		t.Errorf("after an update: %v %s", c.Resources, c.Spec)
	}
	for _, failing := range []string{"set quota 200", "write record"} {
		w.strike = func(_ int, name string) (before, after error) {
			if name == failing {
				return nil, errStruck
			}
			return nil, nil
		}
		if err := d.Update(ctx, id, &cri.LinuxContainerResources{CpuQuota: 200}, nil); !errors.Is(err, errStruck) {
			t.Errorf("%s: %v", failing, err)
		}
		if c, _ := d.Get(id); c.Resources.GetCpuQuota() != 100 {
			t.Errorf("%s: the record has quota %d", failing, c.Resources.GetCpuQuota())
		}
		w.mu.Lock()
		last := w.names[len(w.names)-1]
		w.mu.Unlock()
		if last != "set quota 100" {
			t.Errorf("%s: the last thing done was %q, not setting the old quota", failing, last)
		}
	}
	// Annotations go with the change, and not with what takes it back.
	w.strike = func(_ int, name string) (before, after error) {
		if name == "write record" {
			return errStruck, nil
		}
		return nil, nil
	}
	if err := d.Update(ctx, id, &cri.LinuxContainerResources{CpuQuota: 200}, map[string]string{"test/mark": " marked"}); !errors.Is(err, errStruck) {
		t.Errorf("marked: %v", err)
	}
	w.mu.Lock()
	if n := len(w.names); !slices.Equal(w.names[n-3:], []string{"set quota 200 marked", "write record", "set quota 100"}) {
		t.Errorf("a marked update that fails did %q", w.names[n-3:])
	}
	w.mu.Unlock()
	w.strike = nil
	if err := d.Update(ctx, id, &cri.LinuxContainerResources{CpuQuota: -5}, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad value: %v", err)
	}
	w.mu.Lock()
	effects := len(w.names)
	w.mu.Unlock()
	if err := d.Update(ctx, id, &cri.LinuxContainerResources{CpuQuota: 300, MemoryLimitInBytes: used - 1}, nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "memory_limit_in_bytes") {
		t.Errorf("less memory than is in use: %v", err)
	}
	w.mu.Lock()
	if len(w.names) != effects {
		t.Errorf("a refused update did %q", w.names[effects:])
	}
	w.mu.Unlock()
	if err := d.Update(ctx, id, &cri.LinuxContainerResources{MemoryLimitInBytes: used}, nil); err != nil {
		t.Errorf("as much memory as is in use: %v", err)
	}
	if err := d.Remove(ctx, id); err != nil {
		t.Error(err)
	}
}

// TestExecsAreEnded: an exec that nobody has a hold on is taken away from the
// runtime: one whose addition was answered with an error although it happened,
// and one of an earlier daemon.
func TestExecsAreEnded(t *testing.T) {
	deletes := func(w *world) (n int) {
		for _, c := range w.runtime.Calls() {
			if c.Op == "execdelete" {
				n++
			}
		}
		return n
	}
	t.Run("lost", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			d := w.start()
			id := mustStart(t, d)
			w.runtime.Inject(runtimetest.Fault{Op: "exec", Nth: 1, After: true, Err: context.DeadlineExceeded})
			w.runtime.Inject(runtimetest.Fault{Op: "process", Nth: 1, Err: errStruck})
			if _, err := d.ExecSync(context.Background(), id, []string{"run"}, 0); err == nil {
				t.Error("no error")
			}
			time.Sleep(time.Minute)
			if n := deletes(w); n != 1 {
				t.Errorf("deleted %d times", n)
			}
		})
	})
	t.Run("old", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			d := w.start()
			ctx := context.Background()
			id := mustStart(t, d)
			alive := len(w.runtime.Alive())
			task, err := runtime.New(w.runtime, w.runtime).Get(ctx, id)
			if err != nil {
				t.Fatal(err)
			}
			e, err := task.Exec(ctx, "old", runtime.ExecRequest{Process: &specs.Process{Args: []string{"run"}}})
			if err == nil {
				err = e.Start(ctx)
			}
			if err != nil {
				t.Fatal(err)
			}
			w.mu.Lock()
			w.execs[id] = []string{"old"}
			w.mu.Unlock()
			w.crash()
			d.bg.Stop(ctx)
			resume := w.runtime.Silence(w.pod.ID)
			d = w.start()
			<-d.Recover(ctx)
			time.Sleep(time.Minute)
			resume()
			time.Sleep(time.Minute)
			if n := len(w.runtime.Alive()); n != alive || deletes(w) != 1 {
				t.Errorf("%d processes instead of %d, deleted %d times", n, alive, deletes(w))
			}
		})
	})
}

func TestExecSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		ctx := context.Background()
		id := mustStart(t, d)
		got, err := d.ExecSync(ctx, id, []string{"exit", "42"}, time.Minute)
		if err != nil || got.ExitCode != 42 || string(got.Stdout) != "out" {
			t.Errorf("got %+v %v", got, err)
		}
		if _, err := d.ExecSync(ctx, id, []string{"run"}, time.Second); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "1s") {
			t.Errorf("timeout: %v", err)
		}
		if alive := w.runtime.Alive(); len(alive) != 1 {
			t.Errorf("alive after a timeout: %v, want the container alone", alive)
		}
		if _, err := d.ExecSync(ctx, id, nil, 0); !errdefs.IsInvalidArgument(err) {
			t.Errorf("no command: %v", err)
		}
		if err := d.Stop(ctx, id, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := d.ExecSync(ctx, id, []string{"x"}, 0); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("exited container: %v", err)
		}
	})
}

// The record of a creation whose last write failed goes too.
func TestCreateFailsAtItsRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		writes := 0
		w.strike = func(_ int, name string) (error, error) {
			if name == "write record" {
				if writes++; writes == 2 {
					return errStruck, nil
				}
			}
			return nil, nil
		}
		if _, err := d.Create(context.Background(), d.request("run")); !errors.Is(err, errStruck) {
			t.Errorf("create: %v", err)
		}
		if all := d.store.Containers.List(); len(all) > 0 {
			t.Errorf("left: %s %s", all[0].ID, all[0].Phase)
		}
		if left := w.left(); len(left) > 0 {
			t.Errorf("left on the node: %v", left)
		}
		d.bg.Stop(context.Background())
	})
}

// A client that did not hear that its container was made asks for another, in
// which some mount has a new name.
func TestCreateAgainOtherwise(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.start()
		first, err := d.Create(context.Background(), d.request("run"))
		if err != nil {
			t.Fatal(err)
		}
		other := d.request("run")
		other.Config.Mounts = append(other.Config.Mounts, &cri.Mount{ContainerPath: "/dev/termination-log", HostPath: "/tmp/4711"})
		second, err := d.Create(context.Background(), other)
		if err != nil {
			t.Fatal(err)
		}
		if all := d.List(); len(all) != 1 || all[0].ID != second || first == second {
			t.Errorf("first %s, second %s, now %v", first, second, all)
		}
		if err := d.Start(context.Background(), second); err != nil {
			t.Fatal(err)
		}
		third := d.request("run")
		third.Config.Labels = map[string]string{"a": "b"}
		if _, err := d.Create(context.Background(), third); !errdefs.IsAlreadyExists(err) {
			t.Errorf("create beside one that runs: %v", err)
		}
		d.bg.Stop(context.Background())
	})
}
