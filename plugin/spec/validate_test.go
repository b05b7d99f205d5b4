package spec

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestValidatePod(t *testing.T) {
	minimal := func() *cri.PodSandboxConfig {
		return &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Name: "a"}}
	}
	if err := ValidatePod(minimal()); err != nil {
		t.Errorf("minimal: %v", err)
	}
	full := newPause(func(in *PauseInput) {
		in.Config.DnsConfig = &cri.DNSConfig{Servers: []string{"1.1.1.1"}}
		in.Config.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: 8080, HostIp: "::1", Protocol: cri.Protocol_SCTP}, {}}
	}).Config
	if err := ValidatePod(full); err != nil {
		t.Errorf("full: %v", err)
	}
	long := strings.Repeat("a", maxName+1)
	linux := func(c *cri.PodSandboxConfig) *cri.LinuxSandboxSecurityContext {
		c.Linux = &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{}}
		return c.Linux.SecurityContext
	}
	for field, changes := range map[string][]func(*cri.PodSandboxConfig){
		"config.metadata: missing":  {func(c *cri.PodSandboxConfig) { c.Metadata = nil }},
		"config.metadata.name":      {func(c *cri.PodSandboxConfig) { c.Metadata.Name = "" }, func(c *cri.PodSandboxConfig) { c.Metadata.Name = long }, func(c *cri.PodSandboxConfig) { c.Metadata.Name = "../x" }, func(c *cri.PodSandboxConfig) { c.Metadata.Name = "a\n" }},
		"config.metadata.namespace": {func(c *cri.PodSandboxConfig) { c.Metadata.Namespace = "a/b" }},
		"config.metadata.uid":       {func(c *cri.PodSandboxConfig) { c.Metadata.Uid = ".." }, func(c *cri.PodSandboxConfig) { c.Metadata.Uid = "a\x00" }},
		"config.hostname":           {func(c *cri.PodSandboxConfig) { c.Hostname = "-a" }, func(c *cri.PodSandboxConfig) { c.Hostname = strings.Repeat("a", 65) }},
		"log_directory":             {func(c *cri.PodSandboxConfig) { c.LogDirectory = "rel" }, func(c *cri.PodSandboxConfig) { c.LogDirectory = "/var/../etc" }, func(c *cri.PodSandboxConfig) { c.LogDirectory = "/a\n" }},
		"dns_config.servers[0]":     {func(c *cri.PodSandboxConfig) { c.DnsConfig = &cri.DNSConfig{Servers: []string{"a b"}} }},
		"port_mappings[0]":          {func(c *cri.PodSandboxConfig) { c.PortMappings = []*cri.PortMapping{nil} }, func(c *cri.PodSandboxConfig) { c.PortMappings = []*cri.PortMapping{{HostPort: 65536}} }, func(c *cri.PodSandboxConfig) { c.PortMappings = []*cri.PortMapping{{ContainerPort: -1}} }, func(c *cri.PodSandboxConfig) { c.PortMappings = []*cri.PortMapping{{Protocol: 9}} }, func(c *cri.PodSandboxConfig) { c.PortMappings = []*cri.PortMapping{{HostIp: "x"}} }},
		"cgroup_parent":             {func(c *cri.PodSandboxConfig) { linux(c); c.Linux.CgroupParent = "/a/../../b" }, func(c *cri.PodSandboxConfig) { linux(c); c.Linux.CgroupParent = "a:b:c" }},
		"namespace_options.pid":     {func(c *cri.PodSandboxConfig) { linux(c).NamespaceOptions = &cri.NamespaceOption{Pid: modeTarget} }},
		"namespace_options.network": {func(c *cri.PodSandboxConfig) {
			linux(c).NamespaceOptions = &cri.NamespaceOption{Network: modeContainer}
		}},
		"namespace_options.ipc":      {func(c *cri.PodSandboxConfig) { linux(c).NamespaceOptions = &cri.NamespaceOption{Ipc: 9} }},
		"sysctls":                    {func(c *cri.PodSandboxConfig) { linux(c); c.Linux.Sysctls = map[string]string{"vm.swappiness": "1"} }},
		"run_as_group":               {func(c *cri.PodSandboxConfig) { linux(c).RunAsGroup = &cri.Int64Value{} }},
		"run_as_user":                {func(c *cri.PodSandboxConfig) { linux(c).RunAsUser = &cri.Int64Value{Value: 1 << 31} }},
		"supplemental_groups[1]":     {func(c *cri.PodSandboxConfig) { linux(c).SupplementalGroups = []int64{1, -1} }},
		"supplemental_groups_policy": {func(c *cri.PodSandboxConfig) { linux(c).SupplementalGroupsPolicy = 5 }},
	} {
		for _, change := range changes {
			c := minimal()
			change(c)
			if err := ValidatePod(c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), field) {
				t.Errorf("%s: %v", field, err)
			}
		}
	}
	windows := minimal()
	windows.Windows = &cri.WindowsPodSandboxConfig{}
	for field, c := range map[string]*cri.PodSandboxConfig{"windows": windows} {
		if err := ValidatePod(c); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	if err := ValidatePod(nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("nil: %v", err)
	}
}

func TestValidateContainer(t *testing.T) {
	pod := &cri.PodSandboxConfig{}
	minimal := func() *cri.ContainerConfig {
		return &cri.ContainerConfig{Metadata: &cri.ContainerMetadata{Name: "a"}, Image: &cri.ImageSpec{Image: "i"}}
	}
	if err := ValidateContainer(minimal(), pod); err != nil {
		t.Errorf("minimal: %v", err)
	}
	security := func(c *cri.ContainerConfig) *cri.LinuxContainerSecurityContext {
		c.Linux = &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{}}
		return c.Linux.SecurityContext
	}
	for field, change := range map[string]func(*cri.ContainerConfig){
		"config.metadata: missing": func(c *cri.ContainerConfig) { c.Metadata = nil },
		"config.metadata.name":     func(c *cri.ContainerConfig) { c.Metadata.Name = "a/b" },
		"config.image.image":       func(c *cri.ContainerConfig) { c.Image = nil },
		"devices[0]: missing":      func(c *cri.ContainerConfig) { c.Devices = []*cri.Device{nil} },
		"devices[0].host_path":     func(c *cri.ContainerConfig) { c.Devices = []*cri.Device{{}} },
		"devices[0].container_path": func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{HostPath: "/dev/null", ContainerPath: "x"}}
		},
		"CDI_devices[0]": func(c *cri.ContainerConfig) { c.CDIDevices = []*cri.CDIDevice{{Name: "gpu0"}} },
		`annotations["cdi.k8s.io/x"]`: func(c *cri.ContainerConfig) {
			c.Annotations = map[string]string{"cdi.k8s.io/x": "gpu0"}
		},
		"run_as_user and run_as_username": func(c *cri.ContainerConfig) {
			sc := security(c)
			sc.RunAsUser, sc.RunAsUsername = &cri.Int64Value{}, "x"
		},
		"run_as_group: without": func(c *cri.ContainerConfig) { security(c).RunAsGroup = &cri.Int64Value{} },
		"run_as_group: -1": func(c *cri.ContainerConfig) {
			sc := security(c)
			sc.RunAsUsername, sc.RunAsGroup = "x", &cri.Int64Value{Value: -1}
		},
	} {
		c := minimal()
		change(c)
		if err := ValidateContainer(c, pod); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	for field, change := range map[string]func(*cri.ContainerConfig){
		"windows": func(c *cri.ContainerConfig) { c.Windows = &cri.WindowsContainerConfig{} },
	} {
		c := minimal()
		change(c)
		if err := ValidateContainer(c, pod); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	for field, got := range map[string]error{"config: missing": ValidateContainer(nil, pod), "sandbox_config": ValidateContainer(minimal(), nil)} {
		if !errdefs.IsInvalidArgument(got) || !strings.Contains(got.Error(), field) {
			t.Errorf("%s: %v", field, got)
		}
	}
}

func TestLogPath(t *testing.T) {
	for _, tc := range []struct{ dir, name, want string }{
		{"/logs", "web/0.log", "/logs/web/0.log"}, {"/logs/", "./a//b", "/logs/a/b"}, {"/logs", "", ""}, {"", "a", ""}, {"/logs", "a..b", "/logs/a..b"},
	} {
		if got, err := LogPath(tc.dir, tc.name); err != nil || got != tc.want {
			t.Errorf("%+v: got %q, %v", tc, got, err)
		}
	}
}
