package config

import (
	"math"
	"testing"
)

func TestWorkloads(t *testing.T) {
	p, err := parseText(t, rt+`
workloads.b = { activation_annotation = "b/b" }
workloads.a = { activation_annotation = "a/a", annotation_prefix = "p", allowed_annotations = ["umask.crio.io"], resources = { cpushares = 20, cpuset = "0-1", cpulimit = 500, cpuperiod = 1000 } }
`)
	if err != nil || len(p.warnings) != 0 {
		t.Fatal(err, p.warnings)
	}
	equal(t, p.runtime.Workloads, []Workload{
		{"a", "a/a", "p", []string{"umask.crio.io"}, WorkloadResources{CPUShares: 20, CPUSet: "0-1", CPULimit: 500, CPUPeriod: 1000}},
		{Name: "b", ActivationAnnotation: "b/b"},
	})
}

// TestInherited: what a handler takes from the default one, and keeps.
func TestInherited(t *testing.T) {
	p, err := parseText(t, rt+`
containerd.default_runtime_name = "runc"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
runtime_path = "/shim"
snapshotter = "a"
platform_runtime_paths = { "arm64" = "/arm", "linux/amd64/v1" = "/amd" }
options = { BinaryName = "/runc", SystemdCgroup = true }
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.heir]
inherit_default_runtime = true
snapshotter = "b"
`)
	if err != nil {
		t.Fatal(err)
	}
	runc, heir := p.runtime.Handlers["runc"], p.runtime.Handlers["heir"]
	equal(t, runc.PlatformRuntimePaths, map[string]string{"linux/arm64": "/arm", "linux/amd64": "/amd"})
	equal(t, heir.Options, runc.Options)
	if heir.RuntimeType != runc.RuntimeType || heir.RuntimePath != "/shim" || heir.Snapshotter != "b" || heir.PlatformRuntimePaths != nil {
		t.Errorf("the heir is %+v", heir)
	}
}

// TestOwnHandler: the default handler has what the handler runc has, but for the
// shim. One of that name that is configured is as it is configured.
func TestOwnHandler(t *testing.T) {
	const runc = `
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
runtime_path = "/shim"
snapshotter = "a"
options = { BinaryName = "/runc", SystemdCgroup = true }
`
	options := map[string]any{"BinaryName": "/runc"}
	for name, tc := range map[string]struct {
		text string
		want Handler
	}{
		"as runc": {rt + runc, Handler{Name: "gantry", RuntimeType: gantryType, Sandboxer: "shim", Snapshotter: "a", Options: options}},
		"an heir": {rt + runc + `
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.heir]
inherit_default_runtime = true
`, Handler{Name: "heir", RuntimeType: gantryType, Sandboxer: "podsandbox", Options: options}},
		"runc is something else": {
			rt + "containerd.runtimes.runc = { runtime_type = 'io.containerd.kata.v2', snapshotter = 'a' }",
			Handler{Name: "gantry", RuntimeType: gantryType, Sandboxer: "shim"},
		},
		"configured": {
			rt + runc + "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.gantry]\nruntime_type = 'io.containerd.runsc.v1'",
			Handler{Name: "gantry", RuntimeType: "io.containerd.runsc.v1", Sandboxer: "podsandbox"},
		},
	} {
		p, err := parseText(t, tc.text)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		equal(t, p.runtime.DefaultHandler, "gantry")
		h := p.runtime.Handlers[tc.want.Name]
		if h.Name != tc.want.Name || h.RuntimeType != tc.want.RuntimeType || h.RuntimePath != "" || h.Sandboxer != tc.want.Sandboxer || h.Snapshotter != tc.want.Snapshotter {
			t.Errorf("%s: it is %+v", name, h)
		}
		if h.Options["BinaryName"] != tc.want.Options["BinaryName"] {
			t.Errorf("%s: its options are %v", name, h.Options)
		}
	}
}

func TestParseDevice(t *testing.T) {
	for _, text := range []string{"", "dev/a", "/dev/a:", "/dev/a:/dev/b:", "/dev/a:/dev/b:rx", "/dev/a:rwmr", "/dev/a:r:/dev/b", "/dev/a:/dev/b:r:w", "/dev/a\x00"} {
		if d, err := ParseDevice(text); err == nil {
			t.Errorf("%q is %+v", text, d)
		}
	}
}

func FuzzParseDevice(f *testing.F) {
	f.Add("/dev/a:/dev/b:rwm")
	f.Add("/dev/a:r")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := ParseDevice(text)
		if err != nil {
			return
		}
		if again, err := ParseDevice(d.Host + ":" + d.Container + ":" + d.Permissions); err != nil || again != d {
			t.Errorf("%q is %+v, and that %+v, %v", text, d, again, err)
		}
	})
}

func TestContainers(t *testing.T) {
	p, err := parseText(t, rt)
	if err != nil {
		t.Fatal(err)
	}
	if c := p.runtime.Containers; len(c.Capabilities) != 14 || c.Capabilities[0] != "CAP_CHOWN" || len(c.Env) != 0 || len(c.Ulimits) != 0 || c.PidsLimit != 0 {
		t.Errorf("by default %+v", c)
	}
	p, err = parseText(t, rt+`
default_capabilities = ["chown", "CAP_KILL"]
add_inheritable_capabilities = true
uid_mappings = "0:100000:65536"
gid_mappings = "0:200000:70000"
default_env = ["A=1", "B=x=y", "C="]
default_ulimits = ["nofile=1:2", "core=0", "RLIMIT_MEMLOCK=unlimited", "nproc=5:-1", "nofile=7"]
seccomp_profile = "/etc/s.json"
pids_limit = 100
container_min_memory = 12582912
containerd.runtimes.runc.seccomp_profile = "/etc/r.json"
additional_devices = ["/dev/a", "/dev/b:/dev/c:r", "/dev/d:rw"]
allowed_devices = ["/dev//a/"]
privileged_seccomp_profile = "/etc/p.json"
read_only = true
absent_mount_sources_to_reject = ["/etc/hostname"]
bind_mount_prefix = "/host"
timezone = "Europe/Berlin"
default_mounts_file = "/etc/mounts.conf"
containerenv_file = true
minimum_mappable_uid = 1000
minimum_mappable_gid = 0
min_injected_gomaxprocs = 2
`)
	if err != nil || len(p.warnings) != 0 {
		t.Fatal(err, p.warnings)
	}
	equal(t, p.runtime.Containers, Containers{
		Capabilities: []string{"CAP_CHOWN", "CAP_KILL"}, Env: []string{"A=1", "B=x=y", "C="},
		Ulimits: []Ulimit{
			{"RLIMIT_CORE", 0, 0}, {"RLIMIT_MEMLOCK", math.MaxUint64, math.MaxUint64},
			{"RLIMIT_NPROC", 5, math.MaxUint64}, {"RLIMIT_NOFILE", 7, 7},
		},
		SeccompProfile: "/etc/s.json", PasswdEntries: true, PidsLimit: 100, MinMemory: 12 << 20,
		AdditionalDevices: []Device{{"/dev/a", "/dev/a", "rwm"}, {"/dev/b", "/dev/c", "r"}, {"/dev/d", "/dev/d", "rw"}}, AllowedDevices: []string{"/dev/a"},
		PrivilegedSeccompProfile: "/etc/p.json", ReadOnly: true, AbsentMountSourcesToReject: []string{"/etc/hostname"},
		BindMountPrefix: "/host", Timezone: "Europe/Berlin", DefaultMountsFile: "/etc/mounts.conf", EnvFile: true,
		MinMappableUID: 1000, MinMappableGID: 0, MinGOMAXPROCS: 2,
		InheritableCapabilities: true,
		UIDMapping:              IDMapping{100000, 65536}, GIDMapping: IDMapping{200000, 70000},
	})
	equal(t, p.runtime.Handlers["runc"].SeccompProfile, "/etc/r.json")
	for _, text := range []string{"1:100000:65536", "0:100000", "0:100000:65535", "0:4294901760:65536", "0:x:65536", "0:-1:65536", "0:1:65536,65536:70000:1", "0:100000:99999999999"} {
		if _, err := parseText(t, rt+"uid_mappings = '"+text+"'\ngid_mappings = '0:1:65536'"); err == nil {
			t.Errorf("uid_mappings %s is taken", text)
		}
	}
	if _, err := parseText(t, rt+"uid_mappings = '0:1:65536'"); err == nil {
		t.Error("uid_mappings alone is taken")
	}
	p, err = parseText(t, rt+"default_capabilities = []")
	if err != nil || len(p.runtime.Containers.Capabilities) != 0 {
		t.Errorf("no capabilities became %v, %v", p.runtime.Containers.Capabilities, err)
	}
}
