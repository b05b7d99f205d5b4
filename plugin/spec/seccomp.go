package spec

import (
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// maxSeccomp bounds a profile's file; the default profile is some 20 KiB.
const maxSeccomp = 4 << 20

// seccompFile is a profile as people write them: the filter of the runtime
// specification, and what Docker's files have beside it, conditions for single
// rules and the architectures by name. To leave a condition out would make its
// rule one for everybody.
type seccompFile struct {
	specs.LinuxSeccomp
	ArchMap  []seccompArch `json:"archMap"`
	Syscalls []seccompRule `json:"syscalls"`
}

type seccompArch struct {
	Architecture     specs.Arch   `json:"architecture"`
	SubArchitectures []specs.Arch `json:"subArchitectures"`
}

type seccompRule struct {
	specs.LinuxSyscall
	// Name is how the oldest files name one system call.
	Name     string         `json:"name"`
	Includes seccompFilters `json:"includes"`
	Excludes seccompFilters `json:"excludes"`
}

// seccompFilters are conditions; what is empty holds.
type seccompFilters struct {
	Caps      []string `json:"caps"`
	Arches    []string `json:"arches"`
	MinKernel string   `json:"minKernel"`
}

// seccompArches are the names of the architectures we are built for: in
// conditions, and in filters.
var seccompArches = map[string]struct {
	name   string
	native specs.Arch
}{
	"amd64": {"amd64", specs.ArchX86_64}, "386": {"x86", specs.ArchX86}, "arm64": {"arm64", specs.ArchAARCH64}, "arm": {"arm", specs.ArchARM},
	"ppc64le": {"ppc64le", specs.ArchPPC64LE}, "s390x": {"s390x", specs.ArchS390X}, "riscv64": {"riscv64", specs.ArchRISCV64},
}

// parseSeccomp reads a profile file for a container with these capabilities.
// Runtimes differ in how they treat values they do not know, so those are
// refused here.
func parseSeccomp(name string, content []byte, caps []string, kernel facts.Kernel) (*specs.LinuxSeccomp, error) {
	f, err := readSeccomp(content, caps, kernel)
	if err != nil {
		return nil, fmt.Errorf("parse seccomp profile %s: %w (%w)", name, err, errdefs.ErrInvalidArgument)
	}
	return f, nil
}

func readSeccomp(content []byte, caps []string, kernel facts.Kernel) (*specs.LinuxSeccomp, error) {
	if len(content) > maxSeccomp {
		return nil, fmt.Errorf("longer than %d bytes", maxSeccomp)
	}
	var f seccompFile
	if err := json.Unmarshal(content, &f); err != nil {
		return nil, err
	}
	if !slices.Contains(seccompActions, f.DefaultAction) {
		return nil, fmt.Errorf("unknown defaultAction %q", f.DefaultAction)
	}
	out := f.LinuxSeccomp
	out.Architectures = f.architectures()
	out.Syscalls = nil
	for i, rule := range f.Syscalls {
		if rule.Name != "" {
			rule.Names = append(rule.Names, rule.Name)
		}
		if !slices.Contains(seccompActions, rule.Action) {
			return nil, fmt.Errorf("unknown action %q in syscalls[%d]", rule.Action, i)
		}
		if len(rule.Names) == 0 {
			return nil, fmt.Errorf("no names in syscalls[%d]", i)
		}
		applies, err := rule.applies(caps, kernel)
		if err != nil {
			return nil, fmt.Errorf("syscalls[%d]: %w", i, err)
		}
		if applies {
			out.Syscalls = append(out.Syscalls, rule.LinuxSyscall)
		}
	}
	return &out, nil
}

// architectures are those listed, or else those that go with ours.
func (f seccompFile) architectures() []specs.Arch {
	if len(f.Architectures) > 0 {
		return f.Architectures
	}
	native := seccompArches[runtime.GOARCH].native
	for _, a := range f.ArchMap {
		if a.Architecture == native {
			return append([]specs.Arch{native}, a.SubArchitectures...)
		}
	}
	return nil
}

// applies reports whether the rule is one for a container with these
// capabilities: everything included holds, and nothing excluded.
func (r seccompRule) applies(caps []string, kernel facts.Kernel) (bool, error) {
	ours := seccompArches[runtime.GOARCH].name
	for _, c := range r.Includes.Caps {
		if !slices.Contains(caps, c) {
			return false, nil
		}
	}
	if slices.ContainsFunc(r.Excludes.Caps, func(c string) bool { return slices.Contains(caps, c) }) {
		return false, nil
	}
	if len(r.Includes.Arches) > 0 && !slices.Contains(r.Includes.Arches, ours) || slices.Contains(r.Excludes.Arches, ours) {
		return false, nil
	}
	for _, min := range []struct {
		version string
		want    bool
	}{{r.Includes.MinKernel, true}, {r.Excludes.MinKernel, false}} {
		if min.version == "" {
			continue
		}
		var k facts.Kernel
		if n, err := fmt.Sscanf(min.version, "%d.%d", &k.Major, &k.Minor); n != 2 {
			return false, fmt.Errorf("minKernel %.32q is no version: %w", min.version, err)
		}
		if kernel.AtLeast(k.Major, k.Minor) != min.want {
			return false, nil
		}
	}
	return true, nil
}

var seccompActions = []specs.LinuxSeccompAction{
	specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap, specs.ActErrno,
	specs.ActTrace, specs.ActAllow, specs.ActLog, specs.ActNotify,
}

// filters keeps the default filter per capability set, which it depends on.
// Filters are shared: whoever changes one must copy what it changes first.
type filters struct {
	mu    sync.Mutex
	byCap map[string]*specs.LinuxSeccomp
}

// maxFilters bounds the cache: pods choose their capabilities.
const maxFilters = 64

var defaultFilters filters

func (f *filters) get(caps *specs.LinuxCapabilities) *specs.LinuxSeccomp {
	key := strings.Join(caps.Bounding, " ")
	f.mu.Lock()
	defer f.mu.Unlock()
	filter, ok := f.byCap[key]
	if !ok {
		filter = seccomp.DefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: caps}})
		if f.byCap == nil {
			f.byCap = map[string]*specs.LinuxSeccomp{}
		}
		if len(f.byCap) < maxFilters {
			f.byCap[key] = filter
		}
	}
	own := *filter
	own.Syscalls = slices.Clone(filter.Syscalls)
	return &own
}
