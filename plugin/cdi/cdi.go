// Package cdi gives containers the devices that vendors describe in files, by
// the Container Device Interface: nodes, mounts, environment and hooks.
//
// It owns the view of the description files and the step that puts a device's
// edits into a specification. It never decides which devices a container gets.
// There is no watch: whether the files changed is looked up when a device is
// wanted, so that one which was described a moment ago is found, and one which
// is gone is not. A file that cannot be read costs its own devices only. Start
// reading at Inject.
package cdi

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

// Devices finds and injects devices. Create it with New.
type Devices struct {
	dirs []string

	mu    sync.Mutex
	cache *cdi.Cache
	// seen is the state of the files that cache was read from, "" for one that
	// may have changed while it was read.
	seen string
}

// New returns the devices described in the directories; what is in a later one
// wins. No directory means that there are no devices.
func New(dirs []string) *Devices { return &Devices{dirs: slices.Clone(dirs)} }

// Inject puts the edits of the devices into the specification. All of them are
// found before the first is put there; after an error the specification is of
// no use.
func (d *Devices) Inject(s *specs.Spec, names []string) error {
	if len(names) == 0 {
		return nil
	}
	if len(d.dirs) == 0 {
		return fmt.Errorf("inject CDI devices %s: cdi_spec_dirs is empty: %w", strings.Join(names, ", "), errdefs.ErrFailedPrecondition)
	}
	cache, err := d.current()
	if err != nil {
		return fmt.Errorf("inject CDI devices %s: %w", strings.Join(names, ", "), err)
	}
	edits, missing := find(cache, names)
	if len(missing) > 0 {
		return fmt.Errorf("inject CDI devices: %s: not described in %s%s: %w",
			strings.Join(missing, ", "), strings.Join(d.dirs, ", "), faults(cache), errdefs.ErrNotFound)
	}
	// This looks at the nodes on the host, and keeps what it saw in the edits.
	if edits, err = copied(edits); err != nil {
		return fmt.Errorf("inject CDI devices %s: %w", strings.Join(names, ", "), err)
	}
	if err := edits.Apply(s); err != nil {
		return fmt.Errorf("inject CDI devices %s: %w (%w)", strings.Join(names, ", "), err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// find returns the edits of the devices, each after those of its whole
// description, and the devices that are not described.
func find(cache *cdi.Cache, names []string) (edits *cdi.ContainerEdits, missing []string) {
	edits = &cdi.ContainerEdits{}
	seen := map[*cdi.Spec]bool{}
	for _, name := range names {
		d := cache.GetDevice(name)
		if d == nil {
			missing = append(missing, name)
			continue
		}
		if s := d.GetSpec(); !seen[s] {
			seen[s] = true
			edits.Append(&cdi.ContainerEdits{ContainerEdits: &s.ContainerEdits})
		}
		edits.Append(&cdi.ContainerEdits{ContainerEdits: &d.ContainerEdits})
	}
	return edits, missing
}

// copied returns edits that share nothing with those in the cache.
func copied(edits *cdi.ContainerEdits) (*cdi.ContainerEdits, error) {
	b, err := json.Marshal(edits.ContainerEdits)
	if err != nil {
		return nil, fmt.Errorf("copy edits: %w", err)
	}
	out := &cdi.ContainerEdits{}
	if err := json.Unmarshal(b, &out.ContainerEdits); err != nil {
		return nil, fmt.Errorf("copy edits: %w", err)
	}
	return out, nil
}

// current returns the descriptions as the files have them now.
func (d *Devices) current() (*cdi.Cache, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, newest := state(d.dirs)
	if d.cache != nil && d.seen == now {
		return d.cache, nil
	}
	cache, err := cdi.NewCache(cdi.WithAutoRefresh(false), cdi.WithSpecDirs(d.dirs...))
	if err != nil {
		return nil, err
	}
	d.cache, d.seen = cache, now
	if time.Since(newest) < settled {
		d.seen = "" // a second change within the same tick of the clock looks the same
	}
	return cache, nil
}

// maxFaults bounds how many files an error names.
const maxFaults = 4

// faults says which files could not be used, as one of them may have the device
// that is missing.
func faults(c *cdi.Cache) string {
	all := c.GetErrors()
	var text strings.Builder
	for i, path := range slices.Sorted(maps.Keys(all)) {
		if i == maxFaults {
			fmt.Fprintf(&text, "; and %d more", len(all)-i)
			break
		}
		fmt.Fprintf(&text, "; %s cannot be used: %.256v", path, all[path][0])
	}
	return text.String()
}
