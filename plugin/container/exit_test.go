package container

import "testing"

func TestFilterKills(t *testing.T) {
	for spec, want := range map[string]bool{
		``:             false,
		`{}`:           false,
		`{"linux":{}}`: false,
		`{"linux":{"seccomp":{"defaultAction":"SCMP_ACT_ERRNO"}}}`: false,
		`{"linux":{"seccomp":{"defaultAction":"SCMP_ACT_KILL"}}}`:  true,
		`{"linux":{"seccomp":{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_LOG"},{"names":["b"],"action":"SCMP_ACT_KILL_PROCESS"}]}}}`: true,
	} {
		if got := filterKills([]byte(spec)); got != want {
			t.Errorf("%s: %v", spec, got)
		}
	}
}
