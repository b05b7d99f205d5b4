package stats

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/record"
)

// TestFollow: what the book said is known when it is gone, for containers that
// are followed and until they are forgotten.
func TestFollow(t *testing.T) {
	dir := t.TempDir()
	s := New(facts.Host{Cgroup: facts.Cgroup{Mode: facts.CgroupV2, Controllers: map[string]string{"memory": dir}, Unified: dir}}, fixed, time.Minute)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- s.Run(ctx) }()
	book := func(id string) string { return filepath.Join(dir, id, memoryEvents) }
	put := func(id, text string) record.Container {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(book(id)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(book(id), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		c := newContainer(record.ContainerRunning, "/"+id)
		c.ID = id
		return c
	}
	gone := func(c record.Container) bool {
		t.Helper()
		if err := os.RemoveAll(filepath.Dir(book(c.ID))); err != nil {
			t.Fatal(err)
		}
		got, err := s.OOMKilled(c)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if err := os.WriteFile(filepath.Join(dir, memoryEvents), []byte("oom_kill 0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	const fine, chosen, killed = "max 7\noom 0\noom_kill 0\n", "max 7\noom 1\noom_kill 0\n", "max 7\noom 1\noom_kill 1\n"
	early, late, told, never, unseen := put("early", killed), put("late", fine), put("told", fine), put("never", fine), put("unseen", killed)
	for _, c := range []record.Container{early, late, told, never} {
		if err := s.Follow(c); err != nil {
			t.Fatal(err)
		}
	}
	put("late", killed)
	put("told", chosen)
	eventually(t, "the changes are read", func() bool {
		a, _ := s.kills.get("late")
		b, _ := s.kills.get("told")
		return a.oomed && b.oomed
	})
	// While the book is there it alone counts.
	if got, err := s.OOMKilled(told); got || err != nil {
		t.Errorf("chosen and not killed: %v, %v", got, err)
	}
	for _, tc := range []struct {
		c    record.Container
		want bool
	}{{early, true}, {late, true}, {told, true}, {never, false}, {unseen, false}} {
		if got := gone(tc.c); got != tc.want {
			t.Errorf("%s: %v", tc.c.ID, got)
		}
		s.Forget(tc.c.ID)
		s.Forget(tc.c.ID)
		if got := gone(tc.c); got {
			t.Errorf("%s: remembered after it was forgotten", tc.c.ID)
		}
	}
	if err := s.Follow(never); err == nil {
		t.Error("a cgroup that is not there is followed")
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := s.Follow(put("after", fine)); err == nil {
		t.Error("followed after the end")
	}
}

// TestFollowPod: of a container whose book has gone before it was read the pod's
// book tells, and nothing of those that live on.
func TestFollowPod(t *testing.T) {
	dir := t.TempDir()
	s := New(facts.Host{Cgroup: facts.Cgroup{Mode: facts.CgroupV2, Controllers: map[string]string{"memory": dir}, Unified: dir}}, fixed, time.Minute)
	put := func(group string, kills int) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(dir, group), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, group, memoryEvents), fmt.Appendf(nil, "oom 0\noom_kill %d\n", kills), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("pod", 4) // of before
	var all []record.Container
	for _, id := range []string{"dies", "lives", "early"} {
		put("pod/"+id, 0)
		c := newContainer(record.ContainerRunning, "/pod/"+id)
		c.ID = id
		if err := s.Follow(c); err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	gone := func(c record.Container, want bool) {
		t.Helper()
		if err := os.RemoveAll(filepath.Join(dir, "pod", c.ID)); err != nil {
			t.Fatal(err)
		}
		if got, err := s.OOMKilled(c); got != want || err != nil {
			t.Errorf("%s: %v, %v", c.ID, got, err)
		}
	}
	gone(all[2], false)
	put("pod", 5)
	gone(all[0], true)
	eventually(t, "the other was not meant", func() bool {
		f, _ := s.kills.get("lives")
		return f.rung.IsZero()
	})
	gone(all[1], false)
	for _, c := range all {
		s.Forget(c.ID)
	}
	if len(s.kills.pods) > 0 || len(s.kills.watches) > 0 || len(s.kills.follows) > 0 {
		t.Errorf("left: %v, %v, %v", s.kills.pods, s.kills.watches, s.kills.follows)
	}
}

// TestChanged: events of any form; when the kernel dropped some, every
// container is looked at.
func TestChanged(t *testing.T) {
	k := newKills(false)
	k.watches = map[int32]string{1: "a", 2: "b"}
	k.follows = map[string]follow{"a": {watch: 1}, "b": {watch: 2}}
	event := func(wd int32, mask uint32, name string) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(wd))
		b = binary.NativeEndian.AppendUint32(b, mask)
		b = binary.NativeEndian.AppendUint32(b, 0)
		b = binary.NativeEndian.AppendUint32(b, uint32(len(name)))
		return append(b, name...)
	}
	for name, tc := range map[string]struct {
		events [][]byte
		want   []string
	}{
		"none":       {nil, nil},
		"one":        {[][]byte{event(2, unix.IN_MODIFY, "")}, []string{"b"}},
		"a stranger": {[][]byte{event(9, unix.IN_MODIFY, ""), event(1, unix.IN_MODIFY, "")}, []string{"a"}},
		"named":      {[][]byte{event(9, unix.IN_MODIFY, "name"), event(1, unix.IN_MODIFY, "")}, []string{"a"}},
		"dropped":    {[][]byte{event(-1, unix.IN_Q_OVERFLOW, "")}, []string{"a", "b"}},
		"cut short":  {[][]byte{event(1, unix.IN_MODIFY, ""), event(2, unix.IN_MODIFY, "")[:7]}, []string{"a"}},
	} {
		got := k.changed(slices.Concat(tc.events...))
		slices.Sort(got)
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}
