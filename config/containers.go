package config

import (
	"fmt"
	"math"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/cap"
)

// Containers is what the node gives to every container. It comes from keys that
// containerd does not have.
type Containers struct {
	// Capabilities are in the kernel's spelling, as "CAP_CHOWN". None is
	// possible.
	Capabilities []string
	// InheritableCapabilities makes all that a container has inheritable.
	InheritableCapabilities bool
	// Env holds NAME=value, Ulimits one entry per type.
	Env     []string
	Ulimits []Ulimit
	// SeccompProfile is an absolute path, "" for the built-in profile.
	SeccompProfile string
	// PasswdEntries adds users to an image's databases that they do not know.
	PasswdEntries bool
	// PidsLimit and MinMemory, in bytes, are 0 for no limit.
	PidsLimit, MinMemory int64
	// AdditionalDevices are every container's; AllowedDevices are paths of those
	// that pods may ask for.
	AdditionalDevices []Device
	AllowedDevices    []string
	// PrivilegedSeccompProfile is an absolute path, "" for none.
	PrivilegedSeccompProfile string
	// ReadOnly makes root filesystems read-only.
	ReadOnly bool
	// AbsentMountSourcesToReject are absolute paths.
	AbsentMountSourcesToReject []string
	// BindMountPrefix is an absolute path or "".
	BindMountPrefix string
	// Timezone is "", "Local" or a name below the node's zone files.
	Timezone string
	// DefaultMountsFile is an absolute path or "".
	DefaultMountsFile string
	// EnvFile makes /run/.containerenv.
	EnvFile bool
	// MinMappableUID and MinMappableGID are -1 for any.
	MinMappableUID, MinMappableGID int64
	// UIDMapping and GIDMapping are those of pods without a user namespace of
	// their own, zero for the node's.
	UIDMapping, GIDMapping IDMapping
	// MinGOMAXPROCS is 0 for not to set it.
	MinGOMAXPROCS int64
}

// IDMapping shows Size numbers of the host from Host as those from 0.
type IDMapping struct{ Host, Size uint32 }

// LocalTimezone is the Timezone of the node.
const LocalTimezone = "Local"

// Device is a device of the host in a container.
type Device struct {
	Host, Container string
	// Permissions are made of r, w and m.
	Permissions string
}

// Ulimit is a limit of the kernel for a process. Unlimited is math.MaxUint64.
type Ulimit struct {
	// Type is as in "RLIMIT_NOFILE".
	Type       string
	Soft, Hard uint64
}

// ulimitTypes are the limits that Linux has.
var ulimitTypes = []string{
	"AS", "CORE", "CPU", "DATA", "FSIZE", "LOCKS", "MEMLOCK", "MSGQUEUE",
	"NICE", "NOFILE", "NPROC", "RSS", "RTPRIO", "RTTIME", "SIGPENDING", "STACK",
}

func (w *walker) containers(v values) Containers {
	out := Containers{
		Env:            v.list("default_env"),
		SeccompProfile: v.str("seccomp_profile"),
		PasswdEntries:  v.bool("passwd_entries"),
		PidsLimit:      int64(v.int("pids_limit")),
		MinMemory:      int64(v.int("container_min_memory")),

		AllowedDevices:             v.list("allowed_devices"),
		PrivilegedSeccompProfile:   v.str("privileged_seccomp_profile"),
		ReadOnly:                   v.bool("read_only"),
		AbsentMountSourcesToReject: v.list("absent_mount_sources_to_reject"),
		BindMountPrefix:            v.str("bind_mount_prefix"),
		Timezone:                   v.str("timezone"),
		DefaultMountsFile:          v.str("default_mounts_file"),
		EnvFile:                    v.bool("containerenv_file"),
		MinMappableUID:             int64(v.int("minimum_mappable_uid")),
		MinMappableGID:             int64(v.int("minimum_mappable_gid")),
		MinGOMAXPROCS:              int64(v.int("min_injected_gomaxprocs")),
		InheritableCapabilities:    v.bool("add_inheritable_capabilities"),
	}
	for _, name := range v.list("default_capabilities") {
		c := "CAP_" + strings.TrimPrefix(strings.ToUpper(name), "CAP_")
		if !slices.Contains(cap.Known(), c) {
			w.fail([]string{"default_capabilities"}, "%q is no capability", name)
		}
		out.Capabilities = append(out.Capabilities, c)
	}
	for _, kv := range out.Env {
		if name, _, ok := strings.Cut(kv, "="); !ok || name == "" || strings.IndexByte(kv, 0) >= 0 {
			w.fail([]string{"default_env"}, "%q is not NAME=value", kv)
		}
	}
	for _, text := range v.list("default_ulimits") {
		l, err := parseUlimit(text)
		if err != nil {
			w.fail([]string{"default_ulimits"}, "%v", err)
			continue
		}
		out.Ulimits = slices.DeleteFunc(out.Ulimits, func(o Ulimit) bool { return o.Type == l.Type })
		out.Ulimits = append(out.Ulimits, l)
	}
	for _, text := range v.list("additional_devices") {
		d, err := ParseDevice(text)
		if err != nil {
			w.fail([]string{"additional_devices"}, "%v", err)
		}
		out.AdditionalDevices = append(out.AdditionalDevices, d)
	}
	out.UIDMapping, out.GIDMapping = w.mapping("uid_mappings", v), w.mapping("gid_mappings", v)
	if (out.UIDMapping == IDMapping{}) != (out.GIDMapping == IDMapping{}) {
		w.fail([]string{"uid_mappings"}, "and gid_mappings: only one is set")
	}
	for _, list := range [][]string{out.AllowedDevices, out.AbsentMountSourcesToReject} {
		for i, p := range list {
			if filepath.IsAbs(p) {
				list[i] = filepath.Clean(p)
			}
		}
	}
	w.checkContainers(out)
	return out
}

func (w *walker) checkContainers(c Containers) {
	w.absolute(c.SeccompProfile, "seccomp_profile")
	w.absolute(c.PrivilegedSeccompProfile, "privileged_seccomp_profile")
	w.absolute(c.DefaultMountsFile, "default_mounts_file")
	w.absolute(c.BindMountPrefix, "bind_mount_prefix")
	for _, p := range c.AllowedDevices {
		w.absolute(p, "allowed_devices")
	}
	for _, p := range c.AbsentMountSourcesToReject {
		w.absolute(p, "absent_mount_sources_to_reject")
	}
	w.notNegative(int(c.PidsLimit), "pids_limit")
	w.notNegative(int(c.MinMemory), "container_min_memory")
	w.notNegative(int(c.MinGOMAXPROCS), "min_injected_gomaxprocs")
	w.notNegative(int(c.MinMappableUID)+1, "minimum_mappable_uid")
	w.notNegative(int(c.MinMappableGID)+1, "minimum_mappable_gid")
	if z := c.Timezone; z != "" && (path.Clean(z) != z || !filepath.IsLocal(z)) {
		w.fail([]string{"timezone"}, "%q is neither \"Local\" nor the name of a zone, as \"Europe/Berlin\"", z)
	}
}

// leastIDs is how many users or groups a pod has at least: 0 to the kernel's
// nobody and the one after.
const leastIDs = 1 << 16

// mapping reads "0:FIRST:COUNT", zero for "".
func (w *walker) mapping(key string, v values) (m IDMapping) {
	text := v.str(key)
	if text == "" {
		return m
	}
	parts := strings.Split(text, ":")
	if len(parts) != 3 || parts[0] != "0" {
		w.fail([]string{key}, "%.64q is not \"0:FIRST:COUNT\", one range that begins with root", text)
		return m
	}
	first, errFirst := strconv.ParseUint(parts[1], 10, 32)
	count, errCount := strconv.ParseUint(parts[2], 10, 32)
	if errFirst != nil || errCount != nil || count < leastIDs || first+count > math.MaxUint32 {
		w.fail([]string{key}, "%.64q: from %s on there are no %s numbers below %d, or fewer than %d are asked for", text, parts[1], parts[2], uint32(math.MaxUint32), leastIDs)
		return m
	}
	return IDMapping{Host: uint32(first), Size: uint32(count)}
}

// ParseDevice reads "/dev/a:/dev/b:rwm" and its shorter forms "/dev/a:/dev/b",
// "/dev/a:rwm" and "/dev/a".
func ParseDevice(text string) (Device, error) {
	parts := strings.Split(text, ":")
	d := Device{Host: parts[0], Container: parts[0], Permissions: "rwm"}
	rest := parts[1:]
	if len(rest) > 0 && strings.HasPrefix(rest[0], "/") {
		d.Container, rest = rest[0], rest[1:]
	}
	if len(rest) > 0 {
		d.Permissions, rest = rest[0], rest[1:]
	}
	switch {
	case len(rest) > 0 || !path.IsAbs(d.Host) || strings.IndexByte(text, 0) >= 0:
		return Device{}, fmt.Errorf("%.256q is no device as \"/dev/on-the-host:/dev/in-the-container:rwm\"", text)
	case d.Permissions == "" || len(d.Permissions) > 3 || strings.Trim(d.Permissions, "rwm") != "":
		return Device{}, fmt.Errorf("%.256q has permissions that are not made of r, w and m", text)
	}
	return d, nil
}

// parseUlimit reads "nofile=1024:4096" and its short forms.
func parseUlimit(text string) (Ulimit, error) {
	name, value, ok := strings.Cut(text, "=")
	name = strings.TrimPrefix(strings.ToUpper(name), "RLIMIT_")
	if !ok || !slices.Contains(ulimitTypes, name) {
		return Ulimit{}, fmt.Errorf("%q is not a limit as \"nofile=1024:4096\"; the types are %s", text, strings.ToLower(strings.Join(ulimitTypes, ", ")))
	}
	soft, hard, two := strings.Cut(value, ":")
	if !two {
		hard = soft
	}
	l := Ulimit{Type: "RLIMIT_" + name}
	for _, n := range []struct {
		text string
		into *uint64
	}{{soft, &l.Soft}, {hard, &l.Hard}} {
		if n.text == "unlimited" || n.text == "-1" {
			*n.into = math.MaxUint64
			continue
		}
		var err error
		if *n.into, err = strconv.ParseUint(n.text, 10, 64); err != nil {
			return Ulimit{}, fmt.Errorf("%q has %q, which is neither a number nor \"unlimited\"", text, n.text)
		}
	}
	if l.Soft > l.Hard {
		return Ulimit{}, fmt.Errorf("%q has a soft limit above the hard one", text)
	}
	return l, nil
}
