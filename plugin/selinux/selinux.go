// Package selinux has the SELinux labels of pods: it reads from the policy what
// a container's label looks like, gives each pod categories that no other has,
// and sets labels on files.
//
// It keeps no books of its own that could disagree with the records: a level is
// taken for as long as a record has it, or a pod is being recorded, so a level
// is never given back twice, and never kept. On a machine where SELinux is off
// every label is "", and nothing is done. Start at Labels.
package selinux

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/selinux/go-selinux"
	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// Policy is what containers' labels begin as, from the machine's policy. All
// are "" where SELinux is off.
type Policy struct {
	// Process and File are those of ordinary containers, KVM the process label
	// of those in a virtual machine, Init of those whose first process is an
	// init system. A policy that has none of these has the ordinary one there.
	Process, File, KVM, Init string
}

// ReadPolicy asks the machine.
func ReadPolicy() (Policy, error) {
	if !selinux.GetEnabled() {
		return Policy{}, nil
	}
	process, file, err := label.InitLabels(nil)
	if err != nil {
		return Policy{}, fmt.Errorf("read SELinux policy: %w (%w)", err, errdefs.ErrFailedPrecondition)
	}
	// Its level is an example, of which the library keeps books.
	selinux.ReleaseLabel(process)
	p := Policy{Process: process, File: file}
	for kind, label := range map[selinux.ProcessKind]*string{selinux.ProcessKindKVM: &p.KVM, selinux.ProcessKindInit: &p.Init} {
		if *label, err = selinux.SetProcessKind(process, kind); err != nil {
			return Policy{}, fmt.Errorf("read SELinux policy: %w (%w)", err, errdefs.ErrFailedPrecondition)
		}
	}
	return p, nil
}

// Labels gives pods their labels.
type Labels struct {
	policy Policy
	// categories is how many there are to choose from.
	categories int
	// recorded lists the labels of all pods on record.
	recorded func() []record.Labels

	mu sync.Mutex
	// pending are the levels of pods that are not on record yet, by ID.
	pending map[string]string
}

// New returns labels from the policy with categories below the bound.
func New(p Policy, categories int, recorded func() []record.Labels) *Labels {
	return &Labels{policy: p, categories: categories, recorded: recorded, pending: map[string]string{}}
}

// Allocate returns the labels of the pod id: the policy's, with what the
// options say and, unless they have a level, categories that no other pod has.
// These are taken until Settled is called, and then for as long as the record
// has them.
func (l *Labels) Allocate(id string, o *cri.SELinuxOption, kvm bool) (record.Labels, error) {
	base := l.policy.Process
	if kvm && l.policy.KVM != "" {
		base = l.policy.KVM
	}
	if base == "" {
		return record.Labels{}, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	level := o.GetLevel()
	if level == "" {
		var err error
		if level, err = l.free(base); err != nil {
			return record.Labels{}, fmt.Errorf("allocate SELinux level: %w", err)
		}
	}
	out, err := compose(base, l.policy.File, level, o)
	if err != nil {
		return record.Labels{}, fmt.Errorf("security_context.selinux_options: %w", err)
	}
	l.pending[id] = level
	return out, nil
}

// Settled says that the pod is on record, or will not be.
func (l *Labels) Settled(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.pending, id)
}

// Init returns a container's labels for an init system, which may do more than
// other programs, such as making groups of its own. Another type than that of
// ordinary containers is kept.
func (l *Labels) Init(c record.Labels) record.Labels {
	p, err := parse(c.Process)
	ordinary, err2 := parse(l.policy.Process)
	special, err3 := parse(l.policy.Init)
	if errors.Join(err, err2, err3) != nil || p.kind != ordinary.kind {
		return c
	}
	p.kind = special.kind
	c.Process = p.String()
	return c
}

// tries is how often a pair of categories is drawn before all are looked
// through.
const tries = 16

// free finds a level that no pod has. A policy without levels has none.
func (l *Labels) free(base string) (string, error) {
	b, err := parse(base)
	if err != nil || b.level == "" {
		return "", err
	}
	used := map[string]bool{}
	for _, r := range l.recorded() {
		if c, err := parse(r.Process); err == nil {
			used[c.level] = true
		}
	}
	for _, level := range l.pending {
		used[level] = true
	}
	pair := func(low, high int) string { return fmt.Sprintf("%s:c%d,c%d", b.sensitivity(), low, high) }
	for range tries {
		low, high := rand.IntN(l.categories), rand.IntN(l.categories)
		if low > high {
			low, high = high, low
		}
		if level := pair(low, high); low != high && !used[level] {
			return level, nil
		}
	}
	for low := range l.categories {
		for high := low + 1; high < l.categories; high++ {
			if level := pair(low, high); !used[level] {
				return level, nil
			}
		}
	}
	return "", fmt.Errorf("all pairs of %d categories are in use: %w", l.categories, errdefs.ErrResourceExhausted)
}

// MountOption is the option that gives a whole mount a label.
func MountOption(fileLabel string) string { return label.FormatMountLabel("", fileLabel) }

// SetFiles sets the label of files that are ours.
func SetFiles(fileLabel string, paths ...string) error {
	for _, p := range paths {
		if err := label.SetFileLabel(p, fileLabel); err != nil {
			return fmt.Errorf("label %s: %w", p, err)
		}
	}
	return nil
}

// superPrivileged is the type of processes that may use files of any label.
const superPrivileged = "spc_t"

// Relabel gives volumes, with all in them, to the containers with the labels.
// What has the label already is left as it is; quick takes a volume that has it
// for one that has it all through. Nothing is done for processes that need no
// label, nor where a file system keeps none. Directories of the system are
// refused.
func Relabel(labels record.Labels, paths []string, quick bool) error {
	if c, err := parse(labels.Process); err == nil && c.kind == superPrivileged {
		return nil
	}
	for _, p := range paths {
		if has, err := selinux.FileLabel(p); quick && err == nil && has == labels.Mount {
			continue
		}
		if err := label.Relabel(p, labels.Mount, false); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("relabel %s: %w (%w)", p, err, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}
