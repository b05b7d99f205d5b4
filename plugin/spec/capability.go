package spec

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// containerCapabilities applies the additions and removals of the request.
//
// ALL counts before single names, and a removal beats an addition. Ambient
// capabilities are additions that a process keeps when it runs a program as
// another user than root; ALL of them are those that the container has.
func containerCapabilities(in *ContainerInput, base *specs.LinuxCapabilities) (*specs.LinuxCapabilities, error) {
	c := in.security().GetCapabilities()
	field := "config.linux.security_context.capabilities"
	add, addAll, err := capabilityNames(field+".add_capabilities", c.GetAddCapabilities())
	if err != nil {
		return nil, err
	}
	drop, dropAll, err := capabilityNames(field+".drop_capabilities", c.GetDropCapabilities())
	if err != nil {
		return nil, err
	}
	ambient, ambientAll, err := capabilityNames(field+".add_ambient_capabilities", c.GetAddAmbientCapabilities())
	if err != nil {
		return nil, err
	}
	start := in.Policy.Defaults.Capabilities
	if base != nil {
		start = base.Bounding
	}
	if addAll {
		start = in.Host.Capabilities
	}
	if dropAll {
		start = nil
	}
	ambient = without(ambient, drop)
	set := without(slices.Concat(start, add, ambient), drop)
	if in.privileged() {
		set = in.Host.Capabilities
	}
	if ambientAll {
		ambient = set
	}
	out := capabilitySet(set, ambient, in.Host.Capabilities)
	if in.Policy.Defaults.Inheritable {
		out.Inheritable = slices.Clone(out.Bounding)
	}
	return out, nil
}

// capabilitySet makes the sets out of what the daemon can give away of want, in
// the order of the kernel.
//
// A capability can only be ambient when it is inheritable too. Nothing else is
// unless the node wants it, whatever the base says: a program with file capabilities would get more than
// the container was given.
func capabilitySet(want, ambient, bounding []string) *specs.LinuxCapabilities {
	c := &specs.LinuxCapabilities{Bounding: []string{}}
	for _, name := range cap.Known() {
		if !slices.Contains(want, name) || !slices.Contains(bounding, name) {
			continue
		}
		c.Bounding = append(c.Bounding, name)
		if slices.Contains(ambient, name) {
			c.Ambient = append(c.Ambient, name)
		}
	}
	c.Effective, c.Permitted = slices.Clone(c.Bounding), slices.Clone(c.Bounding)
	c.Inheritable = slices.Clone(c.Ambient)
	return c
}

// capabilityNames normalises names, which come with and without the prefix and
// in either case, and splits ALL off.
func capabilityNames(field string, names []string) (list []string, all bool, err error) {
	for _, n := range names {
		name := strings.ToUpper(n)
		if name == "ALL" || name == "CAP_ALL" {
			all = true
			continue
		}
		if !strings.HasPrefix(name, "CAP_") {
			name = "CAP_" + name
		}
		if !slices.Contains(cap.Known(), name) {
			return nil, false, fmt.Errorf("%s: unknown capability %q: %w", field, n, errdefs.ErrInvalidArgument)
		}
		list = append(list, name)
	}
	return list, all, nil
}

func without(list, drop []string) []string {
	return slices.DeleteFunc(list, func(s string) bool { return slices.Contains(drop, s) })
}
