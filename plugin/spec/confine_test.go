package spec

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/record"
)

const profileJSON = `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64"],"syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`

func profile(kind cri.SecurityProfile_ProfileType, ref string) *cri.SecurityProfile {
	return &cri.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
}

func TestSeccompChoice(t *testing.T) {
	const def, none, local = cri.SecurityProfile_RuntimeDefault, cri.SecurityProfile_Unconfined, cri.SecurityProfile_Localhost
	for name, tc := range map[string]struct {
		sc    *cri.LinuxContainerSecurityContext
		unset string
		want  Profile
	}{
		"nothing":             {nil, "", Profile{Type: none}},
		"unset policy":        {nil, "runtime/default", Profile{Type: def}},
		"unset policy, file":  {nil, "localhost//p.json", Profile{Type: local, Ref: "/p.json"}},
		"old default":         {&cri.LinuxContainerSecurityContext{SeccompProfilePath: "runtime/default"}, "", Profile{Type: def}},
		"old docker default":  {&cri.LinuxContainerSecurityContext{SeccompProfilePath: "docker/default"}, "", Profile{Type: def}},
		"old unconfined":      {&cri.LinuxContainerSecurityContext{SeccompProfilePath: "unconfined"}, "runtime/default", Profile{Type: none}},
		"old file":            {&cri.LinuxContainerSecurityContext{SeccompProfilePath: "localhost//p.json"}, "", Profile{Type: local, Ref: "/p.json"}},
		"typed default":       {&cri.LinuxContainerSecurityContext{Seccomp: profile(def, "")}, "", Profile{Type: def}},
		"typed beats old":     {&cri.LinuxContainerSecurityContext{Seccomp: profile(none, ""), SeccompProfilePath: "runtime/default"}, "", Profile{Type: none}},
		"typed file":          {&cri.LinuxContainerSecurityContext{Seccomp: profile(local, "/p.json")}, "", Profile{Type: local, Ref: "/p.json"}},
		"typed, with prefix":  {&cri.LinuxContainerSecurityContext{Seccomp: profile(local, "localhost//p.json")}, "", Profile{Type: local, Ref: "/p.json"}},
		"privileged has none": {&cri.LinuxContainerSecurityContext{Seccomp: profile(local, "/p.json"), Privileged: true}, "", Profile{Type: none}},
	} {
		if got, err := Seccomp(tc.sc, Handler{}, Policy{UnsetSeccompProfile: tc.unset}); err != nil || got != tc.want {
			t.Errorf("%s: got %+v, %v, want %+v", name, got, err, tc.want)
		}
	}
	for name, sc := range map[string]*cri.LinuxSandboxSecurityContext{
		"unknown string": {SeccompProfilePath: "strict"},
		"unknown type":   {Seccomp: profile(7, "")},
		"no file":        {Seccomp: profile(local, "")},
		"relative file":  {Seccomp: profile(local, "p.json")},
		"old, no file":   {SeccompProfilePath: "localhost/"},
		"file with NUL":  {Seccomp: profile(local, "/p\x00")},
		"ref of default": {Seccomp: profile(def, "/p")},
	} {
		if got, err := Seccomp(sc, Handler{}, Policy{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %+v, %v", name, got, err)
		}
	}
}

func TestSeccompFilter(t *testing.T) {
	with := func(p *cri.SecurityProfile, content string) func(*ContainerInput) {
		return func(in *ContainerInput) {
			sec(in).Seccomp, in.SeccompProfile = p, []byte(content)
		}
	}
	local := profile(cri.SecurityProfile_Localhost, "/p.json")
	if s := mustContainer(t, nil); s.Linux.Seccomp != nil {
		t.Error("a filter nobody asked for")
	}
	s := mustContainer(t, with(profile(cri.SecurityProfile_RuntimeDefault, ""), ""))
	if s.Linux.Seccomp == nil || s.Linux.Seccomp.DefaultAction != specs.ActErrno {
		t.Errorf("default: %+v", s.Linux.Seccomp)
	}
	s = mustContainer(t, with(local, profileJSON))
	if s.Linux.Seccomp == nil || len(s.Linux.Seccomp.Syscalls) != 1 {
		t.Errorf("file: %+v", s.Linux.Seccomp)
	}
	for _, bad := range []string{"", "{", "[]", "{}", profileJSON + "x", `{"defaultAction":"ALLOW"}`,
		`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"X"}]}`,
		`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"action":"SCMP_ACT_ALLOW"}]}`,
		string(make([]byte, maxSeccomp+1))} {
		wantError(t, errdefs.ErrInvalidArgument, "seccomp profile /p.json", with(local, bad))
	}
	for _, p := range []*cri.SecurityProfile{local, profile(cri.SecurityProfile_RuntimeDefault, "")} {
		wantError(t, errdefs.ErrFailedPrecondition, "seccomp", func(in *ContainerInput) {
			with(p, profileJSON)(in)
			in.Host.Seccomp = false
		})
	}
}

// Files of the node and of the handler stand for the built-in profile, and for
// nothing else.
func TestSeccompDefaultFromFile(t *testing.T) {
	const def, none, local = cri.SecurityProfile_RuntimeDefault, cri.SecurityProfile_Unconfined, cri.SecurityProfile_Localhost
	for name, tc := range map[string]struct {
		asked         *cri.SecurityProfile
		handler, node string
		want          Profile
	}{
		"built-in":         {profile(def, ""), "", "", Profile{Type: def}},
		"node's":           {profile(def, ""), "", "/n.json", Profile{Type: def, Ref: "/n.json"}},
		"handler's":        {profile(def, ""), "/h.json", "/n.json", Profile{Type: def, Ref: "/h.json"}},
		"unset is default": {nil, "/h.json", "", Profile{Type: def, Ref: "/h.json"}},
		"unconfined stays": {profile(none, ""), "/h.json", "/n.json", Profile{Type: none}},
		"pod's own file":   {profile(local, "/p.json"), "/h.json", "/n.json", Profile{Type: local, Ref: "/p.json"}},
	} {
		sc := &cri.LinuxContainerSecurityContext{Seccomp: tc.asked}
		got, err := Seccomp(sc, Handler{SeccompProfile: tc.handler}, Policy{SeccompProfile: tc.node, UnsetSeccompProfile: "runtime/default"})
		if err != nil || got != tc.want {
			t.Errorf("%s: got %+v, %v, want %+v", name, got, err, tc.want)
		}
	}
	change := func(in *ContainerInput) {
		sec(in).Seccomp, in.Policy.SeccompProfile, in.SeccompProfile = profile(def, ""), "/n.json", []byte(profileJSON)
	}
	if s := mustContainer(t, change); len(s.Linux.Seccomp.Syscalls) != 1 {
		t.Errorf("the filter is %+v", s.Linux.Seccomp)
	}
	wantError(t, errdefs.ErrInvalidArgument, "/n.json", func(in *ContainerInput) {
		change(in)
		in.SeccompProfile = []byte("{")
	})
}

// A rule whose condition were left out would hold for everybody.
func TestSeccompConditions(t *testing.T) {
	ours := seccompArches[runtime.GOARCH]
	for condition, want := range map[string]bool{
		`{}`:                                 true,
		`{"includes":{"caps":["CAP_KILL"]}}`: true,
		`{"includes":{"caps":["CAP_SYS_ADMIN"]}}`:              false,
		`{"includes":{"caps":["CAP_KILL","CAP_SYS_ADMIN"]}}`:   false,
		`{"excludes":{"caps":["CAP_KILL"]}}`:                   false,
		`{"excludes":{"caps":["CAP_SYS_ADMIN","CAP_KILL"]}}`:   false,
		`{"excludes":{"caps":["CAP_SYS_ADMIN"]}}`:              true,
		`{"includes":{"arches":["` + ours.name + `","mips"]}}`: true,
		`{"includes":{"arches":["mips"]}}`:                     false,
		`{"excludes":{"arches":["` + ours.name + `"]}}`:        false,
		`{"includes":{"minKernel":"5.9"}}`:                     true,
		`{"includes":{"minKernel":"5.10"}}`:                    true,
		`{"includes":{"minKernel":"5.11"}}`:                    false,
		`{"excludes":{"minKernel":"4.8"}}`:                     false,
		`{"excludes":{"minKernel":"6.0"}}`:                     true,
	} {
		rule := `{"names":["ptrace"],"action":"SCMP_ACT_ALLOW",` + strings.TrimPrefix(condition, "{")
		rule = strings.Replace(rule, ",}", "}", 1)
		f, err := parseSeccomp("p", []byte(`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[`+rule+`]}`), []string{"CAP_KILL"}, facts.Kernel{Major: 5, Minor: 10})
		if err != nil || (len(f.Syscalls) == 1) != want {
			t.Errorf("%s: %+v, %v, want a rule: %v", condition, f, err, want)
		}
	}
	f, err := parseSeccomp("p", []byte(`{"defaultAction":"SCMP_ACT_ERRNO","archMap":[{"architecture":"SCMP_ARCH_MIPS"},
		{"architecture":"`+string(ours.native)+`","subArchitectures":["SCMP_ARCH_X86"]}],"syscalls":[{"name":"read","action":"SCMP_ACT_ALLOW"}]}`), nil, facts.Kernel{})
	if err != nil || !slices.Equal(f.Architectures, []specs.Arch{ours.native, specs.ArchX86}) || !slices.Equal(f.Syscalls[0].Names, []string{"read"}) {
		t.Errorf("%+v, %v", f, err)
	}
	if _, err := parseSeccomp("p", []byte(`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"name":"read","action":"SCMP_ACT_ALLOW","includes":{"minKernel":"five"}}]}`), nil, facts.Kernel{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a kernel that is no version: %v", err)
	}
}

// The default filter depends on the capabilities: without SYS_ADMIN it keeps
// processes from making namespaces.
func TestSeccompDefaultFollowsCapabilities(t *testing.T) {
	allows := func(caps []string, syscall string) bool {
		f := defaultFilters.get(&specs.LinuxCapabilities{Bounding: caps})
		return slices.ContainsFunc(f.Syscalls, func(r specs.LinuxSyscall) bool {
			return r.Action == specs.ActAllow && len(r.Args) == 0 && slices.Contains(r.Names, syscall)
		})
	}
	for range 2 { // made, then from the cache
		if allows(defaultCapabilities, "unshare") || !allows([]string{"CAP_SYS_ADMIN"}, "unshare") || !allows(nil, "read") {
			t.Error("unshare must need SYS_ADMIN, read nothing")
		}
	}
	a := defaultFilters.get(&specs.LinuxCapabilities{})
	a.Syscalls[0] = specs.LinuxSyscall{}
	a.DefaultAction = specs.ActAllow
	if b := defaultFilters.get(&specs.LinuxCapabilities{}); b.DefaultAction != specs.ActErrno || len(b.Syscalls[0].Names) == 0 {
		t.Error("callers share rules")
	}
	var f filters
	for i := range 2 * maxFilters {
		f.get(&specs.LinuxCapabilities{Bounding: []string{fmt.Sprint(i)}})
	}
	if len(f.byCap) != maxFilters {
		t.Errorf("%d filters cached, want %d", len(f.byCap), maxFilters)
	}
}

func TestAppArmor(t *testing.T) {
	const def, none, local = cri.SecurityProfile_RuntimeDefault, cri.SecurityProfile_Unconfined, cri.SecurityProfile_Localhost
	for name, tc := range map[string]struct {
		typed           *cri.SecurityProfile
		old             string
		has             bool
		disable, broken bool
		want            string
	}{
		"nothing, no AppArmor":   {},
		"nothing":                {has: true, want: AppArmorProfile},
		"disabled":               {has: true, disable: true},
		"default, no AppArmor":   {typed: profile(def, "")},
		"default":                {typed: profile(def, ""), has: true, want: AppArmorProfile},
		"unconfined":             {typed: profile(none, ""), has: true},
		"unconfined, none":       {typed: profile(none, "")},
		"old default":            {old: "runtime/default", has: true, want: AppArmorProfile},
		"old unconfined":         {old: "unconfined", has: true},
		"old own":                {old: "localhost/web", has: true, want: "web"},
		"own":                    {typed: profile(local, "web"), has: true, want: "web"},
		"own with prefix":        {typed: profile(local, "localhost/web"), has: true, want: "web"},
		"own, no AppArmor":       {typed: profile(local, "web"), broken: true},
		"own, disabled":          {typed: profile(local, "web"), has: true, disable: true, broken: true},
		"old own, no AppArmor":   {old: "localhost/web", broken: true},
		"own without name":       {typed: profile(local, ""), has: true, broken: true},
		"own with a line break":  {typed: profile(local, "a\nb"), has: true, broken: true},
		"unknown type":           {typed: profile(9, ""), has: true, broken: true},
		"unknown string":         {old: "web", has: true, broken: true},
		"typed beats old string": {typed: profile(none, ""), old: "localhost/web", has: true},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Container(newInput(func(in *ContainerInput) {
				in.Host.AppArmor, in.Policy.DisableAppArmor = tc.has, tc.disable
				sec(in).Apparmor, sec(in).ApparmorProfile = tc.typed, tc.old
			}))
			if (err != nil) != tc.broken || err == nil && s.Process.ApparmorProfile != tc.want {
				t.Errorf("got %v, %v", s, err)
			}
		})
	}
}

// The process of a privileged container is not confined, its files are labelled
// like others'.
func TestSELinux(t *testing.T) {
	labels := record.Labels{Process: "u:r:t:s0:c1,c2", Mount: "u:o:f:s0:c1,c2"}
	base := &specs.Spec{Process: &specs.Process{SelinuxLabel: "base"}, Linux: &specs.Linux{MountLabel: "base"}}
	for name, tc := range map[string]struct {
		change  func(*ContainerInput)
		labels  record.Labels
		process string
		mount   string
	}{
		"off":        {nil, record.Labels{}, "", ""},
		"on":         {nil, labels, labels.Process, labels.Mount},
		"privileged": {privileged, labels, "", labels.Mount},
		"base":       {func(in *ContainerInput) { in.Handler.BaseSpec = base }, record.Labels{}, "", ""},
		"host's processes": {func(in *ContainerInput) {
			in.Pod.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_NODE}
		}, labels, "", labels.Mount},
		"host's processes, the container": {func(in *ContainerInput) {
			sec(in).NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_NODE}
		}, labels, "", labels.Mount},
		"host's IPC, with a type": {func(in *ContainerInput) {
			in.Pod.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Ipc: cri.NamespaceMode_NODE}
			sec(in).SelinuxOptions = &cri.SELinuxOption{Type: "t"}
		}, labels, labels.Process, labels.Mount},
		"host's network": {func(in *ContainerInput) {
			in.Pod.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}
		}, labels, labels.Process, labels.Mount},
		"host's network, by the switch": {func(in *ContainerInput) {
			in.Policy.HostNetworkDisableSELinux = true
			in.Pod.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}
		}, labels, "", labels.Mount},
		"the switch alone": {func(in *ContainerInput) { in.Policy.HostNetworkDisableSELinux = true }, labels, labels.Process, labels.Mount},
	} {
		s := mustContainer(t, func(in *ContainerInput) {
			if tc.change != nil {
				tc.change(in)
			}
			in.Labels = tc.labels
		})
		if s.Process.SelinuxLabel != tc.process || s.Linux.MountLabel != tc.mount {
			t.Errorf("%s: %q, %q", name, s.Process.SelinuxLabel, s.Linux.MountLabel)
		}
	}
	for _, private := range []bool{false, true} {
		s := mustPause(t, func(in *PauseInput) {
			in.Labels = labels
			in.Config.Linux.SecurityContext.Privileged = private
		})
		if (s.Process.SelinuxLabel == "") != private || s.Linux.MountLabel != labels.Mount {
			t.Errorf("pause, privileged %v: %q, %q", private, s.Process.SelinuxLabel, s.Linux.MountLabel)
		}
	}
}

func TestPaths(t *testing.T) {
	given := func(in *ContainerInput) {
		sec(in).MaskedPaths, sec(in).ReadonlyPaths = []string{"/proc/kcore"}, []string{"/proc/sys"}
	}
	s := mustContainer(t, given)
	if !slices.Equal(s.Linux.MaskedPaths, []string{"/proc/kcore"}) || !slices.Equal(s.Linux.ReadonlyPaths, []string{"/proc/sys"}) {
		t.Errorf("given: %v, %v", s.Linux.MaskedPaths, s.Linux.ReadonlyPaths)
	}
	if s = mustContainer(t, nil); len(s.Linux.MaskedPaths)+len(s.Linux.ReadonlyPaths) != 0 {
		t.Errorf("empty: %v, %v", s.Linux.MaskedPaths, s.Linux.ReadonlyPaths)
	}
	s = mustContainer(t, func(in *ContainerInput) { given(in); in.Policy.DisableProcMount = true })
	if !slices.Equal(s.Linux.MaskedPaths, DefaultMaskedPaths([]int{0, 1})) || !slices.Equal(s.Linux.ReadonlyPaths, DefaultReadonlyPaths()) {
		t.Errorf("ProcMount disabled: %v, %v", s.Linux.MaskedPaths, s.Linux.ReadonlyPaths)
	}
	s = mustContainer(t, func(in *ContainerInput) { given(in); privileged(in); in.Policy.DisableProcMount = true })
	if len(s.Linux.MaskedPaths)+len(s.Linux.ReadonlyPaths) != 0 {
		t.Errorf("privileged: %v, %v", s.Linux.MaskedPaths, s.Linux.ReadonlyPaths)
	}
	wantError(t, errdefs.ErrInvalidArgument, "masked_paths[0]", func(in *ContainerInput) { sec(in).MaskedPaths = []string{"proc"} })
	wantError(t, errdefs.ErrInvalidArgument, "readonly_paths[1]", func(in *ContainerInput) { sec(in).ReadonlyPaths = []string{"/a", ""} })
}

// The eight points that the CRI lists under privileged.
func TestPrivileged(t *testing.T) {
	s := mustContainer(t, func(in *ContainerInput) {
		privileged(in)
		in.Host.AppArmor, in.Host.SELinux = true, true
		sec(in).Seccomp = profile(cri.SecurityProfile_RuntimeDefault, "")
		sec(in).Apparmor = profile(cri.SecurityProfile_Localhost, "web")
		sec(in).MaskedPaths = []string{"/proc/kcore"}
		sec(in).ReadonlyPaths = []string{"/proc/sys"}
		sec(in).Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}}
		in.HostDevices = []facts.Device{{Path: "/dev/kvm", Type: "c", Major: 10, Minor: 232, Mode: 0o600}}
	})
	if !slices.Equal(s.Process.Capabilities.Bounding, testHost().Capabilities) {
		t.Errorf("1 capabilities: %v", s.Process.Capabilities.Bounding)
	}
	if len(s.Linux.MaskedPaths) != 0 || len(s.Linux.ReadonlyPaths) != 0 {
		t.Errorf("2 masked: %v, %v", s.Linux.MaskedPaths, s.Linux.ReadonlyPaths)
	}
	for _, d := range []string{"/sys", "/sys/fs/cgroup", "/proc"} {
		if m, ok := findMount(s, d); !ok || slices.Contains(m.Options, "ro") || d != "/proc" && !slices.Contains(m.Options, "rw") {
			t.Errorf("3 %s: %+v", d, m)
		}
	}
	if s.Process.ApparmorProfile != "" {
		t.Errorf("4 AppArmor: %s", s.Process.ApparmorProfile)
	}
	if s.Linux.Seccomp != nil {
		t.Error("5 seccomp")
	}
	if r := s.Linux.Resources.Devices; len(r) != 1 || !r[0].Allow || r[0].Access != "rwm" || r[0].Type != "" {
		t.Errorf("6 device cgroup: %+v", r)
	}
	if d := s.Linux.Devices; len(d) != 1 || d[0].Path != "/dev/kvm" || d[0].Major != 10 || d[0].Minor != 232 || *d[0].FileMode != 0o600 {
		t.Errorf("7 devices: %+v", d)
	}
	if s.Process.SelinuxLabel != "" || s.Linux.MountLabel != "" {
		t.Error("8 SELinux")
	}
	wantError(t, errdefs.ErrInvalidArgument, "privileged", func(in *ContainerInput) { sec(in).Privileged = true })
}

func TestPrivilegedWithoutHostDevices(t *testing.T) {
	for all, rules := range map[bool]int{false: len(defaultDeviceRules()), true: 1} {
		s := mustContainer(t, func(in *ContainerInput) {
			privileged(in)
			in.Handler.PrivilegedWithoutHostDevices, in.Handler.PrivilegedWithoutHostDevicesAllDevicesAllowed = true, all
			in.HostDevices = []facts.Device{{Path: "/dev/kvm", Type: "c"}}
		})
		if len(s.Linux.Devices) != 0 || len(s.Linux.Resources.Devices) != rules || s.Linux.Resources.Devices[0].Allow != all {
			t.Errorf("all %v: %+v, %+v", all, s.Linux.Devices, s.Linux.Resources.Devices)
		}
	}
}

func TestDevices(t *testing.T) {
	fuse := facts.Device{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, Mode: 0o666, UID: 3, GID: 4, Permissions: "rw"}
	loop := facts.Device{Path: "/dev/loop0", Type: "b", Major: 7, Minor: 0, Mode: 0o660}
	s := mustContainer(t, func(in *ContainerInput) { in.Devices = []facts.Device{fuse, loop} })
	if d := s.Linux.Devices; len(d) != 2 || d[0].Path != "/dev/fuse" || *d[0].UID != 3 || *d[0].GID != 4 || d[1].Type != "b" {
		t.Errorf("devices %+v", d)
	}
	rules := s.Linux.Resources.Devices
	if rules[0].Allow || rules[0].Access != "rwm" || rules[0].Major != nil {
		t.Errorf("first rule %+v, want deny all", rules[0])
	}
	for _, r := range rules[1:] {
		if !r.Allow || r.Major == nil || r.Type == "" {
			t.Errorf("rule %+v is too wide", r)
		}
	}
	last := rules[len(rules)-2:]
	if *last[0].Minor != 229 || last[0].Access != "rw" || last[1].Type != "b" || last[1].Access != "rwm" {
		t.Errorf("requested rules %+v", last)
	}
	owned := func(in *ContainerInput) {
		in.Devices, in.Policy.DeviceOwnership = []facts.Device{fuse}, true
		sec(in).RunAsUser = &cri.Int64Value{Value: 1000}
	}
	s = mustContainer(t, owned)
	if *s.Linux.Devices[0].UID != 1000 || *s.Linux.Devices[0].GID != 4 {
		t.Errorf("owner %d:%d, want 1000:4", *s.Linux.Devices[0].UID, *s.Linux.Devices[0].GID)
	}
	s = mustContainer(t, func(in *ContainerInput) { owned(in); sec(in).RunAsGroup = &cri.Int64Value{Value: 1001} })
	if *s.Linux.Devices[0].GID != 1001 {
		t.Errorf("group %d, want 1001", *s.Linux.Devices[0].GID)
	}
	// The requested node beats the host's at the same path.
	s = mustContainer(t, func(in *ContainerInput) {
		privileged(in)
		in.HostDevices, in.Devices = []facts.Device{loop, fuse}, []facts.Device{{Path: "/dev/loop0", Type: "b", Major: 7, Minor: 5}}
	})
	if d := s.Linux.Devices; len(d) != 2 || d[0].Minor != 5 {
		t.Errorf("override: %+v", d)
	}
	for _, bad := range []string{"x", "rwmx", "rwmr", "R"} {
		wantError(t, errdefs.ErrInvalidArgument, "devices[0].permissions", func(in *ContainerInput) {
			in.Config.Devices = []*cri.Device{{HostPath: "/dev/fuse", Permissions: bad}}
		})
	}
}
