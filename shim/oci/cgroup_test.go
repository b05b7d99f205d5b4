package oci

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestChanged(t *testing.T) {
	disk := func(rate uint64) *cgroups.ThrottleDevice { return cgroups.NewThrottleDevice(8, 0, rate) }
	for name, c := range map[string]struct {
		before, after cgroups.Resources
		change        specs.LinuxResources
	}{
		"nothing": {
			cgroups.Resources{Memory: 1, CpuQuota: 2, PidsLimit: new(int64(3))},
			cgroups.Resources{Memory: 1, CpuQuota: 2, PidsLimit: new(int64(3))}, specs.LinuxResources{},
		},
		"quota alone": {
			cgroups.Resources{CpuQuota: 1000, CpuPeriod: 5000, CpuShares: 1024, CpuWeight: 100},
			cgroups.Resources{CpuQuota: 2000, CpuPeriod: 5000, CpuShares: 1024, CpuWeight: 100},
			specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: new(int64(2000))}},
		},
		"no quota": {
			cgroups.Resources{CpuQuota: 1000, CpuPeriod: 5000}, cgroups.Resources{CpuQuota: 1000, CpuPeriod: 6000},
			specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: new(int64(0)), Period: new(uint64(6000))}},
		},
		"shares": {
			cgroups.Resources{CpuShares: 1024, CpuWeight: 39}, cgroups.Resources{CpuShares: 512, CpuWeight: cgroups.ConvertCPUSharesToCgroupV2Value(512)},
			specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: new(uint64(512))}},
		},
		"the same shares": { // weighed by an older runtime
			cgroups.Resources{CpuShares: 1024, CpuWeight: 39}, cgroups.Resources{CpuShares: 1024, CpuWeight: 39},
			specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: new(uint64(1024))}},
		},
		"CPUs": {
			cgroups.Resources{CpusetCpus: "0-3", CpusetMems: "0"}, cgroups.Resources{CpusetCpus: "1", CpusetMems: "0"},
			specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "1"}},
		},
		"idle": {
			cgroups.Resources{CpuShares: 1024, CpuWeight: 100}, cgroups.Resources{CPUIdle: new(int64(1))},
			specs.LinuxResources{CPU: &specs.LinuxCPU{Idle: new(int64(1)), Shares: new(uint64(1024))}},
		},
		"memory": {
			cgroups.Resources{Memory: 10, MemorySwap: 20, MemoryReservation: 5}, cgroups.Resources{Memory: 15, MemorySwap: 20, MemoryReservation: 5, MemoryCheckBeforeUpdate: true},
			specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: new(int64(15)), CheckBeforeUpdate: new(true)}},
		},
		"no limit of memory": {
			cgroups.Resources{Memory: 10, MemorySwap: 20}, cgroups.Resources{Memory: -1},
			specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: new(int64(-1))}},
		},
		"a disk again": {
			cgroups.Resources{BlkioThrottleReadBpsDevice: []*cgroups.ThrottleDevice{disk(1), cgroups.NewThrottleDevice(8, 16, 3)}},
			cgroups.Resources{BlkioThrottleReadBpsDevice: []*cgroups.ThrottleDevice{cgroups.NewThrottleDevice(8, 16, 3), disk(2)}},
			specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{throttle(8, 0, 2)}}},
		},
		"huge pages and files": {
			cgroups.Resources{}, cgroups.Resources{HugetlbLimit: []*cgroups.HugepageLimit{{Pagesize: "2MB", Limit: 7}}, Unified: map[string]string{"memory.high": "1"}},
			specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 7}}, Unified: map[string]string{"memory.high": "1"}},
		},
	} {
		whole := c.before
		got := changed(&c.before, &c.change)
		if !reflect.DeepEqual(*got, c.after) {
			t.Errorf("%s: %+v, want %+v", name, *got, c.after)
		}
		if !reflect.DeepEqual(c.before, whole) {
			t.Errorf("%s: what was before is changed", name)
		}
	}
}

func throttle(major, minor int64, rate uint64) (d specs.LinuxThrottleDevice) {
	d.Major, d.Minor, d.Rate = major, minor, rate
	return d
}

// grouped is a container of a runtime that fails at whatever it is asked, with a
// process in control groups of its own.
func grouped(t *testing.T, created *cgroups.Resources) (*Runtime, cgroups.Manager) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	c := &cgroups.Cgroup{Path: fmt.Sprintf("/gantry-oci-%d", os.Getpid()), Resources: created}
	created.SkipDevices = true
	m, err := manager.New(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		if err := m.Destroy(); err != nil {
			t.Error(err)
		}
	})
	if err := m.Apply(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if err := m.Set(created); err != nil {
		t.Fatal(err)
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, start, _ := parseStat(string(stat))
	data, err := json.Marshal(map[string]any{
		"id": "a", "init_process_pid": cmd.Process.Pid, "init_process_start": start, "cgroup_paths": m.GetPaths(), "config": map[string]any{"cgroups": c},
	})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	r := New("ns", "a", dir, &options.Options{BinaryName: "false", Root: dir})
	if err := os.MkdirAll(r.dir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.dir(), stateName), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return r, m
}

// TestUpdate: updates add up, and one that fails leaves what was before.
func TestUpdate(t *testing.T) {
	const mib = 1 << 20
	r, m := grouped(t, &cgroups.Resources{Memory: 100 * mib, PidsLimit: new(int64(50)), CpuPeriod: 100000, CpuQuota: 20000})
	has := func(want string) {
		t.Helper()
		var got []string
		for _, file := range []struct{ controller, one, two string }{
			{"memory", "memory.limit_in_bytes", "memory.max"}, {"pids", "pids.max", "pids.max"}, {"cpu", "cpu.cfs_quota_us", "cpu.max"},
		} {
			name := file.two
			if !cgroups.IsCgroup2UnifiedMode() {
				name = file.one
			}
			text, err := os.ReadFile(filepath.Join(m.Path(file.controller), name))
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, strings.Fields(string(text))[0])
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	has(fmt.Sprint(100*mib, " 50 20000"))
	for _, step := range []struct {
		change specs.LinuxResources
		ok     bool
		want   string
	}{
		{specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: new(int64(200 * mib))}}, true, fmt.Sprint(200*mib, " 50 20000")},
		{specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(60))}}, true, fmt.Sprint(200*mib, " 60 20000")},
		{specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: new(int64(300 * mib))}, Pids: &specs.LinuxPids{Limit: new(int64(70))}, CPU: &specs.LinuxCPU{Cpus: "9999"}}, false, fmt.Sprint(200*mib, " 60 20000")},
		{specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: new(int64(30000))}}, true, fmt.Sprint(200*mib, " 60 30000")},
	} {
		if err := r.Update(t.Context(), &step.change); (err == nil) != step.ok {
			t.Errorf("%+v: %v", step.change, err)
		}
		has(step.want)
	}
}

// TestResources: what an older runc has written down for no limit is none, what a later
// update by the runtime says counts, and what is set by name alone is left out.
func TestResources(t *testing.T) {
	r, _, _ := fakeRuntime(t, os.Getpid(), 1, `{}`)
	write := func(path, text string, at time.Time) {
		t.Helper()
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chtimes(path, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	is := func(memory int64, pids *int64) {
		t.Helper()
		s, ok := r.readState()
		if !ok {
			t.Fatal("the state is not read")
		}
		got, err := r.resources(s)
		if err != nil {
			t.Fatal(err)
		}
		if want := (&cgroups.Resources{Memory: memory, PidsLimit: pids, SkipDevices: true}); !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	const old = `{"id":"a","init_process_pid":1,"cgroup_paths":{"memory":"/x"},"config":{"cgroups":{"path":"/x","memory":5,"pids_limit":0,"devices":[{"type":97,"major":-1,"minor":-1,"permissions":"rwm","allow":false}],"hugetlb_limit":[{"page_size":"2MB","limit":1}],"unified":{"memory.max":"1"},"freezer":"FROZEN","memory_check_before_update":true}}}`
	state, now := filepath.Join(r.dir(), stateName), time.Now()
	write(state, old, now)
	is(5, nil)
	write(filepath.Join(r.bundle, lastSet), `{"memory":7,"pids_limit":9,"unified":{"memory.max":"1"}}`, now.Add(time.Second))
	is(7, new(int64(9)))
	write(state, old, now.Add(2*time.Second))
	is(5, nil)
}

func TestPause(t *testing.T) {
	r, _ := grouped(t, &cgroups.Resources{})
	for _, step := range []struct {
		do   func() error
		want string
	}{
		{func() error { return r.Pause(t.Context()) }, "paused"},
		{func() error { return r.Resume(t.Context()) }, "running"},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if got, err := r.Status(t.Context()); err != nil || got != step.want {
			t.Errorf("%s, %v, want %s", got, err, step.want)
		}
	}
}

// TestAsk: where its files do not say where the control groups are the runtime is asked.
func TestAsk(t *testing.T) {
	r, called, _ := fakeRuntime(t, os.Getpid(), 1, `{}`)
	if err := os.Remove(filepath.Join(r.dir(), stateName)); err != nil {
		t.Fatal(err)
	}
	for verb, do := range map[string]func() error{
		"update": func() error { return r.Update(t.Context(), &specs.LinuxResources{}) },
		"pause":  func() error { return r.Pause(t.Context()) },
		"resume": func() error { return r.Resume(t.Context()) },
	} {
		if err := do(); err != nil {
			t.Errorf("%s: %v", verb, err)
		}
		if args, err := os.ReadFile(called); err != nil || !strings.Contains(string(args), " "+verb+" ") {
			t.Errorf("%s: called with %q, %v", verb, args, err)
		}
	}
}
