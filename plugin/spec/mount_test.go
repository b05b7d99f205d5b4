package spec

import (
	"errors"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// withMounts asks for mounts as the CRI does, and resolves them.
func withMounts(mounts ...facts.Mount) func(*ContainerInput) {
	return func(in *ContainerInput) {
		for _, m := range mounts {
			in.Mounts = append(in.Mounts, m)
			in.Config.Mounts = append(in.Config.Mounts, &cri.Mount{
				HostPath: m.Source, ContainerPath: m.Destination, Readonly: m.Readonly,
				RecursiveReadOnly: m.RecursiveReadonly, Propagation: m.Propagation,
			})
		}
	}
}

func bind(source, destination string) facts.Mount {
	return facts.Mount{Source: source, Destination: destination}
}

func destinations(s *specs.Spec) (list []string) {
	for _, m := range s.Mounts {
		list = append(list, m.Destination)
	}
	return list
}

func TestDefaultMounts(t *testing.T) {
	s := mustContainer(t, nil)
	want := []string{"/proc", "/dev", "/sys", "/dev/pts", "/dev/mqueue", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm", "/sys/fs/cgroup"}
	if got := destinations(s); !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if m, _ := findMount(s, "/dev/shm"); m.Type != "bind" || m.Source != "/pod/shm" || !slices.Contains(m.Options, "noexec") {
		t.Errorf("shm: %+v", m)
	}
	if s.Linux.RootfsPropagation != "" {
		t.Errorf("propagation %q", s.Linux.RootfsPropagation)
	}
	s = mustContainer(t, func(in *ContainerInput) { in.Files = Files{}; sec(in).ReadonlyRootfs = true })
	if got := destinations(s); slices.Contains(got, "/etc/hosts") || slices.Contains(got, "/dev/shm") {
		t.Errorf("no files: %v", got)
	}
	for readonly, mode := range map[bool]string{true: "ro", false: "rw"} {
		s = mustContainer(t, func(in *ContainerInput) { sec(in).ReadonlyRootfs = readonly })
		if m, _ := findMount(s, "/etc/hosts"); !slices.Contains(m.Options, mode) {
			t.Errorf("hosts: %v, want %s", m.Options, mode)
		}
	}
}

func TestMountOrderAndOverride(t *testing.T) {
	for name, tc := range map[string]struct {
		mounts  []facts.Mount
		volumes []facts.Mount
		want    []string // destination=source of binds; in this order
		gone    []string
	}{
		"parents first": {
			mounts: []facts.Mount{bind("/1", "/a/b/c"), bind("/2", "/a"), bind("/3", "/a/b"), bind("/4", "/z")},
			want:   []string{"/a=/2", "/z=/4", "/a/b=/3", "/a/b/c=/1"},
		},
		"the last of equals": {mounts: []facts.Mount{bind("/1", "/a"), bind("/2", "/a/")}, want: []string{"/a=/2"}},
		"hosts file":         {mounts: []facts.Mount{bind("/1", "/etc/hosts")}, want: []string{"/etc/hostname=/pod/hostname", "/etc/hosts=/1"}},
		"etc": {
			mounts: []facts.Mount{bind("/1", "/etc")},
			want:   []string{"/etc=/1", "/etc/hosts=/pod/hosts"},
		},
		"dev":    {mounts: []facts.Mount{bind("/dev", "/dev")}, want: []string{"/dev=/dev", "/dev/shm=/pod/shm"}, gone: []string{"/dev/pts", "/dev/mqueue"}},
		"shm":    {mounts: []facts.Mount{bind("/1", "/dev/shm")}, want: []string{"/dev/shm=/1"}},
		"sys":    {mounts: []facts.Mount{bind("/sys", "/sys")}, want: []string{"/sys=/sys"}, gone: []string{"/sys/fs/cgroup"}},
		"sysfs":  {mounts: []facts.Mount{bind("/1", "/system")}, want: []string{"/sys=sysfs", "/system=/1", "/sys/fs/cgroup=cgroup"}},
		"cgroup": {mounts: []facts.Mount{bind("/1", "/sys/fs/cgroup")}, want: []string{"/sys=sysfs", "/sys/fs/cgroup=/1"}},
		"proc":   {mounts: []facts.Mount{bind("/proc", "/proc")}, want: []string{"/proc=/proc"}},
		"volume": {volumes: []facts.Mount{bind("/v", "/data")}, want: []string{"/data=/v"}},
		"mount beats volume": {
			mounts: []facts.Mount{bind("/1", "/data")}, volumes: []facts.Mount{bind("/v", "/data"), bind("/w", "/data/w")},
			want: []string{"/data=/1", "/data/w=/w"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := mustContainer(t, func(in *ContainerInput) { withMounts(tc.mounts...)(in); in.Volumes = tc.volumes })
			var got []string
			seen := map[string]bool{}
			for _, m := range s.Mounts {
				if entry := m.Destination + "=" + m.Source; slices.Contains(tc.want, entry) {
					got = append(got, entry)
				}
				if seen[m.Destination] || slices.Contains(tc.gone, m.Destination) {
					t.Errorf("%s: %v", m.Destination, destinations(s))
				}
				seen[m.Destination] = true
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got %v, want %v in %v", got, tc.want, destinations(s))
			}
			for i := range s.Mounts[1:] {
				if depth(s.Mounts[i].Destination) > depth(s.Mounts[i+1].Destination) {
					t.Errorf("child before parent: %v", destinations(s))
				}
			}
		})
	}
}

func TestMountOptions(t *testing.T) {
	const slave, shared = cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, cri.MountPropagation_PROPAGATION_BIDIRECTIONAL
	for _, tc := range []struct {
		m       facts.Mount
		options []string
		root    string
	}{
		{bind("/a", "/b"), []string{"rbind", "rprivate", "rw"}, ""},
		{facts.Mount{Source: "/a", Destination: "/b", Readonly: true}, []string{"rbind", "rprivate", "ro"}, ""},
		{facts.Mount{Source: "/a", Destination: "/b", Readonly: true, RecursiveReadonly: true}, []string{"rbind", "rprivate", "rro"}, ""},
		{facts.Mount{Source: "/a", Destination: "/b", Propagation: slave}, []string{"rbind", "rslave", "rw"}, "rslave"},
		{facts.Mount{Source: "/a", Destination: "/b", Readonly: true, Propagation: shared}, []string{"rbind", "rshared", "ro"}, "rshared"},
	} {
		s := mustContainer(t, func(in *ContainerInput) { withMounts(tc.m)(in); in.Handler.RecursiveReadOnly = true })
		m, _ := findMount(s, "/b")
		if !slices.Equal(m.Options, tc.options) || m.Type != "bind" || m.Source != "/a" || s.Linux.RootfsPropagation != tc.root {
			t.Errorf("%+v: got %+v, root %q", tc.m, m, s.Linux.RootfsPropagation)
		}
	}
	for _, order := range [][]cri.MountPropagation{{slave, shared, 0}, {shared, slave, 0}, {0, shared, slave}} {
		var mounts []facts.Mount
		for i, p := range order {
			mounts = append(mounts, facts.Mount{Source: "/a", Destination: "/" + string(rune('a'+i)), Propagation: p})
		}
		if s := mustContainer(t, withMounts(mounts...)); s.Linux.RootfsPropagation != "rshared" {
			t.Errorf("%v: root %q", order, s.Linux.RootfsPropagation)
		}
	}
}

func TestRecursiveReadOnlyErrors(t *testing.T) {
	rro := facts.Mount{Source: "/a", Destination: "/b", Readonly: true, RecursiveReadonly: true}
	_, err := Container(newInput(withMounts(rro)))
	if !errors.Is(err, crierrors.ErrRROUnsupported) || !errdefs.IsNotImplemented(err) {
		t.Errorf("no support: %v", err)
	}
	notRO, propagated := rro, rro
	notRO.Readonly = false
	propagated.Propagation = cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	for _, m := range []facts.Mount{notRO, propagated} {
		wantError(t, errdefs.ErrInvalidArgument, "mounts[0].recursive_read_only", func(in *ContainerInput) { withMounts(m)(in); in.Handler.RecursiveReadOnly = true })
		wantError(t, errdefs.ErrInvalidArgument, "recursive_read_only", func(in *ContainerInput) { in.Volumes = []facts.Mount{m}; in.Handler.RecursiveReadOnly = true })
	}
}

func TestMountErrors(t *testing.T) {
	good := func() *cri.Mount { return &cri.Mount{HostPath: "/a", ContainerPath: "/b"} }
	for field, tc := range map[string]struct {
		class  error
		change func(*cri.Mount)
	}{
		"mounts[0]: host_path and":   {errdefs.ErrInvalidArgument, func(m *cri.Mount) { m.Image = &cri.ImageSpec{} }},
		"mounts[0].image_sub_path":   {errdefs.ErrInvalidArgument, func(m *cri.Mount) { m.ImageSubPath = "x" }},
		"mounts[0].mount_options[1]": {errdefs.ErrInvalidArgument, func(m *cri.Mount) { m.MountOptions = []string{"noexec", "exec"} }},
		"mounts[0].host_path":        {errdefs.ErrInvalidArgument, func(m *cri.Mount) { m.HostPath = "" }},
		"mounts[0].container_path":   {errdefs.ErrInvalidArgument, func(m *cri.Mount) { m.ContainerPath = "b" }},
		"container_path: the root":   {errdefs.ErrInvalidArgument, func(m *cri.Mount) { m.ContainerPath = "/b/.." }},
		"mounts[0].propagation":      {errdefs.ErrInvalidArgument, func(m *cri.Mount) { m.Propagation = 5 }},
		`"/b\x00" is not an absolu`:  {errdefs.ErrInvalidArgument, func(m *cri.Mount) { m.ContainerPath = "/b\x00" }},
	} {
		m := good()
		tc.change(m)
		wantError(t, tc.class, field, func(in *ContainerInput) {
			in.Config.Mounts, in.Mounts = []*cri.Mount{m}, []facts.Mount{bind("/a", "/b")}
		})
	}
	wantError(t, errdefs.ErrInvalidArgument, "mounts[0]: missing", func(in *ContainerInput) { in.Config.Mounts = []*cri.Mount{nil} })
	wantError(t, errdefs.ErrInternal, "0 of 1 mounts", func(in *ContainerInput) { in.Config.Mounts = []*cri.Mount{good()} })
}

func TestCgroupMount(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*ContainerInput)
		mode   string
		kept   bool
	}{
		"v1":            {func(*ContainerInput) {}, "ro", false},
		"v1 privileged": {privileged, "rw", false},
		"v1 writable":   {func(in *ContainerInput) { in.Handler.CgroupWritable = true }, "rw", false},
		"v2":            {func(in *ContainerInput) { in.Host = v2Host() }, "ro", false},
		"v2 privileged": {func(in *ContainerInput) { in.Host = v2Host(); privileged(in) }, "rw", true},
	} {
		s := mustContainer(t, tc.change)
		m, _ := findMount(s, "/sys/fs/cgroup")
		if m.Type != "cgroup" || !slices.Contains(m.Options, tc.mode) || slices.Contains(m.Options, "nsdelegate") != tc.kept {
			t.Errorf("%s: %+v", name, m)
		}
		// A privileged container on v2 and everybody on v1 see the host's.
		if _, own := findNamespace(s, specs.CgroupNamespace); own != (name == "v2") {
			t.Errorf("%s: cgroup namespace %v", name, own)
		}
	}
}

// TestMNT_23_CgroupWritable: a handler can let unprivileged containers manage the
// cgroups below their own. The tree they see is writable, and nothing else is.
func TestMNT_23_CgroupWritable(t *testing.T) {
	for name, tc := range map[string]struct {
		writable, privileged, v2 bool
		want                     string
	}{
		"no":                    {want: "ro"},
		"no, v2":                {v2: true, want: "ro"},
		"by the handler, v2":    {writable: true, v2: true, want: "rw"},
		"by privilege":          {privileged: true, want: "rw"},
		"by both":               {writable: true, privileged: true, v2: true, want: "rw"},
		"by the handler, no v2": {writable: true, want: "rw"}, // such a handler is refused before
	} {
		t.Run(name, func(t *testing.T) {
			s := mustContainer(t, func(in *ContainerInput) {
				if tc.v2 {
					in.Host = v2Host()
				}
				if tc.privileged {
					privileged(in)
				}
				in.Handler.CgroupWritable = tc.writable
			})
			m, ok := findMount(s, "/sys/fs/cgroup")
			if !ok || m.Type != "cgroup" || !slices.Contains(m.Options, tc.want) || slices.Contains(m.Options, map[string]string{"ro": "rw", "rw": "ro"}[tc.want]) {
				t.Errorf("cgroups: %+v", m)
			}
			if sys, _ := findMount(s, "/sys"); slices.Contains(sys.Options, "ro") == tc.privileged {
				t.Errorf("sysfs: %+v", sys)
			}
			if _, own := findNamespace(s, specs.CgroupNamespace); tc.v2 && !tc.privileged && !own {
				t.Error("it sees the host's tree")
			}
		})
	}
}
