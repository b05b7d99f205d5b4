package supervisor

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for line, want := range map[string]struct {
		s       Supervisor
		address string
	}{
		"/usr/bin/containerd-shim-gantry-v2 serve -namespace k8s.io -address /run/c.sock -ttrpc-address /run/t -socket /run/s/x -debug": {
			Supervisor{Namespace: "k8s.io", Socket: "/run/s/x"}, "/run/c.sock",
		},
		"/usr/bin/containerd-shim-runc-v2 -namespace k8s.io -id a -address /run/c.sock": {},
		"vim serve -address /run/c.sock -socket /run/s/x":                               {},
		"containerd-shim-gantry-v2":                                                     {},
		"containerd-shim-gantry-v2 serve -socket":                                       {},
	} {
		s, address := parse(strings.Split(line, " "))
		if s != want.s || address != want.address {
			t.Errorf("%s: %+v, %q", line, s, address)
		}
	}
}
