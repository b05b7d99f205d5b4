package main

import (
	"bytes"
	"cmp"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestQuantile(t *testing.T) {
	for _, c := range []struct {
		values []float64
		q      float64
		want   float64
	}{
		{nil, 0.5, math.NaN()},
		{[]float64{7}, 0.99, 7},
		{[]float64{1, 2}, 0.5, 1.5},
		{[]float64{1, 2, 3, 4, 5}, 0.5, 3},
		{[]float64{1, 2, 3, 4, 5}, 1, 5},
		{[]float64{0, 10}, 0.9, 9},
	} {
		got := quantile(c.values, c.q)
		if math.Abs(got-c.want) > 1e-9 || math.IsNaN(got) != math.IsNaN(c.want) {
			t.Errorf("quantile %v of %v is %v, want %v", c.q, c.values, got, c.want)
		}
	}
}

// TestRatios: rounds are compared in pairs, and those that cannot be are left
// out.
func TestRatios(t *testing.T) {
	var s sheet
	q := quantity{name: "up", unit: "ms", better: 1}
	s.note(q, "stock", 0, 10, 30, 20)
	s.note(q, "ours", 0, 10)
	s.note(q, "stock", 1, 100)
	s.note(q, "ours", 1, 200, 200)
	s.note(q, "ours", 2, 1) // no partner
	s.note(q, "stock", 3, 0)
	s.note(q, "ours", 3, 1) // nothing to divide by
	if len(s.rows) != 1 {
		t.Fatalf("%d rows", len(s.rows))
	}
	if got := s.rows[0].ratios("ours", "stock"); !slices.Equal(got, []float64{0.5, 2}) {
		t.Errorf("ratios are %v", got)
	}
}

func TestVerdict(t *testing.T) {
	for name, c := range map[string]struct {
		q           quantity
		stock, ours []float64 // a round each
		want        string
		handler     string
	}{
		"own shim":     {quantity{better: 1, own: goals{better: 1. / 3}}, []float64{9, 9}, []float64{3, 3}, "≤ 0.333: met", ownHandler},
		"crun":         {quantity{better: 1, own: goals{better: 1. / 2, crun: 1. / 4}}, []float64{9, 9}, []float64{3, 3}, "≤ 0.25: **missed**", crunHandler},
		"crun as own":  {quantity{better: 1, own: goals{better: 1. / 2}}, []float64{9, 9}, []float64{3, 3}, "≤ 0.5: met", crunHandler},
		"not own":      {quantity{better: 1, own: goals{most: 1}}, []float64{9, 9}, []float64{3, 3}, "≤ 1: met", ""},
		"own limit":    {quantity{unit: "ms", better: 1, own: goals{most: 2}}, []float64{9, 9}, []float64{3, 3}, "≤ 2 ms: **missed**", ownHandler},
		"met":          {quantity{better: 1}, []float64{10, 10}, []float64{9, 10}, "≤ 1: met", ""},
		"missed":       {quantity{better: 0.5}, []float64{10, 10}, []float64{9, 8}, "≤ 0.5: **missed**", ""},
		"undecided":    {quantity{better: 1}, []float64{10, 10, 10}, []float64{9, 11, 12}, "≤ 1: undecided", ""},
		"no goal":      {quantity{}, []float64{10}, []float64{9}, "", ""},
		"no rounds":    {quantity{better: 1}, nil, nil, "", ""},
		"under limit":  {quantity{unit: "ms", high: 0.99, below: 5}, nil, []float64{1, 4.9}, "p99 < 5 ms: met", ""},
		"over limit":   {quantity{unit: "ms", high: 0.99, below: 5}, nil, []float64{6, 40}, "p99 < 5 ms: **missed**", ""},
		"often under":  {quantity{unit: "ms", high: 0.99, below: 5}, nil, []float64{1, 40}, "p99 < 5 ms: undecided", ""},
		"limit, empty": {quantity{unit: "ms", high: 0.99, below: 5}, nil, nil, "", ""},
	} {
		var s sheet
		c.q.name = name
		s.note(c.q, "none", 0)
		for i, v := range c.stock {
			s.note(c.q, "stock", i, v)
		}
		for i, v := range c.ours {
			s.note(c.q, "ours", i, v)
		}
		if got := s.rows[0].verdict(subject{name: "ours", handler: cmp.Or(c.handler, "runc")}, "stock"); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestMarkdown(t *testing.T) {
	r := report{
		options:  options{subjects: []subject{{name: "stock"}, {name: "gantry"}}, command: "make bench"},
		versions: map[string]string{"stock": "containerd 2, handler runc"},
		failures: []string{"density"},
	}
	var s sheet
	s.note(quantity{name: "up", unit: "ms", high: 0.9, better: 1}, "stock", 0, 100, 200)
	s.note(quantity{name: "up"}, "gantry", 0, 75)
	r.tables = []table{{title: "Pods", remark: "Some.", sheet: s}}
	got := r.markdown()
	for _, want := range []string{
		"`make bench`", "- stock: containerd 2, handler runc", "Section density did not", "## Pods\n\nSome.\n",
		"| | stock | gantry | ratio | goal |\n|---|---:|---:|---:|---|\n",
		"| up, ms (p90) | 150 (190) | 75.0 (75.0) | 0.50 | ≤ 1: met |\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
}

func TestParseOptions(t *testing.T) {
	o, err := parseOptions([]string{"-quick", "-rounds", "7", "-only", "syscalls,density", "-subjects", "stock:runc,gantry:runc,gantry:gantry"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range o.subjects {
		names = append(names, s.name+"/"+s.handler)
	}
	if want := []string{"stock/runc", "gantry runc/runc", "gantry gantry/gantry"}; !slices.Equal(names, want) {
		t.Errorf("subjects are %q", names)
	}
	if !o.subjects[0].stock || o.subjects[1].stock || o.rounds != 7 || o.restarts != 7 || o.pods != quick.pods || len(o.only) != 2 {
		t.Errorf("options are %+v", o)
	}
	for _, args := range [][]string{{"-only", "nonsense"}, {"-subjects", "stock"}, {"-subjects", "other:runc"}, {"-subjects", "stock:"}, {"-x"}} {
		if _, err := parseOptions(args); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
}

const straceSample = `27625 execve("/x/containerd-shim-runc-v2", ["/x/containerd-shim-runc-v2", "-namespace", "k8s.io", "-id", "a", "start"], 0x187029042000 /* 47 vars */) = 0
5347  execve("/x/runc", ["runc", "--root", "/r", "kill", "--all", "id", "9"], 0x1 /* 2 vars */ <unfinished ...>
27626 fdatasync(9</t/d/root/meta.db>) = 0
27627 fdatasync(9</t/d/root/meta.db> <unfinished ...>
5347  <... execve resumed>)             = 0
27627 <... fdatasync resumed>)          = 0
27628 execve("/no/runc", ["runc", "create"], 0x1 /* 2 vars */) = -1 ENOENT (No such file or directory)
27629 fsync(4</t/d/state/task/k8s.io/2959d6e631f5571ea9d7aeefee0a85fb1d83b9c6c8845d77fbe1536b01000997/779239100>) = 0
27629 fsync(5</t/d/containers/2959d6e631f5571ea9d7aeefee0a85fb1d83b9c6c8845d77fbe1536b01000997/.tmp-status1481>) = 0
27630 sync() = 0
27631 mount("shm", "/dev/shm", "tmpfs", 0, "mode=1777") = 0
27631 umount2("/dev/shm", MNT_DETACH) = 0
27631 umount2("/dev/shm", MNT_DETACH) = -1 EINVAL (Invalid argument)
27632 syscall_0x1c4(0xd, 0xfeaf62a6e30, 0x21b6, 0, 0, 0) = 0
27633 execve("/proc/self/fd/6", ["runc", "init"], 0x1c9fcca8b000 /* 7 vars */) = 0
27634 +++ exited with 0 +++
`

func TestCount(t *testing.T) {
	c, err := count(strings.NewReader(straceSample), "/t/d")
	if err != nil {
		t.Fatal(err)
	}
	wantSyncs := map[string]int{"root/meta.db": 2, "state/task/k8s.io/ID/N": 1, "containers/ID/.tmp-statusN": 1, "no file": 1}
	if !maps.Equal(c.syncs, wantSyncs) {
		t.Errorf("syncs are %v", c.syncs)
	}
	wantExecs := map[string]int{"containerd-shim-runc-v2 start": 1, "runc kill": 1, "runc init": 1}
	if !maps.Equal(c.execs, wantExecs) {
		t.Errorf("execs are %v", c.execs)
	}
	if c.mounts != 1 || c.unmounts != 2 || c.sum(c.syncs) != 5 {
		t.Errorf("%d mounts, %d unmounts, %d syncs", c.mounts, c.unmounts, c.sum(c.syncs))
	}
}

func FuzzCount(f *testing.F) {
	f.Add([]byte(straceSample))
	f.Add([]byte("1 fsync(3</>) = 0\n1 execve() = 0\n1 execve(\"\", [\"\"]) = 0\n2 fsync(1<"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := count(bytes.NewReader(text), "/t/d")
		if err != nil {
			return // a line too long
		}
		lines := bytes.Count(text, []byte("\n")) + 1
		if n := c.sum(c.syncs) + c.sum(c.execs) + c.mounts + c.unmounts; n > lines {
			t.Errorf("%d calls in %d lines", n, lines)
		}
	})
}

const rollupSample = `55d1c4a00000-7ffd2b5f2000 ---p 00000000 00:00 0                          [rollup]
Rss:               42112 kB
Pss:               40890 kB
Pss_Dirty:         17000 kB
Shared_Clean:       1520 kB
`

func TestParseRollup(t *testing.T) {
	rss, pss, err := parseRollup([]byte(rollupSample))
	if rss != 42112 || pss != 40890 || err != nil {
		t.Errorf("%v, %v, %v", rss, pss, err)
	}
	for _, bad := range []string{"Rss: 1 MB\n", "Pss: x kB\n", "Rss:\n"} {
		if _, _, err := parseRollup([]byte(bad)); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func FuzzParseRollup(f *testing.F) {
	f.Add([]byte(rollupSample))
	f.Add([]byte("Rss: kB\nPss:"))
	f.Fuzz(func(t *testing.T, text []byte) {
		rss, pss, err := parseRollup(text)
		if err != nil && (rss != 0 || pss != 0) {
			t.Errorf("%v and %v beside %v", rss, pss, err)
		}
	})
}

// TestGate: opening lets the one that waits pass, and says when nobody does.
func TestGate(t *testing.T) {
	gate := filepath.Join(t.TempDir(), "gate")
	if err := makeGate(gate); err != nil {
		t.Fatal(err)
	}
	if passed, err := openGate(gate); passed || err != nil {
		t.Errorf("with nobody there: %v, %v", passed, err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(gate)
		done <- err
	}()
	for {
		passed, err := openGate(gate)
		if err != nil {
			t.Fatal(err)
		}
		if passed {
			break
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestParseHandled(t *testing.T) {
	const text = `# HELP grpc_server_handling_seconds Histogram of response latency
grpc_server_handling_seconds_bucket{grpc_method="ListPodSandbox",grpc_service="runtime.v1.RuntimeService",grpc_type="unary",le="0.005"} 297
grpc_server_handling_seconds_bucket{grpc_method="ListPodSandbox",grpc_service="runtime.v1.RuntimeService",grpc_type="unary",le="0.01"} 300
grpc_server_handling_seconds_sum{grpc_method="ListPodSandbox",grpc_service="runtime.v1.RuntimeService",grpc_type="unary"} 0.2
grpc_server_handling_seconds_count{grpc_method="ListPodSandbox",grpc_service="runtime.v1.RuntimeService",grpc_type="unary"} 300
grpc_server_handling_seconds_count{grpc_method="ListPodSandboxStats",grpc_service="runtime.v1.RuntimeService",grpc_type="unary"} 7
`
	got, err := parseHandled(strings.NewReader(text), "ListPodSandbox")
	if want := (handled{300, 297}); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	if over := got.over(handled{100, 99}); over != 1 {
		t.Errorf("%v%% over the limit, want 1", over)
	}
	if _, err := parseHandled(strings.NewReader(strings.ReplaceAll(text, "} 300", "} many")), "ListPodSandbox"); err == nil {
		t.Error("a count that is no number is no error")
	}
}
