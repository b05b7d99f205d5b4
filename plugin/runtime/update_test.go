package runtime

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// members is a control group of real processes, some of which come late.
type members struct {
	Cgroups
	rounds [][]int
	asked  int
	wrote  map[string]string
	err    error
}

func (g *members) Procs(string) ([]int, error) {
	g.asked++
	return append([]int{}, g.rounds[min(g.asked-1, len(g.rounds)-1)]...), nil
}

func (g *members) Set(path, file, value string) error {
	g.wrote[path+" "+file] = value
	return g.err
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
}
