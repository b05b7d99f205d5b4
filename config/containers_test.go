package config

import (
	"math"
	"testing"
)

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
default_env = ["A=1", "B=x=y", "C="]
default_ulimits = ["nofile=1:2", "core=0", "RLIMIT_MEMLOCK=unlimited", "nproc=5:-1", "nofile=7"]
seccomp_profile = "/etc/s.json"
pids_limit = 100
container_min_memory = 12582912
containerd.runtimes.runc.seccomp_profile = "/etc/r.json"
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
	})
	equal(t, p.runtime.Handlers["runc"].SeccompProfile, "/etc/r.json")
	p, err = parseText(t, rt+"default_capabilities = []")
	if err != nil || len(p.runtime.Containers.Capabilities) != 0 {
		t.Errorf("no capabilities became %v, %v", p.runtime.Containers.Capabilities, err)
	}
}
