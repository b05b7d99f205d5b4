package spec

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
)

func annotated(name, value string) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{Annotations: map[string]string{name: value}}
}

// everything allows all annotations that there are.
var everything = Handler{AllowedAnnotations: config.Allowable()}

// TestNotPermitted: without the handler's leave none has an effect, not even an
// error.
func TestNotPermitted(t *testing.T) {
	for _, name := range config.Allowable() {
		pod := annotated(name, "nonsense")
		mask, err1 := umask(pod, Handler{})
		size, err2 := ShmSize(pod, Handler{})
		devices, err3 := PodDevices(pod, Handler{}, Policy{})
		if mask != nil || size != 0 || devices != nil || err1 != nil || err2 != nil || err3 != nil {
			t.Errorf("%s: %v %v %v, %v %v %v", name, mask, size, devices, err1, err2, err3)
		}
	}
}

func TestUmask(t *testing.T) {
	for value, want := range map[string]int64{"077": 0o77, "0": 0, "777": 0o777, "0022": 0o22, "": -1, "8": -1, "1000": -1, "-1": -1, "0x7": -1, "7 7": -1} {
		for _, name := range []string{config.AnnotationUmask, config.AnnotationUmaskOld} {
			got, err := umask(annotated(name, value), everything)
			if want < 0 && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name)) || want >= 0 && (err != nil || int64(*got) != want) {
				t.Errorf("%s %q: %v, %v", name, value, got, err)
			}
		}
	}
	s := mustContainer(t, func(in *ContainerInput) {
		in.Handler, in.Pod.Annotations = everything, map[string]string{config.AnnotationUmask: "077"}
	})
	if s.Process.User.Umask == nil || *s.Process.User.Umask != 0o77 {
		t.Errorf("the process has %v", s.Process.User.Umask)
	}
	if s := mustContainer(t, nil); s.Process.User.Umask != nil {
		t.Errorf("without an annotation %v", *s.Process.User.Umask)
	}
}

func TestShmSize(t *testing.T) {
	for value, want := range map[string]int64{
		"128Mi": 128 << 20, "1": 1, "1k": 1000, "2M": 2e6, "3G": 3e9, "1Ki": 1024, "1Gi": 1 << 30, "8388607Ti": (1<<23 - 1) << 40,
		"": 0, "0": 0, "0Mi": 0, "-1": 0, "1.5Gi": 0, "Mi": 0, "1m": 0, "1MiMi": 0, "1 Mi": 0, "1Mi,size=1": 0, "8388608Ti": 0, "9223372036854775808": 0, "1e3": 0,
	} {
		got, err := ShmSize(annotated(config.AnnotationShmSize, value), everything)
		if got != want || (want == 0) != errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %d, %v, want %d", value, got, err, want)
		}
	}
}

func TestPodDevices(t *testing.T) {
	p := Policy{AllowedDevices: []string{"/dev/fuse", "/dev/null"}}
	got, err := PodDevices(annotated(config.AnnotationDevicesOld, "/dev/fuse, /dev//null:/dev/n:r"), everything, p)
	if err != nil || len(got) != 2 || got[0].ContainerPath != "/dev/fuse" || got[0].Permissions != "rwm" || got[1].ContainerPath != "/dev/n" || got[1].Permissions != "r" {
		t.Errorf("got %v, %v", got, err)
	}
	for value, is := range map[string]func(error) bool{
		"/dev/fuse,/dev/sda": errdefs.IsPermissionDenied,
		"/dev/fuse/../sda":   errdefs.IsPermissionDenied,
		"/dev/fuse,":         errdefs.IsInvalidArgument,
		"fuse":               errdefs.IsInvalidArgument,
		"/dev/fuse:/dev/x:x": errdefs.IsInvalidArgument,
		strings.Repeat("/dev/null,", 64) + "/dev/null": errdefs.IsInvalidArgument,
	} {
		if got, err := PodDevices(annotated(config.AnnotationDevices, value), everything, p); !is(err) || !strings.Contains(err.Error(), config.AnnotationDevices) {
			t.Errorf("%.40q: %v, %v", value, got, err)
		}
	}
}

func TestGoProcs(t *testing.T) {
	const burstable = "/kubepods/burstable/podx"
	for name, tc := range map[string]struct {
		floor, shares, quota int64
		group, skip          string
		want                 string
	}{
		"off":               {0, 4096, 0, burstable, "", ""},
		"floor":             {4, 2048, 0, burstable, "", "4"},
		"request":           {4, 8192, 0, burstable, "", "8"},
		"rounded up":        {1, 1025, 0, burstable, "", "2"},
		"best effort":       {3, 2, 0, "kubepods-besteffort-podx.slice", "", "3"},
		"with a limit":      {4, 8192, 100000, burstable, "", ""},
		"limit taken away":  {4, 8192, -1, burstable, "", "8"},
		"guaranteed":        {4, 8192, 0, "/kubepods/podx", "", ""},
		"does not want":     {4, 8192, 0, burstable, "true", ""},
		"does not not want": {4, 8192, 0, burstable, "false", "8"},
	} {
		s := mustContainer(t, func(in *ContainerInput) {
			in.Handler, in.Policy.MinGOMAXPROCS, in.Pod.Linux.CgroupParent = everything, tc.floor, tc.group
			in.Config.Linux.Resources = &cri.LinuxContainerResources{CpuShares: tc.shares, CpuQuota: tc.quota}
			if tc.skip != "" {
				in.Pod.Annotations = map[string]string{config.AnnotationNoGOMAXPROCS: tc.skip}
			}
		})
		if got, _ := envOf(s, gomaxprocs); got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
	for name, edit := range map[string]func(*ContainerInput){
		"pod":   func(in *ContainerInput) { in.Config.Envs = []*cri.KeyValue{{Key: gomaxprocs, Value: []byte("16")}} },
		"image": func(in *ContainerInput) { in.ImageConfig.Env = []string{gomaxprocs + "=16"} },
	} {
		s := mustContainer(t, func(in *ContainerInput) {
			in.Policy.MinGOMAXPROCS, in.Pod.Linux.CgroupParent = 4, burstable
			edit(in)
		})
		if got, _ := envOf(s, gomaxprocs); got != "16" {
			t.Errorf("set by the %s: %q", name, got)
		}
	}
}

func TestCheckMappings(t *testing.T) {
	pod := func(user int64, uid, gid uint32) *cri.PodSandboxConfig {
		return &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
			RunAsUser: &cri.Int64Value{Value: user},
			NamespaceOptions: &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{
				Mode: cri.NamespaceMode_POD, Uids: []*cri.IDMapping{{HostId: uid, Length: 65536}}, Gids: []*cri.IDMapping{{HostId: gid, Length: 65536}},
			}},
		}}}
	}
	p := Policy{MinMappableUID: 100000, MinMappableGID: 200000}
	for name, tc := range map[string]struct {
		pod  *cri.PodSandboxConfig
		says string
	}{
		"high":      {pod(1000, 100000, 200000), ""},
		"low user":  {pod(1000, 99999, 200000), "uids[0].host_id: 99999 is below the 100000 of minimum_mappable_uid"},
		"low group": {pod(1000, 100000, 199999), "minimum_mappable_gid"},
		"root":      {pod(0, 1, 1), ""},
		"none":      {&cri.PodSandboxConfig{}, ""},
	} {
		err := CheckMappings(tc.pod, p)
		if (tc.says == "") != (err == nil) || err != nil && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := CheckMappings(pod(1000, 0, 0), Policy{MinMappableUID: -1, MinMappableGID: -1}); err != nil {
		t.Errorf("without a bound: %v", err)
	}
}

func TestParseMountsFile(t *testing.T) {
	got, err := ParseMountsFile("f", []byte("# all\n/a:/b/../c\n\n /d # same\n/e:/f"))
	if err != nil || len(got) != 3 || got[0].ContainerPath != "/c" || got[1].HostPath != "/d" || got[1].ContainerPath != "/d" || !got[2].Readonly {
		t.Errorf("got %v, %v", got, err)
	}
	for _, text := range []string{"a:/b", "/a:b", "/a:/", "/a:/b:/c", "/a:/b\x00", ":", strings.Repeat("/a\n", 257)} {
		if got, err := ParseMountsFile("f", []byte(text)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "f:") {
			t.Errorf("%.20q: %v, %v", text, got, err)
		}
	}
}

func TestLogVolumes(t *testing.T) {
	const dir = "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~empty-dir/"
	c := &cri.ContainerConfig{Mounts: []*cri.Mount{
		{HostPath: dir + "other"}, {HostPath: dir + "logs/"}, {HostPath: "/var/lib/kubelet/pods/u-2/volumes/kubernetes.io~empty-dir/logs"},
		{HostPath: dir + "logs/sub"}, {HostPath: dir + "x/../logs"}, {Image: &cri.ImageSpec{Image: "x"}}, {HostPath: dir + "more-logs"},
	}}
	for value, want := range map[string][]int{"logs": {1, 4}, "none": nil, "sub": nil} {
		pod := annotated(config.AnnotationLinkLogs, value)
		pod.Metadata = &cri.PodSandboxMetadata{Uid: "u-1"}
		if got, err := LogVolumes(pod, c, everything); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v", value, got, err)
		}
		if got, err := LogVolumes(pod, c, Handler{}); err != nil || got != nil {
			t.Errorf("%s, not allowed: %v, %v", value, got, err)
		}
	}
	for _, value := range []string{"", "..", "a/b", "../logs", "A", strings.Repeat("a", 64), "-a", "a\n"} {
		if got, err := LogVolumes(annotated(config.AnnotationLinkLogsOld, value), c, everything); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, %v", value, got, err)
		}
	}
}

// FuzzPermitted: whatever a pod's author writes is refused or within bounds.
func FuzzPermitted(f *testing.F) {
	for _, value := range []string{"077", "128Mi", "/dev/fuse:/dev/x:r,/dev/null", "1Ti", ""} {
		f.Add(value)
	}
	p := Policy{AllowedDevices: []string{"/dev/fuse"}}
	f.Fuzz(func(t *testing.T, value string) {
		if mask, err := umask(annotated(config.AnnotationUmask, value), everything); err == nil && *mask > 0o777 {
			t.Errorf("umask %o", *mask)
		}
		if size, err := ShmSize(annotated(config.AnnotationShmSize, value), everything); err == nil && size <= 0 {
			t.Errorf("size %d", size)
		}
		devices, err := PodDevices(annotated(config.AnnotationDevices, value), everything, p)
		if err != nil && devices != nil {
			t.Errorf("devices %v, %v", devices, err)
		}
		mounts, err := ParseMountsFile("f", []byte(value))
		for _, m := range mounts {
			if err != nil || !strings.HasPrefix(m.HostPath, "/") || m.ContainerPath == "/" || hasControl(m.HostPath+m.ContainerPath) {
				t.Errorf("mount %v, %v", m, err)
			}
		}
	})
}
