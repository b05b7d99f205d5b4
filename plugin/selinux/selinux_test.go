package selinux

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

var targeted = Policy{
	Process: "system_u:system_r:container_t:s0:c1,c2", File: "system_u:object_r:container_file_t:s0:c1,c2",
	KVM: "system_u:system_r:container_kvm_t:s0:c1,c2", Init: "system_u:system_r:container_init_t:s0:c1,c2",
}

// books are records as a store would have them.
type books struct {
	mu   sync.Mutex
	pods map[string]record.Labels
}

func (b *books) list() (out []record.Labels) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, l := range b.pods {
		out = append(out, l)
	}
	return out
}

func (b *books) put(id string, l record.Labels) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pods[id] = l
}

func newLabels(p Policy, categories int) (*Labels, *books) {
	b := &books{pods: map[string]record.Labels{}}
	return New(p, categories, b.list), b
}

func TestAllocate(t *testing.T) {
	for name, tc := range map[string]struct {
		policy  Policy
		options *cri.SELinuxOption
		kvm     bool
		process string
		mount   string
	}{
		"off":           {Policy{}, &cri.SELinuxOption{Type: "x_t", Level: "s0"}, false, "", ""},
		"off, vm":       {Policy{}, nil, true, "", ""},
		"default":       {targeted, nil, false, "system_u:system_r:container_t:s0:c0,c1", "system_u:object_r:container_file_t:s0:c0,c1"},
		"vm":            {targeted, nil, true, "system_u:system_r:container_kvm_t:s0:c0,c1", "system_u:object_r:container_file_t:s0:c0,c1"},
		"vm, no such":   {Policy{Process: targeted.Process, File: targeted.File}, nil, true, "system_u:system_r:container_t:s0:c0,c1", "system_u:object_r:container_file_t:s0:c0,c1"},
		"level":         {targeted, &cri.SELinuxOption{Level: "s0:c7,c8"}, false, "system_u:system_r:container_t:s0:c7,c8", "system_u:object_r:container_file_t:s0:c7,c8"},
		"type":          {targeted, &cri.SELinuxOption{Type: "spc_t"}, false, "system_u:system_r:spc_t:s0:c0,c1", "system_u:object_r:container_file_t:s0:c0,c1"},
		"all":           {targeted, &cri.SELinuxOption{User: "u", Role: "r", Type: "t", Level: "s1"}, false, "u:r:t:s1", "u:object_r:container_file_t:s1"},
		"without level": {Policy{Process: "u:r:t", File: "u:o:f"}, nil, false, "u:r:t", "u:o:f"},
	} {
		l, _ := newLabels(tc.policy, 2) // of two categories there is one pair
		got, err := l.Allocate("pod", tc.options, tc.kvm)
		if want := (record.Labels{Process: tc.process, Mount: tc.mount}); err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, want)
		}
	}
	for field, o := range map[string]*cri.SELinuxOption{
		"user": {User: "a:b"}, "role": {Role: "a b"}, "type": {Type: "a\n"}, "level": {Level: "s0 c1"}, "level: ": {Level: "s0\""},
	} {
		l, _ := newLabels(targeted, 2)
		if got, err := l.Allocate("pod", o, false); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %+v, %v", field, got, err)
		}
		if len(l.pending) != 0 {
			t.Errorf("%s: a level is kept for a pod that is refused", field)
		}
	}
}

// A level is taken while its pod is being recorded and on record, and free when
// neither is so, whatever was called how often.
func TestLevelsAreTakenAndFreed(t *testing.T) {
	const categories, pairs = 4, 6
	l, b := newLabels(targeted, categories)
	have := map[string]string{}
	for i := range pairs {
		id := fmt.Sprint(i)
		got, err := l.Allocate(id, nil, false)
		if err != nil || have[got.Process] != "" {
			t.Fatalf("pod %s: %+v, %v, as pod %s", id, got, err, have[got.Process])
		}
		have[got.Process] = id
		if i%2 == 0 {
			b.put(id, got)
			l.Settled(id)
		}
	}
	if _, err := l.Allocate("more", nil, false); !errdefs.IsResourceExhausted(err) {
		t.Errorf("when all are taken: %v", err)
	}
	// A pod that comes to nothing, told twice; a removed one.
	l.Settled("1")
	l.Settled("1")
	delete(b.pods, "2")
	for range 2 {
		got, err := l.Allocate("new", nil, false)
		if err != nil || have[got.Process] != "1" && have[got.Process] != "2" {
			t.Errorf("%+v, %v", got, err)
		}
		l.Settled("new")
	}
	// Two pods ask for the same level; the end of one frees it for nobody.
	l, b = newLabels(targeted, 2)
	for _, id := range []string{"a", "b"} {
		got, err := l.Allocate(id, &cri.SELinuxOption{Level: "s0:c0,c1"}, false)
		if err != nil {
			t.Fatal(err)
		}
		b.put(id, got)
		l.Settled(id)
	}
	delete(b.pods, "a")
	if _, err := l.Allocate("c", nil, false); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a level that a pod still has was given again: %v", err)
	}
}

func TestAllocateAtOnce(t *testing.T) {
	l, b := newLabels(targeted, 20)
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			id := fmt.Sprint(i)
			got, err := l.Allocate(id, nil, false)
			if err != nil {
				t.Error(err)
			}
			b.put(id, got)
			l.Settled(id)
		})
	}
	wg.Wait()
	seen := map[string]bool{}
	for _, r := range b.list() {
		if seen[r.Process] {
			t.Errorf("%s is there twice", r.Process)
		}
		seen[r.Process] = true
	}
}

func TestContainer(t *testing.T) {
	pod := record.Labels{Process: "system_u:system_r:container_t:s0:c3,c4", Mount: "system_u:object_r:container_file_t:s0:c3,c4"}
	for name, tc := range map[string]struct {
		pod     record.Labels
		options *cri.SELinuxOption
		want    record.Labels
	}{
		"off":   {record.Labels{}, &cri.SELinuxOption{Type: "t"}, record.Labels{}},
		"none":  {pod, nil, pod},
		"empty": {pod, &cri.SELinuxOption{}, pod},
		"type":  {pod, &cri.SELinuxOption{Type: "other_t"}, record.Labels{Process: "system_u:system_r:other_t:s0:c3,c4", Mount: pod.Mount}},
		"level": {pod, &cri.SELinuxOption{Level: "s0:c5"}, record.Labels{Process: "system_u:system_r:container_t:s0:c5", Mount: "system_u:object_r:container_file_t:s0:c5"}},
	} {
		if got, err := Container(tc.pod, tc.options); err != nil || got != tc.want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if _, err := Container(pod, &cri.SELinuxOption{Type: "a:b"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad type: %v", err)
	}
}

// An init system has a type of its own, with the level that the pod has; another
// type than the ordinary one says more than that.
func TestInit(t *testing.T) {
	file := "system_u:object_r:container_file_t:s0:c3,c4"
	without := Policy{Process: targeted.Process, File: targeted.File, Init: targeted.Process}
	for process, want := range map[string]struct {
		policy Policy
		want   string
	}{
		"":                             {Policy{}, ""},
		"u:r:container_t:s0:c3,c4":     {targeted, "u:r:container_init_t:s0:c3,c4"},
		"u:r:container_kvm_t:s0:c3,c4": {targeted, "u:r:container_kvm_t:s0:c3,c4"},
		"u:r:container_t:s0:c3,c5":     {without, "u:r:container_t:s0:c3,c5"},
	} {
		l, _ := newLabels(want.policy, 2)
		if got := l.Init(record.Labels{Process: process, Mount: file}); got.Process != want.want || got.Mount != file {
			t.Errorf("%q: %+v", process, got)
		}
	}
}

// Where SELinux is off, nothing is done to any file, and nothing fails.
func TestOff(t *testing.T) {
	p, err := ReadPolicy()
	if err != nil {
		t.Fatal(err)
	}
	if p.Process != "" {
		t.Skip("SELinux is on here")
	}
	if err := SetFiles("", "/no/such"); err != nil {
		t.Error(err)
	}
	for _, quick := range []bool{false, true} {
		if err := Relabel(record.Labels{}, []string{"/no/such"}, quick); err != nil {
			t.Error(err)
		}
	}
}
