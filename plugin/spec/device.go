package spec

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantry-cri/gantry/plugin/facts"
)

const allAccess = "rwm"

// defaultDeviceRules allow what every container has: the memory devices of
// major 1 that are harmless, its terminal, and pseudo terminals.
func defaultDeviceRules() []specs.LinuxDeviceCgroup {
	rules := []specs.LinuxDeviceCgroup{{Allow: false, Access: allAccess}}
	for _, d := range [][2]int64{
		{1, 3}, // null
		{1, 5}, // zero
		{1, 7}, // full
		{1, 8}, // random
		{1, 9}, // urandom
		{5, 0}, // tty
		{5, 1}, // console
		{5, 2}, // ptmx
	} {
		rules = append(rules, allowDevice("c", d[0], &d[1], allAccess))
	}
	return append(rules, allowDevice("c", 136, nil, allAccess)) // pts/*
}

func allowDevice(kind string, major int64, minor *int64, access string) specs.LinuxDeviceCgroup {
	return specs.LinuxDeviceCgroup{Allow: true, Type: kind, Major: &major, Minor: minor, Access: access}
}

// containerDevices returns the device nodes of a container and the rules of
// its device cgroup, added to those of the base.
func containerDevices(in *ContainerInput, nodes []specs.LinuxDevice, base []specs.LinuxDeviceCgroup) ([]specs.LinuxDevice, []specs.LinuxDeviceCgroup, error) {
	rules := defaultDeviceRules()
	for _, r := range base {
		if r.Allow {
			rules = append(rules, r)
		}
	}
	if in.privileged() && !in.Handler.PrivilegedWithoutHostDevices {
		for _, d := range in.HostDevices {
			nodes = putDevice(nodes, deviceNode(d))
		}
	}
	for _, d := range in.Devices {
		access, err := DevicePermissions(d.Permissions)
		if err != nil {
			return nil, nil, fmt.Errorf("permissions of device %s: %w", d.HostPath, err)
		}
		d.UID, d.GID = deviceOwner(in, d)
		if !bound(in, d) {
			nodes = putDevice(nodes, deviceNode(d))
		}
		rules = append(rules, allowDevice(d.Type, d.Major, &d.Minor, access))
	}
	if in.privileged() && (!in.Handler.PrivilegedWithoutHostDevices || in.Handler.PrivilegedWithoutHostDevicesAllDevicesAllowed) {
		rules = []specs.LinuxDeviceCgroup{{Allow: true, Access: allAccess}}
	}
	return nodes, rules, nil
}

// bound reports whether a device is a mount and not a node. In a user namespace
// nobody makes nodes; runtimes then bind the host's in their place, which they
// look for at the path in the container.
func bound(in *ContainerInput, d facts.Device) bool {
	return podUserns(in.Pod) != nil && d.Path != d.HostPath
}

// boundDevices are the mounts of devices that are no nodes.
func boundDevices(in *ContainerInput) (list []specs.Mount) {
	for _, d := range in.Devices {
		if bound(in, d) {
			list = append(list, specs.Mount{
				Destination: d.Path, Type: "bind", Source: d.HostPath,
				Options: []string{"bind", rprivate, "nosuid", "noexec"},
			})
		}
	}
	return list
}

// DevicePermissions checks the permissions of a device; none means all.
func DevicePermissions(s string) (string, error) {
	if s == "" {
		return allAccess, nil
	}
	if len(s) > len(allAccess) || strings.Trim(s, allAccess) != "" {
		return "", fmt.Errorf("%.16q is not made of r, w and m: %w", s, errdefs.ErrInvalidArgument)
	}
	return s, nil
}

// deviceOwner gives a device to the container's identity where the policy says
// so. Identity 0 is also what an absent one looks like and changes nothing.
func deviceOwner(in *ContainerInput, d facts.Device) (uid, gid uint32) {
	uid, gid = d.UID, d.GID
	if !in.Policy.DeviceOwnership {
		return uid, gid
	}
	sc := in.security()
	if sc.GetRunAsUser().GetValue() != 0 {
		uid = in.User.UID
	}
	if sc.GetRunAsGroup().GetValue() != 0 {
		gid = in.User.GID
	}
	return uid, gid
}

func deviceNode(d facts.Device) specs.LinuxDevice {
	mode := os.FileMode(d.Mode)
	return specs.LinuxDevice{
		Path: d.Path, Type: d.Type, Major: d.Major, Minor: d.Minor,
		FileMode: &mode, UID: &d.UID, GID: &d.GID,
	}
}

// putDevice adds a node; the last one at a path wins.
func putDevice(nodes []specs.LinuxDevice, d specs.LinuxDevice) []specs.LinuxDevice {
	if i := slices.IndexFunc(nodes, func(n specs.LinuxDevice) bool { return n.Path == d.Path }); i >= 0 {
		nodes[i] = d
		return nodes
	}
	return append(nodes, d)
}
