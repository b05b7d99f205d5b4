package hostport

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/gantry-cri/gantry/plugin/flight"
)

// Options are what a Table is made of.
type Options struct {
	// Name is that of the table or, with an ending, of the chains.
	Name string
	// Engine is empty for what the kernel has.
	Engine Engine
	// Note is the path of a file that is there as long as there may be rules of
	// iptables, and says which of its tools made them.
	Note string
}

// Table has the ports of one daemon, in the daemon's network namespace. It is safe
// for concurrent use; one change is made after the other.
type Table struct {
	options Options
	turn    flight.Turns[struct{}]
	// The rest is for who has the turn.

	engine engine // nil before the first use
	// pods are those that have ports, nil before the kernel was asked.
	pods map[string]state
	// seen is the generation of the kernel's rules that was found whole.
	seen string
}

// state is what the kernel is to have for a pod.
type state struct {
	elements map[element]bool
	// open is the interface that has to route loopback addresses, if any.
	open string
}

// content is what the kernel has of a table.
type content struct {
	owners map[element]string
	opened []string // names of interfaces that route loopback addresses
	// exists says that there is anything, whole that nothing of the rules around
	// the elements is missing.
	exists, whole bool
}

// engine is a way to have elements in the kernel.
type engine interface {
	// read returns what there is; a kernel that cannot have any has none.
	read(ctx context.Context) (content, error)
	// write makes what was read into what is wanted, which is not nothing; of one
	// family of addresses it does all or nothing.
	write(ctx context.Context, have, want content) error
	// remove ends whatever there is.
	remove(ctx context.Context) error
	// generation changes whenever what read returns does; empty if that cannot be
	// told without reading.
	generation() string
}

// change says what is to become of a pod's elements.
type change struct {
	pod  string
	want state
	// anew makes the rules new also if they are there.
	anew bool
}

// outcome is what a change did.
type outcome struct {
	added, removed map[element]bool
	changed        bool
}

// New makes a table; nothing is in the kernel before there is a port to map.
func New(o Options) *Table { return &Table{options: o} }

// Map makes the node's ports lead to the pod, those of its list and no other. The
// pod's flows that were on another way before are forgotten.
func (t *Table) Map(ctx context.Context, p Pod) error {
	if err := Supported(p.Ports); err != nil {
		return err
	}
	want, err := p.elements()
	if err != nil {
		return err
	}
	if err := t.change(ctx, change{pod: p.ID, want: state{want, uplink(ctx, p)}}); err != nil {
		return fmt.Errorf("map host ports: %w", err)
	}
	forget(ctx, want, true)
	return nil
}

// Unmap takes a pod's ports back, whatever it has.
func (t *Table) Unmap(ctx context.Context, id string) error {
	if err := t.change(ctx, change{pod: id}); err != nil {
		return fmt.Errorf("unmap host ports: %w", err)
	}
	return nil
}

// Renew makes the rules of the table anew around the ports that it has, or removes
// it when it has none: they may be those of an earlier release, or half gone.
func (t *Table) Renew(ctx context.Context) error {
	if err := t.change(ctx, change{anew: true}); err != nil {
		return fmt.Errorf("renew host ports: %w", err)
	}
	return nil
}

// Pods are the IDs of those that have ports.
func (t *Table) Pods(ctx context.Context) ([]string, error) {
	done, err := t.begin(ctx, false)
	if err != nil {
		return nil, fmt.Errorf("list host ports: %w", err)
	}
	defer done()
	return slices.Sorted(maps.Keys(t.pods)), nil
}

// Mend puts back what somebody else took out of the kernel, and reports whether
// anything was missing. Where nothing has changed it costs next to nothing.
func (t *Table) Mend(ctx context.Context) (bool, error) {
	done, err := t.turn.Take(ctx, struct{}{})
	if err != nil {
		return false, err
	}
	defer done()
	if len(t.pods) == 0 {
		return false, nil
	}
	generation := t.engine.generation() // before anything is read
	if generation != "" && generation == t.seen && !closedAny(t.pods) {
		return false, nil
	}
	out, err := t.apply(ctx, change{})
	if err != nil {
		return false, fmt.Errorf("mend host ports: %w", err)
	}
	if !out.changed {
		t.seen = generation
		return false, nil
	}
	forget(ctx, out.added, true)
	return true, nil
}

// begin takes the turn, with an engine and the pods that have ports.
func (t *Table) begin(ctx context.Context, need bool) (done func(), err error) {
	done, err = t.turn.Take(ctx, struct{}{})
	if err != nil {
		return nil, err
	}
	if err = t.pick(ctx, need); err == nil {
		err = t.know(ctx)
	}
	if err != nil {
		done()
		return nil, err
	}
	return done, nil
}

// know asks the kernel which pods have ports, once: nobody else gives any.
func (t *Table) know(ctx context.Context) error {
	if t.pods != nil {
		return nil
	}
	have, err := t.engine.read(ctx)
	if err != nil {
		return err
	}
	t.pods = map[string]state{}
	for e, pod := range have.owners {
		if _, ok := t.pods[pod]; !ok {
			t.pods[pod] = state{elements: map[element]bool{}}
		}
		t.pods[pod].elements[e] = true
	}
	return nil
}

// tries is how often a change is tried: others may change the rules meanwhile.
const tries = 3

func (t *Table) change(ctx context.Context, c change) error {
	wanted := len(c.want.elements) > 0
	done, err := t.begin(ctx, wanted)
	if err != nil {
		return err
	}
	defer done()
	if _, has := t.pods[c.pod]; !wanted && !has && !c.anew {
		return nil
	}
	if err := c.conflict(t.pods); err != nil {
		return err
	}
	var out outcome
	for range tries {
		if out, err = t.apply(ctx, c); err == nil || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return err
	}
	forget(ctx, out.removed, false)
	return nil
}

// apply makes what there is into what there should be after the change. A pod that
// gets ports is noted before it has one, and one that loses them after the last
// has gone.
func (t *Table) apply(ctx context.Context, c change) (outcome, error) {
	have, err := t.engine.read(ctx)
	if err != nil {
		return outcome{}, err
	}
	have.whole = have.whole && !c.anew
	next := c.next(t.pods)
	want := content{owners: owners(next), opened: interfaces(have.opened, t.pods, next)}
	out := difference(have.owners, want.owners)
	for e := range t.pods[c.pod].elements {
		if _, stays := want.owners[e]; !stays {
			out.removed[e] = true // somebody may have taken the rule, but not its flows
		}
	}
	if len(want.owners) == 0 {
		err = clear(ctx, t.engine, content{exists: have.exists, opened: want.opened})
		if err == nil {
			t.pods = next
		}
		return out, err
	}
	out.changed = len(out.added)+len(out.removed) > 0 || !have.whole || !slices.Equal(have.opened, want.opened)
	if len(c.want.elements) > 0 {
		t.pods[c.pod] = c.want
	}
	if out.changed {
		if err := t.engine.write(ctx, have, want); err != nil {
			return outcome{}, err
		}
	}
	t.pods = next
	// Also when they were noted: an earlier daemon may have died before it did it,
	// and others set what they like.
	for _, name := range want.opened {
		if closed(name) {
			out.changed = true
			route(ctx, name, true)
		}
	}
	return out, nil
}

// clear ends all that an engine has, after the interfaces are as they were.
func clear(ctx context.Context, e engine, have content) error {
	for _, name := range have.opened {
		route(ctx, name, false)
	}
	if !have.exists {
		return nil
	}
	return e.remove(ctx)
}

// next is what there is to be after the change.
func (c change) next(pods map[string]state) map[string]state {
	next := maps.Clone(pods)
	if c.pod != "" {
		delete(next, c.pod)
	}
	if len(c.want.elements) > 0 {
		next[c.pod] = c.want
	}
	return next
}

// conflict reports an element that another pod has.
func (c change) conflict(pods map[string]state) error {
	keys := map[element]bool{}
	for e := range c.want.elements {
		keys[element{set: e.set, key: e.key}] = true
	}
	for id, s := range pods {
		if id == c.pod || len(keys) == 0 {
			continue
		}
		for e := range s.elements {
			if keys[element{set: e.set, key: e.key}] {
				return &Conflict{Want: portOf(e), Has: portOf(e), ID: id}
			}
		}
	}
	return nil
}

func owners(pods map[string]state) map[element]string {
	out := map[element]string{}
	for id, s := range pods {
		for e := range s.elements {
			out[e] = id
		}
	}
	return out
}

// difference is what is to be added to and removed from what there is.
func difference(have, want map[element]string) outcome {
	out := outcome{added: map[element]bool{}, removed: map[element]bool{}}
	for e, owner := range want {
		if has, ok := have[e]; !ok || has != owner {
			out.added[e] = true
		}
	}
	for e, owner := range have {
		if wants, ok := want[e]; !ok || wants != owner {
			out.removed[e] = true
		}
	}
	return out
}

// errNoEngine is wrapped by what tells why there is none.
var errNoEngine = errors.New("neither nftables nor iptables can map ports of the node (cni.host_ports has other ways)")
