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
// ALL counts before single names, and a removal beats an addition. The
// inheritable set stays empty, whatever the base says: a program with file
// capabilities would get more than the container was given.
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
	if len(c.GetAddAmbientCapabilities()) > 0 {
		return nil, fmt.Errorf("%s.add_ambient_capabilities: ambient capabilities: %w", field, errdefs.ErrNotImplemented)
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
	set := without(slices.Concat(start, add), drop)
	if in.privileged() {
		set = in.Host.Capabilities
	}
	return capabilitySet(set, in.Host.Capabilities), nil
}

// capabilitySet makes the set out of what the daemon can give away of want, in
// the order of the kernel.
func capabilitySet(want, bounding []string) *specs.LinuxCapabilities {
	set := []string{}
	for _, c := range cap.Known() {
		if slices.Contains(want, c) && slices.Contains(bounding, c) {
			set = append(set, c)
		}
	}
	return &specs.LinuxCapabilities{
		Bounding:  set,
		Effective: slices.Clone(set),
		Permitted: slices.Clone(set),
	}
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
