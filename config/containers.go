package config

import (
	"fmt"
	"math"
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
	// Env holds NAME=value, Ulimits one entry per type.
	Env     []string
	Ulimits []Ulimit
	// SeccompProfile is an absolute path, "" for the built-in profile.
	SeccompProfile string
	// PasswdEntries adds users to an image's databases that they do not know.
	PasswdEntries bool
	// PidsLimit and MinMemory, in bytes, are 0 for no limit.
	PidsLimit, MinMemory int64
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
	w.absolute(out.SeccompProfile, "seccomp_profile")
	w.notNegative(int(out.PidsLimit), "pids_limit")
	w.notNegative(int(out.MinMemory), "container_min_memory")
	return out
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
