package spec

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func declaring(volumes ...string) imagespec.ImageConfig {
	c := imagespec.ImageConfig{Volumes: map[string]struct{}{}}
	for _, v := range volumes {
		c.Volumes[v] = struct{}{}
	}
	return c
}

func TestDeclaredVolumes(t *testing.T) {
	for name, tc := range map[string]struct {
		declared, asked []string
		policy          Policy
		want            []string
	}{
		"none":            {},
		"sorted":          {declared: []string{"/b", "/a/b", "/a"}, want: []string{"/a", "/a/b", "/b"}},
		"one name":        {declared: []string{"/a", "/a/", "a", "//a/./x/.."}, want: []string{"/a"}},
		"up":              {declared: []string{"../../etc/x", "/../y"}, want: []string{"/etc/x", "/y"}},
		"the root":        {declared: []string{"/", "", ".", "/..", "/a/.."}},
		"of the kernel":   {declared: []string{"/proc", "/proc/self/root", "/sys/fs/cgroup", "/dev", "/dev/shm", "/x/../dev", "/device"}, want: []string{"/device"}},
		"asked":           {declared: []string{"/a", "/a/b", "/ab"}, asked: []string{"/a/"}, want: []string{"/ab"}},
		"asked below":     {declared: []string{"/a"}, asked: []string{"/a/b"}, want: []string{"/a"}},
		"not looked into": {declared: []string{"/a"}, policy: Policy{IgnoreImageVolumes: true}},
	} {
		t.Run(name, func(t *testing.T) {
			var asked []*cri.Mount
			for _, p := range tc.asked {
				asked = append(asked, &cri.Mount{ContainerPath: p})
			}
			got, err := DeclaredVolumes(asked, declaring(tc.declared...), tc.policy)
			if err != nil || !slices.Equal(got, tc.want) {
				t.Errorf("got %q, %v, want %q", got, err, tc.want)
			}
		})
	}
	many := declaring()
	for i := range maxDeclared + 1 {
		many.Volumes[fmt.Sprint("/", i)] = struct{}{}
	}
	if got, err := DeclaredVolumes(nil, many, Policy{}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("got %d volumes, %v", len(got), err)
	}
}

func TestImageMounts(t *testing.T) {
	image := func(m *cri.Mount) func(*ContainerInput) {
		return func(in *ContainerInput) { in.Config.Mounts = []*cri.Mount{m} }
	}
	ref := &cri.ImageSpec{Image: "model"}
	for names, m := range map[string]*cri.Mount{
		"config.mounts[0].image.image":    {ContainerPath: "/m", Image: &cri.ImageSpec{}},
		"config.mounts[0].image_sub_path": {ContainerPath: "/m", Image: ref, ImageSubPath: "a\x00"},
		"config.mounts[0].propagation":    {ContainerPath: "/m", Image: ref, Propagation: cri.MountPropagation_PROPAGATION_BIDIRECTIONAL},
		"host_path and image":             {ContainerPath: "/m", Image: ref, HostPath: "/x"},
		"config.mounts[0].container_path": {ContainerPath: "/", Image: ref},
	} {
		wantError(t, errdefs.ErrInvalidArgument, names, image(m))
	}
	s := mustContainer(t, func(in *ContainerInput) {
		image(&cri.Mount{ContainerPath: "/m/", Image: ref, ImageSubPath: "a/../../b"})(in)
		m := bind("/state/volumes/1/0", "/m")
		m.Readonly, m.Options = true, []string{"nosuid", "nodev", "noexec"}
		in.Mounts = append(in.Mounts, m)
	})
	if m, _ := findMount(s, "/m"); !slices.Equal(m.Options, []string{"rbind", "rprivate", "ro", "nosuid", "nodev", "noexec"}) || m.Source != "/state/volumes/1/0" {
		t.Errorf("mount is %+v", m)
	}
}

// The pod's files are stronger than what an image declares.
func TestVolumesUnderPodFiles(t *testing.T) {
	s := mustContainer(t, func(in *ContainerInput) {
		in.Volumes = append(in.Volumes, bind("/v/0", "/etc"), bind("/v/1", "/etc/hosts"))
	})
	etc, _ := findMount(s, "/etc")
	hosts, _ := findMount(s, "/etc/hosts")
	if etc.Source != "/v/0" || hosts.Source != "/pod/hosts" {
		t.Errorf("mounts are %+v, %+v", etc, hosts)
	}
}
