package spec

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

const hostRoot = 100000

func userNS(length uint32) *cri.UserNamespace {
	return &cri.UserNamespace{
		Mode: modePod,
		Uids: []*cri.IDMapping{{HostId: hostRoot, Length: length}},
		Gids: []*cri.IDMapping{{HostId: hostRoot + 1, Length: length}},
	}
}

// withUserns gives pod and container a user namespace of that size.
func withUserns(length uint32) func(*ContainerInput) {
	return func(in *ContainerInput) {
		in.Pod.Linux.SecurityContext.NamespaceOptions.UsernsOptions = userNS(length)
		sec(in).NamespaceOptions.UsernsOptions = userNS(length)
		in.Namespaces.User = "/pin/user"
	}
}

func pauseWithUserns(length uint32) func(*PauseInput) {
	return func(in *PauseInput) {
		in.Config.Linux = &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: modeContainer, UsernsOptions: userNS(length)},
		}}
		in.UserNS = "/pin/user"
	}
}

// TestNodeUserns: which pods and containers get the user namespace of the node,
// and that nothing that was given is changed.
func TestNodeUserns(t *testing.T) {
	mapping := []*cri.IDMapping{{HostId: 1 << 20, Length: 1 << 16}}
	nodes := &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: mapping, Gids: mapping}
	own := &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: mapping[:1:1], Gids: []*cri.IDMapping{{HostId: 1 << 21, Length: 1 << 16}}}
	pod := func(o *cri.NamespaceOption, privileged bool) *cri.PodSandboxConfig {
		return &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: o, Privileged: privileged}}}
	}
	for name, tc := range map[string]struct {
		pod  *cri.PodSandboxConfig
		want *cri.UserNamespace
	}{
		"nothing said": {&cri.PodSandboxConfig{}, nodes},
		"none":         {pod(&cri.NamespaceOption{}, false), nodes},
		"the host's":   {pod(&cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: modeNode}}, false), nodes},
		"its own":      {pod(&cri.NamespaceOption{UsernsOptions: own}, false), own},
		"privileged":   {pod(nil, true), nil},
		"network":      {pod(&cri.NamespaceOption{Network: modeNode}, false), nil},
		"processes":    {pod(&cri.NamespaceOption{Pid: modeNode}, false), nil},
		"IPC":          {pod(&cri.NamespaceOption{Ipc: modeNode}, false), nil},
	} {
		before := proto.Clone(tc.pod).(*cri.PodSandboxConfig)
		got := InNodeUserns(tc.pod, Policy{Userns: nodes})
		if !proto.Equal(podUserns(got), tc.want) {
			t.Errorf("%s: %v", name, podUserns(got))
		}
		if !proto.Equal(before, tc.pod) || InNodeUserns(tc.pod, Policy{}) != tc.pod {
			t.Errorf("%s: changed to %v", name, tc.pod)
		}
		c := InPodUserns(&cri.ContainerConfig{}, got, tc.pod)
		if u := c.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions(); ownUserns(u) != (podUserns(got) != podUserns(tc.pod)) {
			t.Errorf("%s: a container has %v", name, u)
		}
		if c := (&cri.ContainerConfig{}); InPodUserns(c, got, nil) != c {
			t.Errorf("%s: a container of a pod that nobody sent is changed", name)
		}
	}
}

func TestCheckUserns(t *testing.T) {
	const size = 1 << 16
	mapped := func(list ...*cri.IDMapping) *cri.UserNamespace {
		return &cri.UserNamespace{Mode: modePod, Uids: list, Gids: []*cri.IDMapping{{HostId: 1, Length: 1}}}
	}
	for field, u := range map[string]*cri.UserNamespace{
		"userns_options.mode: CONTAINER": {Mode: modeContainer},
		"userns_options.mode: TARGET":    {Mode: modeTarget},
		"userns_options.mode: 9":         {Mode: 9},
		"id mappings with mode NODE":     {Mode: modeNode, Gids: []*cri.IDMapping{{Length: 1}}},
		"uids: 0 mappings":               {Mode: modePod},
		"uids: 2 mappings":               mapped(&cri.IDMapping{HostId: 1, Length: 1}, &cri.IDMapping{HostId: 2, ContainerId: 1, Length: 1}),
		"gids: 0 mappings":               {Mode: modePod, Uids: []*cri.IDMapping{{Length: 1}}},
		"uids[0].container_id: 1":        mapped(&cri.IDMapping{ContainerId: 1, Length: size}),
		"uids[0].length: zero":           mapped(&cri.IDMapping{}),
		"uids[0]: 2 numbers from host":   mapped(&cri.IDMapping{HostId: 1<<32 - 2, Length: 2}),
		"uids[0]: 4294967295 numbers":    mapped(&cri.IDMapping{HostId: 1, Length: 1<<32 - 1}),
		"uids[0]: missing":               mapped(nil),
	} {
		err := checkUserns("userns_options", u)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	for name, u := range map[string]*cri.UserNamespace{
		"absent": nil, "of the node": {Mode: modeNode}, "usual": userNS(size), "one": userNS(1),
		"up to the last": {Mode: modePod, Uids: []*cri.IDMapping{{HostId: 1, Length: lastID}}, Gids: []*cri.IDMapping{{Length: lastID + 1}}},
	} {
		if err := checkUserns("userns_options", u); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUsernsOptionsOfPodAndContainer(t *testing.T) {
	for field, o := range map[string]*cri.NamespaceOption{
		"pid with a user namespace": {Pid: modeNode, UsernsOptions: userNS(9)},
		"ipc with a user namespace": {Ipc: modeNode, UsernsOptions: userNS(9)},
	} {
		if err := checkPodOptions("o", o); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	if err := checkPodOptions("o", &cri.NamespaceOption{Network: modeNode, UsernsOptions: userNS(9)}); err != nil {
		t.Errorf("host network: %v", err)
	}
	other := userNS(9)
	other.Gids[0].HostId++
	pod := &cri.NamespaceOption{UsernsOptions: userNS(9)}
	for name, tc := range map[string]struct {
		own, pod *cri.NamespaceOption
		field    string
	}{
		"none":          {&cri.NamespaceOption{}, pod, "userns_options: not those of the pod"},
		"node's":        {&cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: modeNode}}, pod, "not those of the pod"},
		"other numbers": {&cri.NamespaceOption{UsernsOptions: other}, pod, "not those of the pod"},
		"pod has none":  {pod, &cri.NamespaceOption{}, "not those of the pod"},
		"host PID":      {&cri.NamespaceOption{Pid: modeNode, UsernsOptions: userNS(9)}, pod, "pid with a user namespace"},
		"no namespace":  {&cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: modePod}}, pod, "userns_options.uids"},
	} {
		if err := checkContainerOptions("o", tc.own, tc.pod); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.field) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := checkContainerOptions("o", &cri.NamespaceOption{UsernsOptions: userNS(9)}, pod); err != nil {
		t.Errorf("the same: %v", err)
	}
	node := &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: modeNode}}
	if err := checkContainerOptions("o", &cri.NamespaceOption{}, node); err != nil {
		t.Errorf("absent is the node's: %v", err)
	}
}

func TestContainerUserns(t *testing.T) {
	s := mustContainer(t, withUserns(1<<16))
	if path, ok := findNamespace(s, specs.UserNamespace); !ok || path != "/pin/user" {
		t.Errorf("user namespace %q, %v", path, ok)
	}
	if got := s.Linux.UIDMappings; len(got) != 1 || got[0] != (specs.LinuxIDMapping{HostID: hostRoot, Size: 1 << 16}) {
		t.Errorf("users %v", got)
	}
	if got := s.Linux.GIDMappings; len(got) != 1 || got[0] != (specs.LinuxIDMapping{HostID: hostRoot + 1, Size: 1 << 16}) {
		t.Errorf("groups %v", got)
	}
	if sys, _ := findMount(s, "/sys"); sys.Type != "sysfs" {
		t.Errorf("/sys is %+v", sys)
	}
	wantError(t, errdefs.ErrFailedPrecondition, "no user namespace", func(in *ContainerInput) { withUserns(1 << 16)(in); in.Namespaces.User = "" })
	for text, id := range map[string]facts.User{
		"user 1000 is":  {UID: 1000, AdditionalGIDs: []uint32{0}},
		"group 1000 is": {GID: 1000},
		"group 1001 is": {AdditionalGIDs: []uint32{0, 1001}},
	} {
		wantError(t, errdefs.ErrInvalidArgument, text, func(in *ContainerInput) { withUserns(1000)(in); in.User = id })
	}
}

func TestUsernsMounts(t *testing.T) {
	host := func(in *ContainerInput) {
		withUserns(5)(in)
		in.User = facts.User{}
		in.Handler.RecursiveReadOnly = true
		for _, o := range []*cri.NamespaceOption{in.Pod.Linux.SecurityContext.NamespaceOptions, sec(in).NamespaceOptions} {
			o.Network = modeNode
		}
	}
	s := mustContainer(t, host)
	if sys, _ := findMount(s, "/sys"); sys.Type != "bind" || sys.Source != "/sys" || !slices.Contains(sys.Options, "rro") || !slices.Contains(sys.Options, "rbind") {
		t.Errorf("/sys is %+v", sys)
	}
	if pts, _ := findMount(s, "/dev/pts"); slices.Contains(pts.Options, "gid=5") {
		t.Errorf("terminals belong to a group that does not exist: %+v", pts)
	}
	s = mustContainer(t, func(in *ContainerInput) { host(in); in.Handler.RecursiveReadOnly = false })
	if sys, _ := findMount(s, "/sys"); !slices.Contains(sys.Options, "ro") || slices.Contains(sys.Options, "rro") {
		t.Errorf("/sys is %+v", sys)
	}
	s = mustContainer(t, func(in *ContainerInput) { withUserns(6)(in); in.User = facts.User{} })
	if pts, _ := findMount(s, "/dev/pts"); !slices.Contains(pts.Options, "gid=5") {
		t.Errorf("terminals belong to nobody: %+v", pts)
	}
}

// A device at another path than on the host is bound, as no node can be made.
func TestUsernsDevices(t *testing.T) {
	moved := facts.Device{Path: "/dev/mine", HostPath: "/dev/zero", Type: "c", Major: 1, Minor: 5, Permissions: "r"}
	same := facts.Device{Path: "/dev/fuse", HostPath: "/dev/fuse", Type: "c", Major: 10, Minor: 229}
	with := func(in *ContainerInput) { in.Devices = []facts.Device{moved, same} }
	s := mustContainer(t, func(in *ContainerInput) { withUserns(1 << 16)(in); with(in) })
	if len(s.Linux.Devices) != 1 || s.Linux.Devices[0].Path != "/dev/fuse" {
		t.Errorf("nodes %+v", s.Linux.Devices)
	}
	m, _ := findMount(s, "/dev/mine")
	if m.Type != "bind" || m.Source != "/dev/zero" || slices.Contains(m.Options, "nodev") {
		t.Errorf("mount %+v", m)
	}
	if rules := s.Linux.Resources.Devices; *rules[len(rules)-2].Minor != 5 || rules[len(rules)-2].Access != "r" {
		t.Errorf("rules %+v", rules)
	}
	if s := mustContainer(t, with); len(s.Linux.Devices) != 2 {
		t.Errorf("without a user namespace: %+v", s.Linux.Devices)
	}
}

func TestPauseUserns(t *testing.T) {
	s := mustPause(t, pauseWithUserns(1<<16))
	if path, ok := findNamespace(s, specs.UserNamespace); !ok || path != "/pin/user" || len(s.Linux.UIDMappings) != 1 || len(s.Linux.GIDMappings) != 1 {
		t.Errorf("user namespace %q, %v", path, s.Linux.UIDMappings)
	}
	if s.Process.User.UID != pauseID {
		t.Errorf("runs as %d", s.Process.User.UID)
	}
	if s := mustPause(t, pauseWithUserns(10)); s.Process.User.UID != 9 || s.Process.User.GID != 9 {
		t.Errorf("in a small one it runs as %+v", s.Process.User)
	}
	s = mustPause(t, func(in *PauseInput) {
		pauseWithUserns(1 << 16)(in)
		in.Config.Linux.SecurityContext.NamespaceOptions.Network = modeNode
	})
	if sys, _ := findMount(s, "/sys"); sys.Type != "bind" {
		t.Errorf("/sys is %+v", sys)
	}
	for name, change := range map[string]func(*PauseInput){
		"no user namespace": func(in *PauseInput) { in.UserNS = "" },
		"user 10 is":        func(in *PauseInput) { in.Config.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 10} },
	} {
		if _, err := Pause(newPause(func(in *PauseInput) { pauseWithUserns(10)(in); change(in) })); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMountMappings(t *testing.T) {
	ids := []*cri.IDMapping{{HostId: hostRoot, Length: 10}, {HostId: 5, ContainerId: 10, Length: 1}}
	m := bind("/a", "/b")
	m.UIDMappings, m.GIDMappings = ids, ids[:1]
	withMapped := func(in *ContainerInput) { withMounts(m)(in); in.Handler.IDMapMounts, in.Handler.Name = true, "runc" }
	got, _ := findMount(mustContainer(t, withMapped), "/b")
	if !slices.Equal(got.UIDMappings, []specs.LinuxIDMapping{{HostID: hostRoot, Size: 10}, {HostID: 5, ContainerID: 10, Size: 1}}) || len(got.GIDMappings) != 1 {
		t.Errorf("mount %+v", got)
	}
	wantError(t, errdefs.ErrFailedPrecondition, `mounts[0]: uidMappings, gidMappings: runtime handler "runc"`, func(in *ContainerInput) {
		withMapped(in)
		in.Handler.IDMapMounts = false
	})
	for field, m := range map[string]*cri.Mount{
		"m: uidMappings and gidMappings: only one": {UidMappings: ids},
		"m.uidMappings[0].length":                  {UidMappings: []*cri.IDMapping{{}}, GidMappings: ids},
		"m.gidMappings[1]: missing":                {UidMappings: ids, GidMappings: []*cri.IDMapping{{Length: 1}, nil}},
		"m.gidMappings[1]: overlaps":               {UidMappings: ids, GidMappings: []*cri.IDMapping{{Length: 2}, {HostId: 1, ContainerId: 5, Length: 1}}},
		"m.uidMappings[1]: overlaps":               {UidMappings: []*cri.IDMapping{{Length: 2}, {HostId: 9, ContainerId: 1, Length: 1}}, GidMappings: ids},
		"m.uidMappings[0]: 2 numbers from contai":  {UidMappings: []*cri.IDMapping{{ContainerId: lastID, Length: 2}}, GidMappings: ids},
		"m.uidMappings: 341 mappings":              {UidMappings: make([]*cri.IDMapping, 341), GidMappings: ids},
	} {
		if err := checkMountMappings("m", m); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	if err := checkMountMappings("m", &cri.Mount{UidMappings: ids, GidMappings: ids}); err != nil {
		t.Error(err)
	}
}
