package networktest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/gantry-cri/gantry/plugin/network"
	"github.com/gantry-cri/gantry/plugin/network/hostport"
	"github.com/gantry-cri/gantry/plugin/record"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Effects of a Fake, in the order in which a pod meets them. Those of host ports
// are had by pods that ask for some.
const (
	EffectCreateNS = "create netns"
	EffectSave     = "save attachment"
	EffectAdd      = "add"
	EffectMap      = "map host ports"
	EffectUnmap    = "unmap host ports"
	EffectDel      = "del"
	EffectRemoveNS = "remove netns"
)

// Fake is a network in memory. Its state is the host's: it outlives the
// service under test, which is killed and started again around it.
type Fake struct {
	mu      sync.Mutex
	netns   map[string]string     // path by pod
	saved   map[string]bool       // pods whose attachment was begun
	ips     map[string]netip.Addr // by pod
	mapped  map[string]int        // ports by pod
	claims  hostport.Claims
	last    netip.Addr // given
	effects int
	faults  []fault
	hook    func(ctx context.Context, effect, id string) error
	unready error
}

type fault struct {
	at    int
	after bool
	err   error
}

// NewFake returns a network without pods that is ready.
func NewFake() *Fake {
	return &Fake{
		netns: map[string]string{}, saved: map[string]bool{}, ips: map[string]netip.Addr{}, mapped: map[string]int{},
		last: netip.MustParseAddr("10.88.0.1"),
	}
}

// FailAt makes the nth effect from now, counted from 1, fail without
// happening.
func (f *Fake) FailAt(n int, err error) { f.inject(n, false, err) }

// FailAfter makes the nth effect from now happen and fail all the same.
func (f *Fake) FailAfter(n int, err error) { f.inject(n, true, err) }

func (f *Fake) inject(n int, after bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, fault{at: f.effects + n, after: after, err: err})
}

// Hook calls fn before each effect, without a lock: it may block, cancel what
// it knows of, or fail the effect. A nil fn ends it.
func (f *Fake) Hook(fn func(ctx context.Context, effect, id string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = fn
}

// Effects counts what has been tried so far.
func (f *Fake) Effects() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.effects
}

// SetReady makes Ready and, if err is not nil, Attach return err; a nil err
// makes the network ready again.
func (f *Fake) SetReady(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unready = err
}

// Held lists what is allocated, sorted: "netns ID", "attachment ID",
// "address ID IP" and "host ports ID".
func (f *Fake) Held() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var held []string
	for id := range f.netns {
		held = append(held, "netns "+id)
	}
	for id := range f.saved {
		held = append(held, "attachment "+id)
	}
	for id, ip := range f.ips {
		held = append(held, fmt.Sprintf("address %s %s", id, ip))
	}
	for id := range f.mapped {
		held = append(held, "host ports "+id)
	}
	slices.Sort(held)
	return held
}

// effect does one thing to the host, or has a fault instead or on top.
func (f *Fake) effect(ctx context.Context, name, id string, do func()) error {
	f.mu.Lock()
	hook := f.hook
	f.mu.Unlock()
	if hook != nil {
		if err := hook(ctx, name, id); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.effects++
	i := slices.IndexFunc(f.faults, func(x fault) bool { return x.at == f.effects })
	if i >= 0 && !f.faults[i].after {
		return f.faults[i].err
	}
	do()
	if i >= 0 {
		return f.faults[i].err
	}
	return nil
}

// NSPath is where the pod's namespace is, or would be.
func (f *Fake) NSPath(id string) string { return "/run/fake/netns/" + id }

// CreateNS makes the pod's namespace unless there is one.
func (f *Fake) CreateNS(ctx context.Context, id string) (string, error) {
	if err := (network.Attachment{ID: id}).Validate(); err != nil {
		return "", fmt.Errorf("create network namespace: %w", err)
	}
	path := f.NSPath(id)
	if f.has(id) {
		return path, nil
	}
	err := f.effect(ctx, EffectCreateNS, id, func() { f.netns[id] = path })
	if err != nil {
		return "", fmt.Errorf("create network namespace: %w", err)
	}
	return path, nil
}

// PinNS makes the pod's namespace of another one; a Fake cares not which.
func (f *Fake) PinNS(ctx context.Context, id, source string) (string, error) {
	if source == "" {
		return "", fmt.Errorf("create network namespace: no source: %w", errdefs.ErrInvalidArgument)
	}
	return f.CreateNS(ctx, id)
}

func (f *Fake) has(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.netns[id] != ""
}

// Attach gives the pod an address that no other pod has.
func (f *Fake) Attach(ctx context.Context, a network.Attachment, netns string) (record.Network, error) {
	if (record.Sandbox{Config: a.Pod}).HostNetwork() {
		return record.Network{}, nil
	}
	n, err := f.attach(ctx, a, netns)
	if err != nil {
		return record.Network{}, fmt.Errorf("attach network: %w", err)
	}
	return n, nil
}

func (f *Fake) attach(ctx context.Context, a network.Attachment, netns string) (record.Network, error) {
	if err := a.Validate(); err != nil {
		return record.Network{}, err
	}
	if err := f.reason(); err != nil {
		return record.Network{}, err
	}
	if netns == "" {
		return record.Network{}, fmt.Errorf("no network namespace: %w", errdefs.ErrInvalidArgument)
	}
	if f.begun(a.ID) {
		if err := f.undo(ctx, a.ID); err != nil {
			return record.Network{}, err
		}
	}
	ports := hostPorts(a.Pod)
	if err := f.claims.Take(a.ID, a.Pod.GetMetadata().GetName(), ports); err != nil {
		return record.Network{}, err
	}
	if err := f.effect(ctx, EffectSave, a.ID, func() { f.saved[a.ID] = true }); err != nil {
		return record.Network{}, err
	}
	var ip netip.Addr
	err := f.effect(ctx, EffectAdd, a.ID, func() {
		f.last = f.last.Next()
		ip = f.last
		f.ips[a.ID] = ip
	})
	if err != nil {
		return record.Network{}, err
	}
	if len(ports) > 0 {
		if err := f.effect(ctx, EffectMap, a.ID, func() { f.mapped[a.ID] = len(ports) }); err != nil {
			return record.Network{}, err
		}
	}
	result := fmt.Sprintf(`{"cniVersion":"1.1.0","ips":[{"address":"%s/16"}],"dns":{}}`, ip)
	return record.Network{NetNS: netns, IPs: []string{ip.String()}, Result: []byte(result)}, nil
}

// Detach gives back what the pod has.
func (f *Fake) Detach(ctx context.Context, a network.Attachment) error {
	if (record.Sandbox{Config: a.Pod}).HostNetwork() {
		return nil
	}
	if err := f.detach(ctx, a.ID); err != nil {
		return fmt.Errorf("detach network: %w", err)
	}
	return nil
}

func (f *Fake) detach(ctx context.Context, id string) error {
	if err := (network.Attachment{ID: id}).Validate(); err != nil {
		return err
	}
	if f.begun(id) {
		if err := f.undo(ctx, id); err != nil {
			return err
		}
	}
	if f.has(id) || f.begun(id) {
		if err := f.effect(ctx, EffectRemoveNS, id, func() {
			delete(f.netns, id)
			delete(f.saved, id)
		}); err != nil {
			return err
		}
	}
	f.claims.Drop(id)
	return nil
}

// undo takes the ports before the address.
func (f *Fake) undo(ctx context.Context, id string) error {
	if f.isMapped(id) {
		if err := f.effect(ctx, EffectUnmap, id, func() { delete(f.mapped, id) }); err != nil {
			return err
		}
	}
	return f.effect(ctx, EffectDel, id, func() { delete(f.ips, id) })
}

func (f *Fake) isMapped(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mapped[id] > 0
}

// hostPorts are the ports of the node that a pod asks for, on every address.
func hostPorts(pod *cri.PodSandboxConfig) (ports []hostport.Mapping) {
	for _, p := range pod.GetPortMappings() {
		if p.GetHostPort() > 0 {
			ports = append(ports, hostport.Mapping{HostPort: uint16(p.GetHostPort()), Protocol: hostport.TCP, PodPort: uint16(p.GetContainerPort())})
		}
	}
	return ports
}

func (f *Fake) begun(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.saved[id]
}

// GC gives back what no live pod has.
func (f *Fake) GC(ctx context.Context, live network.Live) error {
	f.mu.Lock()
	ids := slices.Sorted(maps.Keys(f.netns))
	for id := range f.saved {
		if f.netns[id] == "" {
			ids = append(ids, id)
		}
	}
	f.mu.Unlock()
	alive, err := live(ctx)
	if err != nil {
		return fmt.Errorf("collect network leftovers: %w", err)
	}
	var errs []error
	for _, id := range ids {
		if !slices.Contains(alive, id) {
			errs = append(errs, f.detach(ctx, id))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("collect network leftovers: %w", err)
	}
	return nil
}

// Check reports whether the pod is attached.
func (f *Fake) Check(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.ips[id].IsValid() || f.netns[id] == "" {
		return fmt.Errorf("check network: sandbox %s is not attached: %w", id, errdefs.ErrNotFound)
	}
	return nil
}

// List returns the pods that have a namespace, sorted.
func (f *Fake) List() ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.netns)), nil
}

// Ready returns what SetReady was given.
func (f *Fake) Ready(context.Context) error { return f.reason() }

func (f *Fake) reason() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.unready
}

// UpdatePodCIDR accepts everything: a Fake needs no configuration.
func (f *Fake) UpdatePodCIDR(context.Context, string) error { return nil }
