package spec

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// All sixteen ways in which entrypoint, cmd, command and args are given.
func TestArgs(t *testing.T) {
	for i, want := range []string{
		0b0000: "", 0b0001: "a", 0b0010: "c", 0b0011: "c a",
		0b0100: "M", 0b0101: "a", 0b0110: "c", 0b0111: "c a",
		0b1000: "E", 0b1001: "E a", 0b1010: "c", 0b1011: "c a",
		0b1100: "E M", 0b1101: "E a", 0b1110: "c", 0b1111: "c a",
	} {
		given := func(bit int, s string) []string {
			if i&bit == 0 {
				return nil
			}
			return []string{s}
		}
		cfg := &cri.ContainerConfig{Args: given(1, "a"), Command: given(2, "c")}
		image := imagespec.ImageConfig{Cmd: given(4, "M"), Entrypoint: given(8, "E")}
		got, err := Args(cfg, image)
		if strings.Join(got, " ") != want || (err != nil) != (want == "") {
			t.Errorf("%04b: got %q, %v, want %q", i, got, err, want)
		}
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%04b: %v, want InvalidArgument", i, err)
		}
	}
	for _, bad := range [][]string{{""}, {"a", "b\x00"}} {
		if _, err := Args(&cri.ContainerConfig{Command: bad}, imagespec.ImageConfig{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, want InvalidArgument", bad, err)
		}
	}
}

func TestArgsDoesNotShareTheImage(t *testing.T) {
	entrypoint := append(make([]string, 0, 8), "E")
	got, err := Args(&cri.ContainerConfig{Args: []string{"a"}}, imagespec.ImageConfig{Entrypoint: entrypoint})
	if err != nil {
		t.Fatal(err)
	}
	got[0] = "changed"
	if entrypoint[0] != "E" || entrypoint[:2][1] != "" {
		t.Errorf("image changed: %q", entrypoint[:2])
	}
}

func TestWorkingDir(t *testing.T) {
	for _, tc := range []struct{ own, image, want string }{
		{"", "", "/"}, {"", "/img", "/img"}, {"/own", "/img", "/own"}, {"/a/./b/../c/", "", "/a/c"}, {"/proc", "", "/proc"}, {"/proc/sys", "", "/proc/sys"},
	} {
		got, err := WorkingDir(&cri.ContainerConfig{WorkingDir: tc.own}, imagespec.ImageConfig{WorkingDir: tc.image})
		if got != tc.want || err != nil {
			t.Errorf("%+v: got %q, %v", tc, got, err)
		}
	}
	for _, bad := range []string{"rel", "./x", "/a\x00", strings.Repeat("/a", 4096)} {
		for _, tc := range []struct{ own, image string }{{bad, ""}, {"", bad}} {
			if got, err := WorkingDir(&cri.ContainerConfig{WorkingDir: tc.own}, imagespec.ImageConfig{WorkingDir: tc.image}); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%.20q: got %q, %v", bad, got, err)
			}
		}
	}
}

func TestEnvironment(t *testing.T) {
	s := mustContainer(t, func(in *ContainerInput) {
		in.Config.Tty = true
		in.ImageConfig.Env = []string{"A=image", "B=image", "EMPTY=", "A=again"}
		in.Config.Envs = []*cri.KeyValue{
			{Key: "B", Value: []byte("own")},
			{Key: "ODD", Value: []byte("a=b\n\xff \t")},
			{Key: "TWICE", Value: []byte("1")},
			{Key: "TWICE", Value: []byte("2")},
		}
	})
	want := []string{defaultPath, "TERM=xterm", "HOSTNAME=pod-host", "A=again", "B=own", "EMPTY=", "ODD=a=b\n\xff \t", "TWICE=2", "HOME=/srv"}
	if !slices.Equal(s.Process.Env, want) {
		t.Errorf("got  %q\nwant %q", s.Process.Env, want)
	}
	if !s.Process.Terminal {
		t.Error("no terminal")
	}
	s = mustContainer(t, func(in *ContainerInput) {
		in.Pod.Linux.SecurityContext.NamespaceOptions.Network = cri.NamespaceMode_NODE
		in.User.Home = ""
		in.ImageConfig.Env = []string{"PATH=/only", "HOSTNAME=image", "HOME=/image"}
	})
	if want := []string{"PATH=/only", "HOSTNAME=image", "HOME=/image"}; !slices.Equal(s.Process.Env, want) {
		t.Errorf("got %q, want %q", s.Process.Env, want)
	}
	s = mustContainer(t, func(in *ContainerInput) { in.Pod.Hostname, in.User.Home = "", "" })
	if want := []string{defaultPath, "HOSTNAME=node-1", "HOME=/"}; !slices.Equal(s.Process.Env, want) {
		t.Errorf("got %q, want %q", s.Process.Env, want)
	}
}

func TestEnvironmentErrors(t *testing.T) {
	for _, kv := range []*cri.KeyValue{nil, {}, {Key: "a=b"}, {Key: "a\x00"}, {Key: "a", Value: []byte("x\x00")}} {
		wantError(t, errdefs.ErrInvalidArgument, "config.envs[0]", func(in *ContainerInput) { in.Config.Envs = []*cri.KeyValue{kv} })
	}
	for _, kv := range []string{"", "FOO", "=x", "A=\x00"} {
		wantError(t, errdefs.ErrInvalidArgument, "environment of the image", func(in *ContainerInput) { in.ImageConfig.Env = []string{kv} })
	}
}

func TestProcess(t *testing.T) {
	s := mustContainer(t, func(in *ContainerInput) {
		sec(in).NoNewPrivs, sec(in).ReadonlyRootfs = true, true
		in.Config.WorkingDir = "/w"
	})
	if want := (specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{1001, 5}}); !reflect.DeepEqual(s.Process.User, want) {
		t.Errorf("user %+v, want %+v", s.Process.User, want)
	}
	if !s.Process.NoNewPrivileges || !s.Root.Readonly || s.Root.Path != "rootfs" || s.Process.Cwd != "/w" || s.Version != oldVersion {
		t.Errorf("got %+v %+v", s.Process, s.Root)
	}
	if s = mustContainer(t, nil); s.Process.NoNewPrivileges || s.Root.Readonly || s.Process.Rlimits != nil {
		t.Errorf("defaults: %+v %+v", s.Process, s.Root)
	}
	s = mustContainer(t, func(in *ContainerInput) { in.Handler.OCIVersion = "1.0.2-dev" })
	if s.Version != "1.0.2-dev" {
		t.Errorf("version %s", s.Version)
	}
}

func TestCapabilities(t *testing.T) {
	all := testHost().Capabilities
	for name, tc := range map[string]struct {
		add, drop []string
		want      []string
	}{
		"default":                {nil, nil, defaultCapabilities},
		"add":                    {[]string{"NET_ADMIN"}, nil, append(slices.Clone(defaultCapabilities), "CAP_NET_ADMIN")},
		"prefix and case":        {[]string{"cap_net_admin"}, []string{"Chown"}, append(slices.Clone(defaultCapabilities[1:]), "CAP_NET_ADMIN")},
		"drop all":               {nil, []string{"ALL"}, nil},
		"drop all, add one":      {[]string{"KILL"}, []string{"all"}, []string{"CAP_KILL"}},
		"add all":                {[]string{"ALL"}, nil, all},
		"add all, drop one":      {[]string{"ALL"}, []string{"SYS_ADMIN"}, without(slices.Clone(all), []string{"CAP_SYS_ADMIN"})},
		"both all":               {[]string{"ALL", "KILL"}, []string{"ALL"}, []string{"CAP_KILL"}},
		"added and dropped":      {[]string{"NET_ADMIN"}, []string{"NET_ADMIN"}, defaultCapabilities},
		"more than the daemon's": {[]string{"SYS_RESOURCE"}, nil, defaultCapabilities},
		"all, daemon lacks one":  {[]string{"ALL", "SYS_RESOURCE"}, nil, all},
		"drop what is not there": {nil, []string{"SYS_BOOT"}, defaultCapabilities},
	} {
		t.Run(name, func(t *testing.T) {
			s := mustContainer(t, func(in *ContainerInput) {
				sec(in).Capabilities = &cri.Capability{AddCapabilities: tc.add, DropCapabilities: tc.drop}
			})
			c := s.Process.Capabilities
			got, want := slices.Sorted(slices.Values(c.Bounding)), slices.Sorted(slices.Values(tc.want))
			if !slices.Equal(got, want) || !slices.Equal(c.Bounding, c.Effective) || !slices.Equal(c.Bounding, c.Permitted) || c.Inheritable != nil || c.Ambient != nil {
				t.Errorf("got %+v, want %v", c, tc.want)
			}
		})
	}
	wantError(t, errdefs.ErrInvalidArgument, `unknown capability "FLY"`, func(in *ContainerInput) { sec(in).Capabilities.AddCapabilities = []string{"FLY"} })
	wantError(t, errdefs.ErrInvalidArgument, `drop_capabilities: unknown capability ""`, func(in *ContainerInput) { sec(in).Capabilities.DropCapabilities = []string{""} })
	wantError(t, errdefs.ErrInvalidArgument, `add_ambient_capabilities: unknown capability "FLY"`, func(in *ContainerInput) { sec(in).Capabilities.AddAmbientCapabilities = []string{"FLY"} })
}

func TestAmbientCapabilities(t *testing.T) {
	all := testHost().Capabilities
	with := func(names ...string) []string { return slices.Concat(defaultCapabilities, names) }
	for name, tc := range map[string]struct {
		ambient, drop []string
		edit          func(*ContainerInput)
		want, set     []string
	}{
		"one the container has":    {ambient: []string{"KILL"}, want: []string{"CAP_KILL"}, set: defaultCapabilities},
		"one it has not":           {ambient: []string{"cap_net_admin"}, want: []string{"CAP_NET_ADMIN"}, set: with("CAP_NET_ADMIN")},
		"in the kernel's order":    {ambient: []string{"SYS_TIME", "KILL", "KILL"}, want: []string{"CAP_KILL", "CAP_SYS_TIME"}, set: with("CAP_SYS_TIME")},
		"of none":                  {ambient: []string{"KILL"}, drop: []string{"ALL"}, want: []string{"CAP_KILL"}, set: []string{"CAP_KILL"}},
		"all":                      {ambient: []string{"ALL"}, drop: []string{"KILL"}, want: without(slices.Clone(defaultCapabilities), []string{"CAP_KILL"}), set: without(slices.Clone(defaultCapabilities), []string{"CAP_KILL"})},
		"all of none":              {ambient: []string{"ALL"}, drop: []string{"ALL"}},
		"dropped":                  {ambient: []string{"NET_ADMIN"}, drop: []string{"NET_ADMIN"}, set: defaultCapabilities},
		"more than the daemon's":   {ambient: []string{"SYS_RESOURCE"}, set: defaultCapabilities},
		"privileged":               {edit: privileged, set: all},
		"privileged and asked for": {ambient: []string{"SYS_ADMIN"}, edit: privileged, want: []string{"CAP_SYS_ADMIN"}, set: all},
		"privileged and dropped":   {ambient: []string{"SYS_ADMIN"}, drop: []string{"SYS_ADMIN"}, edit: privileged, set: all},
		"privileged beyond daemon": {ambient: []string{"SYS_RESOURCE"}, edit: privileged, set: all},
	} {
		t.Run(name, func(t *testing.T) {
			s := mustContainer(t, func(in *ContainerInput) {
				if tc.edit != nil {
					tc.edit(in)
				}
				sec(in).Capabilities = &cri.Capability{AddAmbientCapabilities: tc.ambient, DropCapabilities: tc.drop}
			})
			c := s.Process.Capabilities
			if !slices.Equal(c.Ambient, tc.want) || !slices.Equal(c.Inheritable, tc.want) {
				t.Errorf("ambient %v, inheritable %v, want %v", c.Ambient, c.Inheritable, tc.want)
			}
			set := slices.Sorted(slices.Values(tc.set))
			for kind, got := range map[string][]string{"bounding": c.Bounding, "permitted": c.Permitted, "effective": c.Effective} {
				if !slices.Equal(slices.Sorted(slices.Values(got)), set) {
					t.Errorf("%s is %v, want %v", kind, got, tc.set)
				}
			}
		})
	}
}

func TestStopSignal(t *testing.T) {
	for value, name := range cri.Signal_name {
		if value == 0 {
			continue
		}
		sig, err := StopSignal(&cri.ContainerConfig{StopSignal: cri.Signal(value)}, imagespec.ImageConfig{StopSignal: "SIGKILL"})
		if err != nil || sig.Number <= 0 || sig.Number > rtMax {
			t.Errorf("%s: got %+v, %v", name, sig, err)
			continue
		}
		again, err := ParseSignal(sig.Name)
		if err != nil || again != sig {
			t.Errorf("%s: %q parses to %+v, %v", name, sig.Name, again, err)
		}
		// Aliases come back under their first name.
		if back := sig.CRI(); back != cri.Signal(value) && signalAliases[strings.TrimPrefix(name, "SIGNAL_")] != sig.Name {
			t.Errorf("%s came back as %s", name, back)
		}
		byNumber, err := ParseSignal(fmt.Sprint(int(sig.Number)))
		if err != nil || byNumber != sig {
			t.Errorf("%s: number %d parses to %+v, %v", name, sig.Number, byNumber, err)
		}
	}
	for s, want := range map[string]int{"": 15, "TERM": 15, "sigquit": 3, "9": 9, "SIGRTMIN": 34, "RTMIN+3": 37, "SIGRTMIN+15": 49, "SIGRTMAX-14": 50, "rtmax": 64, "SIGRTMAX-30": 34, "SIGRTMIN+30": 64, "37": 37, "IOT": 6, "CLD": 17, "POLL": 29} {
		if sig, err := StopSignal(nil, imagespec.ImageConfig{StopSignal: s}); err != nil || int(sig.Number) != want {
			t.Errorf("%q: got %+v, %v, want %d", s, sig, err, want)
		}
	}
	for _, bad := range []string{"0", "32", "33", "65", "-1", "SIG", "SIGNOPE", "RTMIN+", "RTMIN-1", "RTMIN+31", "RTMAX+1", "RTMAX-31", "RTMIN+-1", "SIGRTMIN+3x", "TERM\n", "99999999999"} {
		if sig, err := StopSignal(nil, imagespec.ImageConfig{StopSignal: bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %+v, %v", bad, sig, err)
		}
	}
	if _, err := StopSignal(&cri.ContainerConfig{StopSignal: 99}, imagespec.ImageConfig{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown CRI signal: %v", err)
	}
}
