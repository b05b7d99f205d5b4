package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/containerd/log"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/gantry-cri/gantry/plugin/network/hostport"
)

// takePorts decides who maps the ports of the node. It takes them out of what
// plugins are told unless it is for them, and returns them if it is for us.
func (n *Networks) takePorts(caps map[string]any, nets []attached) ([]portMapping, error) {
	ports, _ := caps[capPortMappings].([]portMapping)
	if len(ports) == 0 {
		return nil, nil
	}
	switch {
	case n.conf.HostPorts == HostPortsCNI, n.conf.HostPorts == HostPortsAuto && mapsPorts(nets):
		return nil, nil
	case n.conf.HostPorts == HostPortsOff:
		ports = nil
	}
	delete(caps, capPortMappings)
	return ports, hostport.CheckPorts(mappings(ports))
}

// hostPortOptions say what the node's ports are mapped with.
func hostPortOptions(c Config) hostport.Options {
	o := hostport.Options{Name: HostPortTable(c.CacheDir), Note: hostPortNote(c.CacheDir)}
	switch c.HostPorts {
	case HostPortsNFTables:
		o.Engine = hostport.NFTables
	case HostPortsIPTables:
		o.Engine = hostport.IPTables
	}
	return o
}

// mapsPorts reports whether a plugin of the networks maps ports of the node.
func mapsPorts(nets []attached) bool {
	for _, net := range nets {
		for _, p := range net.conf.Plugins {
			if p.Network.Capabilities[capPortMappings] {
				return true
			}
		}
	}
	return false
}

// mappings are ports that were checked, in the words of package hostport.
func mappings(ports []portMapping) []hostport.Mapping {
	protocols := map[string]hostport.Protocol{"tcp": hostport.TCP, "udp": hostport.UDP, "sctp": hostport.SCTP}
	var out []hostport.Mapping
	for _, p := range ports {
		ip, _ := netip.ParseAddr(p.HostIP) // every address, if it is empty
		out = append(out, hostport.Mapping{
			HostIP: ip.Unmap().WithZone(""), HostPort: uint16(p.HostPort), Protocol: protocols[p.Protocol], PodPort: uint16(p.ContainerPort),
		})
	}
	return out
}

// admitPorts reports a port of the node that the pod cannot have, before anything
// is made for it.
func (n *Networks) admitPorts(a Attachment) error {
	asked, err := portMappings(a.Pod.GetPortMappings())
	if err != nil || len(asked) == 0 {
		return err
	}
	nets, err := n.load(n.source(a))
	if err != nil {
		return nil // Attach tells
	}
	ports, err := n.takePorts(map[string]any{capPortMappings: asked}, nets)
	if err != nil {
		return err
	}
	want := mappings(ports)
	return errors.Join(hostport.Supported(want), n.claims.Check(a.ID, want))
}

// claim takes the ports that are to be mapped here, before any is. Detach gives
// them back.
func (n *Networks) claim(s *saved) error {
	return n.claims.Take(s.ID, s.pod(), mappings(s.HostPorts))
}

// pod is the name of the pod, with its namespace.
func (s *saved) pod() string {
	of := map[string]string{}
	for _, a := range s.Args {
		of[a[0]] = a[1]
	}
	if of[argPodName] == "" {
		return ""
	}
	return of[argPodNamespace] + "/" + of[argPodName]
}

// recallClaims takes the ports of the pods that an earlier daemon attached. Where
// two have the same, which none has allowed, the first keeps it.
func (n *Networks) recallClaims() error {
	ids, err := n.saved.ids()
	if err != nil {
		return err
	}
	for _, id := range ids {
		// One that cannot be read is told of when its pod is looked at.
		if s, err := n.saved.read(id); err == nil && s != nil {
			_ = n.claim(s)
		}
	}
	return nil
}

// mapPorts makes the ports of the node lead to the addresses that the default
// network gave.
func (n *Networks) mapPorts(ctx context.Context, s *saved, r *types100.Result) error {
	if len(s.HostPorts) == 0 {
		return nil
	}
	p := hostport.Pod{ID: s.ID, Ports: mappings(s.HostPorts)}
	for _, ip := range addresses(r, s.Networks[0].IfName) {
		p.Addresses = append(p.Addresses, ip.prefix)
	}
	return n.ports.Map(ctx, p)
}

// RestorePorts makes the ports of the node that lead to the pods as they should
// be, for pods that run: rules may have been removed while no daemon was there, or
// be those of another release.
func (n *Networks) RestorePorts(ctx context.Context, running Live) error {
	err := n.ports.Renew(ctx)
	ids, listErr := running(ctx)
	if err = errors.Join(err, listErr); err != nil {
		return fmt.Errorf("restore host ports: %w", err)
	}
	var errs []error
	for _, id := range ids {
		if err := n.restorePorts(ctx, id); err != nil {
			errs = append(errs, fmt.Errorf("restore host ports of sandbox %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

func (n *Networks) restorePorts(ctx context.Context, id string) error {
	// Most have none, and need not wait for their turn.
	if s, err := n.saved.read(id); err != nil || s == nil || len(s.HostPorts) == 0 {
		return err
	}
	leave, err := n.enter(ctx, id)
	if err != nil {
		return err
	}
	defer leave()
	s, err := n.saved.read(id)
	if err != nil || s == nil || len(s.Networks) == 0 {
		return err
	}
	list, err := s.Networks[0].list()
	if err != nil {
		return err
	}
	result, err := n.cni.GetNetworkListCachedResult(list, s.runtimeConf(s.Networks[0], s.NetNS))
	if err != nil || result == nil {
		return err
	}
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return err
	}
	return n.mapPorts(ctx, s, r)
}

const (
	// keepInterval is the pause between two looks at the rules of host ports.
	keepInterval = 5 * time.Second
	// keepShare is how much longer the pause is than the look took: a node with
	// very many rules of iptables spends no more on it than that part of its time.
	keepShare = 10
)

// KeepPorts puts the rules of host ports back, until ctx ends, when somebody has
// removed them, as a firewall does that starts anew.
func (n *Networks) KeepPorts(ctx context.Context) {
	pause := keepInterval
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		begin := time.Now()
		mended, err := n.ports.Mend(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			log.G(ctx).WithError(err).Warn("host ports may not lead to their pods")
		case mended:
			log.G(ctx).Warn("rules of host ports were missing and have been put back: somebody else has removed them")
		}
		pause = max(keepInterval, keepShare*time.Since(begin))
	}
}
