package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/gantry-cri/gantry/plugin/record"
	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Attach connects the network namespace to the networks of the configuration
// and returns the pod's addresses. For a pod in the node's network it does
// nothing.
//
// An Attach that fails may have left something behind; Detach gives it back.
// When it finds attachments of an earlier attempt it undoes them first, as the
// specification forbids a second ADD.
func (n *Networks) Attach(ctx context.Context, a Attachment, netns string) (record.Network, error) {
	if hostNetwork(a.Pod) {
		return record.Network{}, nil
	}
	net, err := n.attach(ctx, a, netns)
	if err != nil {
		return record.Network{}, fmt.Errorf("attach network: %w", err)
	}
	return net, nil
}

func (n *Networks) attach(ctx context.Context, a Attachment, netns string) (record.Network, error) {
	s, err := n.plan(a, netns)
	if err != nil {
		return record.Network{}, err
	}
	ctx, cancel := within(ctx, n.conf.AddTimeout)
	defer cancel()
	leave, err := n.enter(ctx, a.ID)
	if err != nil {
		return record.Network{}, err
	}
	defer leave()
	if old, err := n.saved.read(a.ID); err != nil {
		return record.Network{}, err
	} else if old != nil {
		if err := errors.Join(n.ports.Unmap(ctx, a.ID), n.undo(ctx, old)); err != nil {
			return record.Network{}, fmt.Errorf("undo an earlier attempt: %w", err)
		}
	}
	if err := n.claim(s); err != nil {
		return record.Network{}, err
	}
	if err := n.saved.write(s); err != nil {
		return record.Network{}, err
	}
	results, err := n.addAll(ctx, s)
	if err != nil {
		return record.Network{}, err
	}
	net, result, err := n.summary(s, results[0])
	if err == nil {
		err = n.mapPorts(ctx, s, result)
	}
	return net, err
}

// plan decides what ADD is asked; it changes nothing.
func (n *Networks) plan(a Attachment, netns string) (*saved, error) {
	if err := checkID(a.ID); err != nil {
		return nil, err
	}
	if netns == "" {
		return nil, fmt.Errorf("no network namespace: %w", errdefs.ErrInvalidArgument)
	}
	args, err := arguments(a.ID, a.Pod.GetMetadata())
	if err != nil {
		return nil, err
	}
	caps, err := capabilities(a)
	if err != nil {
		return nil, err
	}
	nets, err := n.load(n.source(a))
	if err != nil {
		return nil, err
	}
	if err := n.findPlugins(nets); err != nil {
		return nil, err
	}
	s := &saved{ID: a.ID, NetNS: netns, Args: args, Caps: caps}
	if s.HostPorts, err = n.takePorts(caps, nets); err != nil {
		return nil, err
	}
	for _, net := range nets {
		frozen, err := freeze(net.ifName, net.conf)
		if err != nil {
			return nil, err
		}
		s.Networks = append(s.Networks, frozen)
	}
	return s, nil
}

// addAll returns the results in the order of the networks.
func (n *Networks) addAll(ctx context.Context, s *saved) ([]types.Result, error) {
	results := make([]types.Result, len(s.Networks))
	g, ctx := errgroup.WithContext(ctx)
	if n.conf.SetupSerially {
		g.SetLimit(1)
	}
	for i, net := range s.Networks {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			list, err := net.list()
			if err != nil {
				return err
			}
			results[i], err = n.cni.AddNetworkList(ctx, list, s.runtimeConf(net, s.NetNS))
			return pluginCause(err)
		})
	}
	return results, g.Wait()
}

// summary makes the record's value of the default network's result.
func (n *Networks) summary(s *saved, result types.Result) (record.Network, *types100.Result, error) {
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return record.Network{}, nil, fmt.Errorf("read result: %w: %w", err, errdefs.ErrInternal)
	}
	ips := orderIPs(addresses(r, s.Networks[0].IfName), n.conf.IPPref)
	if len(ips) == 0 {
		return record.Network{}, nil, fmt.Errorf("the plugins gave %s no address: %w", s.Networks[0].IfName, errdefs.ErrFailedPrecondition)
	}
	data, err := json.Marshal(r)
	if err != nil {
		return record.Network{}, nil, fmt.Errorf("write result: %w: %w", err, errdefs.ErrInternal)
	}
	return record.Network{NetNS: s.NetNS, IPs: ips, Result: data}, r, nil
}

// addresses returns the addresses of the pod's interface. An address that is
// said to be on no interface is the pod's; plugins may leave the list of
// interfaces out.
func addresses(r *types100.Result, ifName string) []ipAddr {
	var ips []ipAddr
	for _, ip := range r.IPs {
		if ip == nil || len(ip.Address.IP) == 0 {
			continue
		}
		if i := ip.Interface; i != nil && *i >= 0 && *i < len(r.Interfaces) && r.Interfaces[*i].Name != ifName {
			continue
		}
		a := ipAddr{text: ip.Address.IP.String(), v4: ip.Address.IP.To4() != nil}
		addr, _ := netip.AddrFromSlice(ip.Address.IP) // as long as an address is, or an error of its own before
		bits, _ := ip.Address.Mask.Size()
		a.prefix = netip.PrefixFrom(addr.Unmap(), bits)
		ips = append(ips, a)
	}
	return ips
}

type ipAddr struct {
	text   string
	v4     bool
	prefix netip.Prefix // the address in its network
}

// orderIPs puts the first address of the preferred family in front and leaves
// the others as they are.
func orderIPs(ips []ipAddr, pref IPPref) []string {
	first := 0
	if pref != PreferCNI {
		first = max(0, slices.IndexFunc(ips, func(ip ipAddr) bool { return ip.v4 == (pref == PreferIPv4) }))
	}
	var ordered []string
	for i, ip := range ips {
		if i == first {
			ordered = slices.Insert(ordered, 0, ip.text)
		} else {
			ordered = append(ordered, ip.text)
		}
	}
	return ordered
}

// findPlugins reports the first plugin that is not installed, before anything
// has been done that would need it for being undone.
func (n *Networks) findPlugins(nets []attached) error {
	r := runner{}
	for _, net := range nets {
		for _, p := range net.conf.Plugins {
			for _, name := range []string{p.Network.Type, p.Network.IPAM.Type} {
				if name == "" {
					continue
				}
				if _, err := r.FindInPath(name, n.conf.BinDirs); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func hostNetwork(pod *cri.PodSandboxConfig) bool {
	return record.Sandbox{Config: pod}.HostNetwork()
}
