package spec

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// Non-empty inheritable capabilities let programs with file capabilities gain
// more than the container was given.
func TestCVE_2022_24769_CVE_2022_29162_CVE_2022_27652_InheritableIsEmpty(t *testing.T) {
	all := []string{"CAP_SYS_ADMIN", "CAP_KILL"}
	base := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: all, Inheritable: all, Ambient: all}}}
	for name, change := range map[string]func(*ContainerInput){
		"default":    nil,
		"added":      func(in *ContainerInput) { sec(in).Capabilities.AddCapabilities = []string{"ALL", "NET_ADMIN"} },
		"privileged": privileged,
		"base":       func(in *ContainerInput) { in.Handler.BaseSpec = base },
	} {
		s := mustContainer(t, change)
		if c := s.Process.Capabilities; len(c.Inheritable) != 0 || len(c.Ambient) != 0 {
			t.Errorf("%s: %+v", name, c)
		}
		s = mustContainer(t, func(in *ContainerInput) {
			if change != nil {
				change(in)
			}
			sec(in).Capabilities.AddAmbientCapabilities = []string{"CHOWN"}
		})
		if c := s.Process.Capabilities; !slices.Equal(c.Inheritable, []string{"CAP_CHOWN"}) {
			t.Errorf("%s with an ambient capability: %+v", name, c)
		}
	}
}

// A value or a name could smuggle in a further setting, of the host.
func TestCVE_2022_0811_SysctlsCannotInjectOthers(t *testing.T) {
	for name, value := range map[string]string{
		"net.a+kernel.core_pattern":        "1",
		"net.a=1":                          "1",
		"net.a\nkernel.core_pattern":       "1",
		"net.a\n":                          "1",
		"net..a":                           "1",
		"net/../kernel/core_pattern":       "1",
		"net/./a":                          "1",
		".net.a":                           "1",
		"net.a/":                           "1",
		"":                                 "1",
		"net.a b":                          "1",
		"net.a\x00":                        "1",
		"net.core.somaxconn":               "1+kernel.core_pattern=|/evil",
		"net.b":                            "1\nkernel.core_pattern=|/evil",
		"net.c":                            "|/evil",
		"net.d":                            "1\x00",
		"net.e":                            strings.Repeat("1", 4097),
		"net." + strings.Repeat("a", 4096): "1",
		"kernel.shm_rmid_forced+kernel.core_patter": "1",
	} {
		pod := newInput(nil).Pod
		pod.Linux.Sysctls = map[string]string{name: value}
		if err := ValidatePod(pod); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q = %q: ValidatePod gave %v", name, value, err)
		}
		if got, err := Sysctls(pod, Policy{}, testHost()); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q = %q: Sysctls gave %v, %v", name, value, got, err)
		}
	}
}

// Settings of a namespace that the pod shares with the host are the host's.
func TestCVE_2022_0532_SysctlsOnlyInOwnNamespaces(t *testing.T) {
	for name, options := range map[string]*cri.NamespaceOption{
		"net.core.somaxconn":     {Network: modeNode},
		"net/ipv4/ip_forward":    {Network: modeNode},
		"kernel.domainname":      {Network: modeNode},
		"kernel.shmmax":          {Ipc: modeNode},
		"fs.mqueue.msg_max":      {Ipc: modeNode},
		"kernel/sem":             {Ipc: modeNode},
		"kernel.core_pattern":    {},
		"kernel.hostname":        {},
		"kernel.shmmax.x":        {},
		"kernel.msg":             {},
		"vm.overcommit_memory":   {},
		"fs.file-max":            {},
		"user.max_user_ns":       {},
		"network.core.somaxconn": {},
		"net":                    {},
	} {
		pod := newInput(nil).Pod
		pod.Linux.SecurityContext.NamespaceOptions = options
		pod.Linux.Sysctls = map[string]string{name: "1"}
		if err := ValidatePod(pod); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s with %v: %v", name, options, err)
		}
	}
}

// A pod's annotations became systemd properties and cgroup settings.
func TestCVE_2024_3154_CVE_2023_6476_AnnotationsStayOutside(t *testing.T) {
	hostile := map[string]string{
		"org.systemd.property.ExecStopPost":          "[('/bin/sh',['sh','-c','id'],true)]",
		"io.kubernetes.cri-o.UnifiedCgroup.web":      "memory.max=max",
		"cgroup.memory.max":                          "max",
		"run.oci.handler":                            "evil",
		"io.containerd.cri.runtime-handler":          "evil",
		AnnotationContainerType:                      "sandbox",
		"io.kubernetes.cri.sandbox-memory":           "0",
		"nvidia.cdi.k8s.io/not-the-prefix-it-honour": "x",
	}
	plain := mustContainer(t, nil)
	s := mustContainer(t, func(in *ContainerInput) { in.Pod.Annotations, in.Config.Annotations = hostile, hostile })
	if !maps.Equal(s.Annotations, plain.Annotations) {
		t.Errorf("got %v, want %v", s.Annotations, plain.Annotations)
	}
	if s.Linux.Resources.Unified != nil || s.Linux.CgroupsPath != plain.Linux.CgroupsPath {
		t.Errorf("resources: %+v", s.Linux.Resources)
	}
	if p := mustPause(t, func(in *PauseInput) { in.Config.Annotations = hostile }); len(p.Annotations) != len(mustPause(t, nil).Annotations) {
		t.Errorf("sandbox: %v", p.Annotations)
	}
}

// A raw cgroup file is a limit and nothing else: no move of processes, no path.
func TestCVE_2023_6476_UnifiedHoldsOnlyLimits(t *testing.T) {
	for _, key := range []string{"cgroup.procs", "cgroup.subtree_control", "../memory.max", "memory.max/../../x", "memory.max\x00", ""} {
		wantError(t, errdefs.ErrInvalidArgument, "unified", func(in *ContainerInput) {
			in.Host, in.Config.Linux.Resources.Unified = v2Host(), map[string]string{key: "1"}
		})
	}
}

// Log paths led out of the pod's directory.
func TestCVE_2025_0750_LogPathStaysInTheDirectory(t *testing.T) {
	for _, name := range []string{"..", "../x", "a/../../x", "a/..", "/etc/passwd", ".", "./", "a/", "a\x00", "a\nb", strings.Repeat("a", maxPath+1)} {
		if got, err := LogPath("/var/log/pods/p", name); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %q, %v", name, got, err)
		}
		pod := &cri.PodSandboxConfig{LogDirectory: "/var/log/pods/p"}
		c := &cri.ContainerConfig{Metadata: &cri.ContainerMetadata{Name: "a"}, Image: &cri.ImageSpec{Image: "i"}, LogPath: name}
		if err := ValidateContainer(c, pod); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "log_path") {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, dir := range []string{"var/log", "/var/log/../../etc", "/a\x00"} {
		if got, err := LogPath(dir, "a"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %q, %v", dir, got, err)
		}
	}
}

// Names and HOME went into line files; the bytes count, not how they are
// written.
func TestCVE_2022_4318_CVE_2026_15809_NoLineBreaksInNamesAndHome(t *testing.T) {
	for _, b := range []string{"\n", "\r", "\x00"} {
		for name, change := range map[string]func(*ContainerInput){
			"request": func(in *ContainerInput) {
				in.Config.Envs = []*cri.KeyValue{{Key: "HOME", Value: []byte("/x" + b + "y")}}
			},
			"image":  func(in *ContainerInput) { in.ImageConfig.Env = []string{"HOME=/x" + b + "y"} },
			"passwd": func(in *ContainerInput) { in.User.Home = "/x" + b + "y" },
		} {
			if _, err := Container(newInput(change)); !errdefs.IsInvalidArgument(err) {
				t.Errorf("HOME of the %s with %q: %v", name, b, err)
			}
		}
	}
	for _, b := range []string{"\n", "\r", "\x00", ":", "/", " "} {
		pod := newInput(nil).Pod
		pod.Hostname = "a" + b + "b"
		if err := ValidatePod(pod); !errdefs.IsInvalidArgument(err) {
			t.Errorf("hostname with %q: %v", b, err)
		}
	}
	// The two characters \ and n are harmless.
	if s := mustContainer(t, func(in *ContainerInput) { in.User.Home = `/x\ny` }); !slices.Contains(s.Process.Env, `HOME=/x\ny`) {
		t.Errorf("env %q", s.Process.Env)
	}
}

// A working directory on a leaked file descriptor was outside the container.
func TestCVE_2024_21626_WorkingDirIsNotAProcess(t *testing.T) {
	for _, dir := range []string{"/proc/self/fd/8", "/proc/self/fd/../fd/7", "/proc/1/root", "/x/../proc//self/cwd", "/proc/thread-self/fd/3", "/proc/self"} {
		for _, in := range []func(*ContainerInput){
			func(in *ContainerInput) { in.Config.WorkingDir = dir },
			func(in *ContainerInput) { in.ImageConfig.WorkingDir = dir },
		} {
			wantError(t, errdefs.ErrInvalidArgument, "belongs to a process", in)
		}
	}
}

// Readings of the power counters tell what other containers compute.
func TestGHSA_7ww5_4wqc_m92c_PowercapIsMasked(t *testing.T) {
	if !slices.Contains(DefaultMaskedPaths(nil), "/sys/devices/virtual/powercap") {
		t.Error("not among the defaults")
	}
	for name, s := range map[string]*specs.Spec{
		"sandbox":   mustPause(t, nil),
		"container": mustContainer(t, func(in *ContainerInput) { in.Policy.DisableProcMount = true }),
	} {
		for _, want := range []string{"/sys/devices/virtual/powercap", "/sys/firmware", "/proc/kcore", "/sys/devices/system/cpu/cpu1/thermal_throttle"} {
			if !slices.Contains(s.Linux.MaskedPaths, want) {
				t.Errorf("%s: %s is not masked", name, want)
			}
		}
	}
}

// Groups that were not set gave access that group membership should deny.
func TestCVE_2022_2995_GroupsReachTheProcess(t *testing.T) {
	s := mustContainer(t, nil)
	if u := s.Process.User; !slices.Equal(u.AdditionalGids, []uint32{1001, 5}) {
		t.Errorf("groups %v", u.AdditionalGids)
	}
}

// Limits were lost because the container sat in another cgroup than its pod's.
func TestCVE_2025_47291_CgroupIsBelowThePods(t *testing.T) {
	for _, parent := range []string{"/kubepods/pod1", "kubepods/pod1", "/kubepods/pod1/"} {
		s := mustContainer(t, func(in *ContainerInput) { in.Pod.Linux.CgroupParent = parent })
		if s.Linux.CgroupsPath != "/kubepods/pod1/cid" {
			t.Errorf("%s: %s", parent, s.Linux.CgroupsPath)
		}
	}
	s := mustContainer(t, withUserns(1<<16))
	if s.Linux.CgroupsPath != "/kubepods/pod1/cid" {
		t.Errorf("with a user namespace: %s", s.Linux.CgroupsPath)
	}
}

// Devices smuggled in as annotations of an archive, image labels acted upon:
// nothing of the image but its process settings is looked at.
func TestCVE_2026_53492_CVE_2026_53488_ImageLabelsDoNothing(t *testing.T) {
	plain := mustContainer(t, nil)
	s := mustContainer(t, func(in *ContainerInput) {
		in.ImageConfig.Labels = map[string]string{"containerd.io/restart.loguri": "binary:///bin/sh", "io.cri-containerd.kind": "sandbox", "cdi.k8s.io/x": "v/c=d"}
		in.ImageConfig.Volumes = map[string]struct{}{"/../../etc": {}}
		in.ImageConfig.ExposedPorts = map[string]struct{}{"80/tcp": {}}
	})
	if !maps.Equal(s.Annotations, plain.Annotations) || len(s.Mounts) != len(plain.Mounts) || len(s.Linux.Devices) != 0 {
		t.Errorf("got %v, %v", s.Annotations, destinations(s))
	}
	if names, err := CDIDevices(&cri.ContainerConfig{Image: &cri.ImageSpec{Annotations: map[string]string{"cdi.k8s.io/x": "v/c=d"}}}); len(names) > 0 || err != nil {
		t.Errorf("devices of the image: %q, %v", names, err)
	}
}

// Mounts named "/" or a special file's name replaced more than was meant.
func TestCVE_2024_8676_CVE_2021_43816_MountsNameAPlaceOfTheirOwn(t *testing.T) {
	for _, p := range []string{"/", "//", "/a/..", "/.", "", "a"} {
		wantError(t, errdefs.ErrInvalidArgument, "container_path", withMounts(bind("/etc", p)))
	}
	// A mount the CRI makes over a pod file replaces it; the pod's own file is
	// then not touched, and no relabelling is asked for either way.
	s := mustContainer(t, withMounts(bind("/host/hosts", "/etc/hosts")))
	if m, _ := findMount(s, "/etc/hosts"); m.Source != "/host/hosts" {
		t.Errorf("hosts: %+v", m)
	}
	wantError(t, errdefs.ErrInvalidArgument, "volume 0", func(in *ContainerInput) { in.Volumes = []facts.Mount{bind("/v", "/..")} })
}

// Entries without a key or with a NUL end up as something else in the process.
func TestHostileImageConfig(t *testing.T) {
	for name, image := range map[string]imagespec.ImageConfig{
		"NUL in entrypoint": {Entrypoint: []string{"/bin/sh\x00"}},
		"empty executable":  {Entrypoint: []string{""}},
		"NUL in cmd":        {Entrypoint: []string{"a"}, Cmd: []string{"\x00"}},
		"no key":            {Entrypoint: []string{"a"}, Env: []string{"=x"}},
		"relative workdir":  {Entrypoint: []string{"a"}, WorkingDir: "../../etc"},
	} {
		if _, err := Container(newInput(func(in *ContainerInput) { in.ImageConfig = image })); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
