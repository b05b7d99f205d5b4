package hostport

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/vishvananda/netlink"
)

// uplink is the interface through which the node reaches a pod that must be
// reachable from the node's loopback addresses; empty if it need not be.
func uplink(ctx context.Context, p Pod) string {
	a, ok := p.address(true)
	if !ok || !slices.ContainsFunc(p.Ports, func(m Mapping) bool { return m.covers(a.Addr()) && (m.wild() || loopback4.Contains(m.HostIP)) }) {
		return ""
	}
	name, err := routeTo(a.Addr())
	if err != nil {
		log.G(ctx).WithError(err).WithField("sandbox", p.ID).Warn("the pod's host ports are not reached by 127.0.0.1")
	}
	return name
}

// interfaces are those that are noted, or are to be, as far as they are there.
func interfaces(noted []string, pods ...map[string]state) []string {
	names := map[string]bool{}
	for _, name := range noted {
		names[name] = there(name)
	}
	for _, list := range pods {
		for _, s := range list {
			names[s.open] = s.open != "" && there(s.open)
		}
	}
	var out []string
	for name, is := range names {
		if is {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// closedAny reports whether somebody has closed an interface that pods need open.
func closedAny(pods map[string]state) bool {
	looked := map[string]bool{"": true}
	for _, s := range pods {
		if !looked[s.open] && closed(s.open) {
			return true
		}
		looked[s.open] = true
	}
	return false
}

func routeTo(a netip.Addr) (string, error) {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		return "", fmt.Errorf("find route to %s: %w", a, errors.Join(err, errdefs.ErrNotFound))
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", fmt.Errorf("find interface of %s: %w", a, err)
	}
	return link.Attrs().Name, nil
}

// setting is the file that says whether an interface routes loopback addresses.
func setting(name string) string {
	return filepath.Join("/proc/sys/net/ipv4/conf", name, "route_localnet")
}

func there(name string) bool {
	_, err := os.Stat(setting(name))
	return err == nil
}

func closed(name string) bool {
	value, err := os.ReadFile(setting(name))
	return err == nil && strings.TrimSpace(string(value)) == "0"
}

// route lets an interface route loopback addresses, or not. What cannot be set
// costs the way from 127.0.0.1 only.
func route(ctx context.Context, name string, on bool) {
	value := "0"
	if on {
		value = "1"
	}
	if err := os.WriteFile(setting(name), []byte(value), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
		log.G(ctx).WithError(err).WithField("interface", name).Warn("host ports: cannot change whether loopback addresses are routed")
	}
}
