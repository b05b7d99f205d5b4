package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	crt "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantry-cri/gantry/plugin/record"
)

// members is a control group of real processes, some of which come late.
type members struct {
	Cgroups
	rounds [][]int
	asked  int
	wrote  map[string]string
	lacks  bool
	err    error
}

func (g *members) Procs(string) ([]int, error) {
	g.asked++
	return append([]int{}, g.rounds[min(g.asked-1, len(g.rounds)-1)]...), nil
}

func (g *members) Set(path, file, value string) (bool, error) {
	g.wrote[path+" "+file] = value
	return !g.lacks, g.err
}

func sleeper(t *testing.T) int {
	t.Helper()
	c := exec.Command("sleep", "1000")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Process.Kill(); err != nil {
			t.Error(err)
		}
		c.Wait() // the error is the kill
	})
	return c.Process.Pid
}

func scoreOf(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Every member gets the score, also one that comes while it is set; one that
// left the group, and one that is no process any more, is left alone.
func TestSetOOMScore(t *testing.T) {
	first, late, left := sleeper(t), sleeper(t), sleeper(t)
	const nobody = 1 << 22 // the kernel's largest number is one less
	g := &members{rounds: [][]int{{first, left, nobody}, {first, late, nobody}}}
	if err := setOOMScore(g, "/g", 700, everyone); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ pid, want int }{"first": {first, 700}, "late": {late, 700}, "left": {left, scoreOf(t, os.Getpid())}} {
		if got := scoreOf(t, tc.pid); got != tc.want {
			t.Errorf("%s has %d, want %d", name, got, tc.want)
		}
	}
}

// Who is not chosen keeps its score, and a choice that cannot be made is told.
func TestSetOOMScoreOfSome(t *testing.T) {
	chosen, other := sleeper(t), sleeper(t)
	g := &members{rounds: [][]int{{chosen, other}}}
	if err := setOOMScore(g, "/g", 700, func(pid int) (bool, error) { return pid == chosen, nil }); err != nil {
		t.Fatal(err)
	}
	if got, want := scoreOf(t, other), scoreOf(t, os.Getpid()); scoreOf(t, chosen) != 700 || got != want {
		t.Errorf("the chosen one has %d, the other %d, want 700 and %d", scoreOf(t, chosen), got, want)
	}
	g.asked = 0
	if err := setOOMScore(g, "/g", 700, func(int) (bool, error) { return false, context.Canceled }); !errors.Is(err, context.Canceled) {
		t.Errorf("a failure became %v", err)
	}
}

func TestSetOOMScoreEnds(t *testing.T) {
	g := &members{}
	for pid := range 2*scoreRounds + 2 {
		g.rounds = append(g.rounds, []int{1<<22 + pid})
	}
	if err := setOOMScore(g, "/g", 700, everyone); err == nil {
		t.Error("it went on for ever without an error")
	}
}

func TestSetHugepages(t *testing.T) {
	limits := func(pairs ...any) *specs.LinuxResources {
		r := &specs.LinuxResources{}
		for i := 0; i < len(pairs); i += 2 {
			r.HugepageLimits = append(r.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: pairs[i].(string), Limit: uint64(pairs[i+1].(int))})
		}
		return r
	}
	for name, tc := range map[string]struct {
		before, after *specs.LinuxResources
		want          map[string]string // by page size
	}{
		"none":    {nil, limits(), map[string]string{}},
		"same":    {limits("2MB", 5), limits("2MB", 5), map[string]string{"2MB": "5"}},
		"changed": {limits("2MB", 5, "1GB", 0), limits("2MB", 6, "1GB", 0), map[string]string{"2MB": "6", "1GB": "0"}},
		"new":     {nil, limits("2MB", 0), map[string]string{"2MB": "0"}},
		"back":    {limits("2MB", 6), limits(), map[string]string{"2MB": "max"}},
	} {
		g := &members{wrote: map[string]string{}}
		if err := (&Tasks{cgs: g}).setHugepages("/g", tc.before, tc.after); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		want := map[string]string{}
		for size, limit := range tc.want {
			for _, kind := range []string{"", ".rsvd"} {
				want["/g hugetlb."+size+kind+".max"] = limit
				want["/g hugetlb."+size+kind+".limit_in_bytes"] = strings.Replace(limit, "max", "-1", 1)
			}
		}
		if !maps.Equal(g.wrote, want) {
			t.Errorf("%s: wrote %v, want %v", name, g.wrote, want)
		}
	}
	g := &members{wrote: map[string]string{}, err: context.Canceled}
	if err := (&Tasks{cgs: g}).setHugepages("/g", nil, limits("2MB", 1)); !errors.Is(err, context.Canceled) {
		t.Errorf("a failure became %v", err)
	}
	g = &members{wrote: map[string]string{}, lacks: true}
	if err := (&Tasks{cgs: g}).setHugepages("/g", nil, limits("2MB", 1)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a group without such limits: %v", err)
	}
}

// TestTakeHugepages: runc is not told of huge page limits where it is to set limits
// later, and of all else as before.
func TestTakeHugepages(t *testing.T) {
	const with = `{"ociVersion":"1.3.0","process":{"user":{"uid":0,"gid":0},"args":["x"],"cwd":"/"},"linux":{"resources":{"pids":{"limit":7},"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]},"cgroupsPath":"/a/b"}}`
	const without = `{"ociVersion":"1.3.0","linux":{"resources":{"pids":{"limit":7}}}}`
	for name, tc := range map[string]struct {
		runtime, spec string
		taken         bool
	}{
		"runc":          {"io.containerd.runc.v2", with, true},
		"our own":       {"io.containerd.gantry.v2", with, false},
		"another":       {"io.containerd.runsc.v1", with, false},
		"none":          {"io.containerd.runc.v2", without, false},
		"in words only": {"io.containerd.runc.v2", `{"annotations":{"x":"\"hugepageLimits\""},"process":{"args":["\"hugepageLimits\""]}}`, false},
	} {
		req := CreateRequest{Handler: record.Handler{Runtime: tc.runtime}, Spec: []byte(tc.spec)}
		got, err := takeHugepages(&req)
		if err != nil || (got.limits != nil) != tc.taken || !tc.taken && string(req.Spec) != tc.spec {
			t.Errorf("%s: %+v, %v, %s", name, got, err, req.Spec)
		}
		if !tc.taken {
			continue
		}
		want := strings.Replace(with, `,"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]`, "", 1)
		if l := got.limits.HugepageLimits; got.path != "/a/b" || len(l) != 1 || l[0].Limit != 4<<20 || string(req.Spec) != want {
			t.Errorf("%s: %+v, %s", name, got, req.Spec)
		}
	}
	req := CreateRequest{Handler: record.Handler{Runtime: "io.containerd.runc.v2"}, Spec: []byte(with), Checkpoint: "/x"}
	if got, err := takeHugepages(&req); err != nil || got.limits != nil {
		t.Errorf("of one that is restored: %+v, %v", got, err)
	}
	req = CreateRequest{Handler: record.Handler{Runtime: "io.containerd.runc.v2"}, Spec: []byte(`{"hugepageLimits"`)}
	if _, err := takeHugepages(&req); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a broken specification: %v", err)
	}
}

// updates is a task that records what it is told to set, and may refuse to lift a quota.
type updates struct {
	crt.Task
	cannotLift, cannotSet bool
	told                  []int64
}

func (*updates) ID() string { return "x" }

func (u *updates) Update(_ context.Context, r *anypb.Any, _ map[string]string) error {
	var l specs.LinuxResources
	if err := json.Unmarshal(r.Value, &l); err != nil {
		return err
	}
	u.told = append(u.told, quota(&l))
	if l.CPU.Quota != nil && *l.CPU.Quota < 0 && u.cannotLift {
		return errors.New("out of range")
	}
	if u.cannotSet {
		return context.Canceled
	}
	return nil
}

// A quota that is no more is lifted by name, and in the kernel where the runtime
// refuses that alone.
func TestLiftQuota(t *testing.T) {
	of := func(quota int64) *specs.Spec {
		cpu := &specs.LinuxCPU{Shares: new(uint64(5))}
		if quota != 0 {
			cpu.Quota = &quota
		}
		return &specs.Spec{Linux: &specs.Linux{CgroupsPath: "/g", Resources: &specs.LinuxResources{CPU: cpu}}}
	}
	kernel := map[string]string{"/g cpu.cfs_quota_us": "-1", "/g cpu.max": "max"}
	for name, tc := range map[string]struct {
		before, after *specs.Spec
		task          updates
		told          []int64
		wrote         map[string]string
		fails         bool
	}{
		"never":             {of(0), of(0), updates{cannotLift: true}, []int64{0}, nil, false},
		"set":               {of(0), of(7), updates{cannotLift: true}, []int64{7}, nil, false},
		"changed":           {of(7), of(8), updates{cannotLift: true}, []int64{8}, nil, false},
		"lifted":            {of(7), of(0), updates{}, []int64{-1}, nil, false},
		"lifted by name":    {of(7), of(-1), updates{}, []int64{-1}, nil, false},
		"in the kernel":     {of(7), of(0), updates{cannotLift: true}, []int64{-1, 0}, kernel, false},
		"for other reasons": {of(7), of(0), updates{cannotSet: true}, []int64{-1, 0}, nil, true},
	} {
		g := &members{wrote: map[string]string{}}
		err := (&Task{rt: &tc.task, tasks: &Tasks{cgs: g}}).Change(t.Context(), Change{Before: tc.before, After: tc.after})
		if (err != nil) != tc.fails || !slices.Equal(tc.task.told, tc.told) || !maps.Equal(g.wrote, tc.wrote) {
			t.Errorf("%s: told %d, wrote %v, %v", name, tc.task.told, g.wrote, err)
		}
	}
	g := &members{wrote: map[string]string{}, err: context.Canceled}
	task := &Task{rt: &updates{cannotLift: true}, tasks: &Tasks{cgs: g}}
	if err := task.Change(t.Context(), Change{Before: of(7), After: of(0)}); !errors.Is(err, context.Canceled) {
		t.Errorf("a failure became %v", err)
	}
}
