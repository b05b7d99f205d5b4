// Package runtimetest has a task runtime in memory and the contract that every
// runtime keeps.
//
// Fake stands in for containerd's runtime and for the kernel's control groups:
// give it to runtime.New twice. It behaves as the real one does, awkward
// answers included, shows what is still alive, and fails where a test says.
// Start reading at Fake; Suite is the contract.
package runtimetest

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	crt "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantry-cri/gantry/plugin/runtime"
)

// Fault makes a call fail.
type Fault struct {
	// Op is the method in lower case: create, get, delete, start, kill, wait,
	// state, exec, and so on; ID the task, "" for any.
	Op, ID string
	// Nth is which such call from now on fails, from 1; 0 for every one.
	Nth int
	// After lets the call take effect before it fails.
	After bool
	Err   error
}

// Call is one call that was made.
type Call struct{ Op, ID string }

// Fake is a runtime.Platform and a runtime.Cgroups. A task whose first
// argument is "exit" ends with the second as its code when it is started,
// every other one runs until it is killed or Exit is called.
type Fake struct {
	mu     sync.Mutex
	pids   uint32
	shims  map[string]*shim // by pod
	tasks  map[string]*task // what the runtime knows
	procs  map[string]*proc // what the kernel knows, by control group
	faults []*Fault
	calls  []Call
	absent map[string]bool // tasks without a container record
}

// New returns a runtime without tasks.
func New() *Fake {
	return &Fake{shims: map[string]*shim{}, tasks: map[string]*task{}, procs: map[string]*proc{}, absent: map[string]bool{}}
}

// shim is one shim process.
type shim struct {
	pod    string
	died   chan struct{}
	answer chan struct{} // closed while it answers
}

func (s *shim) isDead() bool {
	select {
	case <-s.died:
		return true
	default:
		return false
	}
}

// proc is a process. Its end is visible to the kernel at once and to Wait.
type proc struct {
	pid  uint32
	path string // control group; "" for none
	done chan struct{}
	exit crt.Exit // valid when done is closed
}

func (p *proc) alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// end is called with the lock held.
func (p *proc) end(code uint32) {
	if p.alive() {
		p.exit = crt.Exit{Pid: p.pid, Status: code, Timestamp: time.Now()}
		close(p.done)
	}
}

// Inject adds a fault.
func (f *Fake) Inject(fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, &fault)
}

// Heal removes every fault.
func (f *Fake) Heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = nil
}

// Calls lists the calls made so far.
func (f *Fake) Calls() []Call {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// Alive lists the control groups that hold a process, known to the runtime or
// not: what the kernel would say.
func (f *Fake) Alive() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var ids []string
	for path, p := range f.procs {
		if p.alive() {
			ids = append(ids, path)
		}
	}
	slices.Sort(ids)
	return ids
}

// Known lists the tasks that the runtime knows.
func (f *Fake) Known() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	ids := make([]string, 0, len(f.tasks))
	for id := range f.tasks {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// Exit ends the first process of a task by itself.
func (f *Fake) Exit(id string, code uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t := f.tasks[id]; t != nil {
		t.init.end(code)
	}
}

// ExitExec ends a further process by itself.
func (f *Fake) ExitExec(id, execID string, code uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t := f.tasks[id]; t != nil && t.execs[execID] != nil {
		t.execs[execID].proc.end(code)
	}
}

// KillShim kills the shim of a pod, as kill -9 does. containerd then forgets
// its tasks and has their processes killed; with orphans, that kill failed.
func (f *Fake) KillShim(pod string, orphans bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.shims[pod]
	if s == nil {
		return
	}
	delete(f.shims, pod)
	close(s.died)
	for id, t := range f.tasks {
		if t.shim != s {
			continue
		}
		delete(f.tasks, id)
		if !orphans {
			t.init.end(137)
			for _, e := range t.execs {
				e.proc.end(137)
			}
		}
	}
}

// Silence makes the shim of a pod answer nothing, as kill -STOP does, until
// the function it returns is called.
func (f *Fake) Silence(pod string) (resume func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.shims[pod]
	if s == nil {
		return func() {}
	}
	answer := make(chan struct{})
	s.answer = answer
	return sync.OnceFunc(func() { close(answer) })
}

// Unrecord lets the runtime find no container record for a task.
func (f *Fake) Unrecord(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.absent[id] = true
}

// call runs one call: the faults, the silence and death of the shim if it goes
// to one, and effect with the lock held.
func (f *Fake) call(ctx context.Context, op, id string, s *shim, effect func() error) error {
	if err := f.enter(op, id); err != nil {
		return err
	}
	if s != nil {
		if err := s.reach(ctx, f); err != nil {
			return err
		}
	}
	f.mu.Lock()
	err := effect()
	after := f.fault(op, id, true)
	f.mu.Unlock()
	if err == nil {
		return after
	}
	return err
}

func (f *Fake) enter(op, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, Call{op, id})
	return f.fault(op, id, false)
}

// fault is called with the lock held.
func (f *Fake) fault(op, id string, after bool) error {
	for _, x := range f.faults {
		if x.Op != op || x.ID != "" && x.ID != id || x.After != after || x.Nth < 0 {
			continue
		}
		if x.Nth == 0 {
			return x.Err
		}
		if x.Nth--; x.Nth == 0 {
			x.Nth = -1 // spent
			return x.Err
		}
	}
	return nil
}

// reach waits for the shim to answer. The error of a deadline has no class, as
// that of a real client.
func (s *shim) reach(ctx context.Context, f *Fake) error {
	f.mu.Lock()
	answer := s.answer
	f.mu.Unlock()
	if s.isDead() {
		return errClosed
	}
	select {
	case <-answer:
		return nil
	case <-s.died:
		return errClosed
	case <-ctx.Done():
		return fmt.Errorf("%w: the shim does not answer", errdefs.ErrUnknown)
	}
}

// Create implements runtime.Platform.
func (f *Fake) Create(ctx context.Context, id string, opts crt.CreateOpts) (crt.Task, error) {
	var spec specs.Spec
	if err := json.Unmarshal(opts.Spec.GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("read spec: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	var t *task
	err := f.call(ctx, "create", id, nil, func() error {
		if f.tasks[id] != nil {
			return fmt.Errorf("task %s: %w", id, errdefs.ErrAlreadyExists)
		}
		s := f.shimFor(id, opts.SandboxID, spec.Annotations)
		if s == nil {
			return fmt.Errorf("can't find shim for sandbox %s: %w", opts.SandboxID, errdefs.ErrNotFound)
		}
		t = &task{fake: f, id: id, shim: s, init: f.spawn(spec), io: opts.IO, execs: map[string]*exec{}, status: crt.CreatedStatus}
		if spec.Process != nil {
			t.args = spec.Process.Args
		}
		f.tasks[id] = t
		return nil
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// shimFor finds or starts the shim: with a sandbox, the shim must be there.
func (f *Fake) shimFor(id, sandbox string, annotations map[string]string) *shim {
	if sandbox != "" {
		return f.shims[sandbox]
	}
	pod := id
	if p := annotations["io.kubernetes.cri.sandbox-id"]; p != "" {
		pod = p
	}
	if f.shims[pod] == nil {
		answer := make(chan struct{})
		close(answer)
		f.shims[pod] = &shim{pod: pod, died: make(chan struct{}), answer: answer}
	}
	return f.shims[pod]
}

func (f *Fake) spawn(spec specs.Spec) *proc {
	f.pids++
	p := &proc{pid: 1000 + f.pids, done: make(chan struct{})}
	if spec.Linux != nil {
		p.path = spec.Linux.CgroupsPath
	}
	key := p.path
	if key == "" {
		key = "pid " + strconv.Itoa(int(p.pid))
	}
	f.procs[key] = p
	return p
}

// Get implements runtime.Platform.
func (f *Fake) Get(ctx context.Context, id string) (crt.Task, error) {
	var t *task
	err := f.call(ctx, "get", id, nil, func() error {
		if t = f.tasks[id]; t == nil {
			return errdefs.ErrNotFound
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Delete implements runtime.Platform.
func (f *Fake) Delete(ctx context.Context, id string) (*crt.Exit, error) {
	f.mu.Lock()
	t := f.tasks[id]
	f.mu.Unlock()
	if t == nil {
		return nil, f.call(ctx, "delete", id, nil, func() error { return errdefs.ErrNotFound })
	}
	var exit crt.Exit
	err := f.call(ctx, "delete", id, t.shim, func() error {
		if f.absent[id] {
			return fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
		}
		if f.tasks[id] == nil {
			return errdefs.ErrNotFound
		}
		if t.status == crt.RunningStatus && t.init.alive() {
			return fmt.Errorf("cannot delete a running process: %w", errdefs.ErrUnknown)
		}
		t.init.end(137)
		exit = t.init.exit
		delete(f.tasks, id)
		f.retire(t.shim)
		return nil
	})
	return &exit, err
}

// retire ends a shim with its last task.
func (f *Fake) retire(s *shim) {
	for _, t := range f.tasks {
		if t.shim == s {
			return
		}
	}
	if f.shims[s.pod] == s {
		delete(f.shims, s.pod)
	}
}

// Procs implements runtime.Cgroups.
func (f *Fake) Procs(path string) ([]int, error) {
	if err := f.enter("procs", filepath.Base(path)); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var pids []int
	for _, p := range f.procs {
		if p.alive() && (p.path == path || strings.HasPrefix(p.path, path+"/")) {
			pids = append(pids, int(p.pid))
		}
	}
	slices.Sort(pids)
	return pids, nil
}

// Kill implements runtime.Cgroups.
func (f *Fake) Kill(ctx context.Context, path string) (int, error) {
	pids, err := f.Procs(path)
	if err != nil {
		return 0, err
	}
	return len(pids), f.call(ctx, "cgroupkill", filepath.Base(path), nil, func() error {
		for _, p := range f.procs {
			if p.path == path || strings.HasPrefix(p.path, path+"/") {
				p.end(137)
			}
		}
		return nil
	})
}

// KillMarked implements runtime.Cgroups. Processes have no children here.
func (f *Fake) KillMarked(ctx context.Context, path string, m runtime.Mark) error {
	return f.call(ctx, "killmarked", filepath.Base(path), nil, func() error {
		for _, t := range f.tasks {
			for _, e := range t.execs {
				if e.mark == m && t.init.path == path {
					e.proc.end(137)
				}
			}
		}
		return nil
	})
}

// Set implements runtime.Cgroups. No group has any file.
func (f *Fake) Set(path, _, _ string) (bool, error) { return true, f.enter("set", filepath.Base(path)) }

// Prune implements runtime.Cgroups.
func (f *Fake) Prune(string) error { return nil }

// Remove implements runtime.Cgroups.
func (f *Fake) Remove(path string) error {
	if err := f.enter("remove", filepath.Base(path)); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if p := f.procs[path]; p != nil && p.alive() {
		return fmt.Errorf("remove cgroup %s: %w", path, errdefs.ErrFailedPrecondition)
	}
	delete(f.procs, path)
	return nil
}
