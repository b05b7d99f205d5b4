// Package hostport gives ports of the node to pods, in a table of nftables of its
// own or, on a kernel without, in chains of iptables.
//
// A Table is changed by whole pods, in one transaction each (with iptables one of
// each family of addresses), which the kernel does or does not do: a pod's ports
// are there as it has them, or as it had them before. What belongs to which pod is
// written at the elements themselves, so the table can be put right by a daemon
// that knows nothing but the IDs of its pods. With the last pod the table goes.
// What others remove is put back. Claims tell who has asked for which port, so that
// no pod takes another's.
//
// Only traffic to addresses of the node itself is taken, from outside, from pods
// and from the node; of the loopback addresses those of IPv4, as the kernel sends
// nothing out that comes from the one of IPv6. The package knows no CNI and keeps
// nothing on disk.
//
// Start reading at Mapping and Table; elements.go has what a pod's ports are made
// of (pure), engine.go which engine is taken, rules.go and nftables.go the one,
// iptables.go (pure) and xtables.go the other, flows.go the flows that the kernel
// remembers.
package hostport

import (
	"fmt"
	"net/netip"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Protocol is a transport protocol's number.
type Protocol uint8

// The protocols that have ports which can be mapped.
const (
	TCP  Protocol = unix.IPPROTO_TCP
	UDP  Protocol = unix.IPPROTO_UDP
	SCTP Protocol = unix.IPPROTO_SCTP
)

func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case SCTP:
		return "SCTP"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// Mapping is a port of the node that leads to a port of a pod.
type Mapping struct {
	// HostIP is the node's address; the zero Addr stands for all of them, an
	// unspecified one for all of its family.
	HostIP   netip.Addr
	HostPort uint16
	Protocol Protocol
	PodPort  uint16
}

func (m Mapping) String() string {
	switch {
	case !m.HostIP.IsValid():
		return fmt.Sprintf("%s port %d", m.Protocol, m.HostPort)
	case m.HostIP.IsUnspecified():
		return fmt.Sprintf("%s port %d of %s", m.Protocol, m.HostPort, family(m.HostIP))
	}
	return fmt.Sprintf("%s port %d of %s", m.Protocol, m.HostPort, m.HostIP)
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// wild reports whether all addresses of a family, or of both, are meant.
func (m Mapping) wild() bool { return !m.HostIP.IsValid() || m.HostIP.IsUnspecified() }

// covers reports whether addresses of the family of a are meant.
func (m Mapping) covers(a netip.Addr) bool { return !m.HostIP.IsValid() || m.HostIP.Is4() == a.Is4() }

// overlaps reports whether there is traffic that both would take.
func (m Mapping) overlaps(o Mapping) bool {
	switch {
	case m.Protocol != o.Protocol || m.HostPort != o.HostPort:
		return false
	case !m.HostIP.IsValid() || !o.HostIP.IsValid():
		return true
	case m.HostIP.Is4() != o.HostIP.Is4():
		return false
	}
	return m.wild() || o.wild() || m.HostIP == o.HostIP
}

// Conflict is the error of a port that another pod has.
type Conflict struct {
	Want, Has Mapping
	// ID and Pod are the other pod's; Pod is its name and may be unknown.
	ID, Pod string
}

func (c *Conflict) Error() string {
	who := "sandbox " + c.ID
	if c.Pod != "" {
		who = "pod " + c.Pod + " (" + who + ")"
	}
	if c.Want == c.Has {
		return fmt.Sprintf("host port: %s is taken by %s", c.Want, who)
	}
	return fmt.Sprintf("host port: %s is taken by %s, which has %s", c.Want, who, c.Has)
}

// Unwrap gives the error its class.
func (c *Conflict) Unwrap() error { return errdefs.ErrFailedPrecondition }

// Claims are the ports that pods have asked for. The zero value is ready.
type Claims struct {
	mu    sync.Mutex
	claim map[string]claim // by pod ID
}

type claim struct {
	pod   string
	ports []Mapping
}

// Check returns a Conflict if another pod has one of the ports.
func (c *Claims) Check(id string, ports []Mapping) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.check(id, ports)
}

func (c *Claims) check(id string, ports []Mapping) error {
	for other, has := range c.claim {
		if other == id {
			continue
		}
		for _, want := range ports {
			for _, h := range has.ports {
				if want.overlaps(h) {
					return &Conflict{Want: want, Has: h, ID: other, Pod: has.pod}
				}
			}
		}
	}
	return nil
}

// Take gives a pod its ports, in place of those it had, or returns a Conflict.
func (c *Claims) Take(id, pod string, ports []Mapping) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.check(id, ports); err != nil {
		return err
	}
	delete(c.claim, id)
	if len(ports) > 0 {
		if c.claim == nil {
			c.claim = map[string]claim{}
		}
		c.claim[id] = claim{pod: pod, ports: ports}
	}
	return nil
}

// Drop ends what Take gave.
func (c *Claims) Drop(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.claim, id)
}
