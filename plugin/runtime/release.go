package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	"github.com/gantry-cri/gantry/plugin/record"
)

// stopLimit is how long a process may take to end after SIGKILL. Writing out
// a core or leaving a slow disk call takes time; a process stuck in the kernel
// never ends, and the caller hears of it.
const stopLimit = 15 * time.Second

// deleteRetries is how often a delete that a shim refuses is asked for again.
const deleteRetries = 3

// Delete takes a stopped task away and, with the last of its pod, the shim. It
// is idempotent: a task that the runtime does not know has a zero exit. It
// does not look at the control group; Release does.
func (t *Tasks) Delete(ctx context.Context, id string) (record.Exit, error) {
	var exit record.Exit
	err := bounded(ctx, "delete task", id, deleteLimit, func(ctx context.Context) error {
		got, err := t.rt.Delete(ctx, id)
		if got != nil {
			exit = record.Exit{Code: got.Status, At: got.Timestamp}
		}
		return err
	})
	// The runtime gives the task up when the connection is closed.
	if !errdefs.IsNotFound(err) && !errors.Is(err, ttrpc.ErrClosed) {
		return exit, err
	}
	// It is NotFound as well when there is no container record, with the shim
	// in the best of health.
	if still := t.absent(ctx, id); still != nil {
		return exit, fmt.Errorf("delete task: %w", errors.Join(still, err))
	}
	return exit, nil
}

// Release takes a task down whatever its state: it kills every process, takes
// the task away, sees to it that the control group of spec is empty, and
// removes it. It is idempotent and succeeds when there was never a task. It
// does not return success while a process is left.
//
// When the shim does not answer, the processes are killed all the same and the
// error is the shim's; a later call finishes.
func (t *Tasks) Release(ctx context.Context, id string, spec []byte) error {
	path, err := ownCgroup(id, spec)
	if err != nil {
		return fmt.Errorf("release task %s: %w", id, err)
	}
	task, err := t.Get(ctx, id)
	switch {
	case err == nil:
		err = t.end(ctx, task)
		if err != nil && t.forgotten(ctx, task) {
			err = nil
		}
	case errdefs.IsNotFound(err):
		// It may yet have things on disk that only a delete removes.
		_, err = t.Delete(ctx, id)
	}
	if err != nil {
		_, killed := t.kill(ctx, id, path)
		if killed == nil {
			// A runtime cannot remove what is nested deeper than a path can tell.
			killed = t.cgs.Prune(path)
		}
		return fmt.Errorf("release task: %w", errors.Join(err, killed))
	}
	if _, err := t.clear(ctx, id, spec); err != nil {
		return fmt.Errorf("release task: %w", err)
	}
	return nil
}

// end kills and deletes a task that the runtime knows.
func (t *Tasks) end(ctx context.Context, task *Task) error {
	state, err := task.State(ctx)
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	// A kill is an exec of the runtime; what a stopped task has left behind in
	// its control group is killed with the group, and so is what there may be
	// of a task that its shim does not know.
	if err == nil && state.Status != Stopped {
		if err := t.endProcess(ctx, task); err != nil {
			return err
		}
	}
	return t.deleteEnded(ctx, task.ID())
}

// deleteEnded deletes a task whose end is known. A shim may tell of that before
// its runtime takes the task for stopped, and one whose delete went wrong half
// way (gVisor's: the root is unmounted by then) complains of that the next time:
// what it answers in its own words it is asked again.
func (t *Tasks) deleteEnded(ctx context.Context, id string) error {
	for left := deleteRetries; ; left-- {
		_, err := t.Delete(ctx, id)
		if err == nil || left == 0 || !unclassified(err) || sleep(ctx, settlePoll) != nil {
			return err
		}
	}
}

func (t *Tasks) endProcess(ctx context.Context, task *Task) error {
	if err := task.Kill(ctx, syscall.SIGKILL, true); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	// A task that was never started does not report an end in every runtime;
	// the delete says whether it can go.
	t.seen(ctx, task)
	return nil
}

// forgotten reports whether the runtime gives the task up because its shim
// died, and waits for the end of that. A task whose shim answers, or is silent,
// is not forgotten.
func (t *Tasks) forgotten(ctx context.Context, task *Task) bool {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for {
		if t.absent(ctx, task.ID()) == nil {
			return true
		}
		if _, err := task.State(ctx); !errdefs.IsNotFound(err) {
			return false
		}
		if sleep(ctx, settlePoll) != nil {
			return false
		}
	}
}

// Ender is what a Platform may offer besides: to end the shim of a pod that does
// not answer. It does nothing to one that does.
type Ender interface {
	EndSilent(ctx context.Context, pod string) error
}

// EndSilent ends the shim of a pod that does not answer, so that everything that
// waits for it goes on as after the death of a shim. FailedPrecondition says
// that it is not silent, or not known for certain, and lives on.
func (t *Tasks) EndSilent(ctx context.Context, pod string) error {
	e, ok := t.rt.(Ender)
	if !ok {
		return fmt.Errorf("end the shim of pod %s: %w", pod, errdefs.ErrNotImplemented)
	}
	return e.EndSilent(ctx, pod)
}

// EndProcesses kills what is in the control group of spec, without the shim.
func (t *Tasks) EndProcesses(ctx context.Context, id string, spec []byte) error {
	path, err := ownCgroup(id, spec)
	if err != nil {
		return fmt.Errorf("end processes of task %s: %w", id, err)
	}
	_, err = t.kill(ctx, id, path)
	return err
}

// clear ends what is left in the control group of spec and removes it.
func (t *Tasks) clear(ctx context.Context, id string, spec []byte) (int, error) {
	path, err := ownCgroup(id, spec)
	if err != nil || path == "" {
		return 0, err
	}
	left, err := t.kill(ctx, id, path)
	if err != nil {
		return left, err
	}
	if err := t.cgs.Remove(path); err != nil {
		return left, fmt.Errorf("remove cgroup of task %s: %w", id, err)
	}
	return left, nil
}

func (t *Tasks) kill(ctx context.Context, id, path string) (int, error) {
	if path == "" {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	left, err := t.cgs.Kill(ctx, path)
	if err != nil {
		return left, fmt.Errorf("kill what is left of task %s: %w", id, err)
	}
	return left, nil
}

// ownCgroup reads the control group of task id from its OCI specification, ""
// for no specification and for one without a group. What lives in it will be
// killed, so a group that is not named after the task is refused.
func ownCgroup(id string, spec []byte) (string, error) {
	path, _, err := readSpec(id, spec)
	return path, err
}

// readSpec is ownCgroup; userns says that the container has a user namespace of
// its own.
func readSpec(id string, spec []byte) (path string, userns bool, err error) {
	if len(spec) == 0 {
		return "", false, nil
	}
	var s struct {
		Linux struct {
			CgroupsPath string            `json:"cgroupsPath"`
			UIDMappings []json.RawMessage `json:"uidMappings"`
		} `json:"linux"`
	}
	if err := json.Unmarshal(spec, &s); err != nil {
		return "", false, fmt.Errorf("read specification: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	path = s.Linux.CgroupsPath
	if path != "" && !strings.Contains(filepath.Base(path), id) {
		return "", false, fmt.Errorf("cgroup %q is not named after it: %w", path, errdefs.ErrFailedPrecondition)
	}
	return path, len(s.Linux.UIDMappings) > 0, nil
}
